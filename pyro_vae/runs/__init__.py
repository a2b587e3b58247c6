"""Run folders: what `pyro_vae.fit` writes and `pyro_vae.load` reads."""

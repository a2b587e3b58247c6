"""``python -m pyro_vae`` runs the command ``pyro-vae``."""

from pyro_vae.cli.main import main

if __name__ == "__main__":
    main()

"""Sentences as points: a VAE of text, with and without what keeps its latent vector in use."""

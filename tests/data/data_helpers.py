"""Shared helpers of the tests of data."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv


def rows(x):
    """Each row as bytes, sorted."""
    return sorted(row.numpy().tobytes() for row in x)


def flat_images(n, *shape, seed=0):
    """Images of noise, all different."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, *shape), dtype=np.uint8)


def small(**options):
    return pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), **options)


LOOKING = {"engine": "eager", "progress": False}
"""With a traced engine, the pair would see its data only once."""


class Recorder(nn.Module):
    """Records the data that it observes in training, sorted by the index in the context."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(50))
        self.seen = []

    def model(self, x, index):
        if self.training:
            self.seen.append(x[index.argsort()])
        with pyro.plate("data", len(x), dim=-1):
            # Like the likelihoods of this library, it lets the tools check the support.
            likelihood = dist.Bernoulli(logits=self.bias, validate_args=False)
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(self, x, index):
        pass

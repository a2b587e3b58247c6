"""What the tests share that test_data.py held together."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv


def rows(x):
    """Each row as bytes, in an order of its own."""
    return sorted(row.numpy().tobytes() for row in x)


# Names: torchvision's data sets, from files in the layouts that torchvision reads


def flat_images(n, *shape, seed=0):
    """Images of noise, no two alike."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, *shape), dtype=np.uint8)


def small(**options):
    return pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), **options)


LOOKING = {"engine": "eager", "progress": False}
"""A graph would show the pair its data once."""


class Recorder(nn.Module):
    """Keeps what it observes in training, in the order of the indices that come beside it."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(50))
        self.seen = []

    def model(self, x, index):
        if self.training:
            self.seen.append(x[index.argsort()])
        with pyro.plate("data", len(x), dim=-1):
            # As this library's own likelihoods do, it leaves the support to the tools to check.
            likelihood = dist.Bernoulli(logits=self.bias, validate_args=False)
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(self, x, index):
        pass

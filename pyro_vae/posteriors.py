"""Posterior families: what an encoder's outputs say about the latents."""

from math import prod

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.factors import Family, bounded_scale, split
from pyro_vae.networks import Shape


class DiagonalNormal(Family):
    r"""A normal with independent coordinates, :math:`q(z|x) = \prod_j N(z_j; \mu_j, \sigma_j^2)`.

    Arguments:
        low, high: bounds of every :math:`\sigma_j` (see `pyro_vae.factors.bounded_scale`).

    The network gives the means, then the unbounded scales: ``2 * latent_dim`` outputs.
    Kingma & Welling, Auto-Encoding Variational Bayes, 2014 (https://arxiv.org/abs/1312.6114).

    >>> import torch
    >>> DiagonalNormal()(torch.zeros(5, 6), (3,)).base_dist.scale[0]
    tensor([1., 1., 1.])
    """

    def __init__(self, low: float = 1e-4, high: float = 10.0) -> None:
        super().__init__()
        self.low, self.high = low, high

    def outputs(self, shape: Shape) -> int:
        return 2 * prod(shape)

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        loc, scale = split(raw, shape, 2)
        normal = dist.Normal(loc, bounded_scale(scale, self.low, self.high), validate_args=False)
        return normal.to_event(len(shape))

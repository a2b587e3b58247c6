"""Posterior families: what an encoder's outputs say about the latents."""

from math import prod

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.errors import UsageError
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


class FullRankNormal(Family):
    r"""A normal with any covariance, :math:`q(z|x) = N(z; \mu, LL^\top)`, L lower triangular.

    Arguments:
        low, high: bounds of the diagonal of :math:`L` (see `pyro_vae.factors.bounded_scale`).

    The network gives the means, the unbounded diagonal, and what is below it, row by row:
    ``d + d * (d + 1) / 2`` outputs for ``latent_dim = d``.

    Raises `UsageError` for latents that are not vectors.

    >>> import torch
    >>> FullRankNormal()(torch.zeros(5, 5), (2,)).covariance_matrix[0]
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(self, low: float = 1e-4, high: float = 10.0) -> None:
        super().__init__()
        self.low, self.high = low, high

    def outputs(self, shape: Shape) -> int:
        dim = _dim(self, shape)
        return 2 * dim + dim * (dim - 1) // 2

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        dim = _dim(self, shape)
        loc, diagonal, below = raw.split([dim, dim, dim * (dim - 1) // 2], -1)
        factor = torch.diag_embed(bounded_scale(diagonal, self.low, self.high))
        rows, columns = torch.tril_indices(dim, dim, -1, device=raw.device)
        factor[..., rows, columns] = below
        return dist.MultivariateNormal(loc, scale_tril=factor, validate_args=False)


class LowRankNormal(Family):
    r"""A normal whose covariance is of low rank but for its diagonal.

    :math:`q(z|x) = N(z; \mu, WW^\top + \mathrm{diag}(\sigma^2))` with W of ``rank`` columns: for
    latents of many dimensions, a few directions of correlation.

    Arguments:
        rank: the number of columns of W.
        low, high: bounds of every :math:`\sigma_j` (see `pyro_vae.factors.bounded_scale`).

    The network gives the means, the unbounded scales, and W column by column:
    ``(2 + rank) * latent_dim`` outputs. Latents are vectors. Raises `UsageError` otherwise.

    >>> import torch
    >>> LowRankNormal(1)(torch.zeros(5, 6), (2,)).covariance_matrix[0]
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(self, rank: int = 2, low: float = 1e-4, high: float = 10.0) -> None:
        super().__init__()
        if rank < 1:
            raise UsageError(f"rank must be 1 or more, {rank} came")
        self.rank, self.low, self.high = rank, low, high

    def outputs(self, shape: Shape) -> int:
        return (2 + self.rank) * _dim(self, shape)

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        _dim(self, shape)
        loc, scale, *columns = split(raw, shape, 2 + self.rank)
        variance = bounded_scale(scale, self.low, self.high).square()
        return dist.LowRankMultivariateNormal(
            loc, torch.stack(columns, -1), variance, validate_args=False
        )


def _dim(family: Family, shape: Shape) -> int:
    if len(shape) != 1:
        raise UsageError(
            f"{type(family).__name__} is over vectors, latents of shape {tuple(shape)} came"
        )
    return shape[0]

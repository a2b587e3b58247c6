"""Posterior families: what an encoder's outputs say about the latents."""

from collections.abc import Sequence
from math import prod

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.parts.bijections import Affine, Bijection
from pyro_vae.parts.factors import Family, bounded_scale, split
from pyro_vae.parts.flows import AutoregressiveLayer, Flow, stack
from pyro_vae.parts.networks import Shape


class DiagonalNormal(Family):
    r"""A normal with independent coordinates, :math:`q(z|x) = \prod_j N(z_j; \mu_j, \sigma_j^2)`.

    Arguments:
        low, high: bounds of every :math:`\sigma_j` (see `pyro_vae.parts.factors.bounded_scale`).

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
        low, high: bounds of the diagonal of :math:`L` (see `pyro_vae.parts.factors.bounded_scale`).

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
        low, high: bounds of every :math:`\sigma_j` (see `pyro_vae.parts.factors.bounded_scale`).

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


class FlowPosterior(Family):
    r"""A normal bent by invertible layers: posteriors of any shape, even of several modes.

    :math:`z = \mu + \sigma \odot f(\epsilon; c),\ \epsilon \sim N(0, I)`, with layers :math:`f`
    that all data share and a context :math:`c` of each datum. It starts as the diagonal normal.

    Arguments:
        latent_dim: the dimension of z.
        layer: `pyro_vae.AutoregressiveLayer` or `pyro_vae.CouplingLayer`.
        bijection: what a layer does to each coordinate: `pyro_vae.Affine` by default, which with
            `AutoregressiveLayer` is the inverse autoregressive flow, or `pyro_vae.Spline`.
        layers: how many.
        hidden: widths of the network of each layer.
        context_dim: the width of the context; 0 gives one shape to all data.
        low, high: bounds of every :math:`\sigma_j` (see `pyro_vae.parts.factors.bounded_scale`).

    The network gives the means, the unbounded scales, and the context: ``2 * latent_dim +
    context_dim`` outputs. Raises `UsageError` for latents of another shape.
    Rezende & Mohamed, 2015 (https://arxiv.org/abs/1505.05770); Kingma et al., 2016.

    >>> import torch
    >>> FlowPosterior(3, context_dim=4)(torch.zeros(5, 10), (3,)).mean.shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        latent_dim: int,
        layer: type[nn.Module] = AutoregressiveLayer,
        bijection: Bijection | None = None,
        layers: int = 2,
        hidden: Sequence[int] = (64,),
        context_dim: int = 16,
        low: float = 1e-4,
        high: float = 10.0,
    ) -> None:
        super().__init__()
        if context_dim < 0:
            raise UsageError(f"context_dim must be 0 or more, {context_dim} came")
        self.latent_dim, self.layer, self.layers, self.hidden = (
            latent_dim,
            layer,
            layers,
            tuple(hidden),
        )
        self.bijection, self.context_dim = bijection or Affine(), context_dim
        self.low, self.high = low, high
        self.flow = stack(layer, layers, latent_dim, context_dim, hidden, self.bijection)

    def outputs(self, shape: Shape) -> int:
        if tuple(shape) != (self.latent_dim,):
            raise UsageError(
                f"FlowPosterior was made for latents of shape {(self.latent_dim,)}, latents of "
                f"shape {tuple(shape)} came"
            )
        return 2 * self.latent_dim + self.context_dim

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        loc, scale, context = raw.split([self.latent_dim, self.latent_dim, self.context_dim], -1)
        return Flow(loc, bounded_scale(scale, self.low, self.high), context, self.flow)


def product(q: dist.TorchDistribution, p: dist.TorchDistribution) -> dist.TorchDistribution:
    r"""The normalised product of two diagonal normals: precisions add, means are weighed by them.

    Raises `UsageError` for other distributions.

    >>> one = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    >>> product(one, dist.Normal(torch.ones(1), 1.0).to_event(1)).mean
    tensor([0.5000])
    """
    for factor in (q, p):
        if not isinstance(getattr(factor, "base_dist", None), torch.distributions.Normal):
            raise UsageError(
                f"a product is formed of diagonal normals, a {type(factor).__name__} came: a "
                "top-down guide needs DiagonalNormal at every level"
            )
    (a, s), (b, t) = ((f.base_dist.loc, f.base_dist.scale) for f in (q, p))
    variance = 1 / (s**-2 + t**-2)
    normal = dist.Normal(variance * (a / s**2 + b / t**2), variance.sqrt(), validate_args=False)
    return normal.to_event(len(q.event_shape))


def _dim(family: Family, shape: Shape) -> int:
    if len(shape) != 1:
        raise UsageError(
            f"{type(family).__name__} is over vectors, latents of shape {tuple(shape)} came"
        )
    return shape[0]


class Classes(Family):
    r"""One of some classes, :math:`q(y|x) = \mathrm{softmax}(\text{raw})_y`, y from 0 on.

    Arguments:
        num_classes: how many.

    Raises `UsageError` for an event that is no single class.

    >>> import torch
    >>> Classes(3)(torch.zeros(5, 3), ()).probs[0]
    tensor([0.3333, 0.3333, 0.3333])
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise UsageError(f"num_classes must be 2 or more, {num_classes} came")
        self.num_classes = num_classes

    def outputs(self, shape: Shape) -> int:
        if tuple(shape):
            raise UsageError(f"Classes are for events of shape (), {tuple(shape)} came")
        return self.num_classes

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        return dist.Categorical(logits=raw, validate_args=False)

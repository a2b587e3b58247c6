"""Posterior families: distributions of the latents, given the outputs of an encoder."""

from collections.abc import Sequence
from math import prod

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.parts.bijections import Affine, Bijection
from pyro_vae.parts.distributions import CholeskyNormal
from pyro_vae.parts.factors import Family, bounded_scale, split
from pyro_vae.parts.flows import AutoregressiveLayer, Flow, stack
from pyro_vae.parts.networks import Shape


class DiagonalNormal(Family):
    r"""A normal with independent coordinates, :math:`q(z|x) = \prod_j N(z_j; \mu_j, \sigma_j^2)`.

    Arguments:
        low, high: bounds of every :math:`\sigma_j` (see `pyro_vae.parts.factors.bounded_scale`).

    The network outputs the means, then the unbounded scales: ``2 * latent_dim`` outputs.
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
    r"""A normal with full covariance, :math:`q(z|x) = N(z; \mu, LL^\top)`, L lower triangular.

    Arguments:
        low, high: bounds of the diagonal of :math:`L` (see `pyro_vae.parts.factors.bounded_scale`).

    The network outputs the means, the unbounded diagonal of L, and the entries below the diagonal,
    row by row: ``d + d * (d + 1) / 2`` outputs for ``latent_dim = d``.

    Raises `UsageError` if the latents are not vectors.

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
        return CholeskyNormal(loc, scale_tril=factor, validate_args=False)


class LowRankNormal(Family):
    r"""A normal whose covariance is a low-rank matrix plus a diagonal matrix.

    :math:`q(z|x) = N(z; \mu, WW^\top + \mathrm{diag}(\sigma^2))` where W has ``rank`` columns. It
    models a few directions of correlation between many latent dimensions.

    Arguments:
        rank: the number of columns of W, at least 1.
        low, high: bounds of every :math:`\sigma_j` (see `pyro_vae.parts.factors.bounded_scale`).

    The network outputs the means, the unbounded scales, and W column by column:
    ``(2 + rank) * latent_dim`` outputs.

    Raises `UsageError` if ``rank`` is below 1, or if the latents are not vectors.

    >>> import torch
    >>> LowRankNormal(1)(torch.zeros(5, 6), (2,)).covariance_matrix[0]
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(self, rank: int = 2, low: float = 1e-4, high: float = 10.0) -> None:
        super().__init__()
        if rank < 1:
            raise UsageError(f"must be at least 1, got {rank}", argument="rank")
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
    r"""A normal transformed by invertible layers, for posteriors of any shape.

    :math:`z = \mu + \sigma \odot f(\epsilon; c),\ \epsilon \sim N(0, I)`, where all data share the
    layers :math:`f` and each datum has its own context :math:`c`. The posterior starts as the
    diagonal normal, and it can become multimodal.

    Arguments:
        latent_dim: the dimension of z.
        layer: `pyro_vae.AutoregressiveLayer` or `pyro_vae.CouplingLayer`.
        bijection: the map of each coordinate in a layer. The default `pyro_vae.Affine` gives the
            inverse autoregressive flow with `AutoregressiveLayer`; `pyro_vae.Spline` is more
            flexible.
        layers: the number of layers, at least 1.
        hidden: the widths of the hidden layers in the network of each layer.
        context_dim: the width of the context; with 0, :math:`f` is the same for all data.
        low, high: bounds of every :math:`\sigma_j` (see `pyro_vae.parts.factors.bounded_scale`).

    The network outputs the means, the unbounded scales, and the context: ``2 * latent_dim +
    context_dim`` outputs. Raises `UsageError` if the latents have another shape.
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
            raise UsageError(f"must be at least 0, got {context_dim}", argument="context_dim")
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
                f"this FlowPosterior needs latents of shape {(self.latent_dim,)}, got shape "
                f"{tuple(shape)}"
            )
        return 2 * self.latent_dim + self.context_dim

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        loc, scale, context = raw.split([self.latent_dim, self.latent_dim, self.context_dim], -1)
        return Flow(loc, bounded_scale(scale, self.low, self.high), context, self.flow)


def product(q: dist.TorchDistribution, p: dist.TorchDistribution) -> dist.TorchDistribution:
    r"""The normalized product of two diagonal normals.

    Its precision is the sum of both precisions. Its mean is the average of both means, weighted by
    their precisions. Raises `UsageError` for other distributions.

    >>> one = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    >>> product(one, dist.Normal(torch.ones(1), 1.0).to_event(1)).mean
    tensor([0.5000])
    """
    for factor in (q, p):
        if not isinstance(getattr(factor, "base_dist", None), torch.distributions.Normal):
            raise UsageError(
                f"a product needs two diagonal normals, got a {type(factor).__name__}: use "
                "DiagonalNormal at every level of a top-down guide"
            )
    (a, s), (b, t) = ((f.base_dist.loc, f.base_dist.scale) for f in (q, p))
    variance = 1 / (s**-2 + t**-2)
    normal = dist.Normal(variance * (a / s**2 + b / t**2), variance.sqrt(), validate_args=False)
    return normal.to_event(len(q.event_shape))


def _dim(family: Family, shape: Shape) -> int:
    if len(shape) != 1:
        raise UsageError(
            f"{type(family).__name__} needs latents that are vectors, got shape {tuple(shape)}"
        )
    return shape[0]


class Classes(Family):
    r"""A class y from 0 to num_classes - 1, :math:`q(y|x) = \mathrm{softmax}(\text{raw})_y`.

    Arguments:
        num_classes: the number of classes, at least 2.

    The network outputs the logits, one for each class. Raises `UsageError` if the event shape is
    not ().

    >>> import torch
    >>> Classes(3)(torch.zeros(5, 3), ()).probs[0]
    tensor([0.3333, 0.3333, 0.3333])
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise UsageError(f"must be at least 2, got {num_classes}", argument="num_classes")
        self.num_classes = num_classes

    def outputs(self, shape: Shape) -> int:
        if tuple(shape):
            raise UsageError(f"Classes needs events of shape (), got {tuple(shape)}")
        return self.num_classes

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        return dist.Categorical(logits=raw, validate_args=False)

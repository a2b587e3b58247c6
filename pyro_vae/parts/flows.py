r"""Normalizing flows: a normal transformed by invertible layers, as a distribution with context.

A layer determines which coordinates depend on which (`AutoregressiveLayer`, `CouplingLayer`). A
bijection determines the map of each coordinate (`Affine`, `Spline`). `stack` composes layers. Your
own layer is a module with ``forward(x, context)`` and ``inverse(y, context)``; both return the
result and :math:`\log|\det dy/dx|`, for any leading dimensions. Every layer of this module starts
as the identity.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

import pyro.distributions as dist
import torch
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.errors import UsageError
from pyro_vae.parts.bijections import Affine, Bijection
from pyro_vae.parts.networks import MLP

POINTS = 256
"""The number of noise points for the mean and the variance of a flow."""


class AutoregressiveLayer(nn.Module):
    r"""Each coordinate is mapped given the coordinates before it, :math:`y_j = b(x_j; x_{<j}, c)`.

    With the bijection `Affine`, this is the inverse autoregressive flow (Kingma et al., 2016,
    https://arxiv.org/abs/1606.04934). Forward takes one pass of the masked network. The inverse
    takes ``dim`` passes.

    Arguments:
        dim: the number of coordinates.
        context_dim: the width of the context; it may be 0.
        hidden: the widths of the hidden layers of the masked network, each at least ``dim``.
        bijection: the map of each coordinate; the default is `Affine`.
        order: the order of the coordinates, a permutation; the default is 0, 1, ...

    Raises `UsageError` if ``hidden`` is empty or has a width below ``dim``.

    >>> layer = AutoregressiveLayer(3, context_dim=2)
    >>> layer(torch.ones(4, 3), torch.zeros(4, 2))[1].shape
    torch.Size([4])
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        hidden: Sequence[int] = (64,),
        bijection: Bijection | None = None,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < dim:
            raise UsageError(
                f"the `hidden` widths of an autoregressive flow over {dim} coordinates must be at "
                f"least {dim}, got {tuple(hidden)}"
            )
        self.dim = dim
        self.bijection = bijection or Affine()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pyro warns if there is only one coordinate
            self.network = ConditionalAutoRegressiveNN(
                dim,
                context_dim,
                list(hidden),
                [self.bijection.outputs],
                cast(Any, torch.arange(dim) if order is None else order),
                nonlinearity=nn.ELU(),
            )
        _zero(self.network.layers[-1])

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = self.bijection(x, self.network(x, context))
        return y, log_slope.sum(-1)

    def inverse(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        x = log_slopes = torch.zeros_like(y)
        places = torch.arange(self.dim, device=y.device)
        for j in self.network.permutation:
            found, log_slope = self.bijection.inverse(y, self.network(x, context))
            x = torch.where(places == j, found, x)
            log_slopes = torch.where(places == j, log_slope, log_slopes)
        return x, log_slopes.sum(-1)


class CouplingLayer(nn.Module):
    r"""One half of the coordinates is mapped given the other half, which does not change.

    :math:`y_a = x_a,\ y_b = b(x_b; x_a, c)`. Forward and inverse take one pass each.
    Dinh, Sohl-Dickstein & Bengio, Real NVP, 2017 (https://arxiv.org/abs/1605.08803).

    Arguments:
        dim: the number of coordinates, at least 2.
        context_dim: the width of the context; it may be 0.
        hidden: the widths of the hidden layers of the network.
        bijection: the map of each coordinate; the default is `Affine`.
        order: a permutation; its first half does not change. The default is 0, 1, ...

    Raises `UsageError` if ``dim`` is below 2.

    >>> layer = CouplingLayer(3)
    >>> layer.inverse(torch.ones(4, 3), torch.zeros(4, 0))[0].shape
    torch.Size([4, 3])
    """

    order: Tensor

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        hidden: Sequence[int] = (64,),
        bijection: Bijection | None = None,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise UsageError(
                f"a coupling layer needs at least 2 coordinates, got {dim}: use AutoregressiveLayer"
            )
        self.bijection, self.kept = bijection or Affine(), dim // 2
        self.register_buffer("order", torch.arange(dim) if order is None else order)
        outputs = (dim - self.kept) * self.bijection.outputs
        self.network = MLP([self.kept, context_dim], hidden, outputs, nn.ELU)
        _zero(self.network.layers[-1])

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self._coupled(x, context, self.bijection)

    def inverse(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self._coupled(y, context, self.bijection.inverse)

    def _coupled(self, x: Tensor, context: Tensor, bend: Any) -> tuple[Tensor, Tensor]:
        kept, rest = x[..., self.order].tensor_split([self.kept], -1)
        raw = self.network(kept, context).unflatten(-1, (self.bijection.outputs, -1))
        bent, log_slope = bend(rest, raw)
        return torch.cat([kept, bent], -1)[..., self.order.argsort()], log_slope.sum(-1)


def stack(
    layer: type[nn.Module],
    layers: int,
    dim: int,
    context_dim: int,
    hidden: Sequence[int],
    bijection: Bijection,
) -> nn.ModuleList:
    """A stack of layers of one kind, each with a different order of the coordinates.

    Every second order is the reverse of the order before it, so that all coordinates are mapped.
    Raises `UsageError` if ``layers`` is below 1.
    """
    if layers < 1:
        raise UsageError(f"must be at least 1, got {layers}", argument="layers")
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(dim, generator=generator) for _ in range(0, layers, 2)]
    both = [order for pair in orders for order in (pair, pair.flip(0))][:layers]
    return nn.ModuleList(layer(dim, context_dim, hidden, bijection, order) for order in both)


class Flow(dist.TorchDistribution):
    r"""A standard normal that is transformed by layers, then scaled and shifted.

    :math:`z = m + s \odot f(\epsilon; c),\ \epsilon \sim N(0, I)`, where :math:`f` is the
    composition of the layers.

    Arguments:
        loc, scale: the shift m and the scale s, of shape (..., dim).
        context: the context c that the layers see, of shape (..., context_dim).
        layers: modules such as `AutoregressiveLayer` and `CouplingLayer`.

    ``rsample`` runs the layers forward and keeps the log density of its last draw. The log density
    of other values needs the inverse of the layers. The mean and the variance do not have a closed
    form. They are averages over fixed quasi-random noise points, the same for all data and calls.

    >>> from pyro_vae.parts.bijections import Spline
    >>> layers = stack(CouplingLayer, 2, dim=3, context_dim=0, hidden=(8,), bijection=Spline())
    >>> flow = Flow(torch.zeros(3), torch.ones(3), torch.zeros(0), layers)
    >>> flow.log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "context": constraints.real_vector,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        context: Tensor,
        layers: Iterable[Any],
        validate_args: bool | None = False,
    ) -> None:
        self.loc, self.scale, self.context, self.layers = loc, scale, context, layers
        self._drawn: tuple[Tensor, Tensor, bool] | None = None
        batch = torch.broadcast_shapes(loc.shape[:-1], scale.shape[:-1], context.shape[:-1])
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Flow":
        loc, scale, context = (
            part.expand(*batch_shape, part.shape[-1])
            for part in (self.loc, self.scale, self.context)
        )
        return Flow(loc, scale, context, self.layers, self._validate_args)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        bent, log_det = self._bent(noise)
        value = self.loc + self.scale * bent
        self._drawn = value, self._log_prob(noise, log_det), torch.is_grad_enabled()
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if self._drawn is not None and value is self._drawn[0]:
            _, found, differentiable = self._drawn
            if differentiable or not torch.is_grad_enabled():
                return found
        noise, log_det = (value - self.loc) / self.scale, 0.0
        noise = noise.expand(torch.broadcast_shapes(noise.shape, (*self.batch_shape, 1)))
        for layer in reversed(list(self.layers)):
            noise, log_slope = layer.inverse(noise, self.context)
            log_det = log_det + log_slope
        return self._log_prob(noise, log_det)

    @property
    def mean(self) -> Tensor:
        return self.loc + self.scale * self._points().mean(0)

    @property
    def variance(self) -> Tensor:
        return (self.scale * self._points()).var(0, correction=0)

    def _bent(self, noise: Tensor) -> tuple[Tensor, Any]:
        log_det: Any = 0.0
        for layer in self.layers:
            noise, log_slope = layer(noise, self.context)
            log_det = log_det + log_slope
        return noise, log_det

    def _log_prob(self, noise: Tensor, log_det: Any) -> Tensor:
        base = dist.Normal(torch.zeros_like(noise), 1.0, validate_args=False).log_prob(noise)
        return (base - self.scale.log()).sum(-1) - log_det

    def _points(self) -> Tensor:
        """The outputs of the layers at symmetric quasi-random noise, (points, *batch, dim)."""
        (dim,) = self.event_shape
        engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0)
        uniform = engine.draw(POINTS // 2).to(self.loc).clamp(1e-6, 1 - 1e-6)
        noise = torch.special.ndtri(uniform)
        noise = noise / noise.square().mean(0).sqrt()  # exact moments if the flow is the identity
        noise = torch.cat([noise, -noise]).reshape(POINTS, *(1 for _ in self.batch_shape), dim)
        return self._bent(noise.expand(POINTS, *self.batch_shape, dim))[0]


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)

r"""Folds: latents that a guide computes from its own auxiliary sites, and their densities.

Pyro's AutoGuides and ``EasyGuide`` draw an auxiliary site u and make each latent a ``Delta`` of it,
z = f(u), with the ``log_density`` :math:`-\log |\det f'(u)|`. The log density of z is
:math:`\log q(u) - \log |\det f'(u)|`. This module gives z the distribution with this density.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, NamedTuple, cast

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
)

from pyro_vae.compat import FakeTensor, active_handlers
from pyro_vae.errors import UsageError
from pyro_vae.pairs.pair import Site
from pyro_vae.pairs.sites import latents

CLOSE = 1e-3
"""The relative and absolute tolerance for numbers that are equal up to rounding."""


class Part(NamedTuple):
    """Which numbers of an auxiliary site determine a latent, and through which map."""

    auxiliary: str
    start: int
    size: int
    own_dims: int
    """The number of dimensions of the unconstrained latent to the right of the auxiliary's plates.
    """
    transform: Any
    """The map from these numbers to the latent's support; None for the identity."""


class Fold(NamedTuple):
    """Auxiliary sites and the latents that are a one-to-one function of them."""

    auxiliaries: tuple[str, ...]
    sites: tuple[str, ...]
    parts: Mapping[str, Part]
    """The part of each latent; empty if the map is known only at its draws."""
    supports: Mapping[str, Any]


class Plan(NamedTuple):
    """The folds of a pair's guide, its point estimates, and the errors that make it unusable."""

    folds: tuple[Fold, ...] = ()
    silent: tuple[str, ...] = ()
    """Auxiliary sites that are Deltas: they represent a point, not a draw."""
    faults: tuple[str, ...] = ()
    """Errors because of which the loss is not a bound on log p(x)."""
    local_points: tuple[str, ...] = ()
    """Continuous local latents whose guide is a Delta without a density."""
    global_points: tuple[str, ...] = ()
    """Continuous global latents whose guide is a Delta without a density."""
    modes: tuple[str, ...] = ()
    """Discrete latents whose guide is a Delta at one value."""
    sites: frozenset[str] = frozenset()
    """All sites that the plan covers. Other sites show that the guide has changed."""

    @property
    def points(self) -> tuple[str, ...]:
        """All latents with a point estimate."""
        return (*self.local_points, *self.global_points)

    @property
    def hidden(self) -> tuple[str, ...]:
        """The sites that are removed from the trace."""
        return (*self.silent, *(name for fold in self.folds for name in fold.auxiliaries))


class Drawn(dist.TorchDistribution):
    """The distribution of a latent whose density is known only at its draw.

    Arguments:
        value: the draw, of shape (*batch_shape, *event_shape).
        log_density: the log density at the draw, of the batch shape.
        support: the support of the latent.
        event_dim: the number of event dimensions.
        draws: returns the given number of further draws.
        joint: the sites that share one density, if any. Only the sum of the log density over these
            sites has a meaning.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(
        self,
        value: Tensor,
        log_density: Tensor,
        support: Any,
        event_dim: int,
        draws: Callable[[int], Tensor],
        joint: tuple[str, ...] = (),
    ) -> None:
        self.value, self.log_density, self._support = value, log_density, support
        self.draws, self.joint = draws, joint
        split = value.dim() - event_dim
        super().__init__(value.shape[:split], value.shape[split:], validate_args=False)

    @property
    def support(self) -> Any:
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        shape = torch.Size(batch_shape)
        value = self.value.expand(shape + self.event_shape)
        density = self.log_density.expand(shape)
        return Drawn(value, density, self._support, len(self.event_shape), self.draws, self.joint)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_density

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.sample(sample_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        number = prod(sample_shape)
        return self.draws(number).reshape((*sample_shape, *self.value.shape))


def shares(site: Site) -> tuple[str, ...]:
    """The sites that share one density with a latent, including itself; empty for most latents."""
    fn = site["fn"]
    return fn.joint if isinstance(fn, Drawn) else ()


def joint_name(site: Site) -> str:
    """The name under which the KL of a latent is reported: all sites that share its density."""
    return " + ".join(shares(site)) or cast(str, site["name"])


def point_name(name: str) -> str:
    """The name under which the prior term of a point estimate is reported instead of a KL."""
    return f"-log p({name})"


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a Delta."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


class Stale(Exception):
    """The guide has changed since its plan was made."""


def auxiliary_value(fold: Fold, auxiliary: str, fn: Any) -> Tensor | None:
    """The value of an auxiliary site, from the latents that a handler around the guide gives.

    Returns None if no latent is given. Raises `UsageError` if only some latents are given, or if
    the inverse of the map is unknown.
    """
    given = {name: _given(name, fold.supports[name]) for name in fold.sites}
    if all(value is None for value in given.values()):
        return None
    if not fold.parts or any(value is None for value in given.values()):
        names = ", ".join(f"'{name}'" for name in fold.sites)
        raise UsageError(
            f"the guide computes {names} from its draws of '{auxiliary}' through a map without a "
            "known inverse: their density is known only at these draws and not at other values"
        )
    pieces = []
    for name, part in sorted(fold.parts.items(), key=lambda item: item[1].start):
        if part.auxiliary == auxiliary:
            value = cast(Tensor, given[name])
            free = value if part.transform is None else part.transform.inv(value)
            lead = free.shape[: free.dim() - part.own_dims]
            pieces.append(free.reshape(*lead, part.size))
    shape = torch.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
    numbers = torch.cat([piece.expand(*shape, -1) for piece in pieces], -1)
    return numbers.reshape((*shape, *fn.event_shape))


def _given(name: str, support: Any) -> Tensor | None:
    for handler in active_handlers():
        gives = getattr(handler, "gives", None)
        value = None if gives is None else gives(name, support)
        if value is not None:
            return cast(Tensor, value)
    return None


def fold_density(
    fold: Fold,
    name: str,
    nodes: Mapping[str, Any],
    delta: Any,
    value: Tensor,
    again: Callable[[], Trace] | None,
) -> Any:
    """The distribution of a latent, from its Delta and the auxiliary sites drawn before it.

    Arguments:
        nodes: ``fn`` and ``value`` of each site that the guide has drawn.
        delta: the Delta in the guide.
        value: the value of the latent.
        again: runs the guide again, for further draws; None if it cannot run here.
    """
    part, event_dim = fold.parts.get(name), delta.event_dim
    if part is not None:
        node = nodes[part.auxiliary]
        if again is not None:
            _require_current(part, node["value"], value, node["fn"])
        closed = _closed(part, node["fn"], node["value"], value, event_dim)
        if closed is not None:
            return closed
    density = delta.log_prob(value).expand(value.shape[: value.dim() - event_dim])
    if name == fold.sites[-1]:
        for auxiliary in fold.auxiliaries:
            if not _closed_alone(fold, auxiliary, nodes):
                node = nodes[auxiliary]
                term = node["fn"].log_prob(node["value"])
                density = density + term.expand(density.shape) * (term.numel() / density.numel())

    def draws(number: int) -> Tensor:
        if part is not None:
            node = nodes[part.auxiliary]
            plates = node["value"].dim() - node["fn"].event_dim
            base = node["fn"].expand(node["value"].shape[:plates])
            return _map(part, base.sample((number,)), base, (number, *_free_shape(part, value)))
        if again is None:
            raise NotImplementedError
        return torch.stack([latents(again())[name]["value"].detach() for _ in range(number)])

    joint = fold.sites if len(fold.sites) > 1 else ()
    return Drawn(value, density, fold.supports[name], event_dim, draws, joint)


def _closed_alone(fold: Fold, auxiliary: str, nodes: Mapping[str, Any]) -> bool:
    """Whether the latents of an auxiliary site have closed-form densities that replace its own."""
    return bool(fold.parts) and _normal(nodes[auxiliary]["fn"]) is not None


def _closed(part: Part, fn: Any, drawn: Tensor, value: Tensor, event_dim: int) -> Any:
    """The distribution of a latent in closed form, from normals or a whole site; else None."""
    transform, shape = part.transform, _free_shape(part, value)
    normal = _normal(fn)
    if normal is not None:
        loc, scale = (
            _slice(part, parameter.expand(drawn.shape), fn).reshape(shape)
            for parameter in (normal.loc, normal.scale)
        )
        base, inner = dist.Normal(loc, scale), _elementwise(transform)
        if transform is None:
            return base.to_event(event_dim)
        if inner is not None:
            if isinstance(inner, ExpTransform):
                return dist.LogNormal(loc, scale).to_event(event_dim)
            return dist.TransformedDistribution(base, [inner]).to_event(event_dim)
        return dist.TransformedDistribution(base.to_event(transform.domain.event_dim), [transform])
    whole = part.start == 0 and part.size == fn.event_shape.numel()
    free_event = event_dim if transform is None else transform.domain.event_dim
    if not whole or drawn.shape != shape or fn.event_dim != max(free_event, event_dim):
        return None
    return fn if transform is None else dist.TransformedDistribution(fn, [transform])


def _normal(fn: Any) -> Any:
    """The normal distributions of the units of a distribution, or None."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn if type(fn) in (dist.Normal, torch.distributions.Normal) else None


def _elementwise(transform: Any) -> Any:
    """The elementwise map inside a map, or None."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, ComposeTransform) and _is_identity(transform.parts[-1]):
        transform = transform.parts[0] if len(transform.parts) == 2 else transform
    if transform is None or transform.domain.event_dim or transform.codomain.event_dim:
        return None
    return transform


def _is_identity(transform: Any) -> bool:
    """Whether a map is the identity that torch appends to another map if a lower bound is 0."""
    numbers = (getattr(transform, "loc", None), getattr(transform, "scale", None))
    return isinstance(transform, AffineTransform) and numbers == (0, 1)


def _free_shape(part: Part, value: Tensor) -> torch.Size:
    return value.shape if part.transform is None else part.transform.inverse_shape(value.shape)


def _slice(part: Part, value: Tensor, fn: Any) -> Tensor:
    """The numbers of an auxiliary value that determine a latent, along a new last dimension."""
    events = len(fn.event_shape)
    flat = value.flatten(-events) if events else value[..., None]
    return flat[..., part.start : part.start + part.size]


def _map(part: Part, drawn: Tensor, fn: Any, shape: Sequence[int]) -> Tensor:
    """The value of a latent that an auxiliary value determines."""
    free = _slice(part, drawn, fn).reshape(shape)
    return free if part.transform is None else part.transform(free)


def _require_current(part: Part, drawn: Tensor, value: Tensor, fn: Any) -> None:
    """Raise `Stale` if the map of the plan no longer gives the value of the latent."""
    if isinstance(value, FakeTensor) or type(value) is not Tensor:
        return
    try:
        made = _map(part, drawn, fn, _free_shape(part, value))
    except RuntimeError as error:  # other shapes
        raise Stale from error
    if not close(made, value):
        raise Stale


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    return torch.allclose(a, b.to(a), rtol=CLOSE, atol=CLOSE, equal_nan=True)

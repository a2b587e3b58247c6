r"""Latents that a guide makes of auxiliary sites of its own, and the density they have of both.

Pyro's AutoGuides and ``EasyGuide`` draw an auxiliary site u and make each latent a ``Delta`` of it,
z = f(u), whose ``log_density`` is :math:`-\log |\det f'(u)|`. The density of z is
:math:`\log q(u) - \log |\det f'(u)|`: here it gets the distribution that has it.
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
"""How far numbers may be apart that are one but for rounding, relatively and absolutely."""


class Part(NamedTuple):
    """Which numbers of an auxiliary site a latent is made of, and by which map."""

    auxiliary: str
    start: int
    size: int
    own_dims: int
    """Dimensions of the latent, off its support, that are not those of the auxiliary's plates."""
    transform: Any
    """From these numbers to the latent's support; None where they are the latent's own."""


class Fold(NamedTuple):
    """Auxiliary sites and the latents that are made of them, one to one."""

    auxiliaries: tuple[str, ...]
    sites: tuple[str, ...]
    parts: Mapping[str, Part]
    """By latent; none where the map is known at its draws alone."""
    supports: Mapping[str, Any]


class Plan(NamedTuple):
    """What is to be folded in the guide of a pair, and what keeps its loss from being a bound."""

    folds: tuple[Fold, ...] = ()
    silent: tuple[str, ...] = ()
    """Auxiliary sites that stand for a point, not for a draw."""
    faults: tuple[str, ...] = ()
    local_points: tuple[str, ...] = ()
    """Continuous latents in the data plate whose guide is a Delta without a density."""
    global_points: tuple[str, ...] = ()
    """Those outside the data plate."""
    modes: tuple[str, ...] = ()
    """Discrete latents whose guide is a Delta: one value of several."""
    sites: frozenset[str] = frozenset()
    """All sites that the plan speaks of, by which a guide that has changed is noticed."""

    @property
    def points(self) -> tuple[str, ...]:
        """All latents that are estimated by a point."""
        return (*self.local_points, *self.global_points)

    @property
    def hidden(self) -> tuple[str, ...]:
        """The sites that leave the trace."""
        return (*self.silent, *(name for fold in self.folds for name in fold.auxiliaries))


class Drawn(dist.TorchDistribution):
    """A latent whose density is known at its draw, not in closed form.

    Arguments:
        value: the draw.
        log_density: at the draw, of the batch shape.
        draws: gives so many further draws.
        joint: the sites that share one density, where they do: only its sum over them has a
            meaning.
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
    """The sites, itself among them, with which a latent shares one density; none for most."""
    fn = site["fn"]
    return fn.joint if isinstance(fn, Drawn) else ()


def joint_name(site: Site) -> str:
    """Under which name the KL of a latent site is reported: that of all whose density it shares."""
    return " + ".join(shares(site)) or cast(str, site["name"])


def point_name(name: str) -> str:
    """Under which name the prior's term of a point estimate is reported, in the place of a KL."""
    return f"-log p({name})"


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a point."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


class Stale(Exception):
    """The guide is not what its plan was made for."""


def auxiliary_value(fold: Fold, auxiliary: str, fn: Any) -> Tensor | None:
    """The value of an auxiliary site whose latents are given by a handler around the guide."""
    given = {name: _given(name, fold.supports[name]) for name in fold.sites}
    if all(value is None for value in given.values()):
        return None
    if not fold.parts or any(value is None for value in given.values()):
        names = ", ".join(f"'{name}'" for name in fold.sites)
        raise UsageError(
            f"the guide makes {names} of its own draws of '{auxiliary}' by a map without a known "
            "inverse: their density is known at these draws, not at other values"
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
    """The distribution of a latent, from its Delta and the auxiliary sites drawn before it."""
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
    """Whether the density of an auxiliary site is that of latents in closed form."""
    return bool(fold.parts) and _normal(nodes[auxiliary]["fn"]) is not None


def _closed(part: Part, fn: Any, drawn: Tensor, value: Tensor, event_dim: int) -> Any:
    """The distribution of a latent where it is known: slices of normals, or a whole site."""
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
    """The normals that a distribution has for its units, or None."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn if type(fn) in (dist.Normal, torch.distributions.Normal) else None


def _elementwise(transform: Any) -> Any:
    """The map of single numbers that a map consists of, or None."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, ComposeTransform) and _is_identity(transform.parts[-1]):
        transform = transform.parts[0] if len(transform.parts) == 2 else transform
    if transform is None or transform.domain.event_dim or transform.codomain.event_dim:
        return None
    return transform


def _is_identity(transform: Any) -> bool:
    """Whether a map is that which torch puts behind another where a lower bound is 0."""
    numbers = (getattr(transform, "loc", None), getattr(transform, "scale", None))
    return isinstance(transform, AffineTransform) and numbers == (0, 1)


def _free_shape(part: Part, value: Tensor) -> torch.Size:
    return value.shape if part.transform is None else part.transform.inverse_shape(value.shape)


def _slice(part: Part, value: Tensor, fn: Any) -> Tensor:
    """The numbers of an auxiliary value that make a latent, along a last dimension."""
    events = len(fn.event_shape)
    flat = value.flatten(-events) if events else value[..., None]
    return flat[..., part.start : part.start + part.size]


def _map(part: Part, drawn: Tensor, fn: Any, shape: Sequence[int]) -> Tensor:
    """What an auxiliary value makes of a latent."""
    free = _slice(part, drawn, fn).reshape(shape)
    return free if part.transform is None else part.transform(free)


def _require_current(part: Part, drawn: Tensor, value: Tensor, fn: Any) -> None:
    if isinstance(value, FakeTensor) or type(value) is not Tensor:
        return
    try:
        made = _map(part, drawn, fn, _free_shape(part, value))
    except RuntimeError as error:  # other shapes
        raise Stale from error
    if not close(made, value):
        raise Stale


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b.to(a), rtol=CLOSE, atol=CLOSE, equal_nan=True)

"""Latents that a guide draws by way of a site of its own, folded into one site with its density.

Pyro's AutoGuides and ``EasyGuide`` draw an auxiliary site u and make each latent a ``Delta`` of it,
z = f(u), whose ``log_density`` is :math:`-\\log |\\det f'(u)|`. The density of z is that of both,
:math:`\\log q(u) - \\log |\\det f'(u)|`. Here z gets this density, and u leaves the trace, so that
every tool sees one latent. Also here: which sites a guide draws that are no such latents, and which
latents it gives no density at all (point estimates), so that its loss is not a bound on log p(x).
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, NamedTuple, cast
from weakref import WeakKeyDictionary

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
)

from pyro_vae.errors import NotTraceable, UsageError
from pyro_vae.pairs import (
    Given,
    Pair,
    Site,
    factors,
    is_local,
    latents,
    mean,
    sample_sites,
    trace,
    trace_model,
    using,
)

LARGEST = 300
"""Numbers of a latent up to which a map that is not known is checked by its Jacobian."""

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


_PLANS: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


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


def trace_guide(pair: nn.Module, batch: Sequence[Tensor], *handlers: Callable[..., Any]) -> Trace:
    """The trace of the guide on a batch, with its auxiliary sites folded into its latents.

    Arguments:
        handlers: put around the guide, the innermost first.

    Raises `UsageError` for auxiliary sites that cannot be folded.
    """
    found = _PLANS.get(pair)
    if found is None or found.faults:
        found = plan(pair, batch)
    try:
        return _folding(pair, batch, handlers, found)
    except _Stale:
        return _folding(pair, batch, handlers, plan(pair, batch))


def known(pair: nn.Module) -> Plan:
    """The plan that was last made for a pair."""
    return _PLANS.get(pair, Plan())


def folded(pair: nn.Module, guide: Trace) -> Trace:
    """A trace of the guide itself, made by an objective, folded as the pair's plan has it."""
    found = known(pair)
    if not found.hidden:
        return guide
    copied, nodes = guide.copy(), cast(dict[str, Any], dict(guide.nodes))
    for fold in found.folds:
        for name in fold.sites:
            fn = _density(fold, name, nodes, nodes[name]["fn"], nodes[name]["value"], None)
            copied.nodes[name] = {**nodes[name], "fn": fn}
    for name in found.hidden:
        copied.remove_node(name)
    return copied


def require_density(pair: nn.Module, batch: Sequence[Tensor], what: str) -> None:
    """Raise `UsageError` where a latent of each datum is estimated by a point."""
    for name in plan(pair, batch).local_points:
        raise UsageError(
            f"the guide of latent site '{name}' is a Delta, a point estimate without a density: "
            f"log p(x, {name}) at a point is not a bound on log p(x), and {what}; give the site a "
            "distribution with a spread"
        )


def factors_of(pair: nn.Module, batch: Sequence[Tensor]) -> tuple[str, ...]:
    """The ``pyro.factor`` sites of a pair's model, found by running it on two rows."""
    few = tuple(tensor[:2] for tensor in batch)
    with using(pair, 0):
        return tuple(factors(trace_model(pair, few, trace_guide(pair, few))))


def require_factors_placed(pair: nn.Module, batch: Sequence[Tensor]) -> None:
    """Raise `UsageError` for a factor outside the data plate that depends on single data."""
    for fault in misplaced_factors(pair, batch):
        raise UsageError(fault)


def misplaced_factors(pair: nn.Module, batch: Sequence[Tensor]) -> list[str]:
    """Factors outside the data plate that differ for one row of a batch, or for other latents."""
    few = tuple(tensor[:2] for tensor in batch)
    with using(pair, 0):
        guide = trace(cast(Pair, pair).guide, few)
        shared = {name: s["value"] for name, s in latents(guide).items() if not is_local(s)}
        model = trace_model(pair, few, guide)
        outside = [
            (where, name)
            for where, one in (("model", model), ("guide", guide))
            for name, site in factors(one).items()
            if not is_local(site)
        ]
        if not outside:
            return []
        one = tuple(tensor[:1] for tensor in few)
        with Given(shared):
            other = trace(cast(Pair, pair).guide, one)
        others = {"model": trace_model(pair, one, other), "guide": other}
    before = {"model": model, "guide": guide}
    return [
        f"factor '{name}' of the {where} depends on single data and is outside the data plate: put "
        'it under with pyro.plate("data", len(x), dim=-1)'
        for where, name in outside
        if not _close(*(_total_factor(run[where], name) for run in (before, others)))
    ]


def _total_factor(one: Trace, name: str) -> Tensor:
    site = factors(one)[name]
    return cast(Tensor, site["fn"].log_prob(site["value"]).sum())


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b.to(a), rtol=CLOSE, atol=CLOSE, equal_nan=True)


def _folding(
    pair: nn.Module, batch: Sequence[Tensor], handlers: Sequence[Any], found: Plan
) -> Trace:
    for fault in found.faults:
        raise UsageError(fault)
    guide = cast(Pair, pair).guide
    if not found.sites:
        plain = trace(_around(guide, handlers), batch)
        if _suspects(plain):
            raise _Stale
        return plain

    def again() -> Trace:
        with poutine.block():
            return trace(guide, batch)

    messenger = _Folding(found, again)
    traced = trace(_around(messenger(guide), handlers), batch)
    if _suspects(traced) | (found.sites & latents(traced).keys()) != found.sites:
        raise _Stale
    for name in found.hidden:
        traced.remove_node(name)
    for site in latents(traced).values():
        if site.get("mean_later"):
            site["value"] = mean(site["fn"])
    return traced


def _around(program: Callable[..., Any], handlers: Sequence[Any]) -> Callable[..., Any]:
    for handler in handlers:
        program = handler(program)
    return program


def _suspects(guide: Trace) -> frozenset[str]:
    """The sites of a guide that need a plan: auxiliary ones, and Deltas."""
    return frozenset(
        name
        for name, site in latents(guide).items()
        if site["infer"].get("is_auxiliary") or site.get("folded") or is_delta(site["fn"])
    )


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a point."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


class _Stale(Exception):
    """The guide is not what its plan was made for."""


class _Folding(Messenger):
    """Gives each latent that is made of auxiliary sites the density of both."""

    def __init__(self, found: Plan, again: Callable[[], Trace]) -> None:
        super().__init__()
        self.again = again
        self.by_site = {name: fold for fold in found.folds for name in fold.sites}
        self.by_auxiliary = {name: fold for fold in found.folds for name in fold.auxiliaries}
        self.nodes: dict[str, Any] = {}

    def __enter__(self) -> Any:
        self.nodes = {}
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.by_auxiliary and not msg["is_observed"]:
            value = _from_given(self.by_auxiliary[name], name, msg["fn"])
            if value is not None:
                msg["value"], msg["done"] = value, True
        elif name in self.by_site:
            fold, value = self.by_site[name], msg["fn"]()
            if any(auxiliary not in self.nodes for auxiliary in _needed(fold, name)):
                raise _Stale
            msg["fn"] = _density(fold, name, self.nodes, msg["fn"], value, self.again)
            msg["value"], msg["done"] = value, True
            # Draws of a map that is not known are runs of the guide, and cannot be within one.
            msg["folded"] = "now" if name in fold.parts else "later"

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.by_auxiliary or msg["name"] in self.by_site:
            self.nodes[msg["name"]] = {"fn": msg["fn"], "value": msg["value"]}


def _needed(fold: Fold, name: str) -> tuple[str, ...]:
    """The auxiliary sites that are drawn before a latent gets its density."""
    if name in fold.parts:
        return (fold.parts[name].auxiliary,)
    return fold.auxiliaries if name == fold.sites[-1] else ()


def _from_given(fold: Fold, auxiliary: str, fn: Any) -> Tensor | None:
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
    for handler in reversed(_PYRO_STACK):
        gives = getattr(handler, "gives", None)
        value = None if gives is None else gives(name, support)
        if value is not None:
            return cast(Tensor, value)
    return None


def _density(
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
        raise _Stale from error
    if not _close(made, value):
        raise _Stale


def plan(pair: nn.Module, batch: Sequence[Tensor]) -> Plan:
    """Find out what is to be folded in the guide of a pair, by running it on a batch."""
    if any(isinstance(tensor, FakeTensor) for tensor in batch):
        raise NotTraceable("its guide draws other sites than before")
    typed, few = cast(Pair, pair), tuple(tensor[:2] for tensor in batch)
    with using(pair, 0):
        first = trace(typed.guide, few)
        model = trace(poutine.replay(typed.model, trace=first), few)
        own = [name for name in latents(first) if name not in sample_sites(model)]
        found = Plan()
        if own or _suspects(first):
            with torch.enable_grad():
                guide = trace(_Leaves(own)(typed.guide), few)
                found = _Planner(model, guide, first).plan()
    _PLANS[pair] = found
    return found


class _Leaves(Messenger):
    """Draws of these sites are leaves, by which what depends on them is differentiated."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and not msg["done"]:
            value = msg["fn"](*msg["args"], **msg["kwargs"]).detach()
            msg["value"] = value.requires_grad_() if value.is_floating_point() else value
            msg["done"] = True


class _Planner:
    """Makes the plan of a guide from a trace whose auxiliary sites are leaves."""

    def __init__(self, model: Trace, guide: Trace, other: Trace) -> None:
        self.model, self.guide, self.other = latents(model), latents(guide), latents(other)
        self.trace = other
        self.auxiliaries = {
            name: site for name, site in self.guide.items() if name not in sample_sites(model)
        }
        self.deltas = {
            name: site
            for name, site in self.guide.items()
            if name in self.model and is_delta(site["fn"])
        }
        self.slopes = {name: self._slopes(site["value"]) for name, site in self.deltas.items()}
        self.fed = {name: self._feeders(name) for name in self.deltas}
        self.faults: list[str] = []

    def plan(self) -> Plan:
        points = [name for name in self.deltas if not self._drawn(name)]
        silent = [name for name, site in self.auxiliaries.items() if is_delta(site["fn"])]
        folds = tuple(self._folds())
        feeding = {name for fold in folds for name in fold.auxiliaries}
        for name in self.auxiliaries:
            if name not in feeding and name not in silent and not self.faults:
                self.faults.append(_unfolded(name))
        continuous, modes = [], []
        for name in points:
            site, prior = self.deltas[name], self.model[name]
            if prior["fn"].support.is_discrete:
                modes.append(name)
                if bool((site["fn"].log_prob(site["value"]) != 0).any()):
                    self.faults.append(
                        f"the guide of discrete site '{name}' is a Delta with a log_density: its "
                        "log probability is 0, drop log_density"
                    )
            elif not is_delta(prior["fn"]):
                continuous.append(name)
        local = tuple(name for name in continuous if is_local(self.deltas[name]))
        return Plan(
            folds,
            tuple(silent),
            tuple(self.faults),
            local,
            tuple(name for name in continuous if name not in local),
            tuple(modes),
            frozenset(self.deltas) | frozenset(self.auxiliaries) | _suspects(self.trace),
        )

    def _slopes(self, value: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Random weights of the numbers of a value, and the gradient of their weighted sum by each
        auxiliary site that it depends on."""
        leaves = {n: s["value"] for n, s in self.auxiliaries.items() if s["value"].requires_grad}
        if not value.requires_grad or not leaves:
            return {}
        weights = torch.randn_like(value) + 2.0
        found = torch.autograd.grad(
            (value * weights).sum(), list(leaves.values()), retain_graph=True, allow_unused=True
        )
        return {
            name: (weights, slope)
            for name, slope in zip(leaves, found, strict=True)
            if slope is not None and bool((slope != 0).any())
        }

    def _feeders(self, name: str) -> list[str]:
        """The auxiliary sites that a Delta is made of."""
        if self.slopes[name]:
            return list(self.slopes[name])
        value = self.deltas[name]["value"]
        return [
            other
            for other, site in self.auxiliaries.items()
            if not site["value"].requires_grad
            and site["value"].shape == value.shape
            and bool((site["value"] == value).all())
        ]

    def _drawn(self, name: str) -> bool:
        """Whether a Delta stands for a draw: of auxiliary sites, or of one with its density."""
        if self.fed[name]:
            return not all(is_delta(self.auxiliaries[own]["fn"]) for own in self.fed[name])
        site, other = self.deltas[name], self.other[name]["value"]
        same = other.shape == site["value"].shape and bool((other == site["value"]).all())
        return not same and bool((site["fn"].log_prob(site["value"]) != 0).all())

    def _folds(self) -> list[Fold]:
        groups: list[tuple[set[str], list[str]]] = []
        for name in self.deltas:
            if not self.fed[name] or not self._drawn(name):
                continue
            own, sites = set(self.fed[name]), [name]
            for group in [group for group in groups if group[0] & own]:
                groups.remove(group)
                own, sites = own | group[0], [*group[1], *sites]
            groups.append((own, sites))
        return [fold for own, sites in groups if (fold := self._fold(own, sites)) is not None]

    def _fold(self, own: set[str], names: list[str]) -> Fold | None:
        auxiliaries = tuple(name for name in self.auxiliaries if name in own)
        sites = tuple(name for name in self.deltas if name in names)
        parts: dict[str, Part] = {}
        for name in sites:
            part = self._part(name)
            if part is not None:
                parts[name] = part
        supports = {name: self.model[name]["fn"].support for name in sites}
        if len(parts) < len(sites):
            parts = {}
            fault = self._jacobian(auxiliaries, sites)
        else:
            fault = self._tiled(auxiliaries, parts) or self._densities(parts)
        if fault is None:
            fault = self._placed(auxiliaries, sites)
        if fault is not None:
            self.faults.append(fault)
            return None
        return Fold(auxiliaries, sites, parts, supports)

    def _part(self, name: str) -> Part | None:
        """The numbers that make a latent as they are, or mapped to its support."""
        if len(self.fed[name]) != 1:
            return None
        (auxiliary,) = self.fed[name]
        site, support = self.deltas[name], self.model[name]["fn"].support
        if not self.slopes[name]:
            fn = self.auxiliaries[auxiliary]["fn"]
            return Part(auxiliary, 0, fn.event_shape.numel(), fn.event_dim, None)
        plates = self.auxiliaries[auxiliary]["value"].dim()
        plates -= self.auxiliaries[auxiliary]["fn"].event_dim
        found = self._run(auxiliary, *self.slopes[name][auxiliary])
        if found is not None:
            return Part(auxiliary, *found, site["value"].dim() - plates, None)
        transform = _to_support(support)
        if transform is None:
            return None
        free = transform.inv(site["value"])
        slopes = self._slopes(free)
        found = self._run(auxiliary, *slopes[auxiliary]) if list(slopes) == [auxiliary] else None
        return None if found is None else Part(auxiliary, *found, free.dim() - plates, transform)

    def _run(self, auxiliary: str, weights: Tensor, slope: Tensor) -> tuple[int, int] | None:
        """Where the numbers of an auxiliary site lie whose slopes are the weights themselves."""
        numbers = max(1, self.auxiliaries[auxiliary]["fn"].event_shape.numel())
        flat = slope.reshape(-1, numbers)
        (columns,) = (flat != 0).any(0).nonzero(as_tuple=True)
        start, size = int(columns[0]), len(columns)
        if int(columns[-1]) - start + 1 != size or len(flat) * size != weights.numel():
            return None
        same = _close(flat[:, columns], weights.reshape(-1, size))
        return (start, size) if same else None

    def _tiled(self, auxiliaries: tuple[str, ...], parts: Mapping[str, Part]) -> str | None:
        """What is wrong where latents share numbers of an auxiliary site, or leave some out."""
        for name in auxiliaries:
            end = 0
            for part in sorted(
                (part for part in parts.values() if part.auxiliary == name),
                key=lambda part: part.start,
            ):
                if part.start < end:
                    return (
                        f"latent sites {', '.join(parts)} are Deltas of the same draws of "
                        f"'{name}': they have no joint density, and the loss is not a bound on "
                        "log p(x)"
                    )
                if part.start > end:
                    return _unfolded(name, "all of ")
                end = part.start + part.size
            if end != max(1, self.auxiliaries[name]["fn"].event_shape.numel()):
                return _unfolded(name, "all of ")
        return None

    def _densities(self, parts: Mapping[str, Part]) -> str | None:
        for name, part in parts.items():
            fn, value = self.deltas[name]["fn"], self.deltas[name]["value"].detach()
            said = fn.log_prob(fn()).detach()
            right = torch.zeros_like(said) - _log_det(part.transform, value, said.dim())
            if not _close(said, right):
                return _wrong_density(name, said.sum().item(), right.sum().item())
        return None

    def _placed(self, auxiliaries: tuple[str, ...], sites: tuple[str, ...]) -> str | None:
        inside = [is_local(self.guide[name]) for name in (*auxiliaries, *sites)]
        if len(set(inside)) > 1:
            where = dict(zip((*auxiliaries, *sites), inside, strict=True))
            names = [", ".join(f"'{n}'" for n in where if where[n] == one) for one in (True, False)]
            return (
                f"sites {names[0]} of the guide are in the data plate and made with {names[1]}, "
                "outside it: put both in the plate, or neither"
            )
        return None

    def _jacobian(self, auxiliaries: tuple[str, ...], sites: tuple[str, ...]) -> str | None:
        """What is wrong with a map that is not known: whether it is one to one, and its density."""
        leaves = [self.auxiliaries[name] for name in auxiliaries]
        if any(not leaf["value"].requires_grad for leaf in leaves):
            return _unfolded(auxiliaries[0])
        free, log_det, said = [], torch.zeros(()), torch.zeros(())
        for name in sites:
            site, transform = self.deltas[name], _to_support(self.model[name]["fn"].support)
            if transform is None:
                return _unfolded(auxiliaries[0])
            value = site["value"]
            extra = transform.inv(value).dim() - value.dim()
            free.append(_row(transform.inv(value), site, extra).flatten())
            each = _log_det(transform, value.detach(), len(site["fn"].batch_shape))
            log_det = log_det + _total(each.expand(site["fn"].batch_shape), site)
            said = said + _total(site["fn"].log_prob(site["fn"]()).detach(), site)
        numbers = torch.cat(free)
        width = sum(_row(leaf["value"], leaf).numel() for leaf in leaves)
        if len(numbers) != width or width > LARGEST:
            return _unfolded(auxiliaries[0], "all of " if width <= LARGEST else "")
        rows = []
        for number in numbers:
            slopes = torch.autograd.grad(
                number,
                [leaf["value"] for leaf in leaves],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            rows.append(
                torch.cat(
                    [
                        _row(slope, leaf).flatten()
                        for slope, leaf in zip(slopes, leaves, strict=True)
                    ]
                )
            )
        size = torch.linalg.slogdet(torch.stack(rows).double()).logabsdet.float()
        if not bool(size.isfinite()):
            return _unfolded(auxiliaries[0], "all of ")
        right = -(size + log_det)
        if not torch.allclose(said, right.to(said), rtol=1e-2, atol=1e-2):
            return _wrong_density(", ".join(sites), said.item(), right.item())
        return None


def _row(value: Tensor, site: Site, extra: int = 0) -> Tensor:
    """The numbers of the first datum of a site in the data plate; all of another."""
    if not is_local(site):
        return value
    return value.select(value.dim() - 1 - site["fn"].event_dim - extra, 0)


def _total(term: Tensor, site: Site) -> Tensor:
    return (term[..., 0] if is_local(site) else term).sum()


def _to_support(support: Any) -> Any:
    """The map from the real numbers to a support, None where there is none to be known."""
    try:
        return biject_to(support)
    except NotImplementedError:
        base = getattr(support, "base_constraint", None)
        return _to_support(base) if isinstance(base, constraints.Constraint) else None


def _log_det(transform: Any, value: Tensor, dims: int) -> Tensor:
    """log |det| of a map at the value that it makes, with so many dimensions."""
    if transform is None:
        return torch.zeros((), dtype=value.dtype)
    log_det = transform.log_abs_det_jacobian(transform.inv(value), value)
    return sum_rightmost(log_det, log_det.dim() - dims)


def _unfolded(name: str, numbers: str = "") -> str:
    return (
        f"site '{name}' of the guide is not one of the model, and no latent is a Delta of {numbers}"
        "it, one to one: the loss is not a bound on log p(x); make a latent such a Delta, with its "
        "log_density, or drop the site"
    )


def _wrong_density(name: str, said: float, right: float) -> str:
    return (
        f"the Delta of site '{name}' in the guide has log_density {said:.4g} where that of its map "
        f"is {right:.4g}: the loss is not a bound on log p(x); give log_density as minus the "
        "logarithm of the map's Jacobian determinant"
    )

"""The plan of a guide: which sites are folded, and why its loss may not be a bound on log p(x).

The guide runs once with its auxiliary sites as leaves of the autograd graph. The gradients of the
latents with respect to these leaves show which numbers determine which latent and through which
map, and whether the density of the latent is right.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyro_vae.compat import FakeTensor, sum_rightmost
from pyro_vae.errors import NotTraceable
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.folds import Fold, Part, Plan, close, is_delta
from pyro_vae.pairs.moments import is_discrete, support_of
from pyro_vae.pairs.pair import Pair, Site
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents, sample_sites
from pyro_vae.pairs.traces import trace

LARGEST = 300
"""The largest dimension of a latent for which the Jacobian of an unknown map is computed."""


PLANS: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def known(pair: nn.Module) -> Plan:
    """The most recent plan of a pair."""
    return PLANS.get(pair, Plan())


def plan(pair: nn.Module, batch: Sequence[Tensor]) -> Plan:
    """Make the plan of a pair's guide by a run on two rows of a batch."""
    if any(isinstance(tensor, FakeTensor) for tensor in batch):
        raise NotTraceable("its guide draws other sites than before")
    typed, few = cast(Pair, pair), tuple(tensor[:2] for tensor in batch)
    with using(pair, 0):
        first = trace(typed.guide, few)
        model = trace(poutine.replay(typed.model, trace=first), few)
        own = [name for name in latents(first) if name not in sample_sites(model)]
        found = Plan()
        if own or suspects(first):
            with torch.enable_grad():
                guide = trace(_Leaves(own)(typed.guide), few)
                found = _Planner(model, guide, first).plan()
    PLANS[pair] = found
    return found


def suspects(guide: Trace) -> frozenset[str]:
    """The sites of a guide that need a plan: auxiliary sites and Deltas."""
    return frozenset(
        name
        for name, site in latents(guide).items()
        if site["infer"].get("is_auxiliary") or site.get("folded") or is_delta(site["fn"])
    )


class _Leaves(Messenger):
    """Makes the draws of these sites leaves of the autograd graph."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and not msg["done"]:
            value = msg["fn"](*msg["args"], **msg["kwargs"]).detach()
            msg["value"] = value.requires_grad_() if value.is_floating_point() else value
            msg["done"] = True


class _Planner:
    """Makes the plan of a guide from a trace in which the auxiliary sites are leaves."""

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
            if is_discrete(prior["fn"]):
                modes.append(name)
                if bool((site["fn"].log_prob(site["value"]) != 0).any()):
                    self.faults.append(
                        f"the guide of discrete site '{name}' is a Delta with a log_density, but "
                        "the log probability of a discrete Delta is 0: remove log_density"
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
            frozenset(self.deltas) | frozenset(self.auxiliaries) | suspects(self.trace),
        )

    def _slopes(self, value: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Random weights for the numbers of a value, and the gradient of the weighted sum.

        There is one gradient for each auxiliary site on which the value depends.
        """
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
        """The auxiliary sites on which a Delta depends."""
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
        """Whether a Delta represents a draw: it depends on auxiliary draws, or has a density."""
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
        supports = {name: support_of(self.model[name]["fn"]) for name in sites}
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
        """The numbers of an auxiliary site that determine a latent, directly or through a map."""
        if len(self.fed[name]) != 1:
            return None
        (auxiliary,) = self.fed[name]
        site, support = self.deltas[name], support_of(self.model[name]["fn"])
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
        """Start and size of the auxiliary numbers whose gradients equal the weights themselves."""
        numbers = max(1, self.auxiliaries[auxiliary]["fn"].event_shape.numel())
        flat = slope.reshape(-1, numbers)
        (columns,) = (flat != 0).any(0).nonzero(as_tuple=True)
        start, size = int(columns[0]), len(columns)
        if int(columns[-1]) - start + 1 != size or len(flat) * size != weights.numel():
            return None
        same = close(flat[:, columns], weights.reshape(-1, size))
        return (start, size) if same else None

    def _tiled(self, auxiliaries: tuple[str, ...], parts: Mapping[str, Part]) -> str | None:
        """The error if latents share numbers of an auxiliary site, or do not use all of them."""
        for name in auxiliaries:
            end = 0
            for part in sorted(
                (part for part in parts.values() if part.auxiliary == name),
                key=lambda part: part.start,
            ):
                if part.start < end:
                    return (
                        f"latent sites {', '.join(parts)} are Deltas of the same draws of "
                        f"'{name}': they do not have a joint density, so the loss is not a bound "
                        "on log p(x); give each latent its own draws"
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
            if not close(said, right):
                return _wrong_density(name, said.sum().item(), right.sum().item())
        return None

    def _placed(self, auxiliaries: tuple[str, ...], sites: tuple[str, ...]) -> str | None:
        inside = [is_local(self.guide[name]) for name in (*auxiliaries, *sites)]
        if len(set(inside)) > 1:
            where = dict(zip((*auxiliaries, *sites), inside, strict=True))
            names = [", ".join(f"'{n}'" for n in where if where[n] == one) for one in (True, False)]
            return (
                f"sites {names[0]} of the guide are in the data plate but {names[1]} are outside "
                "it, and they depend on each other: put both in the plate, or neither"
            )
        return None

    def _jacobian(self, auxiliaries: tuple[str, ...], sites: tuple[str, ...]) -> str | None:
        """The error of an unknown map that is not one-to-one or has the wrong density."""
        leaves = [self.auxiliaries[name] for name in auxiliaries]
        if any(not leaf["value"].requires_grad for leaf in leaves):
            return _unfolded(auxiliaries[0])
        free, log_det, said = [], torch.zeros(()), torch.zeros(())
        for name in sites:
            site, transform = self.deltas[name], _to_support(support_of(self.model[name]["fn"]))
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
    """The numbers of the first datum of a local site; all numbers of a global site."""
    if not is_local(site):
        return value
    return value.select(value.dim() - 1 - site["fn"].event_dim - extra, 0)


def _total(term: Tensor, site: Site) -> Tensor:
    return (term[..., 0] if is_local(site) else term).sum()


def _to_support(support: Any) -> Any:
    """The map from the real numbers to a support; None if Pyro does not know one."""
    try:
        return biject_to(support)
    except NotImplementedError:
        base = getattr(support, "base_constraint", None)
        return _to_support(base) if isinstance(base, constraints.Constraint) else None


def _log_det(transform: Any, value: Tensor, dims: int) -> Tensor:
    """log |det| of a map's Jacobian at its output ``value``, with ``dims`` dimensions."""
    if transform is None:
        return torch.zeros((), dtype=value.dtype)
    log_det = transform.log_abs_det_jacobian(transform.inv(value), value)
    return sum_rightmost(log_det, log_det.dim() - dims)


def _unfolded(name: str, numbers: str = "") -> str:
    return (
        f"site '{name}' of the guide is missing from the model, and no latent is a one-to-one "
        f"Delta of {numbers}it, so the loss is not a bound on log p(x): make a latent such a Delta "
        "and give its log_density, or remove the site"
    )


def _wrong_density(name: str, said: float, right: float) -> str:
    return (
        f"the Delta of site '{name}' in the guide has log_density {said:.4g} but its map has "
        f"{right:.4g}, so the loss is not a bound on log p(x): set log_density to minus the "
        "logarithm of the map's absolute Jacobian determinant"
    )

"""The trace of the guide with its auxiliary sites folded into its latents.

Every tool then sees one latent with its density. This module also has the checks of point
estimates and factors.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.fold_plan import PLANS, known, plan, suspects
from pyro_vae.pairs.folds import Fold, Plan, Stale, auxiliary_value, close, fold_density
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.moments import mean
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import factors, latents
from pyro_vae.pairs.traces import Given, trace


def trace_guide(pair: nn.Module, batch: Sequence[Tensor], *handlers: Callable[..., Any]) -> Trace:
    """The trace of the guide on a batch, with its auxiliary sites folded into its latents.

    Arguments:
        handlers: handlers around the guide, innermost first.

    Raises `UsageError` if an auxiliary site cannot be folded.
    """
    found = PLANS.get(pair)
    if found is None or found.faults:
        found = plan(pair, batch)
    try:
        return _folding(pair, batch, handlers, found)
    except Stale:
        return _folding(pair, batch, handlers, plan(pair, batch))


def folded(pair: nn.Module, guide: Trace) -> Trace:
    """Fold a plain trace of the guide, made by an objective, as the pair's plan says."""
    found = known(pair)
    if not found.hidden:
        return guide
    copied, nodes = guide.copy(), cast(dict[str, Any], dict(guide.nodes))
    for fold in found.folds:
        for name in fold.sites:
            fn = fold_density(fold, name, nodes, nodes[name]["fn"], nodes[name]["value"], None)
            copied.nodes[name] = {**nodes[name], "fn": fn}
    for name in found.hidden:
        copied.remove_node(name)
    return copied


def require_density(pair: nn.Module, batch: Sequence[Tensor], what: str) -> None:
    """Raise `UsageError` if the guide of a local latent is a point estimate."""
    for name in plan(pair, batch).local_points:
        raise UsageError(
            f"the guide of latent site '{name}' is a Delta, a point estimate without a density: "
            f"log p(x, {name}) at a point is not a bound on log p(x), and {what}; give the site a "
            "distribution with a positive variance"
        )


def factors_of(pair: nn.Module, batch: Sequence[Tensor]) -> tuple[str, ...]:
    """The ``pyro.factor`` sites of a pair's model, found by a run on two rows."""
    few = tuple(tensor[:2] for tensor in batch)
    with using(pair, 0):
        return tuple(factors(trace_model(pair, few, trace_guide(pair, few))))


def require_factors_placed(pair: nn.Module, batch: Sequence[Tensor]) -> None:
    """Raise `UsageError` if a factor outside the data plate depends on single data."""
    for fault in misplaced_factors(pair, batch):
        raise UsageError(fault)


def misplaced_factors(pair: nn.Module, batch: Sequence[Tensor]) -> list[str]:
    """Errors of factors outside the data plate whose value changes with the rows of the batch.

    The check compares two rows with one row, at the same global latents and new local latents.
    """
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
        f"factor '{name}' of the {where} depends on single data but is outside the data plate: put "
        'it under with pyro.plate("data", len(x), dim=-1)'
        for where, name in outside
        if not close(*(_total_factor(run[where], name) for run in (before, others)))
    ]


def _total_factor(one: Trace, name: str) -> Tensor:
    site = factors(one)[name]
    return cast(Tensor, site["fn"].log_prob(site["value"]).sum())


def _folding(
    pair: nn.Module, batch: Sequence[Tensor], handlers: Sequence[Any], found: Plan
) -> Trace:
    for fault in found.faults:
        raise UsageError(fault)
    guide = cast(Pair, pair).guide
    if not found.sites:
        plain = trace(_around(guide, handlers), batch)
        if suspects(plain):
            raise Stale
        return plain

    def again() -> Trace:
        with poutine.block():
            return trace(guide, batch)

    messenger = _Folding(found, again)
    traced = trace(_around(messenger(guide), handlers), batch)
    if suspects(traced) | (found.sites & latents(traced).keys()) != found.sites:
        raise Stale
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


class _Folding(Messenger):
    """Gives each latent that is a function of auxiliary sites its own density."""

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
            value = auxiliary_value(self.by_auxiliary[name], name, msg["fn"])
            if value is not None:
                msg["value"], msg["done"] = value, True
        elif name in self.by_site:
            fold, value = self.by_site[name], msg["fn"]()
            if any(auxiliary not in self.nodes for auxiliary in _needed(fold, name)):
                raise Stale
            msg["fn"] = fold_density(fold, name, self.nodes, msg["fn"], value, self.again)
            msg["value"], msg["done"] = value, True
            # Draws through an unknown map need runs of the guide, so they wait until this run ends.
            msg["folded"] = "now" if name in fold.parts else "later"

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.by_auxiliary or msg["name"] in self.by_site:
            self.nodes[msg["name"]] = {"fn": msg["fn"], "value": msg["value"]}


def _needed(fold: Fold, name: str) -> tuple[str, ...]:
    """The auxiliary sites that must be drawn before a latent gets its density."""
    if name in fold.parts:
        return (fold.parts[name].auxiliary,)
    return fold.auxiliaries if name == fold.sites[-1] else ()

r"""Discrete latents that are summed out: every value at once, each with its exact weight.

A site marked ``infer={"enumerate": "parallel"}`` takes all of its values, along a dimension of its
own to the left of the plates (Pyro's ``EnumMessenger``). With e the values that the guide
enumerates and m those that only the model has, the weights are :math:`q(e|x)\,r(m|e,x,z)`, where
r is the exact conditional :math:`p(m|x,z,e)` under the model. All sums are dense.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from math import prod
from typing import Any, cast

from pyro.poutine import Trace, replay
from torch import Tensor, nn

from pyro_vae.compat import Enumerate, enumerate_dim
from pyro_vae.errors import UsageError
from pyro_vae.pairs import places
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Pair, Site
from pyro_vae.pairs.places import is_local
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents, sample_sites
from pyro_vae.pairs.traces import trace


def enumerated(trace: Trace) -> dict[str, Site]:
    """The sites of a trace that took all of their values, by name."""
    return {name: site for name, site in latents(trace).items() if enumerate_dim(site) is not None}


def to_enumerate(*traces: Trace) -> list[str]:
    """The latent sites that are marked to be enumerated, in plain traces too."""
    sites = {name: site for trace in traces for name, site in latents(trace).items()}
    return [name for name, site in sites.items() if site["infer"].get("enumerate")]


def require_summed(*traces: Trace) -> None:
    """Raise `UsageError` for a site that is to be summed out and was drawn, as Trace_ELBO does."""
    for name in to_enumerate(*traces):
        if not any(name in enumerated(trace) for trace in traces):
            raise UsageError(
                f"site '{name}' is to be summed out (enumerated), which this objective does not: "
                "use `pyro_vae.EnumeratedELBO`"
            )


def misplaced(site: Site) -> str | None:
    """Why a site of a plain trace cannot be summed out for each datum by where it is, or None."""
    if _placed(site):
        return None
    return (
        f"latent site '{site['name']}' is to be enumerated, and is not in the data plate alone: it "
        "is summed out for each datum"
    )


def require_placed(*traces: Trace) -> None:
    """Raise `UsageError` for a site of plain traces that is to be summed out and is misplaced."""
    sites = {name: site for trace in traces for name, site in latents(trace).items()}
    for name in to_enumerate(*traces):
        if fault := misplaced(sites[name]):
            raise UsageError(fault)


def enumerates(pair: nn.Module, batch: Batch) -> bool:
    """Whether a pair has sites that are marked so, found by running it on two rows."""
    return bool(to_enumerate(*glance(pair, batch)))


def discrete(pair: nn.Module, batch: Batch) -> list[str]:
    """The latent sites of a pair that have a finite list of values, those of the guide first.

    Those in the data plate alone: of others a datum has more than one.
    """
    guide, model = glance(pair, batch)
    sites = latents(guide) | {
        name: site for name, site in latents(model).items() if site["infer"].get("enumerate")
    }
    with places.in_use(pair):
        return [name for name, site in sites.items() if _placed(site) and _has_values(site["fn"])]


def values(pair: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """All values (values, *event) of each latent site of a pair that has a finite list of them."""
    guide, model = glance(pair, batch)
    sites = latents(model) | latents(guide)
    return {name: support_values(sites[name]) for name in discrete(pair, batch)}


def nesting(pair: nn.Module, batch: Batch) -> int:
    """How many plates a pair nests, found by running it on two rows."""
    return nesting_of(*glance(pair, batch))


def traces(pair: nn.Module, batch: Batch, plates: int, around: Any = None) -> tuple[Trace, Trace]:
    """Traces of model and guide with every site enumerated that is marked so.

    Arguments:
        plates: how many plates the pair nests, ``around`` counted where it is one.
        around: a handler around both, a plate of samples say.
    """
    typed, around = cast(Pair, pair), around or nullcontext()
    with around:
        guide = trace_guide(pair, batch, Enumerate(first_available_dim=-1 - plates))
    with around:
        model = trace(Enumerate()(replay(typed.model, trace=guide)), batch)
    return model, guide


def nesting_of(*traces: Trace) -> int:
    """How many plates the sites of these traces nest, the data plate counted."""
    return max(
        (-dim for trace in traces for dim in plates_of(sample_sites(trace).values())), default=1
    )


def combinations(*traces: Trace) -> int:
    """How many combinations of values the enumerated sites of these traces take."""
    sites = {name: site for trace in traces for name, site in enumerated(trace).items()}
    return prod(support_values(site).shape[0] for site in sites.values())


def glance(pair: nn.Module, batch: Batch) -> tuple[Trace, Trace]:
    """Plain traces of guide and model on two rows, whose draws nobody notices."""
    few = tuple(tensor[:2] for tensor in batch)
    with using(pair, seed=0):
        guide = trace_guide(pair, few)
        model = trace_model(pair, few, guide)
        require_placed(guide, model)
    return guide, model


def enumerated_model(pair: nn.Module, batch: Batch, guide: Trace) -> Trace:
    messenger = Enumerate(first_available_dim=-1 - nesting(pair, batch))
    return trace(messenger(replay(cast(Pair, pair).model, trace=guide)), batch)


def _placed(site: Site) -> bool:
    """Whether a site of a plain trace is in the data plate alone."""
    return is_local(site) and len(plates_of([site])) == 1


def plates_of(sites: Iterable[Site]) -> set[int]:
    return {f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized}


def _has_values(fn: Any) -> bool:
    try:
        return bool(fn.has_enumerate_support) and len(fn.enumerate_support(expand=False)) > 0
    except NotImplementedError:
        return False


def support_values(site: Site, expand: bool = False) -> Tensor:
    """All values of a site, (values, *event), or (values, batch, *event)."""
    fn = site["fn"]
    try:
        values = fn.enumerate_support(expand=expand)
    except NotImplementedError:
        raise UsageError(
            f"site '{site['name']}' ({type(fn).__name__}) has no finite list of values"
        ) from None
    return values if expand else values.reshape(len(values), *fn.event_shape)

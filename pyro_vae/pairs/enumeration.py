r"""Enumeration of discrete latents, which are summed out with exact weights.

A site marked ``infer={"enumerate": "parallel"}`` takes all of its values at once, along an extra
dimension to the left of the plates (Pyro's ``EnumMessenger``). Let e be the latents that the guide
enumerates, and m the enumerated latents that only the model has. The weights are
:math:`q(e|x)\,r(m|e,x,z)`, where r is the exact conditional :math:`p(m|x,z,e)` under the model.

Only the objective enumerates latents outside the data plate. The other tools draw them from the
guide, like every global latent.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from math import prod
from typing import Any, cast

from pyro.poutine import Trace, replay
from torch import Tensor, nn

from pyro_vae.compat import Enumerate, enumerate_dim
from pyro_vae.errors import UsageError
from pyro_vae.pairs import data_plate
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Pair, Site
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents, sample_sites
from pyro_vae.pairs.traces import trace

SAMPLE_PLATES = frozenset({"importance_samples", "particles", "draws", "num_particles_vectorized"})
"""The names of the plates of samples that the tools and Pyro put around a pair."""


def enumerated(trace: Trace) -> dict[str, Site]:
    """The sites of a trace that took all of their values at once, by name."""
    return {name: site for name, site in latents(trace).items() if enumerate_dim(site) is not None}


def to_enumerate(*traces: Trace) -> list[str]:
    """The latent sites that are marked for enumeration, also in plain traces."""
    sites = {name: site for trace in traces for name, site in latents(trace).items()}
    return [name for name, site in sites.items() if site["infer"].get("enumerate")]


def drawn(*traces: Trace) -> list[str]:
    """The sites that are marked for enumeration but were drawn, as in Trace_ELBO."""
    names = to_enumerate(*traces)
    return [name for name in names if not any(name in enumerated(trace) for trace in traces)]


def require_summed(*traces: Trace) -> None:
    """Raise `UsageError` if a site is marked for enumeration but was drawn."""
    for name in drawn(*traces):
        raise UsageError(
            f"site '{name}' is marked for enumeration, but this objective does not sum it out: "
            "use `pyro_vae.EnumeratedELBO`"
        )


def misplaced(site: Site, guide: Trace) -> str | None:
    """Say why the mark or the plates of a site in a plain trace prevent summing it out, or None."""
    name = site["name"]
    if site["infer"].get("enumerate") not in (None, "parallel") or site["infer"].get("num_samples"):
        return (
            f"latent site '{name}' is marked for enumeration, but only "
            'infer={"enumerate": "parallel"} is supported; use that'
        )
    if not is_local(site) and name not in latents(guide):
        return (
            f"latent site '{name}' is outside the data plate and only the model has it, so the sum "
            "over its values is not a sum for each datum: add the site to the guide, for example "
            "with AutoDiscreteParallel"
        )
    for frame in site["cond_indep_stack"]:
        if frame.name in SAMPLE_PLATES:
            return f"plate '{frame.name}' has a name that the tools use themselves: rename it"
    return None


def require_placed(guide: Trace, model: Trace) -> None:
    """Raise `UsageError` if a site of plain traces is marked for enumeration but misplaced."""
    sites = latents(guide) | latents(model)
    for name in to_enumerate(guide, model):
        if fault := misplaced(sites[name], guide):
            raise UsageError(fault)


def enumerates(pair: nn.Module, batch: Batch) -> bool:
    """Whether a pair has sites marked for enumeration, found by a run on two rows."""
    return bool(to_enumerate(*glance(pair, batch)))


def discrete(pair: nn.Module, batch: Batch) -> list[str]:
    """The latent sites of a pair that have a finite list of values; sites of the guide come first.

    Only sites in the data plate and in no other plate are listed: in another plate, a datum has
    more than one value of a site.
    """
    guide, model = glance(pair, batch)
    sites = latents(guide) | {
        name: site for name, site in latents(model).items() if site["infer"].get("enumerate")
    }
    with data_plate.in_use(pair):
        return [name for name, site in sites.items() if _placed(site) and _has_values(site["fn"])]


def values(pair: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """All values of each discrete latent site of a pair, of shape (values, *event)."""
    guide, model = glance(pair, batch)
    sites = latents(model) | latents(guide)
    return {name: support_values(sites[name]) for name in discrete(pair, batch)}


def nesting(pair: nn.Module, batch: Batch) -> int:
    """The number of nested plates of a pair, found by a run on two rows."""
    return nesting_of(*glance(pair, batch))


def traces(pair: nn.Module, batch: Batch, plates: int, around: Any = None) -> tuple[Trace, Trace]:
    """Traces of model and guide in which every local site marked for enumeration is enumerated.

    Arguments:
        plates: the number of nested plates of the pair, including ``around`` if it is a plate.
        around: a handler around both programs, for example a plate of samples.
    """
    typed, around = cast(Pair, pair), around or nullcontext()
    with around:
        guide = trace_guide(pair, batch, Enumerate(-1 - plates, is_local))
    with around:
        model = trace(Enumerate(None, is_local)(replay(typed.model, trace=guide)), batch)
    return model, guide


def nesting_of(*traces: Trace) -> int:
    """The number of nested plates in these traces, including the data plate."""
    return max(
        (-dim for trace in traces for dim in plates_of(sample_sites(trace).values())), default=1
    )


def combinations(*traces: Trace) -> int:
    """The number of values that the enumerated dimensions add to a term of one datum.

    It includes the plates within a datum around the enumerated sites.
    """
    sizes: dict[int, int] = {}
    for site in (site for each in traces for site in enumerated(each).values()):
        found = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized and f.dim < -1}
        found[enumerate_dim(site)] = support_values(site).shape[0]
        for dim, size in found.items():
            sizes[dim] = max(size, sizes.get(dim, 1))
    return prod(sizes.values())


def glance(pair: nn.Module, batch: Batch) -> tuple[Trace, Trace]:
    """Plain traces of guide and model on two rows; the generators are restored afterwards."""
    few = tuple(tensor[:2] for tensor in batch)
    with using(pair, seed=0):
        guide = trace_guide(pair, few)
        model = trace_model(pair, few, guide)
        require_placed(guide, model)
    return guide, model


def enumerated_model(pair: nn.Module, batch: Batch, guide: Trace) -> Trace:
    messenger = Enumerate(-1 - nesting(pair, batch), is_local)
    return trace(messenger(replay(cast(Pair, pair).model, trace=guide)), batch)


def _placed(site: Site) -> bool:
    """Whether a site of a plain trace is in the data plate and in no other plate."""
    return is_local(site) and len(plates_of([site])) == 1


def plates_of(sites: Iterable[Site]) -> set[int]:
    return {f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized}


def _has_values(fn: Any) -> bool:
    try:
        return bool(fn.has_enumerate_support) and len(fn.enumerate_support(expand=False)) > 0
    except NotImplementedError:
        return False


def support_values(site: Site, expand: bool = False) -> Tensor:
    """All values of a site: (values, *event), or (values, batch, *event) if expanded."""
    fn = site["fn"]
    try:
        values = fn.enumerate_support(expand=expand)
    except NotImplementedError:
        raise UsageError(
            f"site '{site['name']}' ({type(fn).__name__}) does not have a finite list of values"
        ) from None
    return values if expand else values.reshape(len(values), *fn.event_shape)

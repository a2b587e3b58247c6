"""Discrete latents that are summed out: every value at once, each with its exact weight.

A site marked ``infer={"enumerate": "parallel"}`` takes all of its values, along a dimension of its
own to the left of the plates (Pyro's ``EnumMessenger``). With e the values that the guide
enumerates and m those that only the model has, the weights are :math:`q(e|x)\\,r(m|e,x,z)`, where
r is the exact conditional :math:`p(m|x,z,e)` under the model. All sums are dense.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from pyro.poutine import Trace, replay
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor, nn

from pyro_vae import places
from pyro_vae.errors import UsageError
from pyro_vae.pairs import (
    Batch,
    Pair,
    Site,
    is_auxiliary,
    is_factor,
    is_local,
    latents,
    log_prob,
    observed,
    sample_sites,
    scored,
    trace,
    trace_guide,
    trace_model,
    using,
)


@dataclass(frozen=True)
class Terms:
    """Log densities of one pair of traces at every value of the enumerated sites, with weights.

    Each term is summed over the plates within a datum; enumerated dimensions come first, then a
    plate of samples, if any, then those of the plates within a datum, of size 1, then the data.
    """

    weights: Tensor
    """q(e|x) r(m|e,x,z)."""
    posterior: dict[str, Tensor]
    """log q of each latent site of the guide, log r of each that only the model has.

    Where the model alone has several, r splits into a factor for each, given those before it in
    the model: the chain rule."""
    prior: dict[str, Tensor]
    """log p of each latent site of the model."""
    observed: dict[str, Tensor]
    """log p of each observed site, those that are auxiliary included."""
    dims: dict[str, int]
    """The dimension of each enumerated site."""

    def mean(self, term: Tensor) -> Tensor:
        """The weighted mean of a term over the enumerated values; weight zero takes no part."""
        dims = [dim for dim in self.dims.values() if _extends(term, dim)]
        if not dims:
            return term
        weights = _sum(self.weights, [dim for dim in self.dims.values() if dim not in dims])
        alive = weights > 0
        return (torch.where(alive, weights, 0.0) * torch.where(alive, term, 0.0)).sum(dims, True)

    def units(self, values: Tensor, right: int) -> Tensor:
        """The weighted mean of values with as many dimensions right of the data."""
        if not self.dims:
            return values
        weights = self.weights.reshape(*self.weights.shape, *[1] * right)
        weighed = torch.where(weights > 0, weights * values, 0.0)
        return weighed.sum([dim - right for dim in self.dims.values()])


def enumerated(trace: Trace) -> dict[str, Site]:
    """The sites of a trace that took all of their values, by name."""
    return {
        name: site
        for name, site in latents(trace).items()
        if site["infer"].get("_enumerate_dim") is not None
    }


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
                "use pyro_vae.EnumeratedELBO"
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
    return bool(to_enumerate(*_glance(pair, batch)))


def discrete(pair: nn.Module, batch: Batch) -> list[str]:
    """The latent sites of a pair that have a finite list of values, those of the guide first.

    Those in the data plate alone: of others a datum has more than one.
    """
    guide, model = _glance(pair, batch)
    sites = latents(guide) | {
        name: site for name, site in latents(model).items() if site["infer"].get("enumerate")
    }
    with places.in_use(pair):
        return [name for name, site in sites.items() if _placed(site) and _has_values(site["fn"])]


def values(pair: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """All values (values, *event) of each latent site of a pair that has a finite list of them."""
    guide, model = _glance(pair, batch)
    sites = latents(model) | latents(guide)
    return {name: _values(sites[name]) for name in discrete(pair, batch)}


def is_named(pair: nn.Module, batch: Batch, name: str) -> bool:
    """Whether the values of an enumerated site are classes that the model is told the names of.

    They are where it observes whole numbers, labels, whose density depends on the site.
    """
    model, _ = traces(pair, batch, nesting(pair, batch))
    dim = enumerated(model)[name]["infer"]["_enumerate_dim"] if name in enumerated(model) else 0
    return any(
        dim < 0 and not site["value"].is_floating_point() and _extends(log_prob(site), dim)
        for site in observed(model).values()
    )


def nesting(pair: nn.Module, batch: Batch) -> int:
    """How many plates a pair nests, found by running it on two rows."""
    return nesting_of(*_glance(pair, batch))


def traces(pair: nn.Module, batch: Batch, plates: int, around: Any = None) -> tuple[Trace, Trace]:
    """Traces of model and guide with every site enumerated that is marked so.

    Arguments:
        plates: how many plates the pair nests, ``around`` counted where it is one.
        around: a handler around both, a plate of samples say.
    """
    typed, around = cast(Pair, pair), around or nullcontext()
    with around:
        guide = trace_guide(pair, batch, EnumMessenger(first_available_dim=-1 - plates))
    with around:
        model = trace(EnumMessenger()(replay(typed.model, trace=guide)), batch)
    return model, guide


def nesting_of(*traces: Trace) -> int:
    """How many plates the sites of these traces nest, the data plate counted."""
    return max(
        (-dim for trace in traces for dim in _plates(sample_sites(trace).values())), default=1
    )


def combinations(*traces: Trace) -> int:
    """How many combinations of values the enumerated sites of these traces take."""
    sites = {name: site for trace in traces for name, site in enumerated(trace).items()}
    return prod(_values(site).shape[0] for site in sites.values())


def terms(model: Trace, guide: Trace) -> Terms:
    """What the ELBO of these traces is made of, by site."""
    inner, dims = _layout(model, guide)
    q = {name: _term(site, inner) for name, site in latents(guide).items()}
    summed = [name for name in enumerated(model) if name not in q]
    p = {name: _term(site, inner, name not in summed) for name, site in sample_sites(model).items()}
    log_weights = sum((_term(s, inner, False) for s in enumerated(guide).values()), _zero(p))
    joint = sum((p[name] for name in summed), _zero(p))
    targets = [dims[name] for name in summed]
    for name, site in sample_sites(model).items():
        own = name in summed or (is_auxiliary(site) and not is_factor(site))
        if not own and any(_extends(p[name], dim) for dim in targets):
            joint = joint + p[name]
    if enumerated(guide):
        # What has no weight may be impossible, and its conditional no distribution.
        joint = torch.where(torch.isneginf(log_weights), torch.zeros_like(joint), joint)
    for name in reversed(summed):
        above = joint.logsumexp(dims[name], keepdim=True)
        q[name], joint = joint - above, above
        log_weights = log_weights + q[name]
    seen = {name for name, site in sample_sites(model).items() if site["is_observed"]}
    return Terms(
        log_weights.exp(),
        q,
        {name: p[name] for name in p if name not in seen},
        {name: p[name] for name in p if name in seen},
        dims,
    )


def evidence(model: Trace, guide: Trace) -> Tensor:
    r"""The log weight of each draw for log p(x), every enumerated site summed out.

    Given the draws of latents outside the data plate, which take no part.

    :math:`\log \sum_{e,m} p(x, z, e, m) / q(z|x, e)`, of the shape of the plates of the enumerated
    sites. Its exponential has the mean p(x) whatever the draws z, and q(e|x) takes no part.
    """
    inner, dims = _layout(model, guide)
    total = log_ratio(model, guide)
    total = total.logsumexp(list(dims.values())) if dims else total
    return total.squeeze(inner)


def log_ratio(model: Trace, guide: Trace) -> Tensor:
    """The terms of `evidence` before their sum, with the enumerated dimensions first."""
    inner, dims = _layout(model, guide)
    total = _zero({})
    for name, site in (latents(model) | scored(model)).items():
        if is_local(site):
            total = total + _term(site, inner, name not in dims)
    for name, site in latents(guide).items():
        if is_local(site) and name not in dims:
            total = total - _term(site, inner)
    return total


def joint(model: Trace, guide: Trace) -> Tensor:
    r"""log p(x, z) of latents z that are given, :math:`\log \sum_{e,m} p(x, z, e, m)`.

    Its exponential is the density of the data and of all latents that are not enumerated.
    """
    sites = latents(model) | scored(model)
    local = {name: site for name, site in sites.items() if is_local(site)}
    return _marginal(local, *_layout(model, guide))


def proposal(model: Trace, guide: Trace) -> Tensor:
    r"""log q(z|x) of latents z that are given, :math:`\log \sum_e q(z, e|x)`."""
    inner, dims = _layout(model, guide)
    return _marginal(latents(guide), inner, {name: dims[name] for name in enumerated(guide)})


def _marginal(sites: dict[str, Site], inner: list[int], dims: dict[str, int]) -> Tensor:
    total = _zero({})
    for name, site in sites.items():
        total = total + _term(site, inner, name not in dims)
    total = total.logsumexp(list(dims.values())) if dims else total
    return total.squeeze(inner)


def probabilities(pair: nn.Module, batch: Batch, name: str, num_samples: int) -> Tensor:
    """The posterior probabilities (batch, values) of one discrete site, averaged over draws.

    Those of the guide, :math:`q(y|x)`, exact where nothing is drawn before it; of a site that only
    the model has, :math:`E_{q(z|x)}[r(k|x,z)]`.
    """
    found = []
    for _ in range(num_samples):
        guide = trace_guide(pair, batch)
        if name in latents(guide):
            fn = latents(guide)[name]["fn"]
            found.append(fn.log_prob(_values(latents(guide)[name], expand=True)).exp())
            if next(iter(latents(guide))) == name:
                break
        else:
            found.append(_conditional(pair, batch, guide)[name])
    return (torch.stack(found).mean(0)).reshape(len(found[0]), -1).T


def summed_values(
    pair: nn.Module, batch: Batch, guide: Trace, num_samples: int, draw: bool
) -> dict[str, Tensor]:
    """Values of the latents that only the model has: their modes, or draws given the guide's.

    Modes are those of their probabilities averaged over ``num_samples`` draws of the guide.
    """
    alone, model = _glance(pair, batch)
    names = [name for name in to_enumerate(model) if name not in latents(alone)]
    if not names:
        return {}
    if not draw:
        index = [probabilities(pair, batch, name, num_samples).argmax(1) for name in names]
    else:
        found = terms(_enumerated_model(pair, batch, guide), guide)
        # The leftmost dimension is the site that the model enumerated last.
        names = sorted(found.dims, key=lambda name: found.dims[name])
        shape = found.weights.shape[: len(names)]
        weights = found.weights.reshape(shape.numel(), len(batch[0]))
        index = list(torch.unravel_index(torch.multinomial(weights.T, 1).squeeze(1), shape))
    sites = latents(model)
    return {name: _values(sites[name])[which] for name, which in zip(names, index, strict=True)}


def _conditional(pair: nn.Module, batch: Batch, guide: Trace) -> dict[str, Tensor]:
    """r (values, batch) of each latent that only the model has, given a trace of the guide."""
    found = terms(_enumerated_model(pair, batch, guide), guide)
    n = len(batch[0])
    return {
        name: _sum(found.weights, [d for d in found.dims.values() if d != dim]).reshape(-1, n)
        for name, dim in found.dims.items()
    }


def _glance(pair: nn.Module, batch: Batch) -> tuple[Trace, Trace]:
    """Plain traces of guide and model on two rows, whose draws nobody notices."""
    few = tuple(tensor[:2] for tensor in batch)
    with using(pair, seed=0):
        guide = trace_guide(pair, few)
        model = trace_model(pair, few, guide)
        require_placed(guide, model)
    return guide, model


def _enumerated_model(pair: nn.Module, batch: Batch, guide: Trace) -> Trace:
    messenger = EnumMessenger(first_available_dim=-1 - nesting(pair, batch))
    return trace(messenger(replay(cast(Pair, pair).model, trace=guide)), batch)


def _layout(model: Trace, guide: Trace) -> tuple[list[int], dict[str, int]]:
    """Dimensions of the plates within a datum, and that of each enumerated site."""
    sites = enumerated(guide) | enumerated(model)
    dims = {name: site["infer"]["_enumerate_dim"] for name, site in sites.items()}
    if len(set(dims.values())) < len(dims):
        raise UsageError(
            f"the enumerated sites {', '.join(dims)} share dimensions (pyro.markov), and their sum "
            "is no sum over all combinations: use TraceEnum_ELBO by itself"
        )
    if len({frozenset(_plates([site])) for site in sites.values()}) > 1:
        raise UsageError(
            f"the enumerated sites {', '.join(dims)} are in different plates: use TraceEnum_ELBO"
        )
    everywhere = _plates(sample_sites(model).values()) | _plates(sample_sites(guide).values())
    own = _plates(sites.values()) if sites else everywhere
    return sorted(everywhere - own), dims


def _placed(site: Site) -> bool:
    """Whether a site of a plain trace is in the data plate alone."""
    return is_local(site) and len(_plates([site])) == 1


def _plates(sites: Iterable[Site]) -> set[int]:
    return {f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized}


def _term(site: Site, inner: list[int], masked: bool = True) -> Tensor:
    """The log density of a site, summed over the plates within a datum."""
    # A mask says that a value is unknown, not that it has no distribution to be summed over.
    term = log_prob(site) if masked else site["fn"].log_prob(site["value"])
    return _sum(term, [dim for dim in inner if term.dim() >= -dim])


def _sum(term: Tensor, dims: list[int]) -> Tensor:
    return term.sum(dims, keepdim=True) if dims else term


def _extends(term: Tensor, dim: int) -> bool:
    return term.dim() >= -dim and term.shape[dim] > 1


def _zero(like: dict[str, Tensor]) -> Any:
    return next(iter(like.values())).new_zeros(()) if like else 0.0


def _has_values(fn: Any) -> bool:
    try:
        return bool(fn.has_enumerate_support) and len(fn.enumerate_support(expand=False)) > 0
    except NotImplementedError:
        return False


def _values(site: Site, expand: bool = False) -> Tensor:
    """All values of a site, (values, *event), or (values, batch, *event)."""
    fn = site["fn"]
    try:
        values = fn.enumerate_support(expand=expand)
    except NotImplementedError:
        raise UsageError(
            f"site '{site['name']}' ({type(fn).__name__}) has no finite list of values"
        ) from None
    return values if expand else values.reshape(len(values), *fn.event_shape)

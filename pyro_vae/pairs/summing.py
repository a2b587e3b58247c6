"""Sums over enumerated latents: evidence, densities and probabilities of each datum.

If each enumerated latent has a dimension of its own and is only in the data plate, a sum runs over
the list of all combinations of values. Other sums are factored (`pyro_vae.pairs.factored_sums`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import enumerate_dim, enumerated_ids
from pyro_vae.errors import UsageError
from pyro_vae.pairs import factored_sums
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.enumeration import (
    enumerated,
    enumerated_model,
    glance,
    nesting,
    nesting_of,
    plates_of,
    support_values,
    to_enumerate,
    traces,
)
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.pair import Batch, Site
from pyro_vae.pairs.sites import (
    data_first,
    is_auxiliary,
    is_factor,
    latents,
    log_prob,
    observed,
    sample_sites,
    scored,
)


@dataclass(frozen=True)
class Terms:
    """Log densities of two traces at every value of the enumerated sites, with weights.

    Each term is summed over the plates within a datum. The dimensions are: the enumerated
    dimensions; the plate of samples, if any; the plates within a datum, of size 1; the data.

    If the sums are factored, each term is its mean under the weights, summed over the data, and the
    latents that only the model has are one latent with a joint KL.
    """

    weights: Tensor
    """q(e|x) r(m|e,x,z)."""
    posterior: dict[str, Tensor]
    """log q of each latent site of the guide, and log r of each that only the model has.

    If several sites are only in the model, r is the product of their conditionals, each given the
    earlier sites of the model (the chain rule)."""
    prior: dict[str, Tensor]
    """log p of each latent site of the model."""
    observed: dict[str, Tensor]
    """log p of each observed site, including auxiliary sites."""
    dims: dict[str, int]
    """The dimension of each enumerated site; empty if the sums are factored."""
    nesting: int = 0
    """The number of nested plates if the sums are factored, otherwise 0."""

    def mean(self, term: Tensor) -> Tensor:
        """The weighted mean of a term over the enumerated values, without values of weight zero."""
        dims = [dim for dim in self.dims.values() if _extends(term, dim)]
        if not dims:
            return term
        weights = _sum(self.weights, [dim for dim in self.dims.values() if dim not in dims])
        alive = weights > 0
        return (torch.where(alive, weights, 0.0) * torch.where(alive, term, 0.0)).sum(dims, True)

    def units(self, values: Tensor, right: int) -> Tensor | None:
        """The weighted mean of values with ``right`` dimensions to the right of the data.

        None if the sums are factored and the values depend on an enumerated site.
        """
        if not self.dims:
            return None if self.nesting and values.dim() - right > self.nesting else values
        weights = self.weights.reshape(*self.weights.shape, *[1] * right)
        weighed = torch.where(weights > 0, weights * values, 0.0)
        return weighed.sum([dim - right for dim in self.dims.values()])


def is_named(pair: nn.Module, batch: Batch, name: str) -> bool:
    """Whether observed labels identify the values of an enumerated site.

    They do if the model observes integers (labels) whose density depends on the site.
    """
    model, _ = traces(pair, batch, nesting(pair, batch))
    if name not in enumerated(model):
        return False
    own = enumerated(model)[name]
    dim = enumerate_dim(own)
    return any(
        not site["value"].is_floating_point()
        and _extends(log_prob(site), dim)
        and enumerated_ids(site)[dim] == enumerated_ids(own)[dim]
        for site in observed(model).values()
    )


def terms(model: Trace, guide: Trace) -> Terms:
    """The terms of the ELBO of these traces, by site."""
    if factored_sums.is_factored(model, guide):
        return _means(model, guide)
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
        # A value of weight zero may be impossible under the model, and r would then be NaN.
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
    r"""The log weight of each draw for log p(x), with every enumerated site summed out.

    :math:`\log \sum_{e,m} p(x, z, e, m) / q(z|x, e)`, of the shape of the data plate, after the
    plate of samples if there is one. The mean of its exponential over draws z is p(x). q(e|x) is
    not needed. The weight is conditional on the draws of global latents, whose own densities are
    left out.
    """
    return _marginal(_ratio(model, guide), model, guide)


def log_ratio(model: Trace, guide: Trace) -> Tensor:
    """The terms of `evidence` before the sum; the enumerated dimensions come first.

    Raises `UsageError` if the sums are factored.
    """
    if factored_sums.is_factored(model, guide):
        names = ", ".join(enumerated(guide) | enumerated(model))
        raise UsageError(
            f"the enumerated sites {names} are in pyro.markov or in a plate within the datum, so "
            "this tool cannot list the combinations of their values; `pyro_vae.encode` draws them"
        )
    return _listed(_ratio(model, guide), _layout(model, guide)[0])


def by_value(model: Trace, guide: Trace) -> tuple[Tensor, Tensor]:
    r"""The terms of the ELBO at every value e of the guide's enumerated sites, and log q(e|x).

    The first is :math:`\log \sum_m p(x, z, e, m) / q(z|x, e)`. Both have the enumerated dimensions
    first and the data last. Raises `UsageError` if the sums are factored.
    """
    ratio = log_ratio(model, guide)
    inner, dims = _layout(model, guide)
    others = [dim for name, dim in dims.items() if name not in enumerated(guide)]
    found = _densities(enumerated(guide), enumerated(guide))
    ratio = ratio.logsumexp(others, keepdim=True) if others else ratio
    ratio, log_q = torch.broadcast_tensors(ratio, _listed(found, inner))
    n = ratio.shape[-1]
    return ratio.reshape(-1, n), log_q.reshape(-1, n)


def joint(model: Trace, guide: Trace) -> Tensor:
    r"""log p(x, z) at given latents z, :math:`\log \sum_{e,m} p(x, z, e, m)`.

    Its exponential is the density of the data and of all local latents that are not enumerated.
    """
    names = enumerated(guide) | enumerated(model)
    return _marginal(_densities(_local(model), names), model, guide)


def proposal(model: Trace, guide: Trace) -> Tensor:
    r"""log q(z|x) at given latents z, :math:`\log \sum_e q(z, e|x)`."""
    found = _densities(latents(guide), enumerated(guide))
    if factored_sums.is_factored(model, guide):
        return factored_sums.marginal(found, Trace(), guide)
    inner, dims = _layout(model, guide)
    return _summed(_listed(found, inner), [dims[name] for name in enumerated(guide)], inner)


def _marginal(found: Iterator[tuple[Site, Tensor]], model: Trace, guide: Trace) -> Tensor:
    """The log of the sum of exp(sum of terms) over all enumerated sites, for each datum."""
    if factored_sums.is_factored(model, guide):
        return factored_sums.marginal(found, model, guide)
    inner, dims = _layout(model, guide)
    return _summed(_listed(found, inner), list(dims.values()), inner)


def _listed(found: Iterator[tuple[Site, Tensor]], inner: list[int]) -> Tensor:
    return sum((_inside(term, inner) for _, term in found), _zero({}))


def _summed(terms: Tensor, dims: list[int], inner: list[int]) -> Tensor:
    return (terms.logsumexp(dims) if dims else terms).squeeze(inner)


def _ratio(model: Trace, guide: Trace) -> Iterator[tuple[Site, Tensor]]:
    """The sites and terms of `evidence`."""
    names = enumerated(guide) | enumerated(model)
    yield from _densities(_local(model), names)
    for name, site in latents(guide).items():
        if is_local(site) and name not in names:
            yield site, -log_prob(site)


def _local(model: Trace) -> dict[str, Site]:
    sites = latents(model) | scored(model)
    return {name: site for name, site in sites.items() if is_local(site)}


def _densities(
    sites: dict[str, Site], unmasked: Mapping[str, Site]
) -> Iterator[tuple[Site, Tensor]]:
    return ((site, _density(site, name not in unmasked)) for name, site in sites.items())


def probabilities(pair: nn.Module, batch: Batch, name: str, num_samples: int) -> Tensor:
    """The posterior probabilities of one discrete site, of shape (batch, values).

    For a site of the guide they are :math:`q(y|x)`, averaged over ``num_samples`` draws of the
    latents before it; they are exact if the site is the first latent. For a site that only the
    model has, they are :math:`E_{q(z|x)}[r(k|x,z)]`.
    """
    found = []
    for _ in range(num_samples):
        guide = trace_guide(pair, batch)
        if name in latents(guide):
            fn = latents(guide)[name]["fn"]
            found.append(fn.log_prob(support_values(latents(guide)[name], expand=True)).exp())
            if next(iter(latents(guide))) == name:
                break
        else:
            found.append(_conditional(pair, batch, guide)[name])
    return (torch.stack(found).mean(0)).reshape(len(found[0]), -1).T


def summed_values(
    pair: nn.Module, batch: Batch, guide: Trace, num_samples: int, draw: bool
) -> dict[str, Tensor]:
    """Values of the latents that only the model has, with the data as dimension 0.

    With ``draw`` they are draws, given the latents in a trace of the guide. Otherwise they are the
    modes of the probabilities of each value, averaged over ``num_samples`` draws of the guide.
    """
    alone, model = glance(pair, batch)
    if all(name in latents(alone) for name in to_enumerate(model)):
        return {}
    index = _drawn(pair, batch, guide) if draw else _modes(pair, batch, num_samples)
    sites = latents(model)
    return {
        name: data_first(support_values(sites[name])[which], sites[name])
        for name, which in index.items()
    }


def _drawn(pair: nn.Module, batch: Batch, guide: Trace) -> dict[str, Tensor]:
    """The number of a drawn value of each latent that only the model has, given a guide trace."""
    model = enumerated_model(pair, batch, guide)
    if factored_sums.is_factored(model, Trace()):
        return factored_sums.draws(model, guide)
    found = terms(model, guide)
    # The leftmost dimension is the site that the model enumerated last.
    names = sorted(found.dims, key=lambda name: found.dims[name])
    shape = found.weights.shape[: len(names)]
    weights = found.weights.reshape(shape.numel(), len(batch[0]))
    drawn = torch.multinomial(weights.T, 1).squeeze(1)
    return dict(zip(names, torch.unravel_index(drawn, shape), strict=True))


def _modes(pair: nn.Module, batch: Batch, num_samples: int) -> dict[str, Tensor]:
    """The number of the most probable value of each latent that only the model has."""
    found = [_conditional(pair, batch, trace_guide(pair, batch)) for _ in range(num_samples)]
    return {name: torch.stack([r[name] for r in found]).sum(0).argmax(0) for name in found[0]}


def _conditional(pair: nn.Module, batch: Batch, guide: Trace) -> dict[str, Tensor]:
    """r of each latent that only the model has, (values, *plates), given a guide trace."""
    model = enumerated_model(pair, batch, guide)
    if factored_sums.is_factored(model, Trace()):
        return factored_sums.probabilities(model, guide)
    found = terms(model, guide)
    n = len(batch[0])
    return {
        name: _sum(found.weights, [d for d in found.dims.values() if d != dim]).reshape(-1, n)
        for name, dim in found.dims.items()
    }


def _layout(model: Trace, guide: Trace) -> tuple[list[int], dict[str, int]]:
    """The dimensions of the plates within a datum, and the dimension of each enumerated site."""
    sites = enumerated(guide) | enumerated(model)
    dims = {name: enumerate_dim(site) for name, site in sites.items()}
    everywhere = plates_of(sample_sites(model).values()) | plates_of(sample_sites(guide).values())
    own = plates_of(sites.values()) if sites else everywhere
    return sorted(everywhere - own), dims


def _means(model: Trace, guide: Trace) -> Terms:
    """The terms of the ELBO if the sums are factored: each is a mean, summed over the data."""
    bound = factored_sums.FactoredBound(model, guide)
    found = bound.free | bound.depending
    seen = {name for name, site in sample_sites(model).items() if site["is_observed"]}
    return Terms(
        torch.ones(()),
        bound.posterior | ({bound.joint_name: bound.kl} if bound.summed else {}),
        {name: term for name, term in found.items() if name not in seen},
        {name: term for name, term in found.items() if name in seen},
        {},
        nesting_of(model, guide),
    )


def _density(site: Site, masked: bool = True) -> Tensor:
    # A mask marks a value as unknown. The sum over its values still needs its distribution.
    return log_prob(site) if masked else site["fn"].log_prob(site["value"])


def _term(site: Site, inner: list[int], masked: bool = True) -> Tensor:
    """The log density of a site, summed over the plates within a datum."""
    return _inside(_density(site, masked), inner)


def _inside(term: Tensor, inner: list[int]) -> Tensor:
    return _sum(term, [dim for dim in inner if term.dim() >= -dim])


def _sum(term: Tensor, dims: list[int]) -> Tensor:
    return term.sum(dims, keepdim=True) if dims else term


def _extends(term: Tensor, dim: int) -> bool:
    return term.dim() >= -dim and term.shape[dim] > 1


def _zero(like: dict[str, Tensor]) -> Any:
    return next(iter(like.values())).new_zeros(()) if like else 0.0

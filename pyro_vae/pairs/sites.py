"""The sites of a trace: which are latent, observed or local; their densities and KL."""

from typing import Any, cast

import torch
from pyro.distributions import Delta, Unit
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.compat import is_deterministic as is_marked
from pyro_vae.compat import mask_of, scale_and_mask, site_is_subsample, was_observed
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs import data_plate
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.pair import Site


def data_plates(model: Trace, guide: Trace) -> frozenset[str]:
    """The names of the data plate: of the pair in use, or else of the observed sites."""
    if (found := data_plate.known()) is not None:
        return found.plates
    plates = frozenset(f.name for site in observed(model).values() for f in at_data(site))
    # If no observed site is in a plate there, each plate at dimension -1 counts as the data plate.
    plates = plates or frozenset(f.name for s in sample_sites(model).values() for f in at_data(s))
    return with_guides(plates, model, guide)


def with_guides(plates: frozenset[str], model: Trace, guide: Trace) -> frozenset[str]:
    """The names of the data plate in the model, plus its names in the guide."""
    inside = [name for name, site in latents(model).items() if is_local(site, plates)]
    return plates | {f.name for name in inside for f in at_data(latents(guide).get(name))}


def at_data(site: Site | None) -> list[Any]:
    """The plates at dimension -1 around a site."""
    frames = [] if site is None else site["cond_indep_stack"]
    return [frame for frame in frames if frame.vectorized and frame.dim == -1]


def sample_sites(trace: Trace) -> dict[str, Site]:
    """The sample sites of a trace, by name.

    Two kinds are left out: the subsampling sites of plates, and ``pyro.deterministic``, which has a
    value but not a density.
    """
    nodes: dict[str, Site] = dict(trace.nodes)
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not is_deterministic(site)
    }


def is_deterministic(site: Site) -> bool:
    """Whether a site only names a value: a ``pyro.deterministic``, or what ``pyro.poutine.reparam``
    computes from other sites.

    Pyro marks only the first. Both are observed, with a `Delta` that is masked out.
    """
    fn = site["fn"]
    masked_out = site["is_observed"] and mask_of(fn) is False
    return is_marked(site) or (masked_out and isinstance(fn.base_dist, Delta))


def latents(trace: Trace) -> dict[str, Site]:
    """The unobserved sample sites of a trace, by name."""
    return {name: site for name, site in sample_sites(trace).items() if not site["is_observed"]}


def observed(trace: Trace) -> dict[str, Site]:
    """The observed sample sites of a trace, by name, also of an unconditioned model.

    Sites marked ``infer={"is_auxiliary": True}`` are left out. They are terms of the objective, for
    example a classification loss, and not part of p(x).
    """
    return {
        name: site
        for name, site in sample_sites(trace).items()
        if (site["is_observed"] or was_observed(site)) and not is_auxiliary(site)
    }


def is_factor(site: Site) -> bool:
    """Whether a site is a ``pyro.factor``: a term of the log density, without a value."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Unit)


def factors(trace: Trace) -> dict[str, Site]:
    """The ``pyro.factor`` sites of a trace, by name."""
    return {name: site for name, site in sample_sites(trace).items() if is_factor(site)}


def scored(trace: Trace) -> dict[str, Site]:
    """The observed sites and the factors of a model: all terms of p(x, z) except the latents."""
    return observed(trace) | factors(trace)


def require_normalized(model: Trace, why: str) -> None:
    """Raise `UsageError`, with the reason ``why``, if a model has factors."""
    for name in factors(model):
        raise UsageError(
            f"the model has a pyro.factor, '{name}', so its density is not normalized: {why}"
        )


def is_auxiliary(site: Site) -> bool:
    """Whether a site is marked auxiliary.

    In the model it is a term of the objective only. In the guide it is a site without a prior.
    """
    return bool(site["infer"].get("is_auxiliary"))


def data_site(trace: Trace, name: str | None = None) -> Site:
    """The observed site of this name, or the one that observes x.

    Raises `UsageError` if no name is given and several sites observe parts of x.
    """
    sites = observed(trace)
    if name is None and (only := x_site(trace)) is not None:
        return only
    if name is None and sites:
        raise UsageError(
            f"the model observes parts of x at several sites ({', '.join(sites)}), but one site of "
            "all of x is needed here; tools with an argument 'site' take one of these names"
        )
    if name not in sites:
        raise UsageError(
            f"the model has no observed site '{name}'; its observed sites are: "
            f"{', '.join(sites) or 'none'}"
        )
    return sites[cast(str, name)]


def x_site(trace: Trace) -> Site | None:
    """The site that observes x; None if several sites observe parts of it."""
    sites, found = observed(trace), data_plate.known()
    if len(sites) == 1:
        return next(iter(sites.values()))
    return None if found is None or found.x is None else sites.get(found.x)


def log_prob(site: Site) -> Tensor:
    """The log density of a site, masked but not scaled by KL weights or subsampling."""
    try:
        density = site["fn"].log_prob(site["value"])
    except ValueError as error:  # for example, a draw of the guide outside the model's support
        reason = first_line(error).removesuffix(", but found invalid values:")
        raise UsageError(
            f"the log density of site '{site['name']}' cannot be computed: {reason}"
        ) from error
    return scale_and_mask(density, mask=site["mask"])


def data_first(value: Tensor, site: Site) -> Tensor:
    """A value of a local site with the data as dimension 0, then the plates within a datum."""
    return value.movedim(-1 - site["fn"].event_dim, 0)


def by_datum(term: Tensor, particles: bool) -> Tensor:
    """A local log density, summed over the plates within a datum: (particles, n) or (n,)."""
    if particles:
        return term.flatten(1, -2).sum(1) if term.dim() > 2 else term
    return term.reshape(-1, term.shape[-1]).sum(0)


def same_order(model: Trace, guide: Trace) -> bool:
    """Whether model and guide draw their common latents in the same order.

    Only then do both conditionals of a latent depend on the same earlier draws, so that a KL in
    closed form may replace its estimate.
    """
    shared = [name for name in latents(guide) if name in model.nodes]
    return shared == [name for name in sample_sites(model) if name in shared]


def site_kl(model_site: Site, guide_site: Site, closed: bool = True) -> Tensor:
    r"""The KL of one latent site, in nats.

    :math:`\mathrm{KL}(q \| p)` in closed form if torch knows it and ``closed`` allows it (see
    `same_order`). Otherwise the estimate :math:`\log q(z) - \log p(z)` at the draw in the trace.

    The shape is (batch, *units) if both distributions have independent coordinates, where units is
    the event shape. Otherwise it is (batch,).
    """
    p, q, z, mask = model_site["fn"], guide_site["fn"], guide_site["value"], guide_site["mask"]
    units = 0
    if factorizes(p) and factorizes(q):
        p, q, units = p.base_dist, q.base_dist, q.event_dim
    try:
        kl = kl_divergence(q, p) if closed else None
    except NotImplementedError:
        kl = None
    if not isinstance(kl, Tensor):  # a number if masks within the distributions hide everything
        kl = q.log_prob(z) - p.log_prob(z)
    if isinstance(mask, Tensor):
        mask = mask.reshape(mask.shape + (1,) * units)  # values of enumerated sites are on the left
    return scale_and_mask(kl, mask=mask)


def factorizes(fn: Any) -> bool:
    """Whether the units of a distribution are independent; its ``base_dist`` is then over units."""
    return isinstance(fn, torch.distributions.Independent) and fn.reinterpreted_batch_ndims == len(
        fn.event_shape
    )

r"""Sums over enumerated latents of two traces by elimination, for latents that cannot be listed.

These are latents in ``pyro.markov``, which share dimensions, latents in a plate within the datum,
and latents outside the data plate. As in `pyro_vae.pairs.summing`, e are the latents that the guide
enumerates, and m those that only the model has. With the guide's draws z, the bound is
:math:`E_{q(e|x)}[\log Z(e) - \log q(z, e|x)]`, where :math:`Z(e) = \sum_m p(x, z, e, m)`.

An expectation under the posterior :math:`r(m|e,x,z)` comes from a derivative of :math:`\log Z`. The
derivative with respect to an entry of a log density is the posterior probability of this entry.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.compat import enumerate_dim, enumerated_ids
from pyro_vae.errors import UsageError
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.elimination import (
    DATA,
    SAMPLES,
    LogFactor,
    aligned,
    draw,
    eliminate,
    factor,
    joined,
    plates_of,
    total,
    without,
)
from pyro_vae.pairs.enumeration import enumerated
from pyro_vae.pairs.pair import Site
from pyro_vae.pairs.sites import is_auxiliary, is_factor, latents, log_prob, sample_sites, scored

LONGEST = 4
"""The largest number of latents that the name of a joint KL lists."""


def is_factored(model: Trace, guide: Trace) -> bool:
    """Whether the enumerated sites of two traces need this module."""
    sites = enumerated(guide) | enumerated(model)
    dims = {enumerate_dim(site) for site in sites.values()}
    alone = all(set(plates_of(s).values()) - {SAMPLES} == {DATA} for s in sites.values())
    return len(dims) < len(sites) or not alone


def marginal(terms: Iterable[tuple[Site, Tensor]], model: Trace, guide: Trace) -> Tensor:
    """The log of the sum of exp(sum of the terms) over all enumerated sites, for each datum.

    The shape is that of the data plate, after the plate of samples if there is one. Raises
    `UsageError` for an enumerated site that all data share.
    """
    for name, site in (enumerated(guide) | enumerated(model)).items():
        if not is_local(site):
            raise UsageError(
                f"latent site '{name}' is shared by all data, so the density of a datum needs a "
                "value of it: draw it from the guide"
            )
    found, plates, sizes = list(terms), _plates(model, guide), dict[str, int]()
    for site, term in found:
        for dim, name in plates_of(site).items():
            sizes[name] = max(sizes.get(name, 1), term.shape[dim] if term.dim() >= -dim else 1)
    factors = [_factor(site, term, plates) for site, term in found]
    keep = [name for name in (SAMPLES, DATA) if name in sizes]
    left, _ = eliminate(factors, plates, plates)
    return total(left, keep).expand([sizes[name] for name in keep])


def probabilities(model: Trace, guide: Trace) -> dict[str, Tensor]:
    """r of each latent that only the model has, of shape (values, *plates), given a guide trace."""
    own, factors, plates = _posterior(model, guide)

    def evidence(given: Mapping[str, LogFactor]) -> Tensor:
        return total(eliminate(given.values(), plates, plates)[0], ())

    found = _derivatives(evidence, factors)
    return {name: _laid_out(found[name], site, lead=(_number(site),)) for name, site in own.items()}


def draws(model: Trace, guide: Trace) -> dict[str, Tensor]:
    """A joint draw of the latents that only the model has, given a trace of the guide.

    Each draw is the number of a value, of the shape of the site's plates.
    """
    own, factors, plates = _posterior(model, guide)
    drawn = draw(eliminate(factors.values(), plates, plates)[1])
    first = LogFactor(
        torch.zeros((), dtype=torch.long), (), frozenset()
    )  # of a site with one value
    return {name: _laid_out(drawn.get(_number(site), first), site) for name, site in own.items()}


class FactoredBound:
    """The terms of the ELBO of two traces, each with its expectation under the enumerated sites.

    The expectations are sums over the data, without the scales of the sites. The densities of m and
    of the sites that depend on m are one term, the evidence :math:`E_{q(e|x)}[\\log Z(e)]`.
    """

    def __init__(self, model: Trace, guide: Trace) -> None:
        plates = _plates(model, guide)
        self.plates = plates
        self.summed = [name for name in enumerated(model) if name not in latents(guide)]
        over = {_number(enumerated(model)[name]) for name in self.summed}
        self._weights = {
            _number(site): _factor(site, _density(site, False), plates)
            for site in enumerated(guide).values()
        }
        ours = {
            name: _factor(site, _density(site, name not in self.summed), plates)
            for name, site in sample_sites(model).items()
        }
        self._joint = {name: f for name, f in ours.items() if over.intersection(f.sites)}
        self._over = over
        for name in self._joint:
            _require_part_of_p(sample_sites(model)[name])
        self.free = {name: self._mean(f) for name, f in ours.items() if name not in self._joint}
        """log p of each site of the model that does not depend on m."""
        self.posterior = {
            name: self._mean(_factor(site, _density(site), plates))
            for name, site in latents(guide).items()
        }
        """log q of each latent of the guide."""
        self.evidence = self._evidence(self._joint)
        """The mean of log Z."""

    @property
    def dependent(self) -> list[str]:
        """The sites that depend on m and are not in m."""
        return [name for name in self._joint if name not in self.summed]

    @property
    def joint_name(self) -> str:
        """The name of the joint KL of m."""
        if len(self.summed) <= LONGEST:
            return " + ".join(self.summed)
        return f"{self.summed[0]} + ... + {self.summed[-1]}"

    @cached_property
    def depending(self) -> dict[str, Tensor]:
        """log p of each site that depends on m and is not one of m."""
        found = _derivatives(self._evidence, self._joint)
        return {
            name: _weighed(found[name].values, self._joint[name].values) for name in self.dependent
        }

    @property
    def kl(self) -> Tensor:
        """The KL of all of m together, of r from the prior."""
        return sum(self.depending.values(), torch.zeros(())) - self.evidence

    def _evidence(self, joint: Mapping[str, LogFactor]) -> Tensor:
        left, _ = eliminate(joint.values(), self._over, self.plates)
        return sum((self._mean(part) for part in left), torch.zeros(()))

    def _mean(self, part: LogFactor) -> Tensor:
        """The mean of a term under q(e|x), summed over its plates."""
        if not part.sites:
            return part.values.sum()
        above = {site: f for site, f in self._weights.items() if f.plates <= part.plates}
        # These sites are in no other plates than the term, so they are not summed over plates.
        inside = dict.fromkeys(above, part.plates)
        left, _ = eliminate(above.values(), set(above).difference(part.sites), inside)
        weights = joined(left)
        dims = tuple(dict.fromkeys([*part.dims, *weights.dims]))
        return _weighed(aligned(weights, dims).exp(), aligned(part, dims))


def _posterior(
    model: Trace, guide: Trace
) -> tuple[dict[str, Site], dict[str, LogFactor], dict[int, frozenset[str]]]:
    """m, and the factors of p(x, z, m), with the plates of m."""
    own, plates = enumerated(model), _plates(model, guide)
    sites = {n: site for n, site in (latents(model) | scored(model)).items() if is_local(site)}
    factors = {n: _factor(site, _density(site, n not in own), plates) for n, site in sites.items()}
    return own, factors, plates


def _derivatives(
    evidence: Callable[[Mapping[str, LogFactor]], Tensor], factors: Mapping[str, LogFactor]
) -> dict[str, LogFactor]:
    """The derivatives of the evidence with respect to the values of each factor."""
    if not factors:
        return {}
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        given = {
            name: part if part.values.requires_grad else part._replace(values=_leaf(part.values))
            for name, part in factors.items()
        }
        values = [part.values for part in given.values()]
        found = torch.autograd.grad(evidence(given), values, create_graph=create)
    return {
        name: part._replace(values=value)
        for (name, part), value in zip(given.items(), found, strict=True)
    }


def _leaf(values: Tensor) -> Tensor:
    return values.detach().requires_grad_()


def _weighed(weights: Tensor, values: Tensor) -> Tensor:
    """The weighted sum of values, without values of weight zero, which may be infinite."""
    alive = weights > 0
    return (torch.where(alive, weights, 0.0) * torch.where(alive, values, 0.0)).sum()


def _density(site: Site, masked: bool = True) -> Tensor:
    # A mask marks a value as unknown. The sum over its values still needs its distribution.
    return log_prob(site) if masked else site["fn"].log_prob(site["value"])


def _number(site: Site) -> int:
    return enumerated_ids(site)[enumerate_dim(site)]


def _plates(*traces: Trace) -> dict[int, frozenset[str]]:
    """The plates of each enumerated site."""
    sites = [site for trace in traces for site in enumerated(trace).values()]
    return {_number(site): frozenset(plates_of(site).values()) for site in sites}


def _factor(site: Site, term: Tensor, plates: Mapping[int, frozenset[str]]) -> LogFactor:
    """A term as a factor. Raises `UsageError` if it depends on a site of a plate around neither."""
    found = factor(site, term)
    for other in found.sites:
        for plate in sorted(plates[other] - found.plates):
            raise UsageError(
                f"site '{site['name']}' depends on an enumerated site in plate "
                f"'{plate.removeprefix('plate ')}' but is outside this plate: put it in the plate, "
                "or sum over the values by hand"
            )
    return found


def _require_part_of_p(site: Site) -> None:
    if is_auxiliary(site) and not is_factor(site):
        raise UsageError(
            f"auxiliary site '{site['name']}' depends on an enumerated site that is in pyro.markov "
            "or in a further plate, which is not supported: remove its mark is_auxiliary"
        )


def _laid_out(part: LogFactor, site: Site, lead: tuple[int, ...] = ()) -> Tensor:
    """Values with the leading enumerated sites, then the plates of a site at their dimensions.

    Values are summed over other enumerated sites.
    """
    plates, shape = plates_of(site), site["fn"].batch_shape
    dims = range(min(plates), 0)
    kept = without(part, [other for other in part.sites if other not in lead])
    laid = aligned(kept, (*lead, *(plates.get(dim, f"no plate at {dim}") for dim in dims)))
    sizes = [shape[dim] if dim in plates else 1 for dim in dims]
    return laid.expand(*laid.shape[: len(lead)], *sizes)

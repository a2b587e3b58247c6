"""The KL of a latent site, split into information, dependence of units, and misfit of the prior."""

import warnings
from dataclasses import dataclass
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError
from pyro_vae.pairs import folds, masks
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Site
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.sites import factorizes, latents, sample_sites
from pyro_vae.pairs.threads import alone
from pyro_vae.training.bounds import log_aggregate

SCORED_ROWS = 500
"""Number of rows in one pass: their codes are scored under the posteriors of as many rows."""


SATURATED = 1.0
"""Nats. Closer to log N, or with bounds further apart, the information is too large for N data."""


class Estimate(NamedTuple):
    """A mean over data and draws, in nats per example, and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class KLParts:
    r"""The KL of a latent site, split by the aggregate :math:`q(z) = \tfrac1N \sum_n q(z|x_n)`.

    ``kl = mutual_information + aggregate_kl``. If units are independent in posterior and prior,
    ``aggregate_kl = total_correlation + unit_kl.sum()``.
    """

    num_examples: int
    kl: Estimate
    """Mean of KL(q(z|x) || p(z)) over the data."""
    mutual_information: Estimate
    """The information of a code about its datum, at most log(num_examples). In expectation it is a
    lower bound on the information under the distribution of the data."""
    mutual_information_upper: Estimate
    """The same, but the aggregate at a code leaves its own datum out: an upper bound."""
    aggregate_kl: Estimate
    """KL(q(z) || p(z)): the distance between codes of data and draws of the prior. For the
    distribution of the data it is too large, in expectation by at most the distance of the two
    bounds of the information. ``standard_error`` contains this distance."""
    total_correlation: Estimate | None
    """KL(q(z) || prod_j q(z_j)): the dependence of units over all data. ``standard_error`` contains
    the bias of N data, as that of ``aggregate_kl``. None if units depend on each other within the
    posterior of a datum, because then their densities have no closed form."""
    unit_kl: Tensor | None
    """KL(q(z_j) || p(z_j)) of each unit, of shape (units,). None as above, and if units depend on
    each other within the prior."""
    unit_information: Tensor | None
    """Mutual information of the datum and each single unit, of shape (units,); None as above."""
    unit_kl_errors: Tensor | None = None
    """Standard errors of ``unit_kl``, of shape (units,), with the bias of N data; None as above."""

    @property
    def aggregate_kl_lower(self) -> float:
        """The lower end of the interval of the aggregate KL, ``kl - mutual_information_upper``;
        ``aggregate_kl`` is the upper end. Below 0 it says nothing, because a KL is not negative."""
        return self.kl.value - self.mutual_information_upper.value

    @property
    def saturated(self) -> bool:
        """Whether there are too few data to tell information from aggregate KL: the information is
        within 1 nat of log(num_examples), or its two bounds are over 1 nat apart."""
        low, high = self.mutual_information.value, self.mutual_information_upper.value
        return low > log(self.num_examples) - SATURATED or high - low > SATURATED

    def as_dict(self) -> dict[str, Any]:
        """Return values, errors and units for metrics.json."""
        found = {
            name: value._asdict()
            if isinstance(value, Estimate)
            else value.tolist()
            if isinstance(value, Tensor)
            else value
            for name, value in vars(self).items()
        }
        return found | {
            "aggregate_kl_lower": self.aggregate_kl_lower,
            "saturated": self.saturated,
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        upper = self.mutual_information_upper.value
        rows = [
            ("KL", self.kl, ""),
            ("mutual information", self.mutual_information, f"to {upper:.3f}"),
            ("aggregate KL", self.aggregate_kl, f"from {max(0.0, self.aggregate_kl_lower):.3f}"),
            ("total correlation", self.total_correlation, ""),
        ]
        lines = [
            f"{name:<20}{found.value:8.3f} ± {found.standard_error:.3f} nats {more}".rstrip()
            for name, found, more in rows
            if found is not None
        ]
        for name, units in (
            ("information by unit", self.unit_information),
            ("KL by unit", self.unit_kl),
        ):
            if units is not None:
                lines.append(f"{name:<20} {' '.join(f'{unit:7.3f}' for unit in units.tolist())}")
        if self.saturated:
            lines.append(
                f"{self.num_examples} data are too few for this information, so the aggregate KL "
                "is between 0 and the value above"
            )
        return "\n".join(lines)


@alone()
def kl_parts(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_samples: int = 1,
    binarize: str = "dynamic",
    seed: int = 0,
) -> dict[str, KLParts]:
    r"""Split the KL of each latent site over held-out data.

    :math:`\tfrac1N \sum_n \mathrm{KL}(q(z|x_n) \| p(z)) = I(x; z) + \mathrm{KL}(q(z) \| p(z))`, and
    :math:`\mathrm{KL}(q(z) \| p(z)) = \mathrm{KL}(q(z) \| \prod_j q(z_j)) +
    \sum_j \mathrm{KL}(q(z_j) \| p(z_j))`, with the aggregate posterior q(z) over these data. Draws
    of each datum's posterior are scored under the posteriors of all data.

    Arguments:
        pair: any pair.
        x, context: held-out data, at least two rows. The time grows with the square of their
            number.
        num_samples: draws for each datum.
        binarize, seed: as in `pyro_vae.evaluate`.

    Returns a dictionary by latent site. A warning names each site that is left out: sites whose
    posterior depends on the draw of another site (it has no closed form given only x), sites whose
    prior differs between data, and sites in other plates than the data plate. Raises `UsageError`
    if no site remains.
    Hoffman & Johnson, ELBO surgery, 2016; Chen et al., 2018 (https://arxiv.org/abs/1802.04942); the
    two bounds of the mutual information: Poole et al., 2019 (https://arxiv.org/abs/1905.06922).

    >>> import torch, pyro_vae as pv
    >>> parts = pv.kl_parts(pv.VAE.mlp((4,), latent_dim=2), torch.ones(8, 4))["z"]
    >>> abs(parts.mutual_information.value) < 1e-5
    True
    """
    if num_samples < 1:
        raise UsageError(f"must be at least 1, got {num_samples}", argument="num_samples")
    rows, prepare = held_rows(pair, x, context, binarize)
    if len(rows) < 2:
        raise UsageError(f"kl_parts needs at least 2 rows of data, got {len(rows)}")
    with using(pair, seed):
        batches = [prepare(batch) for batch in rows.batches(SCORED_ROWS)]
        split = _split_sites(pair, batches[0])
        runs = [[_run(pair, batch) for batch in batches] for _ in range(num_samples)]
        return {name: _parts([[sites[name] for sites in run] for run in runs]) for name in split}


def _run(pair: nn.Module, batch: Batch) -> dict[str, tuple[Site, Site]]:
    """Return each local latent site as a pair of its guide site and its model site."""
    guide = trace_guide(pair, batch)
    priors = sample_sites(trace_model(pair, batch, guide))
    return {
        name: (site, priors[name])
        for name, site in latents(guide).items()
        if name in priors and is_local(site)
    }


def _split_sites(pair: nn.Module, batch: Batch) -> list[str]:
    """Return the latent sites whose KL can be split, and warn of the others."""
    sites, others = _run(pair, batch), _run(pair, batch)
    faults = {}
    for name, (site, prior) in sites.items():
        fn, again = site["fn"], others[name][0]["fn"]
        if folds.is_delta(fn) or isinstance(fn, folds.Drawn):
            faults[name] = "has a guide without a density at the codes of other data"
            continue
        same = site["value"][:1].expand(site["value"].shape)
        priors = torch.stack([p["fn"].log_prob(same) for p in (prior, others[name][1])])
        if not is_local(site) or len(fn.batch_shape) > 1 or masks.is_masked(site):
            faults[name] = "has a mask or is in another plate than the data plate"
        elif not torch.allclose(fn.log_prob(site["value"]), again.log_prob(site["value"])):
            faults[name] = "depends on the draw of another site"
        elif not torch.allclose(priors, priors[:1, :1].expand(priors.shape)):
            faults[name] = "has a prior that differs between data"
    if len(faults) == len(sites):
        reasons = ", ".join(f"'{name}' {reason}" for name, reason in faults.items())
        reasons = reasons or "the pair has no local latent"
        raise UsageError(f"kl_parts cannot split the KL of any latent site: {reasons}")
    for name, reason in faults.items():
        warnings.warn(f"kl_parts does not split the KL of '{name}': it {reason}", stacklevel=4)
    return [name for name in sites if name not in faults]


def _parts(runs: list[list[tuple[Site, Site]]]) -> KLParts:
    """Compute the parts of one site from its batches of rows in each run."""
    draws = [[torch.cat(column) for column in zip(*_scores(run), strict=True)] for run in runs]
    own, units_own, others, units_others, log_p, units_log_p = (
        torch.stack(column) for column in zip(*draws, strict=True)
    )
    n = own.shape[1]
    joint = torch.logaddexp(own, others) - log(n)
    units = torch.logaddexp(units_own, units_others) - log(n)
    # With the own datum a density is too large, in expectation, and without it too small.
    # A KL is at least 0, so it is too large by at most its value.
    apart = (joint - log_p).mean().clamp(min=0)
    bias = (joint - others + log(n - 1)).mean().minimum(apart)
    unit_bias = (units - units_others + log(n - 1)).mean((0, 1))
    site, prior = runs[0][0]
    independent = not site["fn"].event_shape or factorizes(site["fn"])
    split = independent and (not prior["fn"].event_shape or factorizes(prior["fn"]))
    return KLParts(
        num_examples=n,
        kl=_mean(own - log_p),
        mutual_information=_mean(own - joint),
        mutual_information_upper=_mean(own - others + log(n - 1)),
        aggregate_kl=_mean(joint - log_p, bias),
        total_correlation=_mean(joint - units.sum(-1), torch.maximum(bias, unit_bias.sum()))
        if independent
        else None,
        unit_kl=(units - units_log_p).mean((0, 1)) if split else None,
        unit_information=(units_own - units).mean((0, 1)) if independent else None,
        unit_kl_errors=torch.hypot((units - units_log_p).mean(0).std(0) / n**0.5, unit_bias)
        if split
        else None,
    )


def _scores(run: list[tuple[Site, Site]]) -> list[list[Tensor]]:
    """Return log densities of each batch of codes, in total and by unit.

    They are those of their own posteriors, of all other posteriors together, and of the prior.
    """
    found = []
    for i, (site, prior) in enumerate(run):
        z = site["value"]
        against = [
            log_aggregate(other["fn"], z, _shares(z, other["value"], i == j))
            for j, (other, _) in enumerate(run)
        ]
        others = [torch.stack(column).logsumexp(0) for column in zip(*against, strict=True)]
        own, log_p = ((fn.log_prob(z), _by_unit(fn, z)) for fn in (site["fn"], prior["fn"]))
        found.append([part.double().cpu() for part in (*own, *others, *log_p)])
    return found


def _shares(z: Tensor, others: Tensor, same: bool) -> Tensor:
    shares = torch.zeros(len(z), len(others), dtype=torch.float64, device=z.device)
    return shares.fill_diagonal_(-torch.inf) if same else shares


def _by_unit(fn: Any, z: Tensor) -> Tensor:
    """Return log densities (n, units); units that depend on each other count as one."""
    return (fn.base_dist if factorizes(fn) else fn).log_prob(z).reshape(len(z), -1)


def _mean(terms: Tensor, bias: Tensor | float = 0.0) -> Estimate:
    """Return the mean of terms (draws, data); its error over data and draws contains the bias."""
    by_datum = terms.mean(0)
    error = by_datum.std() / len(by_datum) ** 0.5
    return Estimate(by_datum.mean().item(), torch.hypot(error, torch.as_tensor(bias)).item())

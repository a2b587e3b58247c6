"""What the latent space holds: the KL split into information, dependence and misfit."""

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
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Site
from pyro_vae.pairs.places import is_local
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import factorizes, latents, sample_sites
from pyro_vae.pairs.threads import alone
from pyro_vae.training.bounds import log_aggregate

SCORED_ROWS = 500
"""Rows whose codes are scored at once under the posteriors of as many others."""


class Estimate(NamedTuple):
    """A mean over data and draws, in nats per example, and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class KLParts:
    r"""The KL of a latent site, split by the aggregate :math:`q(z) = \tfrac1N \sum_n q(z|x_n)`.

    ``kl = mutual_information + aggregate_kl``, and where units are independent in posterior and
    prior ``aggregate_kl = total_correlation + unit_kl.sum()``.
    """

    num_examples: int
    kl: Estimate
    """Mean of KL(q(z|x) || p(z)) over the data."""
    mutual_information: Estimate
    """What a code says of which datum it came from: at most log(num_examples). In expectation a
    lower bound of that under the distribution that the data come from."""
    mutual_information_upper: Estimate
    """The same with each datum left out of the aggregate at its own code: an upper bound."""
    aggregate_kl: Estimate
    """KL(q(z) || p(z)): how far codes of data are from draws of the prior."""
    total_correlation: Estimate | None
    """KL(q(z) || prod_j q(z_j)): how far units depend on each other over all data. None where
    they do so within the posterior of a datum: their own densities have no closed form then."""
    unit_kl: Tensor | None
    """KL(q(z_j) || p(z_j)) of each unit, of shape (units,); None as above, or for such a prior."""
    unit_information: Tensor | None
    """Mutual information of datum and each unit by itself, of shape (units,); None as above."""

    def as_dict(self) -> dict[str, Any]:
        """Values, errors and units, as metrics.json holds them."""
        return {
            name: value._asdict()
            if isinstance(value, Estimate)
            else value.tolist()
            if isinstance(value, Tensor)
            else value
            for name, value in vars(self).items()
        }

    def __str__(self) -> str:
        upper = self.mutual_information_upper.value
        rows = [
            ("KL", self.kl, ""),
            ("mutual information", self.mutual_information, f"to {upper:.3f}"),
            ("aggregate KL", self.aggregate_kl, ""),
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
    \sum_j \mathrm{KL}(q(z_j) \| p(z_j))`, with the aggregate posterior over these data.
    Draws of every datum's posterior are scored under those of all.

    Arguments:
        pair: any pair.
        x, context: held-out data, two rows or more; the time grows with the square of their number.
        num_samples: draws for each datum.
        binarize, seed: as in `pyro_vae.evaluate`.

    Returns a dictionary by latent site. Sites are left out, with a warning, whose posterior given x
    alone is not in closed form, because it depends on another site's draw, whose prior is not one
    for all data, and those that are not in the data plate alone. Raises `UsageError` where none
    is left.
    Hoffman & Johnson, ELBO surgery, 2016; Chen et al., 2018 (https://arxiv.org/abs/1802.04942); the
    two bounds of the mutual information: Poole et al., 2019 (https://arxiv.org/abs/1905.06922).

    >>> import torch, pyro_vae as pv
    >>> parts = pv.kl_parts(pv.VAE.mlp((4,), latent_dim=2), torch.ones(8, 4))["z"]
    >>> abs(parts.mutual_information.value) < 1e-5
    True
    """
    if num_samples < 1:
        raise UsageError(f"num_samples must be 1 or more, {num_samples} came")
    rows, prepare = held_rows(pair, x, context, binarize)
    if len(rows) < 2:
        raise UsageError(f"the KL is split over 2 rows of data or more, {len(rows)} came")
    with using(pair, seed):
        batches = [prepare(batch) for batch in rows.batches(SCORED_ROWS)]
        split = _split_sites(pair, batches[0])
        runs = [[_run(pair, batch) for batch in batches] for _ in range(num_samples)]
        return {name: _parts([[sites[name] for sites in run] for run in runs]) for name in split}


def _run(pair: nn.Module, batch: Batch) -> dict[str, tuple[Site, Site]]:
    """Each latent site in the data plate as guide and model have it."""
    guide = trace_guide(pair, batch)
    priors = sample_sites(trace_model(pair, batch, guide))
    return {
        name: (site, priors[name])
        for name, site in latents(guide).items()
        if name in priors and is_local(site)
    }


def _split_sites(pair: nn.Module, batch: Batch) -> list[str]:
    """The latent sites whose KL can be split; the others are named in a warning."""
    sites, others = _run(pair, batch), _run(pair, batch)
    faults = {}
    for name, (site, prior) in sites.items():
        fn, again = site["fn"], others[name][0]["fn"]
        if folds.is_delta(fn) or isinstance(fn, folds.Drawn):
            faults[name] = "has a guide whose density is not known at the codes of other data"
            continue
        same = site["value"][:1].expand(site["value"].shape)
        priors = torch.stack([p["fn"].log_prob(same) for p in (prior, others[name][1])])
        if not is_local(site) or len(fn.batch_shape) > 1 or masks.is_masked(site):
            faults[name] = "is not in the data plate alone, without a mask"
        elif not torch.allclose(fn.log_prob(site["value"]), again.log_prob(site["value"])):
            faults[name] = "depends on another draw given x"
        elif not torch.allclose(priors, priors[:1, :1].expand(priors.shape)):
            faults[name] = "has a prior that is not one for all data"
    if len(faults) == len(sites):
        reasons = ", ".join(f"'{name}' {reason}" for name, reason in faults.items())
        raise UsageError(f"the KL of no latent site can be split: {reasons or 'there is none'}")
    for name, reason in faults.items():
        warnings.warn(f"the KL of '{name}' is not split: it {reason}", stacklevel=4)
    return [name for name in sites if name not in faults]


def _parts(runs: list[list[tuple[Site, Site]]]) -> KLParts:
    """The parts of one site, from its batches of rows in each run."""
    draws = [[torch.cat(column) for column in zip(*_scores(run), strict=True)] for run in runs]
    own, units_own, others, units_others, log_p, units_log_p = (
        torch.stack(column) for column in zip(*draws, strict=True)
    )
    n = own.shape[1]
    joint = torch.logaddexp(own, others) - log(n)
    units = torch.logaddexp(units_own, units_others) - log(n)
    site, prior = runs[0][0]
    independent = not site["fn"].event_shape or factorizes(site["fn"])
    split = independent and (not prior["fn"].event_shape or factorizes(prior["fn"]))
    return KLParts(
        num_examples=n,
        kl=_mean(own - log_p),
        mutual_information=_mean(own - joint),
        mutual_information_upper=_mean(own - others + log(n - 1)),
        aggregate_kl=_mean(joint - log_p),
        total_correlation=_mean(joint - units.sum(-1)) if independent else None,
        unit_kl=(units - units_log_p).mean((0, 1)) if split else None,
        unit_information=(units_own - units).mean((0, 1)) if independent else None,
    )


def _scores(run: list[tuple[Site, Site]]) -> list[list[Tensor]]:
    """Log densities of each batch of codes, whole and by unit: of their own posteriors, of all
    others together, and of the prior."""
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
    """Log densities (n, units), of one unit where they depend on each other."""
    return (fn.base_dist if factorizes(fn) else fn).log_prob(z).reshape(len(z), -1)


def _mean(terms: Tensor) -> Estimate:
    """Mean of terms (draws, data), with the error that data and draws leave."""
    by_datum = terms.mean(0)
    return Estimate(by_datum.mean().item(), (by_datum.std() / len(by_datum) ** 0.5).item())

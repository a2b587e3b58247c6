"""Score rows: log p(x) of each row, and the entries that make a row strange."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Any, cast

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor, nn
from torch.distributions import Independent

from pyro_vae.data.preparation import Preparation
from pyro_vae.data.sources import Rows, Source
from pyro_vae.errors import UsageError
from pyro_vae.inference.pareto import threshold
from pyro_vae.inference.weighted import (
    WEIGHED_ROWS,
    Weighted,
    mixed_parts,
    require_not_pooled,
    require_samples,
    rows_to_weigh,
    steady_shape,
)
from pyro_vae.pairs import masks
from pyro_vae.pairs.processes import here, in_order, single
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.rng import derived
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import data_site
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.traces import DataFirst, trace


@dataclass(frozen=True)
class RowScores:
    """Log densities of rows and of their entries, in nats."""

    log_likelihood: Tensor
    """An importance-sampled estimate of log p(x) for each row, (n,)."""
    pareto_k: Tensor
    """The Pareto shape of the tail of each row's weights, (n,); over ``k_threshold`` the estimate
    is not reliable."""
    by_entry: Tensor
    """log p(entry | all other observed entries of its row), (n, *data_shape); NaN where missing.
    Compare an entry with the same entry of other rows: densities have the units of the data."""
    entry_pareto_k: Tensor
    """The Pareto shape of the weights without each entry, (n, *data_shape); over ``k_threshold``
    ``by_entry`` of the entry is not reliable, and often too high. NaN where missing."""
    num_samples: int
    """Importance samples of each row."""

    @property
    def k_threshold(self) -> float:
        """The largest Pareto k for which ``num_samples`` are enough."""
        return threshold(self.num_samples)

    @property
    def strangeness(self) -> Tensor:
        """How far ``by_entry`` is below the median over the rows, (n, *data_shape), in nats."""
        return self.by_entry.nanmedian(0).values - self.by_entry

    def strangest(self, number: int = 10) -> Tensor:
        """The rows with the lowest log p(x), the lowest first."""
        return self.log_likelihood.argsort()[:number]

    def entries(self, row: int, number: int = 3) -> list[int]:
        """The entries that make a row strange, the strangest first, as flat indices."""
        found = self.strangeness[row].flatten().nan_to_num(-torch.inf)
        return found.argsort(descending=True)[:number].tolist()


@alone()
def score(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_samples: int = 500,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = False,
) -> RowScores:
    r"""Estimate log p(x) of each row, and the log density of each entry given the others.

    With :math:`w_k = p(x, z_k) / q(z_k|x)`, :math:`\log p(x) \approx \log \tfrac1K \sum_k w_k` and
    :math:`\log p(x_j|x_{-j}) \approx \log \sum_k w_k - \log \sum_k w_k / p(x_j|z_k)`: the
    conditional predictive ordinate of the entry.

    Arguments:
        pair: any pair whose likelihood has independent entries given the latents.
        x, context: the data, as `pyro_vae.log_likelihood` takes them.
        num_samples: importance samples of each row, at least 21.
        binarize, seed: as in `pyro_vae.evaluate`.
        progress: show a bar.

    Raises `UsageError` for a likelihood that does not split into entries.
    Gelfand, Dey & Chang, Model determination using predictive distributions, 1992.

    >>> import torch, pyro_vae as pv
    >>> found = score(pv.VAE.mlp((4,)), torch.ones(8, 4), num_samples=50)
    >>> found.log_likelihood.shape, found.by_entry.shape
    (torch.Size([8]), torch.Size([8, 4]))
    """
    require_samples(num_samples)
    team = here()

    def own(rows: Source, prepare: Preparation) -> list[list[RowScores]]:
        found = []
        seeded = using(pair, derived(seed, "process", team.rank))
        shown = bar(progress and team.first, len(rows), "score")
        with seeded, torch.no_grad(), shown:
            for raw in team.own(rows.batches(team.share(len(rows), WEIGHED_ROWS))):
                batch = prepare(raw)
                require_not_pooled(pair, batch)
                parts = mixed_parts(pair, batch, num_samples, seed=seed)
                found.append([_scored(pair, part) for part in parts])
                shown.update(team.count * len(raw[0]))
        return found

    with single():
        rows, prepare = rows_to_weigh(team, pair, x, context, binarize)
        parts = [one for few in in_order(team.gather(lambda: own(rows, prepare))) for one in few]
    return RowScores(
        torch.cat([part.log_likelihood for part in parts]),
        torch.cat([part.pareto_k for part in parts]),
        torch.cat([part.by_entry for part in parts]),
        torch.cat([part.entry_pareto_k for part in parts]),
        num_samples,
    )


def _scored(pair: nn.Module, part: Weighted) -> RowScores:
    weights, number = part.log_weights, len(part.log_weights)
    total = weights.logsumexp(0)
    each = by_entry(pair, part, log_prob_of).double()
    wide = weights.reshape(*weights.shape, *[1] * (each.dim() - 2))
    without = wide - each
    conditional = total.reshape(-1, *[1] * (each.dim() - 2)) - without.logsumexp(0)
    missing = each.isnan().any(0)
    k = steady_shape(torch.where(missing, 0.0, without), part.batch[0].dtype)
    conditional, k = (torch.where(missing, torch.nan, found).cpu() for found in (conditional, k))
    return RowScores(
        (total - log(number)).cpu(), part.pareto_k.cpu(), conditional, k, num_samples=number
    )


def by_entry(pair: nn.Module, part: Weighted, term: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """A term of each entry at each draw, (K, n, *data_shape); NaN where the entry is hidden.

    Arguments:
        term: a function of the distribution of the entries and their values, such as
            ``log p(x_j | z_k)``, which returns a tensor of the shape of the values.

    Raises `UsageError` for a likelihood that does not split into entries.
    """
    return torch.cat([_by_entry(pair, one, term) for one in part.passes])


def _by_entry(pair: nn.Module, part: Weighted, term: Callable[[Any, Tensor], Tensor]) -> Tensor:
    model: Any = pair
    with DataFirst(dict(part.values)):
        site = data_site(trace(model.model, part.batch))
    fn, right = site["fn"], site["fn"].event_dim
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    if fn.event_dim:
        raise UsageError(
            f"the likelihood at site '{site['name']}' ({type(fn).__name__}) does not split into "
            "entries; use pyro_vae.log_likelihood"
        )
    found = torch.where(masks.scored(site), term(fn, site["value"]), torch.nan)
    found = found.movedim(found.dim() - 1 - right, 0)
    shape = (*part.log_weights.shape, *part.batch[0].shape[1:])
    if found.numel() != torch.Size(shape).numel():
        raise UsageError(f"site '{site['name']}' does not observe each entry of x")
    return found.reshape(shape)


def log_prob_of(fn: Any, value: Tensor) -> Tensor:
    """The log density of values, as a term of `by_entry`."""
    return cast(Tensor, fn.log_prob(value))

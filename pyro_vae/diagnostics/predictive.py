"""Posterior predictive checks: compare the data with replicates that the model draws."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows
from pyro_vae.diagnostics.replicates import GUIDE, PRIOR, RESAMPLED, Replicator, latents_to_use
from pyro_vae.errors import UsageError, nearest
from pyro_vae.inference.passes import ROWS_AT_ONCE
from pyro_vae.inference.weighted import require_samples
from pyro_vae.pairs import masks
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import global_latents, trace_model
from pyro_vae.pairs.moments import is_category, num_values
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.sites import data_site
from pyro_vae.pairs.threads import alone
from pyro_vae.parts.circular import on_its_circle

Statistic: TypeAlias = Callable[[Tensor], Tensor]

LEAST_REPLICATES = 20
"""With fewer replicates a datum cannot be outside 95 % of them."""


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def _variance(x: Tensor) -> Tensor:
    x = _rows(x)
    return (x - x.nanmean(1, keepdim=True)).square().nanmean(1)


STATISTICS: dict[str, Statistic] = {
    "mean": lambda x: _rows(x).nanmean(1),
    "variance": _variance,
    "greatest": lambda x: _rows(x).nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1),
    "share of zeros": lambda x: _rows(torch.where(x.isnan(), x, x == 0)).nanmean(1),
}
"""Default statistics of a datum; they ignore elements that are NaN."""


@dataclass(frozen=True)
class PredictiveCheck:
    """The results of `predictive_check`; statistics are in the units of the data."""

    names: tuple[str, ...]
    """The names of the statistics."""
    observed: Tensor
    """Statistics of the data, of shape (n, statistics); NaN if a datum has no observed entry."""
    replicated_mean: Tensor
    """Means of the statistics over the replicates of each datum, of shape (n, statistics)."""
    replicated_deviation: Tensor
    """Standard deviations over the replicates of each datum, of shape (n, statistics)."""
    p_values: Tensor
    """Fraction of a datum's replicates above it, of shape (n, statistics); ties count one half.
    Near 0 or 1, the model does not generate such data."""
    whole: Tensor
    """Means over the reliable data of each replicate's statistics, of shape (num_replicates,
    statistics)."""
    latents: str = GUIDE
    """Where the latents of the replicates are from: "resampled", "guide" or "prior"."""
    pareto_k: Tensor = field(default_factory=lambda: torch.zeros(0))
    """The Pareto shape of the weights of each datum, of shape (n,); 0 if they are not resampled."""
    unreliable: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """The rows whose weights are unreliable, as indices. Their latents are not those of the
    posterior, so numbers of all data leave them out."""

    @property
    def num_replicates(self) -> int:
        """The number of replicates of each datum."""
        return len(self.whole)

    @property
    def whole_p_values(self) -> dict[str, float]:
        """Fraction of replicated data sets whose mean statistic is above that of the data, by
        statistic; NaN if no datum is reliable."""
        found = _p_values(self.whole[:, None], self.whole_observed[None])[0]
        return dict(zip(self.names, found.tolist(), strict=True))

    @property
    def whole_deviations(self) -> dict[str, float]:
        """Distance of each mean statistic of the data above its replicates, in their standard
        deviations; 0 if all are equal."""
        off = self.whole_observed - self.whole.mean(0)
        spread = self.whole.std(0).maximum(1e-6 * self.whole.mean(0).abs()).clamp(min=1e-12)
        return dict(zip(self.names, (off / spread).tolist(), strict=True))

    @property
    def whole_observed(self) -> Tensor:
        """Means of the statistics over the reliable data, of shape (statistics,)."""
        return self.observed[self.reliable].nanmean(0)

    @property
    def reliable(self) -> Tensor:
        """Which data are not ``unreliable``, booleans of shape (n,)."""
        found = torch.ones(len(self.observed), dtype=torch.bool)
        found[self.unreliable] = False
        return found

    def worst(self, name: str | None = None, number: int = 10) -> Tensor:
        """Return the indices of the data farthest from their replicates, the worst first.

        The distance is in standard deviations, of one statistic or the largest over all statistics.
        Raises `UsageError` for an unknown name.
        """
        if name is not None and name not in self.names:
            raise UsageError(f"unknown statistic '{name}'; {nearest(name, self.names)}")
        off = self.distances.nan_to_num(0.0, posinf=torch.inf).abs()
        off = off.amax(1) if name is None else off[:, self.names.index(name)]
        return off.argsort(descending=True, stable=True)[:number]

    @property
    def distances(self) -> Tensor:
        """Distance of each datum above the mean of its replicates, of shape (n, statistics), in
        their standard deviations. If they are constant, it is infinite for a different datum and
        NaN for an equal one."""
        return (self.observed - self.replicated_mean) / self.replicated_deviation

    def as_dict(self) -> dict[str, Any]:
        """Return means, p-values and fractions by statistic for metrics.json."""
        off = (self.p_values[self.reliable] - 0.5).abs()
        extreme = torch.where(off.isnan(), off, off > 0.475)
        rows = zip(
            self.names,
            self.whole_observed.tolist(),
            self.whole.mean(0).tolist(),
            self.whole_p_values.values(),
            extreme.nanmean(0).tolist(),
            strict=True,
        )
        return {
            "num_examples": len(self.observed),
            "num_replicates": self.num_replicates,
            "latents": self.latents,
            "num_unreliable": len(self.unreliable),
            "statistics": {
                name: {
                    "observed": finite(observed),
                    "replicated": finite(replicated),
                    "p_value": finite(p),
                    "fraction_outside_95": finite(outside),
                }
                for name, observed, replicated, p, outside in rows
            },
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        lines = [
            f"{'statistic':<18}{'data':>12}{'replicates':>12}{'p, all data':>13}"
            f"{'data outside 95 %':>19}"
        ]
        for name, row in self.as_dict()["statistics"].items():
            numbers = (row[key] for key in ("observed", "replicated"))
            none = "none" if not bool(self.reliable.any()) else "infinite"
            shown = "".join(
                f"{number:>12.4g}" if number is not None else f"{none:>12}" for number in numbers
            )
            p, outside = row["p_value"], row["fraction_outside_95"]
            shown += f"{none:>13}" if p is None else f"{p:>13.3f}"
            shown += f"{none:>19}" if outside is None else f"{100 * outside:>17.1f} %"
            lines.append(f"{name:<18}{shown}")
        n, used = len(self.observed), int(self.reliable.sum())
        counted = n if used == n else f"{used} of {n}"
        lines.append(
            f"{counted} data, {self.num_replicates} replicates of each; latents: "
            f"{_SOURCES[self.latents]}"
        )
        if len(self.unreliable):
            lines.append(
                f"left out: {len(self.unreliable)} data whose weights are unreliable (Pareto k); "
                "refine the guide, or take latents from the prior"
            )
        return "\n".join(lines)


_SOURCES = {
    RESAMPLED: "the posterior, by importance weights",
    GUIDE: "draws of the guide, whose errors count as the model's",
    PRIOR: "the prior",
}


@alone()
def predictive_check(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    statistics: Mapping[str, Statistic] | None = None,
    num_replicates: int = 100,
    latents: str | None = None,
    num_samples: int = 500,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> PredictiveCheck:
    r"""Compare statistics of the data with those of replicates that the model draws.

    The replicates of a datum are draws of :math:`x^{rep}_r \sim \int p(x^{rep} | z)\, p(z | x)\,
    dz`. With R replicates, :math:`p = \tfrac{1}{R + 1} \big(\#\{T(x^{rep}) > T(x)\} + \tfrac12
    \#\{T(x^{rep}) = T(x)\} + \tfrac12\big)`, which is never 0 or 1. The p-value of all data uses
    the mean of T over the data instead.

    Arguments:
        pair: any pair.
        x, context: data, as `pyro_vae.log_likelihood` takes them.
        statistics: functions by name. Each takes data (n, *data_shape) and returns a tensor of
            shape (n,). The default is `STATISTICS`: mean, variance, greatest, share of zeros. For
            data that are classes, it is the share of each of the first ten classes.
        num_replicates: R for each datum, at least 20.
        latents: "resampled" draws z from the posterior: from ``num_samples`` draws of the guide, R
            are chosen by their importance weights. "guide" takes draws of the guide as they are, so
            errors of the guide count as errors of the model. "prior" draws z from the prior, so the
            whole data set is compared with data sets of the model. The default is "resampled", or
            "guide" for a pair without importance weights.
        num_samples: number of draws of the guide for each datum, at least 21. With global latents,
            it is a tenth of this number for each replicate.
        binarize: as in `pyro_vae.evaluate`.
        seed: random seed.
        progress: show a bar if the run takes over two seconds.

    If the Pareto k of the weights of a datum is over the threshold for ``num_samples``, its latents
    are not those of the posterior. Such rows are ``unreliable``, and numbers of all data leave them
    out. Global latents are draws of their guide, except for "prior". Latents that only the model
    has are drawn given the others and x. A replicate depends on its datum, unless latents are from
    the prior, so p-values are often near 1/2. An extreme p-value is strong evidence against the
    model, and a moderate one is only weak evidence for it.
    Masked entries are NaN in the data and in the replicates, so your own statistic must ignore NaN.
    A datum without observed entries has no statistics.
    Raises `UsageError` for a statistic that does not return a number for each datum, and for a
    model that does not draw data of the shape of x. Gelman, Meng & Stern, 1996; Box, 1980 (prior).

    >>> import torch, pyro_vae as pv
    >>> x = torch.ones(8, 4)
    >>> found = predictive_check(pv.VAE.mlp((4,)), x, statistics={"total": lambda x: x.sum(1)})
    >>> found.p_values.shape, bool(found.p_values.max() < 0.5)
    (torch.Size([8, 1]), True)
    """
    if num_replicates < LEAST_REPLICATES:
        raise UsageError(
            f"must be at least {LEAST_REPLICATES}, got {num_replicates}", argument="num_replicates"
        )
    if statistics is not None and not statistics:
        raise UsageError("must contain at least one function, got none", argument="statistics")
    require_samples(num_samples)
    rows, prepare = held_rows(pair, x, context, binarize)
    latents = latents_to_use(pair, prepare(rows.first(2)), latents)
    chosen = dict(statistics or _usual(pair, prepare(rows.first(2))))
    replicates = Replicator(latents, num_replicates, num_samples, partial(_measured, chosen))
    shared = bool(global_latents(pair, prepare(rows.first(2))))
    size = len(rows) if shared else ROWS_AT_ONCE
    found = []
    with using(pair, seed), bar(progress, len(rows), "replicates", delay=2) as shown:
        for part in rows.batches(size):
            batch = prepare(part)
            model = trace_model(pair, batch, trace_guide(pair, batch))
            site = data_site(model)
            seen = on_its_circle(site["fn"], masks.seen(site, batch[0]))
            observed = _measured(chosen, seen)
            found.append((observed, *replicates(pair, batch)))
            shown.update(len(observed))
    observed, k, unreliable = (torch.cat([part[i] for part in found]) for i in (0, 2, 3))
    replicated = torch.cat([part[1] for part in found], 1)
    return PredictiveCheck(
        tuple(chosen),
        observed,
        replicated.mean(0),
        replicated.std(0, correction=0),
        _p_values(replicated, observed),
        replicated[:, ~unreliable].nanmean(1),
        latents,
        k,
        unreliable.nonzero().flatten(),
    )


def _usual(pair: nn.Module, batch: Batch) -> Mapping[str, Statistic]:
    """Return the default statistics; data that are classes have no mean, so they get others."""
    with using(pair, seed=0):
        fn = data_site(trace_model(pair, batch, trace_guide(pair, batch)))["fn"]
    if not is_category(fn):
        return STATISTICS
    return {f"share of class {k}": _share(k) for k in range(min(10, num_values(fn)))}


def _share(k: int) -> Statistic:
    return lambda x: _rows(x == k).double().mean(1)


def _measured(statistics: Mapping[str, Statistic], x: Tensor) -> Tensor:
    """Compute all statistics of data, of shape (n, statistics)."""
    columns, holes = [], _rows(x.isnan())
    empty = holes.all(1)
    for name, statistic in statistics.items():
        found = statistic(x)
        if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(
                f"statistic '{name}' must return a tensor of shape ({len(x)},), one number for "
                f"each datum, got {got}"
            )
        found = torch.where(empty, torch.nan, found.double())
        if bool((found.isnan() & ~empty).any()):
            why = (
                "; masked entries are NaN, so the statistic must ignore them; for one entry, pass "
                "the rows that have it"
            )
            why = why if holes.any() else ""
            raise UsageError(f"statistic '{name}' is NaN for some data{why}")
        columns.append(found)
    return torch.stack(columns, 1).cpu()


def _p_values(replicated: Tensor, observed: Tensor) -> Tensor:
    """Return fractions of replicates (replicates, n, statistics) above the data (n, statistics)."""
    rounding = 1e-6 * observed.abs()
    above = (replicated > observed + rounding).sum(0)
    ties = ((replicated - observed).abs() <= rounding).sum(0)
    return torch.where(
        observed.isnan(), torch.nan, (above + (ties + 1) / 2) / (len(replicated) + 1)
    )


def finite(number: float) -> float | None:
    return number if isfinite(number) else None

"""Whether the model fits: data drawn given each datum's posterior; and data that do not belong."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError, nearest
from pyro_vae.inference.passes import ROWS_AT_ONCE, latent_values, observation
from pyro_vae.pairs import masks
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import global_latents, trace_model
from pyro_vae.pairs.moments import is_category, num_values
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import data_site
from pyro_vae.pairs.threads import alone

Statistic: TypeAlias = Callable[[Tensor], Tensor]

LEAST_REPLICATES = 20
"""So few replicates can put a datum outside 95 % of them."""


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
"""Statistics of a datum, over its elements that are no NaN, that any data have."""


@dataclass(frozen=True)
class PredictiveCheck:
    """What `predictive_check` found; statistics are in the units of the data."""

    names: tuple[str, ...]
    """The statistics."""
    observed: Tensor
    """Those of the data, of shape (n, statistics); NaN for a datum of which nothing is seen."""
    replicated_mean: Tensor
    """Their means over the replicates of each datum, of shape (n, statistics)."""
    replicated_deviation: Tensor
    """Their standard deviations over the replicates of each datum, of shape (n, statistics)."""
    p_values: Tensor
    """Share of a datum's replicates above it, ties halved, of shape (n, statistics); near 0 or 1
    the model does not make such data."""
    whole: Tensor
    """Means over all data of each replicate's statistics, of shape (num_replicates, statistics)."""

    @property
    def num_replicates(self) -> int:
        """Replicates of each datum."""
        return len(self.whole)

    @property
    def whole_p_values(self) -> dict[str, float]:
        """Share of the replicated data sets whose mean statistic is above that of the data."""
        found = _p_values(self.whole[:, None], self.observed.nanmean(0)[None])[0]
        return dict(zip(self.names, found.tolist(), strict=True))

    def worst(self, name: str | None = None, number: int = 10) -> Tensor:
        """The indices of the data that lie most standard deviations from their replicates, by one
        statistic or by any of them, the worst first."""
        if name is not None and name not in self.names:
            raise UsageError(f"no statistic is called '{name}'; {nearest(name, self.names)}")
        off = self.distances.nan_to_num(0.0, posinf=torch.inf).abs()
        off = off.amax(1) if name is None else off[:, self.names.index(name)]
        return off.argsort(descending=True, stable=True)[:number]

    @property
    def distances(self) -> Tensor:
        """How many standard deviations of its replicates a datum lies above their mean, of shape
        (n, statistics); infinite where they do not vary and it differs, NaN where it does not."""
        return (self.observed - self.replicated_mean) / self.replicated_deviation

    def as_dict(self) -> dict[str, Any]:
        """Means, p-values and shares by statistic, as metrics.json holds them."""
        off = (self.p_values - 0.5).abs()
        extreme = torch.where(off.isnan(), off, off > 0.475)
        rows = zip(
            self.names,
            self.observed.nanmean(0).tolist(),
            self.whole.mean(0).tolist(),
            self.whole_p_values.values(),
            extreme.nanmean(0).tolist(),
            strict=True,
        )
        return {
            "num_examples": len(self.observed),
            "num_replicates": self.num_replicates,
            "statistics": {
                name: {
                    "observed": finite(observed),
                    "replicated": finite(replicated),
                    "p_value": p,
                    "fraction_outside_95": outside,
                }
                for name, observed, replicated, p, outside in rows
            },
        }

    def __str__(self) -> str:
        lines = [
            f"{'statistic':<18}{'data':>12}{'replicates':>12}{'p, all data':>13}"
            f"{'data outside 95 %':>19}"
        ]
        for name, row in self.as_dict()["statistics"].items():
            numbers = (row[key] for key in ("observed", "replicated"))
            shown = "".join(
                f"{number:>12.4g}" if number is not None else f"{'infinite':>12}"
                for number in numbers
            )
            outside = 100 * row["fraction_outside_95"]
            lines.append(f"{name:<18}{shown}{row['p_value']:>13.3f}{outside:>17.1f} %")
        lines.append(f"{len(self.observed)} data, {self.num_replicates} replicates of each")
        return "\n".join(lines)


@alone()
def predictive_check(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    statistics: Mapping[str, Statistic] | None = None,
    num_replicates: int = 100,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> PredictiveCheck:
    r"""Hold statistics of the data against those of data that the model draws in their place.

    For each datum :math:`x^{rep}_r \sim \int p(x^{rep} | z)\, q(z | x)\, dz`, and with R of them
    :math:`p = \tfrac{1}{R + 1} \big(\#\{T(x^{rep}) > T(x)\} + \tfrac12 \#\{T(x^{rep}) = T(x)\}
    + \tfrac12\big)`, never 0 or 1. For all data the same, of the mean of T over them.

    Arguments:
        pair: any pair.
        x, context: data, as `pyro_vae.log_likelihood` takes them.
        statistics: by name, functions that take data (n, *data_shape) and return a tensor of
            shape (n,); `STATISTICS` by default: mean, variance, greatest, share of zeros. Data
            that are classes have none of these, but the share of each of the first ten classes.
        num_replicates: R for each datum, 20 or more.
        seed: of all draws. progress: show a bar, where it takes over two seconds.

    The latents are the guide's draws (of those that only the model has, draws given them and x), so
    that model and guide are checked together; a refined pair brings them nearer to the posterior:
    ``refined = pv.refine(pair, x)``, then ``predictive_check(refined.pair, *refined.batch)``. As a
    replicate has seen its datum, p-values crowd about 1/2: extreme ones say more than usual ones.
    Entries of the data that the model masks are NaN in the data and in their replicates alike, so a
    statistic of your own must leave NaN out; a datum without any other entry has no statistics.
    Raises `UsageError` for a statistic that does not return a number for each datum, and where the
    model draws no data of the shape of x. Gelman, Meng & Stern, 1996.

    >>> import torch, pyro_vae as pv
    >>> x = torch.ones(8, 4)
    >>> found = predictive_check(pv.VAE.mlp((4,)), x, statistics={"total": lambda x: x.sum(1)})
    >>> found.p_values.shape, bool(found.p_values.max() < 0.5)
    (torch.Size([8, 1]), True)
    """
    if num_replicates < LEAST_REPLICATES:
        raise UsageError(
            f"num_replicates must be {LEAST_REPLICATES} or more, {num_replicates} came"
        )
    if statistics is not None and not statistics:
        raise UsageError("statistics must name one function or more, none came")
    rows, prepare = held_rows(pair, x, context, binarize)
    chosen = dict(statistics or _usual(pair, prepare(rows.first(2))))
    # Of latents that all data share each replicate of the whole data has a draw of its own.
    shared = bool(global_latents(pair, prepare(rows.first(2))))
    size, beside = (len(rows), 1) if shared else (ROWS_AT_ONCE, ROWS_AT_ONCE)
    found = []
    with using(pair, seed), bar(progress, len(rows), "replicates", delay=2) as shown:
        for part in rows.batches(size):
            batch = prepare(part)
            model = trace_model(pair, batch, trace_guide(pair, batch))
            observed = _measured(chosen, masks.seen(data_site(model), batch[0]))
            found.append((observed, _replicated(pair, batch, chosen, num_replicates, beside)))
            shown.update(len(observed))
    observed = torch.cat([part[0] for part in found])
    replicated = torch.cat([part[1] for part in found], 1)
    return PredictiveCheck(
        tuple(chosen),
        observed,
        replicated.mean(0),
        replicated.std(0, correction=0),
        _p_values(replicated, observed),
        replicated.nanmean(1),
    )


def _usual(pair: nn.Module, batch: Batch) -> Mapping[str, Statistic]:
    """The statistics of any data, or of data that are classes, of which no number is a mean."""
    with using(pair, seed=0):
        fn = data_site(trace_model(pair, batch, trace_guide(pair, batch)))["fn"]
    if not is_category(fn):
        return STATISTICS
    return {f"share of class {k}": _share(k) for k in range(min(10, num_values(fn)))}


def _share(k: int) -> Statistic:
    return lambda x: (x.flatten(1) == k).double().mean(1)


def _replicated(
    pair: nn.Module, batch: Batch, statistics: Mapping[str, Statistic], number: int, beside: int
) -> Tensor:
    """Statistics of replicates (number, n, statistics), so many rows of them drawn side by side."""
    n = len(batch[0])
    together = max(1, beside // n)
    parts = []
    for start in range(0, number, together):
        times = min(together, number - start)
        wide = tuple(tensor.repeat(times, *[1] * (tensor.dim() - 1)) for tensor in batch)
        made = masks.seen(observation(pair, wide, latent_values(pair, wide, False)), wide[0])
        parts.append(_measured(statistics, made).unflatten(0, (times, n)))
    return torch.cat(parts)


def _measured(statistics: Mapping[str, Statistic], x: Tensor) -> Tensor:
    """All statistics of data, of shape (n, statistics)."""
    columns, holes = [], _rows(x.isnan())
    empty = holes.all(1)
    for name, statistic in statistics.items():
        found = statistic(x)
        if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(
                f"statistic '{name}' must return a number for each datum, a tensor of shape "
                f"({len(x)},); {came} came"
            )
        found = torch.where(empty, torch.nan, found.double())
        if bool((found.isnan() & ~empty).any()):
            why = " that has masked entries, which are NaN: leave these out" if holes.any() else ""
            raise UsageError(f"statistic '{name}' is not a number for a datum{why}")
        columns.append(found)
    return torch.stack(columns, 1).cpu()


def _p_values(replicated: Tensor, observed: Tensor) -> Tensor:
    """Shares of replicates (replicates, n, statistics) above what was observed (n, statistics)."""
    rounding = 1e-6 * observed.abs()
    above = (replicated > observed + rounding).sum(0)
    ties = ((replicated - observed).abs() <= rounding).sum(0)
    return torch.where(
        observed.isnan(), torch.nan, (above + (ties + 1) / 2) / (len(replicated) + 1)
    )


def finite(number: float) -> float | None:
    return number if isfinite(number) else None

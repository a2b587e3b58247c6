"""Compare the diagnoses of several runs: their verdicts, and the spread of their log p(x)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows
from pyro_vae.diagnostics.diagnosis import Diagnosis
from pyro_vae.inference.importance import LogLikelihood
from pyro_vae.pairs.formatting import aligned, with_error
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.moments import is_discrete
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.sites import observed
from pyro_vae.pairs.threads import alone
from pyro_vae.parts.columns import ByColumn
from pyro_vae.runs.held_out_rows import row_hashes

BEYOND = 3.0
"""A standard deviation between runs of this many reported errors is more than Monte Carlo error."""


VISIBLE = 0.001
"""The smallest number that the table shows."""


class ScoredRows(NamedTuple):
    """What log p(x) of a pair is about. Two values can be compared only if these are equal."""

    rows: Tensor
    """A hash of each row of x as the pair receives it, after binarization, of shape (n,)."""
    context: Tensor
    """Hashes of the context of each row, of shape (n, number of context tensors)."""
    discrete: tuple[bool, ...]
    """For each observed site or column: p(x) is a probability, and not a density."""


@alone()
def scored(pair: nn.Module, x: Rows, *context: Any, binarize: str = "dynamic") -> ScoredRows:
    """Return what log p(x) of a pair is about, for held-out data as `diagnose` takes them."""
    rows, prepare = held_rows(pair, x, context, binarize)
    batches = [prepare(batch) for batch in rows.batches(1000)]
    hashes = [torch.stack([row_hashes(part) for part in batch], 1) for batch in batches]
    first, *others = torch.cat(hashes).unbind(1)
    with using(pair, 0):
        few = tuple(part[:2] for part in batches[0])
        sites = observed(trace_model(pair, few, trace_guide(pair, few)))
    kinds = tuple(kind for site in sites.values() for kind in _discrete(site["fn"]))
    return ScoredRows(first, torch.stack(others, 1) if others else first[:, None][:, :0], kinds)


def _discrete(fn: Any) -> list[bool]:
    """Whether the values are discrete; for a table, of each column."""
    whole = fn
    while not isinstance(fn, ByColumn) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    if not isinstance(fn, ByColumn):
        return [is_discrete(whole)]
    kinds = {column: is_discrete(part) for columns, part in fn.parts for column in columns}
    return [kinds[column] for column in sorted(kinds)]


class Diagnosed(NamedTuple):
    """One run of a comparison."""

    name: str
    found: Diagnosis
    scored: ScoredRows


@dataclass(frozen=True)
class RunRow:
    """What the comparison shows of one run."""

    name: str
    """The name of the run."""
    faults: dict[str, float | None]
    """The parts at fault and their sizes in nats per example, if known, the largest first."""
    log_likelihood: float | None
    """log p(x) by importance weights, nats per example; None without a result."""
    error: float | None
    """Its error, as the findings report it."""
    reliable: bool
    """Whether the diagnosis calls log p(x) reliable."""
    elbo: float | None
    """The ELBO of the same rows."""
    active_units: dict[str, str]
    """The number of active units of each latent site, as "2 of 4"."""
    ran: int
    """Number of diagnostics that gave a result."""
    missing: tuple[str, ...]
    """The diagnostics that gave a result for another run, but not for this one."""

    @property
    def gap(self) -> float | None:
        """The distance of log p(x) and the ELBO."""
        if self.log_likelihood is None or self.elbo is None:
            return None
        return self.log_likelihood - self.elbo


@dataclass(frozen=True)
class Spread:
    """The spread of log p(x) between runs, on the rows that all runs have scored."""

    num_examples: int
    """Number of rows."""
    between: float
    """Standard deviation of the mean log p(x) between runs, nats per example."""
    reported: float
    """Root mean square of the errors that the runs report."""
    highest: str
    """The run with the highest log p(x)."""
    lowest: str
    """The run with the lowest log p(x)."""
    difference: float
    """Their difference, nats per example."""
    error: float
    """Standard error of the difference, from the differences of single rows."""

    _repr_html_ = shown_html

    def __str__(self) -> str:
        words = f"log p(x) on the same {self.num_examples} rows has a standard deviation of "
        words += f"{self.between:.3f} nats per example between runs; a run reports an error of "
        words += f"{self.reported:.3f}"
        if self.reported >= VISIBLE:
            words += f" (ratio {self.between / self.reported:.1f})"
        if self.between > max(VISIBLE, BEYOND * self.reported):
            words += ", which does not contain this spread"
        return (
            f"{words}. {self.highest} is higher than {self.lowest} by "
            f"{with_error(self.difference, self.error)}, paired by row."
        )


@dataclass(frozen=True)
class Comparison:
    """The diagnoses of several runs, side by side."""

    rows: tuple[RunRow, ...]
    """One for each run."""
    spread: Spread | None
    """The spread of log p(x); None if the runs are not comparable."""
    not_comparable: str | None
    """Why log p(x) of these runs is not comparable."""

    @property
    def agree(self) -> bool:
        """Whether the same parts are at fault in all runs."""
        return len({frozenset(row.faults) for row in self.rows}) == 1

    @property
    def verdict(self) -> str:
        """Whether the verdicts agree, in words."""
        n = len(self.rows)
        if silent := [row.name for row in self.rows if not row.ran]:
            return f"No verdict: no diagnostic gave a result for {', '.join(silent)}."
        counts = Counter(part for row in self.rows for part in row.faults)
        if not self.agree:
            told = ", ".join(f"{part} in {count} of {n} runs" for part, count in counts.items())
            return f"The verdicts differ. At fault: {told}."
        if not counts:
            return (
                "The verdicts agree: no part is at fault, as far as the diagnostics have checked."
            )
        return f"The verdicts agree. At fault in all runs: {', '.join(counts)}."

    _repr_html_ = shown_html

    def __str__(self) -> str:
        lines = [*_table(self.rows), ""]
        if not all(row.reliable for row in self.rows if row.log_likelihood is not None):
            lines.append("* not reliable: see the findings of the run")
        lines.append(self.verdict)
        lines += [f"{r.name} lacks {', '.join(r.missing)}." for r in self.rows if r.missing]
        lines.append(str(self.spread or f"log p(x) is not comparable: {self.not_comparable}."))
        return "\n".join(lines)


def compare(runs: Sequence[Diagnosed]) -> Comparison:
    """Compare the verdicts of several runs, and their log p(x) if it is about the same rows."""
    ran = [name for run in runs for name in run.found.results]
    rows = tuple(_row(run, tuple(dict.fromkeys(ran))) for run in runs)
    why = _not_comparable(runs)
    spread = None if why else _spread(runs, rows)
    return Comparison(rows, spread, why)


def _row(run: Diagnosed, ran: Sequence[str]) -> RunRow:
    results = run.found.results
    weighed, latents = results.get("log_likelihood"), results.get("latents")
    units = {}
    if latents is not None:
        active = latents.active_units.items()
        units = {site: f"{used} of {latents.num_units[site]}" for site, used in active}
    trusted = {finding.about for finding in run.found.findings if finding.kind == "trust"}
    return RunRow(
        name=run.name,
        faults={blame.part: blame.nats for blame in run.found.blamed},
        log_likelihood=None if weighed is None else weighed.value,
        error=None if weighed is None else weighed.total_error,
        reliable="log p(x)" in trusted,
        elbo=None if weighed is None else weighed.elbo,
        active_units=units,
        ran=len(results),
        missing=tuple(name for name in ran if name not in results),
    )


def _not_comparable(runs: Sequence[Diagnosed]) -> str | None:
    """Return why log p(x) of the runs is not about the same thing, or was not measured."""
    measured = [
        Measured(run.name, run.found.results.get("log_likelihood"), run.scored) for run in runs
    ]
    if why := why_not(measured):
        return why
    return None if len(_common(runs)) > 1 else "the runs have scored fewer than two common rows"


class Measured(NamedTuple):
    """log p(x) of a run, and what it is about."""

    name: str
    estimate: LogLikelihood | None
    scored: ScoredRows


def why_not(runs: Sequence[Measured]) -> str | None:
    """Return why log p(x) of the runs cannot be compared; None if it can."""
    first = runs[0]
    for name, estimate, about in runs:
        if estimate is None:
            return f"{name} has no log p(x) by importance weights"
        if estimate.factors:
            return f"p(x) of {name} is not normalized, because its model has factors"
        if not isfinite(estimate.value):
            return f"log p(x) of {name} is not finite"
        if not torch.equal(about.rows, first.scored.rows):
            return f"{first.name} and {name} have different test rows"
        if not torch.equal(about.context, first.scored.context):
            return f"{first.name} and {name} receive different context"
        if about.discrete != first.scored.discrete:
            return f"one of {first.name} and {name} gives a density, the other a probability"
    return None


def paired(high: Tensor, low: Tensor) -> tuple[float, float]:
    """Return the mean difference of values (n,) of the same rows, and its standard error."""
    differences = (high - low).double()
    return differences.mean().item(), (differences.std() / len(differences) ** 0.5).item()


def _common(runs: Sequence[Diagnosed]) -> list[int]:
    """Return the numbers of the rows that all runs have scored."""
    each = [set(_by_row(run)) for run in runs]
    return sorted(set.intersection(*each))


def _by_row(run: Diagnosed) -> dict[int, float]:
    """Return log p(x) of each row, by its number."""
    values = run.found.results["log_likelihood"].per_datum
    return dict(zip(run.found.rows.tolist(), values.tolist(), strict=False))


def _spread(runs: Sequence[Diagnosed], rows: Sequence[RunRow]) -> Spread:
    common = _common(runs)
    values = torch.tensor([[_by_row(run)[i] for i in common] for run in runs]).double()
    means, errors = values.mean(1), torch.tensor([row.error or 0.0 for row in rows])
    high, low = int(means.argmax()), int(means.argmin())
    difference, error = paired(values[high], values[low])
    return Spread(
        num_examples=len(common),
        between=means.std().item(),
        reported=errors.square().mean().sqrt().item(),
        highest=rows[high].name,
        lowest=rows[low].name,
        difference=difference,
        error=error,
    )


HEAD: tuple[str, ...] = ("run", "at fault (nats)", "log p(x)", "ELBO", "gap", "active units")
"""The columns of the table."""


def _table(rows: Sequence[RunRow]) -> list[str]:
    """Return the lines of the table, with columns as wide as their entries."""
    return aligned([HEAD, *map(_cells, rows)])


def _cells(row: RunRow) -> tuple[str, ...]:
    faults = ", ".join(
        part + ("" if nats is None else f" ({nats:.2f})") for part, nats in row.faults.items()
    )
    value = "-"
    if row.log_likelihood is not None and row.error is not None:
        value = with_error(row.log_likelihood, row.error) + ("" if row.reliable else " *")
    units = ", ".join(f"{site} {used}" for site, used in row.active_units.items())
    elbo = "-" if row.elbo is None else f"{row.elbo:.3f}"
    gap = "-" if row.gap is None else f"{row.gap:.2f}"
    return row.name, faults or ("no part" if row.ran else "-"), value, elbo, gap, units or "-"

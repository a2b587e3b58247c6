"""Several pairs side by side: bound, log p(x) with paired differences, verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass

from pyro_vae.diagnostics.comparison import Measured, paired, why_not
from pyro_vae.pairs.formatting import aligned, with_error
from pyro_vae.pairs.showing import shown_html

HEAD = ("run", "ELBO", "log p(x)", "difference to the best", "at fault (nats)")


@dataclass(frozen=True)
class ScoreTable:
    """log p(x) of several runs, and its paired differences to the run with the highest value."""

    runs: tuple[Measured, ...]
    verdicts: tuple[str, ...]
    """What the last diagnosis of each run found, in words."""
    not_comparable: str | None
    """Why log p(x) of these runs cannot be compared."""

    @property
    def differences(self) -> list[tuple[float, float]]:
        """log p(x) of each run minus that of the best run, with its standard error over rows."""
        if self.not_comparable:
            return []
        values = [run.estimate.per_datum for run in self.runs if run.estimate is not None]
        best = max(values, key=lambda rows: rows.mean().item())
        return [(0.0, 0.0) if rows is best else paired(rows, best) for rows in values]

    _repr_html_ = shown_html

    def __str__(self) -> str:
        told = [with_error(*pair) if any(pair) else "best" for pair in self.differences]
        told = told or ["-"] * len(self.runs)
        rows = [
            (*_measured(run), difference, verdict)
            for run, difference, verdict in zip(self.runs, told, self.verdicts, strict=True)
        ]
        lines = [*aligned([HEAD, *rows]), ""]
        if self.not_comparable:
            return "\n".join([*lines, f"log p(x) is not comparable: {self.not_comparable}."])
        n = len(self.runs[0].scored.rows)
        return "\n".join([*lines, f"{n} test rows; differences are paired by row."])


def _measured(run: Measured) -> tuple[str, str, str]:
    found = run.estimate
    if found is None:
        return run.name, "-", "-"
    return run.name, f"{found.elbo:.3f}", with_error(found.value, found.total_error)


def score_table(runs: Sequence[Measured], verdicts: Sequence[str]) -> ScoreTable:
    """Put runs side by side; differences of log p(x) need runs about the same rows."""
    return ScoreTable(tuple(runs), tuple(verdicts), why_not(runs))

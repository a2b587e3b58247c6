"""Diagnose a run, write what was found into its folder, and tell the verdict in a few lines."""

import warnings
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from pyro_vae.cli.run import binarize_of, context_of, test_part
from pyro_vae.errors import UsageError, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyro_vae.data.split import Data
    from pyro_vae.diagnostics.diagnosis import Diagnosis
    from pyro_vae.diagnostics.study import Finding

ROWS = 1000
"""The largest number of test data of a diagnosis, by default."""

SECONDS = 10.0
"""The default time limit of the diagnosis that `train` makes for its report."""


def require_seconds(name: str, value: float, least: str = "above 0") -> None:
    """Raise `UsageError` for a time limit that is not a finite number of this size."""
    if not isfinite(value) or value < 0 or (value == 0 and least == "above 0"):
        raise UsageError(f"must be {least} seconds, got {value:g}", argument=name)


def require_distinct(runs: Sequence[Path]) -> None:
    """Raise `UsageError` for a run that is given twice."""
    known: dict[Path, Path] = {}
    for run in runs:
        before = known.setdefault(run.resolve(), run)
        if before is not run:
            again = "" if before == run else f" (as {before} and {run})"
            raise UsageError(f"{run} is given twice{again}; give each run once")


def print_price(words: str) -> None:
    """Say what a diagnosis costs, before it starts."""
    print(f"{'diagnosis':<20}{words}", flush=True)


def diagnose_run(
    run: Path,
    pair: "nn.Module",
    data: "Data",
    given: dict[str, Any],
    *,
    budget: float,
    engine: str,
    num: int = ROWS,
    seed: int = 0,
    own: bool = True,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> "Diagnosis":
    """Diagnose the pair of a run on test data; write metrics.json and the figures.

    Several processes share it, and the first one writes.

    Arguments:
        own: whether the data are those of the run. The guide of global latents belongs to them.
        more: further entries for metrics.json.
        options: further arguments of `pyro_vae.diagnose`.
    """
    from pyro_vae.diagnostics.diagnosis import diagnose
    from pyro_vae.pairs.processes import here

    x, context = test_part(data, given, num)
    found = diagnose(
        pair,
        x,
        *context,
        train=(data.train.x, *context_of(given, data, data.train)) if own else None,
        budget=budget,
        binarize=binarize_of(given),
        engine=engine,
        seed=seed,
        **options,
    )
    record = {"data": data.name} | dict(more or {}) | found.as_dict()
    if "log_likelihood" in found.results:
        record |= _worst(data, given, x, found)
    if here().first:
        _write(run, pair, found, record)
    return found


def _worst(data: "Data", given: dict[str, Any], x: "Tensor", found: "Diagnosis") -> dict[str, str]:
    """The data whose log p(x) is least reliable, as text or by their ids, for the report."""
    from pyro_vae.cli.row_names import ids_of
    from pyro_vae.plots import canvas

    worst = found.worst()
    if "vocabulary" in given:
        return {"worst_data": canvas.lines([("", x[worst])], given["vocabulary"])}
    if data.files or data.table or data.cells:
        return {"worst_data": _named(ids_of(data, data.test), worst.tolist())}
    return {}


def _named(ids: dict[str, list[Any]], rows: list[int]) -> str:
    """The ids of rows, by the row numbers that the pictures show."""
    ((name, known),) = ids.items()
    return "\n".join([f"row     {name}", *(f"{row:<8}{known[row]}" for row in rows)])


def _write(run: Path, pair: "nn.Module", found: "Diagnosis", record: dict[str, Any]) -> None:
    """Write the figures, without those of an earlier diagnosis, and the record."""
    from pyro_vae.pairs.figures import png
    from pyro_vae.runs import files as run_files
    from pyro_vae.runs import metrics as run_metrics

    figures = run / run_files.FIGURES
    made = {
        figures / f"{run_files.DIAGNOSIS}{name}.png": png(figure)
        for name, figure in found.figures.items()
    }
    for path in set(figures.glob(f"{run_files.DIAGNOSIS}*.png")) - set(made):
        path.unlink()
    for path, picture in made.items():
        with run_files.atomic(path) as file:
            file.write(picture)
    metrics = run_metrics.read_metrics(run)
    record = {"model": run_metrics.fingerprint(pair)} | record
    run_files.write_json(run / run_files.METRICS, metrics | {"diagnostics": record})


def diagnose_trained(
    run: Path,
    pair: "nn.Module",
    data: "Data",
    given: dict[str, Any],
    budget: float,
    engine: str,
) -> None:
    """Diagnose a run at the end of its training; a failure is a warning, and the run stays."""
    print_price(f"about {budget:g} s; --diagnosis-seconds 0 turns it off")
    try:
        found = diagnose_run(run, pair, data, given, budget=budget, engine=engine)
    except Exception as error:  # a user's pair may raise anything
        warnings.warn(
            f"the diagnosis failed ({type(error).__name__}: {first_line(error)}). The run is "
            f"complete without it; pyro-vae diagnose {run} repeats it",
            stacklevel=2,
        )
        return
    print(*verdict_lines(found), sep="\n")


def verdict_lines(found: "Diagnosis") -> list[str]:
    """The verdict in at most five lines; the report has its evidence."""
    from pyro_vae.diagnostics.study import KINDS

    if not found.results:
        return [f"{'diagnosis':<20}no diagnostic gave a result"]
    lines = {"fault": _faults(found)}
    if found.blamed:
        lines["next"] = found.blamed[0].next
    for kind in ("trust", "doubt", "unchecked"):
        about = [_short(one) for one in found.findings if one.kind == kind]
        lines[kind] = "; ".join(dict.fromkeys(about))
    return [f"{KINDS[kind].lower():<20}{words}" for kind, words in lines.items() if words]


def _faults(found: "Diagnosis") -> str:
    from pyro_vae.diagnostics.attribution import PARTS

    told = [
        PARTS[blame.part][0] + ("" if blame.nats is None else f" ({blame.nats:.2f} nats)")
        for blame in found.blamed
    ]
    return "; ".join(told) or "no part, as far as the diagnostics have checked"


def _short(finding: "Finding") -> str:
    return finding.about or shorten(finding.words, 60, placeholder=" ...")

"""Commands that judge a run: evaluate, diagnose."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.cli.app import RunFolder, UserClass, app
from pyro_vae.cli.run import (
    binarize_of,
    context_of,
    load_of_run,
    measure_run,
    open_run,
    report_run,
    require_positive,
    split_of,
    test_part,
)
from pyro_vae.training.settings import EngineName

if TYPE_CHECKING:
    from torch import nn

    from pyro_vae.data.split import Data


@app.command
def evaluate(
    run: RunFolder,
    *,
    data: str | None = None,
    part: str = "test",
    data_dir: Path | None = None,
    model: UserClass = None,
    num_samples: int = 500,
    engine: EngineName = "auto",
) -> None:
    """Measure a run on test data: ELBO, log p(x), KL, active units, a linear probe.

    Parameters
    ----------
    data
        Data to use instead of those of training: a name or a file, as for train.
    part
        Part of the data: train, validation, test or all. Other data than those of training are
        split in the same way; with all, each row counts. A table then may have any number of rows.
    data_dir
        Folder of the torchvision data sets.
    num_samples
        Importance samples for the log p(x) of each datum.
    engine
        How to compute log p(x): with stock Pyro (eager), a traced graph (traced) or a compiled
        graph (compiled). auto chooses by the amount of work.
    """
    pair, loaded, given = open_run(run, data, data_dir, model, part)
    kept = _current_findings(run, pair) | (_seen(run, loaded, part) if data is not None else {})
    measure_run(run, pair, loaded, given, num_samples, engine, kept, part)


@app.command
def diagnose(
    run: RunFolder,
    *,
    num: int = 1000,
    budget: float = 200.0,
    data: str | None = None,
    other: str | None = None,
    data_dir: Path | None = None,
    model: UserClass = None,
    engine: EngineName = "auto",
    seed: int = 0,
    report: bool = True,
) -> None:
    """Check whether the inference of a run can be believed; write metrics, figures and the report.

    Parameters
    ----------
    num
        Number of test data.
    budget
        Time limit in seconds. The result names the checks for which there was no time.
    data
        Data to use instead of those of training: a name or a file, as for train.
    other
        Out-of-distribution data. Their outlier scores are compared with those of the test data.
    data_dir
        Folder of the torchvision data sets.
    engine
        How to compute weights and gradients: with stock Pyro (eager), a traced graph (traced) or a
        compiled graph (compiled). auto chooses by the amount of work.
    seed
        Random seed.
    report
        Write report.html again.
    """
    from pyro_vae.cli.score import ids_of  # here, so that the commands keep their order in --help
    from pyro_vae.diagnostics.diagnosis import diagnose as run_diagnose
    from pyro_vae.plots import canvas
    from pyro_vae.runs import files as run_files
    from pyro_vae.runs import metrics as run_metrics

    require_positive("num", num)
    pair, loaded, given = open_run(run, data, data_dir, model)
    x, context = test_part(loaded, given, num)
    outliers = None
    if other is not None:
        rows, others = test_part(load_of_run(run, given, other, data_dir), given, num)
        outliers = (rows, *others)
    found = run_diagnose(
        pair,
        x,
        *context,
        other=outliers,
        # The guide of global latents belongs to the training data of the run.
        train=(loaded.train.x, *context_of(given, loaded, loaded.train)) if data is None else None,
        budget=budget,
        binarize=binarize_of(given),
        engine=engine,
        seed=seed,
    )
    seen = _seen(run, loaded) if data is not None else {}
    record = {"data": loaded.name, "model": run_metrics.fingerprint(pair)} | seen | found.as_dict()
    if "log_likelihood" in found.results:
        worst = found.worst()
        if "vocabulary" in given:
            record["worst_data"] = canvas.lines([("", x[worst])], given["vocabulary"])
        elif loaded.files or loaded.table or loaded.cells:
            record["worst_data"] = _named(ids_of(loaded, loaded.test), worst.tolist())
    for name, figure in found.figures.items():
        with run_files.atomic(run / run_files.FIGURES / f"{run_files.DIAGNOSIS}{name}.png") as file:
            file.write(canvas.png(figure))
    metrics = run_metrics.read_metrics(run)
    run_files.write_json(run / run_files.METRICS, metrics | {"diagnostics": record})
    if report:
        report_run(run, pair, loaded, given)
    print(found)
    if report:
        print(f"\n{'report':<20}{run / 'report.html'}")


def _named(ids: dict[str, list[Any]], rows: list[int]) -> str:
    """The ids of rows, by the row numbers that the pictures show."""
    ((name, known),) = ids.items()
    return "\n".join([f"row     {name}", *(f"{row:<8}{known[row]}" for row in rows)])


def _current_findings(run: Path, pair: "nn.Module") -> dict[str, Any]:
    """The findings of `diagnose` in metrics.json, unless they describe other weights."""
    from pyro_vae.runs import files as run_files
    from pyro_vae.runs import metrics as run_metrics

    found = run_metrics.read_metrics(run).get("diagnostics")
    if found is None:
        return {}
    if found.get("model", (now := run_metrics.fingerprint(pair))) != now:
        warnings.warn(
            f"{run / run_files.METRICS} had findings of diagnose for other weights. They are "
            "removed; run diagnose again",
            stacklevel=2,
        )
        return {}
    return {"diagnostics": found}


def _seen(run: Path, data: "Data", part: str = "test") -> dict[str, int]:
    """For metrics.json: how many rows of a part of other data the run has seen, with a warning."""
    from pyro_vae.data.split import part_of
    from pyro_vae.runs import folder as run_folder
    from pyro_vae.runs import held_out_rows

    if not held_out_rows.changed_parts(split_of(run_folder.read_config(run)), data):
        return {}
    x, rows = part_of(data, part).x, "rows" if part == "all" else f"{part} rows"
    seen = held_out_rows.count_seen(run, x)
    if seen:
        warnings.warn(
            f"{seen} of {len(x)} {rows} of {data.name} equal training or validation "
            f"rows of {run}, so the numbers are not those of held-out data alone",
            stacklevel=2,
        )
    return {} if seen is None else {"rows_trained_on": seen}

"""Commands that judge a run: evaluate, diagnose."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from pyro_vae.cli.app import RunFolder, UserClass, app
from pyro_vae.cli.diagnosis import (
    ROWS,
    diagnose_run,
    print_price,
    require_distinct,
    require_seconds,
    verdict_lines,
)
from pyro_vae.cli.run import (
    binarize_of,
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
    from torch import Tensor, nn

    from pyro_vae.data.split import Data
    from pyro_vae.diagnostics.comparison import ScoredRows


@app.command
def evaluate(
    run: RunFolder,
    *,
    data: str | None = None,
    part: str = "test",
    data_dir: Path | None = None,
    model: UserClass = None,
    num_samples: int = 500,
    batch_size: int = 500,
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
    batch_size
        Greatest number of rows in one pass.
    engine
        How to compute log p(x): with stock Pyro (eager), a traced graph (traced) or a compiled
        graph (compiled). auto chooses by the amount of work.
    """
    pair, loaded, given = open_run(run, data, data_dir, model, part)
    kept = _current_findings(run, pair) | (_seen(run, loaded, part) if data is not None else {})
    measure_run(run, pair, loaded, given, num_samples, engine, kept, part, batch_size)


@app.command
def diagnose(
    run: RunFolder,
    *others: Annotated[Path, Parameter(help="Further runs, to compare with the first one.")],
    num: int = ROWS,
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

    Several runs, such as those of several seeds, are diagnosed one after another. A table then
    compares their verdicts and their log p(x).

    Parameters
    ----------
    num
        Number of test data.
    budget
        Time limit in seconds for each run. The result names the checks for which there was no time.
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
    from pyro_vae.diagnostics.comparison import Diagnosed, compare
    from pyro_vae.pairs.processes import here, single

    require_positive("num", num)
    require_seconds("budget", budget)
    runs = (run, *others)
    require_distinct(runs)
    opened = [open_run(one, data, data_dir, model) for one in runs]
    scores = [_scored(one, num) for one in opened] if others else []
    print_price(f"about {budget:g} s{' for each run' if others else ''} (--budget)")
    made = []
    for one, (pair, loaded, given) in zip(runs, opened, strict=True):
        found = diagnose_run(
            one,
            pair,
            loaded,
            given,
            num=num,
            budget=budget,
            engine=engine,
            seed=seed,
            own=data is None,
            more=_seen(one, loaded) if data is not None else None,
            other=None if other is None else _other(one, given, other, data_dir, num),
        )
        if others:
            print(f"\n{one}", *verdict_lines(found), sep="\n")
        else:
            print(found, end="\n\n" if report else "\n")
        if report and here().first:
            with single():
                report_run(one, pair, loaded, given)
            print(f"{'report':<20}{one / 'report.html'}")
        made.append(found)
    if others:
        sides = zip(map(str, runs), made, scores, strict=True)
        print(f"\n{compare([Diagnosed(*side) for side in sides])}")


def _scored(opened: tuple["nn.Module", "Data", dict[str, Any]], num: int) -> "ScoredRows":
    """What log p(x) of a run is about, on the data of its diagnosis."""
    from pyro_vae.diagnostics.comparison import scored

    pair, data, given = opened
    x, context = test_part(data, given, num)
    return scored(pair, x, *context, binarize=binarize_of(given))


def _other(
    run: Path, given: dict[str, Any], name: str, data_dir: Path | None, num: int
) -> tuple["Tensor", ...]:
    """Out-of-distribution data, as the pair of a run receives them."""
    x, context = test_part(load_of_run(run, given, name, data_dir), given, num)
    return (x, *context)


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

"""The command that trains a pair."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pyro_vae.cli.app import FROM_DATA, FROM_INFERENCE, FROM_MODEL, FROM_TRAINING, app
from pyro_vae.cli.config_file import (
    data_defaults,
    read_options,
    reject_typed_ignored,
    require_typed_class,
    run_of,
)
from pyro_vae.cli.diagnosis import SECONDS, diagnose_trained, require_seconds
from pyro_vae.cli.groups import OF_DATA, OF_OUTPUT
from pyro_vae.cli.input import Input, named_data, reject_ignored_by_data
from pyro_vae.cli.job import make_job, told
from pyro_vae.cli.make_pair import require_groups
from pyro_vae.cli.make_parts import missing_entries
from pyro_vae.cli.options import Model, Objective
from pyro_vae.cli.run import (
    measure_run,
    recorded_options,
    report_run,
    require_positive,
    require_recorded,
    require_split,
    schema_of_run,
    write_schema,
)
from pyro_vae.errors import UsageError
from pyro_vae.training.settings import Settings

if TYPE_CHECKING:
    from pyro_vae.cli.job import Job
    from pyro_vae.data.split import Data


@app.command(config=(read_options, data_defaults, require_typed_class, reject_typed_ignored))
def train(
    data: Annotated[str, OF_DATA],
    *,
    out: Annotated[Path | None, OF_OUTPUT] = None,
    model: Annotated[Model, FROM_MODEL] = Model(),  # noqa: B008
    objective: Annotated[Objective, FROM_INFERENCE] = Objective(),  # noqa: B008
    source: Annotated[Input, FROM_DATA] = Input(),  # noqa: B008
    settings: Annotated[Settings, FROM_TRAINING] = Settings(),  # noqa: B008
    num_eval_samples: Annotated[int, OF_OUTPUT] = 500,
    resume: Annotated[bool, OF_OUTPUT] = False,
    overwrite: Annotated[bool, OF_OUTPUT] = False,
    report: Annotated[bool, OF_OUTPUT] = True,
    diagnosis_seconds: Annotated[float | None, OF_OUTPUT] = None,
    config: Annotated[Path | None, OF_DATA] = None,
) -> None:
    """Fit a pair to data, evaluate it on test data, and write a run folder with a report.

    Parameters
    ----------
    data
        Name of a data set (digits, docstrings, shapes, mnist, fashion-mnist, kmnist, emnist,
        omniglot, cifar10, svhn), or path of a file: a table (.csv, .tsv, .parquet, .feather),
        cells (.h5ad, .zarr), arrays (.npy, .npz), lines of text (.txt) or music (.json), or a
        folder of images. Tables, arrays with few rows, cells and text have defaults of their own.
    out
        Run folder to write. The default is runs/DATA.
    num_eval_samples
        Importance samples for the log p(x) of each test datum.
    resume
        Continue from the checkpoint in the run folder.
    overwrite
        Replace the run in the run folder.
    report
        Write report.html.
    diagnosis_seconds
        Time limit in seconds of a diagnosis of the inference, which the report shows first; 0 turns
        it off. The default is 10, or 0 with --no-report. diagnose does it with more time.
    config
        JSON file of options, or the config.json of a run. Options on the command line override it.
    """
    from pyro_vae.pairs.processes import here, single
    from pyro_vae.runs.held_out_rows import split_checksums
    from pyro_vae.training.fit import after_restart

    del config  # `read_options` has already added the options of this file.
    require_positive("num_eval_samples", num_eval_samples)
    budget = (SECONDS if report else 0.0) if diagnosis_seconds is None else diagnosis_seconds
    require_seconds("diagnosis_seconds", budget, "at least 0")
    run = out or run_of(data)
    team = here()
    resume, overwrite = after_restart(run, resume, overwrite)
    loaded = team.together(lambda: _loaded(data, run, model, source, resume))
    if loaded.schema is not None:
        print(loaded.schema, end="\n\n")
    if loaded.cells is not None and loaded.cells.schema.columns:
        print(loaded.cells.schema, end="\n\n")
    job = team.together(lambda: make_job(data, loaded, model, objective, source, settings))
    for title, words in told(loaded, model):
        print(f"{title:<20}{words}")
    with _schema_kept(run, loaded) if team.first else nullcontext():
        history = job.fit(
            out=run,
            resume=resume,
            overwrite=overwrite,
            config={"train": job.given, "split": split_checksums(loaded)},
        )
    if history.improving is not None:
        print(
            f"{'epochs':<20}the validation bound still improved, by {history.improving:.3f} nats "
            "in the last tenth of the epochs: train longer (--epochs)"
        )
    if job.standardized:
        print(f"{'standardized':<20}inside the pair (--no-standardize to change)")
    if job.binarized:
        print(f"{'binarized':<20}intensities become 0 or 1 (--binarize, --likelihood to change)")
    if holes := missing_entries(loaded):
        print(f"{'missing entries':<20}{holes}, which the likelihood leaves out")
    _measure(run, job, num_eval_samples)
    if not team.first:
        return
    with single():
        if budget:
            diagnose_trained(run, job.pair, loaded, job.given, budget, job.settings.engine)
        if report:
            report_run(run, job.pair, loaded, job.given)
            print(f"{'report':<20}{run / 'report.html'}")


def _measure(run: Path, job: "Job", num_samples: int) -> None:
    """Evaluate the trained pair, with as many rows at once as in validation."""
    from pyro_vae.pairs.memory import OutOfMemoryError

    at_once = min(500, 4 * (job.settings.batch_size or 125))
    words = (num_samples, job.settings.engine)
    try:
        measure_run(run, job.pair, job.data, job.given, *words, batch_size=at_once)
    except OutOfMemoryError as error:
        raise UsageError(
            f"the memory does not suffice to evaluate {at_once} rows at once; the pair is trained: "
            f"run pyro-vae evaluate {run} --batch-size {max(1, at_once // 2)}"
        ) from error


def _loaded(data: str, run: Path, model: Model, source: Input, resume: bool) -> "Data":
    """The data of a command; a resumed run must have the same data and kind of pair."""
    from pyro_vae.data.datasets import load_data

    recorded = recorded_options(run) if resume else {}
    require_recorded(run, recorded, model.model)
    require_groups(model.model, source.group)
    columns: Any = source.columns
    if resume and (run / "schema.toml").is_file():
        columns = _same_schema(run, source.columns)
    loaded = load_data(data, source.data_dir, source.length, columns=columns, **named_data(source))
    reject_ignored_by_data(source, loaded)
    if resume:
        require_split(run, loaded)
    return loaded


def _same_schema(run: Path, columns: Path | None) -> Any:
    """The schema of a run; raise `UsageError` if a file of changes would change it."""
    from pyro_vae.data.schema import read_schema

    schema = schema_of_run(run)
    if columns is not None and columns.is_file() and schema.changed(read_schema(columns)) != schema:
        raise UsageError(
            f"cannot change the schema of {run}, which is resumed: train a new run",
            argument="columns",
        )
    return schema


@contextmanager
def _schema_kept(run: Path, data: "Data") -> Iterator[None]:
    """Write the schema of a table into the run folder after training, also if it is stopped."""
    from pyro_vae.training.stopping import Interrupted

    try:
        yield
    except Interrupted:
        if data.schema is not None:
            write_schema(run, data)
        raise
    if data.schema is not None:
        write_schema(run, data)

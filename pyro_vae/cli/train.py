"""The command that trains a pair."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pyro_vae.cli.app import Flat, app
from pyro_vae.cli.config_file import (
    TABLE_DEFAULTS,
    read_options,
    reject_typed_ignored,
    require_typed_class,
    table_defaults,
)
from pyro_vae.cli.input import Input, reject_ignored_by_data
from pyro_vae.cli.make_objective import make_beta, make_learning_rate_schedule, make_objective
from pyro_vae.cli.make_pair import context_shapes, make_pair, require_groups
from pyro_vae.cli.make_parts import missing_entries, standardizes
from pyro_vae.cli.options import Model, Objective
from pyro_vae.cli.run import (
    context_of,
    measure_run,
    recorded_options,
    report_run,
    require_positive,
    require_recorded,
    require_split,
    schema_of_run,
    write_schema,
)
from pyro_vae.training.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from pyro_vae.data.split import Data


@app.command(config=(read_options, table_defaults, require_typed_class, reject_typed_ignored))
def train(
    data: str,
    *,
    out: Path | None = None,
    model: Annotated[Model, Flat] = Model(),  # noqa: B008
    objective: Annotated[Objective, Flat] = Objective(),  # noqa: B008
    source: Annotated[Input, Flat] = Input(),  # noqa: B008
    settings: Annotated[Settings, Flat] = Settings(),  # noqa: B008
    num_eval_samples: int = 500,
    resume: bool = False,
    overwrite: bool = False,
    report: bool = True,
    config: Path | None = None,
) -> None:
    """Fit a pair to data, evaluate it on test data, and write a run folder with a report.

    Parameters
    ----------
    data
        Name of a data set (digits, docstrings, shapes, mnist, fashion-mnist, kmnist, emnist,
        omniglot, cifar10, svhn), or path of a file: a table (.csv, .tsv, .parquet, .feather),
        arrays (.npy, .npz), lines of text (.txt) or music (.json).
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
    config
        JSON file of options, or the config.json of a run. Options on the command line override it.
    """
    from pyro_vae.data.datasets import load_data
    from pyro_vae.runs.held_out_rows import split_checksums
    from pyro_vae.training.fit import fit

    del config  # `read_options` has already added the options of this file.
    require_positive("num_eval_samples", num_eval_samples)
    run = out or Path("runs") / Path(data).stem
    recorded = recorded_options(run) if resume else {}
    require_recorded(run, recorded, model.model)
    require_groups(model.model, source.group)
    columns: Any = source.columns
    if resume and (run / "schema.toml").is_file():
        columns = schema_of_run(run)
    loaded = load_data(data, source.data_dir, source.length, columns=columns, group=source.group)
    reject_ignored_by_data(source, loaded)
    if resume:
        require_split(run, loaded)
    if loaded.schema is not None:
        model = _with_context(model, loaded)
        print(loaded.schema, end="\n\n")
        # The default for tables may be more than a small table has.
        if settings.batch_size == TABLE_DEFAULTS["batch_size"]:
            most = min(TABLE_DEFAULTS["batch_size"], len(loaded.train.x))
            settings = replace(settings, batch_size=most)
    scaled = standardizes(model, loaded, source.standardize)
    seeded_pair = _seeded_pair(model, loaded, settings, scaled)
    given = (
        {"data": data, "data_shape": loaded.shape, "num_classes": loaded.num_classes}
        | {"context_shapes": context_shapes(model, loaded)}
        | ({} if loaded.vocabulary is None else {"vocabulary": loaded.vocabulary})
        | ({} if loaded.train.lengths is None else {"ragged": True})
        | _plain(model)
        | _plain(objective)
        | _plain(source)
        | _plain(settings)
    )
    with _schema_kept(run, loaded):
        fit(
            seeded_pair,
            loaded.train.x,
            *context_of(given, loaded, loaded.train),
            validation=(
                loaded.validation.x,
                *context_of(given, loaded, loaded.validation),
            ),
            objective=make_objective(
                objective, len(loaded.train.x), _enumerated(seeded_pair, given, loaded)
            ),
            beta=make_beta(objective),
            learning_rate_schedule=make_learning_rate_schedule(objective, settings.epochs),
            binarize=source.binarize,
            out=run,
            resume=resume,
            overwrite=overwrite,
            config={"train": given, "split": split_checksums(loaded)},
            **asdict(settings),
        )
    if scaled:
        print(f"{'standardized':<20}inside the pair (--no-standardize to change)")
    if holes := missing_entries(loaded):
        print(f"{'missing entries':<20}{holes}, which the likelihood leaves out")
    measure_run(run, seeded_pair, loaded, given, num_eval_samples, settings.engine)
    if report:
        report_run(run, seeded_pair, loaded, given)
        print(f"{'report':<20}{run / 'report.html'}")


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


def _with_context(model: Model, data: "Data") -> Model:
    """The configuration that passes the context columns of a table to the pair."""
    if data.train.context is None or "context" in model.condition or ":" in model.model:
        return model
    return replace(model, condition=(*model.condition, "context"))


def _seeded_pair(model: Model, data: "Data", settings: Settings, standardize: bool) -> "nn.Module":
    from pyro_vae.pairs.rng import seeded

    with seeded(settings.seed):
        return make_pair(model, data, standardize, settings.mask_rate > 0)


def _enumerated(pair: "nn.Module", given: dict[str, Any], data: "Data") -> bool:
    """Whether a pair has discrete latents that must be summed out; False for a faulty pair."""
    from pyro_vae.data.preparation import plain_preparation
    from pyro_vae.pairs.enumeration import enumerates

    context = context_of(given, data, data.train)
    few = tuple(part[:2] for part in (data.train.x, *context))
    try:
        return enumerates(pair, plain_preparation(pair, few)(few))
    except Exception:  # `fit` checks the pair and explains what is wrong.
        return False


def _plain(settings: Any) -> dict[str, Any]:
    assert is_dataclass(settings)
    return {
        field.name: str(value) if isinstance(value, Path) else value
        for field in fields(settings)
        if (value := getattr(settings, field.name)) is not None
    }

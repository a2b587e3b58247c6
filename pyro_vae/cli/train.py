"""The command that trains a pair."""

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pyro_vae.cli.app import Flat, app
from pyro_vae.cli.config_file import (
    read_options,
    reject_typed_ignored,
    require_typed_class,
)
from pyro_vae.cli.make_objective import make_beta, make_learning_rate_schedule, make_objective
from pyro_vae.cli.make_pair import context_shapes, make_pair, require_groups
from pyro_vae.cli.options import Input, Model, Objective, reject_ignored_by_data
from pyro_vae.cli.run import (
    context_of,
    measure_run,
    recorded_options,
    report_run,
    require_positive,
    require_recorded,
    require_split,
)
from pyro_vae.training.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from pyro_vae.data.split import Data


@app.command(config=(read_options, require_typed_class, reject_typed_ignored))
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
        omniglot, cifar10, svhn), or path of a file: arrays (.npy, .npz), lines of text (.txt) or
        music (.json).
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
    loaded = load_data(data, source.data_dir, source.length, group=source.group)
    reject_ignored_by_data(source, loaded)
    if resume:
        require_split(run, loaded)
    seeded_pair = _seeded_pair(model, loaded, settings.seed)
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
    measure_run(run, seeded_pair, loaded, given, num_eval_samples, settings.engine)
    if report:
        report_run(run, seeded_pair, loaded, given)
        print(f"{'report':<20}{run / 'report.html'}")


def _seeded_pair(model: Model, data: "Data", seed: int) -> "nn.Module":
    from pyro_vae.pairs.rng import seeded

    with seeded(seed):
        return make_pair(model, data)


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

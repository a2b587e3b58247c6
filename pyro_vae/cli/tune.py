"""The command that searches for options by their validation bound."""

import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pyro_vae.cli.app import FROM_DATA, FROM_INFERENCE, FROM_MODEL, FROM_TRAINING, app
from pyro_vae.cli.config_file import (
    data_defaults,
    reject_typed_ignored,
    require_typed_class,
    run_of,
)
from pyro_vae.cli.input import Input, named_data, reject_ignored_by_data
from pyro_vae.cli.job import Job, make_job
from pyro_vae.cli.make_pair import require_groups
from pyro_vae.cli.options import Model, Objective, in_words, option_of
from pyro_vae.cli.run import require_positive
from pyro_vae.errors import UsageError
from pyro_vae.training.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

    from pyro_vae.data.split import Data
    from pyro_vae.training.history import Epoch

WIDTHS = (32, 64, 128, 256, 512)

DIMENSIONS = (1, 2, 4, 8, 16, 32, 64)

LAYERS = 3
"""The greatest number of hidden layers."""

SHOWN = 20
"""Number of trials in the table."""


@app.command(config=(data_defaults, require_typed_class, reject_typed_ignored))
def tune(
    data: str,
    *,
    trials: int = 30,
    search: tuple[Literal["latent_dim", "hidden", "learning_rate", "scale"], ...] = (
        "latent_dim",
        "hidden",
        "learning_rate",
    ),
    storage: Path | None = None,
    report: bool = False,
    model: Annotated[Model, FROM_MODEL] = Model(),  # noqa: B008
    objective: Annotated[Objective, FROM_INFERENCE] = Objective(),  # noqa: B008
    source: Annotated[Input, FROM_DATA] = Input(),  # noqa: B008
    settings: Annotated[Settings, FROM_TRAINING] = Settings(),  # noqa: B008
) -> None:
    """Search for the options with the best validation bound, by Optuna.

    Trials whose bound is below the median of earlier trials at the same epoch are stopped early.
    Run the command again to continue, or in several shells at the same time to share the trials.
    Needs the extra tune.

    Parameters
    ----------
    data
        Name or file of the data, as for train.
    trials
        Number of trials in the storage at the end, those that were stopped early included.
    search
        Options to search. latent_dim: 1 to 64, halved from level to level, for as many levels as
        --latent-dim has; hidden: one to three layers of 32 to 512 (one for text and deep-markov);
        learning_rate: 1e-4 to 1e-2; scale: predicted or learned, for --likelihood gaussian.
    storage
        File that keeps the trials. The default is runs/DATA.tune.
    report
        Only show the trials of the storage.
    """
    require_positive("trials", trials)
    optuna = _optuna()
    file = storage or Path(f"{run_of(data)}.tune")
    if report and not file.is_file():
        raise UsageError(f"must have trials, but {file} does not exist", argument="storage")
    run, rows = None, None
    if not report:
        # Wrong options and data are refused before a file is written.
        loaded = _loaded(data, search, model, source)
        run, rows = (
            _runner(optuna, data, loaded, search, model, objective, source, settings),
            loaded,
        )
    with _quiet(optuna):
        fixed = {"model": model, "objective": objective, "source": source, "settings": settings}
        study = _study(optuna, file, None if report else _words(data, search, fixed), settings.seed)
        if rows is not None:
            _require_rows(study, file, rows)
        if run is not None:
            finished = optuna.study.MaxTrialsCallback(trials, states=_finished(optuna))
            if len(study.get_trials(states=_finished(optuna))) < trials:
                study.optimize(run, callbacks=[finished, _show])
        _print(study, data, optuna)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            "tune needs Optuna, which is not installed; run pip install 'pyro-vae[tune]'"
        ) from error
    return optuna


@contextmanager
def _quiet(optuna: Any) -> "Iterator[None]":
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # errors leave as exceptions
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _finished(optuna: Any) -> tuple[Any, ...]:
    return (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


def _words(data: str, search: tuple[str, ...], fixed: Mapping[str, Any]) -> str:
    """All options of a search, to recognize it again."""
    return json.dumps({"data": data, "search": search, **fixed}, default=repr, sort_keys=True)


def _study(optuna: Any, file: Path, words: str | None, seed: int) -> "Study":
    """The study in a file. Raises `UsageError` if it was started with other options."""
    _require_journal(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(file))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="tune",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3),
    )
    # Workers that start together must not propose the same options.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    known = study.user_attrs.get("options")
    if words is not None and known is None:
        study.set_user_attr("options", words)
    elif words is not None and known != words:
        raise UsageError(
            f"{file} holds trials with other data or options; give another file",
            argument="storage",
        )
    return study


def _require_rows(study: "Study", file: Path, data: "Data") -> None:
    """Raise `UsageError` if earlier trials had other rows, or other kinds of columns."""
    from pyro_vae.runs.held_out_rows import split_checksums

    kinds = {} if data.schema is None else {"schema": data.schema.to_toml()}
    now = split_checksums(data) | kinds
    known = study.user_attrs.get("rows")
    if known is None:
        study.set_user_attr("rows", now)
    elif known != now:
        raise UsageError(
            f"{file} holds trials with the same file {data.name}, but its rows or columns have "
            "changed since then, so bounds cannot be compared; give another file",
            argument="storage",
        )


def _require_journal(file: Path) -> None:
    """Raise `UsageError` for a file that is not a journal of trials: a search appends to it."""
    try:
        lines = file.read_text().splitlines() if file.exists() else []
        entries = [json.loads(line) for line in lines]
        journal = all(isinstance(entry, dict) and "op_code" in entry for entry in entries)
    except (OSError, ValueError):
        journal = False
    if not journal:
        raise UsageError(
            f"must be a new file or a file of trials; {file} is another file or is damaged",
            argument="storage",
        )


def _loaded(name: str, search: tuple[str, ...], model: Model, source: Input) -> "Data":
    """The data of a search. Raises `UsageError` for options that do not fit."""
    from pyro_vae.data.datasets import load_data

    if "scale" in search:
        replace(model, scale="learned")  # refused for other likelihoods
    require_groups(model.model, source.group)
    data = load_data(
        name, source.data_dir, source.length, columns=source.columns, **named_data(source)
    )
    reject_ignored_by_data(source, data)
    return data


def _runner(
    optuna: Any,
    name: str,
    data: "Data",
    search: tuple[str, ...],
    model: Model,
    objective: Objective,
    source: Input,
    settings: Settings,
) -> Callable[["Trial"], float]:
    """The function of a trial: train a pair, and return its best validation bound."""
    from pyro_vae.training.stopping import NonFiniteError

    # An LSTM has one number of units.
    layers = 1 if model.model == "deep-markov" or data.vocabulary is not None else LAYERS

    def run(trial: "Trial") -> float:
        found = _proposed(trial, search, model, layers)
        of_model = {key: value for key, value in found.items() if key != "learning_rate"}
        rate = found.get("learning_rate", settings.learning_rate)
        job = make_job(
            name,
            data,
            replace(model, **of_model),
            objective,
            source,
            replace(settings, learning_rate=rate),
        )
        try:
            return _bound(optuna, trial, job)
        except NonFiniteError as error:
            raise optuna.TrialPruned(str(error)) from error

    return run


def _bound(optuna: Any, trial: "Trial", job: Job) -> float:
    def report(epoch: "Epoch") -> None:
        assert epoch.validation is not None
        trial.report(epoch.validation.bound, epoch.epoch)
        if trial.should_prune():
            raise optuna.TrialPruned

    history = job.fit(on_epoch=[report], progress=False)
    best = history.epochs[history.best_epoch - 1].validation
    assert best is not None
    return best.bound


def _proposed(
    trial: "Trial", search: tuple[str, ...], model: Model, most_layers: int
) -> dict[str, Any]:
    """Values of the options that are searched, of which the model takes each."""
    found: dict[str, Any] = {}
    if "latent_dim" in search:
        dims = [dim for dim in DIMENSIONS if dim > 1 or model.prior != "flow"]
        dim = trial.suggest_categorical("latent_dim", dims)
        found["latent_dim"] = tuple(max(1, dim // 2**i) for i in range(len(model.latent_dim)))
    if "hidden" in search:
        layers = trial.suggest_int("layers", 1, most_layers)
        width = trial.suggest_categorical("width", WIDTHS)
        found["hidden"] = tuple(max(WIDTHS[0] // 2, width // 2**i) for i in range(layers))
    if "learning_rate" in search:
        rate = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
        found["learning_rate"] = float(f"{rate:.2e}")  # the one that `_options` prints
    if "scale" in search:
        found["scale"] = trial.suggest_categorical("scale", ["predicted", "learned"])
    trial.set_user_attr("options", {name: _plain(value) for name, value in found.items()})
    return found


def _plain(value: Any) -> Any:
    return in_words(value) if isinstance(value, tuple) else value


def _show(study: "Study", trial: "FrozenTrial") -> None:
    print(_line(trial), flush=True)


def _line(trial: "FrozenTrial") -> str:
    value = "stopped early" if trial.value is None else f"{trial.value:.3f}"
    if trial.state.name == "PRUNED" and trial.intermediate_values:
        value = f"stopped, {max(trial.intermediate_values.values()):.3f}"
    return f"{trial.number:<6}{value:>18}  {_options(trial)}"


def _options(trial: "FrozenTrial") -> str:
    def word(value: Any) -> str:
        return f"{value:.2e}" if isinstance(value, float) else str(value)

    given = trial.user_attrs.get("options", {})
    return " ".join(f"{option_of(name)} {word(value)}" for name, value in given.items())


def _print(study: "Study", data: str, optuna: Any) -> None:
    """Show the best trials, and the command that trains with the best options."""
    finished = study.get_trials(states=_finished(optuna))
    complete = [trial for trial in finished if trial.value is not None]
    complete = [trial for trial in complete if trial.state.name == "COMPLETE"]
    complete.sort(key=lambda trial: -(trial.value or 0.0))
    print(f"{len(finished)} trials, {len(finished) - len(complete)} of them stopped early")
    print(f"{'trial':<6}{'validation bound':>18}  options")
    print(*map(_line, complete[:SHOWN]), sep="\n")
    if complete:
        print(f"best (add your other options): pyro-vae train {data} {_options(complete[0])}")

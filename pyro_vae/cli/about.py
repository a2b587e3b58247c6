"""Commands about whole runs: info, compare, repeat."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from pyro_vae.cli.app import RunFolder, UserClass, app
from pyro_vae.cli.diagnosis import require_distinct
from pyro_vae.cli.options import in_words, option_of
from pyro_vae.cli.run import (
    SCHEMA,
    binarize_of,
    context_of,
    load_of_run,
    open_run,
    pair_of_run,
    recorded_options,
    require_positive,
    require_split,
)
from pyro_vae.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from pyro_vae.diagnostics.comparison import Measured

_NO_OPTION = ("data", "vocabulary", "classes", "cells", "data_shape", "num_classes", "ragged")
"""What config.json records about the data, apart from the options."""


@app.command
def info(run: RunFolder, *, model: UserClass = None) -> None:
    """Say what a run is: data, pair, options, epochs, bound and verdict."""
    from pyro_vae.runs import folder as run_folder
    from pyro_vae.runs import metrics as run_metrics

    pair, given = pair_of_run(run, model)
    if (run / SCHEMA).is_file():  # the likelihood of a table is that of its columns
        given = {name: value for name, value in given.items() if name != "likelihood"}
    measured = run_metrics.read_metrics(run)
    current = measured.get("model") in (None, run_metrics.fingerprint(pair))
    named = run_folder.read_config(run)["pair"]["class"].rpartition(":")[2]
    count = sum(parameter.numel() for parameter in pair.parameters())
    lines = [
        ("data", str(given.get("data", "from memory"))),
        ("pair", f"{named}, {count:,} parameters"),
        ("options", _options(given) or "the defaults"),
        ("epochs", _epochs(run)),
        ("bound", _bound(measured) if current else "measured for other weights: run evaluate"),
        ("verdict", verdict_of(run, pair)),
    ]
    print(*(f"{title:<20}{words}" for title, words in lines), sep="\n")


@app.command
def compare(
    run: RunFolder,
    *others: Annotated[Path, Parameter(help="Further runs.")],
    num_samples: int = 500,
    seed: int = 0,
    model: UserClass = None,
) -> None:
    """Put runs side by side: bound, log p(x) with paired differences, and verdicts.

    log p(x) is computed again on the test data of each run. The verdict is that of the last
    diagnosis; diagnose RUN RUN repeats it for several runs.

    Parameters
    ----------
    num_samples
        Importance samples for the log p(x) of each datum.
    seed
        Random seed.
    """
    from pyro_vae.diagnostics.score_table import score_table

    require_positive("num_samples", num_samples)
    runs = (run, *others)
    require_distinct(runs)
    if not others:
        raise UsageError("needs at least two runs, got one; pyro-vae info describes one run")
    made = [_measured(one, num_samples, seed, model) for one in runs]
    print(score_table([measured for measured, _ in made], [verdict for _, verdict in made]))


@app.command
def repeat(run: RunFolder, *, out: Path | None = None, model: str | None = None) -> None:
    """Train again with the options and the data of a run, into a new folder.

    On the same machine with the same versions the result is the same, and the command says so.

    Parameters
    ----------
    out
        Run folder to write. The default is RUN-repeat.
    model
        module:Class, required if the pair of the run is your own.
    """
    from pyro_vae.runs import checksums, folder

    given = recorded_options(run)
    require_split(run, load_of_run(run, given, None, None))
    if "model" not in given:
        raise UsageError(f"{run} was not trained with pyro-vae train, so it records no options")
    new = out or run.parent / f"{run.name}-repeat"
    words = ["train", "--config", str(run / "config.json"), "--out", str(new)]
    # Of a table, the run knows the columns, while the file of --columns may be another one by now.
    words += ["--columns", str(run / SCHEMA)] if (run / SCHEMA).is_file() else []
    words += ["--model", model] if model else []
    command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    command(*bound.args, **bound.kwargs)
    prints = [checksums.fingerprint(folder.read_model(one)) for one in (run, new)]
    same = "equal those of" if prints[0] == prints[1] else "differ from those of"
    why = "" if prints[0] == prints[1] else " (another machine, versions or number of threads)"
    print(f"{'weights':<20}{same} {run}{why}")


def verdict_of(run: Path, pair: "nn.Module") -> str:
    """What the last diagnosis of a run found, if it is about these weights."""
    from pyro_vae.runs import metrics as run_metrics

    found = run_metrics.read_metrics(run).get("diagnostics")
    if found is None:
        return "not diagnosed"
    if found.get("model") not in (None, run_metrics.fingerprint(pair)):
        return "diagnosed for other weights"
    told = [
        blame["part"] + ("" if blame["nats"] is None else f" ({blame['nats']:.2f})")
        for blame in found.get("blamed", ())
    ]
    return ", ".join(told) or "no part, as far as checked"


def _measured(run: Path, samples: int, seed: int, model: str | None) -> tuple["Measured", str]:
    from pyro_vae.diagnostics.comparison import Measured, scored
    from pyro_vae.inference.importance import log_likelihood

    pair, data, given = open_run(run, model=model)
    x, context, how = data.test.x, context_of(given, data, data.test), binarize_of(given)
    found = log_likelihood(pair, x, *context, num_samples=samples, seed=seed, binarize=how)
    about = scored(pair, x, *context, binarize=how)
    return Measured(str(run), found, about), verdict_of(run, pair)


def _options(given: dict[str, Any]) -> str:
    """The recorded options that differ from the defaults, as they are typed."""
    from dataclasses import fields

    from pyro_vae.cli.input import Input
    from pyro_vae.cli.options import Model, Objective
    from pyro_vae.training.settings import Settings

    usual = {
        one.name: one.default
        for kind in (Model, Objective, Input, Settings)
        for one in fields(kind)
    }
    told = []
    for name, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if name in usual and name not in _NO_OPTION and value != usual[name]:
            told.append(_typed(name, value))
    return " ".join(told)


def _typed(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return option_of(name if value else f"no_{name}")
    return f"{option_of(name)} {in_words(value)}"


def _epochs(run: Path) -> str:
    """The number of epochs, and the epoch with the best bound on validation data."""
    from pyro_vae.runs import files
    from pyro_vae.runs.history_file import read_history

    path = run / files.HISTORY
    if not path.exists():
        return f"unknown: no {files.HISTORY}"
    history = read_history(path)
    bounds = history.get("validation_bound")
    best = f", best {1 + bounds.index(max(bounds))}" if bounds else ""
    return f"{len(history.get('epoch', ()))}{best}"


def _bound(measured: dict[str, Any]) -> str:
    from pyro_vae.pairs.formatting import with_error

    if measured.get("elbo") is None:
        return "not measured: run evaluate"
    errors = ("log_likelihood_total_error", "log_likelihood_standard_error")
    for name in ("elbo", "log_likelihood", *errors):
        if not isinstance(measured.get(name) or 0.0, int | float):
            raise UsageError(f"metrics.json: '{name}' must be a number, got {measured[name]!r}")
    words = f"ELBO {measured['elbo']:.3f} nats per example"
    if (value := measured.get("log_likelihood")) is not None:
        known = [measured[name] for name in errors if measured.get(name) is not None]
        words += f", log p(x) ≥ {with_error(value, *known[:1] or [float('nan')])}"
    return words

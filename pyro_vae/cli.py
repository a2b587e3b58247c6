"""The command line: the same words as the Python functions, on run folders.

Options come from the typed configuration in `pyro_vae.config`. Nothing heavy is imported until a
command runs.
"""

import json
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict as ConfigDict

from pyro_vae import config as configuration
from pyro_vae.config import EngineName, Input, Model, Objective, Settings
from pyro_vae.errors import UsageError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyro_vae.datasets import Data, Split

Flat = Parameter(name="*")
Run = Annotated[Path, Parameter(help="A run folder.")]
UserClass = Annotated[
    str | None, Parameter(help="module:Class, where the run's pair is one of your own.")
]


def _default(value: Any) -> str | None:
    """A default as it would be typed; of one that is None, the help says what it means."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return None if value is None else str(value)


MANY = Parameter(consume_multiple=True, show_default=_default)

app = App(
    name="pyro-vae",
    help="Variational autoencoders as Pyro programs: train, evaluate, use.",
    default_parameter=MANY,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error of use is one line on standard error and status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        words, file = _config_file(words)
        app.config = [*([] if file is None else [file]), _require_typed_class, _require_heard]
        # A class of the user's own may import its neighbors whenever it runs.
        typed_class = any(re.fullmatch(r"(--model=)?[\w.]+:\w+", word) for word in words)
        here = configuration.current_folder() if typed_class else nullcontext()
        with here, warnings.catch_warnings():
            show = warnings.showwarning

            def one_line(message: Any, category: Any, *rest: Any, **more: Any) -> None:
                if category is UserWarning:
                    print(f"pyro-vae: {message}", file=sys.stderr)
                else:
                    show(message, category, *rest, **more)

            warnings.showwarning = one_line
            app(words, exit_on_error=False, print_error=False)
    except UsageError as error:
        _fail(_as_options(str(error), words))
    except CycloptsError as error:
        _fail(_one_line(str(error)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as error:
        print(f"pyro-vae: {error or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


@app.command
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
    """Fit a pair to data, evaluate it on the test part, and write a run folder with a report.

    Parameters
    ----------
    data
        A name (digits, docstrings, shapes, mnist, fashion-mnist, kmnist, emnist, omniglot, cifar10,
        svhn) or the path of a .npy or .npz file, of a .txt file of lines, or of music as .json.
    out
        The run folder; runs/DATA by default.
    num_eval_samples
        Importance samples for log p(x) of each test datum.
    resume
        Go on from the checkpoint in the run folder.
    overwrite
        Replace a run that is in the run folder.
    report
        Write report.html.
    config
        A JSON file of options, or a run's config.json; options given here override it.
    """
    from pyro_vae.datasets import load_data
    from pyro_vae.held_out_rows import split_checksums
    from pyro_vae.training import fit

    assert config is None  # `_config_file` has put its options in place
    _positive("num_eval_samples", num_eval_samples)
    run = out or Path("runs") / Path(data).stem
    recorded = _recorded(run) if resume else {}
    _require_recorded(run, recorded, model.model)
    loaded = load_data(data, source.data_dir, source.length)
    configuration.require_data(source, loaded)
    if resume:
        _require_split(run, loaded)
    seeded_pair = _seeded_pair(model, loaded, settings.seed)
    given = (
        {"data": data, "data_shape": loaded.shape, "num_classes": loaded.num_classes}
        | {"context_shapes": configuration.context_shapes(model, loaded)}
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
        *_context(given, loaded, loaded.train),
        validation=(
            loaded.validation.x,
            *_context(given, loaded, loaded.validation),
        ),
        objective=configuration.make_objective(
            objective, len(loaded.train.x), _enumerated(seeded_pair, given, loaded)
        ),
        beta=configuration.make_beta(objective),
        learning_rate_schedule=configuration.make_learning_rate_schedule(
            objective, settings.epochs
        ),
        binarize=source.binarize,
        out=run,
        resume=resume,
        overwrite=overwrite,
        config={"train": given, "split": split_checksums(loaded)},
        **asdict(settings),
    )
    _evaluate(run, seeded_pair, loaded, given, num_eval_samples, settings.engine)
    if report:
        _report(run, seeded_pair, loaded, given)
        print(f"{'report':<20}{run / 'report.html'}")


@app.command
def evaluate(
    run: Run,
    *,
    data: str | None = None,
    data_dir: Path | None = None,
    model: UserClass = None,
    num_samples: int = 500,
    engine: EngineName = "auto",
) -> None:
    """Measure a run on the test part of its data: ELBO, log p(x), KL, active units, a probe.

    Parameters
    ----------
    data
        Other data than those of training.
    data_dir
        Folder of torchvision's files.
    num_samples
        Importance samples for log p(x) of each datum.
    engine
        How log p(x) is computed: eager, traced or compiled; auto goes by the work to be done.
    """
    pair, loaded, given = _open(run, data, data_dir, model)
    kept = _current_findings(run, pair) | (_seen(run, loaded) if data is not None else {})
    _evaluate(run, pair, loaded, given, num_samples, engine, kept)


@app.command
def diagnose(
    run: Run,
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
    """Say whether a run's inference can be believed, into metrics.json, figures and the report.

    Parameters
    ----------
    num
        How many test data.
    budget
        Seconds; what is left out for lack of time is said.
    data
        Other data than those of training.
    other
        Data that do not belong, whose outlier scores are held against those of the test data.
    data_dir
        Folder of torchvision's files.
    engine
        How weights and gradients are computed: eager, traced or compiled; auto goes by the work to
        be done.
    seed
        Of all draws.
    report
        Write report.html anew.
    """
    from pyro_vae import plots, runs
    from pyro_vae.diagnosis import diagnose as run_diagnose

    _positive("num", num)
    pair, loaded, given = _open(run, data, data_dir, model)
    x, context = _test(loaded, given, num)
    strangers = None
    if other is not None:
        rows, others = _test(_load(run, given, other, data_dir), given, num)
        strangers = (rows, *others)
    found = run_diagnose(
        pair,
        x,
        *context,
        other=strangers,
        budget=budget,
        binarize=_binarize(given),
        engine=engine,
        seed=seed,
    )
    seen = _seen(run, loaded) if data is not None else {}
    record = {"data": loaded.name, "model": runs.fingerprint(pair)} | seen | found.as_dict()
    if "vocabulary" in given and "log_likelihood" in found.results:
        worst = plots.lines([("", x[found.worst()])], given["vocabulary"])
        record["worst_data"] = worst
    for name, figure in found.figures.items():
        with runs.atomic(run / runs.FIGURES / f"{runs.DIAGNOSIS}{name}.png") as file:
            file.write(plots.png(figure))
    metrics = runs.read_metrics(run)
    runs.write_json(run / runs.METRICS, metrics | {"diagnostics": record})
    if report:
        _report(run, pair, loaded, given)
    print(found)
    if report:
        print(f"\n{'report':<20}{run / 'report.html'}")


@app.command
def sample(
    run: Run,
    *,
    num: int = 64,
    label: int | None = None,
    means: bool = False,
    seed: int = 0,
    model: UserClass = None,
) -> None:
    """Draw data from the model, into samples.npy and figures/samples.png.

    Parameters
    ----------
    num
        How many.
    label
        Of this class, for a conditional pair; of each class in turn by default. Or of this value of
        a discrete latent. Other context is that of the test data, in turn.
    means
        Means of the data given their latents, instead of draws.
    seed
        Of the draws.
    """
    from pyro_vae import inference

    _positive("num", num)
    pair, given = _pair(run, model)
    conditional = "label" in given.get("condition", ())
    context = _asked(run, given, num, label, model)
    if label is None or conditional:
        images = inference.sample(pair, num, context, means=means, seed=seed)
    else:
        values = _of_class(run, pair, num, label)
        images = inference.decode(pair, values, context, means=means, seed=seed)
    _write(run, given, "samples", images, [("", part) for part in images[:100].split(10)])


@app.command
def reconstruct(run: Run, *, num: int = 12, model: UserClass = None) -> None:
    """Encode and decode test data, into reconstructions.npy and figures/reconstructions.png.

    Parameters
    ----------
    num
        How many test data.
    """
    from pyro_vae import inference, plots

    _positive("num", num)
    pair, loaded, given = _open(run, model=model)
    x, context = _test(loaded, given, num)
    images = inference.reconstruct(pair, x, *context, binarize=_binarize(given))
    rows = [("data", plots.intensity(x)[:16]), ("reconstruction", images[:16])]
    _write(run, given, "reconstructions", images, rows, across=True)


@app.command
def encode(run: Run, *, part: str = "test", model: UserClass = None) -> None:
    """Encode data, into codes.npz: posterior means and scales of each latent site, and labels.

    Parameters
    ----------
    part
        train, validation or test.
    """
    import io

    import numpy as np

    from pyro_vae import inference, runs

    pair, loaded, given = _open(run, model=model)
    if part not in ("train", "validation", "test"):
        raise UsageError(f"part is train, validation or test, '{part}' came")
    split: Split = getattr(loaded, part)
    context = _context(given, loaded, split)
    arrays: dict[str, Any] = {}
    for what in ("mean", "scale"):
        codes = inference.encode(
            pair,
            split.x,
            *context,
            what=what,
            binarize=_binarize(given),
        )
        arrays |= {f"{name}_{what}": code.cpu().numpy() for name, code in codes.items()}
    if split.labels is not None:
        arrays["labels"] = split.labels.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with runs.atomic(run / "codes.npz") as file:
        file.write(buffer.getvalue())
    print(run / "codes.npz")


@app.command
def interpolate(run: Run, *, num: int = 6, steps: int = 9, model: UserClass = None) -> None:
    """Decode lines between codes of test data: interpolations.npy, figures/interpolations.png.

    Parameters
    ----------
    num
        How many lines.
    steps
        Points on each.
    """
    from pyro_vae import inference

    _positive("num", num)
    pair, loaded, given = _open(run, model=model)
    x, context = _test(loaded, given, 2 * num)
    half = len(x) // 2
    lines = inference.interpolate(
        pair,
        x[:half],
        x[half : 2 * half],
        *(part[:half] for part in context),
        steps=steps,
        binarize=_binarize(given),
    )
    _write(run, given, "interpolations", lines, [("", line) for line in lines])


@app.command
def traverse(
    run: Run, *, index: int = 0, span: float = 3.0, steps: int = 11, model: UserClass = None
) -> None:
    """Move one latent unit at a time: traversals.npy, figures/traversals.png.

    Parameters
    ----------
    index
        Which test datum to start from.
    span
        Each unit goes from minus this to this.
    steps
        Values of each unit.
    """
    import torch

    from pyro_vae import inference

    _positive("steps", steps)
    pair, loaded, given = _open(run, model=model)
    if not 0 <= index < len(loaded.test.x):
        raise UsageError(f"index is 0 to {len(loaded.test.x) - 1}, {index} came")
    x, context = _test(loaded, given, len(loaded.test.x))
    lines = inference.traverse(
        pair,
        x[index : index + 1],
        *(part[index : index + 1] for part in context),
        values=torch.linspace(-span, span, steps).tolist(),
        binarize=_binarize(given),
    )
    _write(run, given, "traversals", lines, [(f"unit {i}", line) for i, line in enumerate(lines)])


@app.command
def report(run: Run, *, model: UserClass = None) -> None:
    """Write report.html anew, with its figures inside it."""
    pair, loaded, given = _open(run, model=model)
    _report(run, pair, loaded, given)
    print(run / "report.html")


@app.command
def check(
    model: str,
    *,
    data: str = "digits",
    data_dir: Path | None = None,
    condition: tuple[Literal["label", "context"], ...] = (),
) -> None:
    """Run a pair of your own once on data, and explain in words what would go wrong.

    Parameters
    ----------
    model
        module:Class.
    data
        The data it is for.
    data_dir
        Folder of torchvision's files.
    condition
        What is given as context: labels, the "context" of the data file, or both.
    """
    from pyro_vae.datasets import load_data
    from pyro_vae.preflight import check as run_check

    loaded = load_data(data, data_dir)
    if ":" not in model:
        raise UsageError(f"a pair is named module:Class, '{model}' came")
    pair = configuration.make_pair(Model(model=model, condition=condition), loaded)
    given = {"condition": condition, "num_classes": loaded.num_classes}
    x, context = loaded.train.x[:16], _context(given, loaded, loaded.train)
    found = run_check(pair, (x, *(part[:16] for part in context)))
    if found.errors:
        raise UsageError("; ".join(found.errors))
    print(found)


@app.command
def selftest() -> None:
    """Hold every estimator against exact answers on this machine; status 1 where one is wrong."""
    from pyro_vae.self_test import selftest as run_selftest

    found = run_selftest()
    print(found)
    if not found.passed:
        sys.exit(1)


def _seeded_pair(model: Model, data: "Data", seed: int) -> "nn.Module":
    from pyro_vae.rng import seeded

    with seeded(seed):
        return configuration.make_pair(model, data)


def _evaluate(
    run: Path,
    pair: "nn.Module",
    data: "Data",
    given: dict[str, Any],
    num_samples: int,
    engine: str,
    kept: Mapping[str, Any] | None = None,
) -> None:
    from pyro_vae import runs
    from pyro_vae.evaluation import evaluate as measure

    result = measure(
        pair,
        data.test.x,
        *_context(given, data, data.test),
        labels=data.test.labels,
        train=(data.train.x, *_context(given, data, data.train)),
        train_labels=data.train.labels,
        num_samples=num_samples,
        binarize=_binarize(given),
        engine=engine,
        progress=True,
    )
    metrics = {"data": data.name} | result.as_dict() | dict(kept or {})
    runs.write_metrics(run, pair, metrics)
    print(result)


def _report(run: Path, pair: "nn.Module", data: "Data", given: dict[str, Any]) -> None:
    from pyro_vae.report import write_report

    x, context = _test(data, given, 2000)
    labels = None if data.test.labels is None else data.test.labels[:2000]
    write_report(run, pair, x, *context, labels=labels)


def _current_findings(run: Path, pair: "nn.Module") -> dict[str, Any]:
    """What `diagnose` found, for metrics.json, unless it is about other weights."""
    from pyro_vae import runs

    found = runs.read_metrics(run).get("diagnostics")
    if found is None:
        return {}
    if found.get("model", (now := runs.fingerprint(pair))) != now:
        warnings.warn(
            f"{run / runs.METRICS} had findings of diagnose on other weights: they are left out, "
            "run diagnose again",
            stacklevel=2,
        )
        return {}
    return {"diagnostics": found}


def _seen(run: Path, data: "Data") -> dict[str, int]:
    """For metrics: how many test rows of other data a run was trained on, with a warning."""
    from pyro_vae import held_out_rows, runs

    if not held_out_rows.changed_parts(_split_of(runs.read_config(run)), data):
        return {}
    seen = held_out_rows.count_seen(run, data.test.x)
    if seen:
        warnings.warn(
            f"{seen} of {len(data.test.x)} test rows of {data.name} equal rows that {run} was "
            "trained on or validated with: the numbers are not those of held-out data alone",
            stacklevel=2,
        )
    return {} if seen is None else {"rows_trained_on": seen}


def _split_of(config: dict[str, Any]) -> dict[str, Any]:
    """The checksums of the parts of a run's data, none where none were recorded."""
    split = config.get("split") or {}
    return split if isinstance(split, dict) else {"train": None}


def _require_split(run: Path, data: "Data") -> None:
    from pyro_vae import held_out_rows, runs

    if split := _split_of(runs.read_config(run)):
        held_out_rows.require_split(run, split, data)


_RECORDED: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("data", "model", "data_dir", "vocabulary", "binarize"), str),
    **dict.fromkeys(("num_classes", "num_labels", "length", "seed"), int),
    **dict.fromkeys(("data_shape", "context_shapes", "condition", "hidden"), list),
    "latent_dim": (list, int),
}
"""The types of the options in config.json that commands read."""


def _recorded(run: Path) -> dict[str, Any]:
    """The options that a run was trained with, as far as config.json records them."""
    from pyro_vae import runs

    given = runs.read_config(run).get("train", {})
    if not isinstance(given, dict):
        raise UsageError(f"{run / runs.CONFIG}: 'train' must be an object of options")
    for name, kind in _RECORDED.items():
        if given.get(name) is not None and not isinstance(given[name], kind):
            raise UsageError(f"{run / runs.CONFIG}: '{name}' cannot be {given[name]!r}")
    return given


def _require_recorded(run: Path, given: dict[str, Any], model: str) -> None:
    """Raise `UsageError` for another kind of pair than the run was trained with."""
    recorded = given.get("model", model)
    if model != recorded:
        raise UsageError(f"{run} was trained with --model {recorded}, --model {model} was given")


def _pair(run: Path, model: str | None) -> tuple["nn.Module", dict[str, Any]]:
    from pyro_vae import runs

    given = _recorded(run)
    if model is None:
        return runs.load(run), given
    _require_recorded(run, given, model)
    own = ":" in model or "model" not in given
    return runs.load(run, _user_pair(model, given) if own else None), given


def _user_pair(model: str, given: dict[str, Any]) -> "nn.Module":
    """A pair of a user's own, made as `train` made it."""
    arguments = {
        "data_shape": tuple(given.get("data_shape", ())),
        "latent_dim": configuration.plain_dim(given.get("latent_dim", Model.latent_dim)),
        "hidden": tuple(given.get("hidden", Model.hidden)),
        "context_shapes": tuple(map(tuple, given.get("context_shapes", ()))),
        "num_classes": given.get("num_classes", 0),
    }
    return configuration.make_user_pair(model, arguments)


def _open(
    run: Path, data: str | None = None, data_dir: Path | None = None, model: str | None = None
) -> tuple["nn.Module", "Data", dict[str, Any]]:
    """The pair of a run, its data, and the options it was trained with.

    Data that are not named must be those that it was trained on.
    """
    pair, given = _pair(run, model)
    loaded = _load(run, given, data, data_dir)
    if data is None:
        _require_split(run, loaded)
    return pair, loaded, given


def _load(run: Path, given: dict[str, Any], data: str | None, data_dir: Path | None) -> "Data":
    """A run's data, or others that are cut into tokens as its were."""
    from pyro_vae.datasets import load_data

    name = data or given.get("data")
    if name is None:
        raise UsageError(f"{run} does not record its data: name them with --data")
    folder = data_dir or given.get("data_dir")
    vocabulary, length = given.get("vocabulary"), given.get("length", Input.length)
    if vocabulary is not None:
        (length,) = given["data_shape"]
    return load_data(name, folder, length, vocabulary)


def _test(data: "Data", given: dict[str, Any], n: int) -> tuple["Tensor", list["Tensor"]]:
    context = _context(given, data, data.test)
    return data.test.x[:n], [part[:n] for part in context]


def _context(given: dict[str, Any], data: "Data", split: "Split") -> list["Tensor"]:
    """What a run gives to its pair beside the data: labels, the file's context, library sizes."""
    context: list[Tensor] = []
    if given.get("num_labels") is not None:
        from pyro_vae.datasets import hide_labels

        kept = given["num_labels"] if split is data.train else 0
        context.append(hide_labels(_labels(given, data, split), kept, given.get("seed", 0)))
    if "label" in given.get("condition", ()):
        context.append(_one_hot(given, data, split))
    if "context" in given.get("condition", ()):
        if split.context is None:
            raise UsageError(f"--condition context needs an array 'context', {data.name} has none")
        context.append(split.context)
    if given.get("library_size"):
        totals = split.x.flatten(1).double().sum(1, keepdim=True)
        if not bool((totals > 0).all()):
            raise UsageError(f"{data.name} has a row of total {totals.min():g}: no library size")
        context.append(totals.log().float())
    if split.lengths is not None:
        context.append(split.lengths)
    return context


def _enumerated(pair: "nn.Module", given: dict[str, Any], data: "Data") -> bool:
    """Whether a pair has discrete latents to be summed out; what is no pair has none."""
    from pyro_vae.data import Preparation
    from pyro_vae.enumeration import enumerates
    from pyro_vae.pairs import placement

    context = _context(given, data, data.train)
    few = tuple(part[:2] for part in (data.train.x, *context))
    try:
        return enumerates(pair, Preparation(*placement(pair))(few))
    except Exception:  # `fit` checks the pair, and says in words what is wrong
        return False


def _one_hot(given: dict[str, Any], data: "Data", split: "Split") -> "Tensor":
    from pyro_vae.datasets import one_hot

    return one_hot(_labels(given, data, split), given["num_classes"])


def _labels(given: dict[str, Any], data: "Data", split: "Split") -> "Tensor":
    if split.labels is None:
        raise UsageError(f"the run needs labels, {data.name} has none")
    classes = given["num_classes"]
    if data.num_classes > classes:
        raise UsageError(
            f"the run knows labels 0 to {classes - 1}, {data.name} goes to {data.num_classes - 1}"
        )
    return split.labels


def _of_class(run: Path, pair: "nn.Module", num: int, label: int) -> dict[str, "Tensor"]:
    """The first discrete latent of a pair, with this value in every row."""
    from pyro_vae.enumeration import values
    from pyro_vae.pairs import template

    found = values(pair, template(pair, 2))
    if not found:
        raise UsageError(
            f"{run} is not conditional on a label and has no classes: train with "
            "--condition label, --model semi-supervised or --model mixture"
        )
    name, every = next(iter(found.items()))
    if not 0 <= label < len(every):
        raise UsageError(f"label is 0 to {len(every) - 1}, {label} came")
    return {name: every[label].expand(num, *every.shape[1:])}


def _asked(
    run: Path, given: dict[str, Any], num: int, label: int | None, model: str | None
) -> list["Tensor"]:
    """The context of so many samples: the label, or each in turn, and that of test data."""
    import torch

    from pyro_vae.datasets import one_hot

    context: list[Tensor] = []
    condition, classes = tuple(given.get("condition", ())), given.get("num_classes", 0)
    if "label" in condition:
        if label is not None and not 0 <= label < classes:
            raise UsageError(f"label is 0 to {classes - 1}, {label} came")
        labels = torch.arange(num) % classes if label is None else torch.full((num,), label)
        context.append(one_hot(labels, classes))
    if "context" in condition or given.get("library_size") or given.get("ragged"):
        data = _open(run, model=model)[1]
        rows = torch.arange(num) % len(data.test.x)
        others = _context(given, data, data.test)[len(context) :]
        context += [part[rows] for part in others]
    return context


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{name} must be 1 or more, {value} came")


def _binarize(given: dict[str, Any]) -> str:
    return given.get("binarize", "dynamic")


def _write(
    run: Path,
    given: dict[str, Any],
    name: str,
    array: "Tensor",
    rows: list[tuple[str, "Tensor"]],
    across: bool = False,
) -> None:
    """An array as NAME.npy, and as figures/NAME.png or, where it is text, NAME.txt in words."""
    import io

    import numpy as np
    import torch

    from pyro_vae import plots, runs

    like = torch.empty(1, *given.get("data_shape", ()))
    array, rows = plots.alike(array, like), [(label, plots.alike(x, like)) for label, x in rows]
    buffer = io.BytesIO()
    np.save(buffer, array.cpu().numpy())
    with runs.atomic(run / f"{name}.npy") as file:
        file.write(buffer.getvalue())
    if "vocabulary" in given:
        text = plots.lines(rows, given["vocabulary"], across)
        with runs.atomic(run / f"{name}.txt") as file:
            file.write(f"{text}\n".encode())
        print(run / f"{name}.npy")
        print(run / f"{name}.txt", text, sep="\n\n")
        return
    with runs.atomic(run / runs.FIGURES / f"{name}.png") as file:
        file.write(plots.png(plots.grid(rows, name)))
    print(run / f"{name}.npy")
    print(run / runs.FIGURES / f"{name}.png")


def _plain(settings: Any) -> dict[str, Any]:
    assert is_dataclass(settings)
    return {
        field.name: str(value) if isinstance(value, Path) else value
        for field in fields(settings)
        if (value := getattr(settings, field.name)) is not None
    }


def _config_file(words: list[str]) -> tuple[list[str], Any]:
    """Take ``--config FILE`` out of the words; its options stand where the words give none."""
    words = [part for word in words for part in _split(word)]
    if words[:1] != ["train"]:
        return words, None
    resumed = "--config" not in words and "--resume" in words
    if resumed:
        words = [*words, *_config_of_run(words)]
    if "--config" not in words:
        return words, None
    at = words.index("--config")
    if at + 1 >= len(words):
        raise UsageError("--config takes a JSON file, none came")
    path = Path(words[at + 1])
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON ({error})") from error
    options = content.get("train", content) if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise UsageError(f"{path}: an object of options is expected")
    known = [field.name for kind in (Model, Objective, Input, Settings) for field in fields(kind)]
    # A run does not say where it is: a copy of it would write into the first one.
    known += ["data", "num_eval_samples", "report", *(() if resumed else ("out",))]
    # What a run records of its data:
    recorded = ("num_classes", "data_shape", "context_shapes", "vocabulary", "ragged")
    for name in options:
        if name not in (*known, *recorded):
            raise UsageError(f"{path}: there is no option '{name}'; {nearest(name, known)}")
    kept = {k.replace("_", "-"): v for k, v in options.items() if k not in recorded}
    # The name of this option is that of a command too, which the library would skip.
    if kept.pop("report", True) is False and "--report" not in words:
        words = [*words, "--no-report"]
    file = ConfigDict(kept, use_commands_as_keys=False, source=str(path))
    return words[:at] + words[at + 2 :], file


def _require_typed_class(_: App, commands: Sequence[str], arguments: Any) -> None:
    """Refuse a class of a user's own that a file names: only one that is typed is imported."""
    for argument in arguments if tuple(commands) == ("train",) else ():
        for token in argument.tokens if _python(argument.name) == "model" else ():
            if token.source != "cli" and ":" in token.value:
                raise UsageError(
                    f"{token.source} names the class '{token.value}', and no file makes a command "
                    f"import a module: if you trust it, type --model {token.value}"
                )


def _require_heard(_: App, commands: Sequence[str], arguments: Any) -> None:
    """Refuse options that nothing hears of what is chosen, typed as they are by default too."""
    if tuple(commands) != ("train",):
        return
    named = {_python(argument.name): argument for argument in arguments}
    configuration.require_heard(
        [name for name, one in named.items() if any(token.source == "cli" for token in one.tokens)],
        {
            name: one.tokens[-1].value if one.tokens else one.field_info.default
            for name, one in named.items()
        },
    )


def _as_options(message: str, words: Sequence[str]) -> str:
    """A message in which arguments of Python stand as the options of the command that give them."""
    command = words[0] if words else ""
    options = app[command].assemble_argument_collection() if command in list(app) else []
    for name in (one.name for one in options if one.name.startswith("--")):
        word = _python(name)
        free = (
            rf"(?<![\w'\"./-]){word}(?![\w'\"./=(])" if "_" in word else rf"^{word}(?= (is|must) )"
        )
        message = re.sub(free, name, message)
    elbo = r"\b(use|or) (Trace_ELBO|pyro_vae\.EnumeratedELBO)\b"
    return re.sub(elbo, r"\1 --objective elbo", message)


def _python(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _split(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith(("--config=", "--out=")) else [word]


def _config_of_run(words: list[str]) -> list[str]:
    """A resumed run takes the options that are not given from its own configuration."""
    data = next((word for word in words[1:2] if not word.startswith("-")), "")
    run = Path("runs") / Path(data).stem
    if "--out" in words[:-1]:
        run = Path(words[words.index("--out") + 1])
    return ["--config", str(run / "config.json")] if (run / "config.json").is_file() else []


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _fail(message: str) -> None:
    print(f"pyro-vae: {_one_line(message)}", file=sys.stderr)
    sys.exit(2)

"""Functions that commands share: open a run with its data and context, measure and report it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.cli.baseline import NONE, baseline_of, in_words
from pyro_vae.cli.config_file import CELLS
from pyro_vae.cli.input import Input
from pyro_vae.cli.make_pair import make_user_pair, plain_dim
from pyro_vae.cli.options import Model
from pyro_vae.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyro_vae.data.schema import Schema
    from pyro_vae.data.split import Data, Split


def measure_run(
    run: Path,
    pair: "nn.Module",
    data: "Data",
    given: dict[str, Any],
    num_samples: int,
    engine: str,
    kept: Mapping[str, Any] | None = None,
    part: str = "test",
    batch_size: int = 500,
) -> None:
    """Measure a part of the data, and write and print what is found.

    A probe is fitted to training rows, so it scores only rows of the other parts.
    """
    from pyro_vae.data.split import part_of
    from pyro_vae.diagnostics.evaluation import evaluate as measure
    from pyro_vae.pairs.processes import here
    from pyro_vae.runs import metrics as run_metrics

    split = data.test if part == "test" else part_of(data, part)
    train = data.train
    apart = part in ("test", "validation")
    result = measure(
        pair,
        split.x,
        *context_of(given, data, split),
        labels=split.labels,
        train=(train.x, *context_of(given, data, train)) if apart else None,
        train_labels=train.labels if apart else None,
        num_samples=num_samples,
        batch_size=batch_size,
        binarize=binarize_of(given),
        engine=engine,
        progress=True,
    )
    members = _by_member(result.log_likelihood, split) if given.get("group") else {}
    named = {"data": data.name} | ({} if part == "test" else {"part": part})
    simple = baseline_of(data, split, given) if apart else None
    beside = {} if simple is None else {"baseline": simple._asdict()}
    metrics = named | result.as_dict() | members | beside | dict(kept or {})
    if here().first:
        run_metrics.write_metrics(run, pair, metrics)
    print(result)
    if apart:
        words = NONE if simple is None else in_words(simple, result.log_likelihood)
        print(f"{'baseline':<20}{words}")
    for value in members.values():
        print(f"{'log p(x) by member':<20}{value:.3f}")


def _by_member(log_likelihood: float, split: "Split") -> dict[str, float]:
    """The log-likelihood of groups, divided by the number of their members."""
    sizes = split.lengths
    assert sizes is not None
    return {"log_likelihood_by_member": log_likelihood * len(sizes) / int(sizes.sum())}


def report_run(run: Path, pair: "nn.Module", data: "Data", given: dict[str, Any]) -> None:
    from pyro_vae.report.report import write_report

    x, context = test_part(data, given, 2000)
    labels = None if data.test.labels is None else data.test.labels[:2000]
    ids, known = None, data.table or data.cells
    if known is not None and data.test.rows is not None:
        ids = [known.ids[row] for row in data.test.rows[:2000].tolist()]
    write_report(pair, x, *context, run=run, labels=labels, ids=ids)


def split_of(config: dict[str, Any]) -> dict[str, Any]:
    """The checksums of the parts of the data of a run; empty if the run does not record them."""
    split = config.get("split") or {}
    return split if isinstance(split, dict) else {"train": None}


def require_split(run: Path, data: "Data") -> None:
    from pyro_vae.runs import folder as run_folder
    from pyro_vae.runs import held_out_rows

    if split := split_of(run_folder.read_config(run)):
        held_out_rows.require_split(run, split, data)


_RECORDED: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("data", "model", "data_dir", "vocabulary", "binarize", "group", "layer"), str),
    **dict.fromkeys(("num_classes", "num_labels", "length", "seed"), int),
    **dict.fromkeys(("data_shape", "context_shapes", "condition", "hidden", "image_size"), list),
    **dict.fromkeys(("color", "crop"), bool),
    "latent_dim": (list, int),
    "cells": dict,
}
"""The types of those options in config.json that commands read."""


def recorded_options(run: Path) -> dict[str, Any]:
    """The training options of a run, as far as config.json records them."""
    from pyro_vae.runs import files as run_files
    from pyro_vae.runs import folder as run_folder

    given = run_folder.read_config(run).get("train", {})
    if not isinstance(given, dict):
        raise UsageError(f"{run / run_files.CONFIG}: 'train' must be a JSON object of options")
    for name, kind in _RECORDED.items():
        if given.get(name) is not None and not isinstance(given[name], kind):
            raise UsageError(f"{run / run_files.CONFIG}: '{name}' must not be {given[name]!r}")
    return given


def require_recorded(run: Path, given: dict[str, Any], model: str) -> None:
    """Raise `UsageError` if the run was trained with another kind of pair."""
    recorded = given.get("model", model)
    if model != recorded:
        raise UsageError(f"{run} was trained with --model {recorded}, got --model {model}")


def pair_of_run(run: Path, model: str | None) -> tuple["nn.Module", dict[str, Any]]:
    from pyro_vae.runs import folder as run_folder

    given = recorded_options(run)
    if model is None:
        return run_folder.load(run), given
    require_recorded(run, given, model)
    own = ":" in model or "model" not in given
    return run_folder.load(run, _user_pair(model, given) if own else None), given


def _user_pair(model: str, given: dict[str, Any]) -> "nn.Module":
    """A pair of the user's own, made in the same way as in `train`."""
    arguments = {
        "data_shape": tuple(given.get("data_shape", ())),
        "latent_dim": plain_dim(given.get("latent_dim", Model.latent_dim)),
        "hidden": tuple(given.get("hidden", Model.hidden)),
        "context_shapes": tuple(map(tuple, given.get("context_shapes", ()))),
        "num_classes": given.get("num_classes", 0),
    }
    return make_user_pair(model, arguments)


def open_run(
    run: Path,
    data: str | None = None,
    data_dir: Path | None = None,
    model: str | None = None,
    part: str | None = "test",
) -> tuple["nn.Module", "Data", dict[str, Any]]:
    """The pair of a run, its data, and its training options.

    If no data are named, the data must equal those of training. All rows of another table, if
    ``part`` is None or "all", need not make three parts.
    """
    pair, given = pair_of_run(run, model)
    if data is not None and part in (None, "all"):
        folder = data_dir or given.get("data_dir")
        if _is_table(run, given):
            from pyro_vae.data.datasets import load_new

            return pair, load_new(data, folder, schema_of_run(run)), given
        if _are_cells(given, data):
            return pair, _cells_of_run(run, given, data, folder, new=True), given
    loaded = load_of_run(run, given, data, data_dir)
    if data is None:
        require_split(run, loaded)
    return pair, loaded, given


def load_of_run(
    run: Path, given: dict[str, Any], data: str | None, data_dir: Path | None
) -> "Data":
    """The data of a run, or other data. Other text is tokenized in the same way."""
    from pyro_vae.data.datasets import load_data

    name = data or given.get("data")
    if name is None:
        raise UsageError(f"{run} does not record its data; name them with --data")
    folder = data_dir or given.get("data_dir")
    if (run / SCHEMA).is_file():
        return load_data(name, folder, columns=schema_of_run(run), group=given.get("group"))
    if _are_cells(given, name):
        return _cells_of_run(run, given, name, folder)
    vocabulary, length = given.get("vocabulary"), given.get("length", Input.length)
    if vocabulary is not None:
        (length,) = given["data_shape"]
    images = _of_images(given, other=data is not None) if Path(name).is_dir() else {}
    return load_data(name, folder, length, vocabulary, group=given.get("group"), **images)


def _of_images(given: dict[str, Any], other: bool) -> dict[str, Any]:
    """How a run reads a folder of images: another folder gets the shape of its data."""
    size, color = given.get("image_size") or None, given.get("color")
    shape = given.get("data_shape", ())
    if other and len(shape) == 3:
        size, color = shape[1:], shape[0] == 3
    return {"image_size": size, "color": color, "crop": given.get("crop", True)}


def _are_cells(given: dict[str, Any], name: str) -> bool:
    """Whether data of this name are cells, for a run on cells."""
    return "cells" in given and Path(name).suffix in CELLS


def _cells_of_run(
    run: Path, given: dict[str, Any], name: str, folder: Any, new: bool = False
) -> "Data":
    from pyro_vae.data.datasets import load_cells_of
    from pyro_vae.runs import files as run_files

    found = given["cells"]
    if not isinstance(found.get("genes"), list) or not isinstance(found.get("columns"), dict):
        raise UsageError(f"{run / run_files.CONFIG}: 'cells' must have 'genes' and 'columns'")
    return load_cells_of(name, folder, given.get("layer"), found, new)


def _is_table(run: Path, given: dict[str, Any]) -> bool:
    """Whether a datum of a run is a row of a table."""
    return (run / SCHEMA).is_file() and given.get("group") is None


SCHEMA = "schema.toml"
"""`pyro_vae.data.schema.SCHEMA`, without importing it."""


def schema_of_run(run: Path) -> "Schema":
    """The schema of a run that was trained on a table."""
    from pyro_vae.data.schema import stored_schema

    return stored_schema(run / SCHEMA)


def write_schema(run: Path, data: "Data") -> None:
    """Write the schema of a table into the run folder."""
    from pyro_vae.runs.files import atomic

    with atomic(run / SCHEMA) as file:
        file.write(data.schema.to_file())


def test_part(data: "Data", given: dict[str, Any], n: int) -> tuple["Tensor", list["Tensor"]]:
    context = context_of(given, data, data.test)
    return data.test.x[:n], [part[:n] for part in context]


def context_of(given: dict[str, Any], data: "Data", split: "Split") -> list["Tensor"]:
    """The context that a run gives to its pair: labels, context of the file, library sizes."""
    context: list[Tensor] = []
    if given.get("num_labels") is not None:
        from pyro_vae.data.datasets import hide_labels

        kept = given["num_labels"] if split is data.train else 0
        context.append(hide_labels(labels_of(given, data, split), kept, given.get("seed", 0)))
    if "label" in given.get("condition", ()):
        context.append(one_hot_labels(given, data, split))
    if "context" in given.get("condition", ()):
        if split.context is None:
            raise UsageError(
                f"--condition context needs an array 'context', but {data.name} has no such array"
            )
        context.append(split.context)
    if given.get("library_size"):
        import torch

        parts = split.x.split(4096)  # x may be on disk
        totals = torch.cat([part.flatten(1).double().sum(1, keepdim=True) for part in parts])
        if not bool((totals > 0).all()):
            raise UsageError(
                f"a library size must be positive, but {data.name} has a row with total "
                f"{totals.min():g}"
            )
        context.append(totals.log().float())
    if split.lengths is not None:
        context.append(split.lengths)
    return context


def one_hot_labels(given: dict[str, Any], data: "Data", split: "Split") -> "Tensor":
    from pyro_vae.data.datasets import one_hot

    return one_hot(labels_of(given, data, split), given["num_classes"])


def labels_of(given: dict[str, Any], data: "Data", split: "Split") -> "Tensor":
    if split.labels is None:
        raise UsageError(f"the run needs labels, but {data.name} has no labels")
    classes = given["num_classes"]
    if data.num_classes > classes:
        raise UsageError(
            f"the run has labels 0 to {classes - 1}, but {data.name} has labels up to "
            f"{data.num_classes - 1}"
        )
    return split.labels


def require_positive(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"must be at least 1, got {value}", argument=name)


def binarize_of(given: dict[str, Any]) -> str:
    return given.get("binarize", "dynamic")

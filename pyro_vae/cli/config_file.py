"""Files of options: what ``--config FILE`` and ``--resume`` add to the options that are typed."""

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cyclopts import App
from cyclopts.config import Dict as ConfigDict

from pyro_vae.cli.input import Input
from pyro_vae.cli.options import Model, Objective, reject_ignored
from pyro_vae.data.sizes import read_bytes
from pyro_vae.errors import UsageError, nearest
from pyro_vae.training.settings import Settings

TABLES = (".csv", ".tsv", ".parquet", ".feather", ".arrow")
"""`pyro_vae.data.table_files.FILES`, without importing it."""

_RECORDED = (
    "num_classes",
    "data_shape",
    "context_shapes",
    "vocabulary",
    "ragged",
    "classes",
    "cells",
)
"""What config.json records about the data. These names are not options."""


def read_options(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Add the options of a JSON file. An option that is typed overrides the file.

    The file is that of ``--config``. Without it, ``--resume`` reads config.json of the run folder.
    """
    typed = _typed(arguments)
    resumed = "config" not in typed and typed.get("resume", False)
    file = _config_of_run(typed) if resumed else typed.get("config")
    if file is None:
        return
    options = _read(file)
    _require_known(file, options, resumed)
    kept = {
        name: value for name, value in options.items() if name not in (*_RECORDED, *_empty(options))
    }
    # The library's own JSON configuration reads a path that is known before the words are parsed.
    ConfigDict({"train": kept}, source=str(file))(app, commands, arguments)


TABLE_DEFAULTS: dict[str, Any] = {
    "latent_dim": [8],
    "hidden": [64],
    "activation": "silu",
    "epochs": 400,
    "batch_size": 32,
}
"""The defaults for tables, and for arrays with few rows: docs/how-to/your-own-data.md."""

FEW_ROWS = 5000
"""Rows of an array of vectors up to which the defaults for tables apply. With more rows, the usual
epochs and batches make enough steps."""

TEXT_DEFAULTS: dict[str, Any] = {
    "word_dropout": 0.25,
    "warm_up": "linear",
    "warm_up_epochs": 20,
    "batch_size": 32,
}
"""The defaults for text, whose decoder otherwise explains the data without the latents. A decoder
that misses a part of the characters needs more steps, which smaller batches give."""

FEWEST_LINES = 50
"""Lines of a text file from which on the training part has more than one batch of 32 rows."""

ARRAYS = (".npy", ".npz")

CELLS = (".h5ad", ".zarr")
"""`pyro_vae.data.cell_stores.ENDINGS`, without importing it."""

CELLS_DEFAULTS: dict[str, Any] = {"likelihood": "negative-binomial"}
"""The defaults for cells, whose counts vary more than those of a Poisson distribution."""


def data_defaults(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Add the defaults for the kind of the data; given options override them.

    A pair of the user's own, a sequence, or several levels need their own dimensions.
    """
    named = _by_name(arguments)
    data = [token.value for token in named["data"].tokens]
    kinds = [token.value for token in named["model"].tokens]
    kind = kinds[-1] if kinds else "vae"
    given = {name for name, one in named.items() if one.tokens}
    what, new = _defaults_of(data[-1] if data else "", kind)
    if all(_from_file(named[name]) for name in _OF_EACH_RUN):
        # What the config.json of a run leaves out had no value in that run.
        arrays = data and Path(data[-1]).suffix in ARRAYS and ":" not in kind
        new = {"linear": False} if arrays and "linear" not in given else {}
    new = {name: value for name, value in new.items() if name not in given}
    if "warm_up" in given:
        new.pop("warm_up_epochs", None)
    if [token.value for token in named["network"].tokens] not in ([], ["auto"], ["recurrent"]):
        new.pop("word_dropout", None)
    if new:
        ConfigDict({commands[-1]: new}, source=f"the defaults for {what}")(app, commands, arguments)


_OF_EACH_RUN = ("model", "latent_dim", "seed", "skip_limit")
"""Some of the many options that each config.json of a run holds, and no other file."""


def _from_file(argument: Any) -> bool:
    return any(token.source != "cli" for token in argument.tokens)


def _defaults_of(data: str, kind: str) -> tuple[str, dict[str, Any]]:
    """What the data are, and the defaults for them with this kind of pair."""
    ending = Path(data).suffix
    if ending in CELLS:
        return "cells", {} if ":" in kind else CELLS_DEFAULTS
    rows = _rows_of_vectors(data)
    if ending in TABLES or 0 < rows <= FEW_ROWS:
        left_out = () if kind == "vae" else ("latent_dim", "hidden", "activation")
        new = {name: value for name, value in TABLE_DEFAULTS.items() if name not in left_out}
        return "tables" if ending in TABLES else "arrays", new
    if kind == "vae" and (ending == ".txt" or data == "docstrings"):
        whole = ending == ".txt" and _lines_of(Path(data)) < FEWEST_LINES
        new = {name: value for name, value in TEXT_DEFAULTS.items() if name != "batch_size"}
        return "text", new if whole else TEXT_DEFAULTS
    return "", {}


def _lines_of(path: Path) -> int:
    """The number of different lines of a text file; 0 for a file that cannot be read."""
    from pyro_vae.data.text import read_lines

    try:
        return len(read_lines(path))
    except (OSError, UsageError):  # the command says so when it reads the data
        return 0


def _rows_of_vectors(data: str) -> int:
    """The number of rows of an array file (n, d); 0 for other data."""
    if Path(data).suffix not in ARRAYS:
        return 0
    from pyro_vae.data.files import declared_shape

    shape = declared_shape(Path(data))
    return shape[0] if shape is not None and len(shape) == 2 else 0


def require_typed_class(_: App, __: Sequence[str], arguments: Any) -> None:
    """Raise `UsageError` for a class that only a file names: a file must not import a module."""
    for token in _by_name(arguments)["model"].tokens:
        if token.source != "cli" and ":" in token.value:
            raise UsageError(
                f"{token.source} names the class '{token.value}', but a file cannot make a command "
                f"import a module; if you trust it, type --model {token.value}"
            )


def reject_typed_ignored(_: App, __: Sequence[str], arguments: Any) -> None:
    """Reject typed options that the configuration would ignore, even at their default value."""
    named = _by_name(arguments)
    chosen = {
        name: one.tokens[-1].value if one.tokens else one.field_info.default
        for name, one in named.items()
    }
    reject_ignored(_typed(arguments), chosen)


def _by_name(arguments: Any) -> dict[str, Any]:
    """The arguments of a command, by their names in Python."""
    return {argument.field_info.name: argument for argument in arguments}


def _typed(arguments: Any) -> dict[str, Any]:
    """The values of the arguments that are typed."""
    return {
        name: one.convert()
        for name, one in _by_name(arguments).items()
        if any(token.source == "cli" for token in one.tokens)
    }


def _config_of_run(typed: dict[str, Any]) -> Path | None:
    """The configuration of the run that is resumed, if it exists."""
    file = typed.get("out", run_of(typed.get("data", ""))) / "config.json"
    return file if file.is_file() else None


def run_of(data: str) -> Path:
    """The run folder of these data, if none is named.

    >>> str(run_of("cells/counts.npz")), str(run_of("photos/"))
    ('runs/counts', 'runs/photos')
    """
    return Path("runs") / Path(os.path.abspath(data)).stem


def _read(file: Path) -> dict[str, Any]:
    """The options in a JSON file, which may be the config.json of a run."""
    try:
        content = json.loads(read_bytes(file))
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not valid JSON ({error})") from error
    options = content.get("train", content) if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise UsageError(f"{file} must hold a JSON object of options")
    return options


def _empty(options: dict[str, Any]) -> list[str]:
    """The names of empty lists, which are the default of all such options but the widths."""
    empty = [name for name, value in options.items() if value == [] and name != "hidden"]
    for name in empty:
        if getattr(Model, name, ()) != ():
            raise UsageError("must have at least one number, got none", argument=name)
    return empty


def _require_known(file: Path, options: dict[str, Any], resumed: bool) -> None:
    """Raise `UsageError` for an unknown option in a file."""
    known = [field.name for kind in (Model, Objective, Input, Settings) for field in fields(kind)]
    # A run does not record its own folder: a copy of it would write into the first one.
    known += ["data", "num_eval_samples", "report", "diagnosis_seconds"]
    known += () if resumed else ("out",)
    for name in options:
        if name not in (*known, *_RECORDED):
            raise UsageError(f"{file}: unknown option '{name}'; {nearest(name, known)}")

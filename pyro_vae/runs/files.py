"""Write the files of a run folder atomically, and read them without unpickling."""

import csv
import io
import json
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from pyro_vae.errors import UsageError
from pyro_vae.runs import checksums

CONFIG, MODEL, CHECKPOINT = "config.json", "model.safetensors", "checkpoint.pt"

ROWS = "rows.safetensors"

HISTORY, METRICS, FIGURES, REPORT = "history.csv", "metrics.json", "figures", "report.html"

TENSORBOARD = "tensorboard"

DIAGNOSIS = "diagnosis-"
"""The prefix of the names of the figures of `pyro_vae.diagnose`."""

ARRAYS = (
    "codes.npz",
    *(
        f"{name}s.{kind}"
        for name in ("sample", "reconstruction", "interpolation", "traversal")
        for kind in ("npy", "txt", "csv")
    ),
    "schema.toml",
    *(f"scores.{kind}" for kind in ("csv", "npz")),
    *(f"filled{part}.csv" for part in ("", "_draws", "_cells")),
    "filled.npz",
)


def write_checkpoint(run: Path, state: Mapping[str, Any]) -> None:
    """Write the state of training into checkpoint.pt, with its checksum."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with atomic(run / CHECKPOINT) as file:
        file.write(checksums.sealed_archive(buffer.getvalue()))


def read_checkpoint(run: Path) -> dict[str, Any]:
    """Read the state of training, which has only tensors and plain values.

    Raises `UsageError` for a file that is damaged or has anything else.
    """
    content = read_bytes(run / CHECKPOINT)
    # torch writes zip archives; another file could be an old pickle.
    if content.startswith(b"PK\x03\x04"):
        checksums.require_sealed(content, run / CHECKPOINT)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise UsageError(
                f"{run / CHECKPOINT} is damaged or holds more than tensors and numbers: it was not "
                "loaded, and no code in it was run"
            ) from error
        if not isinstance(state, dict):
            raise UsageError(f"{run / CHECKPOINT} is not a checkpoint of a run")
        return state
    if b"PK\x03\x04".startswith(content[:4]):
        raise UsageError(f"{run / CHECKPOINT} is cut short")
    raise UsageError(
        f"{run / CHECKPOINT} is not a checkpoint of a run: it was not loaded, and no code in it "
        "was run"
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically.

    JSON has no numbers that are not finite. They become the strings "Infinity", "-Infinity" and
    "NaN", and `read_json` converts them back.
    """
    with atomic(path) as file:
        file.write(
            (
                json.dumps(json_ready(content), indent=2, default=str, allow_nan=False) + "\n"
            ).encode()
        )


def read_json(path: Path) -> Any:
    """Read JSON; raise a `UsageError` that names the file if it is not valid."""
    content = read_bytes(path)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is cut short or not valid JSON ({error})") from error
    return _mapped(found, lambda v: float(v) if v in _NAMED.values() else v)


_NAMED = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
"""The strings for numbers that are not finite in JSON."""


def json_ready(content: Any) -> Any:
    """Replace numbers that are not finite by strings, which standard JSON can hold.

    >>> json_ready({"a": [1.0, float("-inf")]})
    {'a': [1.0, '-Infinity']}
    """
    return _mapped(content, lambda v: _NAMED[str(float(v))] if _is_odd(v) else v)


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _mapped(content: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to every value in nested lists and dictionaries."""
    if isinstance(content, Mapping):
        return {key: _mapped(value, change) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_mapped(value, change) for value in content]
    return change(content)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with the same columns as CSV, atomically."""
    rows = list(rows)
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with atomic(path) as file:
        file.write(text.getvalue().encode())


@contextmanager
def atomic(path: Path) -> Iterator[Any]:
    """A binary file that gets its name only when it is complete and on the disk.

    Raises `UsageError` if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_bytes(path: Path) -> bytes:
    """Read a file; raise `UsageError` if it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path} is missing") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error

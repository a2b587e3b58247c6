"""The files of a run folder, written atomically and read without unpickling code."""

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
from pyro_vae.runs import seals

CONFIG, MODEL, CHECKPOINT = "config.json", "model.safetensors", "checkpoint.pt"

ROWS = "rows.safetensors"

HISTORY, METRICS, FIGURES, REPORT = "history.csv", "metrics.json", "figures", "report.html"

TENSORBOARD = "tensorboard"

DIAGNOSIS = "diagnosis-"
"""How the names of the figures of `pyro_vae.diagnose` begin."""

ARRAYS = (
    "codes.npz",
    *(
        f"{name}s.{kind}"
        for name in ("sample", "reconstruction", "interpolation", "traversal")
        for kind in ("npy", "txt")
    ),
)


def write_checkpoint(run: Path, state: Mapping[str, Any]) -> None:
    """Write the state of training, with its checksum, into checkpoint.pt."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with atomic(run / CHECKPOINT) as file:
        file.write(seals.sealed_archive(buffer.getvalue()))


def read_checkpoint(run: Path) -> dict[str, Any]:
    """The state of training, of tensors and plain values only."""
    content = read_bytes(run / CHECKPOINT)
    # torch writes zip archives; anything else would be a pickle of old.
    if content.startswith(b"PK\x03\x04"):
        seals.require_sealed(content, run / CHECKPOINT)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise UsageError(
                f"{run / CHECKPOINT} holds more than tensors and numbers, or is damaged: refused, "
                "nothing of it ran"
            ) from error
        if not isinstance(state, dict):
            raise UsageError(f"{run / CHECKPOINT} is no checkpoint of a run")
        return state
    if b"PK\x03\x04".startswith(content[:4]):
        raise UsageError(f"{run / CHECKPOINT} is cut short")
    raise UsageError(f"{run / CHECKPOINT} is no checkpoint of a run: refused, nothing of it ran")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, atomically; numbers that are not finite as "Infinity", "-Infinity", "NaN".

    JSON has no such numbers. `read_json` gives them back.
    """
    with atomic(path) as file:
        file.write(
            (
                json.dumps(json_ready(content), indent=2, default=str, allow_nan=False) + "\n"
            ).encode()
        )


def read_json(path: Path) -> Any:
    """Read JSON, naming the file where it is none."""
    content = read_bytes(path)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is cut short or no JSON ({error})") from error
    return _mapped(found, lambda v: float(v) if v in _NAMED.values() else v)


_NAMED = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
"""How numbers that are not finite are written in JSON."""


def json_ready(content: Any) -> Any:
    """The content with numbers that are not finite as the words for them, which any JSON holds.

    >>> json_ready({"a": [1.0, float("-inf")]})
    {'a': [1.0, '-Infinity']}
    """
    return _mapped(content, lambda v: _NAMED[str(float(v))] if _is_odd(v) else v)


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _mapped(content: Any, change: Callable[[Any], Any]) -> Any:
    """Lists and dictionaries with every value in them changed."""
    if isinstance(content, Mapping):
        return {key: _mapped(value, change) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_mapped(value, change) for value in content]
    return change(content)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of one set of columns, atomically."""
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
    """A binary file that appears under its name only when it is whole and on the disk."""
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
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path} is missing") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error

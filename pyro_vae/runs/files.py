"""Write the files of a run folder atomically, and read them without unpickling."""

import io
import json
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from pyro_vae.data.sizes import read_bytes, require_memory
from pyro_vae.data.temporary import flush_folder, require_no_link, temporary
from pyro_vae.errors import UsageError, warn
from pyro_vae.runs import checksums
from pyro_vae.runs.lock import require_unmoved

CONFIG, MODEL, CHECKPOINT = "config.json", "model.safetensors", "checkpoint.pt"

OLDER = "checkpoint-older.pt"
"""The checkpoint before the last one."""

ROWS = "rows.safetensors"

NONFINITE = "nonfinite.npz"
"""The minibatch at which training stopped, because its numbers were not finite."""

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
    """Write the state of training into checkpoint.pt, with its checksum.

    The last checkpoint is kept as checkpoint-older.pt. It gets this name only after the new file
    is on the disk, was read again and matched its checksum.
    """
    buffer = io.BytesIO()
    torch.save({FORMAT: SEALED, **state}, buffer)

    def proved(part: Path) -> None:
        checksums.require_sealed(read_bytes(part), run / CHECKPOINT)
        _keep_older(run)

    with atomic(run / CHECKPOINT, proved) as file:
        file.write(checksums.sealed_archive(buffer.getvalue()))


def _keep_older(run: Path) -> None:
    """Keep the last checkpoint as the older one, unless it is damaged."""
    with suppress(UsageError):
        checksums.require_sealed(read_bytes(run / CHECKPOINT), run / CHECKPOINT)
        os.replace(run / CHECKPOINT, run / OLDER)


def read_checkpoint(run: Path) -> dict[str, Any]:
    """Read the state of training, which has only tensors and plain values.

    If the last checkpoint is damaged or missing, this reads the older one, with a warning. Raises
    `UsageError` if neither can be read.
    """
    try:
        return _read_state(run / CHECKPOINT)
    except UsageError as error:
        try:
            older = _read_state(run / OLDER)
        except UsageError:
            raise error from None
        warn(f"{error}; {run / OLDER}, the checkpoint before it, was read in its place")
        return older


_DAMAGED = (pickle.UnpicklingError, zipfile.BadZipFile, AttributeError, IndexError, TypeError)


def _read_state(path: Path) -> dict[str, Any]:
    content = read_bytes(path)
    # torch writes zip archives; another file could be an old pickle.
    if content.startswith(b"PK\x03\x04"):
        checksums.require_sealed(content, path)
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                require_memory(sum(part.file_size for part in archive.infolist()), str(path))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except UsageError:
            raise
        except (*_DAMAGED, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise UsageError(
                f"{path} is damaged or holds more than tensors and numbers: it was not "
                "loaded, and no code in it was run"
            ) from error
        if not isinstance(state, dict):
            raise UsageError(f"{path} is not a checkpoint of a run")
        require_format(state.pop(FORMAT, 1), path)  # checkpoints of 0.1.0 have no format
        return state
    if b"PK\x03\x04".startswith(content[:4]):
        raise UsageError(f"{path} is cut short")
    raise UsageError(
        f"{path} is not a checkpoint of a run: it was not loaded, and no code in it was run"
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, with a seal.

    JSON has no numbers that are not finite. They become the strings "Infinity", "-Infinity" and
    "NaN", and `read_json` converts them back.
    """
    own = {name: value for name, value in content.items() if name not in (FORMAT, _SHA256)}
    ready = json_ready({FORMAT: SEALED, **own})
    text = json.dumps(ready, indent=2, default=str, allow_nan=False)
    with atomic(path) as file:
        file.write(checksums.sealed_json(f"{text}\n".encode()))


FORMAT, SEALED = "format", 2
"""The key of the version of a file, which is 1 in files of version 0.1.0, and now 2."""

_SHA256 = "sha256"


def require_format(found: Any, path: Path) -> None:
    """Raise `UsageError` for a file with another version than 1 and the present one."""
    if found not in (1, SEALED):
        raise UsageError(
            f"{path} has format {found!r}, and this version reads formats 1 and {SEALED}: the file "
            "is damaged, or a later version of pyro_vae wrote it"
        )


def read_json(path: Path) -> Any:
    """Read JSON; raise a `UsageError` that names the file if it is damaged or not valid.

    The content of a sealed file has its version as "format", but not its seal.
    """
    content = read_bytes(path)
    try:
        read = _mapped(json.loads(content), lambda v: float(v) if v in _NAMED.values() else v)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is cut short or not valid JSON ({error})") from error
    if isinstance(read, dict) and (FORMAT in read or _SHA256 in read):
        require_format(read.get(FORMAT), path)
        if read.get(FORMAT) != 1 or _SHA256 in read:  # files of 0.1.0 have no seal
            checksums.require_sealed_json(content, path)
        read.pop(_SHA256, None)
    return read


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


@contextmanager
def atomic(path: Path, proved: Callable[[Path], Any] = lambda part: None) -> Iterator[Any]:
    """A binary file that gets its name only when it is complete and on the disk.

    A replaced file keeps its permissions. A link in place of the file is replaced, not followed.

    Arguments:
        proved: is called with the complete file before the file gets its name.

    Raises `UsageError` if the file cannot be written.
    """
    try:
        if path.parent.name == FIGURES:
            require_no_link(path.parent)
        require_unmoved(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as (file, part):
            yield file
            file.flush()
            os.fsync(file.fileno())
            proved(part)
            if os.name == "nt":  # Windows does not rename an open file
                file.close()
            os.replace(part, path)
        flush_folder(path.parent)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error

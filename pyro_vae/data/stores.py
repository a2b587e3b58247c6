"""Folders of converted data: they are made once, found again by a key, and made by one process."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyro_vae.data.temporary import fcntl, flush_folder
from pyro_vae.errors import UsageError

_ABOUT = "about.json"


def state_of(path: Path) -> list[Any]:
    """The size and the times of change of a file, which differ if it has been changed."""
    found = path.stat()
    return [os.path.realpath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def stored(place: Path, key: Any, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What is known about the converted data in a folder; they are made first if necessary.

    The folder gets its name only when it is complete. Another process that makes the same folder is
    waited for.

    Arguments:
        place: the folder.
        key: plain values that determine the converted data.
        make: writes the files into an empty folder, and returns plain values about them.

    Raises `UsageError` if the folder cannot be written.
    """
    key = json.loads(json.dumps(key))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _alone(place):
            found = known(place, key)
            return _made(place, key, make) if found is None else found
    except OSError as error:
        raise UsageError(
            f"the data cannot be converted in {place.parent} ({error.strerror or error}): name a "
            "folder on another disk with --data-dir, or in the environment variable PYRO_VAE_DATA"
        ) from error


def require_space(folder: Path, need: int) -> None:
    """Raise `UsageError` if the disk of a folder has not so many bytes left."""
    have = shutil.disk_usage(folder).free
    if need > have:
        raise UsageError(
            f"the converted data need {need / 2**30:.1f} GiB in {folder.parent}, whose disk has "
            f"{have / 2**30:.1f} GiB left: name a folder on another disk with --data-dir, or in "
            "the environment variable PYRO_VAE_DATA"
        )


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Be the only process that makes a folder; wait for another one."""
    with open(place.with_name(f"{place.name}.lock"), "w") as lock:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def known(place: Path, key: Any) -> dict[str, Any] | None:
    """What is known about a folder; None if it is missing, damaged, or has another key."""
    try:
        found = json.loads((place / _ABOUT).read_bytes())
        whole = all((place / name).stat().st_size == size for name, size in found["files"].items())
        return found["about"] if whole and found["key"] == key else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _made(place: Path, key: Any, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that died; its lock is released
    part.mkdir()
    try:
        about = make(part)
        files = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
        words = json.dumps({"key": key, "about": about, "files": files})
        with open(part / _ABOUT, "w") as file:
            file.write(words)
            file.flush()
            os.fsync(file.fileno())
        flush_folder(part)
        if place.exists():
            shutil.rmtree(place)
        os.replace(part, place)
        flush_folder(place.parent)
        return json.loads(words)["about"]
    finally:
        shutil.rmtree(part, ignore_errors=True)

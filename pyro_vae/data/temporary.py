"""Temporary files of a folder: unpredictable names, never through a link, swept after a crash."""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from pyro_vae.errors import UsageError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_PART = re.compile(r"\..+\.[0-9a-f]+\.part")

_NO_FLUSH = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP)
"""What systems answer that cannot flush a folder."""


@contextmanager
def temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file next to ``path``, with its permissions, which is removed at the end.

    The file is locked while it is open, so that `sweep` knows that its writer lives.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    with open(part, "x+b") as file:  # "x" follows no link
        try:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _keep_permissions(path, part)
            yield file, part
        finally:
            with suppress(OSError):  # a full disk cannot hold the rest
                file.close()
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _keep_permissions(path: Path, part: Path) -> None:
    with suppress(FileNotFoundError):
        replaced = os.lstat(path)
        if stat.S_ISREG(replaced.st_mode):
            os.chmod(part, stat.S_IMODE(replaced.st_mode))


def sweep(folder: Path) -> None:
    """Delete the temporary files of dead processes, whose locks the system has released."""
    if fcntl is None:
        return
    with os.scandir(folder) as entries:
        parts = [entry.path for entry in entries if _PART.fullmatch(entry.name)]
    for part in parts:
        with suppress(OSError):  # its writer lives, or it is not ours
            descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(part)
            finally:
                os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, as fsync of a file flushes only its content."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


def require_no_link(folder: Path) -> None:
    """Raise `UsageError` for a link, which would lead a run to write into another folder."""
    if folder.is_symlink():
        raise UsageError(f"{folder} must be a folder, but it is a link: remove the link")

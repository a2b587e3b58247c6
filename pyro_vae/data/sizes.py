"""Read plain files, and compare sizes with the memory before it is allocated."""

import os
import stat
from pathlib import Path

from pyro_vae.errors import UsageError


def read_bytes(path: Path) -> bytes:
    """Read a file; raise `UsageError` if it is missing, too large or not a plain file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:  # a pipe without a writer does not block
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(f"{path} must be a plain file, but it is a folder, pipe or device")
            require_memory(found.st_size, str(path))
            return file.read()
    except FileNotFoundError:
        raise UsageError(f"{path} is missing") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def require_memory(need: int, what: str) -> None:
    """Raise `UsageError` if so many bytes are not free; ``what`` needs them."""
    have = available_memory()
    if need > have:
        raise UsageError(
            f"{what} needs {need / 2**30:.1f} GiB of memory, but {have / 2**30:.1f} GiB are free"
        )


def available_memory() -> int:
    """The bytes of memory that are free, or a large number where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else 2**62

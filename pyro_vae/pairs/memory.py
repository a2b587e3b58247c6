"""Errors for lack of memory, as one line that says what to make smaller."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyro_vae.errors import UsageError

_SIGNS = re.compile(
    "can't allocate memory|out of memory|ALLOC_FAILED|std::bad_alloc|Unable to allocate", re.I
)
"""The words of torch (CPU, CUDA and its libraries), of C++ and of NumPy."""

_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB)", re.I)

_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class OutOfMemoryError(UsageError):
    """The memory did not suffice. The message says what was asked for and what to make smaller."""


@contextmanager
def told_smaller(advice: Callable[[], str]) -> Iterator[None]:
    """Raise `OutOfMemoryError` with this advice if the memory does not suffice in this block."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        cause = lack_of_memory(error)
        if cause is None:
            raise
        raise OutOfMemoryError(f"{in_words(cause)}: {advice()}") from error


def lack_of_memory(error: BaseException | None) -> BaseException | None:
    """The error for lack of memory that is this error or its cause; None if there is none."""
    while error is not None:
        about_memory = isinstance(error, RuntimeError) and _SIGNS.search(str(error))
        if isinstance(error, MemoryError) or about_memory:
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def in_words(error: BaseException) -> str:
    """Say that the memory did not suffice, and how much was asked for.

    >>> in_words(MemoryError("Unable to allocate 1.50 GiB for an array"))
    'the memory does not suffice (1.5 GiB more were asked for)'
    """
    found = _ASKED.search(str(error))
    if found is None:
        return "the memory does not suffice"
    size = float(found[1]) * _UNITS[found[2].lower()]
    unit, name = (2**30, "GiB") if size >= 2**28 else (2**20, "MiB")
    return f"the memory does not suffice ({size / unit:.1f} {name} more were asked for)"


def smaller(batch_size: int) -> str:
    """Name the number of rows that were used at once, and a smaller one."""
    if batch_size == 1:
        return "`batch_size` was 1 already, so only a smaller pair or more memory helps"
    return f"`batch_size` was {batch_size}; try {batch_size // 2}"

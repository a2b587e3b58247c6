"""Arrays on disk that are read by rows: .npy files that are mapped into memory, zarr and HDF5.

Only the rows that are asked for are read into memory. A mapped page counts as memory of the
process, so the rows of a file are read and not mapped.
"""

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import UsageError

LEAST_BYTES = 2**30
"""Smaller arrays on disk are loaded into memory, where the order of an epoch mixes all rows."""

BLOCK_BYTES = 2**18
"""About the size of a block: rows that are read together."""


@dataclass(frozen=True)
class DiskArray:
    """Rows (n, ...) of an array on disk: all of them, or some of its blocks.

    It has the ``shape`` and the ``dtype`` of a tensor. ``array[rows]`` reads rows into memory.
    """

    read: Callable[[int, int], np.ndarray]
    """Reads the rows from one number up to another one, as an array of the file's row shape."""
    rows_of_file: int
    block: int
    """The number of rows of a block."""
    blocks: np.ndarray
    """The numbers of the blocks of the file that belong to this array, in order. Only the last
    block of the file may be short, and it is the last one here."""
    row: tuple[int, ...]
    """The shape of a row."""
    dtype: torch.dtype
    name: str
    last: bool = False
    """Whether images have their channels last in the file; here they are first."""

    def __len__(self) -> int:
        if not len(self.blocks):
            return 0
        short = min(self.block, self.rows_of_file - int(self.blocks[-1]) * self.block)
        return (len(self.blocks) - 1) * self.block + short

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.row))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def dim(self) -> int:
        return 1 + len(self.row)

    def read_block(self, number: int) -> Tensor:
        """The rows of a block of this array, by its number here."""
        first = int(self.blocks[number]) * self.block
        found = self.read(first, min(first + self.block, self.rows_of_file))
        if self.last:
            found = found.transpose(0, 3, 1, 2)
        rows = torch.from_numpy(np.ascontiguousarray(found, found.dtype.newbyteorder("=")))
        return rows.reshape(len(rows), *self.row)

    def between(self, start: int, stop: int) -> Tensor:
        """Rows that follow each other."""
        first, past = start // self.block, -(-stop // self.block)
        parts = [self.read_block(number) for number in range(first, past)]
        if not parts:
            return torch.empty((0, *self.row), dtype=self.dtype)
        if len(parts) == 1:
            joined = parts[0]
        else:  # by NumPy, as `pyro_vae.data.stored` explains
            joined = torch.from_numpy(np.concatenate([part.numpy() for part in parts]))
        return joined[start - first * self.block : stop - first * self.block]

    def into(self, found: np.ndarray, start: int, stop: int) -> None:
        """Read rows that follow each other into memory that is there, of the same dtype."""
        read, (number, ahead) = self.read, divmod(start, self.block)
        in_one_block = ahead + stop - start <= self.block
        if in_one_block and isinstance(read, PlainFile) and self._is_as_in_file(read, found):
            read.into(found, int(self.blocks[number]) * self.block + ahead)
        else:
            found[:] = self.between(start, stop).numpy()

    def _is_as_in_file(self, read: "PlainFile", found: np.ndarray) -> bool:
        return not self.last and found.dtype == read.dtype and found.flags.c_contiguous

    def __getitem__(self, rows: Any) -> Tensor:
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(len(self))
            return self.between(start, max(start, stop))
        numbers = torch.arange(len(self))[rows].reshape(-1).tolist()
        found = [self.between(number, number + 1) for number in numbers]
        return torch.cat(found) if found else self.between(0, 0)

    def rows_in_file(self, rows: Sequence[int]) -> list[int]:
        """The numbers in the file of rows of this array."""
        return [int(self.blocks[n // self.block]) * self.block + n % self.block for n in rows]

    def numbers(self) -> np.ndarray:
        """The numbers in the file of all rows of this array."""
        found = self.blocks[:, None] * self.block + np.arange(self.block)
        return found[found < self.rows_of_file]

    def shared(self, shares: Sequence[int], name: str) -> list["DiskArray"]:
        """Parts of these shares: random blocks with a fixed seed. ``name`` is for messages.

        Raises `UsageError` for fewer than 10 blocks.
        """
        if len(self.blocks) < 10:
            raise UsageError(f"{name} has {len(self.blocks)} blocks of rows, but needs at least 10")
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.blocks), generator=generator).numpy()
        ends = [len(order) * sum(shares[:i]) // sum(shares) for i in range(len(shares) + 1)]
        return [self.part(order[a:b]) for a, b in pairwise(ends)]

    def sample(self) -> Tensor:
        """The rows of at most 64 evenly spaced blocks."""
        numbers = np.unique(np.linspace(0, len(self.blocks) - 1, 64).astype(int))
        return torch.cat([self.read_block(int(number)) for number in numbers])

    def part(self, blocks: np.ndarray) -> "DiskArray":
        """Some of the blocks of this array, by their numbers here; they keep the file's order."""
        return replace(self, blocks=np.sort(self.blocks[blocks]))

    def split(self, size: int) -> Any:
        """Read the rows in parts of this size, one after another."""
        return (self.between(i, min(i + size, len(self))) for i in range(0, len(self), size))


def merged(parts: Sequence[tuple[DiskArray | Tensor, np.ndarray]], name: str) -> DiskArray:
    """One array of the rows of several ones, each with the places of its rows, which increase."""
    x, length = parts[0][0], sum(len(rows) for _, rows in parts)
    row = tuple(x.shape[1:])
    reader = _Merged(tuple(parts), row, torch.empty(0, dtype=x.dtype).numpy().dtype)
    return array_of(reader, length, row, x.dtype, name)


def array_of(
    read: Callable[[int, int], np.ndarray],
    length: int,
    row: tuple[int, ...],
    dtype: torch.dtype,
    name: str,
) -> DiskArray:
    """Rows of this shape that a function reads, in blocks of the usual size."""
    size = max(1, BLOCK_BYTES // max(1, int(np.prod(row)) * dtype.itemsize))
    return DiskArray(read, length, size, np.arange(-(-length // size)), row, dtype, name)


@dataclass(eq=False)
class _Merged:
    """Reads rows of several arrays, each with the places of its rows."""

    parts: tuple[tuple[DiskArray | Tensor, np.ndarray], ...]
    row: tuple[int, ...]
    dtype: np.dtype

    def __call__(self, start: int, stop: int) -> np.ndarray:
        found = np.empty((stop - start, *self.row), self.dtype)
        for array, rows in self.parts:
            first, past = map(int, np.searchsorted(rows, (start, stop)))
            if first < past:
                found[rows[first:past] - start] = array[first:past].numpy()
        return found


def rows_of(value: Any, name: str = "x") -> DiskArray | None:
    """A large array on disk as a `DiskArray`; None for any other value, which fits into memory.

    Arguments:
        value: a ``numpy.memmap``, or an array of zarr or h5py.

    Raises `UsageError` for an array whose rows are not numbers.
    """
    mapped = isinstance(value, np.memmap)
    module = type(value).__module__.partition(".")[0]
    if not (mapped or module in ("zarr", "h5py")) or getattr(value, "ndim", 0) < 1:
        return None
    if value.dtype.kind not in "biuf" or value.size * value.dtype.itemsize < LEAST_BYTES:
        return None
    reader = _of_map(value) if mapped else lambda start, stop: np.asarray(value[start:stop])
    if reader is None:
        return None
    dtype = torch.from_numpy(np.empty(0, value.dtype.newbyteorder("="))).dtype
    size = max(1, BLOCK_BYTES // max(1, value.itemsize if value.ndim == 1 else _row_bytes(value)))
    chunk = getattr(value, "chunks", None)
    size = size if not chunk else -(-size // chunk[0]) * chunk[0]
    blocks = np.arange(-(-value.shape[0] // size))
    where = str(getattr(value, "filename", None) or name)
    return DiskArray(reader, value.shape[0], size, blocks, tuple(value.shape[1:]), dtype, where)


def in_memory(x: Any) -> bool:
    """Whether x is an array in memory, and not one on disk, a data set or a loader."""
    return isinstance(x, (Tensor, np.ndarray)) and rows_of(x) is None


def sampled(x: Any) -> Any:
    """The rows of a tensor, or a sample of the rows of an array on disk."""
    return x.sample() if isinstance(x, DiskArray) else x


def _row_bytes(value: Any) -> int:
    return int(np.prod(value.shape[1:])) * value.dtype.itemsize


def _of_map(array: np.memmap) -> Callable[[int, int], np.ndarray] | None:
    """A function that reads rows of a mapped file; None if its rows do not lie one after another.

    A private map ("c") may have been changed in memory, so it is not read from its file.
    """
    root: Any = array
    while isinstance(root.base, np.memmap):
        root = root.base
    if not array.flags.c_contiguous or array.mode == "c" or array.filename is None:
        return None
    ahead = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return PlainFile(Path(array.filename), root.offset + ahead, tuple(array.shape), array.dtype)


@dataclass(eq=False)
class PlainFile:
    """Reads rows of a file without mapping it into memory."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __post_init__(self) -> None:
        self.descriptor = os.open(self.path, os.O_RDONLY)
        self.version = self._version()
        weakref.finalize(self, os.close, self.descriptor)

    def __call__(self, start: int, stop: int) -> np.ndarray:
        found = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self.into(found, start)
        return found

    def into(self, found: np.ndarray, start: int) -> None:
        """Read the rows from this number on into memory that lies in one piece."""
        if self._version() != self.version:
            raise UsageError(
                f"{self.path} has been changed while it was read: start again with a file that "
                "stays as it is"
            )
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        view, at = memoryview(found.reshape(-1).view(np.uint8).data), self.offset + start * row
        while len(view):
            done = os.preadv(self.descriptor, [view], at)
            if done <= 0:
                raise UsageError(f"{self.path} is cut short: row {start} cannot be read")
            view, at = view[done:], at + done

    def _version(self) -> tuple[int, int]:
        """The size and the time of the last change of the file that is open."""
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns

"""Cells that stay on disk: the counts are converted once into sparse rows, which are read by index.

Each part of the data has its own rows, because the cells of a random part lie everywhere in the
file. Names and columns of obs are in memory.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from pyro_vae.data import disk
from pyro_vae.data.cell_stores import opened
from pyro_vae.data.cells import (
    Cells,
    checked_rows,
    described,
    form_of,
    in_float32,
    sparse_arrays,
    sparse_rows,
    with_counts,
)
from pyro_vae.data.disk import PlainFile, array_of
from pyro_vae.data.files import require_observed_rows
from pyro_vae.data.sizes import require_memory
from pyro_vae.data.split import Data, Split, taken
from pyro_vae.data.stores import require_space, state_of, stored
from pyro_vae.data.table_values import PARTS
from pyro_vae.errors import UsageError
from pyro_vae.pairs.arrays import require_finite
from pyro_vae.pairs.progress import bar

ENTRIES_AT_ONCE = 2**22
"""About the number of stored entries that are converted at once."""

_VERSION = 1


def load_cells(
    path: Path,
    columns: Mapping[str, Any] | str | Path | None,
    layer: str | None,
    batch: str | None,
    cache: Path,
    recorded: Mapping[str, Any] | None = None,
    new: bool = False,
) -> Data:
    """The parts of an AnnData file; a part whose dense counts need 1 GiB or more is not loaded.

    Arguments:
        path, columns, layer, batch, recorded: see `pyro_vae.data.cells.described`.
        cache: the folder for the converted counts.
        new: whether all cells are test data, for a pair that was fitted to other cells.

    The parts have the cells of a smaller file; on disk they are in the order of the file. Raises
    `UsageError` for a file that cannot be read or converted.
    """
    with opened(path) as file:
        cells, matrix = described(file, path, columns, layer, batch, recorded)
        shape = cells.table.source.num_rows, len(cells.names)
        if 4 * shape[0] * shape[1] < disk.LEAST_BYTES:
            found = with_counts(cells, matrix, path)
            return found.new() if new else found.split()
        numbered = _with_numbers(cells, shape[0])
        data = numbered.new() if new else numbered.split()
        parts = [_in_order(part) for part in (data.train, data.validation, data.test)]
        part_of_row = np.empty(shape[0], np.int8)
        for i, part in enumerate(parts):
            part_of_row[part.rows] = i
        digest = hashlib.sha256(part_of_row.tobytes()).hexdigest()
        key = [_VERSION, _state(path), layer, digest]
        words = json.dumps([str(path.resolve()), layer, digest]).encode()
        place = cache / "cells" / hashlib.sha256(words).hexdigest()[:16]
        stored(place, key, lambda made: _convert(matrix, shape, path, part_of_row, made))
    for i, part in enumerate(parts):
        parts[i] = part._replace(x=cast(Any, _counts(place, i, len(part.x), shape[1], path)))
    return replace(data, train=parts[0], validation=parts[1], test=parts[2], cells=cells)


def _with_numbers(cells: Cells, n: int) -> Cells:
    """The cells with their numbers in place of counts."""
    return replace(cells, table=replace(cells.table, x=torch.arange(n)[:, None]))


def _in_order(part: Split) -> Split:
    """The rows of a part in the order of the file."""
    assert part.rows is not None
    return taken(part, part.rows.argsort())


def _state(path: Path) -> list[Any]:
    """The state of a file, or of all files of a store."""
    if path.is_file():
        return state_of(path)
    files = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    states = json.dumps([state_of(file) for file in files])
    return [os.path.realpath(path), hashlib.sha256(states.encode()).hexdigest()]


@dataclass(eq=False)
class SparseRows:
    """Reads rows of counts as dense arrays from files of their entries that are not zero."""

    counts: PlainFile
    genes: PlainFile
    starts: np.ndarray
    """The number of the first entry of each row, and that of all entries."""
    width: int

    def __call__(self, start: int, stop: int) -> np.ndarray:
        found = np.zeros((stop - start, self.width), np.float32)
        starts = self.starts[start : stop + 1]
        places = self.genes(int(starts[0]), int(starts[-1])).astype(np.int64)
        places += np.repeat(np.arange(stop - start) * self.width, np.diff(starts))
        found.reshape(-1)[places] = self.counts(int(starts[0]), int(starts[-1]))
        return found


def _counts(place: Path, part: int, n: int, width: int, path: Path) -> Any:
    """The counts (n, width) of a part: in memory if they need less than 1 GiB."""
    starts = np.load(_file(place, "starts", part), allow_pickle=False)
    entries = (int(starts[-1]),)
    counts = PlainFile(_file(place, "counts", part), 0, entries, np.dtype(np.float32))
    genes = PlainFile(_file(place, "genes", part), 0, entries, np.dtype(np.int32))
    read = SparseRows(counts, genes, starts, width)
    if 4 * n * width >= disk.LEAST_BYTES:
        return array_of(read, n, (width,), torch.float32, str(path))
    require_memory(4 * n * width, str(path))
    return torch.from_numpy(read(0, n))


def _file(folder: Path, what: str, part: int) -> Path:
    return folder / f"{what}-{PARTS[part]}.{'npy' if what == 'starts' else 'bin'}"


def _convert(
    matrix: Any, shape: tuple[int, int], path: Path, part_of_row: np.ndarray, folder: Path
) -> dict[str, Any]:
    """Write the sparse rows of each part into a folder; nothing else is known about them."""
    lengths: list[list[np.ndarray]] = [[], [], []]
    with (
        ExitStack() as opened_files,
        bar(True, shape[0], f"{path.name}: converting", delay=2) as shown,
    ):
        files = {
            (what, part): opened_files.enter_context(open(_file(folder, what, part), "wb"))
            for what in ("counts", "genes")
            for part in range(3)
        }
        for first, rows in _blocks(matrix, shape, path, folder):
            counts = _checked(rows, path, first)
            for part in range(3):
                own = counts[part_of_row[first : first + rows.shape[0]] == part]
                lengths[part].append(np.diff(own.indptr).astype(np.int64))
                files["counts", part].write(own.data.data)
                files["genes", part].write(own.indices.astype(np.int32).data)
            shown.update(rows.shape[0])
        for part, found in enumerate(lengths):
            starts = np.concatenate([[0], np.cumsum(np.concatenate(found))]).astype(np.int64)
            np.save(_file(folder, "starts", part), starts)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return {}


def _blocks(
    matrix: Any, shape: tuple[int, int], path: Path, folder: Path
) -> Iterator[tuple[int, Any]]:
    """Sparse rows of a matrix on disk in parts, each with the number of its first row."""
    from scipy import sparse

    n, width = shape
    form = form_of(matrix, path)
    if form == "array":
        at_once = max(1, ENTRIES_AT_ONCE // width)
        for first in range(0, n, at_once):
            dense = in_float32(matrix[first : first + at_once], path)  # SciPy has no float16
            yield first, sparse.csr_matrix(dense)
        return
    data, indices, starts = sparse_arrays(matrix, path)
    require_space(folder, 8 * data.shape[0])
    if form == "csc_matrix":
        each = data.dtype.itemsize + indices.dtype.itemsize
        require_memory(3 * each * data.shape[0], f"{path}, stored by genes and not by cells,")
        whole = sparse_rows(matrix, path)
        bounds, read = whole.indptr, lambda a, b: whole[a:b]
    else:
        bounds = starts[:].astype(np.int64)
        _require_bounds(bounds, n, min(data.shape[0], indices.shape[0]), path)

        def read(a: int, b: int) -> Any:
            low, high = int(bounds[a]), int(bounds[b])
            arrays = data[low:high], indices[low:high], bounds[a : b + 1] - low
            return checked_rows(arrays, matrix, path, b - a)

    first = 0
    while first < n:
        enough = np.searchsorted(bounds, bounds[first] + ENTRIES_AT_ONCE, "right") - 1
        past = min(n, max(first + 1, int(enough)))
        yield first, read(first, past)
        first = past


def _require_bounds(bounds: np.ndarray, n: int, entries: int, path: Path) -> None:
    """Raise `UsageError` unless these are the numbers of the first entries of n rows."""
    grows = len(bounds) == n + 1 and bounds[0] == 0 and bool((np.diff(bounds) >= 0).all())
    if not grows or bounds[-1] > entries:
        raise UsageError(f"{path} holds a damaged sparse matrix (the row pointer is wrong)")


def _checked(rows: Any, path: Path, first: int) -> Any:
    """Sparse rows as float32; raise `UsageError` for bad numbers."""
    rows.data = in_float32(rows.data, path)
    bad = ~np.isfinite(rows.data)
    if bad.any():
        of_entry = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
        for row in np.unique(of_entry[bad]):
            dense = torch.from_numpy(rows[row].toarray())
            require_finite(dense, str(path), start=first + int(row), missing=True)
            require_observed_rows(dense, path, first + int(row))
    return rows

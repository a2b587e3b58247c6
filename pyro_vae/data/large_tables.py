"""Tables that stay on disk: they are converted once into arrays that are read by rows.

The file is read in parts, so memory stays small. A first reading infers the schema from
representative rows: evenly spaced ones, and those that hold a new category, a hole or an extreme
value. A second one writes the rows of each part of the data, as numbers, into a .npy file.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import torch

from pyro_vae.data import disk
from pyro_vae.data.disk import rows_of
from pyro_vae.data.infer_schema import FEW, MANY
from pyro_vae.data.schema import Column, Schema, read_schema
from pyro_vae.data.sizes import require_memory
from pyro_vae.data.split import Data, Split
from pyro_vae.data.stores import require_space, state_of, stored
from pyro_vae.data.table_files import arrow, require_columns
from pyro_vae.data.table_streams import TableStream, first_rows, streamed
from pyro_vae.data.table_values import PARTS, frame_of, grouped_parts, named_parts
from pyro_vae.data.tables import Table, present, schema_of, table_of
from pyro_vae.errors import UsageError
from pyro_vae.pairs.progress import bar

SAMPLED = 20_000
"""About the number of evenly spaced rows from which a schema is inferred."""

MOST_CATEGORIES = 100_000
"""The number of categories that a column may have that is told to hold categories."""

_VERSION = 1


@dataclass(frozen=True)
class LargeTable:
    """A table on disk, and what is needed to return results in its form."""

    stream: TableStream
    schema: Schema
    ids: Sequence[Any]
    """The row ids; row numbers from 0 if no column has the role row id."""

    def __len__(self) -> int:
        return self.stream.rows

    @property
    def id_name(self) -> str:
        """The name of the column of row ids."""
        return self.schema.id_name

    def rows(self, index: torch.Tensor) -> Table:
        """These rows of the table, in memory. The whole file is read once."""
        found = self.stream.taken(index.numpy())
        return table_of(self.stream.path.stem, found, self.schema)

    def frame(self, x: torch.Tensor, ids: Sequence[Any] | None = None) -> Any:
        """Rows (n, columns) as an Arrow table with the names, kinds and categories of the data."""
        kinds = {name: self.stream.types.field(i).type for i, name in enumerate(self.stream.names)}
        return frame_of(self.schema, x, self.id_name, ids, kinds)


class _Ids(Sequence[Any]):
    """An Arrow column of a mapped file, one value of which is read at a time."""

    def __init__(self, column: Any) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, row: int) -> Any: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Any]: ...
    def __getitem__(self, row: Any) -> Any:
        return _Ids(self.column[row]) if isinstance(row, slice) else self.column[row].as_py()


def is_large(path: Path) -> bool:
    """Whether the numbers of a table file need 1 GiB or more, so that it stays on disk."""
    if not path.is_file():
        return False
    need = path.stat().st_size
    if path.suffix == ".parquet":
        try:
            about = arrow("pyarrow.parquet").read_metadata(path)
        except (arrow().ArrowException, OSError):
            return False  # reading it says what is wrong
        need = max(need, 8 * about.num_rows * about.num_columns)
    return need >= disk.LEAST_BYTES


def load_table(path: Path, columns: Any, cache: Path, new: bool = False) -> Data:
    """The parts of a table on disk; a part of 1 GiB or more is not loaded.

    Arguments:
        path: a .csv, .tsv, .parquet, .feather or .arrow file.
        columns: changes of the inferred schema, or the whole schema; see `pyro_vae.read_table`.
        cache: the folder for the converted table.
        new: whether all rows are test data, for a pair that was fitted to other rows.

    The parts have the same rows as those of a smaller table, in the order of the file. Raises
    `UsageError` for a table that cannot be read, modeled or converted.
    """
    folder = cache / "tables"
    stream = _opened(path, folder)
    if isinstance(columns, Schema):
        schema = present(columns, stream.names)
    else:
        schema = _inferred(stream, columns, folder)
    if not schema.data:
        raise UsageError(f"{path.stem} has no column with the role 'data'")
    key = [_VERSION, state_of(path), _plain(schema), new]
    place = folder / _name([str(path.resolve()), _plain(schema), new])
    stored(place, key, lambda made: _convert(stream, schema, made, new))
    splits = [_split(place, part) for part in PARTS]
    ids: Sequence[Any] = range(stream.rows)
    if schema.one("row id") is not None:
        pa = arrow()
        ids = _Ids(pa.ipc.open_file(pa.memory_map(str(place / "ids.arrow"))).read_all().column(0))
    table = LargeTable(stream, schema, ids)
    return Data(path.stem, splits[0], splits[1], splits[2], table=table, schema=schema)


def _opened(path: Path, folder: Path) -> TableStream:
    """A table file; its types and its number of rows are found once for each state of the file."""

    def find(_: Path) -> dict[str, Any]:
        found = streamed(path)
        require_columns(found.names, found.rows, str(path))
        return {"rows": found.rows, "types": found.types.serialize().to_pybytes().hex()}

    place = folder / f"types-{_name(str(path.resolve()))}"
    about = stored(place, [_VERSION, state_of(path)], find)
    pa = arrow()
    types = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(about["types"])))
    return TableStream(path, about["rows"], types)


def _cut_short(stream: TableStream, rows: int) -> UsageError:
    return UsageError(
        f"{stream.path} is cut short or damaged: it declares {stream.rows} rows, but holds {rows}"
    )


def _plain(schema: Schema) -> list[dict[str, Any]]:
    return [asdict(column) | {"why": ""} for column in schema.columns]


def _name(words: Any) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def _inferred(stream: TableStream, columns: Any, folder: Path) -> Schema:
    """The schema of a table with changes, which is inferred once for each state of the file."""
    changes = read_schema(columns) if isinstance(columns, str | Path) else columns or {}
    Schema(tuple(map(Column, stream.names))).changed(changes)  # raises for unknown names
    told = json.loads(json.dumps(changes, default=str))
    key = [_VERSION, state_of(stream.path), told]
    place = folder / f"schema-{_name([str(stream.path.resolve()), told])}"

    def infer(_: Path) -> dict[str, Any]:
        found = schema_of(_representative(stream, changes), changes)
        return {"columns": [asdict(column) for column in found.columns]}

    about = stored(place, key, infer)
    made = [Column(**{**one, "categories": tuple(one["categories"])}) for one in about["columns"]]
    return Schema(tuple(made))


def _representative(stream: TableStream, changes: Any) -> Any:
    """Rows of a table that show what its columns hold."""
    pa, every = arrow(), max(1, stream.rows // SAMPLED)
    told = Schema(tuple(map(Column, stream.names))).changed(changes).columns
    coded = {column.name for column in told if column.coded or column.role == "label"}
    seen = {
        name: _Seen(MOST_CATEGORIES if name in coded else _enough(kind))
        for name, kind in zip(stream.names, stream.types.types, strict=True)
        if not pa.types.is_nested(kind)
    }
    found = []
    for first, part in _shown(stream, "inferring the schema"):
        rows = set(range(-first % every, len(part), every))
        for name, so_far in seen.items():
            rows.update(so_far.new(part[name].combine_chunks()))
        found.append(part.take(pa.array(sorted(rows), pa.int64())))
    if not found:
        raise _cut_short(stream, 0)
    return pa.concat_tables(found).unify_dictionaries().combine_chunks()


def _enough(kind: Any) -> int:
    """The number of different values of a column after which others do not change its kind."""
    types = arrow().types
    return 3 if types.is_floating(kind) else FEW + 1 if types.is_integer(kind) else MANY + 1


class _Seen:
    """The values of a column so far."""

    def __init__(self, most: int) -> None:
        self.most, self.known = most, set[Any]()
        self.hole = self.fraction = False
        self.low, self.high = np.inf, -np.inf

    def new(self, values: Any) -> list[int]:
        """The rows of a part of a column that hold something new; none if Arrow cannot compare."""
        try:
            return list(self._new(values))
        except arrow().ArrowException:
            return []

    def _new(self, values: Any) -> Iterator[int]:
        pa = arrow()
        if values.null_count and not self.hole:
            self.hole = True
            yield values.is_null().index(True).as_py()
        if len(self.known) < self.most:
            yield from first_rows(values, self.known, self.most)
        if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
            return
        numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        if np.isnan(numbers).all():
            return
        low, high = int(np.nanargmin(numbers)), int(np.nanargmax(numbers))
        if numbers[low] < self.low:
            self.low = numbers[low]
            yield low
        if numbers[high] > self.high:
            self.high = numbers[high]
            yield high
        if not self.hole and np.isnan(numbers).any():
            self.hole = True
            yield int(np.isnan(numbers).argmax())
        fractions = np.isfinite(numbers) & (np.floor(numbers) != numbers)
        if not self.fraction and fractions.any():
            self.fraction = True
            yield int(fractions.argmax())


def _shown(stream: TableStream, title: str) -> Iterator[tuple[int, Any]]:
    """The parts of a table, with a bar after two seconds."""
    with bar(True, stream.rows, f"{stream.path.name}: {title}", delay=2) as shown:
        for first, part in stream.parts():
            yield first, part
            shown.update(len(part))


def _convert(stream: TableStream, schema: Schema, folder: Path, new: bool) -> dict[str, Any]:
    """Write the arrays of each part of a table into a folder; nothing else is known about them."""
    require_memory(9 * stream.rows, f"the order of the {stream.rows} rows of {stream.path}")
    parts = _parts(stream, schema, new)
    if len(parts) != stream.rows:
        raise _cut_short(stream, len(parts))
    counts = np.bincount(parts, minlength=3).tolist()
    for part, count in zip(PARTS, counts, strict=True):
        if not count and not new:
            raise UsageError(f"{stream.path.stem} has no {part} rows")
    require_space(folder, 8 * stream.rows * (len(schema.data) + 2))
    with ExitStack() as opened:
        files: dict[str, BinaryIO] = {}
        read = 0
        for first, rows in _shown(stream, "converting"):
            table = table_of(stream.path.stem, rows, schema, first)
            arrays = {"x": table.x, "labels": table.labels, "context": table.context}
            arrays["rows"] = torch.arange(first, first + len(table))
            of_row = parts[first : first + len(table)]
            read += len(table)
            if read > stream.rows:
                break
            held = [(name, array.numpy()) for name, array in arrays.items() if array is not None]
            for (name, array), (number, part) in product(held, enumerate(PARTS)):
                file, chosen = f"{name}-{part}.npy", array[of_row == number]
                if file not in files:
                    files[file] = opened.enter_context(open(folder / file, "wb"))
                    _begin(files[file], (counts[number], *chosen.shape[1:]), chosen.dtype)
                files[file].write(np.ascontiguousarray(chosen).data)
        if read != stream.rows:
            raise _cut_short(stream, read)
        for written in files.values():
            written.flush()
            os.fsync(written.fileno())
    if (column := schema.one("row id")) is not None:
        _write_ids(stream, column, folder / "ids.arrow")
    return {}


def _begin(file: BinaryIO, shape: tuple[int, ...], kind: np.dtype[Any]) -> None:
    about = {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(kind)}
    np.lib.format.write_array_header_1_0(file, about)


def _parts(stream: TableStream, schema: Schema, new: bool) -> np.ndarray:
    """The number of the part of each row: those of `Table.split`."""
    if new:
        return np.full(stream.rows, 2, np.int8)
    if (column := schema.one("split")) is not None:
        found = [named_parts(column, rows[column.name], i) for i, rows in stream.parts()]
        return np.concatenate(found).astype(np.int8)
    if (column := schema.one("group")) is not None:
        groups = [rows[column.name] for _, rows in stream.parts()]
        chunks = [chunk for one in groups for chunk in one.chunks]
        return grouped_parts(column, arrow().chunked_array(chunks))
    order = torch.randperm(stream.rows, generator=torch.Generator().manual_seed(0)).numpy()
    ends = [stream.rows * share // 10 for share in (7, 8)]
    parts = np.full(stream.rows, 2, np.int8)
    parts[order[: ends[1]]] = 1
    parts[order[: ends[0]]] = 0
    return parts


def _write_ids(stream: TableStream, column: Column, path: Path) -> None:
    pa = arrow()
    kind = stream.types.field(stream.names.index(column.name)).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kept = pa.schema([(column.name, kind)])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, kept) as writer:
        for _, rows in stream.parts():
            writer.write_table(rows.select([column.name]).cast(kept))


def _split(place: Path, part: str) -> Split:
    """A part of a converted table: its rows stay on disk if they need 1 GiB or more."""
    arrays: dict[str, Any] = {}
    for name in ("x", "labels", "context", "rows"):
        path = place / f"{name}-{part}.npy"
        if not path.is_file():
            continue
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays[name] = rows_of(mapped) if name == "x" else None
        if arrays[name] is None:
            require_memory(mapped.nbytes, str(path))
            arrays[name] = torch.from_numpy(np.array(mapped))
    return Split(**arrays)

"""Read a table file a part at a time: CSV, Parquet and Feather files of any size."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.table_files import (
    arrow,
    columns_named,
    csv_options,
    require_columns,
    require_csv,
)
from pyro_vae.errors import UsageError, first_line

ROWS_AT_ONCE = 2**16
"""The number of rows of a part of a Parquet file."""

CSV_BYTES = 2**24
"""The size of a part of a CSV file."""

_TIMES = ("date32[day]", "timestamp[s]", "timestamp[ns]")
"""Types of times in CSV files; each holds the values of those before it."""


@dataclass(frozen=True)
class TableStream:
    """A table file whose rows are read in order, part by part."""

    path: Path
    rows: int
    """The number of rows."""
    types: Any = field(repr=False)
    """The Arrow schema of the parts."""

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return columns_named(self.types.names)

    def parts(self) -> Iterator[tuple[int, Any]]:
        """The number of the first row of each part, and the part as an Arrow table."""
        first = 0
        with _faults(self.path):
            for batch in _batches(self.path, self.types):
                batch.validate(full=True)  # a damaged file may lead out of its buffers
                table = arrow().Table.from_batches([batch]).rename_columns(self.names)
                yield first, table
                first += len(table)

    def taken(self, rows: np.ndarray) -> Any:
        """These rows as an Arrow table, in this order. The whole file is read once."""
        order, found = np.sort(rows), []
        for first, part in self.parts():
            a, b = np.searchsorted(order, (first, first + len(part)))
            if b > a:
                found.append(part.take(order[a:b] - first))
        table = arrow().concat_tables(found).unify_dictionaries().combine_chunks()
        return table.take(np.argsort(np.argsort(rows, kind="stable"), kind="stable"))


def streamed(path: Path) -> TableStream:
    """Open a table file; a CSV file is read once for the types of its columns.

    Raises `UsageError` for a file that cannot be read.
    """
    pa = arrow()
    with _faults(path):
        if path.suffix in (".csv", ".tsv"):
            return TableStream(path, *_csv_types(path))
        if path.suffix == ".parquet":
            file = arrow("pyarrow.parquet").ParquetFile(path)
            return TableStream(path, file.metadata.num_rows, file.schema_arrow)
        with pa.memory_map(str(path)) as source:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
            return TableStream(path, sum(batch.num_rows for batch in batches), file.schema)


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Turn the errors of a file that cannot be read into one line."""
    try:
        yield
    except UsageError:
        raise
    except (arrow().ArrowException, OSError, ValueError, OverflowError) as error:
        words = first_line(error)[:120]
        raise UsageError(f"{path} cannot be read as a {path.suffix} table ({words})") from error


def _batches(path: Path, types: Any) -> Iterator[Any]:
    pa = arrow()
    if path.suffix in (".csv", ".tsv"):
        yield from _csv(path, dict(zip(types.names, types.types, strict=True)))
    elif path.suffix == ".parquet":
        # Without a buffer of a whole row group, less memory is used, and reading is not slower.
        file = arrow("pyarrow.parquet").ParquetFile(path, pre_buffer=False, buffer_size=2**20)
        yield from file.iter_batches(ROWS_AT_ONCE)
    else:
        with pa.memory_map(str(path)) as source:
            file = pa.ipc.open_file(source)
            for i in range(file.num_record_batches):
                batch = file.get_batch(i)
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                    yield batch.slice(start, ROWS_AT_ONCE)


def _csv(path: Path, types: dict[str, Any] | None) -> Any:
    """A reader of the parts of a CSV file, with these types."""
    parse, convert = csv_options(path)
    csv = arrow("pyarrow.csv")
    convert.column_types = types or {}
    return csv.open_csv(path, csv.ReadOptions(block_size=CSV_BYTES), parse, convert)


def _csv_types(path: Path) -> tuple[int, Any]:
    """The number of rows of a CSV file, and the types of its columns, from all of its values."""
    pa = arrow()
    with open(path, "rb") as file:
        require_csv(path, file.read(2**16))
    names = _csv(path, None).schema.names
    require_columns(columns_named(names), 1, str(path))
    rows, found = 0, dict.fromkeys(names, pa.null())
    for batch in _csv(path, dict.fromkeys(names, pa.string())):
        rows += batch.num_rows
        for name, values in zip(names, batch.columns, strict=True):
            if found[name] != pa.string():
                found[name] = _joined(found[name], _type_of(path, values))
    return rows, pa.schema(list(found.items()))


def _type_of(path: Path, words: Any) -> Any:
    """The type that Arrow infers for a column of a CSV file, from its words in one part."""
    pa, csv = arrow(), arrow("pyarrow.csv")
    sink = io.BytesIO()
    different = words.unique().drop_null()
    if not len(different):
        return pa.null()
    csv.write_csv(pa.table({"column": different}), sink)
    _, convert = csv_options(path)
    parse = csv.ParseOptions(newlines_in_values=True)
    return csv.read_csv(io.BytesIO(sink.getvalue()), None, parse, convert).schema.types[0]


def _joined(one: Any, other: Any) -> Any:
    """The type that holds the values of both types: whole numbers are floats, too."""
    pa = arrow()
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    named = sorted(map(str, (one, other)))
    if named == ["double", "int64"]:
        return pa.float64()
    if set(named) <= set(_TIMES):
        return max((one, other), key=lambda kind: _TIMES.index(str(kind)))
    return pa.string()


def first_rows(values: Any, known: set[Any], most: int) -> Sequence[int]:
    """The first row of each value of an Arrow array that is not known; they become known."""
    pa = arrow()
    coded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    kept = coded.indices.drop_null().to_numpy(zero_copy_only=False)
    places = np.flatnonzero(coded.indices.is_valid().to_numpy(zero_copy_only=False))
    numbers, first = np.unique(kept, return_index=True)
    different, found = coded.dictionary.to_pylist(), []
    for number, row in zip(numbers.tolist(), places[first].tolist(), strict=True):
        value = different[number]
        if len(known) < most and value not in known and value == value:
            known.add(value)
            found.append(row)
    return found

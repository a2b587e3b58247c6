"""Tables: rows of columns of several kinds, with missing entries, row ids, and the way back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.infer_schema import infer_schema
from pyro_vae.data.schema import Column, Schema, different, read_schema
from pyro_vae.data.split import Data, Split, taken, three_ways
from pyro_vae.data.table_files import arrow, arrow_table
from pyro_vae.data.table_values import (
    PARTS,
    array,
    coded,
    encoded,
    frame_of,
    grouped_parts,
    named_parts,
    plain,
)
from pyro_vae.errors import UsageError, nearest


@dataclass(frozen=True)
class Table:
    """A table as tensors, and what is needed to return results in its form."""

    name: str
    schema: Schema
    x: Tensor
    """The data columns, float64 (n, columns): numbers, and codes of categories; NaN is missing."""
    source: Any
    """The Arrow table."""
    first: int = 0
    """The number of the first row in the file, for messages."""

    def __len__(self) -> int:
        return len(self.x)

    @property
    def ids(self) -> tuple[Any, ...]:
        """The row ids; row numbers from 0 if no column has the role row id."""
        column = self.schema.one("row id")
        return tuple(range(len(self))) if column is None else tuple(self._values(column))

    @property
    def id_name(self) -> str:
        """The name of the column of row ids."""
        return self.schema.id_name

    @property
    def labels(self) -> Tensor | None:
        """The codes of the label column, integers (n,), -1 where missing; None without one."""
        column = self.schema.one("label")
        if column is None:
            return None
        found = coded(column, self.source[column.name], self.first)
        return torch.from_numpy(found).nan_to_num(nan=-1).long()

    @property
    def context(self) -> Tensor | None:
        """The context columns as floats (n, width): numbers, and one-hot rows of categories."""
        columns = self.schema.of("context")
        return torch.cat([self._context(c) for c in columns], 1).float() if columns else None

    def values(self, name: str) -> list[Any]:
        """The values of the column of this name, None where they are missing."""
        return self._values(next(c for c in self.schema.columns if c.name == name))

    def _values(self, column: Column) -> list[Any]:
        return plain(self.source[column.name])

    def _context(self, column: Column) -> Tensor:
        values = torch.from_numpy(encoded(column, self.source[column.name], self.first).copy())
        if bool(values.isnan().any()):
            row = self.first + int(values.isnan().nonzero()[0])
            raise UsageError(
                f"context column '{column.name}' is empty in row {row}: only data columns can "
                "have missing entries"
            )
        if not column.coded:
            return values[:, None]
        return torch.nn.functional.one_hot(values.long(), len(column.categories)).double()

    def split(self) -> Data:
        """Training, validation and test data: by the split column, or 70 : 10 : 20 at random.

        Rows of one group are in the same part. Raises `UsageError` if a part would be empty.
        """
        whole = Split(self.x, self.labels, self.context, rows=torch.arange(len(self)))
        if (parts := self._parts()) is None:
            data = three_ways(self.name, whole)
            return Data(
                self.name, data.train, data.validation, data.test, table=self, schema=self.schema
            )
        found = [taken(whole, torch.from_numpy(np.flatnonzero(parts == i))) for i in range(3)]
        for name, part in zip(PARTS, found, strict=True):
            if not len(part.x):
                raise UsageError(f"{self.name} has no {name} rows")
        return Data(self.name, found[0], found[1], found[2], table=self, schema=self.schema)

    def _parts(self) -> np.ndarray | None:
        """The number of the part of each row, if a column determines it."""
        if (column := self.schema.one("split")) is not None:
            return named_parts(column, self.source[column.name], self.first)
        if (column := self.schema.one("group")) is not None:
            return grouped_parts(column, self.source[column.name])
        return None

    def new(self) -> Data:
        """All rows as test data, for a pair that was fitted to other rows."""
        whole = Split(self.x, self.labels, self.context, rows=torch.arange(len(self)))
        none = taken(whole, torch.arange(0))
        return Data(self.name, none, none, whole, table=self, schema=self.schema)

    def frame(self, x: Tensor, ids: Sequence[Any] | None = None) -> Any:
        """Rows (n, columns) as an Arrow table with the names, kinds and categories of the data.

        Arguments:
            x: numbers and codes; NaN becomes a missing entry.
            ids: the row ids, which become the first column.
        """
        return frame_of(self.schema, x, self.id_name, ids, self._types())

    def filled(self, x: Tensor) -> Any:
        """The table with its missing entries taken from x; all other cells are as they were."""
        table, rows = self.source, torch.isnan(self.x)
        made = self.frame(x)
        for j, column in enumerate(self.schema.data):
            holes = rows[:, j].numpy()
            if not holes.any():
                continue
            old, new = self._values(column), made[column.name].to_pylist()
            merged = [b if hole else a for a, b, hole in zip(old, new, holes, strict=True)]
            at = table.column_names.index(column.name)
            table = table.set_column(at, column.name, array(merged, self._types()[column.name]))
        return table

    def rows(self, index: Tensor) -> "Table":
        """These rows of the table, in this order."""
        return Table(self.name, self.schema, self.x[index], self.source.take(index.numpy()))

    def long(self, draws: Tensor) -> Any:
        """The table and its draws (draws, n, columns) below each other, as R's mice expects them.

        ``.imp`` is 0 for the table with its holes, and 1, 2, ... for the draws; ``.id`` is the row,
        from 1. `mice::as.mids` reads this form, and so do groups of `.imp` in statsmodels.
        """
        pa, n = arrow(), len(self)
        copies = [self.source, *(self.filled(draw) for draw in draws)]
        whole = pa.concat_tables(copies, promote_options="permissive")
        number = pa.array(np.repeat(np.arange(len(copies)), n))
        return whole.add_column(
            0, ".id", pa.array(np.tile(np.arange(1, n + 1), len(copies)))
        ).add_column(0, ".imp", number)

    def cells(self, found: Any) -> Any:
        """A line for each missing cell: the row, the column, the value, its interval, reliability.

        The reliability is the effective sample size of the row, and its Pareto k or, for draws by
        NUTS, its R-hat.

        Arguments:
            found: the `pyro_vae.inference.imputation.Imputation` of the rows of this table, whose
                intervals are left out for categories.
        """
        low, high = found.low, found.high
        values = {
            column.name: self.frame(found.mean)[column.name].to_pylist()
            for column in self.schema.data
        }
        at, columns, ids = found.missing.nonzero().tolist(), self.schema.data, self.ids
        numeric = [not columns[j].coded for _, j in at]
        said = "r_hat" if found.method == "nuts" else "pareto_k"
        return arrow().table(
            {
                self.id_name: [ids[i] for i, _ in at],
                "column": [columns[j].name for _, j in at],
                "value": [str(values[columns[j].name][i]) for i, j in at],
                "low": [
                    low[i, j].item() if n else None for (i, j), n in zip(at, numeric, strict=True)
                ],
                "high": [
                    high[i, j].item() if n else None for (i, j), n in zip(at, numeric, strict=True)
                ],
                "effective_sample_size": [found.effective_sample_size[i].item() for i, _ in at],
                said: [getattr(found, said)[i].item() for i, _ in at],
            }
        )

    def _types(self) -> dict[str, Any]:
        """The Arrow type of each data column, without dictionaries."""
        pa, found = arrow(), {}
        for column in self.schema.data:
            kind = self.source[column.name].type
            found[column.name] = kind.value_type if pa.types.is_dictionary(kind) else kind
        return found


def read_table(
    source: Any, columns: Mapping[str, Any] | str | Path | Schema | None = None
) -> Table:
    """Read a table from a file or a data frame, and infer what its columns hold.

    Arguments:
        source: a .csv, .tsv, .parquet, .feather or .arrow file; or a data frame that exports itself
            to Arrow, as those of pandas and polars do; or a mapping from names to lists.
        columns: changes of the inferred schema: a kind, a role, or a mapping with ``kind``,
            ``role``, ``categories`` and ``period``, by the name of the column (see
            `Schema.changed`); or the path of a TOML file of such changes; or the whole `Schema` of
            another table, as of a run.

    The kinds are continuous, positive, count, circular (never inferred), binary, categorical and
    ordinal. The roles are data, ignored, label, context, row id, group and split. Empty cells, NaN
    and nulls are missing entries.

    Raises `UsageError` for a table that cannot be read or modeled, with the column and the row.

    >>> table = read_table({"age": [30.5, 41.5, None, 20.5], "sex": ["f", "m", "f", "m"]})
    >>> table.x
    tensor([[30.5000,  0.0000],
            [41.5000,  1.0000],
            [    nan,  0.0000],
            [20.5000,  1.0000]], dtype=torch.float64)
    >>> table.schema.data[1].categories
    ('f', 'm')
    """
    made = arrow_table(source)
    name = Path(source).stem if isinstance(source, str | Path) else "table"
    return table_of(name, made, schema_of(made, columns))


def table_of(name: str, made: Any, schema: Schema, first: int = 0) -> Table:
    """An Arrow table as tensors by its schema; ``first`` is the number of its first row."""
    if not schema.data:
        raise UsageError(f"{name} has no column with the role 'data'")
    x = np.stack([encoded(column, made[column.name], first) for column in schema.data], 1)
    empty = np.isnan(x).all(1)
    if empty.any():
        row = first + int(empty.argmax())
        raise UsageError(f"row {row} of {name} has no observed entry: remove it")
    return Table(name, schema, torch.from_numpy(x), made, first)


def schema_of(table: Any, columns: Mapping[str, Any] | str | Path | Schema | None) -> Schema:
    """The schema of an Arrow table, with changes, or by the whole schema of another table."""
    if isinstance(columns, Schema):
        schema = present(columns, table.column_names)
    else:
        changes = read_schema(columns) if isinstance(columns, str | Path) else columns or {}
        schema = _inferred(table, changes)
    for role in ("row id", "label", "group", "split"):
        schema.one(role)
    return schema


def _inferred(table: Any, changes: Mapping[str, Any]) -> Schema:
    """The schema of an Arrow table, whose ignored columns are not examined."""
    names = table.column_names
    untold = Schema(tuple(map(Column, names)))
    told = dict(zip(names, untold.changed(changes).columns, strict=True))
    roles = {name for name in changes if told[name].role not in ("data", "context", "label")}
    examined = [name for name in names if name not in roles]
    coded = {name for name in changes if told[name].coded and name not in roles}
    found = infer_schema(examined, (plain(table[name]) for name in examined), coded)
    by_name = {
        c.name: _of_dictionary(c, table.schema.field(c.name).type, table[c.name])
        for c in found.columns
    }
    if any(told[name].role == "row id" for name in roles):
        by_name = {key: _no_id(column) for key, column in by_name.items()}
    schema = Schema(tuple(by_name.get(name) or told[name] for name in names))
    changed = schema.changed({name: changes[name] for name in changes if name not in roles})
    return Schema(tuple(_with_categories(c, table) for c in changed.columns))


def _of_dictionary(column: Column, kind: Any, values: Any) -> Column:
    """The categories of a dictionary column (a pandas category) in their own order."""
    if not arrow().types.is_dictionary(kind) or column.role != "data" or not column.coded:
        return column
    categories = tuple(values.chunk(0).dictionary.to_pylist())
    named = "ordinal" if kind.ordered else "binary" if len(categories) == 2 else "categorical"
    return Column(column.name, named, categories)


def _no_id(column: Column) -> Column:
    if column.role != "row id":
        return column
    return Column(column.name, role="ignored", why="all values differ")


def _with_categories(column: Column, table: Any) -> Column:
    """The column with the categories of the data, if it holds categories and names none."""
    label = column.role == "label" and not column.coded
    if column.kind == "binary" and len(column.categories) > 2:
        raise UsageError(
            f"column '{column.name}' has {len(column.categories)} values, so it is not binary"
        )
    if column.role not in ("data", "context", "label") or column.categories:
        return column
    if not (column.coded or label):
        return column
    present = [value for value in plain(table[column.name]) if value is not None]
    values = different(column.name, present)
    if column.kind == "binary" and len(values) != 2:
        raise UsageError(f"column '{column.name}' has {len(values)} values, so it is not binary")
    kind = "categorical" if label else column.kind
    return Column(column.name, kind, values, column.role)


def present(schema: Schema, names: Sequence[str]) -> Schema:
    """The schema of a run for another table, which may lack labels, groups, ids and the split."""
    for column in schema.columns:
        if column.name not in names and column.role in ("data", "context"):
            raise UsageError(
                f"the table has no column '{column.name}', which the schema has as {column.role}; "
                f"{nearest(column.name, list(names))}"
            )
    return Schema(tuple(column for column in schema.columns if column.name in names))

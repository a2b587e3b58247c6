"""The schema of a table: what each column holds, and what it is used for."""

import hashlib
import json
import tomllib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, pi
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from pyro_vae.data.sizes import read_bytes
from pyro_vae.errors import UsageError, first_line, nearest
from pyro_vae.pairs.showing import shown_html
from pyro_vae.parts.columns import CIRCULAR, CODED, KINDS, Columns

Value: TypeAlias = "str | int | float | bool"

ROLES = ("data", "ignored", "label", "context", "row id", "group", "split")

ENTRIES = ("kind", "role", "categories", "period")
"""What a change of a column may hold."""

SCHEMA = "schema.toml"
"""The name of the file in a run folder."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    kind: str = "continuous"
    """continuous, positive, count, circular, binary, categorical or ordinal."""
    categories: tuple[Value, ...] = ()
    """The categories in the order of their codes 0, 1, ...; empty for numbers."""
    role: str = "data"
    """data, ignored, label, context, row id, group or split."""
    why: str = ""
    """Why the role was inferred, if it is ignored."""
    period: float = 0.0
    """The period of a circular column, such as 24 for hours; 0 for other kinds."""

    def __post_init__(self) -> None:
        if "censored" in str(self.kind) or self.kind == "interval":
            raise UsageError(
                f"column '{self.name}' cannot be {self.kind}, because a table holds one number for "
                "each cell: write a pair of your own with the bounds as context, as in the page "
                "'Your own data', section 'Interval-censored values'"
            )
        if self.kind not in KINDS:
            raise UsageError(
                f"column '{self.name}' has an unknown kind '{self.kind}'; "
                f"{nearest(self.kind, KINDS)}"
            )
        if self.role not in ROLES:
            raise UsageError(
                f"column '{self.name}' has an unknown role '{self.role}'; "
                f"{nearest(self.role, ROLES)}"
            )
        for one in self.categories:
            if not isinstance(one, str | int | float | bool):
                raise UsageError(
                    f"the categories of column '{self.name}' must be words or numbers, got values "
                    f"of type {type(one).__name__}: write them as words"
                )

    @property
    def coded(self) -> bool:
        """Whether the column holds categories."""
        return self.kind in CODED


@dataclass(frozen=True)
class Schema:
    """The columns of a table, in order.

    >>> schema = Schema((Column("age", "count"), Column("sex", "binary", ("f", "m"))))
    >>> print(schema)
    column  kind    role  categories
    age     count   data
    sex     binary  data  f, m
    """

    columns: tuple[Column, ...]

    def of(self, role: str) -> tuple[Column, ...]:
        """The columns of a role."""
        return tuple(column for column in self.columns if column.role == role)

    def one(self, role: str) -> Column | None:
        """The column of a role that at most one column has."""
        found = self.of(role)
        if len(found) > 1:
            names = ", ".join(column.name for column in found)
            raise UsageError(f"only one column can have the role '{role}', got {names}")
        return found[0] if found else None

    @property
    def data(self) -> tuple[Column, ...]:
        """The columns that the pair models."""
        return self.of("data")

    @property
    def id_name(self) -> str:
        """The name of the column of row ids; ``row`` if no column has this role."""
        column = self.one("row id")
        return "row" if column is None else column.name

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns that the pair models."""
        return tuple(column.name for column in self.data)

    def likelihood(self, x: Tensor, robust: bool = True) -> Columns:
        """The likelihood of these columns, standardized by rows (n, columns)."""
        levels = [len(column.categories) for column in self.data]
        kinds, periods = zip(*((c.kind, c.period) for c in self.data), strict=True)
        return Columns(kinds, levels, robust, periods=periods).standardize(x)

    def changed(self, columns: Mapping[str, Any]) -> "Schema":
        """The schema with other kinds, roles or categories of some columns.

        Arguments:
            columns: a kind, a role, or a mapping with ``kind``, ``role``, ``categories`` and
                ``period``, by the name of the column.

        Raises `UsageError` for a column that the table does not have.
        """
        if not isinstance(columns, Mapping):
            raise UsageError(
                "must be a mapping from the names of columns to their changes, got "
                f"{type(columns).__name__}",
                argument="columns",
            )
        known = {column.name: column for column in self.columns}
        for name, change in columns.items():
            if name not in known:
                raise UsageError(
                    f"the schema names a column '{name}', which the table does not have; "
                    f"{nearest(name, list(known))}"
                )
            known[name] = _changed(known[name], change)
        return Schema(tuple(known.values()))

    def to_file(self) -> bytes:
        """The schema as TOML for a run folder, with a checksum in its first line."""
        body = self.to_toml().encode()
        return _seal(body) + b"\n" + body

    def to_toml(self) -> str:
        """The schema as TOML, which `read_schema` and ``--columns`` take."""
        return "\n".join(_toml(column) for column in self.columns)

    _repr_html_ = shown_html

    def __str__(self) -> str:
        rows = [("column", "kind", "role", "categories")]
        for column in self.columns:
            words = ", ".join(map(str, column.categories[:6]))
            words += ", ..." if len(column.categories) > 6 else ""
            words = f"period {column.period:g}" if column.period else words
            kind = column.kind if column.role in ("data", "context", "label") else ""
            rows.append((column.name, kind, column.role, column.why or words))
        widths = [max(len(row[i]) for row in rows) + 2 for i in range(3)]
        lines = [
            "".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)) + row[3]
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def different(name: str, values: Sequence[Any]) -> tuple[Value, ...]:
    """The different values of a column of categories, sorted.

    Raises `UsageError` for lists and mappings, which cannot be compared.
    """
    for value in values:
        if not isinstance(value, Hashable):
            raise UsageError(
                f"column '{name}' holds values of type {type(value).__name__}, such as {value!r}, "
                "which cannot be categories or groups: write them as words"
            )
    return tuple(sorted(set(values)))


def read_schema(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read the changes of a schema from a TOML file with a table ``[columns.NAME]`` by column.

    Raises `UsageError` for a file that cannot be read or has other entries.
    """
    path = Path(path)
    try:
        found = tomllib.loads(read_bytes(path).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML ({first_line(error)})") from error
    columns = found.get("columns")
    if not isinstance(columns, dict) or not all(isinstance(c, dict) for c in columns.values()):
        raise UsageError(f"{path} must have a table [columns.NAME] for each column that it changes")
    for name, change in columns.items():
        _require_keys(name, change)
    return columns


def stored_schema(path: Path) -> Schema:
    """Read the whole schema of a run, which `Schema.to_file` or `Schema.to_toml` wrote.

    Raises `UsageError` if it does not match its checksum; files of version 0.1.0 have none.
    """
    if (content := read_bytes(path)).startswith(b"#"):
        seal, _, body = content.partition(b"\n")
        if seal != _seal(body):
            raise UsageError(
                f"{path} is cut short, damaged or edited: it does not match its checksum (sha256)"
            )
    return whole_schema(read_schema(path))


def _seal(body: bytes) -> bytes:
    return f"# sha256 {hashlib.sha256(body).hexdigest()}".encode()


def whole_schema(columns: Mapping[str, Any]) -> Schema:
    """The schema that mappings as those of `Schema.changed` describe by name."""
    return Schema(tuple(_changed(Column(name), change) for name, change in columns.items()))


def _changed(column: Column, change: Any) -> Column:
    if isinstance(change, str):
        if change in ROLES:
            return replace(column, role=change, why="")
        return _of_kind(replace(column, role="data", why=""), change)
    if not isinstance(change, Mapping):
        raise UsageError(
            f"column '{column.name}' must be changed by a kind, a role or a mapping, got {change!r}"
        )
    _require_keys(column.name, change)
    if "role" in change:
        column = replace(column, role=change["role"], why="")
    elif column.role == "ignored":
        column = replace(column, role="data", why="")
    if "kind" in change:
        column = _of_kind(column, change["kind"])
    if "categories" in change:
        column = replace(column, categories=_categories(column.name, change["categories"]))
    if "period" in change:
        column = replace(column, period=_period(column, change["period"]))
    return column


def _of_kind(column: Column, kind: str) -> Column:
    """The column with another kind; numbers have no categories, and angles are radians."""
    categories = column.categories if kind in CODED else ()
    period = (column.period or 2 * pi) if kind in CIRCULAR else 0.0
    return replace(column, kind=kind, categories=categories, period=period)


def _period(column: Column, given: Any) -> float:
    if column.kind not in CIRCULAR:
        raise UsageError(
            f"column '{column.name}' is {column.kind}; only circular columns have a period"
        )
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not 0 < given < inf:
        raise UsageError(
            f"the period of column '{column.name}' must be a number above 0, got {given!r}"
        )
    return float(given)


def _categories(name: str, given: Any) -> tuple[Value, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UsageError(f"the categories of column '{name}' must be a list, got {given!r}")
    if not all(isinstance(one, str | int | float | bool) for one in given):
        raise UsageError(
            f"the categories of column '{name}' must be words or numbers, got {list(given)!r}"
        )
    if len(set(given)) != len(given) or len(given) < 2:
        raise UsageError(
            f"column '{name}' needs at least 2 different categories, got {list(given)!r}"
        )
    return tuple(given)


def _require_keys(name: str, change: Mapping[str, Any]) -> None:
    for key in change:
        if key not in ENTRIES:
            known = nearest(key, ENTRIES)
            raise UsageError(f"column '{name}' has an unknown entry '{key}'; {known}")


def _toml(column: Column) -> str:
    lines = [f"[columns.{_json(column.name)}]", f'kind = "{column.kind}"']
    lines.append(f'role = "{column.role}"')
    if column.categories:
        lines.append(f"categories = {_json(list(column.categories))}")
    if column.period:
        lines.append(f"period = {column.period!r}")
    return "\n".join(lines) + "\n"


def _json(value: Any) -> str:
    """JSON that is TOML, too, which has no pairs of escapes for one character, and no bare DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

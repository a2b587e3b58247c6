"""Columns of plain values as numbers and codes, and back; the parts that columns name."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pyro_vae.data.infer_schema import PLAINLY, WRITTEN
from pyro_vae.data.schema import Column, Schema, different
from pyro_vae.data.table_files import arrow
from pyro_vae.errors import UsageError

PARTS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
PARTS |= {"val": "validation", "test": "test"}
"""The words of a column with the role split."""


def plain(column: Any) -> list[Any]:
    """The values of an Arrow column as Python values, with None for nulls and NaN."""
    return [
        None if value is None or (isinstance(value, float) and value != value) else value
        for value in column.to_pylist()
    ]


def encoded(column: Column, values: list[Any]) -> np.ndarray:
    """Values as float64, codes for categories, NaN where missing, checked against the kind."""
    if column.coded:
        return codes(column, values)
    for row, value in enumerate(values):
        if value is not None and not (isinstance(value, int | float) and np.isfinite(value)):
            raise UsageError(
                f"column '{column.name}' is {column.kind} but holds {value!r} in row {row}: "
                f"{_as_number(value)}"
            )
    numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
    wrong = np.zeros(len(numbers), bool)
    if column.kind == "positive":
        wrong = numbers <= 0
    elif column.kind == "count":
        wrong = (numbers < 0) | (np.floor(numbers) != numbers) & ~np.isnan(numbers)
    if wrong.any():
        row = int(wrong.argmax())
        needs = "numbers above 0" if column.kind == "positive" else "whole numbers from 0"
        raise UsageError(
            f"column '{column.name}' is {column.kind}, which needs {needs}, but holds "
            f"{numbers[row]:g} in row {row}"
        )
    return numbers


def _as_number(value: Any) -> str:
    """What to do about a value that should be a number."""
    if isinstance(value, str):
        return PLAINLY if WRITTEN.fullmatch(value) else "correct it, or leave its cell empty"
    if isinstance(value, float):
        return "correct it, or leave its cell empty"
    return f"turn values of type {type(value).__name__} into numbers, such as days for dates"


def codes(column: Column, values: list[Any]) -> np.ndarray:
    codes = {category: float(code) for code, category in enumerate(column.categories)}
    found, unknown = np.full(len(values), np.nan), []
    for row, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, Hashable) or value not in codes:
            value = str(value)  # a file in which all words are numbers
        if value in codes:
            found[row] = codes[value]
        else:
            unknown.append(row)
    if unknown:
        raise UsageError(_unknown(column, values, unknown))
    return found


def _unknown(column: Column, values: list[Any], rows: list[int]) -> str:
    """What is unknown in these rows, and what to do about it."""
    known = ", ".join(map(str, column.categories[:8]))
    known += ", ..." if len(column.categories) > 8 else ""
    more = f"; {len(rows)} rows hold such values" if len(rows) > 1 else ""
    # The context of a row must be known.
    empty = "" if column.role == "context" else ", or empty cells, which count as missing"
    return (
        f"column '{column.name}' holds {values[rows[0]]!r} in row {rows[0]}, which is not one of "
        f"its categories: {known}{more}; write known categories{empty}"
    )


def frame_of(
    schema: Schema,
    x: Tensor,
    id_name: str = "row",
    ids: Sequence[Any] | None = None,
    types: Mapping[str, Any] | None = None,
) -> Any:
    """Rows (n, columns) of a schema as an Arrow table; see `Table.frame`."""
    columns: dict[str, Any] = {} if ids is None else {id_name: list(ids)}
    for j, column in enumerate(schema.data):
        numbers: list[Any] = [None if value != value else value for value in x[:, j].tolist()]
        if column.coded:
            numbers = [None if code is None else column.categories[round(code)] for code in numbers]
        elif column.kind == "count":
            numbers = [None if value is None else _whole(value) for value in numbers]
        columns[column.name] = array(numbers, (types or {}).get(column.name))
    return arrow().table(columns)


def _whole(value: float) -> int | float:
    """A count as a whole number; the mean of counts may be another number."""
    return int(value) if value == int(value) else value


def array(values: list[Any], kind: Any) -> Any:
    """An Arrow array of this type, or of the type of the values if they do not fit into it."""
    pa = arrow()
    fraction = any(isinstance(value, float) and value % 1 for value in values)
    if kind is not None and pa.types.is_integer(kind) and fraction:
        kind = None  # Arrow would cut off the fractions
    try:
        return pa.array(values, type=kind)
    except (pa.ArrowException, TypeError, ValueError):
        return pa.array(values)


def named_parts(column: Column, values: list[Any]) -> np.ndarray:
    found = [PARTS.get(str(value).strip().lower(), "") for value in values]
    if "" in found:
        row = found.index("")
        raise UsageError(
            f"split column '{column.name}' must hold train, validation or test, got "
            f"{values[row]!r} in row {row}"
        )
    return np.array(found)


def grouped_parts(column: Column, values: list[Any]) -> np.ndarray:
    """A part for each row: groups in random order fill test, validation and training in turn."""
    groups: dict[Any, list[int]] = {}
    different(column.name, [value for value in values if value is not None])
    for row, value in enumerate(values):
        if value is None:
            raise UsageError(f"group column '{column.name}' is empty in row {row}")
        groups.setdefault(value, []).append(row)
    if len(groups) < 3:
        raise UsageError(
            f"group column '{column.name}' has {len(groups)} groups; three parts need 3"
        )
    order = np.random.default_rng(0).permutation(len(groups))
    found = np.full(len(values), "train", dtype=object)
    rows, members = 0, list(groups.values())
    for place, at in enumerate(order):
        left = len(order) - place
        share = rows / len(values)
        part = "test" if share < 0.2 and left > 2 else "validation" if share < 0.3 else "train"
        if part == "validation" and left == 1:
            part = "train"
        found[members[at]] = part
        rows += len(members[at])
    return found

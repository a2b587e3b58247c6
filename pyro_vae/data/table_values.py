"""Columns of plain values as numbers and codes, and back; the parts that columns name."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pyro_vae.data.infer_schema import PLAINLY, WRITTEN
from pyro_vae.data.schema import Column, Schema, different
from pyro_vae.data.table_files import arrow
from pyro_vae.errors import UsageError

PARTS = ("train", "validation", "test")

_PARTS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
_PARTS |= {"val": "validation", "test": "test"}
"""The words of a column with the role split."""


def plain(column: Any) -> list[Any]:
    """The values of an Arrow column as Python values, with None for nulls and NaN."""
    return [
        None if value is None or (isinstance(value, float) and value != value) else value
        for value in column.to_pylist()
    ]


def encoded(column: Column, values: Any, first: int = 0) -> np.ndarray:
    """An Arrow column as float64: codes for categories, NaN where missing; its kind is checked.

    Arguments:
        first: the number of the first row, for messages.
    """
    pa = arrow()
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    kind = values.type
    try:
        if column.coded:
            return _by_category(column, values)
        if pa.types.is_integer(kind) or kind in (pa.float32(), pa.float64(), pa.bool_()):
            numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
            if not np.isinf(numbers).any():
                return _checked(column, numbers, first)
    except (UsageError, pa.ArrowException):
        pass  # the values one by one say which row is wrong
    return _one_by_one(column, plain(values), first)


def coded(column: Column, values: Any, first: int = 0) -> np.ndarray:
    """An Arrow column as the codes of the categories, float64, NaN where missing."""
    pa = arrow()
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    try:
        return _by_category(column, values)
    except (UsageError, pa.ArrowException):
        return codes(column, plain(values), first)


def _by_category(column: Column, values: Any) -> np.ndarray:
    """Codes, of each different value once."""
    pa = arrow()
    found = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    numbers = found.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    used = np.unique(numbers[numbers >= 0])
    of_value = np.full(len(found.dictionary) + 1, np.nan)
    of_value[used] = codes(column, plain(found.dictionary.take(pa.array(used))))
    return of_value[numbers]  # the last one is for nulls


def _one_by_one(column: Column, values: list[Any], first: int) -> np.ndarray:
    if column.coded:
        return codes(column, values, first)
    for row, value in enumerate(values, first):
        if value is not None and not (isinstance(value, int | float) and np.isfinite(value)):
            raise UsageError(
                f"column '{column.name}' is {column.kind} but holds {value!r} in row {row}: "
                f"{_as_number(value)}"
            )
    numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
    return _checked(column, numbers, first)


def _checked(column: Column, numbers: np.ndarray, first: int) -> np.ndarray:
    """Numbers that are possible for the kind of a column."""
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
            f"{numbers[row]:g} in row {first + row}"
        )
    return numbers


def _as_number(value: Any) -> str:
    """What to do about a value that should be a number."""
    if isinstance(value, str):
        return PLAINLY if WRITTEN.fullmatch(value) else "correct it, or leave its cell empty"
    if isinstance(value, float):
        return "correct it, or leave its cell empty"
    return f"turn values of type {type(value).__name__} into numbers, such as days for dates"


def codes(column: Column, values: list[Any], first: int = 0) -> np.ndarray:
    """The codes of plain values, NaN where missing; ``first`` is the number of the first row."""
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
        raise UsageError(_unknown(column, values, unknown, first))
    return found


def _unknown(column: Column, values: list[Any], rows: list[int], first: int) -> str:
    """What is unknown in these rows, and what to do about it."""
    known = ", ".join(map(str, column.categories[:8]))
    known += ", ..." if len(column.categories) > 8 else ""
    more = f"; {len(rows)} rows hold such values" if len(rows) > 1 else ""
    # The context of a row must be known.
    empty = "" if column.role == "context" else ", or empty cells, which count as missing"
    return (
        f"column '{column.name}' holds {values[rows[0]]!r} in row {first + rows[0]}, which is not "
        f"one of its categories: {known}{more}; write known categories{empty}"
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


def named_parts(column: Column, values: Any, first: int = 0) -> np.ndarray:
    """The number of the part of each row that an Arrow column names: training, validation, test."""
    found = _numbered(values)
    names = [_PARTS.get(str(value).strip().lower()) for value in found.dictionary.to_pylist()]
    numbers = np.array([-1 if name is None else PARTS.index(name) for name in [*names, None]])
    parts = numbers[found.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)]
    if (parts < 0).any():
        row = int((parts < 0).argmax())
        raise UsageError(
            f"split column '{column.name}' must hold train, validation or test, got "
            f"{plain(values.slice(row, 1))[0]!r} in row {first + row}"
        )
    return parts


def _numbered(values: Any) -> Any:
    """An Arrow column with a number for each different value, in the order of their first rows.

    The dictionary of a column, as of a pandas category, has its own order, and unused values.
    """
    kind = values.type
    plainly = values.cast(kind.value_type) if arrow().types.is_dictionary(kind) else values
    return plainly.dictionary_encode().combine_chunks()


def grouped_parts(column: Column, values: Any) -> np.ndarray:
    """The number of the part of each row of an Arrow column of groups.

    Groups in random order fill test, validation and training data in turn.
    """
    different(column.name, plain(values.slice(0, 1)))
    empty = values.is_null(nan_is_null=True).index(True).as_py()
    if empty >= 0:
        raise UsageError(f"group column '{column.name}' is empty in row {empty}")
    found = _numbered(values)
    members = found.indices.to_numpy(zero_copy_only=False)
    sizes = np.bincount(members, minlength=len(found.dictionary))
    if len(sizes) < 3:
        raise UsageError(
            f"group column '{column.name}' has {len(sizes)} groups; three parts need 3"
        )
    order = np.random.default_rng(0).permutation(len(sizes))
    of_group = np.zeros(len(sizes), np.int8)
    rows = 0
    for place, at in enumerate(order.tolist()):
        left = len(order) - place
        share = rows / len(values)
        part = 2 if share < 0.2 and left > 2 else 1 if share < 0.3 else 0
        of_group[at] = 0 if part == 1 and left == 1 else part
        rows += int(sizes[at])
    return of_group[members]

"""Infer the kind and the role of each column of a table from its values."""

import re
from collections import Counter
from collections.abc import Container, Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from pyro_vae.data.schema import Column, Schema, different
from pyro_vae.errors import UsageError

FEW = 12
"""Whole numbers with at most this many values are ordinal."""

MANY = 50
"""Words with more values than this are not categories."""

LARGEST_COUNT = 100
"""Whole numbers from 0 whose mean is larger are continuous: a normal fits them as well."""

WRITTEN = re.compile(r"[+-]?(\d+|\d{1,3}([ .'\u00a0\u202f]\d{3})+|\d{1,3}(,\d{3})+)([.,]\d+)?\s?%?")
"""A number as people write it: with a decimal comma, with signs of thousands, with a percent."""

PLAINLY = "write them with a decimal point and without other signs, as in 1234.5"

ID_NAMES = ("id", "row_id", "rowid", "row", "index", "")
"""Names of columns that are row ids if their values differ."""


def infer_schema(
    names: Sequence[str], columns: Iterable[list[Any]], coded: Container[str] = ()
) -> Schema:
    """The schema of columns of plain Python values, where None is a missing entry.

    - true and false, and any two values: binary;
    - words: categorical, up to 50 different ones; if all differ, the first such column holds the
      row ids, and other columns are ignored;
    - whole numbers: ordinal, up to 12 different ones; a count, from 0 with a mean up to 100;
    - numbers: positive, if all are above 0 and the logarithm is clearly less skewed; continuous.

    Floats are whole numbers if all of them are whole and some are missing: pandas has no integers
    with holes.

    The columns named in ``coded`` are categorical, whatever their words are.

    Raises `UsageError` for a column that is all missing, constant, or of mixed types, and for
    numbers that are written as words, such as "1,5".
    """
    found: list[Column] = []
    for name, values in zip(names, columns, strict=True):
        has_id = any(column.role == "row id" for column in found)
        present = [value for value in values if value is not None]
        column = _coded if name in coded and len(set(map(str, present))) > 1 else _column
        found.append(column(name, present, len(values), has_id))
    return Schema(tuple(found))


def _coded(name: str, values: list[Any], rows: int, has_id: bool) -> Column:
    return Column(name, "categorical", different(name, values))


def _column(name: str, values: list[Any], rows: int, has_id: bool) -> Column:
    if not values:
        raise UsageError(f"column '{name}' is empty in all rows: {_ignore(name)}")
    if not all(isinstance(value, Hashable) for value in values):
        return Column(name, role="ignored", why=f"holds values of type {type(values[0]).__name__}")
    distinct = set(values)
    is_id = len(distinct) == len(values) == rows and rows > 2
    if not has_id and is_id and name.lower() in ID_NAMES:
        return Column(name, role="row id")
    if len(distinct) == 1:
        raise UsageError(f"column '{name}' is {values[0]!r} in all rows: {_ignore(name)}")
    if all(isinstance(value, bool) for value in values):
        return Column(name, "binary", (False, True))
    if any(isinstance(value, str) for value in values):
        return _words(name, values, is_id, has_id)
    if not all(isinstance(value, int | float) for value in values):
        kind = type(values[0]).__name__
        return Column(name, role="ignored", why=f"holds values of type {kind}")
    if len(values) < rows and all(value % 1 == 0 for value in values):
        values = list(map(int, values))
    return _numbers(name, values, set(values))


def _ignore(name: str) -> str:
    return f"remove it, or give it the role 'ignored' in `columns` ([columns.\"{name}\"])"


def _words(name: str, values: list[Any], is_id: bool, has_id: bool) -> Column:
    if all(WRITTEN.fullmatch(value) for value in values) and not all(map(_is_number, values)):
        raise UsageError(
            f"column '{name}' holds numbers that are written as words, such as "
            f"{next(value for value in values if not _is_number(value))!r}: {PLAINLY}; if they are "
            f"words, give it a kind, such as 'categorical', or a role in `columns` "
            f'([columns."{name}"])'
        )
    numbers = [value for value in values if _is_number(value)]
    if len(values) / 2 < len(numbers) < len(values):
        word = next(value for value in values if not _is_number(value))
        raise UsageError(
            f"column '{name}' mixes numbers and words, such as {word!r}: "
            f"correct the words, leave their cells empty, or {_ignore(name)}"
        )
    counts = Counter(values)
    if len(counts) == 2:
        return Column(name, "binary", tuple(sorted(counts)))
    if len(counts) <= min(MANY, max(3, len(values) // 2)):
        return Column(name, "categorical", tuple(sorted(counts)))
    if is_id and not has_id:
        return Column(name, role="row id")
    return Column(name, role="ignored", why=f"{len(counts)} different words in {len(values)} rows")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _numbers(name: str, values: list[Any], distinct: set[Any]) -> Column:
    numbers = np.array(values, dtype=float)
    if not np.isfinite(numbers).all():
        raise UsageError(f"column '{name}' holds an infinite number: correct it, or leave it empty")
    ordered = tuple(sorted(distinct))
    if len(ordered) == 2:
        return Column(name, "binary", ordered)
    if all(isinstance(value, int) for value in distinct):
        if len(ordered) <= FEW and len(ordered) < len(values) / 2:
            return Column(name, "ordinal", ordered)
        if (
            numbers.min() >= 0
            and numbers.mean() <= LARGEST_COUNT
            and numbers.min() <= numbers.std()
        ):
            return Column(name, "count")
        return Column(name, "continuous")
    return Column(name, "positive" if _is_positive(numbers) else "continuous")


def _is_positive(numbers: np.ndarray) -> bool:
    """Whether numbers are above 0, skewed, and less skewed on the scale of their logarithm."""
    if numbers.min() <= 0:
        return False
    skew = abs(_skewness(numbers))
    return skew > 1 and abs(_skewness(np.log(numbers))) < skew / 1.5


def _skewness(numbers: np.ndarray) -> float:
    numbers = numbers / max(np.abs(numbers).max(), 1e-300)  # so that no power overflows
    off = numbers - numbers.mean()
    return float((off**3).mean() / max((off**2).mean(), 1e-300) ** 1.5)

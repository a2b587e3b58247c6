"""Data in three parts: training, validation and test data."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.disk import DiskArray, merged, sampled
from pyro_vae.errors import UsageError
from pyro_vae.pairs.showing import shown_html

PARTS = ("training", "validation", "test")


class Split(NamedTuple):
    """One part of a data set: the rows ``x`` (n, *data_shape), and values for each row."""

    x: Tensor
    labels: Tensor | None = None
    """Integers (n,)."""
    context: Tensor | None = None
    """The context of a conditional pair, floats (n, *context_shape)."""
    lengths: Tensor | None = None
    """The number of steps of each row, integers (n,), if rows are sequences; the number of members
    if rows are groups."""
    factors: Tensor | None = None
    """The index of the value of each known factor, integers (n, factors), for drawn data."""
    rows: Tensor | None = None
    """The number of each row in the data before they are split, integers (n,); in the training data
    of a source with test data of its own."""
    members: Tensor | None = None
    """The row of the file of each member, integers (n, members), -1 for padding, if rows are
    groups."""


@dataclass(frozen=True, repr=False)
class Data:
    """A data set in three parts, each row in one part."""

    name: str
    train: Split
    validation: Split
    test: Split
    vocabulary: str | None = None
    """The character of each token, if the data are text."""
    table: Any = None
    """The `pyro_vae.data.tables.Table` of the data, if their rows are those of a table."""
    cells: Any = None
    """The `pyro_vae.data.cells.Cells` of the data, if their rows are the cells of a .h5ad file."""
    schema: Any = None
    """The `pyro_vae.Schema` of a row or, if the data are groups of rows of a table, of a member."""
    group_ids: Sequence[Any] | None = None
    """The id of the group of each row of the file (of its training rows, if it has parts of its
    own), if the data are groups."""
    files: tuple[str, ...] | None = None
    """The path of each row before the split, relative to the folder, for a folder of images."""
    classes: tuple[str, ...] | None = None
    """The name of each label, for a folder of images with sub-folders."""
    summary: str = ""
    """What was done to the images of a folder, in one line."""

    def __repr__(self) -> str:
        sizes = [len(part.x) for part in (self.train, self.validation, self.test)]
        few = [f"{size:,} {part} rows" for size, part in zip(sizes, PARTS, strict=True)]
        parts = [sampled(part.x) for part in (self.train, self.validation, self.test)]
        holes = sum(int(part.isnan().sum()) for part in parts)
        about = "" if parts[0] is self.train.x else " in a sample"
        told = [
            f"{self.name}: {', '.join(few)}, each {_in_words(parts[0])}{about}",
            f"{self.num_classes} classes" if self.num_classes else "",
            _context_in_words(self.train),
            f"{holes:,} missing entries{about}" if holes else "",
            self.summary,
        ]
        return "; ".join(filter(None, told))

    _repr_html_ = shown_html

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return tuple(self.train.x.shape[1:])

    @property
    def num_classes(self) -> int:
        """The largest label plus 1; 0 without labels."""
        labels = [split.labels for split in (self.train, self.validation, self.test)]
        held = (part for part in labels if part is not None and len(part))
        return max((int(part.max()) + 1 for part in held), default=0)


def _in_words(x: Tensor) -> str:
    """The shape, the type and the range of rows.

    >>> _in_words(torch.tensor([[0, 1], [2, 3]]))
    'of shape (2,), int64 from 0 to 3'
    """
    known = x[~x.isnan()]
    kind = str(x.dtype).removeprefix("torch.")
    bounds = f" from {known.min().item():.4g} to {known.max().item():.4g}" if len(known) else ""
    return f"of shape {tuple(x.shape[1:])}, {kind}{bounds}"


def _context_in_words(split: Split) -> str:
    given = split.context
    return "" if given is None else f"context of shape {tuple(given.shape[1:])}"


def three_ways(name: str, whole: Split, what: str = "rows") -> Data:
    """Split data 70 : 10 : 20 into training, validation and test data; ``what`` are the data."""
    if len(whole.x) < 10:
        raise UsageError(
            f"{name} has {len(whole.x)} {what}, but a split into three parts needs at least 10"
        )
    whole = whole._replace(rows=torch.arange(len(whole.x)))
    train, validation, test = shuffled(whole, (7, 1, 2))
    return Data(name, train, validation, test)


def shuffled(split: Split, shares: Sequence[int]) -> list[Split]:
    """Permute the rows with a fixed seed, and cut them into parts of these shares."""
    n = len(split.x)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    edges = [n * sum(shares[:i]) // sum(shares) for i in range(len(shares) + 1)]
    return [taken(split, order[a:b]) for a, b in pairwise(edges)]


def part_of(data: Data, name: str) -> Split:
    """A part of a data set, or all rows in their first order, if the parts record it.

    Raises `UsageError` if the name is not train, validation, test or all.
    """
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    if name not in (*parts, "all"):
        raise UsageError(f"must be train, validation, test or all, got '{name}'", argument="part")
    if name != "all":
        found = parts[name]
        of_file = (data.table, data.files, data.cells) != (None, None, None)
        if found.rows is None or not of_file or isinstance(found.x, DiskArray):
            return found  # rows on disk are in the order of the file
        return taken(found, found.rows.argsort())
    held = [part for part in parts.values() if len(part.x)]
    if any(isinstance(part.x, DiskArray) for part in held):
        return held[0] if len(held) == 1 else _whole_on_disk(held, data.name)
    columns = zip(*parts.values(), strict=True)
    whole = Split(*(torch.cat(list(c)) if _known(c) else None for c in columns))  # type: ignore
    return whole if whole.rows is None else taken(whole, whole.rows.argsort())


def _whole_on_disk(parts: Sequence[Split], name: str) -> Split:
    """All rows of parts on disk, in the order of the file, or one part after another."""
    ends = np.cumsum([0, *(len(part.x) for part in parts)])
    numbers = [_numbers(part) for part in parts]
    if any((np.diff(rows) <= 0).any() for rows in numbers) or not _are_all(numbers):
        numbers = [np.arange(a, b) for a, b in pairwise(ends)]
    order = np.concatenate(numbers).argsort()
    places = np.split(order.argsort(), ends[1:-1])
    x = merged([(part.x, at) for part, at in zip(parts, places, strict=True)], name)
    columns = zip(*(part[1:] for part in parts), strict=True)
    joined = (torch.cat(list(c)) if _known(c) else None for c in columns)
    return Split(cast(Any, x), *(None if column is None else column[order] for column in joined))


def _numbers(part: Split) -> np.ndarray:
    """The number of each row of a part in the file; -1 if it is not known."""
    x: Any = part.x
    if part.rows is not None:
        return part.rows.numpy()
    return x.numbers() if isinstance(x, DiskArray) else np.full(len(x), -1)


def _are_all(numbers: Sequence[np.ndarray]) -> bool:
    """Whether these are the numbers from 0 on, in any order."""
    rows = np.sort(np.concatenate(numbers))
    return bool((rows == np.arange(len(rows))).all())


def _known(column: Sequence[Tensor | None]) -> bool:
    return all(part is not None for part in column)


def with_validation(train: Split) -> list[Split]:
    """Training and validation data: a random sixth of these rows becomes validation data."""
    return shuffled(train._replace(rows=torch.arange(len(train.x))), (5, 1))


def taken(split: Split, rows: Tensor) -> Split:
    """These rows of a split."""
    return Split(*(None if part is None else part[rows] for part in split))  # type: ignore

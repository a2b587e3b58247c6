"""Data in three parts: training, validation and test data."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.errors import UsageError


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
    members: Tensor | None = None
    """The row of the file of each member, integers (n, members), -1 for padding, if rows are
    groups."""


@dataclass(frozen=True)
class Data:
    """A data set in three parts, each row in one part."""

    name: str
    train: Split
    validation: Split
    test: Split
    vocabulary: str | None = None
    """The character of each token, if the data are text."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return tuple(self.train.x.shape[1:])

    @property
    def num_classes(self) -> int:
        """The largest label plus 1; 0 without labels."""
        labels = [split.labels for split in (self.train, self.validation, self.test)]
        return max((int(part.max()) + 1 for part in labels if part is not None), default=0)


def three_ways(name: str, whole: Split, what: str = "rows") -> Data:
    """Split data 70 : 10 : 20 into training, validation and test data; ``what`` are the data."""
    if len(whole.x) < 10:
        raise UsageError(
            f"{name} has {len(whole.x)} {what}, but a split into three parts needs at least 10"
        )
    train, validation, test = shuffled(whole, (7, 1, 2))
    return Data(name, train, validation, test)


def shuffled(split: Split, shares: Sequence[int]) -> list[Split]:
    """Permute the rows with a fixed seed, and cut them into parts of these shares."""
    n = len(split.x)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    edges = [n * sum(shares[:i]) // sum(shares) for i in range(len(shares) + 1)]
    return [
        Split(split.x[rows], *(None if part is None else part[rows] for part in split[1:]))
        for rows in (order[a:b] for a, b in pairwise(edges))
    ]

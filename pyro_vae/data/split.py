"""Data in three parts: training, validation and test."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.errors import UsageError


class Split(NamedTuple):
    """One part of a data set: ``x`` of shape (n, *data_shape), and what comes with its rows."""

    x: Tensor
    labels: Tensor | None = None
    """Integers (n,)."""
    context: Tensor | None = None
    """What a conditional pair is given, floats (n, *context_shape)."""
    lengths: Tensor | None = None
    """How many steps of each row count, integers (n,), where rows are sequences."""
    factors: Tensor | None = None
    """The index of each factor's value that a drawn datum was made from, integers (n, factors)."""


@dataclass(frozen=True)
class Data:
    """A data set in three parts that share no row."""

    name: str
    train: Split
    validation: Split
    test: Split
    vocabulary: str | None = None
    """What each token stands for, where the data are text."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return tuple(self.train.x.shape[1:])

    @property
    def num_classes(self) -> int:
        """One more than the greatest label, 0 without labels."""
        labels = [split.labels for split in (self.train, self.validation, self.test)]
        return max((int(part.max()) + 1 for part in labels if part is not None), default=0)


def three_ways(name: str, whole: Split) -> Data:
    if len(whole.x) < 10:
        raise UsageError(
            f"{name} has {len(whole.x)} rows: 10 or more are expected, to split in three"
        )
    train, validation, test = shuffled(whole, (7, 1, 2))
    return Data(name, train, validation, test)


def shuffled(split: Split, shares: Sequence[int]) -> list[Split]:
    """Cut a split by shares, after a permutation with a fixed seed."""
    n = len(split.x)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    edges = [n * sum(shares[:i]) // sum(shares) for i in range(len(shares) + 1)]
    return [
        Split(split.x[rows], *(None if part is None else part[rows] for part in split[1:]))
        for rows in (order[a:b] for a, b in pairwise(edges))
    ]

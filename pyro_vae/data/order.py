"""The order of rows in an epoch: a pure function of the seed, the epoch and the number of rows.

The state of training data is therefore a place: an epoch, and the number of finished minibatches.
The order does not depend on the number of processes, and needs no generator that is replayed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae.pairs.processes import ALONE, Team


class Place(NamedTuple):
    """Where training is in its data."""

    seed: int
    epoch: int
    """The number of complete epochs."""
    batches: int = 0
    """The number of minibatches of this epoch that are finished."""
    team: Team = ALONE
    """The processes that share each minibatch."""


def order(seed: int, epoch: int, n: int, stream: int = 0) -> Tensor:
    """A permutation of n rows, of shape (n,): the order of an epoch.

    It sorts n numbers of 64 bits. The counter-based generator Philox gives these numbers from a
    key, (seed, epoch), so two keys give independent orders (Salmon et al., 2011). They are the same
    in every version of NumPy and torch.

    Arguments:
        stream: the number of one of several independent permutations of the same epoch.

    >>> order(0, 3, 5).sort().values
    tensor([0, 1, 2, 3, 4])
    >>> torch.equal(order(0, 3, 5), order(0, 3, 5)), torch.equal(order(0, 3, 5), order(0, 4, 5))
    (True, False)
    """
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, stream, 0], np.uint64)
    numbers = np.random.Philox(key=key, counter=counter).random_raw(n)
    return torch.from_numpy(np.argsort(numbers, kind="stable"))


class Window(NamedTuple):
    """Blocks of consecutive rows that are read together, and the order of their rows."""

    start: int
    """The place of the first row of the window in the order of the epoch."""
    blocks: np.ndarray
    """The numbers of the blocks."""
    number: int
    """The number of the window."""
    length: int
    """The number of rows."""


def windows(seed: int, epoch: int, n: int, size: int, at_once: int) -> Iterator[Window]:
    """The windows of an epoch: a permutation of all blocks, ``at_once`` blocks after another.

    Arguments:
        n: the number of rows.
        size: the number of rows of a block. The last block may have fewer.
        at_once: the number of blocks of a window. `order` shuffles the rows of a window, with the
            number of the window, from 1, as its stream.
    """
    blocks = order(seed, epoch, -(-n // size)).numpy()
    start = 0
    for number, first in enumerate(range(0, len(blocks), at_once), 1):
        some = blocks[first : first + at_once]
        length = int(np.minimum(n - some * size, size).sum())
        yield Window(start, some, number, length)
        start += length

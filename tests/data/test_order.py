"""The order of rows: a permutation that only seed, epoch and number of rows determine."""

from itertools import chain

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_vae.data import stored
from pyro_vae.data.order import Place, order, windows
from pyro_vae.data.sources import Arrays, source
from pyro_vae.pairs.processes import Team

N = 23
ROWS = torch.arange(N)[:, None].float()


class Ordered(IterableDataset):
    """A stream with noise of the global generator in the order of its rows."""

    def __iter__(self):
        for i in torch.randperm(N).tolist():
            yield (ROWS[i],)

    def __len__(self):
        return N


KINDS = {
    "arrays": lambda: Arrays([ROWS]),
    "dataset": lambda: source(TensorDataset(ROWS)),
    "loader": lambda: source(DataLoader(TensorDataset(ROWS), batch_size=4, shuffle=True)),
    "stream": lambda: source(Ordered()),
}


def read(rows, place, size=4):
    return [batch[0][:, 0].long().tolist() for batch in rows.epoch(size, place)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_does_not_depend_on_processes_or_on_the_first_minibatch(kind):
    whole = read(KINDS[kind](), Place(3, 1))
    assert sorted([*chain(*whole)]) == list(range(N))
    assert read(KINDS[kind](), Place(3, 2)) != whole
    torch.manual_seed(11)
    before = torch.get_rng_state()
    for done in (1, 4, 6):
        assert read(KINDS[kind](), Place(3, 1, done)) == whole[done:]
    for count in (2, 3, 5):
        parts = [read(KINDS[kind](), Place(3, 1, 2, Team(rank, count))) for rank in range(count)]
        assert [[*chain(*each)] for each in zip(*parts, strict=True)] == whole[2:]
    assert torch.equal(torch.get_rng_state(), before)


def test_orders_are_uniform_and_independent():
    found = torch.stack([order(seed, epoch, 6) for seed in range(60) for epoch in range(60)])
    for place in range(6):
        assert chisquare(np.bincount(found[:, place], minlength=6)).pvalue > 1e-6
    # Neighbors of seed and epoch: the pairs of first rows are uniform on 36 values.
    firsts = found[:, 0].reshape(60, 60)
    for one, other in ((firsts[1:], firsts[:-1]), (firsts[:, 1:], firsts[:, :-1])):
        both = (6 * one + other).flatten().numpy()
        assert chisquare(np.bincount(both, minlength=36)).pvalue > 1e-6


def test_the_order_is_the_same_in_every_version():
    """A resumed run needs the order that it had before an update of a library."""
    assert order(0, 0, 8).tolist() == EXPECTED
    assert order(2**63 - 1, 10**6, 3).sort().values.tolist() == [0, 1, 2]


EXPECTED = [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize(("n", "size", "at_once"), [(23, 4, 2), (24, 4, 3), (5, 8, 2), (1, 1, 1)])
def test_windows_hold_each_block_once(n, size, at_once):
    found = list(windows(7, 2, n, size, at_once))
    blocks = np.concatenate([window.blocks for window in found])
    assert sorted(blocks) == list(range(-(-n // size)))
    assert sum(window.length for window in found) == n
    assert [window.start for window in found] == list(
        np.cumsum([0, *[window.length for window in found]])[:-1]
    )
    assert max(len(window.blocks) for window in found) <= at_once
    assert stored.WINDOW_BLOCKS > 1

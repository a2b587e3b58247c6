"""Ranks by hand: ties are broken at random, and the band holds uniform ranks."""

import numpy as np
import pytest
import torch

from pyro_vae.diagnostics.ranks import Calibration, _inside, ranks_of, simultaneous_band

UNITS = 3000


def shares(draws, truth):
    """The share of each rank over many units with the same draws and true value."""
    torch.manual_seed(0)
    every = torch.stack([draws] * UNITS, -1)[:, None]
    found = ranks_of(every, truth.expand(1, UNITS))[0]
    return (found.bincount(minlength=len(draws) + 1) / UNITS).tolist()


def near(found, want):
    return all(abs(a - b) < 0.04 for a, b in zip(found, want, strict=True))


def test_whole_numbers_have_exact_ties_only():
    """One draw is below 30, two are equal to it, and the neighbors 29 and 31 have no ties."""
    draws = torch.tensor([29, 30, 31, 30, 40])
    assert near(shares(draws, torch.tensor(30)), [0, 1 / 3, 1 / 3, 1 / 3, 0, 0])


def test_rounding_of_negative_numbers_is_a_tie():
    eps = torch.finfo(torch.float64).eps
    draws = torch.tensor([-2.0 - 6 * eps, -2.0 + 6 * eps, -2.1, -1.9], dtype=torch.float64)
    assert near(shares(draws, torch.tensor(-2.0).double()), [0, 1 / 3, 1 / 3, 1 / 3, 0])
    draws = draws.abs()
    assert near(shares(draws, torch.tensor(2.0).double()), [0, 1 / 3, 1 / 3, 1 / 3, 0])


def test_equal_draws_at_0_are_ties():
    draws = torch.tensor([0.0, -1e-300, 1e-300], dtype=torch.float64)
    assert near(shares(draws, torch.tensor(0.0).double()), [0, 0.5, 0.5, 0])


def test_the_band_holds_uniform_ranks_with_its_probability():
    """Counted on draws of uniform ranks. A band that is narrower by a count holds too few."""
    low, high = simultaneous_band(100, 19, 0.05)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(100, np.full(20, 1 / 20), 40_000)[:, :-1].cumsum(1)

    def inside(least, most):
        return ((counts >= least) & (counts <= most)).all(1).mean()

    assert 0.948 < inside(low, high) < 0.975
    assert inside(low + 1, high - 1) < 0.93
    assert (low[9], high[9]) == (37, 63)
    assert ((low + high[::-1]) == 100).all()  # ranks counted from above are uniform, too


BOUNDS = [
    ([0, 0, 0], [5, 5, 5]),
    ([0, 1, 2], [3, 4, 5]),
    ([1, 2, 3], [2, 3, 4]),
    ([1, 2, 4], [1, 2, 4]),
    ([0, 0, 5], [0, 0, 5]),
    ([2, 0, 0], [5, 1, 5]),  # at least two ranks are below 1, and at most one below 2
]


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_the_probability_to_be_inside_is_that_of_all_cases(low, high):
    """All 4^5 ways in which five uniform ranks can be 0, 1, 2 or 3."""
    ways = torch.cartesian_prod(*[torch.arange(4)] * 5)
    below = torch.stack([(ways < i).sum(1) for i in (1, 2, 3)], 1)
    held = (below >= torch.tensor(low)) & (below <= torch.tensor(high))
    assert _inside(5, np.array(low), np.array(high)) == pytest.approx(
        held.all(1).double().mean().item(), abs=1e-12
    )


def found_with(ranks):
    return Calibration(("z",), torch.tensor(ranks)[:, None], 9, 0.05, {})


def test_a_rank_of_zero_counts_and_a_masked_unit_does_not():
    """Of ten ranks, 0 is below 0.1. The interval of 95 % begins at 0.025."""
    found = found_with([0] * 40 + [-1] * 10)
    spread = found.jitter[:40, 0] / 10
    wide = [(spread >= edge).double().mean().item() for edge in (0.05, 0.025)]
    assert found.coverage[0].tolist() == [0, 0, *wide]


def test_the_words_are_those_of_the_ranks_that_are_not_masked():
    narrow = found_with([0] * 200 + [9] * 200 + [-1] * 200)
    assert narrow.failures == {"z": "draws are too narrow (U shape)"}
    assert narrow.calibrated is False
    both = found_with([0] * 60 + [9] * 240)
    assert both.failures == {"z": "draws are too narrow (U shape) and too low (slope up)"}
    assert found_with(list(range(10)) * 30).calibrated is True

"""Ranks by hand: ties are broken at random, and the band holds uniform ranks."""

import numpy as np
import torch

from pyro_vae.diagnostics.ranks import ranks_of, simultaneous_band

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

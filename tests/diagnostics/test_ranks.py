"""What is said of ranks that are not uniform, on both sides of each limit; ties, by hand."""

import numpy as np
import pytest
import torch

from pyro_vae.diagnostics.calibration import Calibration
from pyro_vae.diagnostics.ranks import in_words, ranks_of, simultaneous_band

DRAWS, N = 99_999, 1000


def ranks(place, width):
    """Ranks whose mean and mean square are so many standard errors above those of uniform ones:
    half of them at one rank, half at another."""
    mean = place / (12 * N) ** 0.5
    spread = (1 / 12 + width / (180 * N) ** 0.5 - mean**2) ** 0.5
    u = torch.tensor([mean - spread, mean + spread]).double().repeat(N // 2)
    return ((u + 0.5) * (DRAWS + 1) - 0.5).round().long()


def said(place, width):
    return in_words(ranks(place, width), DRAWS)


CLEAR = {
    "neither": (0, 0),
    "narrow": (0, 20),
    "wide": (0, -20),
    "low": (20, 0),
    "high": (-20, 0),
    "narrow and low": (20, 20),
    "wide and high": (-20, -20),
}


def test_each_clear_case_has_words_of_its_own():
    assert len({said(*case) for case in CLEAR.values()}) == len(CLEAR)


@pytest.mark.parametrize(
    ("place", "width", "like"),
    [
        # Three standard errors are told.
        (0, 2.9, "neither"),
        (0, 3.1, "narrow"),
        (0, -2.9, "neither"),
        (0, -3.1, "wide"),
        (2.9, 0, "neither"),
        (3.1, 0, "low"),
        (-3.1, 0, "high"),
        # Beside the other one, more than half of it.
        (20, 9.9, "low"),
        (20, 10.1, "narrow and low"),
        (9.9, 20, "narrow"),
        (10.1, 20, "narrow and low"),
        (-20, -9.9, "high"),
        (-20, -10.1, "wide and high"),
        (-9.9, -20, "wide"),
    ],
)
def test_shift_and_width_are_reported_beyond_three_errors_and_half_the_other(place, width, like):
    assert said(place, width) == said(*CLEAR[like])


def test_ranks_count_the_draws_below():
    draws = torch.tensor([0.1, 0.5, 0.5, 0.9, -2.0]).double()[:, None, None]
    truth = torch.tensor([[-3.0, 0.3, 0.7, 1.0]]).double()
    assert ranks_of(draws.expand(-1, 1, 4), truth).tolist() == [[0, 2, 4, 5]]


def test_a_tie_takes_each_place_among_its_equals():
    draws = torch.tensor([1.0, 2.0, 2.0, 3.0]).double()[:, None, None].expand(-1, 3000, 1)
    torch.manual_seed(0)
    found = ranks_of(draws, torch.full((3000, 1), 2.0).double()).flatten()
    share = found.bincount(minlength=5) / 3000
    assert share[[0, 4]].tolist() == [0.0, 0.0]
    assert (share[1:4] - 1 / 3).abs().max() < 5 * (2 / 9 / 3000) ** 0.5


def test_rounding_alone_is_a_tie():
    truth = torch.full((2000, 1), 3.0).double()
    eps = torch.finfo(torch.float64).eps
    torch.manual_seed(0)
    for apart, spread in ((6 * eps * 3, True), (10 * eps * 3, False)):
        found = ranks_of((truth + apart)[None], truth).unique().tolist()
        assert found == ([0, 1] if spread else [0])
        found = ranks_of((truth - apart)[None], truth).unique().tolist()
        assert found == ([0, 1] if spread else [1])


@pytest.mark.parametrize(("n", "draws", "level"), [(100, 19, 0.05), (150, 24, 0.2)])
def test_a_band_is_the_narrowest_that_uniform_ranks_leave_at_its_level(n, draws, level):
    """By simulation: they leave it as often as its level at most, and one a count narrower more."""
    low, high = simultaneous_band(n, draws, level)
    random = np.random.default_rng(0)
    counts = random.multinomial(n, np.full(draws + 1, 1 / (draws + 1)), 20_000)
    below = counts.cumsum(1)[:, :-1]

    def left(by):
        return ((below < low + by) | (below > high - by)).any(1).mean()

    error = (level * (1 - level) / 20_000) ** 0.5
    assert left(0) < level + 5 * error
    assert left(1) > level + 5 * error


def test_coverage_and_its_error_by_hand():
    """Ranks in the middle or at an end lie in every interval or in none."""
    middle = torch.tensor([50] * 60 + [0] * 20 + [99] * 20)
    hidden = torch.tensor([50] * 30 + [0] * 20 + [-1] * 50)
    found = Calibration(("a", "b"), torch.stack([middle, hidden], 1), 99, 0.05, {})
    assert found.counts.tolist() == [100, 50]
    assert found.coverage.tolist() == [[0.6] * 4, [0.6] * 4]
    wanted = [(0.24 / n) ** 0.5 for n in (100, 50)]
    assert found.coverage_errors[:, 0].tolist() == pytest.approx(wanted)

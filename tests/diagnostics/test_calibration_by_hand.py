"""What is computed from ranks, by hand: at and beside each limit."""

from math import log
from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch

from pyro_vae.diagnostics.information import SATURATED, Estimate, KLParts, _parts
from pyro_vae.diagnostics.ranks import Calibration, in_words
from pyro_vae.pairs.rng import seeded


def ranked(*ranks, draws=99, level=0.05):
    return Calibration(("z",), torch.tensor(ranks)[:, None], draws, level, {})


def test_differences_leave_masked_ranks_out():
    found = ranked(0, 0, 2, -1, draws=3)
    assert found.counts.tolist() == [3]
    assert found.points.tolist() == [0.25, 0.5, 0.75]
    expected = [2 / 3 - 0.25, 2 / 3 - 0.5, 3 / 3 - 0.75]
    # In single precision, ranks at the band would be outside of it.
    assert found.differences[:, 0].tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("rank", "inside"),
    [
        (49, [1, 1, 1, 1]),
        (74, [1, 1, 1, 1]),  # from 0.74 to 0.75
        (75, [0, 1, 1, 1]),
        (25, [1, 1, 1, 1]),
        (24, [0, 1, 1, 1]),
        (96, [0, 0, 0, 1]),
        (0, [0, 0, 0, 0]),
    ],
)
def test_central_intervals_hold_ranks(rank, inside):
    assert ranked(rank, -1).coverage[0].tolist() == inside


def with_count(count):
    """100 ranks among 19 draws, with this many below 10, where 50 are expected; others as even."""
    below = [5 * j for j in range(1, 10)]
    above = [5 * j for j in range(11, 21)]
    counts = [min(b, count) for b in below] + [count] + [max(a, count) for a in above]
    steps = [b - a for a, b in zip([0, *counts], counts, strict=False)]
    return ranked(*[rank for rank, n in enumerate(steps) for _ in range(n)], draws=19)


@pytest.mark.parametrize(("count", "fails"), [(37, False), (36, True), (63, False), (64, True)])
def test_ranks_at_the_band_are_inside(count, fails):
    found = with_count(count)
    assert len(found.ranks) == 100
    assert ("z" in found.failures) == fails
    assert found.calibrated != fails


def test_the_error_of_a_deviation_of_few_ranks():
    """Of n values with kurtosis k, by the delta method: sqrt((k - (n - 3) / (n - 1)) / (4 n))."""
    scores = torch.special.ndtri((torch.arange(20, dtype=torch.float64) + 0.5) / 20)
    kurtosis = scores.pow(4).mean() / scores.square().mean().square()
    found = ranked(1, 5, 9, 13, 18, draws=19).score_deviation_errors.item()
    assert found == pytest.approx(((kurtosis.item() - 2 / 4) / 20) ** 0.5)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (list(range(20)) * 1000, "ranks have another shape"),
        (list(range(10)) * 10, "draws are too high (slope down)"),
        (list(range(10, 20)) * 10, "draws are too low (slope up)"),
        ([18, 19] * 50, "draws are too low (slope up)"),
        ([0] * 50, "draws are too high (slope down)"),
        ([19] * 28 + [0] * 7, "draws are too narrow (U shape) and too low (slope up)"),
        ([19] * 60 + [0] * 5, "draws are too low (slope up)"),
        ([0, 19] * 50, "draws are too narrow (U shape)"),
        ([9, 10] * 50, "draws are too wide (dome)"),
    ],
)
def test_the_words_of_ranks(ranks, words):
    assert in_words(torch.tensor(ranks), 19) == words


def test_numbers_that_such_ranks_do_not_determine_are_cut():
    line = str(ranked(*[19] * 50, draws=19)).splitlines()[2]
    assert "   <-99    >99   draws are too low (slope up)" in line
    one = str(ranked(7, draws=19)).splitlines()[2]  # one rank has no deviation
    assert "   +nan    nan   " in one


@pytest.mark.parametrize(
    ("low", "high", "saturated"),
    [
        (log(100) - SATURATED - 0.1, log(100) - SATURATED, False),
        (log(100) - SATURATED + 0.1, log(100), True),
        (1.0, 1.9, False),
        (1.0, 2.1, True),
    ],
)
def test_information_near_its_largest_value_or_with_wide_bounds_is_saturated(low, high, saturated):
    found = SimpleNamespace(
        num_examples=100,
        mutual_information=Estimate(low, 0.0),
        mutual_information_upper=Estimate(high, 0.0),
    )
    assert KLParts.saturated.fget(found) == saturated


def site(fn, value):
    return {"fn": fn, "value": value}


@pytest.mark.parametrize("far", [0.0, 3.0])  # the bias is at most the aggregate KL
def test_the_parts_of_the_kl_and_their_errors_are_those_of_sums_over_all_pairs_of_data(far):
    """Two draws of 6 data with two units; each sum is written out."""
    n = 6
    with seeded(0):
        loc = torch.randn(n, 2).double()
        draws = [loc + 0.7 * torch.randn(n, 2).double() for _ in range(2)]
    q = dist.Normal(loc, 0.7).to_event(1)
    prior = dist.Normal(far + torch.zeros(n, 2).double(), 1.0).to_event(1)
    found = _parts([[(site(q, z), site(prior, z))] for z in draws])

    units = torch.stack([q.base_dist.log_prob(z[:, None]) for z in draws])  # draw, of, under, unit
    pairs = units.sum(-1)
    diagonal = torch.eye(n, dtype=torch.bool)
    own = pairs[:, diagonal]
    every = pairs.exp().mean(2).log()
    rest = (pairs.exp() * ~diagonal).sum(2).log() - log(n - 1)
    each = units.exp().mean(2).log()
    each_rest = (units.exp() * ~diagonal[..., None]).sum(2).log() - log(n - 1)
    of_prior = torch.stack([prior.base_dist.log_prob(z) for z in draws])

    def check(estimate, terms, bias=0.0):
        rows = terms.mean(0)
        error = ((rows - rows.mean()).square().sum() / (n - 1) / n) ** 0.5
        assert estimate.value == pytest.approx(rows.mean().item())
        assert estimate.standard_error == pytest.approx((error**2 + bias**2).item() ** 0.5)

    bias = min((every - rest).mean(), (every - of_prior.sum(-1)).mean().clamp(min=0))
    unit_bias = (each - each_rest).mean((0, 1))
    assert (bias == (every - rest).mean()) == (far == 3)
    check(found.kl, own - of_prior.sum(-1))
    check(found.mutual_information, own - every)
    check(found.mutual_information_upper, own - rest)
    check(found.aggregate_kl, every - of_prior.sum(-1), bias)
    check(found.total_correlation, every - each.sum(-1), max(bias, unit_bias.sum()))
    assert torch.allclose(found.unit_kl, (each - of_prior).mean((0, 1)))
    own_units = units[:, diagonal]
    assert torch.allclose(found.unit_information, (own_units - each).mean((0, 1)))
    spread = (each - of_prior).mean(0).std(0) / n**0.5
    assert torch.allclose(found.unit_kl_errors, (spread.square() + unit_bias.square()).sqrt())


def test_the_parts_of_a_latent_that_is_one_number_are_those_of_one_unit():
    """It has no event dimension. Its unit has the parts of the whole, and no total correlation."""
    n = 6
    with seeded(0):
        loc = torch.randn(n).double()
        draws = [loc + 0.7 * torch.randn(n).double() for _ in range(2)]
    q, prior = dist.Normal(loc, 0.7), dist.Normal(torch.zeros(n).double(), 1.0)
    found = _parts([[(site(q, z), site(prior, z))] for z in draws])
    assert found.total_correlation.value == pytest.approx(0, abs=1e-12)
    assert found.unit_kl.tolist() == pytest.approx([found.aggregate_kl.value])
    assert found.unit_information.tolist() == pytest.approx([found.mutual_information.value])

"""Distributions over levels: what lies outside, the mode, the mean and draws, by hand."""

import pytest
import torch

from pyro_vae.parts.distributions import LevelCategorical, LevelLogistic, TruncatedExponential

LOGITS = torch.tensor([0.1, 0.2, 0.6, 0.1]).double().log()


@pytest.mark.parametrize("whole", [False, True])
def test_a_value_outside_the_levels_has_no_probability(whole):
    fn = LevelCategorical(LOGITS, whole)
    step = 1.0 if whole else 1 / 3
    inside = torch.arange(4).double() * step
    torch.testing.assert_close(fn.log_prob(inside), LOGITS)
    for outside in (-100, -1, 4, 5, 100):
        assert fn.log_prob(torch.tensor(outside * step).double()) == -torch.inf


def test_moments_of_levels_by_hand():
    levels, whole = LevelCategorical(LOGITS), LevelCategorical(LOGITS, True)
    assert levels.mode.item() == pytest.approx(2 / 3)
    assert whole.mode.item() == 2.0
    assert levels.mean.item() == pytest.approx((0.2 * 1 + 0.6 * 2 + 0.1 * 3) / 3)
    assert whole.mean.isnan()
    torch.manual_seed(0)
    for fn, step in ((levels, 1 / 3), (whole, 1.0)):
        drawn = (fn.sample((20_000,)) / step).round().long().bincount(minlength=4) / 20_000
        assert (drawn - LOGITS.exp()).abs().max() < 5 * (0.25 / 20_000) ** 0.5


def test_a_logistic_of_levels_by_hand():
    """Differences of its distribution function at the middles; the outer bins are open."""
    loc, scale = torch.tensor(0.3).double(), torch.tensor(0.2).double()
    fn = LevelLogistic(loc, scale, 4)
    edges = (torch.tensor([1 / 6, 1 / 2, 5 / 6]).double() - loc) / scale
    below = torch.cat([torch.zeros(1), edges.sigmoid(), torch.ones(1)]).double()
    wanted = below.diff()
    grid = torch.arange(4).double() / 3
    torch.testing.assert_close(fn.log_prob(grid).exp(), wanted)
    assert fn.mean.item() == pytest.approx((wanted * grid).sum().item())
    torch.manual_seed(0)
    drawn = (fn.sample((20_000,)) * 3).round().long().bincount(minlength=4) / 20_000
    assert (drawn - wanted).abs().max() < 5 * (0.25 / 20_000) ** 0.5


@pytest.mark.parametrize("logit", [-30.0, -2.0, -0.25, -0.15, -1e-3, 0.0, 0.1, 0.19, 0.21, 4.0])
def test_a_truncated_exponential_by_integration(logit):
    """Its mean and density on both sides of where series take over from closed forms."""
    fn = TruncatedExponential(torch.tensor(logit).double())
    x = (torch.arange(100_000).double() + 0.5) / 100_000
    weight = (logit * x).exp()
    assert fn.mean.item() == pytest.approx(
        (weight * x).sum().item() / weight.sum().item(), rel=1e-7
    )
    torch.testing.assert_close(
        fn.log_prob(x[::9999]), logit * x[::9999] - weight.mean().log(), rtol=1e-7, atol=1e-7
    )
    torch.manual_seed(0)
    draws = fn.sample((20_000,))
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert abs(draws.mean() - fn.mean) < 5 * draws.std() / 20_000**0.5

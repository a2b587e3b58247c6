"""Bounded scales, posteriors and priors."""

from math import log, pi, prod

import pytest
import torch

import pyro_vae as pv
from pyro_vae.parts.factors import bounded_scale, unbounded_scale

BOUNDS = [(1e-4, 10.0), (1e-3, 1e3), (0.1, 1.5), (0.9, 50.0)]


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_bounded_scale(low, high):
    raw = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    scale = bounded_scale(raw, low, high)
    assert bool((scale.diff() >= 0).all())
    middle = bounded_scale(torch.linspace(-1, 1, 201).double(), low, high)
    assert bool((middle.diff() > 0).all())
    far = bounded_scale(torch.tensor([-1e30, -1e3, 1e3, 1e30]).double(), low, high)
    everywhere = torch.cat([far, scale])
    assert bool((everywhere >= low * (1 - 1e-12)).all())
    assert bool((everywhere <= high * (1 + 1e-12)).all())
    torch.testing.assert_close(far, torch.tensor([low, low, high, high]).double())
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    one = bounded_scale(zero, low, high)
    (slope,) = torch.autograd.grad(one, zero)
    assert one.item() == pytest.approx(1, abs=1e-12)
    assert slope.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("low", "high"), BOUNDS)
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.8, 0.99])
def test_unbounded_scale_inverts(low, high, fraction):
    scale = low * (high / low) ** fraction
    raw = unbounded_scale(scale, low, high)
    again = bounded_scale(torch.tensor(raw, dtype=torch.float64), low, high)
    assert again.item() == pytest.approx(scale, rel=1e-9)


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_diagonal_normal_by_hand(shape):
    torch.manual_seed(6)
    family, dims = pv.DiagonalNormal(low=0.05, high=4.0), prod(shape)
    raw = 2 * torch.randn(5, family.outputs(shape), dtype=torch.float64)
    q = family(raw, shape)
    assert q.has_rsample
    loc, scale = raw[:, :dims], bounded_scale(raw[:, dims:], 0.05, 4.0)
    z = torch.randn(5, *shape, dtype=torch.float64)
    normal = torch.distributions.Normal(loc, scale)
    torch.testing.assert_close(q.log_prob(z), normal.log_prob(z.reshape(5, dims)).sum(1))
    torch.testing.assert_close(q.mean, loc.reshape(5, *shape))
    torch.testing.assert_close(q.variance, scale.square().reshape(5, *shape))


def test_prior_is_a_standard_normal():
    prior = pv.StandardNormal(3).double()
    p = prior(torch.ones(5, 2), torch.zeros(5))
    z = torch.tensor([[0.3, -2.0, 1.1], [0.0, 0.0, 0.0]], dtype=torch.float64)
    expected = -0.5 * z.square().sum(1) - 1.5 * log(2 * pi)
    torch.testing.assert_close(p.log_prob(z), expected)
    assert p.sample().dtype is torch.float64
    assert not prior.state_dict()
    torch.manual_seed(8)
    draws = p.sample((20_000,))
    assert float(draws.mean(0).abs().max()) < 5 / 20_000**0.5
    assert float((draws.var(0) - 1).abs().max()) < 5 * (2 / 20_000) ** 0.5


def test_kl_of_posterior_and_prior():
    torch.manual_seed(9)
    raw = torch.randn(4, 6, dtype=torch.float64)
    q, p = pv.DiagonalNormal()(raw, (3,)), pv.StandardNormal(3).double()()
    mean, scale = raw[:, :3], bounded_scale(raw[:, 3:], 1e-4, 10.0)
    expected = 0.5 * (mean.square() + scale.square() - 1 - 2 * scale.log()).sum(1)
    torch.testing.assert_close(torch.distributions.kl_divergence(q, p), expected)

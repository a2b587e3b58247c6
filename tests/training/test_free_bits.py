"""Free bits."""

from itertools import pairwise

import pyro.distributions as dist
import pytest
import torch
from objectives_helpers import (
    PAIRS,
    around,
    assert_same,
    by_hand,
    closed_kl,
    discrete_latent,
    gradients,
    linear,
    mlp,
    plated,
    run,
    watched,
)
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

import pyro_vae as pv


def test_free_bits_refuse_a_discrete_latent():
    pair, x = discrete_latent(), torch.zeros(5, 4)
    with pytest.raises(pv.UsageError, match="'coin' is not reparametrized") as caught:
        pv.FreeBitsELBO(0.1).loss(pair.model, pair.guide, x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [mlp, linear, plated])
def test_no_free_bits_give_the_elbo_with_its_closed_kl(make):
    pair, x = make()
    found = run(pair, x, pv.FreeBitsELBO(0.0))
    assert_same(found, run(pair, x, TraceMeanField_ELBO()), pair)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("floor", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_free_bits_by_hand(name, floor, beta):
    pair, x = PAIRS[name]()
    loss, [[z]] = watched(around(pv.KLWeight(beta), pair), x, pv.FreeBitsELBO(floor))
    reconstruction, _ = by_hand(pair, x, z)
    kl = closed_kl(pair, x).mean(0).clamp(min=floor)
    assert_same(loss, -(reconstruction.sum() - beta * len(x) * kl.sum()), pair)


def test_the_middle_floor_is_between_units():
    """The previous test has units above its floor, below it, and on both sides."""
    pair, x = linear()
    kl = closed_kl(pair, x).mean(0)
    assert 0.02 < float(kl.detach().min()) < 0.3 < float(kl.detach().max()) < 3.0


@pytest.mark.parametrize("name", PAIRS)
def test_free_bits_are_never_above_the_elbo(name):
    pair, x = PAIRS[name]()
    bounds = [-run(pair, x, TraceMeanField_ELBO()).item()]
    for floor in (0.0, 0.01, 0.05, 0.2, 1.0, 5.0):
        bounds.append(-run(pair, x, pv.FreeBitsELBO(floor)).item())
    assert all(lower <= upper + 1e-9 for upper, lower in pairwise(bounds))
    assert bounds[-1] < bounds[0] - 1


def test_a_unit_below_the_floor_has_no_gradient():
    """The likelihood omits the last unit, so only its KL could move its posterior."""
    pair, x = linear()
    posterior = (pair.slope, pair.offset, pair.log_scale)
    kl = closed_kl(pair, x).mean(0).detach()
    assert kl[-1] < kl.max()
    between = float(kl[-1] + kl.max()) / 2
    free = gradients(run(pair, x, pv.FreeBitsELBO(between)), posterior)
    full = gradients(run(pair, x, pv.FreeBitsELBO(0.0)), posterior)
    highest = int(kl.argmax())
    for below, pushed in zip(free, full, strict=True):
        assert bool((below[-1] == 0).all())
        assert bool((pushed[-1] != 0).all())
        torch.testing.assert_close(below[highest], pushed[highest])


def test_free_bits_scale_with_the_plate():
    pair, x = linear()
    scaled = around(poutine.scale(scale=2.5), pair)
    for floor in (0.0, 0.1):
        found = run(scaled, x, pv.FreeBitsELBO(floor))
        assert_same(found, 2.5 * run(pair, x, pv.FreeBitsELBO(floor)), pair)


def test_free_bits_leave_masked_rows_out():
    pair, x = linear()
    mask = torch.tensor([True, False, True, True, False, False])
    masked = around(poutine.mask(mask=mask), pair)
    found = run(masked, x, pv.FreeBitsELBO(0.0))
    assert_same(found, run(masked, x, TraceMeanField_ELBO()), pair)


def test_free_bits_of_a_site_that_does_not_split_into_units():
    pair, x = linear()
    factor = torch.tensor([[0.9, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.2, 0.1, 1.1]]).double()
    pair.encoder = lambda x: dist.MultivariateNormal(x @ pair.slope.T, scale_tril=factor)
    pair.prior = lambda: dist.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    kl = kl_divergence(pair.encoder(x), pair.prior()).mean()
    for floor in (0.5 * kl.item(), 2 * kl.item()):
        loss, [[z]] = watched(pair, x, pv.FreeBitsELBO(floor))
        reconstruction, _ = by_hand(pair, x, z)
        assert_same(loss, -(reconstruction.sum() - len(x) * kl.clamp(min=floor)), pair)


def test_free_bits_without_a_closed_kl_take_the_draws():
    pair, x = linear()
    zero = torch.zeros(3, dtype=torch.float64)
    pair.prior = lambda: dist.StudentT(5.0, zero, 1.0).to_event(1)
    loss, [[z]] = watched(pair, x, pv.FreeBitsELBO(0.3))
    reconstruction, _ = by_hand(pair, x, z)
    units = pair.encoder(x).base_dist.log_prob(z) - pair.prior().base_dist.log_prob(z)
    floored = units.mean(0).clamp(min=0.3)
    assert bool((floored == 0.3).any())
    assert bool((floored > 0.3).any())
    assert_same(loss, -(reconstruction.sum() - len(x) * floored.sum()), pair)

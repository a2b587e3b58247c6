"""Gaps of guides that are exact already, for all data or for some: the guide's q stays."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian, Spoiled, linear_gaussian

import pyro_vae as pv
from pyro_vae.inference.refinement import _better
from pyro_vae.pairs.rng import seeded

OPTIONS = {"steps": 15, "num_samples": 300, "engine": "eager", "progress": False}


def data(pair, n):
    with seeded(5):
        return pair.marginal().sample((n,)).detach()


@pytest.mark.parametrize(("latent_dim", "n"), [(2, 40), (8, 1), (8, 40)])
def test_an_exact_guide_has_no_gaps(latent_dim, n):
    """The noise of so few steps would cost 0.3 nats for eight units."""
    pair = linear_gaussian(12, latent_dim)
    found = pv.gaps(pair, data(pair, n), **OPTIONS)
    for gap in (found.approximation, found.amortization, found.inference):
        assert gap.per_datum.abs().max() < 1e-9
        assert gap.standard_errors.max() < 1e-9


class SomeRows(LinearGaussian):
    """The exact guide, whose mean is off by one in each unit for rows with x[0] over 1."""

    def __init__(self):
        super().__init__(linear_gaussian().weight.detach(), 0.5)

    def guide(self, x):
        loc, covariance = self.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc + (x[:, :1] > 1), covariance))


def test_only_the_rows_that_gain_are_refined():
    pair = SomeRows()
    x = data(pair, 40)
    off = x[:, 0] > 1
    found = pv.gaps(pair, x, **OPTIONS | {"steps": 150})
    _, covariance = pair.posterior(x)
    ones = torch.ones(2).double()
    kl = 0.5 * (ones @ torch.linalg.inv(covariance) @ ones).item()
    slack = 4 * found.amortization.standard_errors[off] + 0.05
    assert bool((found.amortization.per_datum[off] - kl).abs().le(slack).all())
    assert found.amortization.per_datum[~off].abs().median() < 1e-9
    assert found.approximation.per_datum.abs().max() < 0.05


def test_small_gains_of_all_data_are_found_together():
    """A gain of 0.02 nats is within three standard errors for each datum."""
    pair = Spoiled("full", stretch=1.1)
    x = data(pair, 60)
    truth = pair.kl(x, pair.q(x)).mean().item()
    assert 0.015 < truth < 0.03
    found = pv.gaps(pair, x, **OPTIONS | {"steps": 120})
    assert found.amortization.value == pytest.approx(truth, abs=0.007)


def test_the_rule_by_hand():
    error = torch.full((5,), 1.0)
    few = torch.tensor([3.1, -0.1, -0.2, 2.9, -9.0])
    assert _better(few, error).tolist() == [True, False, False, False, False]
    most = torch.tensor([3.1, 1.8, -0.2, 2.9, -9.0])
    assert _better(most, error).tolist() == [True, True, True, True, False]
    broken = torch.tensor([torch.inf, torch.nan, 2.0])
    assert _better(broken, torch.zeros(3)).tolist() == [True, False, True]


def test_weights_that_look_large_by_chance_do_not_give_the_bound():
    """One weight of a guide that is 20 nats off may be far over p(x), so its bound looks higher."""
    pair = Spoiled("full", shift=1.5, stretch=1.3)
    x = data(pair, 60)
    found = pv.gaps(pair, x, **OPTIONS | {"steps": 150, "num_samples": 500})
    off = found.log_likelihood.per_datum - pair.marginal().log_prob(x).detach()
    assert off.abs().max() < 0.1
    assert found.approximation.value == pytest.approx(0, abs=0.02)


def test_a_wide_guide_keeps_its_better_weights():
    """The best diagonal normal is too narrow for a correlated posterior."""
    pair = Spoiled("diagonal", stretch=1.4)
    x = data(pair, 30)
    found = pv.gaps(pair, x, **OPTIONS | {"steps": 60})
    assert found.amortization.value > 0.05  # the narrow q has the better ELBO
    assert found.from_refined.double().mean() < 0.1

"""`model_check`: faults of the model are found, and faults of the guide are not charged to it."""

from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian, linear_gaussian
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import signs
from pyro_vae.pairs.rng import seeded
from pyro_vae.parts.distributions import LevelLogistic

N = 400


def data(pair, n=N, seed=1):
    with seeded(seed):
        return pair.marginal().sample((n,)).detach()


def found(pair, x, *context, **settings):
    return pv.model_check(pair, x, *context, num_samples=50, progress=False, **settings)


def parts(result):
    return {sign.kind for sign in signs.model_signs({"model_check": result})}


# The model is charged with its own faults


@pytest.mark.parametrize("spread", [1.0, 0.6, 1.5])
def test_a_guide_that_is_off_everywhere_is_not_charged_to_the_model(spread):
    pair = LinearGaussian(linear_gaussian().weight.detach(), 0.5, spread=spread)
    result = found(pair, data(pair))
    assert not parts(result)
    assert result.marginal_p > 1e-3
    assert len(result.log_likelihood) == len(result.own_log_likelihood) == N


def test_log_p_is_that_of_the_data():
    pair = linear_gaussian()
    x = data(pair)
    torch.testing.assert_close(found(pair, x).log_likelihood, pair.marginal().log_prob(x).double())


def test_noise_that_is_too_large_is_the_scale_of_the_likelihood():
    weight = linear_gaussian().weight.detach()
    wide = LinearGaussian(weight, 1.0)
    x = data(LinearGaussian(weight, 0.5))
    result = found(wide, x)
    assert signs.model_signs({"model_check": result})[0].kind == "likelihood scale"
    assert result.scale.value < -0.5
    assert result.scale_nats > 0.3
    assert result.num_elements == x.shape[1]


def test_codes_beside_the_prior_are_the_priors():
    pair = LinearGaussian(5 * linear_gaussian().weight.detach(), 0.5)
    with seeded(2):
        z = 3 * torch.randn(N, 2).double()
        x = (z @ pair.weight.detach().T) + 0.5 * torch.randn(N, 6).double()
    result = found(pair, x)
    sizes = {s.kind: s.nats for s in signs.model_signs({"model_check": result})}
    assert max(sizes, key=sizes.get) == "prior"
    # KL of N(0, 9 I) and N(0, I) in two dimensions is 8 - log 9 = 5.8: a bound is below.
    assert 1 < sizes["prior"] < 5.8


class Guided(nn.Module):
    """The linear-Gaussian pair, whose guide is off by three posterior scales for marked rows."""

    def __init__(self, marked):
        super().__init__()
        self.pair, self.marked = linear_gaussian(), marked[:, 0]

    def model(self, x):
        return self.pair.model(x)

    def guide(self, x):
        loc, scale = self.pair.posterior(x)
        off = torch.isin(x[:, 0], self.marked)[:, None] * 3.0
        with pyro.plate("data", len(x), dim=-1):
            covariance = scale.expand(len(x), 2, 2)
            pyro.sample("z", dist.MultivariateNormal(loc + 0.5 * off, covariance))

    def template(self, n):
        return self.pair.template(n)


def test_rows_where_only_the_guide_is_wrong_are_left_out():
    x = data(linear_gaussian())
    result = found(Guided(x[:60]), x)
    assert result.left_out
    assert result.unreliable[:60].sum() > 30
    assert not result.unreliable[60:].any()
    assert not parts(result)


class OneMode(nn.Module):
    """x = |z| + noise, and a guide that knows only positive z."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(3 * z.abs(), 0.3).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x * 3 / (9 + 0.09), 0.1).to_event(1))

    def template(self, n):
        return (torch.zeros(n, 1),)


def test_a_mode_that_the_guide_misses_is_half_of_the_posterior():
    with seeded(1):
        x = 3 * torch.randn(N, 1).abs() + 0.3 * torch.randn(N, 1)
    result = found(OneMode(), x)
    assert signs.missing_mass({"model_check": result}).kind == "mass"
    missed = result.missed
    assert missed.value == pytest.approx(log(2), abs=4 * missed.standard_error)
    assert missed.standard_error < 0.1
    exact = found(linear_gaussian(), data(linear_gaussian()))
    assert exact.missed[:3] == pytest.approx((0, 0, 0), abs=1e-5)


# Any pair


def test_missing_entries_are_missing_on_both_sides():
    pair = pv.VAE.mlp((3,), latent_dim=1, hidden=(), likelihood=pv.Missing(pv.Gaussian))
    x = torch.randn(80, 3)
    x[::2, 1] = torch.nan
    result = found(pair, x)
    assert result.num_elements == pytest.approx(2.5)
    assert result.own_log_likelihood.isfinite().all()


def test_zeros_and_ones_have_no_scale():
    vae = pv.VAE.mlp((4,), latent_dim=1, hidden=())
    result = found(vae, torch.randint(2, (60, 4)).float())
    assert result.scale is result.row_scale is result.column_scale is None
    assert result.scale_nats == 0
    assert result.dependence is not None
    assert "scale" not in str(result)


class Levels(nn.Module):
    """256 levels around 0.5 + z / 20, with this scale of a logistic distribution."""

    def __init__(self, scale):
        super().__init__()
        self.scale = torch.tensor(scale)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            levels = LevelLogistic((0.5 + z / 20).expand(*z.shape[:-1], 6), self.scale)
            pyro.sample("x", levels.to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))

    def template(self, n):
        return (torch.zeros(n, 6),)


def test_a_likelihood_without_a_variance_has_residuals_from_draws():
    narrow = pv.sample(Levels(0.02), N, seed=3)
    assert not parts(found(Levels(0.02), narrow))
    result = found(Levels(0.04), narrow)
    assert result.scale.value < -0.7
    assert "likelihood scale" in parts(result)


def test_what_it_refuses():
    pair = linear_gaussian()
    with pytest.raises(pv.UsageError, match="at least 50 different rows, got 49"):
        found(pair, data(pair, 49))
    with pytest.raises(pv.UsageError, match="num_samples must be at least 21"):
        pv.model_check(pair, data(pair), num_samples=20)

"""Annealing and NUTS on pairs without parameters and on angles, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv


class Fixed(nn.Module):
    """A linear-Gaussian pair without parameters; the guide is not exact."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.7 * x, 0.6).to_event(1))

    def template(self, n):
        return (torch.zeros(n, 2).double(),)


X = torch.tensor([[0.3, -1.0], [1.4, 0.2]]).double()


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_a_pair_without_parameters_is_annealed(engine):
    found = pv.anneal(Fixed(), X, num_temperatures=12, engine=engine, progress=False)
    exact = dist.Normal(0, 1.25**0.5).log_prob(X).sum(-1)
    assert bool((found.per_datum - exact).abs().le(5 * found.standard_errors + 0.01).all())


def test_other_tools_that_trace_serve_a_pair_without_parameters():
    exact = dist.Normal(0, 1.25**0.5).log_prob(X).sum(-1)
    weighed = pv.log_likelihood(Fixed(), X, num_samples=400, engine="traced")
    assert bool((weighed.per_datum - exact).abs().le(5 * weighed.standard_errors).all())
    both = pv.sandwich(Fixed(), num_examples=20, num_temperatures=10, num_chains=8, progress=False)
    assert both.gap == pytest.approx(0, abs=5 * both.gap_standard_error)


class Angle(nn.Module):
    """An angle with noise; the mean of its posterior may be beyond pi."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.VonMises(x.new_zeros(len(x)), 0.5))
            pyro.sample("x", dist.VonMises(z, 6.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.VonMises(x + 0.3, 4.0))

    def template(self, n):
        return (torch.zeros(n).double(),)


ANGLES = torch.tensor([3.04, -3.1, 0.3]).double()


def on_a_grid():
    """log p(x) and the posterior direction, by a sum over the circle."""
    z = torch.linspace(-math.pi, math.pi, 5001).double()[:-1, None]
    joint = dist.VonMises(0.0, 0.5).log_prob(z) + dist.VonMises(z, 6.0).log_prob(ANGLES)
    weights = joint.softmax(0)
    direction = torch.atan2((weights * z.sin()).sum(0), (weights * z.cos()).sum(0))
    return joint.logsumexp(0) + math.log(2 * math.pi / 5000), direction


def test_angles_are_annealed_on_the_circle():
    found = pv.anneal(
        Angle(), ANGLES, num_temperatures=40, num_chains=32, engine="eager", progress=False
    )
    exact, _ = on_a_grid()
    assert bool((found.per_datum - exact).abs().le(5 * found.standard_errors + 0.01).all())
    assert found.standard_errors.max() < 0.1


def test_draws_of_an_angle_near_pi_have_its_direction():
    options = {"num_draws": 80, "warmup": 40, "num_chains": 2, "progress": False}
    z = pv.nuts(Angle(), ANGLES[:1], **options).draws["z"].flatten()
    assert z.abs().max() <= math.pi
    direction = torch.atan2(z.sin().mean(), z.cos().mean())
    off = torch.remainder(direction - on_a_grid()[1][0] + math.pi, 2 * math.pi) - math.pi
    assert abs(off) < 0.2

"""Flows of zuko in a user's own pair, through Pyro's `ZukoToPyro`."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded

NOISE = 0.7


class Real(ZukoToPyro):
    """Pyro's wrapper with the support that it does not define."""

    support = constraints.real_vector

    def expand(self, *args, **kwargs):
        return Real(self.dist.expand(*args, **kwargs))


class FlowPair(nn.Module):
    """A flow of zuko as the prior, and an inverse autoregressive flow of zuko in the guide."""

    def __init__(self, wrapper=ZukoToPyro, flow_guide=False):
        super().__init__()
        self.wrapper, self.flow_guide = wrapper, flow_guide
        with seeded(0):
            self.prior = zuko.flows.NSF(2, passes=2, transforms=1, hidden_features=(8,))
            flow = zuko.flows.MAF(2, context=3, transforms=1, hidden_features=(8,))
            self.posterior = zuko.flows.Flow(flow.transform.inv, flow.base)
            self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(2, 3)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.wrapper(self.prior()))
            pyro.sample("x", dist.Normal(self.decoder(z), NOISE).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            normal = dist.Normal(self.encoder(x), 1.0).to_event(1)
            pyro.sample("z", self.wrapper(self.posterior(x)) if self.flow_guide else normal)


def data(n=24):
    with seeded(1):
        return torch.randn(n, 3)


@torch.no_grad()
def integrated(pair, x):
    """log p(x) by a sum over a grid of z."""
    axis = torch.linspace(-7, 7, 351)
    z = torch.cartesian_prod(axis, axis)
    log_prior = pair.prior().log_prob(z)
    noise = dist.Normal(pair.decoder(z)[:, None], NOISE).to_event(1)
    cell = 2 * (axis[1] - axis[0]).log()
    return torch.logsumexp(log_prior[:, None] + noise.log_prob(x), 0) + cell


def test_a_traced_fit_is_the_eager_one():
    histories = []
    for engine in ("eager", "traced"):
        pair, options = FlowPair(flow_guide=True), {"learning_rate": 0.01, "progress": False}
        history = pv.fit(pair, data(), epochs=8, batch_size=12, engine=engine, **options)
        histories.append(history["elbo"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
    assert histories[0][-1] > histories[0][0]


@pytest.mark.parametrize("flow_guide", [False, True])
def test_log_likelihood_is_the_integral(flow_guide):
    pair, x = FlowPair(flow_guide=flow_guide), data(6)
    found = pv.log_likelihood(pair, x, num_samples=4000, engine="eager")
    errors = (found.per_datum - integrated(pair, x)).abs() / found.standard_errors
    assert errors.max() < 4


def test_the_mean_of_a_flow_in_the_guide_is_that_of_its_draws():
    pair, x = FlowPair(flow_guide=True), data(6)
    codes = pv.encode(pair, x)["z"]
    with seeded(2), torch.no_grad():
        draws = pair.posterior(x).sample((20_000,))
    assert torch.all((codes - draws.mean(0)).abs() < 5 * draws.std(0) / 100**0.5)
    assert pv.evaluate(pair, x, num_samples=5, engine="eager").kl > 0


def test_annealing_without_a_support_is_refused():
    with pytest.raises(pv.UsageError, match="ZukoToPyro does not define its support; subclass it"):
        pv.anneal(FlowPair(), data(4), progress=False)


def test_annealing_with_a_support_is_the_integral():
    pair, x = FlowPair(Real), data(4)
    found = pv.anneal(pair, x, num_chains=16, num_temperatures=40, progress=False, engine="eager")
    assert found.value == pytest.approx(integrated(pair, x).mean().item(), abs=0.1)

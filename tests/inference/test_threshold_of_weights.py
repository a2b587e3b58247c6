"""Weights are reliable up to the Pareto k that their number allows; draws keep their plates."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.inference.pareto import threshold, unreliable
from pyro_vae.inference.weighted import Weighted, weighted_parts
from pyro_vae.pairs.scope import using


def pareto(k, samples, spread=1.0):
    """Weights of one row: quantiles of a Pareto distribution of this shape, to a power."""
    tail = (torch.arange(samples, dtype=torch.double) + 0.5) / samples
    return Weighted((torch.zeros(1, 1),), {}, (-spread * k * tail.log())[:, None])


@pytest.mark.parametrize(
    ("samples", "k", "reliable"),
    [(200, 0.66, False), (5000, 0.66, True), (200, 0.4, True), (5000, 0.8, False)],
)
def test_the_limit_grows_with_the_number_of_samples(samples, k, reliable):
    found = pareto(k, samples)
    assert (found.pareto_k - k).abs() < 0.06
    assert found.reliable.tolist() == [reliable]


def test_the_tail_of_weights_that_vary_by_a_hundredth_has_no_effect():
    k = torch.tensor([0.9, 0.9, 0.5, torch.inf, torch.nan]).double()
    deviation = torch.tensor([0.01, 0.011, 1.0, 0.0, 0.0]).double()
    assert unreliable(k, deviation, 0.5).tolist() == [False, True, False, True, True]
    # 498 weights of 1 and two outliers: the tail is heavy, and the deviation is sqrt(2 / 500) by
    # their size.
    for size, reliable in ((0.1, True), (0.3, False)):
        weights = 1 + 1e-9 * torch.rand(500, generator=torch.Generator().manual_seed(0)).double()
        weights[:2] += size
        found = Weighted((torch.zeros(1, 1),), {}, weights.log()[:, None])
        assert found.pareto_k > threshold(500)
        assert found.reliable.tolist() == [reliable]


class Visits(nn.Module):
    """A latent for each datum and one for each visit; the number of visits may be one."""

    def __init__(self, visits):
        super().__init__()
        self.visits = visits

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            with pyro.plate("visits", self.visits, dim=-2):
                z = pyro.sample("z", dist.Normal(u[..., 0], 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            with pyro.plate("visits", self.visits, dim=-2):
                pyro.sample("z", dist.Normal(u[..., 0] / 2 + x.T / 2, 0.7))


@pytest.mark.parametrize("visits", [1, 3])
def test_draws_keep_plates_of_any_size(visits):
    x = torch.randn(4, visits, generator=torch.Generator().manual_seed(1))
    pair = Visits(visits)
    with using(pair, 0):
        (part,) = weighted_parts(pair, (x,), 5)
    shapes = {name: tuple(value.shape) for name, value in part.values.items()}
    assert shapes == {"u": (20, 2), "z": (20, visits)}
    assert torch.equal(part.batch[0], x.repeat(5, 1))
    u, z = part.values["u"].double(), part.values["z"].double()
    rows = part.batch[0].double()
    normal = torch.distributions.Normal
    want = normal(u[:, :1], 1.0).log_prob(z) + normal(z, 1.0).log_prob(rows)
    want -= normal(u[:, :1] / 2 + rows / 2, 0.7).log_prob(z)
    assert torch.allclose(part.log_weights.flatten(), want.sum(1), atol=1e-5)


def test_scores_name_their_threshold():
    vae = pv.VAE.mlp((4,), latent_dim=1)
    for samples in (100, 5000):
        found = pv.score(vae, torch.ones(2, 4), num_samples=samples)
        assert found.k_threshold == threshold(samples)

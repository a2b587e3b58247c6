"""Refinement of a normal with a full covariance: its many entries must not drown the gain."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded

NOISE = 0.5


class Wide(nn.Module):
    """z ~ N(0, I), x ~ N(A z, NOISE^2 I) with five features.

    The guide is the exact posterior with Cholesky factor L, changed by ``change(L)``.
    """

    def __init__(self, latent_dim, change):
        super().__init__()
        with seeded(1):
            self.loadings = torch.randn(5, latent_dim)
        self.change = change

    def model(self, x):
        d = self.loadings.shape[1]
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(d), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.loadings.T, NOISE).to_event(1), obs=x)

    def guide(self, x):
        d = self.loadings.shape[1]
        covariance = (torch.eye(d) + self.loadings.T @ self.loadings / NOISE**2).inverse()
        mean = x @ self.loadings @ covariance / NOISE**2
        factor = self.change(torch.linalg.cholesky(covariance))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=factor))

    def log_likelihood(self, x):
        covariance = self.loadings @ self.loadings.T + NOISE**2 * torch.eye(5)
        return torch.distributions.MultivariateNormal(torch.zeros(5), covariance).log_prob(x)


def gaps(pair, rows=20, steps=100):
    with seeded(0):
        x = torch.randn(rows, pair.loadings.shape[1]) @ pair.loadings.T
        x = x + NOISE * torch.randn(rows, 5)
    found = pv.gaps(pair, x, steps=steps, num_samples=300, engine="eager", progress=False)
    return found, (pair.log_likelihood(x) - found.amortized.per_datum).mean().item()


@pytest.mark.parametrize("latent_dim", [2, 30])
def test_scales_of_many_units_are_refined(latent_dim):
    """They are 0.8 times those of the posterior. Without smaller steps for the correlations, the
    435 of 30 units drown the gain, and refinement finds nothing."""
    found, whole = gaps(Wide(latent_dim, lambda factor: 0.8 * factor))
    assert found.amortization.value > 0.8 * whole


@pytest.mark.parametrize("latent_dim", [6, 12])
def test_lost_correlations_are_found_again(latent_dim):
    found, whole = gaps(Wide(latent_dim, lambda factor: factor.diag().diag()), steps=300)
    assert whole > 0.3
    assert found.amortization.value > 0.8 * whole


def test_an_exact_guide_stays_as_it_is():
    found, whole = gaps(Wide(30, lambda factor: factor))
    assert whole == pytest.approx(0, abs=1e-4)
    assert found.amortization.value == pytest.approx(0, abs=1e-4)

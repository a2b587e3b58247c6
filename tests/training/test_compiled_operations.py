"""Operations that Inductor has no kernel of its own for: right in a compiled graph, and silent."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv


class Counts(nn.Module):
    """Gamma latents and Poisson counts: draws, their derivatives, and special functions."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 4), nn.Linear(2, 5)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(x.new_full((2,), 2.0), 1.0).to_event(1))
            rate = self.decoder(z.log()).exp()
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    def guide(self, x):
        shape, rate = self.encoder(x.log1p()).exp().chunk(2, -1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Gamma(shape + 0.5, rate).to_event(1))


class Correlated(nn.Module):
    """A prior by its covariance, and a guide of low rank: Cholesky factors and solves."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 9), nn.Linear(3, 5)
        self.root = nn.Parameter(0.3 * torch.randn(3, 3))

    def model(self, x):
        covariance = torch.eye(3) + self.root @ self.root.t()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(3), covariance))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc, factor, scale = self.encoder(x).chunk(3, -1)
        with pyro.plate("data", len(x), dim=-1):
            q = dist.LowRankMultivariateNormal(loc, factor[..., None], scale.exp())
            pyro.sample("z", q)


class Recurrent(nn.Module):
    """A recurrent encoder, whose kernel has a backward pass of its own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.GRU(1, 4, batch_first=True), nn.Linear(2, 5)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc, scale = self.encoder(x[..., None])[1][0].chunk(2, -1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


@pytest.mark.parametrize("kind", [Counts, Correlated, Recurrent])
def test_a_compiled_pair_trains_as_an_eager_one_and_says_nothing(kind, capfd):
    torch.manual_seed(0)
    x = torch.poisson(torch.full((64, 5), 3.0))
    losses = {}
    for engine in ("eager", "compiled"):
        torch.manual_seed(1)
        options = {"epochs": 3, "batch_size": 32, "engine": engine, "progress": False}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses[engine] = pv.fit(kind(), x, **options)["objective"]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4)
    assert capfd.readouterr().err == ""

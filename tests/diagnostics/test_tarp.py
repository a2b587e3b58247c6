"""TARP: uniform for an exact guide, and the right words for wrong ones."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from pairs import make, rows

import pyro_vae as pv
from pyro_vae.diagnostics import tarp as module
from pyro_vae.diagnostics.tarp import Tarp

WEIGHT = torch.tensor([[1.0, 0.2], [0.8, 1.1], [0.1, 1.0]]).double()


class Guided(LinearGaussian):
    def __init__(self, off=0.0, scale=1.0, prior=False, weight=WEIGHT):
        super().__init__(weight, 0.6)
        self.off, self.scale, self.prior = off, scale, prior

    def guide(self, x):
        loc, covariance = self.posterior(x)
        if self.prior:
            loc, covariance = torch.zeros_like(loc), torch.eye(2).double()
        loc = loc + self.off * covariance.diagonal().sqrt()
        factor = torch.linalg.cholesky(covariance) * self.scale
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=factor))


def test_the_exact_guide_passes_at_its_level():
    whole = pv.tarp(Guided(), num_simulations=20_000, num_draws=19)
    blocks = [Tarp(ranks, 19, 0.05) for ranks in whole.ranks.split(200)]
    rejected = sum(not block.calibrated for block in blocks)
    assert rejected <= 0.05 * 100 + 4 * (100 * 0.05 * 0.95) ** 0.5
    assert (whole.coverage - whole.credibility).abs().max() < 4 * 0.5 / 20_000**0.5


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"scale": 0.8}, "draws are too narrow"),
        ({"scale": 1.25}, "draws are too wide"),
        ({"off": 0.5}, "draws are biased"),
        ({"off": -0.5}, "draws are biased"),
        ({"prior": True}, "draws are biased or ignore a part of x"),
    ],
)
def test_wrong_guides_are_described(faults, words):
    found = pv.tarp(Guided(**faults))
    assert not found.calibrated
    assert found.words.startswith(words)


def test_coverage_of_one_unit_is_that_of_a_normal(monkeypatch):
    """From a far reference point, distances have the order of the units: Phi(s Phi^-1(a))."""

    def far(data, units):
        return torch.full((len(data.x), units), -1e4).double()

    monkeypatch.setattr(module, "_references", far)
    found = pv.tarp(Guided(scale=0.7, weight=WEIGHT[:, :1]), num_simulations=20_000)
    normal = torch.distributions.Normal(0.0, 1.0)
    want = normal.cdf(0.7 * normal.icdf(found.credibility))
    # A finite number of draws adds an error of about 1 / num_draws.
    assert (found.coverage - want).abs().max() < 4 * 0.5 / 20_000**0.5 + 0.005


def test_other_pairs_record_and_misuse():
    for name in ("conditional", "multilevel", "deep-markov"):
        context = rows(name, 5)[1:]
        found = pv.tarp(make(name), *context, num_simulations=100, num_draws=19)
        again = pv.tarp(make(name), *context, num_simulations=100, num_draws=19)
        assert torch.equal(found.ranks, again.ranks)
        assert found.ranks.max() <= 19
    record = json.loads(json.dumps(found.as_dict()))
    largest = (found.coverage - found.credibility).abs().max().item()
    assert record["largest_difference"] == largest
    assert f"{largest:.3f}" in str(found)
    with pytest.raises(pv.UsageError, match="num_simulations must be at least 100, got 5"):
        pv.tarp(Guided(), num_simulations=5)
    with pytest.raises(pv.UsageError, match="level must be between 0 and 1, got 2"):
        pv.tarp(Guided(), level=2)
    with pytest.raises(pv.UsageError, match="tarp needs a pair without global latents"):
        pv.tarp(pv.BayesianDecoder(make("bernoulli")))

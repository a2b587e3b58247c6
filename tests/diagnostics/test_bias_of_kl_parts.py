"""N data give too large an aggregate KL: its error contains this bias."""

import json
from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded


def exact_pair(latent_dim, noise):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(20, latent_dim, generator=generator, dtype=torch.float64)
    return LinearGaussian(weight, noise)


@pytest.mark.parametrize(
    ("latent_dim", "noise", "n", "saturated"),
    [(8, 3.0, 500, False), (8, 0.5, 300, True), (2, 0.5, 1000, False), (2, 0.05, 300, True)],
)
def test_the_aggregate_kl_of_an_exact_pair_is_0_within_its_error(latent_dim, noise, n, saturated):
    pair = exact_pair(latent_dim, noise)
    for seed in range(3):
        with seeded(seed):
            x = pair.marginal().sample((n,)).detach()
        found = pv.kl_parts(pair, x, seed=seed)["z"]
        value, error = found.aggregate_kl
        assert value > 0.02
        assert value < 2 * error
        assert found.aggregate_kl_lower < 0.3
        assert found.saturated == saturated
        assert ("too few" in str(found)) == saturated
        low, high = found.mutual_information.value, found.mutual_information_upper.value
        assert low - 0.3 < pair.information() < high + 0.3


class Codes(nn.Module):
    """Independent units with q(z_j | x) = N(a_j x_j + b_j, s_j^2) and standard normal x."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.9, 1.5, 0.4]).double())
        self.offset = torch.tensor([0.3, 0.0, -0.5]).double()
        self.scale = torch.tensor([0.3, 0.2, 0.8]).double()

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.Normal(self.slope * x + self.offset, self.scale)
            pyro.sample("z", fn.to_event(1))

    def unit_kl(self):
        variance = (self.slope**2 + self.scale**2).detach()
        return 0.5 * (variance + self.offset**2 - 1 - variance.log())


@pytest.mark.parametrize("n", [30, 300])
def test_total_correlation_and_units_hold_their_bias_too(n):
    """The closed forms are within three errors, and total correlation is 0."""
    pair = Codes()
    for seed in range(5):
        with seeded(seed):
            x = torch.randn(n, 3).double()
        found = pv.kl_parts(pair, x, num_samples=3, seed=seed)["z"]
        assert abs(found.total_correlation.value) < 3 * found.total_correlation.standard_error
        assert bool((found.unit_kl - pair.unit_kl()).abs().le(3 * found.unit_kl_errors).all())
        off = found.aggregate_kl.value - pair.unit_kl().sum()
        assert abs(off) < 3 * found.aggregate_kl.standard_error


def test_the_errors_by_hand():
    """Two posteriors that never meet: an own density is half of it plus nothing of the other."""
    x = torch.tensor([[0.0] * 3, [100.0] * 3]).double()
    found = pv.kl_parts(Codes(), x)["z"]
    assert found.mutual_information.value == pytest.approx(log(2))
    assert found.aggregate_kl_lower < -1000
    assert found.aggregate_kl.standard_error >= found.aggregate_kl.value  # a KL is at least 0
    record = json.loads(json.dumps(found.as_dict()))
    assert record["saturated"] is True
    assert record["aggregate_kl_lower"] == found.aggregate_kl_lower
    assert record["unit_kl_errors"] == found.unit_kl_errors.tolist()

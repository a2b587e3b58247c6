"""Power-scaling sensitivity, compared with ArviZ and with normals in closed form."""

import json
import math

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import make, rows
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics.power_scaling import _sensitivity, cumulative_distance

QUIET = {"progress": False}
DRAWS = 2000


class Conjugate(nn.Module):
    """z ~ N(0, 1) and x ~ N(z, noise^2); the guide is the posterior, stretched."""

    def __init__(self, noise=1.0, scale=1.0):
        super().__init__()
        self.noise, self.scale = noise, scale

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], self.noise).to_event(1), obs=x)

    def guide(self, x):
        mean, spread = normal(x[:, 0], self.noise)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(mean, self.scale * spread))


def normal(x, noise, prior=1.0, likelihood=1.0):
    """The mean and the standard deviation of the posterior with powers."""
    precision = prior + likelihood / noise**2
    return x * likelihood / noise**2 / precision, precision**-0.5


def exact(x, noise, **part):
    """The sensitivity by quadrature, over the range of so many draws of a normal."""
    mean, spread = normal(x, noise)
    reach = 3.43  # the mean of the largest of 2,000 standard normal draws
    grid = torch.linspace(mean - reach * spread, mean + reach * spread, 20_001).double()
    found = 0.0
    (name,) = part
    for power in (1.01, 1 / 1.01):
        p = torch.distributions.Normal(*map(torch.tensor, (mean, spread))).cdf(grid)
        moved = normal(x, noise, **{name: power})
        q = torch.distributions.Normal(*map(torch.tensor, moved)).cdf(grid)
        sides = []
        for a, b in ((p, q), (1 - p, 1 - q)):
            middle = (a + b) / 2
            divergence = (a * (a / middle).log() + b * (b / middle).log()).sum() / math.log(2)
            sides.append((divergence / (a + b).sum()).sqrt())
        found += max(sides).item() / abs(math.log2(power)) / 2
    return found


def scaled(x, noise=1.0, scale=1.0, n=40):
    pair = Conjugate(noise, scale)
    batch = torch.full((n, 1), x).double()
    return pv.power_scaling(pair, batch, num_samples=DRAWS, **QUIET)


@pytest.mark.parametrize(("x", "noise"), [(0.0, 1.0), (5.0, 1.0), (1.0, 0.2), (0.5, 8.0)])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_sensitivities_are_those_of_normals(x, noise, scale):
    """Draws of a guide that is too narrow are moved and weighted, so the result is the same."""
    found = scaled(x, noise, scale)
    for name in ("prior", "likelihood"):
        want = exact(x, noise, **{name: 1.0})
        assert getattr(found, name).nanmean() == pytest.approx(want, rel=0.1, abs=0.002)


def test_the_words():
    assert scaled(5.0).diagnosis(0) == {"z": "prior-data conflict"}
    assert scaled(0.5, noise=8.0).diagnosis(0) == {"z": "weak likelihood"}
    assert scaled(1.0, noise=0.1).diagnosis(0) == {"z": "-"}
    mixed = torch.tensor([[0.1], [6.0], [0.2], [4.0]]).double()
    found = pv.power_scaling(Conjugate(0.3), mixed, **QUIET)
    assert found.worst().tolist() == [1, 3]
    record = json.loads(json.dumps(found.as_dict()))
    assert record["conflict"] == {"z": 0.5}
    assert record["prior"]["z"] == pytest.approx(found.prior.median().item(), rel=0.5)
    assert "50 %" in str(found)


def test_the_measure_is_that_of_arviz():
    torch.manual_seed(0)
    z = 2.0 + 0.7 * torch.randn(1000, 1, 2).double()
    log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    ours = _sensitivity(z, torch.zeros(1000, 1).double(), log_prior)[0]
    data = arviz.from_dict(posterior={"z": z[None, :, 0].numpy()})
    data.add_groups({"log_prior": {"z": log_prior[None, :, 0].numpy()}})
    theirs = arviz.psens(data, component="prior", delta=0.01)["z"].values
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=0.02)


def test_the_distance_of_a_shift_and_its_bounds():
    z = torch.arange(4.0).double()[:, None, None]
    p = torch.tensor([[1.0], [0.0], [0.0], [0.0]]).double()
    q = p.flip(0)
    assert cumulative_distance(z, p, p).item() == 0
    assert cumulative_distance(z, p, q).item() == pytest.approx(1.0)


def test_other_pairs_and_misuse():
    for name in ("semi-supervised", "multilevel"):
        found = pv.power_scaling(make(name), *rows(name, 5), num_samples=40, **QUIET)
        again = pv.power_scaling(make(name), *rows(name, 5), num_samples=40, **QUIET)
        assert torch.equal(found.prior.nan_to_num(9.0), again.prior.nan_to_num(9.0))
    found = pv.power_scaling(
        pv.BayesianDecoder(make("bernoulli")), *rows("bernoulli", 4), num_samples=40, **QUIET
    )
    assert found.given
    with pytest.raises(pv.UsageError, match="num_samples must be at least 21"):
        pv.power_scaling(Conjugate(), torch.zeros(3, 1).double(), num_samples=5)

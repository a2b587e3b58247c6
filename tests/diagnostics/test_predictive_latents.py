"""Where the latents of replicates are from: a bad guide is not charged to the model."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import figures
from pyro_vae.pairs.rng import seeded

QUIET = {"progress": False, "num_replicates": 100}
WEIGHT = torch.tensor([[1.0, 0.2], [0.8, 1.1], [0.1, 1.0], [0.2, -0.3]]).double()


class Guided(LinearGaussian):
    """A model with this noise; the mean and scale of its guide are off by known amounts."""

    def __init__(self, shift=0.0, scale=1.0, noise=0.6, broken=False):
        super().__init__(WEIGHT, noise)
        self.shift, self.scale, self.broken = shift, scale, broken

    def guide(self, x):
        loc, covariance = self.posterior(x)
        loc = loc + self.shift * covariance.diagonal().sqrt()
        if self.broken:
            loc = torch.where(x[:, :1] > 1.5, -3 - loc, loc)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, self.scale**2 * covariance))


def data(n=300):
    with seeded(2):
        return Guided().marginal().sample((n,)).detach()


def p_values(found):
    return torch.tensor(list(found.whole_p_values.values()))


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (0.0, 1.6), (-0.4, 1.3)])
def test_an_exact_model_is_not_rejected_for_its_guide(shift, scale):
    pair, x = Guided(shift, scale), data()
    statistics = {"mean": lambda x: x.mean(1), "size": lambda x: x.square().sum(1)}
    by_guide = pv.predictive_check(pair, x, statistics=statistics, latents="guide", **QUIET)
    assert (p_values(by_guide) - 0.5).abs().max() > 0.48
    found = pv.predictive_check(pair, x, statistics=statistics, **QUIET)
    assert found.latents == "resampled"
    assert (p_values(found) - 0.5).abs().max() < 0.48
    assert len(found.unreliable) < 0.1 * len(x)


def residual(x):
    """The squared distance of a row from the plane of the weights."""
    basis = torch.linalg.qr(WEIGHT)[0]
    return (x - x @ basis @ basis.T).square().sum(1)


@pytest.mark.parametrize("latents", ["resampled", "prior"])
@pytest.mark.parametrize("noise", [0.35, 1.0])
def test_a_bad_model_is_rejected_whatever_its_guide(latents, noise):
    x, statistics = data(), {"residual": residual}
    for pair in (Guided(noise=noise), Guided(0.5, 1.3, noise=noise)):
        found = pv.predictive_check(pair, x, statistics=statistics, latents=latents, **QUIET)
        p = found.whole_p_values["residual"]
        assert p < 0.01 if noise < 0.6 else p > 0.99


def test_resampled_latents_are_those_of_the_posterior():
    """The replicates of x[0] have the mean and the deviation of p(x_rep | x), in closed form."""
    pair, x = Guided(0.6, 1.4), data(60)
    found = pv.predictive_check(
        pair, x, statistics={"first": lambda x: x[:, 0]}, num_replicates=400, num_samples=1000
    )
    mean, covariance = pair.posterior(x)
    row = pair.weight[0].detach()
    deviation = (row @ covariance @ row + 0.36).sqrt().item()
    off = (found.replicated_mean[:, 0] - mean @ row).detach() / deviation
    assert off.abs().mean() < 2 / 400**0.5
    assert (found.replicated_deviation.mean() / deviation).item() == pytest.approx(1, abs=0.02)


def test_prior_latents_give_data_sets_of_the_model():
    """The mean of a statistic over n data is normal with the variance of the marginal over n."""
    pair, x = Guided(2.0, 0.3), data(200)
    statistics = {"first": lambda x: x[:, 0]}
    found = pv.predictive_check(
        pair, x, statistics=statistics, latents="prior", num_replicates=500, progress=False
    )
    variance = pair.marginal().covariance_matrix[0, 0].item()
    assert found.whole.std().item() == pytest.approx((variance / 200) ** 0.5, rel=0.15)
    normal = torch.distributions.Normal(0.0, (variance / 200) ** 0.5)
    p = 1 - normal.cdf(x[:, 0].mean()).item()
    assert found.whole_p_values["first"] == pytest.approx(p, abs=4 * (0.25 / 500) ** 0.5)
    assert not len(found.unreliable)


def test_unreliable_rows_are_named_and_left_out_of_the_whole():
    pair, x = Guided(broken=True), data()
    bad = (x[:, 0] > 1.5).nonzero().flatten()
    found = pv.predictive_check(pair, x, **QUIET)
    assert set(bad.tolist()) >= set(found.unreliable.tolist())
    assert len(found.unreliable) > 0.9 * len(bad) > 10
    assert found.pareto_k.shape == (300,)
    assert (p_values(found) - 0.5).abs().max() < 0.49
    kept = found.observed[found.reliable].mean(0)
    record = json.loads(json.dumps(found.as_dict()))
    assert record["num_unreliable"] == len(found.unreliable)
    assert record["statistics"]["mean"]["observed"] == pytest.approx(kept[0].item())
    assert f"left out: {len(found.unreliable)} data" in str(found)
    assert f"{int(found.reliable.sum())} of {len(found.observed)} data, " in str(found)
    nothing = pv.predictive_check(Guided(40.0, 0.2), x[:5], **QUIET)
    assert len(nothing.unreliable) == 5
    assert nothing.as_dict()["statistics"]["mean"]["p_value"] is None
    assert "left out: 5 data" in str(nothing)
    titles = [axis.get_title() for axis in figures.predictive_statistics(nothing).axes]
    assert titles[0] == "mean\nno reliable data"


class Shared(nn.Module):
    """A global w and a local z for each row; the guide of z is off, that of w is its prior."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift).double())

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w + z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            loc = (x - w) / 2 + self.shift
            pyro.sample("z", dist.Normal(loc, 0.5**0.5).to_event(1))


@pytest.mark.thorough
def test_global_latents_are_drawn_once_for_each_replicate():
    """Given w, a replicate has the mean (x + w) / 2, although the guide of z is 0.5 too high."""
    x = torch.linspace(-1, 1, 30).double()[:, None]
    options = {"statistics": {"first": lambda x: x[:, 0]}, **QUIET}
    found = pv.predictive_check(Shared(0.5), x, num_samples=300, **options)
    assert found.latents == "resampled"
    whole = (1 / 4 + 1.5 / 30) ** 0.5
    assert found.whole.mean().item() == pytest.approx(0, abs=4 * whole / 100**0.5)
    assert found.whole.std().item() == pytest.approx(whole, rel=0.3)
    assert (found.replicated_mean - x / 2).abs().max() < 5 * (1.75 / 100) ** 0.5
    by_guide = pv.predictive_check(Shared(2.5), x, latents="guide", **options)
    assert by_guide.whole.mean().item() == pytest.approx(2.5, abs=4 * whole / 100**0.5)
    prior = pv.predictive_check(Shared(0.5), x, latents="prior", **options)
    assert prior.whole.std().item() == pytest.approx((1 + 2 / 30) ** 0.5, rel=0.3)


class Point(Guided):
    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(self.posterior(x)[0]).to_event(1))


def test_a_pair_without_weights_says_that_its_latents_are_draws_of_the_guide():
    found = pv.predictive_check(Point(), data(10), **QUIET)
    assert found.latents == "guide"
    assert "draws of the guide, whose errors count as the model's" in str(found)
    with pytest.raises(pv.UsageError, match="Delta"):
        pv.predictive_check(Point(), data(10), latents="resampled", **QUIET)


def test_misuse_raises_an_error_of_one_line():
    with pytest.raises(pv.UsageError, match="unknown source 'posterior'"):
        pv.predictive_check(Guided(), data(5), latents="posterior", **QUIET)
    with pytest.raises(pv.UsageError, match="num_samples must be at least 21"):
        pv.predictive_check(Guided(), data(5), num_samples=5, **QUIET)

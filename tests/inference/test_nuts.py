"""NUTS on the model of a pair, compared with posteriors in closed form."""

import json
import logging
import warnings
from math import inf, nan

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from pairs import FAULTS, Counts, Fault, TwoModes, make, rows
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.inference.joint import Joint
from pyro_vae.inference.nuts import Posterior, rank_r_hat
from pyro_vae.pairs import rng
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import using
from pyro_vae.training.check import require

WEIGHT = torch.tensor([[1.0, 0.9], [0.8, 1.1], [0.2, -0.3]]).double()


def test_moments_are_those_of_the_closed_form_and_chains_agree():
    """Correlated latents; the guide is their posterior with 0.8 times the right scale."""
    pair = LinearGaussian(WEIGHT, 0.6, spread=0.8)
    with seeded(0):
        x = pair.marginal().sample((1,)).detach()
    result = pv.nuts(pair, x, num_draws=400, warmup=100, progress=False)
    assert result.draws["z"].shape == (4, 400, 1, 2)
    assert result.guide_draws["z"].shape == (1600, 1, 2)
    assert result.units == ("z[0]", "z[1]")
    assert result.r_hat.max() < 1.01
    assert bool(result.agrees.all())
    mean, covariance = (part.detach() for part in pair.posterior(x))
    size, moments = result.effective_sample_size.min(), result.moments
    assert 400 < size < 5200
    assert bool(((moments.mean - mean).abs() < 4 * result.mean_standard_error).all())
    scale, rho = (
        covariance.diagonal().sqrt(),
        covariance[0, 1] / covariance.diagonal().prod().sqrt(),
    )
    assert rho < -0.5
    assert bool(((moments.standard_deviation / scale - 1).abs() < 4 / (2 * size).sqrt()).all())
    assert abs(moments.correlation[0, 0, 1] - rho) < 4 * (1 - rho**2) / size.sqrt()
    theirs = result.guide_moments
    assert bool(((theirs.standard_deviation / scale - 0.8).abs() < 0.8 * 4 / 3200**0.5).all())
    assert abs(theirs.correlation[0, 0, 1] - rho) < 4 * (1 - rho**2) / 800**0.5
    want = 0.5 * (0.8**2 - 1) - torch.tensor(0.8).log()
    torch.testing.assert_close(
        result.disagreement, want.double().expand(1, 2), atol=0.03, rtol=0, check_dtype=False
    )
    lines = str(result).splitlines()
    assert lines[1] == "data whose chains agree   1 of 1"
    figure = diagnostic_figures.posteriors(result)
    assert figure.axes[0].get_xlabel() in result.units


def test_rates_keep_to_their_support():
    """Gamma(2, 0.5) and a count x from it: the posterior is Gamma(2 + x, 1.5)."""
    x = torch.tensor([[0.0, 1, 9]]).double()
    result = pv.nuts(Counts(), x, num_draws=150, warmup=60, num_chains=2, progress=False)
    exact = dist.Gamma(2 + x, 1.5)
    assert result.units == ("rate[0]", "rate[1]", "rate[2]")
    off = (result.moments.mean - exact.mean).abs()
    assert bool((off < 4 * result.mean_standard_error).all())
    assert bool((result.moments.standard_deviation / exact.stddev - 1).abs().max() < 0.25)


@pytest.mark.thorough
def test_an_enumerated_latent_is_summed_out():
    """Compare with a grid over the two other latents."""
    pair, batch = make("bags"), rows("bags", 1)
    result = pv.nuts(pair, *batch, num_draws=100, warmup=50, num_chains=2, progress=False)
    joint = Joint(pair, batch)
    axis = torch.arange(-6, 6, 0.1).double()
    grid = torch.cartesian_prod(axis, axis)[:, None]
    with using(pair):
        weights = joint.log_joint(grid, *batch).softmax(0)[..., None]
    mean = (weights * grid).sum(0)
    scale = (weights * (grid - mean).square()).sum(0).sqrt()
    assert bool(((result.moments.mean - mean).abs() < 4 * result.mean_standard_error).all())
    assert bool((result.moments.standard_deviation / scale - 1).abs().max() < 0.25)


SHORT = {"num_draws": 4, "warmup": 4, "num_chains": 2, "engine": "eager", "progress": False}


@pytest.mark.parametrize("name", ["flows", "hierarchical", "params", "semi-supervised"])
def test_other_pairs_work(name):
    pair, batch = make(name), rows(name, 2)
    require(pair, batch)
    result = pv.nuts(pair, *batch, **SHORT)
    assert all(draws.shape[:3] == (2, 4, 2) for draws in result.draws.values())
    assert result.moments.mean.shape == (2, len(result.units))
    assert not result.moments.correlation.isnan().any()
    json.dumps(result.as_dict(), allow_nan=False)


def test_padding_stays_where_it_is():
    pair = make("deep-markov")
    x, _ = rows("deep-markov", 2)
    result = pv.nuts(pair, x, torch.tensor([3, 1]), **SHORT)
    steps = result.draws["z"]
    assert (steps[:, :, 1, 1:] == 0).all()
    assert (steps[:, :, 0].std((0, 1)) > 0).all()
    assert result.units[:3] == ("z[0][0]", "z[0][1]", "z[1][0]")
    assert torch.equal(result.r_hat.isnan()[1], torch.tensor([False] * 2 + [True] * 4))
    diagnostic_figures.posteriors(result)


def test_chains_that_disagree_are_reported():
    x = torch.tensor([[4.0]]).double()
    result = pv.nuts(TwoModes(), x, num_draws=20, warmup=40, progress=False, engine="eager")
    ends = result.draws["z"][:, -1, 0]
    assert ends.min() < -1.8
    assert ends.max() > 1.8
    assert result.r_hat.item() > 1.5
    assert not result.agrees.item()
    assert "data whose chains agree   0 of 1" in str(result)
    assert result.units == ("z",)
    diagnostic_figures.posteriors(result)


class Funnel(nn.Module):
    """One latent is the scale of another, so steps that fit the wide end diverge."""

    def __init__(self):
        super().__init__()
        self.spread = nn.Parameter(torch.tensor(3.0).double())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            v = pyro.sample("v", dist.Normal(x.new_zeros(()), self.spread))
            scale = (v / 2).exp()[..., None]
            z = pyro.sample("z", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
            pyro.sample("x", dist.Normal(z, 10.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("v", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))


def test_divergences_are_counted():
    x = torch.zeros(1, 1).double()
    settings = {"num_draws": 60, "warmup": 20, "num_chains": 2, "target_acceptance": 0.5}
    result = pv.nuts(Funnel(), x, progress=False, engine="eager", **settings)
    assert result.divergences.item() > 0
    assert not result.agrees.item()
    assert result.as_dict()["divergences"] == result.divergences.item()


def test_records_of_chains_that_never_moved():
    draws = torch.zeros(2, 4, 1, 1).double()
    stuck = Posterior(
        {"z": draws},
        {"z": torch.randn(8, 1, 1)},
        ("z[0]",),
        torch.full((1, 1), inf),
        torch.full((1, 1), nan),
        torch.zeros(1).long(),
    )
    assert not stuck.agrees.item()
    assert stuck.as_dict()["greatest_r_hat"] is None
    assert "infinite (maximum)" in str(stuck)


def test_nothing_else_is_touched():
    pair, batch = make("registered"), rows("registered", 1)
    pyro.param("mine", torch.ones(1))
    levels = {name: logging.getLogger(name).level for name in ("pyro", "root")}
    handlers = list(logging.getLogger("pyro").handlers)
    with seeded(3):
        before = rng.state()["torch"]
        first = pv.nuts(pair, *batch, **SHORT)
        assert torch.equal(rng.state()["torch"], before)
    again = pv.nuts(pair, *batch, **SHORT)
    torch.testing.assert_close(first.draws, again.draws)
    other = pv.nuts(pair, *batch, seed=1, **SHORT)
    assert not torch.equal(first.draws["z"], other.draws["z"])
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert {name: logging.getLogger(name).level for name in levels} == levels
    assert logging.getLogger("pyro").handlers == handlers


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind != "global"])
def test_an_error_names_the_site_that_a_tool_cannot_use(kind):
    x = torch.tensor([[0.0], [1.0]]).double()
    with pytest.raises(pv.UsageError, match=FAULTS[kind]):
        pv.nuts(Fault(kind), x, progress=False)


class Nowhere(TwoModes):
    """A model in which every draw of the prior makes the data impossible."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 3.0))
            fn = dist.Uniform(z[..., None].abs(), z[..., None].abs() + 1, validate_args=False)
            pyro.sample("x", fn.to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0] - 0.5, 0.01))


def test_misuse_raises_an_error_of_one_line():
    pair, x = TwoModes(), torch.ones(1, 1).double()
    for name, least in (("num_chains", 2), ("num_draws", 4), ("warmup", 1)):
        with pytest.raises(pv.UsageError, match=f"{name} must be at least {least}, got 0"):
            pv.nuts(pair, x, **{name: 0})
    with pytest.raises(pv.UsageError, match="row 0 is not finite at draws of the prior"):
        pv.nuts(Nowhere(), 1000 * x, **SHORT)


@pytest.mark.parametrize("spread", [1.0, 1.6])
def test_r_hat_is_that_of_ranks(spread: float) -> None:
    """R-hat detects chains of unequal spread, as in ArviZ, also with ties."""
    draws = torch.randn(4, 60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draws[0] *= spread
    draws[..., 1] = draws[..., 1].round()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    wanted = [float(arviz.rhat(draws[..., i].numpy(), method="rank")) for i in range(2)]
    assert rank_r_hat(draws).tolist() == pytest.approx(wanted, abs=1e-7)
    assert (rank_r_hat(draws)[0] > 1.03) == (spread > 1)

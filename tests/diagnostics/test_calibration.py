"""Simulation-based calibration: the exact guide passes at its level, and others are rejected."""

import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from pairs import ALL, make, rows
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.diagnostics.calibration import Calibration, _Simulated
from pyro_vae.diagnostics.ranks import _inside, ranks_of, simultaneous_band
from pyro_vae.pairs.scope import using
from pyro_vae.training.check import require

WEIGHT = torch.tensor([[1.0, 0.2], [0.8, 1.1], [0.1, 1.0]]).double()
"""Of a posterior with the correlation -0.47."""
BLOCKS, SIMULATIONS = 100, 2000


class Guided(LinearGaussian):
    """The linear-Gaussian pair; its guide is the posterior with the named errors."""

    def __init__(self, fault=None):
        super().__init__(WEIGHT, 0.6)
        self.fault = fault

    def guide(self, x):
        loc, covariance = self.posterior(x)
        spread = covariance.diagonal().sqrt()
        if self.fault == "mean":
            loc = loc + 0.25 * spread
        scale = {"scale": 0.8, "wide": 1.25}.get(self.fault, 1.0)
        factor = torch.linalg.cholesky(covariance) * scale
        if self.fault == "correlation":
            factor = spread.diag()
        if self.fault == "prior":
            loc, factor = torch.zeros_like(loc), torch.eye(2).double()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=factor))


def verdicts(fault):
    """Return the failures of many calibrations with 2,000 simulations each."""
    whole = pv.calibration(
        Guided(fault), num_simulations=BLOCKS * SIMULATIONS, num_draws=19, progress=False
    )
    return [
        Calibration(whole.names, ranks, 19, 0.05, {}).failures
        for ranks in whole.ranks.split(SIMULATIONS)
    ]


def test_the_exact_guide_passes_at_its_level():
    rejected = sum(bool(failures) for failures in verdicts(None))
    assert rejected <= 0.05 * BLOCKS + 4 * (BLOCKS * 0.05 * 0.95) ** 0.5


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("fault", "quantity", "words"),
    [
        ("scale", "z[0]", "draws are too narrow (U shape)"),
        ("mean", "z[1]", "draws are too high (slope down)"),
        ("correlation", "log p(x, z)", "too low (slope up)"),
    ],
)
def test_a_guide_that_is_wrong_is_rejected(fault, quantity, words):
    found = verdicts(fault)
    assert all(found)
    assert sum(quantity in failures for failures in found) > 0.9 * BLOCKS
    assert sum(words in failures.get(quantity, "") for failures in found) > 0.9 * BLOCKS
    if fault == "correlation":
        assert sum("z[0]" in failures or "z[1]" in failures for failures in found) < 0.1 * BLOCKS


def test_a_guide_that_does_not_heed_the_data_is_seen_by_the_likelihood_alone():
    found = pv.calibration(Guided("prior"), progress=False)
    assert set(found.failures) == {"log p(x, z)", "log p(x | z)"}
    assert "too low" in found.failures["log p(x | z)"]


def test_a_dome_is_distinguished_from_a_u():
    found = pv.calibration(Guided("wide"), progress=False)
    assert found.failures["z[0]"] == "draws are too wide (dome)"
    assert found.coverage[0, 0] > 0.55


@pytest.mark.parametrize(("simulations", "draws", "level"), [(100, 19, 0.05), (500, 99, 0.01)])
def test_the_band_has_its_level(simulations, draws, level):
    low, high = simultaneous_band(simulations, draws, level)
    inside = _inside(simulations, low, high)
    assert 1 - level <= inside < 1 - 0.7 * level
    generator = np.random.default_rng(0)
    equal = np.full(draws + 1, 1 / (draws + 1))
    below = generator.multinomial(simulations, equal, 100_000).cumsum(1)[:, :-1]
    share = ((below >= low) & (below <= high)).all(1).mean()
    assert share == pytest.approx(inside, abs=4 * (inside * (1 - inside) / 100_000) ** 0.5)


def test_coverage_is_that_of_the_intervals():
    """For a normal with 0.8 times the right scale: Phi(0.8 Phi^-1(p)) on either side."""
    found = pv.calibration(Guided("scale"), num_simulations=20_000, num_draws=99, progress=False)
    normal = torch.distributions.Normal(0.0, 1.0)
    intervals = torch.tensor([0.5, 0.8, 0.9, 0.95]).double()
    want = 2 * normal.cdf(0.8 * normal.icdf((1 + intervals) / 2)) - 1
    for unit in (0, 1):
        error = found.coverage_errors[unit]
        # A finite number of draws adds an error of about 1 / num_draws.
        assert bool((found.coverage[unit] - want).abs().le(4 * error + 0.005).all())
    assert error[0] == pytest.approx((want[0] * (1 - want[0]) / 20_000).sqrt().item(), rel=0.02)


class Discrete(nn.Module):
    """A component k with a posterior in closed form, and a level that the model sums out."""

    def __init__(self, off=0.0):
        super().__init__()
        self.off = nn.Parameter(torch.tensor(off).double())

    def densities(self, x):
        """Return log p(k, x) for k = 0 and 1, (n, 2), with the level summed out."""
        at = torch.tensor([[0.0, 1.0], [1.5, 2.5]]).double()
        parts = dist.Normal(at, 1.0).log_prob(x[:, :, None]) + torch.tensor([0.25, 0.75]).log()
        return parts.logsumexp(-1) + torch.tensor([0.4, 0.6]).log()

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Bernoulli(x.new_full((), 0.6)))
            how = {"enumerate": "parallel"}
            m = pyro.sample("m", dist.Bernoulli(x.new_full((), 0.75)), infer=how)
            pyro.sample("x", dist.Normal((1.5 * k + m)[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        densities = self.densities(x)
        with pyro.plate("data", len(x), dim=-1):
            logits = densities[:, 1] - densities[:, 0] + self.off
            pyro.sample("k", dist.Bernoulli(logits=logits))

    def template(self, n):
        return (torch.zeros(n, 1).double(),)


def test_discrete_latents_are_ranked_with_ties_broken_and_others_summed_out():
    exact, wrong = (pv.calibration(Discrete(off), progress=False) for off in (0.0, 1.0))
    assert exact.names == ("k", "log p(x, z)", "log p(x | z)")
    assert exact.left_out == {"m": "the guide does not draw it"}
    assert exact.calibrated
    assert "too high" in wrong.failures["k"]
    pair, x = Discrete(), torch.randn(5, 1, generator=torch.Generator().manual_seed(0)).double()
    with using(pair, 0):
        simulated = _Simulated(pair, (), None, 19, {})
        for k in (0, 1):
            value = {"k": torch.full((5,), float(k)).double()}
            scored = simulated._scored((x,), value, None)
            want = pair.densities(x).detach()[:, k]
            torch.testing.assert_close(scored.joint[0], want)
            torch.testing.assert_close(scored.likelihood[0], want - np.log((0.4, 0.6)[k]))


def test_ties_are_broken_evenly():
    ranks = ranks_of(torch.zeros(9, 20_000, 1), torch.zeros(20_000, 1))
    shares = torch.bincount(ranks.flatten(), minlength=10) / 20_000
    assert bool((shares - 0.1).abs().le(4 * (0.09 / 20_000) ** 0.5).all())
    nearly = torch.full((1, 1), 3.0).double()
    drawn = nearly * (1 + torch.finfo(torch.float64).eps) ** torch.ones(9, 1, 1)
    assert len({int(ranks_of(drawn, nearly)) for _ in range(50)}) > 3


@pytest.mark.sample(12)
@pytest.mark.parametrize("name", ALL)
def test_any_pair(name):
    pair, batch = make(name), rows(name, 30)
    require(pair, batch)
    state, options = torch.get_rng_state(), {"num_simulations": 100, "num_draws": 19}
    context = () if name == "semi-supervised" else batch[1:]  # labels would be data and not context
    found = pv.calibration(pair, *context, progress=False, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.ranks.shape == (100, len(found.names))
    assert found.ranks.min() >= 0
    assert found.ranks.max() <= 19
    again = pv.calibration(pair, *context, progress=False, **options)
    assert torch.equal(again.ranks, found.ranks)


def test_a_pair_that_takes_no_plate_of_samples_gets_the_same_verdict():
    class Stubborn(Guided):
        def model(self, x):
            if torch.is_tensor(x) and pyro.poutine.runtime._PYRO_STACK:
                for frame in pyro.poutine.runtime._PYRO_STACK:
                    if getattr(frame, "name", "") in ("draws", "importance_samples"):
                        raise RuntimeError("no such plate")
            super().model(x)

    options = {"num_simulations": 400, "num_draws": 19, "progress": False}
    assert pv.calibration(Stubborn(), **options).calibrated
    found = pv.calibration(Stubborn("mean"), **options)
    assert "too high" in found.failures["z[0]"]


def test_a_users_quantities():
    """The product of residuals detects a missing correlation, independently of the densities."""
    pair = Guided("correlation")

    def product(z, x):
        return (z["z"] - pair.posterior(x)[0]).prod(-1)

    found = pv.calibration(pair, test_quantities={"product": product}, progress=False)
    assert "too high" in found.failures["product"]  # the correlation is negative
    with pytest.raises(pv.UsageError, match=r"'product' must return a tensor .*, got \(2000, 2\)"):
        pv.calibration(pair, test_quantities={"product": lambda z, x: z["z"]}, progress=False)


class Global(LinearGaussian):
    def model(self, x):
        pyro.sample("scale", dist.Normal(torch.zeros(()).double(), 1.0))
        super().model(x)

    def guide(self, x):
        pyro.sample("scale", dist.Normal(torch.zeros(()).double(), 1.0))
        super().guide(x)


class Untemplated(nn.Module):
    model, guide = LinearGaussian.model, LinearGaussian.guide


def test_misuse_raises_an_error_of_one_line():
    pair = Guided()
    with pytest.raises(pv.UsageError, match="num_simulations must be at least 100, got 99"):
        pv.calibration(pair, num_simulations=99)
    with pytest.raises(pv.UsageError, match="num_draws must be at least 19, got 5"):
        pv.calibration(pair, num_draws=5)
    with pytest.raises(pv.UsageError, match="level must be between 0 and 1, got 5"):
        pv.calibration(pair, level=5)
    with pytest.raises(pv.UsageError, match="'scale' is not local"):
        pv.calibration(Global(WEIGHT, 0.6), progress=False)
    with pytest.raises(pv.UsageError, match="Untemplated has no method template"):
        pv.calibration(Untemplated(), progress=False)
    conditional, (_, context) = make("conditional"), rows("conditional", 4)
    with pytest.raises(pv.UsageError, match="needs 1 context tensors, got 0"):
        pv.calibration(conditional, progress=False)
    with pytest.raises(pv.UsageError, match="have 4, 3 rows; they must match"):
        pv.calibration(conditional, context, context[:3], progress=False)


def test_table_record_and_figure():
    found = pv.calibration(Guided("scale"), num_simulations=500, progress=False)
    assert "rejected by" in str(found)
    assert "too narrow (U shape)" in str(found)
    record = json.loads(json.dumps(found.as_dict()))
    assert record["calibrated"] is False
    assert record["coverage"]["z[0]"]["0.9"] == found.coverage[0, 2].item()
    figure = diagnostic_figures.calibration_bands(found, number=2)
    assert [axis.get_title() for axis in figure.axes][-1] == "coverage"
    assert len(figure.axes) == 3
    exact = pv.calibration(Guided(), num_simulations=500, progress=False)
    assert "not rejected" in str(exact)

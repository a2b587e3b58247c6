"""Both gaps, and their errors, equal closed forms."""

import json
from math import log
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import Spoiled, linear_gaussian
from pairs import make, rows
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.diagnostics.gaps import _split
from pyro_vae.inference.importance import all_log_weights
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import using
from pyro_vae.training.check import require

OPTIONS = {"steps": 150, "num_samples": 2000, "progress": False}
MILD = torch.tensor([[1.0, 0.2], [0.8, 1.1], [0.1, 1.0], [0.2, -0.3]]).double()
"""Of a posterior whose correlation is such that weights of the diagonal family have a variance."""


def data(pair, n=60):
    with seeded(5):
        return pair.marginal().sample((n,)).detach()


def closed_forms(pair, x):
    """Return log p(x), the KL of the best member of the family, and the rest of the guide's KL."""
    best = Spoiled(pair.family, weight=pair.weight.detach())
    least = best.kl(x, best.q(x))
    return pair.marginal().log_prob(x).detach(), least, pair.kl(x, pair.q(x)) - least


@pytest.mark.sample(1)
@pytest.mark.parametrize(("shift", "stretch"), [(0.0, 1.0), (0.6, 1.4), (-0.4, 0.7)])
def test_a_diagonal_family_on_a_correlated_posterior(shift, stretch):
    pair = Spoiled("diagonal", shift, stretch, MILD)
    x = data(pair)
    log_p, least, put_in = closed_forms(pair, x)
    assert least.min() > 0.1
    found = pv.gaps(pair, x, **OPTIONS)
    assert found.approximation.value == pytest.approx(least.mean().item(), abs=0.02)
    slack = 0.01 + 4 * found.amortization.standard_error
    assert found.amortization.value == pytest.approx(put_in.mean().item(), abs=slack)
    assert found.log_likelihood.value == pytest.approx(log_p.mean().item(), abs=0.02)
    for gap, truth in ((found.approximation, least), (found.amortization, put_in)):
        off = (gap.per_datum - truth).abs()
        assert bool(off.le(0.02 + 5 * gap.standard_errors).all())
    if (shift, stretch) == (0.0, 1.0):
        assert found.amortization.per_datum.abs().mean() < 0.01  # the noise of the optimization
    whole = found.approximation.per_datum + found.amortization.per_datum
    torch.testing.assert_close(whole, found.inference.per_datum)
    torch.testing.assert_close(
        found.log_likelihood.per_datum - found.amortized.per_datum, found.inference.per_datum
    )


def test_an_exact_family_leaves_nothing():
    pair = Spoiled("full", 0.5, 1.2)
    x = data(pair)
    found = pv.gaps(pair, x, **OPTIONS)
    assert found.approximation.value == pytest.approx(0, abs=0.01)
    assert found.amortization.value == pytest.approx(
        closed_forms(pair, x)[2].mean().item(), abs=0.01 + 4 * found.amortization.standard_error
    )
    assert found.from_refined.double().mean() > 0.5


def test_errors_are_those_of_differences():
    """Correlated normal log weights before and after: the errors equal the spread over runs."""
    generator = torch.Generator().manual_seed(0)
    common, own = torch.randn(2, 400, 3000, generator=generator, dtype=torch.float64)
    before = 0.9 * common + 0.2 * own - 1
    after = 0.5 * common
    chosen = torch.arange(3000) % 2 == 0
    found = _split(before, after, chosen, torch.float64)
    for value, error in found[:6]:
        for half in (chosen, ~chosen):
            ratio = value[half].std() / error[half].square().mean().sqrt()
            assert ratio.item() == pytest.approx(1.0, abs=0.08)
    errors = found.amortized.standard_errors, found.refined.standard_errors
    independent = (errors[0].square() + errors[1].square()).sqrt()
    assert (found.amortization.standard_errors / independent).median() < 0.6  # shared draws


@pytest.mark.thorough
def test_choosing_the_better_proposal_does_not_lift_the_bound():
    """Two noisy bounds: their maximum would exceed log p(x) on average."""
    pair = Spoiled("diagonal", 0.9, 0.6)
    x = data(pair, 200)
    log_p = pair.marginal().log_prob(x).detach()
    runs = [
        pv.gaps(pair, x, steps=1, num_samples=21, seed=seed, progress=False).log_likelihood
        for seed in range(8)
    ]
    off = torch.stack([run.per_datum - log_p for run in runs])
    error = off.mean(1).std() / len(runs) ** 0.5
    assert off.mean() < 4 * error


class Given(NamedTuple):
    per_datum: Tensor
    standard_errors: Tensor


def test_a_better_bound_is_taken_as_it_is():
    pair = Spoiled("diagonal", 0.6, 1.4)
    x = data(pair)
    log_p, least, _ = closed_forms(pair, x)
    exact = Given(log_p, torch.zeros_like(log_p))
    found = pv.gaps(pair, x, log_likelihood=exact, **OPTIONS)
    torch.testing.assert_close(found.log_likelihood.per_datum, log_p)
    assert found.approximation.value == pytest.approx(
        least.mean().item(), abs=0.01 + 4 * found.approximation.standard_error
    )
    torch.testing.assert_close(found.approximation.standard_errors, found.refined.standard_errors)
    assert found.as_dict()["fraction_k_over_0.7"] is None
    with pytest.raises(
        pv.UsageError, match=r"of shape \(60,\), one number for each row of x, got \(3,\)"
    ):
        pv.gaps(pair, x, log_likelihood=Given(log_p[:3], log_p[:3]), **OPTIONS)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["params", "flows", "hierarchical", "semi-supervised", "bags"])
def test_any_pair(name, monkeypatch):
    pair, batch = make(name), rows(name, 7)
    require(pair, batch)
    monkeypatch.setattr("pyro_vae.diagnostics.gaps.BLOCK", 4)
    state = torch.get_rng_state()
    found = pv.gaps(pair, *batch, steps=30, num_samples=60, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.inference.per_datum.shape == (7,)
    # Other draws of the same two bounds, so the errors add.
    estimate = pv.log_likelihood(pair, *batch, num_samples=2000)
    error = (found.amortized.standard_errors**2 + estimate.elbo_standard_errors**2).sqrt()
    off = (found.amortized.per_datum - estimate.elbo_per_datum).abs()
    assert bool(off.le(5 * error + 1e-6).all())
    assert found.amortization.value > -3 * found.amortization.standard_error
    again = pv.gaps(pair, *batch, steps=30, num_samples=60, progress=False)
    assert torch.equal(again.inference.per_datum, found.inference.per_datum)


@pytest.mark.sample(1)
@pytest.mark.parametrize("cells", [2**20, 6 * 64 * 5, 7])
def test_weights_in_blocks_of_rows_and_draws(cells, monkeypatch):
    monkeypatch.setattr("pyro_vae.inference.importance.CELLS", cells)
    pair = linear_gaussian(spread=1.3)
    x = data(pair, 23)
    with using(pair, 0):
        weights = all_log_weights(pair, (x,), 70)
    assert weights.shape == (70, 23)
    log_p = pair.marginal().log_prob(x).detach()
    elbo = log_p - (1.3**2 - 1) + 2 * log(1.3)
    off = (weights.mean(0) - elbo) / (weights.std(0) / 70**0.5)
    assert off.square().mean() == pytest.approx(1, abs=4 * (2 / 23) ** 0.5)


class Auxiliary(nn.Module):
    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.Normal(x.new_zeros(()), 1.0)
            u = pyro.sample("u", fn, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 1.0))


def test_misuse_raises_an_error_of_one_line():
    pair = Spoiled("diagonal")
    x = data(pair)
    with pytest.raises(pv.UsageError, match="num_samples must be at least 21, got 20"):
        pv.gaps(pair, x, num_samples=20)
    with pytest.raises(pv.UsageError, match="site 'u' of the guide is missing from the model"):
        pv.gaps(Auxiliary(), torch.ones(3, 1), steps=1, progress=False)


def test_table_record_and_figure():
    pair = Spoiled("diagonal", 0.6)
    found = pv.gaps(pair, data(pair), steps=20, num_samples=100, progress=False)
    table = str(found)
    assert f"{found.approximation.value:.3f}" in table
    assert "Pareto k over 0.50" in table  # 1 - 1 / log10(100)
    record = found.as_dict()
    assert record["inference"] == pytest.approx(record["approximation"] + record["amortization"])
    assert json.loads(json.dumps(record))["steps"] == 20
    assert diagnostic_figures.gap_bars(found).axes[1].get_legend() is not None
    worst = found.inference.per_datum.clone()
    worst[0] = torch.inf
    broken = found._replace(inference=found.inference._replace(per_datum=worst))
    assert broken.as_dict()["inference"] is None
    assert broken.as_dict()["not_finite"] == 1
    assert "not finite, because weights are infinite: 1 data" in str(broken)
    assert diagnostic_figures.gap_bars(broken).axes

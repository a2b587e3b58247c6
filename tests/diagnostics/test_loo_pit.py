"""LOO-PIT, compared with conditional distributions in closed form."""

import json

import pyro.distributions as dist
import pytest
import torch
from apart import Apart
from exact import LinearGaussian, linear_gaussian
from pairs import make, rows

import pyro_vae as pv
from pyro_vae.diagnostics.loo_figures import loo_pit_bars

QUIET = {"progress": False}
NORMAL = torch.distributions.Normal(0.0, 1.0)


def data(pair, n=150):
    torch.manual_seed(0)
    return pair.marginal().sample((n,)).detach()


def conditional(pair, x):
    """The exact mean and standard deviation of each entry given the others."""
    precision = torch.linalg.inv(pair.marginal().covariance_matrix).detach()
    variance = 1 / precision.diagonal()
    return x - (x @ precision) * variance, variance.sqrt()


@pytest.mark.parametrize("spread", [1.0, 1.3])
def test_values_are_those_of_the_conditional_normals(spread):
    pair = linear_gaussian(spread=spread)
    x = data(pair, 60)
    mean, scale = conditional(pair, x)
    found = pv.loo_pit(pair, x, num_samples=2000, **QUIET)
    off = (found.pit - NORMAL.cdf((x - mean) / scale)).abs()
    assert off[found.pareto_k < 0.5].max() < 0.05
    assert off.mean() < 0.01


def test_coverage_of_a_right_model_and_of_one_with_half_the_noise():
    pair = linear_gaussian()
    x = data(pair, 300)
    found = pv.loo_pit(pair, x, num_samples=300, **QUIET)
    wanted = torch.tensor([0.5, 0.8, 0.9, 0.95]).double()
    assert bool(((found.coverage - wanted).abs() < 4 * found.coverage_errors + 0.01).all())
    wrong = LinearGaussian(pair.weight.data, 0.25)
    mean, scale = conditional(wrong, x)
    exact = (2 * NORMAL.cdf(((x - mean) / scale).abs()) - 1)[..., None] <= wanted
    narrow = pv.loo_pit(wrong, x, num_samples=300, **QUIET)
    assert (narrow.coverage - exact.double().mean((0, 1))).abs().max() < 0.03
    assert bool((narrow.coverage < wanted - 0.15).all())


@pytest.mark.parametrize(
    ("fn", "slack"),
    [
        (dist.Bernoulli(torch.tensor(0.3).double()), 1e-9),
        (dist.Binomial(4, torch.tensor(0.4).double()), 1e-9),
        (dist.Poisson(torch.tensor(2.5).double()), 0.12),  # by draws
    ],
    ids=["Bernoulli", "Binomial", "Poisson"],
)
def test_discrete_entries_are_uniform_within_their_steps(fn, slack):
    torch.manual_seed(0)
    x = fn.sample((200, 2))
    found = pv.loo_pit(Apart(fn), x, num_samples=400, **QUIET)
    values = torch.arange(int(x.max()) + 1).double()
    mass = fn.log_prob(values).exp()
    above = mass.cumsum(0)[x.long()]
    below = above - mass[x.long()]
    assert bool((found.pit >= below - slack).all())
    assert bool((found.pit <= above + slack).all())
    place = ((found.pit - below) / (above - below)).flatten()
    assert place.mean() == pytest.approx(0.5, abs=4 * 0.29 / 20 + slack)
    assert place.std() > 0.25  # one random part for each entry, and not its mean


def test_a_likelihood_without_a_cdf_is_drawn():
    fn = dist.StudentT(torch.tensor(5.0).double(), 0.0, 1.0)
    torch.manual_seed(0)
    x = fn.sample((100, 2))
    found = pv.loo_pit(Apart(fn), x, num_samples=1000, **QUIET)
    reference = fn.sample((100_000,))
    want = (reference[:, None, None] < x).double().mean(0)
    assert (found.pit - want).abs().max() < 5 * 0.5 / 1000**0.5


def test_missing_entries_other_pairs_and_figure():
    x = data(linear_gaussian(), 6)[:, :2]
    x[2, 1] = torch.nan
    found = pv.loo_pit(Apart(dist.Normal(torch.zeros(()).double(), 1.0)), x, **QUIET)
    assert found.pit.isnan().nonzero().tolist() == [[2, 1]]
    torch.testing.assert_close(found.pit.nan_to_num(0.5), NORMAL.cdf(x.nan_to_num(0.0)))
    for name in ("categorical", "discretized-logistic", "mixture"):
        found = pv.loo_pit(make(name), *rows(name, 5), num_samples=30, **QUIET)
        again = pv.loo_pit(make(name), *rows(name, 5), num_samples=30, **QUIET)
        assert torch.equal(found.pit, again.pit)
        assert 0 <= found.pit.min() <= found.pit.max() <= 1 + 1e-6
    record = json.loads(json.dumps(found.as_dict()))
    assert record["coverage"]["0.9"] == found.coverage[2].item()
    assert "predictive interval" in str(found)
    bars = loo_pit_bars(found).axes[0].patches
    assert sum(bar.get_height() for bar in bars) / 20 == pytest.approx(1.0)


def test_misuse():
    with pytest.raises(pv.UsageError, match="num_samples must be at least 21"):
        pv.loo_pit(linear_gaussian(), data(linear_gaussian()), num_samples=5)


def test_one_row_has_no_standard_error():
    found = pv.loo_pit(linear_gaussian(), data(linear_gaussian(), 1), num_samples=50, **QUIET)
    assert bool(found.coverage_errors.isnan().all())
    assert set(found.as_dict()["coverage_standard_error"].values()) == {None}
    assert "nan %" in str(found)

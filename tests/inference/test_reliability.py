"""The reliability of an importance-sampled log p(x): its errors, and the shape of its tail."""

import json
import warnings
from math import inf, nan

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import linear_gaussian
from pairs import ALL, make, rows
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.inference.datum_weights import _shapes, relative_error
from pyro_vae.inference.pareto import Greatest, pareto_shape, tail_length, threshold
from pyro_vae.pairs.rng import seeded

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz


def data(pair, n=100):
    with seeded(0):
        return pair.marginal().sample((n,)).detach()


WEIGHTS = {
    "normal": lambda g, s: g.normal(size=s),
    "light": lambda g, s: np.log(g.uniform(size=s)),
    "heavy": lambda g, s: 1.5 * g.exponential(size=s) - 700,
    "no mean": lambda g, s: 300 * g.exponential(size=s),
    "tied": lambda g, s: g.integers(0, 30, size=s) / 10,
    "few above the rest": lambda g, s: np.where(g.uniform(size=s) < 0.01, g.normal(size=s), -5.0),
    "constant": lambda g, s: np.full(s, -3.3),
    "constant to rounding": lambda g, s: -3.3 + 4.4e-16 * g.integers(-3, 4, size=s),
    "half zero": lambda g, s: np.where(g.uniform(size=s) < 0.5, -inf, g.normal(size=s)),
    "nearly all zero": lambda g, s: np.where(g.uniform(size=s) < 0.9, -inf, g.normal(size=s)),
    "zero": lambda g, s: np.full(s, -inf),
    "infinite": lambda g, s: np.where(g.uniform(size=s) < 0.1, inf, g.normal(size=s)),
    "NaN": lambda g, s: np.where(g.uniform(size=s) < 0.1, nan, g.normal(size=s)),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.filterwarnings("ignore")
def test_the_shape_is_that_of_arviz(kind):
    """It is 0 if the largest weight occurs five times, where ArviZ fits a tail of ties."""
    generator = np.random.default_rng(0)
    for samples in (21, 26, 100, 225, 1000, 5000):
        weights = WEIGHTS[kind](generator, (6, samples))
        want = torch.from_numpy(arviz.psislw(weights.copy())[1])
        greatest = weights.max(1, keepdims=True)
        bounded = ((weights == greatest) & np.isfinite(greatest)).sum(1) >= 5
        want[torch.from_numpy(bounded)] = 0.0
        found = pareto_shape(torch.from_numpy(weights))
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-6, equal_nan=True)


def test_the_greatest_are_kept_in_parts(monkeypatch):
    with seeded(0):
        weights = torch.randn(7, 1000)
    kept = Greatest(tail_length(1000) + 1)
    for part in weights.T.split(90):
        kept.add(part)
        assert sum(held.shape[1] for held in kept.parts) <= 5 * kept.number + 90
    assert torch.equal(kept.values(), weights.sort(descending=True).values[:, : kept.number])
    whole = pareto_shape(weights)
    monkeypatch.setattr("pyro_vae.inference.pareto.FITTED_CELLS", 10_000)
    torch.testing.assert_close(pareto_shape(weights), whole)


def test_thresholds_are_those_of_the_paper():
    assert threshold(100) == pytest.approx(0.5)
    assert threshold(316) == pytest.approx(0.6, abs=1e-3)
    assert threshold(10**6) == 0.7


def test_k_is_computed_from_the_weights_of_the_estimate(monkeypatch):
    """Known weights: the sums over chunks equal the results of all weights together."""
    pair = linear_gaussian(spread=0.8)
    x = data(pair, 5)
    monkeypatch.setattr("pyro_vae.inference.importance.CELLS", 6 * 5 * 64)
    kept = []
    from pyro_vae.inference import importance
    from pyro_vae.pairs import weights as pair_weights

    plain = pair_weights.log_weights

    def noted(*arguments):
        kept.append(plain(*arguments))
        return kept[-1]

    monkeypatch.setattr(importance, "log_weights", noted)
    result = pv.log_likelihood(pair, x, num_samples=1000, engine="eager")
    weights = torch.cat(kept).T
    assert weights.shape == (5, 1000)
    assert len(kept) > 10
    torch.testing.assert_close(result.pareto_k, pareto_shape(weights))
    torch.testing.assert_close(result.per_datum, weights.logsumexp(1) - torch.tensor(1000.0).log())
    graph = pv.log_likelihood(pair, x, num_samples=1000, engine="traced")
    torch.testing.assert_close(graph.pareto_k, result.pareto_k)


class ExactNormal(nn.Module):
    """z ~ N(0, 1), x ~ N(z, 1), and the posterior as guide."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.slope * x[:, 0], 0.5**0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exact_posterior_is_exact_and_has_no_tail(dtype):
    """Its weights differ only by rounding, which must not count as a tail."""
    x = torch.linspace(-2, 2, 9)[:, None]
    result = pv.log_likelihood(ExactNormal().to(dtype), x, num_samples=5000)
    truth = dist.Normal(0.0, 2.0**0.5).log_prob(x[:, 0].double())
    torch.testing.assert_close(result.per_datum, truth, atol=1e-4, rtol=0)
    assert result.pareto_k.max() < 0.1


def test_the_exact_posterior_of_the_linear_pair():
    pair = linear_gaussian()
    x = data(pair)
    result = pv.log_likelihood(pair, x, num_samples=5000)
    truth = pair.marginal().log_prob(x).detach()
    torch.testing.assert_close(result.per_datum, truth, atol=1e-4, rtol=0)
    assert result.pareto_k.max() < 0.1
    assert result.standard_error < 1e-6


@pytest.mark.parametrize("spread", [0.7, 1.3])
def test_the_truth_is_within_four_standard_errors(spread):
    """Weights over p(x) have the same distribution for all data, so rows replace seeds."""
    pair = linear_gaussian(spread=spread)
    x = data(pair, 200)
    result = pv.log_likelihood(pair, x, num_samples=5000)
    off = (result.per_datum - pair.marginal().log_prob(x).detach()).abs()
    assert (off < 4 * result.standard_errors).double().mean() >= 0.99
    assert (off > result.standard_errors / 4).double().mean() > 0.5  # the error is not too large


def test_a_narrow_guide_is_flagged_in_many_dimensions_and_a_wide_one_is_not():
    """With scale s < 1 the weights have the shape 1 - s^2 = 0.51 in any dimension. In more
    dimensions the estimate is larger. With s > 1 the weights are bounded."""
    shapes = {}
    for dim, spread in ((2, 0.7), (20, 0.7), (20, 1.3), (2, 1.3)):
        pair = linear_gaussian(dim + 2, dim, spread)
        shapes[dim, spread] = pv.log_likelihood(pair, data(pair), num_samples=5000).pareto_k
    assert shapes[2, 0.7].mean().item() == pytest.approx(1 - 0.7**2, abs=0.04)
    assert (shapes[20, 0.7] > 0.7).double().mean() > 0.8
    assert (shapes[2, 0.7] > 0.7).double().mean() < 0.1
    assert shapes[20, 1.3].max() < 0.7
    assert shapes[2, 1.3].max() < 0


class HalfBlind(ExactNormal):
    """A guide that gives no density to some of its draws."""

    def guide(self, x):
        fn = Truncated(self.slope * x[:, 0], torch.ones(()))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", fn)


class Truncated(dist.Normal):
    """A normal that reports the density 0 above 2."""

    def expand(self, batch_shape, _instance=None):
        return Truncated(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def log_prob(self, value):
        return torch.where(value > 2, -torch.inf, super().log_prob(value))


def test_infinite_weights_are_counted_and_not_averaged_away():
    x = torch.tensor([[-12.0], [1.0]])
    result = pv.log_likelihood(HalfBlind(), x, num_samples=1000)
    assert result.infinite_weights[0] == 0
    assert 20 < result.infinite_weights[1] < 140  # P(N(0.5, 1) > 2) = 0.067
    assert result.per_datum[1] == inf
    assert result.value == inf
    assert result.standard_errors[1].isnan()
    assert result.pareto_k[1] == inf
    assert result.pareto_k[0] < 0.7
    assert result.worst(1).tolist() == [1]
    assert f"infinite weights                {int(result.infinite_weights[1])}, 1 data" in str(
        result
    )
    record = result.as_dict()
    assert record["log_likelihood"] is None
    assert record["infinite_weights"] == int(result.infinite_weights[1])
    json.dumps(record, allow_nan=False)


def test_too_few_samples_for_a_tail():
    pair = linear_gaussian(spread=0.7)
    x = data(pair, 3)
    few = pv.log_likelihood(pair, x, num_samples=20)
    assert few.pareto_k.isnan().all()
    assert few.as_dict()["median_k"] is None
    assert "needs at least 21 samples" in str(few)
    with pytest.raises(pv.UsageError, match="num_samples must be at least 21 for Pareto k, got 20"):
        few.worst()
    with pytest.raises(pv.UsageError, match="needs at least 21 weights, got 20"):
        pareto_shape(torch.zeros(3, 20))
    assert pv.log_likelihood(pair, x, num_samples=21).pareto_k.isfinite().all()


def test_the_worst_are_those_of_the_greatest_k_and_then_of_the_greatest_error():
    pair = linear_gaussian(spread=0.7)
    result = pv.log_likelihood(pair, data(pair, 6), num_samples=50)
    k = torch.tensor([0.2, inf, 0.9, 0.2, nan, 0.2]).double()
    errors = torch.tensor([0.1, nan, 0.1, 0.3, 0.1, 0.2]).double()
    result = result._replace(pareto_k=k.nan_to_num(-1), standard_errors=errors)
    assert result.worst().tolist() == [1, 2, 3, 5, 0, 4]
    record = result.as_dict()
    assert record["fraction_k_over_1"] == pytest.approx(1 / 6)
    assert record["fraction_k_over_0.7"] == pytest.approx(2 / 6)
    assert record["k_threshold"] == pytest.approx(1 - 1 / np.log10(50))


@pytest.mark.parametrize("name", ALL)
def test_every_pair_has_a_k_for_each_datum(name):
    result = pv.log_likelihood(make(name), *rows(name, 5), num_samples=30)
    assert result.pareto_k.shape == result.infinite_weights.shape == (5,)
    assert not result.pareto_k.isnan().any()
    assert int(result.infinite_weights.sum()) == 0
    json.dumps(result.as_dict(), allow_nan=False)


@pytest.mark.parametrize("shape", [(1, 8, 8), (6,)])
def test_the_figure_shows_the_worst(shape):
    vae = pv.VAE.mlp(shape, latent_dim=2, hidden=())
    with seeded(0):
        x = torch.rand(12, *shape).round()
    figure = diagnostic_figures.reliability(pv.log_likelihood(vae, x, num_samples=50), x, number=4)
    titles = [axis.get_title() for axis in figure.axes]
    assert "of 12 data over 0.41" in titles[0]
    assert [title.split("\n")[0][:4] for title in titles[1:]] == ["row "] * 4


def test_the_error_of_few_samples_is_that_of_a_sample():
    """sd / (mean sqrt K) with K - 1 in the variance; its square is not too small for K = 2."""
    weights = torch.tensor([[0.2, 1.0], [0.7, 3.0], [0.6, 5.0]], dtype=torch.float64)
    ratio = weights.square().sum(0) / weights.sum(0).square()
    wanted = weights.std(0) / weights.mean(0) / 3**0.5
    torch.testing.assert_close(relative_error(ratio, 3), wanted)
    assert relative_error(ratio, 1).isnan().all()


def test_few_equal_greatest_weights_above_others_are_not_constant():
    """Four equal weights do not show that weights are bounded, and have no shape; five do."""
    greatest = torch.zeros(3, 9, dtype=torch.float64)
    greatest[1, 4:], greatest[2, 5:] = -1.0, -1.0
    least = torch.tensor([0.0, -2.0, -2.0], dtype=torch.float64)
    found = _shapes(greatest, least, torch.finfo(torch.float64).eps)
    assert found.tolist() == [0.0, inf, 0.0]

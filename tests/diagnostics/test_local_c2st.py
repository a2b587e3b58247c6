"""L-C2ST: its level for an exact guide, and what it finds."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from pairs import make, rows
from sklearn.ensemble import HistGradientBoostingClassifier

import pyro_vae as pv

WEIGHT = torch.tensor([[1.0, 0.2], [0.8, 1.1], [0.1, 1.0]]).double()
SMALL = {"num_simulations": 400, "num_draws": 30, "num_null": 19, "progress": False}


class Guided(LinearGaussian):
    """The linear-Gaussian pair; the guide is wrong as named, in some rows."""

    def __init__(self, fault="", everywhere=True):
        super().__init__(WEIGHT, 0.6)
        self.fault, self.everywhere = fault, everywhere

    def guide(self, x):
        loc, covariance = self.posterior(x)
        spread = covariance.diagonal().sqrt()
        here = torch.ones(len(x)).bool() if self.everywhere else x[:, 0] > 0
        off = 0.6 * spread * here[:, None] if self.fault == "mean" else 0.0
        factor = torch.linalg.cholesky(covariance) * (0.6 if self.fault == "scale" else 1.0)
        if self.fault == "correlation":
            factor = spread.diag()
        if self.fault == "prior":
            loc, factor = torch.zeros_like(loc), torch.eye(2).double()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc + off, scale_tril=factor))


def data(n=60):
    torch.manual_seed(0)
    return Guided().marginal().sample((n,))


def test_an_exact_guide_is_rejected_at_the_level():
    """The p-values are uniform on 0.05, 0.1, ..., 1."""
    small = {**SMALL, "num_simulations": 100, "num_draws": 10}
    runs = [pv.local_c2st(Guided(), data(20), **small, seed=seed) for seed in range(8)]
    values = torch.tensor([found.overall_p_value for found in runs])
    assert (values <= 0.1).sum() <= 4  # more with a probability of 4e-4
    assert values.mean() == pytest.approx(0.525, abs=4 * 0.29 / 8**0.5)
    accuracies = torch.tensor([found.accuracy for found in runs])
    assert accuracies.mean() == pytest.approx(0.5, abs=4 * 0.5 / (100 * 8) ** 0.5)


@pytest.mark.parametrize("fault", ["mean", "scale", "correlation", "prior"])
def test_a_wrong_guide_is_rejected(fault):
    found = pv.local_c2st(Guided(fault), data(), **SMALL)
    assert found.overall_p_value == pytest.approx(0.05)
    assert (found.p_values <= 0.05).double().mean() > 0.7
    assert found.accuracy > 0.53
    assert found.overall_statistic > 3 * found.null.mean()


def test_the_classifier_is_right_as_often_as_the_best_one():
    """Two normals that differ by 0.6 posterior standard deviations in each of two units."""
    correlation = Guided().posterior(data())[1]
    spread = correlation.diagonal().sqrt()
    off = 0.6 * spread
    distance = (off @ torch.linalg.inv(correlation) @ off).sqrt()
    best = torch.distributions.Normal(0.0, 1.0).cdf(distance / 2).item()
    found = pv.local_c2st(Guided("mean"), data(), **{**SMALL, "num_simulations": 2000})
    assert best - 0.05 < found.accuracy < best + 4 * (0.25 / 2000) ** 0.5


def test_the_rows_where_the_guide_is_wrong_are_found():
    x = data(80)
    found = pv.local_c2st(Guided("mean", everywhere=False), x, **{**SMALL, "num_simulations": 2000})
    wrong = x[:, 0] > 0
    assert found.statistic[wrong].mean() > 2 * found.statistic[~wrong].mean()
    assert bool(wrong[found.worst(10)].all())


def test_another_classifier():
    found = pv.local_c2st(
        Guided("scale"), data(), **SMALL, classifier=HistGradientBoostingClassifier(max_iter=5)
    )
    assert found.overall_p_value == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["conditional", "multilevel"])
def test_other_pairs(name):
    pair, batch = make(name), rows(name, 6)
    small = {**SMALL, "num_simulations": 100, "num_draws": 4}
    found, again = (pv.local_c2st(pair, *batch, **small) for _ in range(2))
    assert found.null.shape == (19, 6)
    assert torch.equal(found.statistic, again.statistic)


def test_rows_of_another_shape_than_the_model_draws():
    """Groups that are larger than those of the template."""
    pair = pv.MultilevelVAE.mlp((1,), latent_dim=1, group_dim=1, hidden=(4,), members=2)
    with pytest.raises(pv.UsageError, match=r"shape \(2, 1\), as those .*, got \(3, 1\)"):
        pv.local_c2st(pair, torch.zeros(2, 3, 1), num_simulations=100, num_draws=2, num_null=19)


def test_misuse_and_record():
    with pytest.raises(pv.UsageError, match="num_null must be at least 19, got 5"):
        pv.local_c2st(Guided(), data(), num_null=5)
    with pytest.raises(pv.UsageError, match="num_simulations must be at least 100, got 5"):
        pv.local_c2st(Guided(), data(), num_simulations=5)
    with pytest.raises(pv.UsageError, match="needs a pair without global latents"):
        pv.local_c2st(pv.BayesianDecoder(make("bernoulli")), *rows("bernoulli", 4), progress=False)
    found = pv.local_c2st(Guided("scale"), data(), **SMALL)
    record = json.loads(json.dumps(found.as_dict()))
    assert record["p_value"] == pytest.approx(0.05)
    assert record["rows_with_p_at_most_0.05"] == int((found.p_values <= 0.05).sum())
    assert "p-value               0.050" in str(found)

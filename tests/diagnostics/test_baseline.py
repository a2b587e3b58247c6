"""The baselines beside a pair, against scikit-learn and by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import pyro_vae as pv
from pyro_vae.cli.baseline import in_words
from pyro_vae.cli.make_parts import with_likelihood
from pyro_vae.cli.options import Model
from pyro_vae.diagnostics.baseline import (
    Baseline,
    independent_bits,
    of_table,
    ppca,
)
from pyro_vae.training.history import Epoch, History
from pyro_vae.training.validation import Bound

ROWS = np.random.default_rng(0).normal(size=(200, 3)) @ np.random.default_rng(1).normal(size=(3, 5))
ROWS = ROWS * [1, 10, 0.1, 3, 1000] + np.random.default_rng(2).normal(size=(200, 5))
TRAIN, HELD = torch.from_numpy(ROWS[:150]), torch.from_numpy(ROWS[150:])


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_probabilistic_pca_is_that_of_scikit_learn_in_standard_units(dim):
    center, spread = TRAIN.mean(0), TRAIN.std(0, correction=0)
    found = PCA(dim).fit(((TRAIN - center) / spread).numpy())
    # scikit-learn divides the covariance by n - 1, and the maximum likelihood by n.
    found.explained_variance_ *= 149 / 150
    found.noise_variance_ *= 149 / 150
    wanted = found.score(((HELD - center) / spread).numpy()) - spread.log().sum().item()
    assert ppca(TRAIN, HELD, dim) == pytest.approx(wanted, abs=1e-9)


def test_all_latents_give_the_gaussian_with_full_covariance():
    normal = torch.distributions.MultivariateNormal(TRAIN.mean(0), TRAIN.T.cov(correction=0))
    assert ppca(TRAIN, HELD, 50) == pytest.approx(normal.log_prob(HELD).mean().item(), abs=1e-9)


def test_columns_that_determine_each_other_have_no_baseline():
    twice = torch.cat([TRAIN, TRAIN[:, :1]], 1)
    assert ppca(twice, twice, 5) is None
    assert ppca(torch.ones(9, 2), torch.ones(9, 2), 1) is None


def test_independent_pixels_average_over_binarizations():
    gray = torch.tensor([[0.25, 1.0], [0.75, 1.0]])
    share = torch.tensor([2 / 4, 3 / 4])
    each = torch.cartesian_prod(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])).double()
    logs = torch.distributions.Bernoulli(share.double()).log_prob(each).sum(1)
    weights = torch.stack(
        [torch.distributions.Bernoulli(g.double()).log_prob(each).sum(1).exp() for g in gray]
    )
    assert independent_bits(gray, gray) == pytest.approx((weights @ logs).mean().item())


def test_a_mixed_table_is_pca_and_shares():
    words = ["a" if row < 60 else "b" for row in range(100)]
    columns = {f"c{j}": ROWS[:100, j].tolist() for j in (0, 3)} | {"word": words}
    data = pv.read_table(columns).split()
    found = of_table(data.schema, data.train.x, data.test.x, 1)
    numbers = [j for j, column in enumerate(data.schema.data) if not column.coded]
    code = next(j for j, column in enumerate(data.schema.data) if column.coded)
    ones, n = int(data.train.x[:, code].sum()), len(data.train.x)
    shares = torch.tensor([n - ones + 1, ones + 1]).double() / (n + 2)
    wanted = ppca(data.train.x[:, numbers], data.test.x[:, numbers], 1)
    wanted += shares.log()[data.test.x[:, code].long()].mean().item()
    assert found.log_likelihood == pytest.approx(wanted)
    assert found.name == "probabilistic PCA and shares of categories"


def test_a_worse_pair_is_said():
    found = Baseline("probabilistic PCA", -3.0)
    assert in_words(found, -2.0) == "-3.000, probabilistic PCA"
    assert "better than the pair by 1.500 nats" in in_words(found, -4.5)


ARRAYS = {
    "gaussian": torch.tensor([[0.5, -1.0], [3.0, 2.0]]),
    "negative-binomial": torch.tensor([[0, 7], [3, 2]]),
    "bernoulli": torch.tensor([[0.0, 0.3], [1.0, 0.5]]),
    "discretized-logistic": torch.full((2, 3, 2, 2), 9, dtype=torch.uint8),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_the_default_likelihood_fits_the_kind_of_data(kind):
    x = ARRAYS[kind]
    data = SimpleNamespace(
        train=SimpleNamespace(x=x, members=None), shape=x.shape[1:], schema=None, vocabulary=None
    )
    assert with_likelihood(Model(), data).likelihood == kind


def history(bounds):
    epochs = [
        Epoch(i, b, b, b, {"z": 0.0}, Bound(b, b, b, {"z": 0.0}), 1.0, 1e-3, 1.0, 1.0)
        for i, b in enumerate(bounds, 1)
    ]
    return History(tuple(epochs), len(epochs), False)


def test_a_bound_that_still_rises_is_said():
    noise = np.random.default_rng(0).normal(size=100) * 0.05
    rising, flat = np.arange(100) * 0.02 + noise, noise
    wanted = rising[-10:].mean() - rising[-20:-10].mean()
    assert history(rising).improving == pytest.approx(wanted)
    assert history(flat).improving is None
    assert history([1.0]).improving is None


def test_a_predicted_scale_starts_where_it_is_told():
    raw = torch.zeros(1, 4)
    fn = pv.Gaussian(start=0.25)(raw, (2,))
    torch.testing.assert_close(fn.stddev, torch.full((1, 2), 0.25))
    torch.testing.assert_close(pv.Gaussian()(raw, (2,)).stddev, torch.ones(1, 2))

"""Means and deviations of normal scores of ranks: the bias and the scale of a guide."""

import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from scipy.stats import binom, norm

import pyro_vae as pv
from pyro_vae.diagnostics.calibration import Calibration

WEIGHT = torch.tensor([[1.0, 0.2], [0.8, 1.1], [0.1, 1.0]]).double()


class Guided(LinearGaussian):
    """A guide whose mean and scale are off by known amounts, in posterior standard deviations."""

    def __init__(self, shift, scale):
        super().__init__(WEIGHT, 0.6)
        self.shift, self.scale = shift, scale

    def guide(self, x):
        loc, covariance = self.posterior(x)
        loc = loc + self.shift * covariance.diagonal().sqrt()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, self.scale**2 * covariance))


def expected(shift, scale, draws):
    """The exact mean and deviation of the scores: ranks are binomial given the true value."""
    truth = np.linspace(-8, 8, 4001)
    weights = norm.pdf(truth) / norm.pdf(truth).sum()
    ranks = np.arange(draws + 1)
    chance = weights @ binom.pmf(ranks, draws, norm.cdf((truth[:, None] - shift) / scale))
    scores = norm.ppf((ranks + 0.5) / (draws + 1))
    mean = chance @ scores
    return mean, ((chance @ (scores - mean) ** 2) / (scores**2).mean()) ** 0.5


@pytest.mark.parametrize(
    ("shift", "scale", "mean", "deviation"),
    [
        (0.0, 1.0, 0.0, 1.0),
        (0.2, 1.0, -0.2, 1.0),
        (-0.35, 1.0, 0.35, 1.0),
        (0.0, 0.6, 0.0, 1.48),
        (0.0, 1.5, 0.0, 0.68),
    ],
)
def test_a_biased_or_scaled_guide_has_its_effect_sizes(shift, scale, mean, deviation):
    exact = expected(shift, scale, 99)
    assert exact == pytest.approx((mean, deviation), abs=0.015)
    found = pv.calibration(Guided(shift, scale), num_simulations=2000, progress=False)
    for unit in (0, 1):
        wide = 4 * deviation  # scores of another scale have another error
        off = found.score_means[unit] - exact[0]
        assert abs(off) < wide * found.score_mean_errors[unit]
        off = found.score_deviations[unit] - exact[1]
        assert abs(off) < wide * found.score_deviation_errors[unit]


@pytest.mark.parametrize(("draws", "n"), [(19, 100), (99, 2000)])
def test_the_errors_are_those_of_uniform_ranks(draws, n):
    ranks = torch.randint(draws + 1, (n, 800), generator=torch.Generator().manual_seed(0))
    found = Calibration(("q",) * 800, ranks, draws, 0.05, {})
    for values, errors, mean in (
        (found.score_means, found.score_mean_errors, 0.0),
        (found.score_deviations, found.score_deviation_errors, 1.0),
    ):
        assert values.mean().item() == pytest.approx(
            mean, abs=float(errors[0]) * 4 / 800**0.5 + 1 / n
        )
        assert (values.std() / errors[0]).item() == pytest.approx(1, abs=4 / 1600**0.5)


def test_scores_by_hand_leave_masked_ranks_out():
    ranks = torch.tensor([[0, 19, 10, 9], [-1, 9, 10, -1]]).T
    found = Calibration(("a", "b"), ranks, 19, 0.05, {})
    ends, middle = norm.ppf(19.5 / 20), norm.ppf(10.5 / 20)
    assert found.score_means.tolist() == pytest.approx([0, 0], abs=1e-12)
    uniform = norm.ppf((np.arange(20) + 0.5) / 20).std()
    wanted = [(2 * (ends**2 + middle**2) / 3) ** 0.5, (2 * middle**2) ** 0.5]
    assert found.score_deviations.tolist() == pytest.approx([v / uniform for v in wanted])
    assert found.score_mean_errors.tolist() == pytest.approx([uniform / 2, uniform / 2**0.5])


def test_the_table_and_the_record_have_the_effect_sizes():
    """The bias in the table is that of the guide: positive if its mean is too high."""
    found = pv.calibration(Guided(0.5, 1.0), num_simulations=2000, progress=False)
    row = next(line for line in str(found).splitlines() if line.startswith("z[0]"))
    bias, scale = map(float, row.split("%")[4].split()[:2])
    assert bias == pytest.approx(0.5, abs=0.1)
    assert scale == pytest.approx(1.0, abs=0.07)
    record = json.loads(json.dumps(found.as_dict()))
    assert record["score_means"]["z[1]"] == found.score_means[1].item()
    assert record["score_deviation_errors"]["z[1]"] == found.score_deviation_errors[1].item()

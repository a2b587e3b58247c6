"""Scores and imputations of pairs whose guide enumerates a discrete latent."""

from math import log

import pytest
import torch
from imputation_helpers import Enumerated
from pairs import ENUMERATED, make, rows
from torch.distributions import Normal

import pyro_vae as pv


@pytest.mark.parametrize("name", ENUMERATED)
def test_scores_are_the_log_likelihood(name):
    pair, batch = make(name), rows(name, 3)
    found = pv.score(pair, *batch, num_samples=4000)
    want = pv.log_likelihood(pair, *batch, num_samples=4000)
    off = (found.log_likelihood - want.per_datum).abs()
    steady = (found.pareto_k <= 0.7) & (want.pareto_k <= 0.7)
    assert bool((off < torch.where(steady, 0.35, 0.8)).all())


def test_an_imputation_weighs_the_classes():
    """The class has another probability in the guide (0.4) than in the posterior (0.27)."""
    x = torch.tensor([[torch.nan, 0.2]])
    found = pv.impute(Enumerated(), x, draws=1, num_samples=8000)
    means = torch.tensor([0.0, 1.0])
    joint = torch.tensor([log(0.7), log(0.3)]) + Normal(means, 2**0.5).log_prob(torch.tensor(0.2))
    want = (joint.softmax(0) * (means + 0.5 * (0.2 - means))).sum()
    assert float(found.mean[0, 0]) == pytest.approx(float(want), abs=0.04)

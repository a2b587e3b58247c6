"""Weights of rows: a scale of all sites of a row weighs its bound, and no reported number."""

import pyro
import pytest
import torch
from objectives_helpers import around, assert_same, linear, run
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv


@pytest.mark.parametrize("objective", [Trace_ELBO(), pv.ImportanceWeightedELBO(4)])
def test_the_loss_is_linear_in_the_weights(objective):
    pair, x = linear()

    def loss(weight):
        return run(around(pyro.poutine.scale(scale=weight), pair), x, objective)

    ones, weight = x.new_ones(len(x)), torch.linspace(0.2, 3.0, len(x), dtype=x.dtype)
    equal = loss(ones)
    assert_same(equal, run(pair, x, objective), pair)
    rows = [loss(ones + unit) - equal for unit in torch.eye(len(x), dtype=x.dtype)]
    total = sum((w - 1) * row for w, row in zip(weight, rows, strict=True))
    assert_same(loss(weight), equal + total, pair)


class Weighted(nn.Module):
    """The pair of the section 'Survey weights' of the documentation."""

    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def model(self, x, weight):
        with pyro.poutine.scale(scale=weight):
            self.pair.model(x)

    def guide(self, x, weight):
        with pyro.poutine.scale(scale=weight):
            self.pair.guide(x)


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_fit_finds_the_weighted_mean_and_reports_rows_without_weights(engine):
    pair, x = linear(200)
    pair.make_exact()  # so the samples below have no error
    weight = torch.where(x[:, 0] > pair.bias[0], 3.0, 0.5).to(x.dtype)
    weighted = Weighted(pair)
    found = pv.log_likelihood(weighted, x, weight, num_samples=20)
    torch.testing.assert_close(found.per_datum, pair.log_likelihood(x).detach())
    torch.testing.assert_close(found.elbo_per_datum, pair.log_likelihood(x).detach())
    pv.fit(
        weighted,
        x,
        weight,
        epochs=300,
        batch_size=200,
        learning_rate=0.05,
        learning_rate_schedule=pv.CosineSchedule(300),
        engine=engine,
        progress=False,
    )
    mean = (weight[:, None] * x).sum(0) / weight.sum()
    assert (mean - x.mean(0))[0] > 0.4
    torch.testing.assert_close(pair.bias.detach(), mean, atol=0.05, rtol=0)

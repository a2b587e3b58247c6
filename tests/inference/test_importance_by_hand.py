"""Estimates and errors of log p(x) from log weights that are written by hand."""

from math import exp, log

import pytest
import torch

from pyro_vae.inference import datum_weights
from pyro_vae.inference.datum_weights import _shapes
from pyro_vae.inference.importance import LogLikelihood, _error_of_mean

LOGS = torch.tensor([[0.0, -3.0], [1.0, -1.0], [-2.0, -1.5], [0.5, 0.0], [3.0, -9.0]]).double()


def weighed(logs, chunk):
    """What is made of these log weights (draws, n), given in chunks of draws."""
    start = 0

    def sums(draws, x):
        nonlocal start
        some = logs[start : start + len(draws)]
        start += len(draws)
        return {
            "log weights": some,
            "weights": some.logsumexp(0),
            "squares": (2 * some).logsumexp(0),
            "logs": some.sum(0),
            "squared logs": some.square().sum(0),
        }

    return datum_weights.weighed(sums, (torch.zeros(logs.shape[1], 1).double(),), len(logs), chunk)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_estimates_and_errors_by_hand(chunk):
    value, errors, sizes, elbo, elbo_errors, shapes, infinite = weighed(LOGS, chunk)
    w, k = LOGS.exp(), len(LOGS)
    torch.testing.assert_close(value, w.mean(0).log())
    torch.testing.assert_close(errors, w.std(0) / w.mean(0) / k**0.5)
    torch.testing.assert_close(sizes, w.sum(0).square() / w.square().sum(0))
    torch.testing.assert_close(elbo, LOGS.mean(0))
    torch.testing.assert_close(elbo_errors, LOGS.std(0) / k**0.5)
    assert shapes.isnan().all()  # five weights have no tail
    assert infinite.tolist() == [0, 0]


def test_two_draws_have_an_error_and_one_has_none():
    value, errors, sizes, elbo, elbo_errors, *_ = weighed(LOGS[:2, :1], 2)
    assert value.item() == pytest.approx(log((1 + exp(1)) / 2))
    assert elbo.item() == 0.5
    assert elbo_errors.item() == pytest.approx(0.5)  # sd of 0 and 1 is 1/sqrt 2
    value, errors, sizes, elbo, elbo_errors, *_ = weighed(LOGS[1:2, :1], 1)
    assert value.item() == elbo.item() == 1.0
    assert sizes.item() == pytest.approx(1.0)
    assert errors.isnan().all()
    assert elbo_errors.isnan().all()


def test_infinite_weights_of_each_datum_are_counted():
    logs = torch.tensor([[torch.inf, 0.0, torch.nan], [torch.inf, 0.0, -torch.inf]]).double()
    assert weighed(logs, 1)[-1].tolist() == [2, 0, 1]


def test_the_error_of_a_mean_of_shared_and_of_own_draws():
    errors = torch.tensor([0.3, 0.4]).double()
    assert _error_of_mean(errors, shared=False) == pytest.approx(0.25)
    assert _error_of_mean(errors, shared=True) == pytest.approx(0.35)


def test_weights_that_differ_by_rounding_alone_have_no_tail():
    """A hundred roundings of the greatest weight, or of 1 where that is smaller."""
    large, small = [500.0] * 4 + [499.0] * 5, [0.1] * 4 + [0.05] * 5  # too few for a shape
    greatest = torch.tensor([large, small, large, small]).double()
    rounding = 1e-3
    least = greatest[:, 0] - torch.tensor([49.0, 0.09, 51.0, 0.11]).double()
    found = _shapes(greatest, least, rounding)
    assert found.tolist() == [0.0, 0.0, torch.inf, torch.inf]


def test_fractions_are_of_data_over_each_limit():
    blank = torch.zeros(4).double()
    k = torch.tensor([0.7, 0.71, 1.0, 1.01]).double()
    sizes = torch.tensor([10.0, 20.0, 30.0, 40.0]).double()
    found = LogLikelihood(0, 0, 100, blank, blank, sizes, 0, 0, blank, blank, k, blank.long())
    record = found.as_dict()
    assert record["k_threshold"] == pytest.approx(0.5)  # 1 - 1 / log10(100)
    assert record["fraction_k_over_threshold"] == 1.0
    assert record["fraction_k_over_0.7"] == 0.75
    assert record["fraction_k_over_1"] == 0.25
    assert record["median_relative_sample_size"] == pytest.approx(0.2)
    assert record["num_examples"] == 4

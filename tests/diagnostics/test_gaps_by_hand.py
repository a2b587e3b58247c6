"""Gaps and their errors from log weights that are written by hand."""

import pytest
import torch
from pairs import make, rows

import pyro_vae as pv
from pyro_vae.diagnostics.gaps import PerDatum, _minus, _quantiles, _share, _split
from pyro_vae.inference.importance import all_log_weights
from pyro_vae.pairs.scope import using

NORMAL = torch.randn(2, 30, 2, generator=torch.Generator().manual_seed(0)).double()
BEFORE, AFTER = NORMAL[0] - 2, 0.3 * NORMAL[1]
"""Log weights (draws, n) of the guide and of the refined one."""


def error(shares):
    return shares.std(0) / 30**0.5


def test_gaps_by_hand():
    """log p(x) is from the refined draws of the first datum, and from those of the second's guide;
    errors are those of the differences, draw by draw."""
    chosen = torch.tensor([True, False])
    found = _split(BEFORE, AFTER, chosen, torch.float64)
    weights = torch.stack([AFTER[:, 0], BEFORE[:, 1]], 1)
    log_p = weights.exp().mean(0).log()
    share = weights.exp() / weights.exp().mean(0)
    wanted = [
        (log_p, share),
        (AFTER.mean(0), AFTER),
        (BEFORE.mean(0), BEFORE),
        (log_p - AFTER.mean(0), share - AFTER),
        (AFTER.mean(0) - BEFORE.mean(0), AFTER - BEFORE),
        (log_p - BEFORE.mean(0), share - BEFORE),
    ]
    for part, (value, shares) in zip(found, wanted, strict=False):  # the last part is Pareto k
        torch.testing.assert_close(part.per_datum, value)
        torch.testing.assert_close(part.standard_errors, error(shares))
    both = found.approximation.per_datum + found.amortization.per_datum
    torch.testing.assert_close(both, found.inference.per_datum)


def test_errors_of_independent_numbers_add_in_squares():
    a = PerDatum(torch.tensor([1.0, 2.0]), torch.tensor([0.3, 0.0]))
    b = PerDatum(torch.tensor([5.0, -2.0]), torch.tensor([0.4, 0.2]))
    found = _minus(a, b)
    assert found.per_datum.tolist() == [-4.0, 4.0]
    assert found.standard_errors.tolist() == pytest.approx([0.5, 0.2])


def test_quantiles_are_of_finite_data():
    values = torch.tensor([torch.inf, *range(21), torch.nan]).double()
    assert _quantiles(values) == pytest.approx((10.0, 19.0))
    assert _quantiles(torch.tensor([3.0])) == (3.0, 3.0)
    assert all(value != value for value in _quantiles(torch.tensor([torch.inf])))


def test_a_share_of_what_is_not_known_is_not_known():
    k = torch.tensor([0.8, torch.nan, 0.1, 0.9])
    assert _share(k > 0.7, k) == 0.5
    nothing = torch.full((3,), torch.nan)
    assert _share(nothing > 0.7, nothing) != _share(nothing > 0.7, nothing)


@pytest.mark.parametrize("name", ["conditional", "semi-supervised"])
def test_the_guide_is_weighed_given_its_context(name):
    pair, batch = make(name), rows(name, 5)
    numbers = {"steps": 2, "num_samples": 30, "engine": "eager", "progress": False}
    found = pv.gaps(pair, *batch, **numbers, seed=3)
    with using(pair, 4):
        weights = all_log_weights(pair, batch, 30)
    torch.testing.assert_close(found.amortized.per_datum, weights.mean(0).detach())


def test_both_guides_are_weighed_at_the_same_draws():
    """A refined guide that did not move has the bound of the guide, without an error."""
    pair, batch = make("bernoulli"), rows("bernoulli", 5)
    numbers = {"steps": 1, "learning_rate": 1e-12, "num_samples": 30, "engine": "eager"}
    found = pv.gaps(pair, *batch, **numbers, progress=False)
    assert found.amortization.per_datum.abs().max() < 1e-8
    assert found.amortization.standard_errors.max() < 1e-8
    assert found.amortized.standard_errors.min() > 1e-3

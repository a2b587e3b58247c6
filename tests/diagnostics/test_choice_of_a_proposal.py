"""Whether log p(x) of a datum uses draws of its refined q: at both sides of each limit."""

from math import nan

import pytest
import torch
from verdict_helpers import weights

from pyro_vae.diagnostics.gaps import CLEAR, _proposal_is_refined

ONE = torch.ones(1).double()
LIMIT = weights(n=1).k_threshold


def is_refined(gain, size=500.0, errors=(0.3, 0.4), k_before=0.0, k_after=0.0):
    """One row: refinement raises its bound by ``gain``; the sample sizes are 500 and ``size``."""
    before = weights(error=errors[0], value=-10.0, n=1)._replace(pareto_k=k_before * ONE)
    after = weights(error=errors[1], value=gain - 10.0, n=1)
    after = after._replace(pareto_k=k_after * ONE, effective_sample_size=size * ONE)
    return _proposal_is_refined(before, after).item()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_clear_difference_decides_and_else_the_sample_size(sign):
    """The error of the difference is 0.5. The larger sample size is on the other side."""
    size = 500 - 100 * sign
    assert is_refined(sign * (CLEAR * 0.5 + 0.01), size) == (sign > 0)
    assert is_refined(sign * (CLEAR * 0.5 - 0.01), size) == (sign < 0)


@pytest.mark.parametrize("gain", [0.6, 5.0])
def test_a_clear_gain_counts_if_the_weights_of_the_higher_bound_are_reliable(gain):
    few = {"size": 100.0, "errors": (0.1, 0.1)}
    assert is_refined(gain, k_after=LIMIT, **few)
    assert not is_refined(gain, k_after=LIMIT + 0.01, **few)
    assert is_refined(gain, k_before=LIMIT + 0.01, **few)
    many = {"size": 900.0, "errors": (0.1, 0.1)}
    assert not is_refined(-gain, k_before=LIMIT, **many)
    assert is_refined(-gain, k_before=LIMIT + 0.01, **many)
    assert not is_refined(-gain, k_after=LIMIT + 0.01, **many)


def test_equal_bounds_and_sample_sizes_are_refined_and_nan_is_not():
    assert is_refined(0.0)
    assert is_refined(0.0, errors=(0.0, 0.0))
    assert not is_refined(0.0, size=499.0)
    assert not is_refined(nan, size=nan)
    assert is_refined(0.1, size=100.0, errors=(nan, nan))

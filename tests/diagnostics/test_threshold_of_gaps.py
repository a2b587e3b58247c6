"""Gaps call log p(x) unreliable by the Pareto k that its number of draws allows."""

import json
from typing import NamedTuple

import pytest
import torch
from exact import Spoiled
from torch import Tensor

import pyro_vae as pv
from pyro_vae.inference.pareto import threshold
from pyro_vae.pairs.rng import seeded


class Given(NamedTuple):
    """A bound of log p(x) from elsewhere."""

    per_datum: Tensor
    standard_errors: Tensor
    pareto_k: Tensor
    num_samples: int


@pytest.mark.parametrize(("num_samples", "limit"), [(100, 0.5), (1000, 2 / 3), (10_000, 0.7)])
def test_the_limit_is_that_of_the_number_of_draws(num_samples, limit):
    pair = Spoiled("diagonal")
    with seeded(0):
        x = pair.marginal().sample((3,)).detach()
    k = torch.tensor([limit - 0.01, limit + 0.01, 2.0]).double()
    bound = Given(
        pair.marginal().log_prob(x).detach(), torch.full((3,), 0.1).double(), k, num_samples
    )
    options = {"steps": 1, "num_samples": 30, "engine": "eager", "progress": False}
    found = pv.gaps(pair, x, log_likelihood=bound, **options)
    assert found.k_threshold == pytest.approx(limit) == threshold(num_samples)
    assert found.unreliable.tolist() == [False, True, True]
    record = json.loads(json.dumps(found.as_dict()))
    assert record["fraction_k_over_threshold"] == pytest.approx(2 / 3)
    over = (k > 0.7).double().mean().item()
    assert record["fraction_k_over_0.7"] == pytest.approx(over)  # read from metrics of 0.1.0
    assert f"unreliable (Pareto k over {limit:.2f}) for 2" in str(found)
    own = pv.gaps(pair, x, **options)
    assert own.k_threshold == threshold(30)
    assert torch.equal(own.unreliable, own.pareto_k > threshold(30))


def test_the_tail_of_constant_weights_has_no_effect():
    """The weights of an exact guide differ by rounding, with any Pareto k."""
    pair = Spoiled("full")
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double()
    found = pv.gaps(pair, x, steps=1, num_samples=100, engine="eager", progress=False)
    assert not found._replace(pareto_k=torch.full((40,), 0.9)).unreliable.any()
    infinite = found._replace(pareto_k=torch.full((40,), torch.inf))
    assert infinite.unreliable.all()


def test_weights_that_differ_by_rounding_have_a_shape_of_zero():
    """Ties of an exact guide leave few weights above the rest, which would give an infinite k."""
    pair = Spoiled("full")
    with seeded(0):
        x = pair.marginal().sample((60,)).detach()
    found = pv.gaps(pair, x, steps=1, num_samples=100, engine="eager", progress=False)
    assert not found.pareto_k.any()
    assert not found.unreliable.any()

"""sample and decode of pairs with group latents: which groups, and guides that need rows."""

import numpy as np
import pytest
import torch
from global_pairs import Amortized, Nested, data

import pyro_vae as pv


@pytest.fixture(scope="module")
def pair():
    x, g = data()
    return Nested().set(x, g)


def test_draws_are_those_of_the_exact_predictive_distribution(pair):
    """x of a new row of group g has the mean of u_g and its variance + 1 + noise^2."""
    x, g = data()
    mean, covariance, _ = pair.exact(x, g)
    group = torch.arange(20000) % 2
    drawn = pv.sample(pair, 20000, group, seed=0)[:, 0]
    for k in (0, 1):
        own, variance = drawn[group == k], covariance[k + 1, k + 1] + 1 + 1.5**2
        error = (covariance[k + 1, k + 1] / 100 + variance / 10000).sqrt().item()
        assert own.mean().item() == pytest.approx(mean[k + 1].item(), abs=4 * error)
        assert own.var().item() == pytest.approx(variance.item(), rel=0.06)


def test_means_have_no_noise(pair):
    means = pv.decode(pair, {"u": torch.tensor([3.0, -3.0]), "z": torch.ones(4)}, torch.tensor([1]))
    assert means.flatten().tolist() == [1.0] * 4


TOOLS = {
    "sample": lambda pair, group: pv.sample(pair, 3, group, seed=0),
    "decode": lambda pair, group: pv.decode(pair, {"z": torch.zeros(3)}, group),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", ["int32", "uint8", "float32", "int64"])
def test_numbers_of_groups_may_have_any_type(pair, tool, kind):
    expected = TOOLS[tool](pair, torch.tensor([1, 0, 1]))
    assert torch.equal(TOOLS[tool](pair, np.array([1, 0, 1], kind)), expected)


BAD = {
    "negative": (torch.tensor([0, -1, 1]), "context 1 numbers one of 2 groups, from 0, and holds"),
    "fraction": (torch.tensor([0.0, 1.5, 1.0]), r"must be of torch.int64, .* got 1.5 in row 1"),
    "new": (torch.tensor([0, 1, 2]), "index 2 is out of bounds"),
    "number": (1, "context must have a row for each datum, got the number 1"),
    "None": (None, "context must be an array of numbers"),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", BAD)
def test_bad_groups_are_one_line(pair, tool, kind):
    group, words = BAD[kind]
    with pytest.raises(pv.UsageError, match=words) as caught:
        TOOLS[tool](pair, group)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_guide_that_needs_rows_is_refused(tool):
    """The rows of the template are zeros. The guide would compute w and u from them."""
    with pytest.raises(pv.UsageError, match="computes 'w', 'u' from the rows"):
        TOOLS[tool](Amortized(), torch.tensor([0, 1, 1]))


def test_a_draw_of_posterior_can_be_decoded():
    x, g = data()
    drawn = pv.posterior(Amortized(), x, g, draws=1, progress=False)
    given = {"w": drawn["w"][0], "u": drawn["u"][0]}
    made = pv.decode(Amortized(), given, torch.arange(4000) % 2, means=False)
    assert made[::2].mean().item() == pytest.approx(given["u"][0].item(), abs=0.2)

"""The schedule, the bounds from weights, and the sizes of annealing, worked by hand."""

from math import exp, log

import pytest
import torch
from exact import linear_gaussian

import pyro_vae as pv
from pyro_vae.inference.annealing import Sandwich, _bound, _joined
from pyro_vae.inference.annealing_path import AnnealingSettings, _schedule
from pyro_vae.pairs.rng import seeded


@pytest.mark.parametrize("number", [1, 2, 5, 40])
def test_the_schedule_is_a_sigmoid_from_0_to_1(number):
    """Of 4 times -1 to 1, moved and stretched."""
    found = _schedule(number)

    def sigmoid(t):
        return 1 / (1 + exp(-4 * (2 * t / number - 1)))

    wanted = [(sigmoid(t) - sigmoid(0)) / (sigmoid(number) - sigmoid(0)) for t in range(number + 1)]
    assert found == pytest.approx(wanted)
    assert found[0] == 0
    assert found[-1] == 1


def test_transitions_are_those_of_the_pilot_and_of_one_run():
    """20 to warm up, one for each temperature up to 50, and one between two temperatures."""
    assert AnnealingSettings(10, 4, 5).pilot == 10
    assert AnnealingSettings(10, 4, 5).transitions == 20 + 10 + 9
    assert AnnealingSettings(80, 4, 5).pilot == 50
    assert AnnealingSettings(80, 4, 5).transitions == 20 + 50 + 79


WEIGHTS = torch.tensor([[1.0, 2.0], [3.0, 2.0]]).double()
SETTINGS = AnnealingSettings(7, 2, 5)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_bound_is_the_logarithm_of_the_mean_weight(sign):
    bound, errors, sizes, acceptance, infinite = _bound(WEIGHTS.log(), torch.ones(2), sign)
    assert bound.tolist() == pytest.approx([sign * log(2)] * 2)
    # sd / (mean sqrt K) of 1 and 3, and (sum w)^2 / sum w^2.
    assert errors.tolist() == pytest.approx([2**0.5 / (2 * 2**0.5), 0.0], abs=1e-7)
    assert sizes.tolist() == pytest.approx([16 / 10, 2.0])
    assert acceptance.tolist() == [1, 1]
    assert infinite.tolist() == [0, 0]


def test_infinite_and_undefined_weights_are_counted():
    logs = torch.tensor([[0.0, torch.inf, torch.nan], [0.0, torch.inf, -torch.inf]]).double()
    assert _bound(logs, torch.ones(3))[4].tolist() == [0, 2, 1]


def test_parts_are_joined_to_the_mean_and_its_error():
    """The error of a mean of n independent numbers: the root of the sum of squares, over n."""
    parts = [
        _bound(WEIGHTS.log(), torch.tensor([0.5, 0.7])),
        _bound(3 * WEIGHTS[:, :1].log(), torch.ones(1)),
    ]
    found = _joined(parts, SETTINGS)
    each = [log(2), log(2), log(14)]
    assert found.value == pytest.approx(sum(each) / 3)
    assert found.per_datum.tolist() == pytest.approx(each)
    errors = found.standard_errors.tolist()
    assert errors[2] == pytest.approx(26 / 28)
    assert found.standard_error == pytest.approx(sum(e**2 for e in errors) ** 0.5 / 3)
    assert (found.num_chains, found.num_temperatures, found.leapfrog_steps) == (2, 7, 5)
    record = found.as_dict()
    assert record["acceptance"] == pytest.approx(2.2 / 3)
    assert record["least_acceptance"] == 0.5
    assert record["median_effective_sample_size"] == pytest.approx(1.6)


def test_the_gap_of_a_sandwich_and_its_error():
    def of(*bounds):
        logs = torch.tensor(bounds).double().expand(2, -1)
        return _joined([_bound(logs, torch.ones(len(bounds)))], SETTINGS)

    both = Sandwich(of(-3.0, -1.0, -2.0), of(-1.0, -1.0, -1.0), (torch.zeros(3, 1),))
    assert both.gap == pytest.approx(1.0)
    assert both.gap_standard_error == pytest.approx(1 / 3**0.5)  # sd of 2, 0 and 1 is 1


def test_steps_are_adapted_until_seven_of_ten_are_accepted():
    """With an exact guide, whose path stays where it is; the first steps are a quarter as long."""
    pair = linear_gaussian(spread=1.0)
    with seeded(0):
        x = pair.marginal().sample((10,))
    numbers = {"num_temperatures": 30, "num_chains": 16, "engine": "eager", "progress": False}
    found = pv.anneal(pair, x, **numbers)
    assert found.acceptance.mean().item() == pytest.approx(0.7, abs=0.04)

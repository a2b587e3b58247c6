"""Moments of chains against those of the guide, by hand, for a posterior whose scale is not 1."""

from copy import copy

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pyro_vae.inference.chain_measures import r_hat_limit
from pyro_vae.inference.chains import ENOUGH_DRAWS, compared, rank_r_hat
from pyro_vae.inference.chains import _effective as effective

SCALE = 3.0


@pytest.fixture(scope="module")
def found():
    """A posterior N(1, 9), and a guide N(4, 36), of one unit."""
    generator = torch.Generator().manual_seed(0)
    z = 1 + SCALE * torch.randn(4, 500, 1, 1, generator=generator).double()
    q = 4 + 2 * SCALE * torch.randn(2000, 1, 1, generator=generator).double()
    return compared({"z": z}, {"z": q}, torch.zeros(1))


def test_shift_and_ratio_are_in_posterior_standard_deviations(found):
    assert found.shift.item() == pytest.approx(1.0, abs=0.2)
    assert found.scale_ratio.item() == pytest.approx(2.0, abs=0.15)


def test_the_disagreement_is_the_kl_of_normals_with_these_moments(found):
    p, q = (Normal(m.mean, m.standard_deviation) for m in (found.moments, found.guide_moments))
    assert found.disagreement.item() == pytest.approx(kl_divergence(q, p).item())


def test_the_error_of_a_mean(found):
    size = found.effective_sample_size.item()
    assert size == pytest.approx(2000, rel=0.25)
    spread = found.moments.standard_deviation.item()
    assert found.mean_standard_error.item() == pytest.approx(spread / size**0.5)


@pytest.mark.parametrize("size", [ENOUGH_DRAWS - 1, ENOUGH_DRAWS, ENOUGH_DRAWS + 1])
def test_how_many_draws_are_too_few(found, size):
    sizes = torch.full_like(found.bulk_effective_sample_size, size)
    some = copy(found)
    vars(some).update(bulk_effective_sample_size=sizes, tail_effective_sample_size=sizes)
    assert bool(some.too_few_draws.all()) == (size < ENOUGH_DRAWS)


@pytest.fixture(scope="module")
def three():
    """Three units: equal chains around 50, chains of two scales around 0, and one that rests."""
    z = torch.randn(4, 500, 1, 3, generator=torch.Generator().manual_seed(1)).double()
    z[..., 0] += 50
    z[:2, ..., 1] *= 3
    z[..., 2] = 0
    return compared({"z": z}, {"z": z.flatten(0, 1)}, torch.zeros(1))


def test_chains_of_two_scales_disagree_although_their_means_agree(three):
    location, scales, _ = three.r_hat[0].tolist()
    assert location < 1.01
    # Ranks of distances from the median: means of 0.6 and -0.6, about, in scores of variance 0.7.
    assert 1.1 < scales < 1.6
    assert not three.agrees.item()


@pytest.mark.parametrize("moving", [2, 1, 0])
def test_the_limit_of_r_hat_is_that_of_two_tests_of_each_unit_that_moves(moving):
    """Short chains have a limit above 1.01. A unit that rests has no limit of its own."""
    z = torch.randn(4, 40, 2, 3, generator=torch.Generator().manual_seed(1)).double()
    z[..., moving:] = 0
    z[:, :, 1] = 0  # the second datum rests
    found = compared({"z": z}, {"z": z.flatten(0, 1)}, torch.zeros(2))
    expected = r_hat_limit(z[:, :, 0, :moving], tests=2 * moving).tolist() if moving else []
    assert min(expected, default=2) > 1.02
    assert found.r_hat_limit[0].tolist() == pytest.approx([*expected, *[1.01] * (3 - moving)])
    assert found.r_hat_limit[1].tolist() == pytest.approx([1.01] * 3)


def test_one_unit_with_few_draws_is_enough_to_judge_a_datum(three):
    some = copy(three)
    sizes = torch.tensor([[ENOUGH_DRAWS + 1, ENOUGH_DRAWS - 1, torch.nan]]).double()
    vars(some).update(bulk_effective_sample_size=sizes, tail_effective_sample_size=sizes)
    assert some.too_few_draws.tolist() == [True]


@pytest.mark.parametrize("rho", [-0.6, 0.3])
def test_correlations_are_those_of_numpy_for_draws_around_any_mean(rho):
    z = torch.randn(4, 100, 1, 2, generator=torch.Generator().manual_seed(2)).double()
    z[..., 1] = rho * z[..., 0] + (1 - rho**2) ** 0.5 * z[..., 1]
    z += torch.tensor([50.0, -7.0])
    some = compared({"z": z}, {"z": z.flatten(0, 1)}, torch.zeros(1))
    expected = np.corrcoef(z.reshape(-1, 2).T.numpy())
    assert some.moments.correlation[0].numpy() == pytest.approx(expected)


def test_chains_agree_wherever_their_center_is():
    draws = torch.randn(4, 200, 3, generator=torch.Generator().manual_seed(3)).double()
    draws[:2] *= 1.5
    assert rank_r_hat(draws + 100).tolist() == pytest.approx(rank_r_hat(draws).tolist())


def test_a_chain_that_does_not_move_is_one_draw():
    assert effective(torch.ones(4, 50, 2)).tolist() == [1.0, 1.0]


def test_one_divergence_takes_the_agreement():
    z = torch.randn(4, 500, 2, 1, generator=torch.Generator().manual_seed(4)).double()
    some = compared({"z": z}, {"z": z.flatten(0, 1)}, torch.tensor([0, 1]))
    assert some.agrees.tolist() == [True, False]

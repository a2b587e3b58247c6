"""Effective sample sizes of chains that do not move, that alternate, and that have ties."""

from math import log10

import arviz
import pytest
import torch
from scipy.stats import f, norm

from pyro_vae.inference.chain_measures import (
    bulk_draws,
    effective_draws,
    largest_difference,
    normal_scores,
    r_hat_limit,
    tail_draws,
)
from pyro_vae.inference.pareto import threshold


def test_chains_that_do_not_move_have_one_draw_in_the_bulk_and_all_in_the_tails():
    still = torch.zeros(4, 100, 2).double()
    assert bulk_draws(still).tolist() == [1, 1]
    # The share of draws below a quantile is known without error.
    assert tail_draws(still).tolist() == [400, 400]


def test_tails_of_draws_with_ties_are_those_of_another_library():
    generator = torch.Generator().manual_seed(0)
    x = (1.5 * torch.randn(4, 300, 3, generator=generator).double()).cumsum(1) % 12
    x = x.round()
    data = arviz.convert_to_dataset({"x": x.numpy()})
    theirs = torch.from_numpy(arviz.ess(data, method="tail")["x"].values.copy())
    torch.testing.assert_close(tail_draws(x), theirs, rtol=0.01, atol=0)


@pytest.mark.parametrize(("chains", "tests"), [(2, 1), (4, 1), (4, 6)])
def test_the_limit_of_r_hat_is_a_quantile_of_f(chains, tests):
    """Draws that alternate are worth n log10(n) of n independent ones, the most that counts.

    The limit has a probability of 1 % / tests above it for M = 2 chains halves of n draws.
    """
    n = 50
    x = torch.tensor([1.0, -1.0]).double().repeat(n)
    x = x[None, :, None, None].expand(chains, 2 * n, 2, 3)
    quantile = f.isf(0.01 / tests, 2 * chains - 1, 2 * chains * n**0.5)
    wanted = (1 + quantile / (n * log10(n))) ** 0.5
    torch.testing.assert_close(r_hat_limit(x, tests), torch.full((2, 3), wanted).double())


def test_the_error_of_a_correlation_does_not_depend_on_units():
    generator = torch.Generator().manual_seed(0)
    chains = torch.randn(4, 200, 3, 2, generator=generator).double()
    guide = torch.randn(800, 3, 2, generator=generator).double()
    apart = torch.tensor([[1.0, 0.3], [0.3, 1.0]]).double().expand(3, 2, 2)
    _, wanted = largest_difference(apart, chains, guide)
    # Each side has a variance of 1 / 800.
    torch.testing.assert_close(wanted, torch.full((3,), 0.05).double(), rtol=0.15, atol=0)
    by, shift = torch.tensor([3.0, 0.2]).double(), torch.tensor([5.0, -7.0]).double()
    _, found = largest_difference(apart, shift + by * chains, shift + by * guide)
    torch.testing.assert_close(found, wanted)


def test_scores_are_normal_quantiles_of_ranks_of_each_unit():
    draws = torch.tensor([[3.0, 1.0], [2.0, 3.0]]).double()
    quantiles = [(rank - 0.375) / 4.25 for rank in (3.5, 1.0, 2.0, 3.5)]  # ties share a rank
    wanted = torch.tensor(norm.ppf(quantiles)).reshape(2, 2)
    torch.testing.assert_close(normal_scores(draws), wanted)
    x = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    scores = normal_scores(x)
    torch.testing.assert_close(normal_scores(x.reshape(2, 50, 2, 3)), scores.reshape(2, 50, 2, 3))


def test_the_threshold_of_one_and_two_weights():
    assert threshold(1) == 0
    assert threshold(2) == pytest.approx(1 - 1 / log10(2))


def by_hand(chains):
    """Geyer's estimate for chains (M, n), one lag after the other."""
    m, n = chains.shape
    off = chains - chains.mean(1, keepdim=True)
    lags = [(off[:, : n - t] * off[:, t:]).sum(1).mean().item() / n for t in range(n)]
    within = lags[0] * n / (n - 1)
    total = lags[0] + chains.mean(1).var().item()
    rho = [1.0, *(1 - (within - lag) / total for lag in lags[1:])]
    tau, least = -1.0, float("inf")
    for even, odd in zip(rho[::2], rho[1::2], strict=False):
        if even + odd <= 0:
            tau += max(even, 0.0)
            break
        least = min(least, even + odd)
        tau += 2 * least
    return m * n / max(tau, 1 / log10(m * n))


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_the_size_of_short_chains_by_hand(scale):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 60, generator=generator).double()
    x = x + 0.5 * torch.randn(2, 12, 60, generator=generator).double().cumsum(1)
    halves = torch.cat([x[:, :6], x[:, 6:]])
    wanted = torch.tensor([by_hand(halves[..., i]) for i in range(60)]).double()
    torch.testing.assert_close(effective_draws(scale * x), wanted, rtol=1e-6, atol=0)

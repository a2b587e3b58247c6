"""Effective sample sizes, Monte Carlo errors and agreement of chains with known properties."""

import json

import arviz
import pytest
import torch

from pyro_vae.inference.chain_measures import (
    bulk_draws,
    deviation_error,
    effective_draws,
    tail_draws,
)
from pyro_vae.inference.chains import compared
from pyro_vae.inference.joint_nuts import JointPosterior


def autoregressive(chains, draws, rho, series, seed=0):
    """Normal chains with variance 1 and autocorrelations rho ** t, (chains, draws, series)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(chains, draws, series, generator=generator, dtype=torch.float64)
    found = noise.clone()
    for t in range(1, draws):
        found[:, t] = rho * found[:, t - 1] + (1 - rho**2) ** 0.5 * noise[:, t]
    return found


@pytest.mark.parametrize("rho", [-0.4, 0.0, 0.5, 0.8])
def test_the_sample_size_is_that_of_the_autocorrelations(rho):
    """S (1 - rho) / (1 + rho) for the mean, and S (1 - rho^2) / (1 + rho^2) for squares."""
    draws = autoregressive(4, 1000, rho, 60)
    size = effective_draws(draws).median().item()
    assert size == pytest.approx(4000 * (1 - rho) / (1 + rho), rel=0.1)
    assert bulk_draws(draws).median().item() == pytest.approx(size, rel=0.05)
    error = deviation_error(draws).square().mean().sqrt().item()
    # The variance of a normal sample's standard deviation is 1 / (2 S).
    size = 4000 * (1 - rho**2) / (1 + rho**2)
    assert error == pytest.approx((2 * size) ** -0.5, rel=0.12)


def test_errors_are_those_of_new_chains():
    draws = autoregressive(4, 300, 0.6, 400)
    size = effective_draws(draws)
    ratio = draws.mean((0, 1)).std() / (1 / size).mean().sqrt()
    assert ratio.item() == pytest.approx(1, abs=4 / 800**0.5 + 0.05)
    deviations = draws.flatten(0, 1).std(0)
    ratio = deviations.std() / deviation_error(draws).square().mean().sqrt()
    assert ratio.item() == pytest.approx(1, abs=4 / 800**0.5 + 0.05)


@pytest.mark.parametrize(("chains", "draws", "rho"), [(4, 200, 0.9), (2, 101, 0.3), (3, 150, -0.7)])
def test_all_measures_are_those_of_another_library(chains, draws, rho):
    x = autoregressive(chains, draws, rho, 3)
    if chains == 3:
        x = x.exp()
    data = arviz.convert_to_dataset({"x": x.numpy()})
    for measure, method in ((effective_draws, "mean"), (bulk_draws, "bulk"), (tail_draws, "tail")):
        theirs = torch.from_numpy(arviz.ess(data, method=method)["x"].values.copy())
        torch.testing.assert_close(measure(x), theirs, rtol=0.01, atol=0)
    theirs = torch.from_numpy(arviz.mcse(data, method="sd")["x"].values.copy())
    torch.testing.assert_close(deviation_error(x), theirs, rtol=0.01, atol=0)


def posterior(draws, guide=None):
    """The record of draws (chains, draws, n, units); the guide has the same ones if not given."""
    guide = draws.flatten(0, 1) if guide is None else guide
    return compared({"z": draws}, {"z": guide}, torch.zeros(draws.shape[2]))


def test_few_draws_of_a_plain_normal_agree_but_are_too_few():
    """R-hat <= 1.01 rejects most of these chains: 2 of 100 draws, with 4 units."""
    draws = autoregressive(2, 100, 0.3, 4 * 200).unflatten(2, (200, 4))
    found = posterior(draws)
    assert (found.r_hat.amax(1) > 1.01).double().mean() > 0.5
    assert (~found.agrees).double().mean() < 0.03
    assert bool(found.too_few_draws.all())
    enough = posterior(autoregressive(4, 500, 0.3, 40).unflatten(2, (20, 2)))
    assert not bool(enough.too_few_draws.any())
    assert bool(enough.agrees.all())


@pytest.mark.parametrize(("draws", "shift"), [(100, 1.5), (400, 0.6)])
def test_chains_that_differ_do_not_agree_although_they_are_few(draws, shift):
    z = autoregressive(2, draws, 0.3, 100).unflatten(2, (100, 1))
    z[0] += shift
    found = posterior(z)
    assert found.agrees.double().mean() < 0.05
    assert bool(found.too_few_draws.all())


def test_chains_that_do_not_move_do_not_agree():
    still = torch.stack([torch.zeros(100), torch.ones(100)]).double()[:, :, None, None]
    assert not posterior(still).agrees.any()
    half = autoregressive(2, 100, 0.3, 1)[..., None]
    half[0] = 3.0
    assert not posterior(half).agrees.any()
    assert posterior(half).too_few_draws.all()


def test_units_that_do_not_vary_count_for_nothing():
    z = autoregressive(4, 400, 0.0, 2).unflatten(2, (1, 2))
    padded = torch.cat([z, torch.zeros_like(z)], -1)
    found = posterior(padded)
    assert found.bulk_effective_sample_size.isnan().tolist() == [[False, False, True, True]]
    assert found.agrees.all()
    assert not found.too_few_draws.any()
    assert found.correlation_error.isfinite().all()
    nothing = posterior(torch.zeros_like(z))
    assert nothing.agrees.all()
    assert not nothing.too_few_draws.any()


def correlated(shape, rho, seed):
    generator = torch.Generator().manual_seed(seed)
    u, v, w = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return torch.stack([u, rho * u + (1 - rho**2) ** 0.5 * v, w], -1)


def test_the_correlation_error_is_that_of_the_worst_pair():
    """The error of a correlation is (1 - r^2) / sqrt(S), here from both sides."""
    draws, guide = correlated((4, 500, 50), 0.8, 0), correlated((2000, 50), 0.3, 1)
    found = posterior(draws, guide)
    assert found.correlation_error.mean().item() == pytest.approx(0.5, abs=0.01)
    wanted = ((1 - 0.8**2) ** 2 / 2000 + (1 - 0.3**2) ** 2 / 2000) ** 0.5
    error = found.correlation_standard_error
    assert error.mean().item() == pytest.approx(wanted, rel=0.1)
    assert found.correlation_error.std().item() == pytest.approx(wanted, rel=0.4)
    equal = posterior(draws, correlated((2000, 50), 0.8, 2))
    assert (equal.correlation_error / equal.correlation_standard_error).max() < 4.5
    one = posterior(draws[..., :1], guide[..., :1])
    assert one.correlation_error.isnan().all()


def test_table_and_record():
    found = posterior(correlated((2, 100, 1), 0.8, 0), correlated((200, 1), 0.3, 1))
    record = json.loads(json.dumps(found.as_dict()))
    assert record["too_few_draws"] == 1
    assert record["greatest_correlation_error"] == found.correlation_error[0].item()
    assert record["least_tail_effective_sample_size"] == found.tail_effective_sample_size.min()
    assert "data with too few draws   1 of 1" in str(found)
    joint = JointPosterior(found, None, 7)
    assert joint.too_few_draws
    assert "too few draws" in str(joint)
    row = json.loads(json.dumps(joint.as_dict()))["by_unit"]["z[0]"]
    assert row["standard_deviation_error"] == found.standard_deviation_error[0, 0].item()
    json.dumps(posterior(correlated((2, 100, 1), 0.8, 0)[..., :1]).as_dict())

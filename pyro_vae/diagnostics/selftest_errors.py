"""Checks of `selftest` for reported errors: how often they hold, and effective sample sizes."""

from collections.abc import Iterator
from math import log
from typing import Any

import torch
from torch import Tensor

from pyro_vae.diagnostics.calibration import calibration
from pyro_vae.diagnostics.information import kl_parts
from pyro_vae.diagnostics.local_calibration import local_calibration
from pyro_vae.diagnostics.loo_pit import loo_pit
from pyro_vae.diagnostics.selftest_checks import Check, check_of
from pyro_vae.inference.annealing import anneal
from pyro_vae.inference.chains import Posterior, compared
from pyro_vae.inference.importance import log_likelihood
from pyro_vae.models.exact import linear_gaussian
from pyro_vae.pairs.rng import seeded

WITHIN = 0.9545
"""The probability that a normal number is within two standard deviations of its mean."""

REPETITIONS = 25

SPREAD = 1.3
"""The guide is so many times as wide as the posterior, so its weights are bounded."""


def _held(name: str, estimate: Tensor, truth: Tensor | float, error: Tensor) -> Check:
    """Check how often the true value is within two reported errors of the estimate."""
    held = ((estimate - truth).abs() <= 2 * error).double()
    # Errors are estimates too, and estimates are only about normal, which costs a percent or two.
    slack = 5 * (WITHIN * (1 - WITHIN) / held.numel()) ** 0.5 + 0.02
    return check_of(f"errors hold: {name}", held.mean(), WITHIN, slack)


def by_datum_checks() -> Iterator[Check]:
    """Check errors of each datum: one run over many data."""
    pair = linear_gaussian(spread=SPREAD)
    x = pair.marginal().sample((1000,)).detach()
    log_p = pair.marginal().log_prob(x).detach()
    found = log_likelihood(pair, x, num_samples=200, engine="eager")
    yield _held("log p(x) of a datum", found.per_datum, log_p, found.standard_errors)
    gap = SPREAD**2 - 1 - 2 * log(SPREAD)
    errors = found.elbo_standard_errors
    yield _held("ELBO of a datum", found.elbo_per_datum, log_p - gap, errors)
    few: Any = {"num_temperatures": 10, "num_chains": 40, "leapfrog_steps": 3}
    annealed = anneal(pair, x[:100], **few, engine="eager", progress=False)
    yield _held("annealing of a datum", annealed.per_datum, log_p[:100], annealed.standard_errors)
    local = local_calibration(pair, x[:300], num_samples=300, progress=False)
    yield _held("shift of the guide", local.shift, 0.0, local.shift_errors)
    scale = log(SPREAD)
    yield _held("scale of the guide", local.log_scale, scale, local.log_scale_errors)
    yield _held("correlation of the guide", local.correlation, 0.0, local.correlation_errors)


def of_means_checks() -> Iterator[Check]:
    """Check errors of means: many runs on new data."""
    runs = [list(_means(seed)) for seed in range(REPETITIONS)]
    for several in zip(*runs, strict=True):
        name = several[0][0]
        numbers = torch.tensor([one[1:] for one in several], dtype=torch.float64)
        yield _held(name, numbers[:, 0], numbers[:, 1], numbers[:, 2])


def _means(seed: int) -> Iterator[tuple[str, float, float, float]]:
    """Means of one run: a name, the estimate, the true value and the reported error."""
    pair, exact = linear_gaussian(spread=SPREAD), linear_gaussian()
    with seeded(seed):
        x = pair.marginal().sample((60,)).detach()
    log_p = pair.marginal().log_prob(x).mean().item()
    found = log_likelihood(pair, x, num_samples=100, engine="eager", seed=seed)
    yield "log p(x)", found.value, log_p, found.standard_error
    gap = SPREAD**2 - 1 - 2 * log(SPREAD)
    yield "ELBO", found.elbo, log_p - gap, found.elbo_standard_error
    ranked = calibration(exact, num_simulations=100, num_draws=19, seed=seed, progress=False)
    yield "coverage", ranked.coverage[0, 0].item(), 0.5, ranked.coverage_errors[0, 0].item()
    places = loo_pit(exact, x, num_samples=50, seed=seed, progress=False)
    yield "coverage of LOO-PIT", places.coverage[0].item(), 0.5, places.coverage_errors[0].item()
    kl = kl_parts(exact, x, seed=seed)["z"].kl
    yield "KL of the guide", kl.value, exact.information(), kl.standard_error


def sample_size_checks() -> Iterator[Check]:
    """Check effective sample sizes: of importance weights, and of chains with known correlation."""
    pair = linear_gaussian(spread=SPREAD)
    x = pair.marginal().sample((50,)).detach()
    found = log_likelihood(pair, x, num_samples=5000)
    share = (found.effective_sample_size / 5000).mean()
    truth = (2 * SPREAD**2 - 1) / SPREAD**4  # 1 / E[w^2] for two units
    yield check_of("effective sample size of weights", share, truth, 0.01)
    for correlation in (0.5, -0.3):
        chains = _chains(correlation)
        share = chains.effective_sample_size.mean() / 4000
        truth = (1 - correlation) / (1 + correlation)
        words = f"effective sample size, autocorrelation {correlation}"
        yield check_of(words, share, truth, 0.06 * truth)
        mean = chains.moments.mean
        yield _held(f"means of chains, {correlation}", mean, 0.0, chains.mean_standard_error)


def _chains(correlation: float) -> Posterior:
    """Four chains of 1,000 draws of a standard normal with this autocorrelation, 100 times."""
    noise = torch.randn(1000, 4, 100, 2, dtype=torch.float64)
    draws = [noise[0]]
    for step in noise[1:]:
        draws.append(correlation * draws[-1] + (1 - correlation**2) ** 0.5 * step)
    return compared(
        {"z": torch.stack(draws, 1)}, {"z": noise[:, 0]}, torch.zeros(100, dtype=torch.long)
    )

"""Ranks of true values among draws, and a simultaneous band for them."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.stats import binom, poisson
from torch import Tensor

from pyro_vae.errors import UsageError
from pyro_vae.pairs.data_plate import is_local


def ranked(guide: Mapping[str, Any], truth: Mapping[str, Tensor]) -> list[str]:
    """Return the latents that both model and guide draw."""
    for name, site in guide.items():
        if not is_local(site):
            raise UsageError(
                f"latent site '{name}' is not local, but calibration ranks only local latents: use "
                "pyro_vae.global_calibration"
            )
    both = [name for name in guide if name in truth]
    if not both:
        raise UsageError("calibration needs a latent of the model that the guide draws, got none")
    return both


def ranks_of(draws: Tensor, truth: Tensor) -> Tensor:
    """Count the draws (draws, n, units) below the true values (n, units).

    Values that differ only by rounding are ties. Ties are broken at random.
    """
    eps = torch.finfo(truth.dtype).eps if truth.is_floating_point() else 0.0
    rounding = 8 * eps * truth.abs()
    below = (draws < truth - rounding).sum(0)
    ties = ((draws - truth).abs() <= rounding).sum(0)
    share = torch.rand(ties.shape, dtype=torch.float64, device=ties.device)
    return below + (share * (ties + 1)).long()


@lru_cache(maxsize=256)
def simultaneous_band(simulations: int, draws: int, level: float) -> tuple[Any, Any]:
    r"""Return bounds for the numbers of ranks below 1, ..., L; uniform ranks stay inside.

    At each point the bounds are quantiles of the binomial distribution of that number, at the same
    probability for all points. Bisection finds this probability: the chance to be inside at all
    points, computed exactly, must be at least 1 - level.

    Arguments:
        simulations: N, the number of ranks.
        draws: L; ranks are between 0 and L.
        level: the largest probability that uniform ranks are outside at any point.

    Returns two arrays of shape (L,). Säilynoja, Bürkner & Vehtari, Graphical test for discrete
    uniformity, Statistics and Computing 32, 2022.

    >>> low, high = simultaneous_band(100, 19, 0.05)
    >>> int(low[9]), int(high[9])  # the expected number of ranks below 10 is 50
    (37, 63)
    """
    share = np.arange(1, draws + 1) / (draws + 1)

    def bounds(tail: float) -> tuple[Any, Any]:
        return binom.ppf(tail, simulations, share), binom.isf(tail, simulations, share)

    narrow, wide = level / 2, level / (4 * draws)
    for _ in range(30):
        tail = (narrow * wide) ** 0.5
        if _inside(simulations, *bounds(tail)) >= 1 - level:
            wide = tail
        else:
            narrow = tail
    return bounds(wide)


def _inside(simulations: int, low: Any, high: Any) -> float:
    """Return the probability that cumulative counts of uniform ranks are inside at every point.

    Uniform counts are independent Poisson counts, conditioned on their sum. So each step convolves
    the distribution of the cumulative count with one more count, and cuts it to the bounds.
    """
    rate = simulations / (len(low) + 1)
    one = poisson.pmf(np.arange(simulations + 1), rate)
    one = one[: np.flatnonzero(one > 1e-18)[-1] + 1]
    state = np.ones(1)  # probabilities of the counts `start`, `start` + 1, ...
    start = 0
    for least, most in zip([*low, simulations], [*high, simulations], strict=True):
        state = np.convolve(state, one)
        first, last = max(int(least), start), min(int(most), start + len(state) - 1)
        if last < first:
            return 0.0
        state, start = state[first - start : last - start + 1], first
    return float(state[-1] / poisson.pmf(simulations, simulations))


def in_words(ranks: Tensor, draws: int) -> str:
    """Describe how ranks deviate from uniform: in location, in width, or in both."""
    u = (ranks.double() + 0.5) / (draws + 1) - 0.5
    place = (u.mean() * (12 * len(u)) ** 0.5).item()
    width = ((u.square().mean() - 1 / 12) * (180 * len(u)) ** 0.5).item()
    found = []
    if abs(width) > max(3, abs(place) / 2):
        found.append("too narrow (U shape)" if width > 0 else "too wide (dome)")
    if abs(place) > max(3, abs(width) / 2):
        found.append("too low (slope up)" if place > 0 else "too high (slope down)")
    return "draws are " + " and ".join(found) if found else "ranks have another shape"

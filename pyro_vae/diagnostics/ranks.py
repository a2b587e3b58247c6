"""Ranks of true values among draws, and the band that they stay in."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.stats import binom, poisson
from torch import Tensor

from pyro_vae.errors import UsageError
from pyro_vae.pairs.places import is_local


def ranked(guide: Mapping[str, Any], truth: Mapping[str, Tensor]) -> list[str]:
    """The latents that both model and guide draw."""
    for name, site in guide.items():
        if not is_local(site):
            raise UsageError(
                f"site '{name}' is outside the data plate: calibration ranks the latents of data"
            )
    both = [name for name in guide if name in truth]
    if not both:
        raise UsageError("the guide draws no latent of the model: there is nothing to calibrate")
    return both


def ranks_of(draws: Tensor, truth: Tensor) -> Tensor:
    """How many draws (draws, n, units) are below the truth (n, units), ties broken at random.

    What differs by rounding alone is a tie.
    """
    eps = torch.finfo(truth.dtype).eps if truth.is_floating_point() else 0.0
    rounding = 8 * eps * truth.abs()
    below = (draws < truth - rounding).sum(0)
    ties = ((draws - truth).abs() <= rounding).sum(0)
    share = torch.rand(ties.shape, dtype=torch.float64, device=ties.device)
    return below + (share * (ties + 1)).long()


@lru_cache(maxsize=256)
def simultaneous_band(simulations: int, draws: int, level: float) -> tuple[Any, Any]:
    r"""Bounds of the numbers of ranks below 1, ..., L that uniform ranks leave with this level.

    At each point they are quantiles of the binomial distribution of that number, at one and the
    same probability. It is found by bisection: the probability to be inside at all points, computed
    exactly, is to be at least 1 - level.

    Arguments:
        simulations: N ranks.
        draws: L, so that ranks are from 0 to L.
        level: the probability to be outside at any point, at most.

    Returns two arrays of shape (L,). Säilynoja, Bürkner & Vehtari, Graphical test for discrete
    uniformity, Statistics and Computing 32, 2022.

    >>> low, high = simultaneous_band(100, 19, 0.05)
    >>> int(low[9]), int(high[9])  # 50 ranks are expected below 10
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
    """The probability that cumulative counts of uniform ranks are within bounds at every point.

    Uniform counts are Poisson counts given their sum, and Poisson counts are independent: the
    distribution of the cumulative count is convolved with one more, and cut to the bounds.
    """
    rate = simulations / (len(low) + 1)
    one = poisson.pmf(np.arange(simulations + 1), rate)
    one = one[: np.flatnonzero(one > 1e-18)[-1] + 1]
    state = np.ones(1)  # of counts from `start` on
    start = 0
    for least, most in zip([*low, simulations], [*high, simulations], strict=True):
        state = np.convolve(state, one)
        first, last = max(int(least), start), min(int(most), start + len(state) - 1)
        if last < first:
            return 0.0
        state, start = state[first - start : last - start + 1], first
    return float(state[-1] / poisson.pmf(simulations, simulations))


def in_words(ranks: Tensor, draws: int) -> str:
    """What is wrong with ranks that are not uniform: which of place and width is off by more."""
    u = (ranks.double() + 0.5) / (draws + 1) - 0.5
    place = (u.mean() * (12 * len(u)) ** 0.5).item()
    width = ((u.square().mean() - 1 / 12) * (180 * len(u)) ** 0.5).item()
    found = []
    if abs(width) > max(3, abs(place) / 2):
        found.append("too narrow (U shape)" if width > 0 else "too wide (dome)")
    if abs(place) > max(3, abs(width) / 2):
        found.append("too low (slope up)" if place > 0 else "too high (slope down)")
    return "draws are " + " and ".join(found) if found else "of another shape"

"""Ranks of true values among draws, and a simultaneous band for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.stats import binom, poisson
from torch import Tensor

from pyro_vae.errors import UsageError
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.showing import shown_html

INTERVALS = (0.5, 0.8, 0.9, 0.95)
"""Probabilities of the central intervals for which coverage is computed."""


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


@lru_cache(maxsize=16)
def _normal_scores(draws: int) -> Tensor:
    """Return the normal score of each rank from 0 to L, of shape (L + 1,)."""
    return torch.special.ndtri((torch.arange(draws + 1, dtype=torch.float64) + 0.5) / (draws + 1))


def in_words(ranks: Tensor, draws: int) -> str:
    """Describe how ranks deviate from uniform: in location, in width, or in both.

    If most true values are beyond all draws on one side, the ranks are far from the middle, as
    those of draws that are too narrow are. They tell only the location.
    """
    u = (ranks.double() + 0.5) / (draws + 1) - 0.5
    place = (u.mean() * (12 * len(u)) ** 0.5).item()
    width = ((u.square().mean() - 1 / 12) * (180 * len(u)) ** 0.5).item()
    found, one_sided = [], bool(u.mean().abs() > u.std())
    if abs(width) > max(3, abs(place) / 2) and not (width > 0 and one_sided):
        found.append("too narrow (U shape)" if width > 0 else "too wide (dome)")
    if abs(place) > max(3, abs(width) / 2):
        found.append("too low (slope up)" if place > 0 else "too high (slope down)")
    return "draws are " + " and ".join(found) if found else "ranks have another shape"


@dataclass(frozen=True)
class Calibration:
    """The results of `calibration`: ranks of the true value among draws of the guide."""

    names: tuple[str, ...]
    """The quantities: each unit of each latent, two log densities, and those of the user."""
    ranks: Tensor
    """The number of draws below the true value, from 0 to ``num_draws``, as integers of shape
    (num_simulations, quantities). -1 means that the unit is masked and not ranked."""
    num_draws: int
    """Draws of the guide for each simulated datum."""
    level: float
    """The largest probability that any quantity rejects the exact posterior."""
    left_out: dict[str, str]
    """Why each latent or unit is not ranked, and why some rows are not simulated."""

    @property
    def num_simulations(self) -> int:
        """The number of simulated data."""
        return len(self.ranks)

    @property
    def counts(self) -> Tensor:
        """The number of ranks of each quantity, of shape (quantities,)."""
        return (self.ranks >= 0).sum(0)

    @property
    def points(self) -> Tensor:
        """The points at which distribution functions are compared, of shape (num_draws,)."""
        return torch.arange(1, self.num_draws + 1, dtype=torch.float64) / (self.num_draws + 1)

    @property
    def differences(self) -> Tensor:
        """Empirical minus uniform distribution function at the ``points``, of shape
        (num_draws, quantities)."""
        below = [
            torch.bincount(rank[rank >= 0], minlength=self.num_draws + 1) for rank in self.ranks.T
        ]
        share = torch.stack(below, 1).cumsum(0)[:-1].double() / self.counts
        return share - self.points[:, None]

    @property
    def band(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of ``differences``, each of the same shape.

        For an exact guide, each quantity leaves its bounds at any point with probability
        ``level`` / quantities at most.
        """
        level = self.level / len(self.names)
        bounds = [simultaneous_band(n, self.num_draws, level) for n in self.counts.tolist()]
        share = torch.from_numpy(np.stack(bounds, -1)) / self.counts - self.points[:, None]
        return share[0], share[1]

    @property
    def coverage(self) -> Tensor:
        """Fractions of true values in central intervals of 50, 80, 90, 95 %, (quantities, 4)."""
        middle = ((self.ranks + self.jitter) / (self.num_draws + 1) - 0.5).abs()
        middle = torch.where(self.ranks < 0, torch.inf, middle)
        inside = [(middle <= interval / 2).double().sum(0) for interval in INTERVALS]
        return torch.stack(inside, 1) / self.counts[:, None]

    @property
    def coverage_errors(self) -> Tensor:
        """Binomial standard errors of ``coverage``, of the same shape."""
        return (self.coverage * (1 - self.coverage) / self.counts[:, None]).sqrt()

    @property
    def scores(self) -> Tensor:
        r"""Normal scores of the ranks, :math:`\Phi^{-1}((r + \tfrac12) / (L + 1))`, of the shape of
        ``ranks``; NaN where a unit is not ranked."""
        found = _normal_scores(self.num_draws)[self.ranks.clamp(min=0).cpu()]
        return torch.where(self.ranks.cpu() < 0, torch.nan, found)

    @property
    def score_means(self) -> Tensor:
        """Means of the ``scores``, of shape (quantities,): 0 for an exact guide.

        They are about the error of the guide's mean in its own standard deviations, with the other
        sign: a rank counts draws below the true value, so a mean that is too high gives a negative
        number.
        """
        return self.scores.nanmean(0)

    @property
    def score_deviations(self) -> Tensor:
        """Standard deviations of the ``scores`` divided by that of uniform ranks, (quantities,).

        They are 1 for an exact guide, about 1.5 for a guide with 0.6 times the right scale, and
        about 0.7 for one with 1.5 times the right scale.
        """
        off = self.scores - self.score_means
        variance = off.square().nansum(0) / (self.counts.cpu() - 1)
        return variance.sqrt() / _normal_scores(self.num_draws).std(correction=0)

    @property
    def score_mean_errors(self) -> Tensor:
        """Standard errors of ``score_means`` if ranks are uniform, (quantities,): about
        ``counts`` ** -0.5."""
        return _normal_scores(self.num_draws).std(correction=0) / self.counts.cpu().sqrt()

    @property
    def score_deviation_errors(self) -> Tensor:
        """Standard errors of ``score_deviations`` if ranks are uniform, (quantities,): about
        (2 ``counts``) ** -0.5, by the delta method."""
        uniform, n = _normal_scores(self.num_draws), self.counts.cpu()
        fourth = uniform.pow(4).mean() / uniform.square().mean().square()
        return ((fourth - (n - 3) / (n - 1)) / (4 * n)).sqrt()

    @property
    def jitter(self) -> Tensor:
        """Fixed numbers in (0, 1) that spread each rank over its step, so that every interval has
        its exact probability."""
        generator = np.random.default_rng(0)
        return torch.from_numpy(generator.random(self.ranks.shape))

    @property
    def failures(self) -> dict[str, str]:
        """The quantities whose ranks leave the band, with a description of the deviation."""
        low, high = self.band
        slack = 1e-9
        outside = (self.differences < low - slack) | (self.differences > high + slack)
        which = outside.any(0).nonzero().flatten().tolist()
        return {
            self.names[i]: in_words(rank[rank >= 0], self.num_draws)
            for i in which
            for rank in [self.ranks[:, i]]
        }

    @property
    def calibrated(self) -> bool:
        """Whether all quantities stay in their bands."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict and the coverage by quantity for metrics.json."""
        scores = {
            name: dict(zip(self.names, values.tolist(), strict=True))
            for name, values in (
                ("score_means", self.score_means),
                ("score_mean_errors", self.score_mean_errors),
                ("score_deviations", self.score_deviations),
                ("score_deviation_errors", self.score_deviation_errors),
            )
        }
        return {
            "calibrated": self.calibrated,
            "level": self.level,
            "num_simulations": self.num_simulations,
            "num_draws": self.num_draws,
            "num_quantities": len(self.names),
            "failures": self.failures,
            "left_out": self.left_out,
            "coverage": {
                name: dict(zip(map(str, INTERVALS), shares, strict=True))
                for name, shares in zip(self.names, self.coverage.tolist(), strict=True)
            },
            **scores,
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        failures = self.failures
        verdict = "not rejected by any" if not failures else f"rejected by {len(failures)}"
        title = "".join(f"{100 * interval:>7.0f} %" for interval in INTERVALS)
        lines = [
            f"calibration {verdict} of {len(self.names)} quantities at level {self.level:g}, "
            f"{self.num_simulations} simulations with {self.num_draws} draws each",
            f"{'coverage of':<20}{title}{'bias':>8}{'scale':>7}   ranks",
        ]
        # The scores are (truth - mean) / scale of the guide, in posterior standard deviations.
        scales = 1 / self.score_deviations
        columns = zip(
            self.names, self.coverage.tolist(), -self.score_means * scales, scales, strict=True
        )
        for name, shares, bias, scale in columns:
            numbers = "".join(f"{100 * share:>7.1f} %" for share in shares)
            numbers += f"{_short(bias, '+.2f'):>8}{_short(scale, '.2f'):>7}"
            lines.append(f"{name:<20}{numbers}   {failures.get(name, 'uniform')}")
        lines.append(
            "bias and scale of the guide's draws, relative to the posterior (0 and 1 are exact)"
        )
        lines += [f"'{name}' is left out: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


def _short(value: float, form: str) -> str:
    """A number of a table. Ranks that are almost all equal tell only that it is large."""
    if abs(value) >= 100:
        return ">99" if value > 0 else "<-99"
    return format(value, form)  # NaN, too

"""TARP: expected coverage of all units at once, by distances to reference points."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.diagnostics.guide_rows import GuideRows, SimulatedRows
from pyro_vae.diagnostics.ranks import ranks_of, simultaneous_band
from pyro_vae.errors import UsageError
from pyro_vae.pairs.arrays import as_tensor, each_context
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.threads import alone

SMALLEST = 1e-12
"""A constant unit has the scale 0; it is divided by this number instead."""


@dataclass(frozen=True)
class Tarp:
    """The results of `tarp`: expected coverage of balls around reference points."""

    ranks: Tensor
    """The number of draws nearer to the reference point than the true latents are, from 0 to
    ``num_draws``, of shape (num_simulations,)."""
    num_draws: int
    """Draws of the guide for each simulated datum."""
    level: float
    """The probability that an exact guide leaves the band."""

    @property
    def credibility(self) -> Tensor:
        """The levels at which coverage is computed, (num_draws,)."""
        return torch.arange(1, self.num_draws + 1, dtype=torch.float64) / (self.num_draws + 1)

    @property
    def coverage(self) -> Tensor:
        """The share of true latents in regions of these levels, (num_draws,).

        It equals ``credibility`` for an exact guide, up to the band.
        """
        counts = torch.bincount(self.ranks, minlength=self.num_draws + 1)
        return counts.cumsum(0)[:-1] / len(self.ranks)

    @property
    def band(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of ``coverage`` for an exact guide, simultaneous at ``level``."""
        low, high = simultaneous_band(len(self.ranks), self.num_draws, self.level)
        return torch.from_numpy(low) / len(self.ranks), torch.from_numpy(high) / len(self.ranks)

    @property
    def calibrated(self) -> bool:
        """Whether the coverage is in its band."""
        low, high = self.band
        slack = 1e-9
        return bool(((self.coverage >= low - slack) & (self.coverage <= high + slack)).all())

    @property
    def words(self) -> str:
        """How the ranks deviate most: in their mean or in their variance."""
        if self.calibrated:
            return "uniform"
        u = (self.ranks.double() + 0.5) / (self.num_draws + 1) - 0.5
        tilt = (u.mean() * (12 * len(u)) ** 0.5).item()
        width = ((u.square().mean() - 1 / 12) * (180 * len(u)) ** 0.5).item()
        if abs(tilt) > abs(width):
            return "draws are biased or ignore a part of x (ranks are tilted)"
        return "draws are too narrow" if width > 0 else "draws are too wide"

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict and the largest difference of coverage for metrics.json."""
        return {
            "calibrated": self.calibrated,
            "words": self.words,
            "level": self.level,
            "num_simulations": len(self.ranks),
            "num_draws": self.num_draws,
            "largest_difference": (self.coverage - self.credibility).abs().max().item(),
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        largest = self.as_dict()["largest_difference"]
        return (
            f"TARP: {self.words}; coverage differs from its level by up to {largest:.3f}, "
            f"{len(self.ranks)} simulations with {self.num_draws} draws each"
        )


@alone()
def tarp(
    pair: nn.Module,
    *context: Any,
    missing: Tensor | None = None,
    num_simulations: int = 2000,
    num_draws: int = 99,
    level: float = 0.05,
    seed: int = 0,
) -> Tarp:
    r"""Test the coverage of the guide over all units at once, on data that the model draws.

    For :math:`(z, x) \sim p(z, x)`, :math:`z_1, \dots, z_L \sim q(z|x)` and a reference point
    :math:`r(x)`, the rank of :math:`|z - r|` among :math:`|z_l - r|` is uniform for every r if
    :math:`q(z|x) = p(z|x)`. The share of ranks below :math:`\alpha (L + 1)` is the expected
    coverage of regions of level :math:`\alpha`. The reference point is a random linear function of
    x plus a random constant, so that a guide that is biased or ignores x fails.

    Distances are Euclidean in units of the prior standard deviations. Masked units do not count.

    Arguments:
        pair: any pair with ``template(n)`` and without global latents.
        context: the context tensors of a conditional pair; each simulation draws one of their rows.
        missing: the missing entries of rows of data, as in `calibration`.
        num_simulations: number of simulated data, at least 100.
        num_draws: L for each simulated datum, at least 19.
        level: the probability that an exact guide is rejected.
        seed: random seed.

    `calibration` ranks units one by one and says which is wrong; this test sees them jointly.

    Raises `UsageError` for global latents, and if the model cannot simulate data.
    Lemos et al., 2023 (https://arxiv.org/abs/2302.03026).

    >>> from pyro_vae.models.exact import linear_gaussian
    >>> tarp(linear_gaussian(spread=0.5), num_simulations=500).words
    'draws are too narrow'
    """
    for name, value, least in (
        ("num_simulations", num_simulations, 100),
        ("num_draws", num_draws, 19),
    ):
        if value < least:
            raise UsageError(f"must be at least {least}, got {value}", argument=name)
    if not 0 < level < 1:
        raise UsageError(f"must be between 0 and 1, got {level}", argument="level")
    given = tuple(
        as_tensor(part, f"context {i}") for i, part in enumerate(each_context(context), 1)
    )
    with using(pair, seed):
        made = SimulatedRows(pair, num_simulations, given, "tarp", missing)
        rows = made.guide(num_draws)
        center, scale = made.truth[0].mean(0), made.truth[0].std(0).clamp(min=SMALLEST)
        reference = center + scale * _references(rows, len(center))
        near, truly = (
            torch.where(rows.counts, (z - reference) / scale, 0.0).square().sum(-1)
            for z in (rows.values, made.truth)
        )
        ranks = ranks_of(near[..., None], truly.T)[:, 0]
    return Tarp(ranks, num_draws, level)


def _references(rows: GuideRows, units: int) -> Tensor:
    """A reference point for each datum, in units of the prior scale, (n, units)."""
    x = (rows.x - rows.x.mean(0)) / rows.x.std(0).clamp(min=SMALLEST)
    projected = x @ torch.randn(x.shape[1], units, dtype=torch.float64)
    projected = projected / projected.std(0).clamp(min=SMALLEST)
    return projected + torch.randn(units, dtype=torch.float64)

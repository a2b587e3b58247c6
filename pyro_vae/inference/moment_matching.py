"""Moment matching: draws of the guide are moved and stretched until their weights are reliable.

A map z to a + b z of the draws of each row has a known density, so that any map gives valid
importance weights. The map is found from weighted moments of the draws. Paananen, Piironen, Bürkner
& Vehtari, Implicitly adaptive importance sampling, Statistics and Computing 31, 2021.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.errors import UsageError
from pyro_vae.inference.joint import CIRCULAR
from pyro_vae.inference.weighted import steady_shape
from pyro_vae.pairs.moments import support_of
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.particles import ParticleDraws, Particles

LIGHT_TAIL = 0.3
"""Draws are moved until the Pareto shape of their weights is below. Its error is about 0.1, so the
weights then have a variance (a shape below 1/2)."""

ROUNDS = 10
"""Rounds of moment matching. A round moves draws by up to three of their standard deviations."""

WIDEST_STEP = 2.0
"""The largest change of a scale in one round: scales from heavy-tailed weights are noisy."""


class RowMaps(NamedTuple):
    """A map z to loc + factor z of the draws of each row, by site, each (n, *shape)."""

    loc: dict[str, Tensor]
    factor: dict[str, Tensor]

    @staticmethod
    def identity(particles: Particles, drawn: ParticleDraws) -> "RowMaps":
        """The map that moves nothing; it has the sites whose values are all real numbers."""
        movable = {
            name: drawn.values[name][0]
            for name, site in particles.sites.items()
            if _is_real(site["fn"]) and not is_circular(site["fn"])
        }
        return RowMaps(
            {name: torch.zeros_like(value) for name, value in movable.items()},
            {name: torch.ones_like(value) for name, value in movable.items()},
        )

    @property
    def log_det(self) -> Tensor:
        """The log Jacobian determinant of each row."""
        logs = (
            factor.log().double().reshape(len(factor), -1).sum(1) for factor in self.factor.values()
        )
        return sum(logs, torch.zeros(()))

    def __call__(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values | {k: loc + self.factor[k] * values[k] for k, loc in self.loc.items()}

    def of(self, rows: Tensor) -> "RowMaps":
        """The maps of some rows."""
        return RowMaps(*({k: part[rows] for k, part in parts.items()} for parts in self))

    def put(self, rows: Tensor, other: "RowMaps") -> "RowMaps":
        """The maps with those of another for some rows."""
        both = zip(self, other, strict=True)
        return RowMaps(*({k: old[k].index_copy(0, rows, new[k]) for k in old} for old, new in both))

    def stepped(self, drawn: ParticleDraws, log_weights: Tensor, stretch: bool) -> "RowMaps":
        """The map followed by a move to the weighted mean, and to the weighted scale."""
        shares, values = log_weights.softmax(0), self(drawn.values)
        loc, factor = {}, {}
        for name in self.loc:
            z, counts = values[name], drawn.counts[name]
            w = shares.reshape(*shares.shape, *[1] * (z.dim() - 2)).to(z.dtype)
            mean, target, by = z.mean(0), (w * z).sum(0), torch.ones_like(z[0])
            if stretch:
                ratio = ((w * (z - target).square()).sum(0) / z.var(0)).sqrt()
                by = ratio.nan_to_num(1.0).clamp(1 / WIDEST_STEP, WIDEST_STEP)
            loc[name] = torch.where(counts, target + by * (self.loc[name] - mean), self.loc[name])
            factor[name] = torch.where(counts, by, 1.0) * self.factor[name]
        return RowMaps(loc, factor)


class Draws(NamedTuple):
    """Some rows of a batch with draws of the guide for each."""

    batch: Batch
    drawn: ParticleDraws

    def of(self, rows: Tensor) -> "Draws":
        """The draws of some of the rows."""
        values, counts, log_q = self.drawn
        return Draws(
            tuple(tensor[rows] for tensor in self.batch),
            ParticleDraws(
                {name: value[:, rows] for name, value in values.items()},
                {name: count[rows] for name, count in counts.items()},
                log_q[:, rows],
            ),
        )


def matched(
    particles: Particles, draws: Draws, light: float = LIGHT_TAIL
) -> tuple[RowMaps, Tensor]:
    """Find maps that move and stretch the draws of rows with heavy-tailed weights.

    Each step moves draws to their weighted mean, and stretches them to their weighted scale. A
    move is kept if it raises the ELBO of the draws, and a stretch if it lowers Pareto k.

    Draws are moved until the Pareto shape of their weights is at most ``light``.

    Returns the maps and the Pareto shapes of the weights before the moves, (n,).
    """
    found = RowMaps.identity(particles, draws.drawn)
    log_weights = weights(particles, found, draws)
    before = shape_of(log_weights)
    rows = (~(before <= light)).nonzero().flatten()
    for _ in range(ROUNDS if found.loc else 0):
        if not len(rows):
            break
        part, moved = draws.of(rows), torch.zeros_like(rows, dtype=torch.bool)
        for stretch in (False, True):
            old = log_weights[:, rows]
            step = found.of(rows).stepped(part.drawn, old, stretch)
            new = weights(particles, step, part)
            better = shape_of(new) < shape_of(old) if stretch else new.mean(0) > old.mean(0)
            found = found.put(rows[better], step.of(better.nonzero().flatten()))
            log_weights = log_weights.index_copy(1, rows[better], new[:, better])
            moved |= better
        heavy = ~(shape_of(log_weights[:, rows]) <= light)
        rows = rows[moved & heavy]
    return found, before


def weights(particles: Particles, of: RowMaps, draws: Draws) -> Tensor:
    """The log weights of draws that are mapped, of shape (K, n)."""
    values = of(draws.drawn.values)
    return particles.score(values, draws.batch).joint - draws.drawn.log_q + of.log_det


def shape_of(log_weights: Tensor) -> Tensor:
    """The Pareto shape of the weights of each row; 0 if only single-precision rounding differs."""
    return steady_shape(log_weights, torch.float32)


def is_circular(fn: Any) -> bool:
    """Whether the values of a distribution are angles."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, CIRCULAR)


def _is_real(fn: Any) -> bool:
    """Whether all real numbers are values."""
    try:
        support = support_of(fn)
    except UsageError:
        return False
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))

"""Draws of the guide at rows of data, as vectors, and at simulated data with their true latents."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.diagnostics.local_moments import Units
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import CELLS
from pyro_vae.inference.passes import in_chunks
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.particles import Particles
from pyro_vae.pairs.simulation import choose_rows, simulate

MOMENT_DRAWS = 64
"""Draws that give the guide's moments at a row; they are not used otherwise."""


class GuideRows(NamedTuple):
    """Draws of the guide at n rows, on the CPU in float64."""

    values: Tensor
    """Draws as vectors of the units, (draws, n, units)."""
    mean: Tensor
    """The mean of other draws, (n, units)."""
    scale: Tensor
    """The standard deviation of other draws, (n, units)."""
    counts: Tensor
    """Which units are not masked, (n, units)."""
    x: Tensor
    """The data as vectors, (n, entries), with 0 for missing entries."""


def guide_rows(particles: Particles, units: Units, batch: Batch, draws: int) -> GuideRows:
    """Draw from the guide, some rows at a time. Call this within `using`."""
    values, *rest = zip(*_parts(particles, units, batch, draws), strict=True)
    return GuideRows(torch.cat(values, 1), *map(torch.cat, rest))


def _parts(particles: Particles, units: Units, batch: Batch, draws: int) -> Iterator[GuideRows]:
    number = draws + MOMENT_DRAWS
    for part in in_chunks(batch, max(1, CELLS // (particles.widest * number))):
        drawn = particles.draw(number, part)
        z = units.vector(drawn.values).cpu()
        yield GuideRows(
            z[:draws],
            z[draws:].mean(0),
            z[draws:].std(0),
            units.counts(drawn.counts).cpu(),
            part[0].reshape(len(part[0]), -1).double().nan_to_num(0.0).cpu(),
        )


class SimulatedRows:
    """Data that the model draws, with their true latents as vectors.

    Arguments:
        pair: any pair with ``template(n)``.
        number: the number of simulated data.
        context: rows of context; each simulation draws one of them.
        tool: the name of the caller, for errors.
        missing: as in `calibration`.

    Call this within `using`. Raises `UsageError` for global latents, and if the guide and the model
    do not share a local latent with moments.
    """

    def __init__(
        self,
        pair: nn.Module,
        number: int,
        context: Batch,
        tool: str,
        missing: Tensor | None = None,
    ) -> None:
        self.batch, latents = simulate(pair, number, *choose_rows(number, context, missing))
        if names := global_latents(pair, self.batch):
            raise UsageError(f"{tool} needs a pair without global latents, got {', '.join(names)}")
        self.particles = Particles(pair, self.batch)
        self.units = Units(self.particles, self.batch, latents)
        if not self.units.names:
            raise UsageError(f"{tool} needs a local latent of both model and guide, with moments")
        data_first = self.particles.data_first
        known = {name: data_first(name, latents[name]) for name in self.units.circular}
        self.truth = self.units.vector(known).cpu()
        """The true latents, (1, number, units)."""

    def guide(self, draws: int) -> GuideRows:
        """Draws of the guide at the simulated data."""
        return guide_rows(self.particles, self.units, self.batch, draws)

"""Draws of the local latents of a pair, with their densities under model and guide."""

from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import Enumerate
from pyro_vae.errors import UsageError
from pyro_vae.pairs import masks
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.pair import Batch, Pair, Site
from pyro_vae.pairs.sites import latents, observed
from pyro_vae.pairs.traces import Given, trace
from pyro_vae.pairs.weights import draws_first, log_guide, log_joint, own_dims, structure

GLANCE = 500
"""Rows that are drawn to find the latents: sequences of one row may have fewer sites."""


class ParticleDraws(NamedTuple):
    """K draws of the guide for each of n rows."""

    values: dict[str, Tensor]
    """The draws of each local latent, of shape (K, n, *plates within a datum, *event)."""
    counts: dict[str, Tensor]
    """Whether an entry is not masked, of shape (n, *plates within a datum, *event)."""
    log_q: Tensor
    """log q(z | x) in float64, of shape (K, n)."""


class Scored(NamedTuple):
    """Densities of the model at given latents, in float64, each of shape (K, n)."""

    joint: Tensor
    """log p(x, z)."""
    prior: Tensor
    """log p(z)."""


class Particles:
    """Draws many latents for each row, in one pass if the pair allows it, else one by one.

    The guide draws every latent that it has, also those that are marked for enumeration. Latents
    that only the model has are summed out of the densities. Densities are conditional on global
    latents.

    Arguments:
        pair: any pair.
        batch: a prepared batch, whose first rows serve to find the latents.

    Call every method within `pyro_vae.pairs.scope.using`.
    """

    def __init__(self, pair: nn.Module, batch: Batch) -> None:
        self.pair = pair
        few, some = (tuple(tensor[:n] for tensor in batch) for n in (2, GLANCE))
        self.nesting, self.vectorized, self.widest = structure(pair, few)
        self.sites = _local(trace_guide(pair, some))
        self.right = {name: own_dims(site, self.nesting) for name, site in self.sites.items()}

    def draw(self, number: int, batch: Batch) -> ParticleDraws:
        """Draw from the guide."""
        parts = [self._drawn(size, batch) for size in self._blocks(number)]
        values = {name: torch.cat([part.values[name] for part in parts]) for name in self.sites}
        return ParticleDraws(values, parts[0].counts, torch.cat([part.log_q for part in parts]))

    def score(self, values: dict[str, Tensor], batch: Batch) -> Scored:
        """The densities of the model at these latents, which have the shapes of `draw`."""
        sizes = self._blocks(len(next(iter(values.values()))))
        split = {name: value.split(sizes) for name, value in values.items()}
        parts = [
            self._scored({name: some[i] for name, some in split.items()}, size, batch)
            for i, size in enumerate(sizes)
        ]
        return Scored(*map(torch.cat, zip(*parts, strict=True)))

    def _blocks(self, number: int) -> list[int]:
        return [number] if self.vectorized else [1] * number

    def _plate(self, size: int) -> Any:
        if not self.vectorized:
            return nullcontext()
        return pyro.plate("particles", size, dim=-1 - self.nesting)

    def _drawn(self, size: int, batch: Batch) -> ParticleDraws:
        with self._plate(size):
            guide = trace_guide(self.pair, batch)
        sites = _local(guide)
        if sites.keys() != self.sites.keys():
            raise UsageError(
                f"the guide draws the sites {', '.join(sites)} for some rows and "
                f"{', '.join(self.sites)} for others: draw all sites for every row, and mask them"
            )
        values = {name: self.data_first(name, site["value"]) for name, site in sites.items()}
        counts = {
            name: self.data_first(name, masks.scored(site).expand(site["value"].shape))[0]
            for name, site in sites.items()
        }
        log_q = self._rows(log_guide(guide, self.vectorized), size, batch)
        return ParticleDraws(values, counts, log_q)

    def _scored(self, values: dict[str, Tensor], size: int, batch: Batch) -> Scored:
        given = {name: self._placed(name, value) for name, value in values.items()}
        first = -1 - self.nesting - self.vectorized
        with self._plate(size), Enumerate(first_available_dim=first), Given(given):
            model = trace(cast(Pair, self.pair).model, batch)
        prior = model.copy()
        for name in observed(model):
            prior.remove_node(name)
        return Scored(
            *(self._rows(log_joint(part, self.vectorized), size, batch) for part in (model, prior))
        )

    def _rows(self, density: Tensor, size: int, batch: Batch) -> Tensor:
        return density.double().expand(size, len(batch[0]))

    def data_first(self, name: str, value: Tensor) -> Tensor:
        """Move a value from the layout of the pair to (draws, n, *plates, *event)."""
        return draws_first(value, self.right[name], self._event_dim(name))

    def _placed(self, name: str, value: Tensor) -> Tensor:
        """Move a value back to the layout of the pair."""
        value = value.movedim(1, -1 - self._event_dim(name))
        if not self.vectorized:
            return value[0]
        ones = (1,) * (self.nesting + self._event_dim(name) - self.right[name])
        return value.reshape(len(value), *ones, *value.shape[1:])

    def _event_dim(self, name: str) -> int:
        return cast(int, self.sites[name]["fn"].event_dim)


def _local(guide: Trace) -> dict[str, Site]:
    return {name: site for name, site in latents(guide).items() if is_local(site)}

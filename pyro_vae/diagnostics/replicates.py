"""Replicates of data: latents from the posterior, the guide or the prior, and data given them."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError, nearest
from pyro_vae.inference.pareto import threshold
from pyro_vae.inference.passes import ROWS_AT_ONCE, latent_values, observation
from pyro_vae.inference.weighted import Weighted, steady_shape, weighted_parts
from pyro_vae.pairs import masks
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.given_globals import GivenGlobals, draw_globals
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents as latents_of
from pyro_vae.pairs.weights import structure

RESAMPLED, GUIDE, PRIOR = "resampled", "guide", "prior"

STEADY = 0.99
"""Weights with a larger relative effective sample size hardly vary: the shape of their tail has no
effect."""

GLOBAL_SHARE = 10
"""With global latents, each replicate has its own weighted draws: this fraction of their number."""


class Replicated(NamedTuple):
    """What was measured on replicates of n rows."""

    measured: Tensor
    """Of shape (replicates, n, statistics)."""
    pareto_k: Tensor
    """The Pareto shape of the weights of each row, (n,); 0 if latents are not resampled."""
    unreliable: Tensor
    """Whether the weights of a row are unreliable, booleans (n,)."""


class Replicator(NamedTuple):
    """How replicates are drawn."""

    latents: str
    number: int
    num_samples: int
    measure: Callable[[Tensor], Tensor]
    """From data (rows, *data_shape) to statistics (rows, statistics)."""

    def __call__(self, pair: nn.Module, batch: Batch) -> Replicated:
        """Draw replicates of a prepared batch, and measure them."""
        names = global_latents(pair, batch)
        if self.latents == RESAMPLED and names:
            return self._given_each_global(pair, batch, names)
        if self.latents == RESAMPLED:
            return self._resampled(pair, batch, self.number, self.num_samples)
        # Each replicate of the whole data set has its own draw of the global latents.
        measured = torch.cat([self._plain(pair, wide) for wide in self._wide(batch, bool(names))])
        nothing = torch.zeros(len(batch[0]))
        return Replicated(measured.unflatten(0, (self.number, -1)), nothing, nothing.bool())

    def _wide(self, batch: Batch, shared: bool) -> Iterator[Batch]:
        """The batch, repeated for each replicate: as many times as fit into one pass."""
        together = 1 if shared else max(1, ROWS_AT_ONCE // len(batch[0]))
        for start in range(0, self.number, together):
            yield _repeated(batch, min(together, self.number - start))

    def _plain(self, pair: nn.Module, wide: Batch) -> Tensor:
        values = latent_values(pair, wide, False) if self.latents == GUIDE else {}
        return self._measured(pair, wide, values)

    def _measured(self, pair: nn.Module, wide: Batch, values: Mapping[str, Tensor]) -> Tensor:
        return self.measure(masks.seen(observation(pair, wide, values), wide[0]))

    def _resampled(
        self, pair: nn.Module, batch: Batch, number: int, num_samples: int
    ) -> Replicated:
        parts, weights = [], []
        for part in weighted_parts(pair, batch, num_samples):
            parts.append(self._chosen(pair, part, number))
            weights.append(part.log_weights)
        return _judged(torch.cat(parts, 1), torch.cat(weights, 1), batch)

    def _chosen(self, pair: nn.Module, part: Weighted, number: int) -> Tensor:
        """Measure replicates whose latents are draws of the guide, chosen by their weights."""
        n = part.log_weights.shape[1]
        chosen = torch.multinomial(part.shares.T, number, replacement=True).T * n
        rows = chosen + torch.arange(n, device=chosen.device)
        site_rows = len(part.batch[0])
        found = []
        for some in rows.split(max(1, ROWS_AT_ONCE // n)):
            index = some.flatten()
            values = {
                name: value[index] if len(value) == site_rows else value
                for name, value in part.values.items()
            }
            wide = tuple(tensor[index] for tensor in part.batch)
            found.append(self._measured(pair, wide, values).unflatten(0, some.shape))
        return torch.cat(found)

    def _given_each_global(self, pair: nn.Module, batch: Batch, names: list[str]) -> Replicated:
        """Draw each replicate of all rows given its own draw of the global latents."""
        held = GivenGlobals(pair, draw_globals(pair, batch, names))
        num_samples = max(2, self.num_samples // GLOBAL_SHARE)
        parts, weights = [], []
        for _ in range(self.number):
            held.hold(draw_globals(pair, batch, names))
            some = [
                (self._chosen(held, part, 1), part.log_weights)
                for part in weighted_parts(held, batch, num_samples)
            ]
            measured, weighed = (torch.cat(column, 1) for column in zip(*some, strict=True))
            parts.append(measured)
            weights.append(weighed - weighed.logsumexp(0))
        return _judged(torch.cat(parts), torch.cat(weights), batch)


def _judged(measured: Tensor, log_weights: Tensor, batch: Batch) -> Replicated:
    shares = log_weights.softmax(0)
    varies = 1 / shares.square().sum(0) < STEADY * len(shares)
    k = steady_shape(log_weights, batch[0].dtype).cpu()
    return Replicated(measured, k, ~(k <= threshold(len(shares))) & varies.cpu())


def _repeated(batch: Batch, times: int) -> Batch:
    return tuple(tensor.repeat(times, *[1] * (tensor.dim() - 1)) for tensor in batch)


def latents_to_use(pair: nn.Module, few: Batch, latents: str | None) -> str:
    """Return the source of latents. The default is the posterior if weights are defined.

    Raises `UsageError` for an unknown name.
    """
    known = (RESAMPLED, GUIDE, PRIOR)
    if latents is not None and latents not in known:
        raise UsageError(
            f"unknown source '{latents}'; {nearest(latents, known)}", argument="latents"
        )
    if latents is not None:
        return latents
    with using(pair, seed=0):
        try:
            structure(pair, few)
        except UsageError:
            return GUIDE
        drawn = latents_of(trace_guide(pair, few))
    return RESAMPLED if any(map(is_local, drawn.values())) else GUIDE

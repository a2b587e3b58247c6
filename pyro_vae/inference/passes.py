"""One pass through a fitted pair: prepare rows, set or draw latents, observe data."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.data import group_numbers
from pyro_vae.data.preparation import held_out, preparation
from pyro_vae.data.sources import Rows, source
from pyro_vae.errors import UsageError
from pyro_vae.pairs import masks, summing
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.data_plate_search import find_places
from pyro_vae.pairs.given_globals import POOLED_ROWS, pools, spread_rows
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import unconditioned
from pyro_vae.pairs.moments import typical
from pyro_vae.pairs.pair import Batch, Site
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.simulation import simulate
from pyro_vae.pairs.sites import data_first, data_site, latents
from pyro_vae.pairs.traces import DataFirst, Means, trace

ROWS_AT_ONCE = 1000
"""Number of rows in one pass through a pair."""

DRAWS = 10
"""Draws of the other latents over which the posterior of a discrete latent is averaged."""


def generate(
    pair: nn.Module, batch: Batch, values: Mapping[str, Tensor], means: bool, site: str | None
) -> Tensor:
    """Return the mean (the mode for classes) or a draw of the data; missing latents are drawn."""
    found = observation(pair, batch, values, site)
    value = typical(found["fn"]) if means else found["value"]
    return data_first(value, found).detach()


class HiddenDrawn(DataFirst):
    """`DataFirst`, but entries of latents that a mask hides are drawn from the model.

    Such an entry has no posterior of its own. The guide's draw of it may be any number.
    """

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values:
            counts = masks.scored(msg)
            if not bool(counts.all()):
                msg["value"] = torch.where(counts, msg["value"], msg["fn"]())


def observation(
    pair: nn.Module,
    batch: Batch,
    values: Mapping[str, Tensor],
    site: str | None = None,
    given: type[DataFirst] = DataFirst,
) -> Site:
    """Return the data site of the unconditioned model; latents are given (data first) or drawn."""
    find_places(pair, batch)
    with given(dict(values)):
        traced = trace(unconditioned(pair), batch)
    for name in values:
        if name not in traced.nodes:
            raise UsageError(f"the model has no site '{name}'")
    return data_site(traced, site)


def latent_values(pair: nn.Module, batch: Batch, means: bool) -> dict[str, Tensor]:
    """Return the guide's means or draws; those of local latents have shape (n, ...)."""
    guide = guide_of(pair, batch, means)
    values = {
        name: data_first(site["value"], site) if is_local(site) else site["value"]
        for name, site in latents(guide).items()
    }
    return values | summed_out(pair, batch, guide, means)


def guide_of(pair: nn.Module, batch: Batch, means: bool) -> Trace:
    with Means() if means else nullcontext():
        return trace_guide(pair, batch)


def summed_out(pair: nn.Module, batch: Batch, guide: Trace, means: bool) -> dict[str, Tensor]:
    return summing.summed_values(pair, batch, guide, DRAWS, draw=not means)


def prepared_batches(
    pair: nn.Module, x: Rows, context: Sequence[Any], binarize: str, at_once: bool = False
) -> Iterator[Batch]:
    """Prepared batches of the rows; one batch if the guide of a global latent pools all rows."""
    rows = source(x, context, pair)
    rows, prepare = held_out(rows, preparation(pair, rows, binarize))
    with using(pair, 0), pyro.validation_enabled(False):
        masks.require_present(pair, prepare(rows.first(2)))
    if len(rows) > ROWS_AT_ONCE and not at_once:
        with using(pair, seed=0):
            at_once = pools(pair, prepare(rows.first(POOLED_ROWS)))
    for batch in rows.batches(len(rows) if at_once else ROWS_AT_ONCE):
        yield prepare(batch)


def in_chunks(batch: Batch, size: int) -> Iterator[Batch]:
    return zip(*(tensor.split(size) for tensor in batch), strict=True)


def require_no_rows(pair: nn.Module, batch: Batch, names: Sequence[str], tool: str) -> None:
    """Raise `UsageError` if the guide needs rows for these global latents.

    The rows of a template have no meaning. To see whether the guide depends on them, it gets rows
    that the model draws. Call this function within `using`.
    """
    if not names:
        return
    n = len(batch[0])
    few = spread_rows(tuple(part[torch.arange(max(n, 16)) % n] for part in batch), 16)
    with suppress(UsageError):  # draws of x cannot always be written into a batch
        few, _ = simulate(pair, len(few[0]), few[1:])
    pooled = False
    with suppress(UsageError):  # some guides know their density only at their own draws
        pooled = pools(pair, few, names)
    if pooled:
        them = "it" if len(names) == 1 else "them"
        raise UsageError(
            f"the guide computes {', '.join(map(repr, names))} from the rows that it is given, but "
            f"{tool} has no rows: draw {them} by pyro_vae.posterior, and "
            "give a draw to pyro_vae.decode(..., means=False)"
        )


def require_known_groups(pair: nn.Module, batch: Batch) -> None:
    """Raise `UsageError` for a negative number of a group in the context of a template."""
    if fault := group_numbers.negative(pair, batch):
        raise UsageError(fault)

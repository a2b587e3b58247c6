"""Padding: entries of x that the model masks, such as the steps after the end of a sequence.

Their values must not count, whatever they are. Therefore values that no likelihood takes (NaN,
infinite, or outside the support) are replaced before the pair sees them.
"""

from collections.abc import Sequence
from contextlib import suppress

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.pairs import masks
from pyro_vae.pairs.arrays import as_context
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Site, placement
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import x_site

MASKED_ROWS = 1000
"""The number of rows in one pass through the pair."""


def without_padding(pair: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same rows, with a value of the support for each unusable entry of x that a mask hides.

    An unusable entry that counts stays, and the checks of the data report it.
    """
    x, *context = tensors
    if x.dtype == torch.bool or x.is_complex() or len(x) == 0:
        return [x, *context]
    finite = torch.isfinite(x)
    usable = torch.where(finite, x, torch.zeros_like(x))
    # A user's own code may raise anything; what runs the pair next explains it.
    with suppress(Exception), using(pair, 0), pyro.validation_enabled(False):
        site = _site(pair, tuple(part[:2] for part in (usable, *context)))
        # 8-bit pixels are in the support only after their conversion.
        masked = masks.is_masked(site) and x.dtype != torch.uint8
        if not masked and not hasattr(site["fn"], "counted"):
            return [x, *context]
        columns = zip(*(part.split(MASKED_ROWS) for part in (usable, *context)), strict=True)
        found = [_faults(pair, batch) for batch in columns]
        hidden, outside = (torch.cat(part).to(x.device) for part in zip(*found, strict=True))
        good = x[finite & ~outside]
        inside = good[good.abs().argmin()] if len(good) else x.new_zeros(())
        return [torch.where(hidden & (outside | ~finite), inside, x), *context]
    return [x, *context]


def _faults(pair: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Which entries of x are hidden by a mask, and which are outside the support."""
    site = _site(pair, batch)
    hidden = masks.seen({**site, "value": torch.zeros_like(site["value"])}, batch[0]).isnan()
    support, value = site["fn"].support, site["value"]
    after_the_end = torch.zeros_like(hidden)
    if hasattr(site["fn"], "counted"):  # the end of a sequence of tokens
        after_the_end = ~site["fn"].counted(value).reshape(hidden.shape)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    outside = ~support.check(value) if support.event_dim == 0 else torch.zeros_like(hidden)
    outside = outside.movedim(outside.dim() - 1 - site["fn"].event_dim, 0)
    # Tokens after the end may be any tokens; all become 0, as in replicates of the data.
    return hidden | after_the_end, outside.reshape(batch[0].shape) | after_the_end


def _site(pair: nn.Module, batch: Batch) -> Site:
    """The site that observes x, for a pair that takes floats or integers."""
    device, dtype = placement(pair)
    x, *context = (part.to(device).clone() for part in batch)  # a program may change them
    context = [as_context(part, dtype) for part in context]

    def site(x: Tensor) -> Site:
        placed = (x, *context)
        return x_site(trace_model(pair, placed, trace_guide(pair, placed)))

    try:
        return site(x.to(dtype))
    except Exception:
        if x.is_floating_point():
            raise
        return site(x.long())

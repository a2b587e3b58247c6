"""Missing entries (NaN) of x: whether a pair leaves them out, and rows without any other entry."""

from collections.abc import Sequence

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.pairs import masks
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, placement
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import observed

FEW = 16
"""The number of rows on which the pair is run."""


def fault(pair: nn.Module, batch: Sequence[Tensor], start: int | None = None) -> str | None:
    """Say why a pair cannot use the missing entries of x; None if it can, or if x has none.

    Arguments:
        batch: x and its context, before they are prepared.
        start: the number of the first row of a minibatch in its epoch.
    """
    x = batch[0]
    if not x.is_floating_point() or not bool(x.isnan().any()):
        return None
    missing = x.reshape(len(x), -1).isnan()
    some, empty = (part.nonzero().flatten() for part in (missing.any(1), missing.all(1)))
    of = "" if start is None else " of the epoch"
    if not masks.scores_missing(pair, _taken(pair, batch, some)):
        return (
            "x holds values that are not finite (NaN or infinite), first in row "
            f"{(start or 0) + int(some[0])}{of}; for NaN as a missing entry, use a likelihood that "
            "leaves it out, such as pyro_vae.Missing(pyro_vae.Gaussian) or pyro_vae.Columns"
        )
    if len(empty) and not _observes_more(pair, _taken(pair, batch, empty)):
        return (
            f"x has no observed entry in row {(start or 0) + int(empty[0])}{of}: remove rows that "
            "are all NaN"
        )
    return None


def _taken(pair: nn.Module, batch: Sequence[Tensor], rows: Tensor) -> Batch:
    """A few of these rows, on the device and in the type of the pair."""
    device, dtype = placement(pair)
    few = [tensor[rows[:FEW]].to(device) for tensor in batch]
    return tuple(part.to(dtype) if part.is_floating_point() else part for part in few)


def _observes_more(pair: nn.Module, batch: Batch) -> bool:
    """Whether the model observes something in rows without an entry of x, such as the mask."""
    with using(pair, seed=0), pyro.validation_enabled(False), torch.no_grad():
        model = trace_model(pair, batch, trace_guide(pair, batch))
        return any(bool(masks.scored(site).any()) for site in observed(model).values())

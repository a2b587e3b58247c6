"""Missing entries (NaN) of x: whether a pair leaves them out, and rows without any other entry."""

from collections.abc import Sequence

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.pairs import masks
from pyro_vae.pairs.arrays import as_context
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, placement
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import observed

FEW = 16
"""The number of rows on which the pair is run."""


def unserved(pair: nn.Module, batch: Sequence[Tensor], start: int | None = None) -> str | None:
    """Say that the pair would score the missing entries of x; None if it leaves them out.

    Arguments:
        batch: x and its context, before they are prepared.
        start: the number of the first row of a minibatch in its epoch.
    """
    found = rows(batch[0])
    if not len(found):
        return None
    few = taken(pair, batch, found)
    if masks.scores_missing(pair, few) or masks.fails(pair, (few[0].nan_to_num(), *few[1:])):
        return None  # if the pair fails without missing entries, too, the tool says why
    return (
        "x holds values that are not finite (NaN or infinite), first in "
        f"{_name(found, start)}; for NaN as a missing entry, use a likelihood that leaves it out, "
        "such as pyro_vae.Missing(pyro_vae.Gaussian) or pyro_vae.Columns"
    )


def unseen(pair: nn.Module, batch: Sequence[Tensor], start: int | None = None) -> str | None:
    """Say that a row of x is all NaN; None if no row is, or if the model observes more than x."""
    found = rows(batch[0], every=True)
    if not len(found) or _observes_more(pair, taken(pair, batch, found)):
        return None
    return f"x has no observed entry in {_name(found, start)}: remove rows that are all NaN"


def rows(x: Tensor, every: bool = False) -> Tensor:
    """The numbers of the rows in which an entry, or every entry, is missing."""
    if not x.is_floating_point():
        return torch.arange(0)
    missing = x.reshape(len(x), -1).isnan()
    return (missing.all(1) if every else missing.any(1)).nonzero().flatten()


def _name(found: Tensor, start: int | None) -> str:
    return f"row {(start or 0) + int(found[0])}{'' if start is None else ' of the epoch'}"


def taken(pair: nn.Module, batch: Sequence[Tensor], found: Tensor) -> Batch:
    """The first `FEW` of these rows, on the device and in the type of the pair."""
    device, dtype = placement(pair)
    return tuple(as_context(tensor[found[:FEW]].to(device), dtype) for tensor in batch)


def _observes_more(pair: nn.Module, batch: Batch) -> bool:
    """Whether the model observes something in rows without an entry of x, such as the mask."""
    with using(pair, seed=0), pyro.validation_enabled(False), torch.no_grad():
        model = trace_model(pair, batch, trace_guide(pair, batch))
        return any(bool(masks.scored(site).any()) for site in observed(model).values())

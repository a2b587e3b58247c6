"""Rows that are copies of other rows, and so no independent data."""

import torch
from torch import Tensor, nn

from pyro_vae.pairs.masks import missing_entries
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.simulation import simulate


def without_copies(pair: nn.Module, batch: Batch) -> Batch:
    """Return the rows of a batch without copies of earlier rows.

    All rows of whole numbers stay: equal rows of them may be what is frequent, such as blank
    pictures, and no copies. And if the model draws copies too, they are data. Call this within
    `using`. Raises `UsageError` if there are copies and the model cannot draw data.
    """
    kept = _once(batch)
    whole = bool((batch[0].isnan() | (batch[0] == batch[0].round())).all())
    if whole or len(kept) == len(batch[0]):
        return batch
    own, _ = simulate(pair, len(batch[0]), batch[1:], missing_entries(batch[0]))
    return tuple(part[kept] for part in batch) if len(_once(own)) == len(own[0]) else batch


def _once(batch: Batch) -> Tensor:
    """Return the indices of the rows without copies of earlier rows, in order."""
    flat = [part.reshape(len(part), -1).double().nan_to_num(torch.inf).cpu() for part in batch]
    _, which = torch.cat(flat, 1).unique(dim=0, return_inverse=True)
    order = which.argsort(stable=True)
    first = torch.cat([torch.tensor([True]), which[order].diff() > 0])
    return order[first].sort().values.to(batch[0].device)

"""Rows that are copies of other rows, and so no independent data."""

import numpy as np
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
    kept, x = _once(batch), batch[0].double()
    whole = bool((x.isnan() | (x == x.round())).all())
    if whole or len(kept) == len(x):
        return batch
    own, _ = simulate(pair, len(batch[0]), batch[1:], missing_entries(batch[0]))
    return tuple(part[kept] for part in batch) if len(_once(own)) == len(own[0]) else batch


def _once(batch: Batch) -> Tensor:
    """Return the indices of the rows without copies of earlier rows, in order."""
    flat = [part.reshape(len(part), -1).double().nan_to_num(torch.inf).cpu() for part in batch]
    _, first = np.unique(torch.cat(flat, 1).numpy(), axis=0, return_index=True)
    return torch.from_numpy(np.sort(first)).to(batch[0].device)

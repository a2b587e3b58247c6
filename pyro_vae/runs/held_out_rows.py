"""Record the data of a run, and check that held-out rows were not used in training.

config.json has a checksum of each part of the data set: train, validation and test. The file
rows.safetensors has a hash of 64 bits for each training and validation row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.data.disk import in_memory, sampled
from pyro_vae.errors import UsageError
from pyro_vae.runs import checksums
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder

if TYPE_CHECKING:
    from pyro_vae.data.split import Data, Split

PARTS = ("train", "validation", "test")

_FITTED: "WeakKeyDictionary[nn.Module, tuple[int, int]]" = WeakKeyDictionary()
"""The number of training rows of each pair, and the sum of their hashes, in any order."""


def split_checksums(data: "Data") -> dict[str, str]:
    """A checksum of each part of a data set: its rows in order, with labels, context and so on."""
    return {name: _checksum(getattr(data, name)) for name in PARTS}


def _checksum(split: "Split") -> str:
    held = {k: sampled(v) for k, v in split._asdict().items() if v is not None and k != "rows"}
    return checksums.fingerprint(held)


def changed_parts(recorded: Mapping[str, Any], data: "Data") -> list[str]:
    """The names of the parts of a data set that differ from the record of a run."""
    now = split_checksums(data)
    return [name for name in PARTS if recorded.get(name) != now[name]]


def require_split(run: Path, recorded: Mapping[str, Any], data: "Data") -> None:
    """Raise `UsageError` if the data have changed since the run was trained."""
    changed = changed_parts(recorded, data)
    if changed:
        raise UsageError(
            f"{data.name} has changed since {run} was trained: its {', '.join(changed)} rows "
            "differ, so its test rows may include rows that were used in training. Restore the "
            "data, or train again; evaluate and diagnose accept other data with --data"
        )


def row_hashes(x: Any) -> Tensor:
    """A hash of 64 bits for each row (n,); equal rows have equal hashes, whatever their type.

    >>> x = torch.tensor([[0, 1], [1, 1], [0, 1]])
    >>> hashes = row_hashes(x)
    >>> bool(hashes[0] == hashes[2]), bool(hashes[0] == hashes[1])
    (True, False)
    >>> torch.equal(hashes, row_hashes(x.double()))
    True
    """
    x = torch.as_tensor(x)
    width = x[:1].numel()
    # Multilinear hashing modulo 2**64 (Dietzfelbinger, 1996), once for each 32 bits of the hash.
    # The raw numbers of a bit generator are the same in every version of NumPy.
    factors = np.random.PCG64(0).random_raw(2 * width).reshape(2, width) | np.uint64(1)
    found = []
    for part in x.split(4096):
        rows = part.detach().cpu().float().reshape(len(part), width) + 0.0  # -0.0 is 0.0
        bits = np.ascontiguousarray(rows.numpy()).view(np.uint32).astype(np.uint64)
        high, low = ((bits * factor).sum(1, dtype=np.uint64) >> np.uint64(32) for factor in factors)
        found.append((high << np.uint64(32)) | low)
    return torch.from_numpy(np.concatenate(found).view(np.int64))


def write_rows(run: Path, parts: Mapping[str, Any]) -> None:
    """Record the hashes of the training and validation rows that are in memory."""
    held = {k: row_hashes(x) for k, x in parts.items() if in_memory(x)}
    if held:
        run_folder.write_tensors(run / run_files.ROWS, held)


def count_seen(run: Path, x: Tensor) -> int | None:
    """The number of rows that were used to train or validate a run; None without a record."""
    if not (run / run_files.ROWS).exists():
        return None
    known = torch.cat(list(run_folder.read_tensors(run / run_files.ROWS).values()))
    return int(torch.isin(row_hashes(x), known).sum())


def remember(pair: nn.Module, x: Any) -> None:
    """Remember the training rows of a pair, if they are in memory."""
    if in_memory(x):
        _FITTED[pair] = _sum(row_hashes(x))
    else:
        _FITTED.pop(pair, None)


def fitted_to(pair: nn.Module, x: Any) -> bool | None:
    """Whether a pair was fitted to exactly these rows, in any order; None if nobody knows."""
    if pair not in _FITTED or not in_memory(x):
        return None
    return _FITTED[pair] == _sum(row_hashes(x))


def _sum(hashes: Tensor) -> tuple[int, int]:
    return len(hashes), int(hashes.sum())

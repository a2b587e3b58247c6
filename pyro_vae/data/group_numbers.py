"""Negative numbers of groups: torch counts them from the last group, and pandas means no group."""

from collections.abc import Sequence

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.data.holes import taken
from pyro_vae.pairs.data_plate import in_data_plate
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import log_prob, sample_sites


def negative(pair: nn.Module, batch: Sequence[Tensor]) -> str | None:
    """Say that a negative number in the context serves as the number of a group, or return None.

    A number is that of a group if the pair gives the same densities for the number that counts
    from the last group, and others for another group. So a covariate below 0, and a -1 that the
    pair masks, stay.

    Arguments:
        batch: x and its context, before they are prepared.
    """
    for i, values in enumerate(batch[1:], 1):
        if values.is_floating_point() or not values.dtype.is_signed or not values.numel():
            continue  # torch does not compare unsigned integers of 16 bits and more
        rows = (values.reshape(len(values), -1) < 0).any(1).nonzero().flatten()
        if len(rows) and (size := _indexed(pair, taken(pair, batch, rows), i)):
            row = int(rows[0])
            return (
                f"context {i} numbers one of {size} groups, from 0, and holds "
                f"{int(values[row].min())} in row {row} (pandas gives -1 to a missing or unknown "
                "category): remove these rows, or see the section 'New groups' of the page 'Global "
                "and group latents'"
            )
    return None


def _indexed(pair: nn.Module, batch: Batch, i: int) -> int:
    """The number of groups of which context i, which has negative numbers, is the number, or 0."""
    found, sizes = _densities(pair, batch)
    for size in sizes:
        if size < 2 or int(batch[i].min()) < -size:
            continue
        from_last, another = (
            _densities(pair, (*batch[:i], _moved(batch[i], size, by), *batch[i + 1 :]))[0]
            for by in (0, 1)
        )
        if _equal(found, from_last) and not _equal(found, another):
            return size
    return 0


def _moved(values: Tensor, size: int, by: int) -> Tensor:
    return torch.where(values < 0, (values + size + by) % size, values)


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    if not left or len(left) != len(right):  # the pair fails for one of them, or branches
        return False
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def _densities(pair: nn.Module, batch: Batch) -> tuple[list[Tensor], set[int]]:
    """The log densities of all sites, and the sizes of the plates of groups; empty if it fails."""
    try:
        with using(pair, seed=0), pyro.validation_enabled(False):
            guide = trace_guide(pair, batch)
            model = trace_model(pair, batch, guide)
            sites = [*sample_sites(guide).values(), *sample_sites(model).values()]
            frames = [frame for site in sites for frame in site["cond_indep_stack"]]
            groups = {f.size for f in frames if f.vectorized and not in_data_plate(f)}
            return [log_prob(site) for site in sites], groups
    except Exception:  # the code of a user may raise anything; the tool itself shows it
        return [], set()

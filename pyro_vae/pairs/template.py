"""Batches of a pair that are made without data, from its template."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.pairs import data_plate
from pyro_vae.pairs.arrays import as_context, as_tensor
from pyro_vae.pairs.data_plate_search import find_places
from pyro_vae.pairs.pair import Batch, placement


def template(pair: nn.Module, n: int, context: Sequence[Tensor] = ()) -> Batch:
    """A batch of n rows from the pair's template; ``context`` replaces the template's context.

    Raises `UsageError` if the pair does not have a template, or if the number or the shapes of the
    context tensors are wrong.
    """
    if not hasattr(pair, "template"):
        raise UsageError(
            f"{type(pair).__name__} has no method template(n), which sampling without data needs: "
            "add one that returns a batch of n rows of the right shapes"
        )
    if isinstance(context, Tensor):
        context = (context,)
    device, dtype = placement(pair)
    x, *others = (tensor.to(device) for tensor in cast(Any, pair).template(n))
    x = x.to(dtype) if x.is_floating_point() else x
    batch = (x, *(as_context(tensor, dtype) for tensor in others))
    if not context and (len(batch) == 1 or missing_context(pair, 1) or _draws_all(pair, batch)):
        return batch
    if len(context) != len(batch) - 1:
        raise UsageError(
            f"{type(pair).__name__} needs {len(batch) - 1} context tensors, got {len(context)}"
        )
    placed = []
    for given, like in zip(context, batch[1:], strict=True):
        given = _as_type(as_tensor(given, "context"), like.dtype).to(like.device)
        wanted = (n, *like.shape[1:])
        if tuple(given.shape) not in (wanted, (1, *wanted[1:])):
            raise UsageError(
                f"context must have shape {wanted} ({n} rows of shape {wanted[1:]}) or a single "
                f"row, got shape {tuple(given.shape)}; convert labels to rows with "
                "pyro_vae.one_hot"
            )
        placed.append(given.expand(like.shape))
    return (batch[0], *placed)


def _as_type(given: Tensor, dtype: torch.dtype) -> Tensor:
    """Context in the type of the template's. Fractions are not cut off: 1.5 is not group 1."""
    found = given.to(dtype)
    if not dtype.is_floating_point and bool((other := found != given).any()):
        row = int(other.reshape(len(given), -1).any(1).nonzero()[0])
        raise UsageError(
            f"context must be of {dtype}, as that of the template, got "
            f"{given[row][other[row]].flatten()[0].item()} in row {row}"
        )
    return found


def _draws_all(pair: nn.Module, batch: Sequence[Tensor]) -> bool:
    """Whether the model observes every tensor of a batch and can therefore draw all of them."""
    find_places(pair, batch)
    found = data_plate.known(pair)
    return found is not None and set(found.observes.values()) == set(range(len(batch)))


def missing_context(pair: nn.Module, n: int) -> Batch:
    """The context of n rows with unknown labels; empty for a pair that needs known context.

    The pair accepts unknown labels if all context tensors of its template are negative integers.
    """
    if not hasattr(pair, "template"):
        return ()
    context = cast(Any, pair).template(1)[1:]
    missing = all(not part.is_floating_point() and bool((part < 0).all()) for part in context)
    return tuple(part.expand(n, *part.shape[1:]) for part in context) if missing else ()

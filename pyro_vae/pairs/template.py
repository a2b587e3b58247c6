"""Batches of a pair that are made without data."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.pairs import places
from pyro_vae.pairs.arrays import as_tensor
from pyro_vae.pairs.location import find_places
from pyro_vae.pairs.pair import Batch, placement


def template(pair: nn.Module, n: int, context: Sequence[Tensor] = ()) -> Batch:
    """A batch of n rows from the pair's template, with this context in place of the template's."""
    if not hasattr(pair, "template"):
        raise UsageError(
            f"{type(pair).__name__} has no method template(n), which returns a batch of n rows "
            "of the right shapes; sampling without data needs it"
        )
    if isinstance(context, Tensor):
        context = (context,)
    device, dtype = placement(pair)
    batch = tuple(
        tensor.to(device, dtype if tensor.is_floating_point() else None)
        for tensor in cast(Any, pair).template(n)
    )
    if not context and (len(batch) == 1 or missing_context(pair, 1) or _draws_all(pair, batch)):
        return batch
    if len(context) != len(batch) - 1:
        raise UsageError(
            f"{type(pair).__name__} takes {len(batch) - 1} context tensors, {len(context)} came"
        )
    placed = []
    for given, like in zip(context, batch[1:], strict=True):
        given = as_tensor(given, "context").to(like.device, like.dtype)
        wanted = (n, *like.shape[1:])
        if tuple(given.shape) not in (wanted, (1, *wanted[1:])):
            raise UsageError(
                f"context of shape {wanted} ({n} rows, or one for all, of shape {wanted[1:]}) is "
                f"expected, a tensor of shape {tuple(given.shape)} came; labels become rows by "
                "pyro_vae.one_hot"
            )
        placed.append(given.expand(like.shape))
    return (batch[0], *placed)


def _draws_all(pair: nn.Module, batch: Sequence[Tensor]) -> bool:
    """Whether the model observes every tensor of a batch, and so can draw them all."""
    find_places(pair, batch)
    found = places.known(pair)
    return found is not None and set(found.observes.values()) == set(range(len(batch)))


def missing_context(pair: nn.Module, n: int) -> Batch:
    """The context of n rows of which nothing is known, for a pair that needs none.

    Labels say: a pair whose template gives negative whole numbers alone takes those for missing.
    """
    if not hasattr(pair, "template"):
        return ()
    context = cast(Any, pair).template(1)[1:]
    missing = all(not part.is_floating_point() and bool((part < 0).all()) for part in context)
    return tuple(part.expand(n, *part.shape[1:]) for part in context) if missing else ()

"""Only one thread at a time may fit a pair."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pyro_vae.errors import UsageError
from pyro_vae.pairs import rng
from pyro_vae.pairs.scope import scope

_FITTED: set[int] = set()
"""Ids of the tensors of all pairs that threads of this process fit at the moment."""


def require_free(pair: nn.Module) -> None:
    """Raise `UsageError` if another thread fits the pair or a part of it."""
    if not _FITTED.isdisjoint(map(id, (*pair.parameters(), *pair.buffers()))):
        raise UsageError(
            f"another thread is fitting this {type(pair).__name__} or a part of it; wait until it "
            "ends, or fit a copy"
        )


@contextmanager
def claimed(pair: nn.Module) -> Iterator[None]:
    """Prevent other threads from fitting the pair."""
    tensors = set(map(id, (*pair.parameters(), *pair.buffers())))
    _FITTED.update(tensors)
    try:
        yield
    finally:
        _FITTED.difference_update(tensors)


@contextmanager
def own_state(pair: nn.Module) -> Iterator[None]:
    """Give a run its own parameter store, generators and warning filters.

    These belong to the process. They return to the caller afterwards.
    """
    with scope(pair), rng.kept(), warnings.catch_warnings():
        # The library reports a loss that is not finite itself, with the name of the site.
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield

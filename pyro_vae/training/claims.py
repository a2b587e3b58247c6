"""A pair that is fitted belongs to one thread meanwhile."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pyro_vae.errors import UsageError
from pyro_vae.pairs import rng
from pyro_vae.pairs.scope import scope

_FITTED: set[int] = set()
"""The tensors of the pairs that threads of this process are fitting."""


def require_free(pair: nn.Module) -> None:
    """Refuse a pair that another thread is fitting, in whole or in part."""
    if not _FITTED.isdisjoint(map(id, (*pair.parameters(), *pair.buffers()))):
        raise UsageError(
            f"another thread is fitting this {type(pair).__name__}, or a part of it: wait until it "
            "ends, or fit a copy"
        )


@contextmanager
def claimed(pair: nn.Module) -> Iterator[None]:
    """Let no other thread fit the pair meanwhile."""
    tensors = set(map(id, (*pair.parameters(), *pair.buffers())))
    _FITTED.update(tensors)
    try:
        yield
    finally:
        _FITTED.difference_update(tensors)


@contextmanager
def own_state(pair: nn.Module) -> Iterator[None]:
    """What is the process's, not the thread's, and belongs to a run while it trains."""
    with scope(pair), rng.kept(), warnings.catch_warnings():
        # The library says itself where a loss is not finite, with the site's name.
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield

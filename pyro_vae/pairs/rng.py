"""Random generators: seed, save and restore them."""

import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pyro_vae.errors import UsageError
from pyro_vae.pairs.threads import alone


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator (torch on all devices, NumPy, Python) and restore it afterwards.

    Other threads that run a pair or seed the generators wait in the meantime.

    >>> import torch
    >>> with seeded(1):
    ...     a = torch.rand(())
    >>> with seeded(1):
    ...     b = torch.rand(())
    >>> bool(a == b)
    True
    """
    require_seed(seed)
    with kept():
        _seed_torch(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def _seed_torch(seed: int) -> None:
    """Seed torch's generators on all devices.

    For each kind of device that this process has not used, ``torch.manual_seed`` keeps the stack
    of its caller in text. That takes 0.3 to 1.2 ms, longer than many a pass of a small pair. A
    machine without an accelerator has only one generator.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def derived(seed: int, what: str, number: int) -> int:
    """A seed for one of several independent streams of draws; number 0 keeps the seed itself.

    >>> derived(5, "process", 0), derived(5, "process", 1) == derived(5, "process", 2)
    (5, False)
    """
    if number == 0:
        return seed
    words = [seed, number, *what.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


_END = object()


def apart(items: Iterator[Any], seed: int) -> Iterator[Any]:
    """The items of an iterator, whose draws use generators of their own.

    The items of a loader may draw, and so does the start of a loader. They do not change the
    generators of the caller, and the same seed gives the same items again.
    """
    with seeded(seed):
        own = state()
    while True:
        with kept():
            restore(own)
            item = next(items, _END)
            own = state()
        if item is _END:
            return
        yield item


def require_seed(seed: Any) -> None:
    """Raise `UsageError` for a seed that torch's generators do not take."""
    try:
        sound = 0 <= operator.index(seed) < 2**63
    except TypeError:
        sound = False
    if not sound:
        raise UsageError(f"must be a whole number from 0 to 2^63 - 1, got {seed}", argument="seed")


@contextmanager
def kept() -> Iterator[None]:
    """Restore the state of every generator at the end of the block."""
    with alone():
        before = state()
        try:
            yield
        finally:
            restore(before)


def state() -> dict[str, Any]:
    """The state of every generator, in types that ``torch.load(weights_only=True)`` reads."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def is_state(saved: Any) -> bool:
    """Whether `restore` takes this value; the generators stay as they are."""
    try:
        with kept():
            restore(saved)
    except (TypeError, KeyError, ValueError, IndexError, AttributeError, RuntimeError):
        return False
    return True


def restore(saved: dict[str, Any]) -> None:
    """Restore a saved state of every generator."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"])
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))

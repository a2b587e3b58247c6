"""Random generators: seeded and given back, saved and restored."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pyro_vae.pairs.threads import alone


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator (torch on all devices, NumPy, Python) and give them back afterwards.

    Other threads that run a pair, or seed, wait meanwhile.

    >>> import torch
    >>> with seeded(1):
    ...     a = torch.rand(())
    >>> with seeded(1):
    ...     b = torch.rand(())
    >>> bool(a == b)
    True
    """
    with kept():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


@contextmanager
def kept() -> Iterator[None]:
    """Give every generator back as it was, whatever is drawn meanwhile."""
    with alone():
        before = state()
        try:
            yield
        finally:
            restore(before)


def state() -> dict[str, Any]:
    """The state of every generator, of types that ``torch.load(weights_only=True)`` reads."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def restore(saved: dict[str, Any]) -> None:
    """Put every generator back into a saved state."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"])
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))

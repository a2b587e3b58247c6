"""The floor of a measurement: bare matrix products, each by the fastest way that torch has."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_vae.training.products import PLAIN, PRODUCT


def fastest(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """Return the faster of MKL, MKL of the transposed matrices, and oneDNN for the product a b."""
    ways: list[Callable[[], Tensor]] = [lambda: torch.mm(a, b), lambda: torch.mm(b.t(), a.t())]
    if a.dtype == torch.float32 and a.device.type == "cpu":
        rows = a.contiguous()
        ways.append(lambda: PRODUCT(rows, b.t(), None, *PLAIN))
    return min(ways, key=seconds)


def seconds(run: Callable[[], Tensor]) -> float:
    found = []
    for _ in range(30):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def in_sequence(pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Return a function that computes the products, one after the other."""
    ways = [fastest(a, b) for a, b in pairs]

    def run() -> None:
        for way in ways:
            way()

    return run

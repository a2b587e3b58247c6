"""Comparison of a graph with the programs that it was made from."""

from math import isfinite
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyro_vae.errors import NotTraceable

Left: TypeAlias = list[tuple[Any, Tensor]]
"""What a run leaves: its results and the tensors of the pair, by name."""


def require_same(eager: Left, replayed: Left, tolerance: float) -> None:
    """Compare two runs. A graph may have further results, such as counts of values."""
    others = dict(replayed)
    norms = [value.double().norm().item() for _, value in eager]
    scale = max((norm for norm in norms if isfinite(norm)), default=0.0)
    for name, value in eager:
        if name not in others or not _close(value, others[name], tolerance, scale):
            raise NotTraceable(
                f"its graph gives other values than the pair (first in '{_in_words(name)}'): "
                "something that changes from call to call is not a tensor of the pair"
            )


def _in_words(name: Any) -> str:
    return " ".join(map(str, name)).strip() if isinstance(name, tuple) else str(name)


def _close(a: Tensor, b: Tensor, tolerance: float, scale: float) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    a, b = a[finite].double(), b[finite].double()
    return bool((a - b).norm() <= tolerance * (a.norm() + b.norm()) + 1e-6 * scale)

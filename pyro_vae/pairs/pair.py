"""The pair: an ``nn.Module`` with ``model`` and ``guide``, and its batches."""

from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError

Batch: TypeAlias = tuple[Tensor, ...]

Site: TypeAlias = Any


class Pair(Protocol):
    """An ``nn.Module`` with a generative model and an amortized guide, both Pyro programs.

    ``batch`` is a tuple of tensors: the data ``x``, then the context. Dimension 0 of each tensor is
    the minibatch. Local sites are in one ``pyro.plate("data", len(x), dim=-1)``. Every unobserved
    site of the model is also a site of the guide, or is enumerated.

    Two more methods are optional. ``template(n)`` returns a batch of n rows whose values have no
    meaning; sampling without data needs it. ``recipe(epochs)`` returns a dictionary with the
    default ``objective`` and ``beta`` of `pyro_vae.fit` for this pair.
    """

    def model(self, *batch: Tensor) -> Any: ...
    def guide(self, *batch: Tensor) -> Any: ...


def placement(pair: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and the floating-point type of a pair's parameters.

    Raises `UsageError` for a 16-bit type: in 16 bits, sums of log densities keep only three digits.
    """
    for tensor in (*pair.parameters(), *pair.buffers()):
        if tensor.is_floating_point():
            if tensor.dtype in (torch.float16, torch.bfloat16):
                raise UsageError(
                    f"the pair's parameters have type {tensor.dtype}, which is not precise enough "
                    "for log densities: call pair.float(); fit(..., precision='bfloat16') runs "
                    "only the networks in 16 bits"
                )
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()

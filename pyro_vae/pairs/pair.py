"""The pair: an ``nn.Module`` with ``model`` and ``guide``, and its batches."""

from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError

Batch: TypeAlias = tuple[Tensor, ...]

Site: TypeAlias = Any


class Pair(Protocol):
    """An ``nn.Module`` with a generative model and an amortised guide, both Pyro programs.

    ``batch`` is a tuple of tensors whose dimension 0 is the minibatch: the data ``x``, then
    context. Local sites sit in one ``pyro.plate("data", len(x), dim=-1)``. Every unobserved site
    of the model is a site of the guide. A pair that can be sampled without data also has
    ``template(n)``, which returns a batch of n rows whose values mean nothing. One that is best
    fitted in a way of its own may have ``recipe(epochs)``, which returns a dictionary with the
    ``objective`` and ``beta`` that `pyro_vae.fit` takes unless it is given others.
    """

    def model(self, *batch: Tensor) -> Any: ...
    def guide(self, *batch: Tensor) -> Any: ...


def placement(pair: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a pair's parameters are, and their floating-point type.

    Raises `UsageError` for a type of 16 bits, in which sums of log densities keep three digits.
    """
    for tensor in (*pair.parameters(), *pair.buffers()):
        if tensor.is_floating_point():
            if tensor.dtype in (torch.float16, torch.bfloat16):
                raise UsageError(
                    f"the pair's parameters are {tensor.dtype}, in which log densities lose their "
                    "digits: call pair.float(); fit(..., precision='bfloat16') runs its networks "
                    "in 16 bits"
                )
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()

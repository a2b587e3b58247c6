"""Build a pair only if its tensors fit into the memory."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pyro_vae.data.sizes import available_memory
from pyro_vae.errors import UsageError

_CREATE = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.empty_strided),
    *(torch.rand, torch.randn, torch.randint, torch.arange, torch.linspace),
}


class WithinMemory(TorchFunctionMode):
    """Raises `UsageError` before tensors are created that need more memory than is free.

    Arguments:
        what: the file or option that asks for the tensors.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.free, self.need = what, available_memory(), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CREATE:
            self.need += _size(func, args, kwargs)
            if self.need > self.free:
                raise UsageError(
                    f"{self.what} asks for a pair of at least {self.need / 2**30:.1f} GiB, but "
                    f"{self.free / 2**30:.1f} GiB of memory are free"
                )
        return func(*args, **kwargs)


def _size(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """The bytes of the new tensor, from the same call without memory."""
    try:
        new = func(*args, **kwargs | {"device": "meta"})
    except (TypeError, ValueError, RuntimeError):  # the real call raises it again
        return 0
    return int(new.numel() * new.element_size())

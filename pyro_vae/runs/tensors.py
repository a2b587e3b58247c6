"""The tensors of a pair: a copy, a checksum, and filling a pair with those of a file."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from pyro_vae.errors import UsageError


def state_dict(pair: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as detached copies on the CPU; one that parts share is there once."""
    return {name: value.detach().cpu().clone() for name, value in distinct(pair).items()}


def distinct(pair: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers themselves, each by its first name."""
    own = pair.state_dict(keep_vars=True)
    first = {id(value): name for name, value in reversed(own.items())}
    return {name: value for name, value in own.items() if first[id(value)] == name}


def fill(pair: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Overwrite a pair's tensors with those of a file, if they fit."""
    require_fit(pair, state, path)
    pair.load_state_dict(dict(state), strict=False)  # a tensor that parts share is there once


def require_fit(pair: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise `UsageError`, which names file and tensor, where a file's tensors do not fit a pair."""
    for name, value in distinct(pair).items():
        if name not in state:
            raise UsageError(f"{path} lacks tensor '{name}'")
        if state[name].shape != value.shape:
            raise UsageError(
                f"tensor '{name}' of {path} has shape {tuple(state[name].shape)}, the pair "
                f"expects {tuple(value.shape)}"
            )
        if state[name].dtype != value.dtype:
            raise UsageError(
                f"tensor '{name}' of {path} has type {state[name].dtype}, the pair expects "
                f"{value.dtype}"
            )
    own = pair.state_dict()
    extra = [name for name in state if name not in own]
    if extra:
        raise UsageError(f"{path} holds tensor '{extra[0]}', which the pair does not have")

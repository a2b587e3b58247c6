"""Copy the tensors of a pair, and fill a pair with the tensors of a file."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from pyro_vae.errors import UsageError


def state_dict(pair: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as detached copies on the CPU; a shared tensor occurs once."""
    return {name: value.detach().cpu().clone() for name, value in distinct(pair).items()}


def distinct(pair: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers themselves, each under its first name."""
    own = pair.state_dict(keep_vars=True)
    first = {id(value): name for name, value in reversed(own.items())}
    return {name: value for name, value in own.items() if first[id(value)] == name}


def fill(pair: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Overwrite the tensors of a pair with those of a file, if they fit."""
    require_fit(pair, state, path)
    pair.load_state_dict(dict(state), strict=False)  # a shared tensor occurs once


def require_fit(pair: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise `UsageError`, with file and tensor, if the tensors of a file do not fit a pair."""
    for name, value in distinct(pair).items():
        if name not in state:
            raise UsageError(f"{path} lacks tensor '{name}'")
        if state[name].shape != value.shape:
            raise UsageError(
                f"tensor '{name}' of {path} has shape {tuple(state[name].shape)} but the pair "
                f"expects {tuple(value.shape)}"
            )
        if state[name].dtype != value.dtype:
            raise UsageError(
                f"tensor '{name}' of {path} has type {state[name].dtype} but the pair expects "
                f"{value.dtype}"
            )
    own = pair.state_dict()
    extra = [name for name in state if name not in own]
    if extra:
        raise UsageError(
            f"{path} holds tensor '{extra[0]}', which the pair does not have: pass the class that "
            "was saved, or an instance that has run once if its programs make parameters"
        )

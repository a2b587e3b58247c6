"""Commands under torchrun: the first process prints and writes, and all share the work."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from pyro_vae.errors import UsageError

SHARED = ("train", "evaluate", "diagnose", "encode", "score", "impute")
"""The commands whose work several processes share."""


@contextmanager
def shared(command: str) -> Iterator[None]:
    """Join the processes that torchrun has started, if there are several.

    Raises `UsageError` for a command that runs in one process.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        yield
        return
    if command not in SHARED:
        raise UsageError(
            f"{command} runs in one process, so start it without torchrun; several processes can "
            f"share {', '.join(SHARED)}"
        )
    from torch import distributed

    _join()
    try:
        with _quiet(distributed.get_rank() > 0):
            yield
    finally:
        distributed.destroy_process_group()


def in_first(work: Callable[[], None]) -> None:
    """Do some work in the first process only; if it fails, the other processes end, too."""
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        work()
        return
    from pyro_vae.pairs.processes import here

    here().from_first(work)


def _join() -> None:
    """Join the process group: NCCL if each process of a node can have a GPU, else gloo."""
    import torch

    from pyro_vae.pairs.processes import join_processes

    place, beside = (int(os.environ.get(f"LOCAL_{name}") or 0) for name in ("RANK", "WORLD_SIZE"))
    gpus = torch.cuda.device_count() >= max(1, beside)
    if gpus:
        torch.cuda.set_device(place)
    join_processes("nccl" if gpus else "gloo", _timeout())


def _timeout() -> float:
    """The seconds that the processes wait for one that shows no sign of life."""
    from pyro_vae.pairs.waiting import PATIENCE

    given = os.environ.get("PYRO_VAE_TIMEOUT") or PATIENCE
    try:
        return float(given)
    except ValueError as error:
        raise UsageError(f"PYRO_VAE_TIMEOUT must be a number of seconds, got {given!r}") from error


@contextmanager
def _quiet(silent: bool) -> Iterator[None]:
    """Print neither results nor warnings, if the process is to be silent."""
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_elsewhere(error: Exception) -> bool:
    """Whether another process prints this error: all of them read the same command line."""
    if "torch" not in sys.modules:
        return int(os.environ.get("RANK") or 0) > 0
    module = sys.modules.get("pyro_vae.pairs.processes")
    return module is not None and isinstance(error, module.ElsewhereError)

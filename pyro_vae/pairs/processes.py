"""The processes that torchrun started for one task, and what they tell each other.

All processes run the same program on the same data, and each does a part of the work. Whatever one
of them tells the others is told in `Team.gather`. It also tells that a process failed, so that an
error of one process ends all of them, and no process waits forever.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs.waiting import LONGEST, PATIENCE, lost, meet, sign_of_life

T = TypeVar("T")


class ElsewhereError(UsageError):
    """Another process stopped with an error, which it reports itself."""


@dataclass(frozen=True)
class Team:
    """The processes that share a task, and the place of this process among them.

    >>> Team(rank=1, count=2).of(torch.arange(5))
    tensor([3, 4])
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def of(self, rows: Tensor) -> Tensor:
        """The rows of a minibatch that this process takes; the first process has the most."""
        n = len(rows)
        return rows[-(-n * self.rank // self.count) : -(-n * (self.rank + 1) // self.count)]

    def own(self, items: Iterable[T]) -> Iterator[T]:
        """The items that this process takes, for example minibatches: one of each ``count``."""
        for item in islice(items, self.rank, None, self.count):
            yield item
            sign_of_life()

    def share(self, rows: int, most: int) -> int:
        """The rows of a minibatch of `own`, at most ``most``, so that each process has some.

        >>> Team(0, 1).share(700, 500), Team(0, 2).share(700, 500), Team(0, 2).share(1, 500)
        (500, 350, 1)
        """
        return min(most, -(-rows // self.count))

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Do some work in every process, and return the results of all processes.

        If it fails in a process, that process raises its error and the others `ElsewhereError`. If
        a process does not come, the others raise `LostError`.
        """
        if self.count == 1:
            return [work()]
        failure: Exception | None = None
        try:
            mine = (work(), None)
        except Exception as error:
            failure, mine = error, (None, first_line(error))  # type: ignore[assignment]
        found: list[Any] = [None] * self.count
        meet()
        with lost():
            dist.all_gather_object(found, mine)
        failed = [(rank, words) for rank, (_, words) in enumerate(found) if words is not None]
        if not failed:
            return [result for result, _ in found]
        rank, words = failed[0]
        if rank == self.rank and failure is not None:
            raise failure
        raise ElsewhereError(f"process {rank} of {self.count} stopped: {words}") from failure

    def together(self, work: Callable[[], T]) -> T:
        """Do some work in every process, and return the result of this one; see `gather`."""
        results: list[T] = []
        self.gather(lambda: results.append(work()))
        return results[0]

    def from_first(self, work: Callable[[], T]) -> T:
        """Do some work in the first process, and return its result in every process."""
        found: Any = self.gather(lambda: work() if self.first else None)
        return found[0]


ALONE = Team()


def in_order(parts: Sequence[Sequence[T]]) -> Iterator[T]:
    """The results of all items that `Team.own` gave to the processes, in the order of the items.

    >>> list(in_order([[0, 2, 4], [1, 3]]))
    [0, 1, 2, 3, 4]
    """
    for i in range(len(parts[0])):
        yield from (part[i] for part in parts if i < len(part))


_SINGLE: list[None] = []
"""An entry for each block of `single` that is active."""


def here() -> Team:
    """The processes of the group that torch.distributed has started, or this process alone.

    Within `single`, it is this process alone.
    """
    if _SINGLE or not dist.is_available() or not dist.is_initialized():
        return ALONE
    return Team(dist.get_rank(), dist.get_world_size())


@contextmanager
def single() -> Iterator[None]:
    """Let every tool work in this process alone, because the others do not call it.

    `pyro_vae.fit` and the other tools that share their work do it while they run. So a function in
    ``on_epoch``, or another thread, does not wait for other processes.
    """
    _SINGLE.append(None)
    try:
        yield
    finally:
        _SINGLE.pop()


def join_processes(backend: str = "gloo", timeout: float = PATIENCE) -> None:
    """Join the processes that torchrun started, so that `pyro_vae.fit` and other tools share work.

    This is ``torch.distributed.init_process_group`` that also works after torchrun has restarted
    the processes. torchrun keeps one store for all restarts, and in torch 2.14, restarted processes
    read the addresses of dead ones there, and wait for them. So each restart has its own part of
    the store.

    Arguments:
        backend: "gloo" for CPUs, "nccl" for one GPU for each process.
        timeout: seconds after which the processes stop if one of them shows no sign of life. Its
            signs are the steps of training, progress bars and shared work. It needs more than the
            longest checkpoint, compilation or function in ``on_epoch``.

    Raises `UsageError` for another backend, for a timeout that is not positive, if torchrun did not
    start this process, if it has joined before, or if it cannot join, for example by "nccl" without
    GPUs.

    >>> import pyro_vae as pv
    >>> pv.join_processes()
    Traceback (most recent call last):
    ...
    pyro_vae.errors.UsageError: start the program with torchrun, for example torchrun ...
    """
    if backend not in ("gloo", "nccl"):
        raise UsageError(f"must be 'gloo' or 'nccl', got {backend!r}", argument="backend")
    if not 0 < timeout <= LONGEST.total_seconds():
        raise UsageError(
            f"must be positive and at most 30 days in seconds, got {timeout}", argument="timeout"
        )
    if not dist.is_available():
        raise UsageError("this build of torch has no torch.distributed; install another build")
    if dist.is_initialized():
        raise UsageError("this process has joined a group before; call join_processes only once")
    if "RANK" not in os.environ:
        raise UsageError(
            "start the program with torchrun, for example torchrun --nproc-per-node 2 train.py; "
            "without it, leave out this call"
        )
    try:
        limit = timedelta(seconds=timeout)
        store, rank, count = next(dist.rendezvous("env://", timeout=limit))
        own = dist.PrefixStore(f"restart-{restarts()}", store)
        dist.init_process_group(backend, timeout=limit, store=own, rank=rank, world_size=count)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"cannot join the processes by {backend}: {first_line(error)}") from error
    meet()


def restarts() -> int:
    """How often torchrun has restarted the processes after one of them ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def local_device() -> torch.device | None:
    """The GPU of this process; None if the processes do not use GPUs."""
    if here() == ALONE or "nccl" not in str(dist.get_backend()):
        return None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))

"""One pair runs at a time: the threads of a process take turns.

Pyro's handlers and parameter store, the validation flags, and the generators of torch, NumPy and
Python belong to the process and not to a thread. Everything that runs a pair therefore holds one
re-entrant lock, `alone`. Calls from other threads wait and run in the order of their arrival.
`pyro_vae.fit` lets them run between its steps. Before, it removes its parameter store and its
generator states; afterwards, it restores them. Each call therefore gives the same result as it
gives without other threads.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from pyro_vae.errors import UsageError

FORK_SECONDS = 2.0
"""How long a fork waits for a thread that runs a pair. After this time, the child process raises
an error if it runs a pair."""


class _Turns:
    """A re-entrant lock that serves threads in order, and shows its holder that others wait."""

    def __init__(self, broken: bool = False) -> None:
        self.owner: int | None = None
        self.depth = 0
        self.waiting: deque[object] = deque()
        self.changed = threading.Condition()
        self.broken = broken

    def acquire(self, timeout: float | None = None) -> bool:
        """Wait for the lock and take it, again if this thread holds it; False after a timeout."""
        if self.broken:
            raise UsageError(
                "this process was forked while another thread ran a pair, and inherited its state: "
                "start processes with multiprocessing's 'spawn', or before you start threads"
            )
        if self.owner != threading.get_ident() and not self._wait(timeout):
            return False
        self.depth += 1
        return True

    def _wait(self, timeout: float | None) -> bool:
        ticket = object()
        with self.changed:
            self.waiting.append(ticket)
            try:
                free = self.changed.wait_for(
                    lambda: self.owner is None and self.waiting[0] is ticket, timeout
                )
                if free:
                    self.owner = threading.get_ident()
                return free
            finally:
                self.waiting.remove(ticket)
                self.changed.notify_all()

    def release(self) -> None:
        """Undo one `acquire`; after the last one the next thread gets the lock."""
        if self.owner != threading.get_ident():
            return  # the child of a fork leaves a block that its parent entered
        self.depth -= 1
        if self.depth == 0:
            with self.changed:
                self.owner = None
                self.changed.notify_all()


_turns = _Turns()


@contextmanager
def alone() -> Iterator[None]:
    """Hold the lock under which pairs run; also a decorator.

    Use it in a program with threads when you seed torch, draw from its global generator or create
    a pair while another thread may run a pair: all threads share the generator.

    >>> import torch, pyro_vae as pv
    >>> with alone():
    ...     _ = torch.manual_seed(0)
    ...     vae = pv.VAE.mlp((4,))
    """
    _turns.acquire()
    try:
        yield
    finally:
        _turns.release()


def waited_for() -> bool:
    """Whether another thread is waiting for the lock."""
    return bool(_turns.waiting)


def give_way() -> None:
    """Let each waiting thread run once, unless a caller of this function also holds the lock."""
    _turns.release()
    _turns.acquire()


class _Fork(threading.local):
    """Whether the current fork of this thread holds the lock."""

    holds = False


_fork = _Fork()


def _before_fork() -> None:
    # The wait is bounded, because the thread that runs a pair may itself wait for this thread.
    _fork.holds = not _turns.broken and _turns.acquire(FORK_SECONDS)


def _after_fork_in_parent() -> None:
    if _fork.holds:
        _turns.release()


def _after_fork_in_child() -> None:
    global _turns
    _turns = _Turns(broken=not _fork.holds)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )

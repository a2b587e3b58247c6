"""One pair runs at a time: the threads of a process take turns.

Pyro's handlers, its parameter store, the validation flags and torch's, NumPy's and Python's
generators belong to the process, not to a thread. Everything that runs a pair therefore holds one
re-entrant lock, `alone`. Calls from other threads wait, first come, first served. A `pyro_vae.fit`
gives way between its steps: it takes its parameter store and its generators away first, and puts
them back afterwards, so that each call gives what it would have given by itself.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from pyro_vae.errors import UsageError

FORK_SECONDS = 2.0
"""How long a fork waits for the threads that run a pair; the child of an earlier one runs none."""


class _Turns:
    """A re-entrant lock, first come, first served, whose holder can see that others wait."""

    def __init__(self, broken: bool = False) -> None:
        self.owner: int | None = None
        self.depth = 0
        self.waiting: deque[object] = deque()
        self.changed = threading.Condition()
        self.broken = broken

    def acquire(self, timeout: float | None = None) -> bool:
        """Wait for the lock and take it, once more if this thread has it; False after a timeout."""
        if self.broken:
            raise UsageError(
                "this process was forked while another thread ran a pair, and inherited its state; "
                "start processes by multiprocessing's 'spawn', or before the threads"
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
        """Give back one `acquire`; the last one lets the next thread go on."""
        if self.owner != threading.get_ident():
            return  # the child of a fork leaves what its parent had entered
        self.depth -= 1
        if self.depth == 0:
            with self.changed:
                self.owner = None
                self.changed.notify_all()


_turns = _Turns()


@contextmanager
def alone() -> Iterator[None]:
    """Hold the lock under which pairs run; also a decorator.

    A program with threads that seeds torch, draws from its global generator or makes a pair while
    another thread may run one does so under this lock, as the generator is that of the process.

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
    """Whether another thread waits for the lock."""
    return bool(_turns.waiting)


def give_way() -> None:
    """Let the threads that wait have a turn each, unless a caller of this one holds the lock."""
    _turns.release()
    _turns.acquire()


class _Fork(threading.local):
    """Whether the fork that this thread makes holds the lock."""

    holds = False


_fork = _Fork()


def _before_fork() -> None:
    # Bounded, since the thread that runs a pair may itself wait for the one that forks.
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

"""How long processes wait for each other, and which of them does not answer.

A process may be slow: it compiles, it reads a slow disk, or a function of the user runs in it. It
may also hang. Nobody can tell one from the other, so a process is lost when it has shown no sign of
life for the timeout of the process group. Its signs are the calls in which processes meet, the
minibatches of shared work, and each step of a progress bar, shown or not. So long work with such
steps may take any time.

The signs go through the store in which the processes of torch.distributed have met. A process that
waits for less than a second neither writes nor reads them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from threading import Event, Thread
from typing import Any, TypeVar

from torch import distributed as dist

from pyro_vae.compat import group_store, group_timeout
from pyro_vae.errors import UsageError, first_line

T = TypeVar("T")

PATIENCE = 600.0
"""Seconds without a sign of life after which a process is lost: ten minutes, as torch has it for
NCCL. The longest silence of a sound run is a checkpoint, a compilation or a callback."""

AT_ONCE = 1.0
"""Seconds of one attempt to meet. Between attempts, Python can hear a signal."""

LONGEST = timedelta(days=30)
"""What torch waits at most where this module decides how long to wait."""


class LostError(UsageError):
    """Another process of the group has ended, or does not answer."""


class _Heartbeat:
    """How often this process has met the others, and its signs of life."""

    meetings = 0
    signs = 0
    told = 0.0
    """When it has told its last sign."""
    gloo: tuple[Any, Any] = (None, None)
    """The default group, and the one in which processes meet after work of any length."""


def sign_of_life() -> None:
    """Tell the other processes, at most once a second, that this one works."""
    now = time.monotonic()
    if now - _Heartbeat.told < AT_ONCE or not dist.is_available() or not dist.is_initialized():
        return
    _Heartbeat.told, _Heartbeat.signs = now, _Heartbeat.signs + 1
    with suppress(RuntimeError):  # the process that keeps the store has ended: others will say so
        group_store().set(f"pyro_vae/alive/{dist.get_rank()}", str(_Heartbeat.signs))


def has_ended(work: Any) -> bool:
    """Whether an operation of gloo has ended within about a second."""
    try:
        work.wait(timedelta(seconds=AT_ONCE))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # it has ended in the meantime, or it raises its own error
    return True


def wait(start: Callable[[], T], ended: Callable[[T], bool] = has_ended) -> None:
    """Wait until the others have answered, at most for the timeout of the group without a sign.

    Arguments:
        start: tells the others that this process is here; by default an operation of gloo.
        ended: waits for about a second, and returns whether the others have answered. Both raise
            ``RuntimeError`` or ``OSError`` if a connection is closed.

    Raises `LostError`, which names the processes that have not come.
    """
    _Heartbeat.meetings += 1
    began = time.monotonic()
    try:
        work = start()
        if not ended(work):
            _wait_long(lambda: ended(work), began)
    except LostError:
        raise
    except (RuntimeError, OSError) as error:
        seconds = time.monotonic() - began
        with _signs_of_others() as found:
            end = time.monotonic() + 3 * AT_ONCE
            while not found and time.monotonic() < end:
                time.sleep(AT_ONCE / 10)
        absent = list(found[-1]) if found else []
        if seconds > 0.9 * group_timeout():  # torch itself has waited for this time
            raise LostError(_silent(absent, seconds)) from error
        raise LostError(_gone(absent, seconds, error)) from error


def _wait_long(ended: Callable[[], bool], began: float) -> None:
    """`wait` after the first second."""
    limit, last, known = group_timeout(), began, None
    with _signs_of_others() as found:
        while not ended():
            now = time.monotonic()
            if found and found[-1] != known:
                last = last if known is None else now
                known = found[-1]
            elif now - last > limit:
                raise LostError(_silent(_absent(known), now - last))


def _absent(signs: dict[int, int] | None) -> list[int]:
    """The processes that are not here. Without torchrun, the first one keeps the store."""
    if signs is None and not dist.is_torchelastic_launched():
        return [0]
    return list(signs or {})


def meet() -> None:
    """Wait until all processes are here, each after work of any length.

    If one does not come, raise `LostError`.
    """
    world, group = _Heartbeat.gloo
    if world is not dist.group.WORLD:
        if dist.get_backend() == "gloo":
            wait(lambda: dist.barrier(async_op=True))
        else:
            with lost():
                dist.barrier()
        made: list[Any] = []
        make = partial(dist.new_group, backend="gloo", timeout=LONGEST)
        wait(lambda: _Call(lambda: made.append(make())), _Call.has_ended)
        (group,) = made
        _Heartbeat.gloo = (dist.group.WORLD, group)
    wait(lambda: dist.barrier(group, async_op=True))


class _Call(Thread):
    """A call that may never return. The program does not wait for it at its end."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:
            self.error = error

    def has_ended(self) -> bool:
        """Whether it has returned within about a second; raises its error."""
        self.join(AT_ONCE)
        if self.error is not None:
            raise self.error
        return not self.is_alive()


@contextmanager
def lost() -> Iterator[None]:
    """Raise `LostError` if another process has gone."""
    try:
        yield
    except LostError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise LostError(_gone([], 0.0, error)) from error


@contextmanager
def _signs_of_others() -> Iterator[list[dict[int, int]]]:
    """Say that this process is here, and read every second the signs of those that are not.

    The list has a dictionary for each reading, from a process to the number of its signs. It stays
    empty while the process that keeps the store hangs. Then a call of the store may never return,
    and so a thread makes it, for which the program does not wait at its end.
    """
    found: list[dict[int, int]] = []
    over, store, mine = Event(), group_store(), _Heartbeat.meetings

    def read() -> None:
        with suppress(RuntimeError):
            while not over.wait(AT_ONCE):
                places = {r: _number(store, "here", r) for r in range(dist.get_world_size())}
                absent = [rank for rank, met in places.items() if met < mine]
                found.append({rank: _number(store, "alive", rank) for rank in absent})

    with suppress(RuntimeError):
        store.set(f"pyro_vae/here/{dist.get_rank()}", str(mine))
    _Call(read)
    try:
        yield found
    finally:
        over.set()


def _number(store: Any, what: str, rank: int) -> int:
    return int(store.add(f"pyro_vae/{what}/{rank}", 0))


def _named(ranks: Sequence[int]) -> str:
    if not ranks:
        return "another process"
    several = "es" * (len(ranks) > 1)
    return f"process{several} {', '.join(map(str, ranks))} of {dist.get_world_size()}"


def _silent(ranks: Sequence[int], seconds: float) -> str:
    return (
        f"{_named(ranks)} did not answer for {seconds:.0f} seconds; if it hangs, py-spy dump shows "
        "where; if it is only slow, allow more seconds by the timeout of join_processes, or by "
        "PYRO_VAE_TIMEOUT for a command"
    )


def _gone(ranks: Sequence[int], seconds: float, error: Exception) -> str:
    return (
        f"{_named(ranks)} has ended or does not answer, after {seconds:.0f} seconds "
        f"({first_line(error)[:120]})"
    )

"""How training ends before its time, and what is said."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro_vae.errors import UsageError


class NonFiniteError(UsageError):
    """Training met a loss or a gradient that is not finite; the message names the site."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM; the message says how to go on."""


def summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "tensorboard is not installed: pip install 'pyro-vae[tensorboard]'"
        ) from error
    return SummaryWriter


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that a SIGINT or SIGTERM makes non-empty, so that training ends after its step."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {
        number: signal.signal(number, lambda received, _: caught.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Early ends of training: errors and signals."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro_vae.errors import UsageError


class NonFiniteError(UsageError):
    """A loss, a gradient or a parameter is not finite. The message names the site and the rows.

    The attribute ``rows`` has the numbers of the rows at fault in the training data, counted from
    0; it is None if the data are a stream, or if a parameter is at fault.
    """

    def __init__(self, message: str, rows: tuple[int, ...] | None = None) -> None:
        super().__init__(message)
        self.rows = rows


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped training. The message says how to resume it."""


def summary_writer() -> Any:
    """Return TensorBoard's writer class."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "tensorboard is not installed; run pip install 'pyro-vae[tensorboard]'"
        ) from error
    return SummaryWriter


@contextmanager
def signals() -> Iterator[list[int]]:
    """Yield a list that SIGINT or SIGTERM fills, so that training can end after its step.

    A second signal stops at once: it raises `Interrupted` wherever the program is.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def hear(received: int, _: Any) -> None:
        caught.append(received)
        if len(caught) > 1:
            raise Interrupted("stopped at once by a second signal; the last checkpoint is kept")

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

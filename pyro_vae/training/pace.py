"""When training writes its next checkpoint."""

import time

MIDWAY_SECONDS = 10.0
"""Shortest time between two checkpoints within an epoch."""

FLAT = 1000
"""From this epoch on, checkpoints at the ends of epochs may become less frequent."""


class Pace:
    """The times of the checkpoints of a run.

    A checkpoint contains the whole history, so n checkpoints of n epochs would take time in
    proportion to n squared. Therefore epoch n > `FLAT` has a checkpoint only n / `FLAT` epochs
    after the last one, or `MIDWAY_SECONDS` after it if that is earlier. The time by epoch stays
    flat.

    Arguments:
        seconds: the shortest time between two checkpoints.
        epochs: the number of complete epochs.
    """

    def __init__(self, seconds: float, epochs: int = 0) -> None:
        self.seconds = seconds
        self.wrote(epochs)

    def wrote(self, epochs: int) -> None:
        """Take note of a checkpoint after so many epochs."""
        self.last, self.epochs = time.monotonic(), epochs

    def is_due_within(self) -> bool:
        """Whether a checkpoint is due within an epoch."""
        return self._elapsed() > max(self.seconds, MIDWAY_SECONDS)

    def is_due_after(self, epochs: int) -> bool:
        """Whether a checkpoint is due after so many epochs."""
        frequent = FLAT * (epochs - self.epochs) < epochs and self._elapsed() < MIDWAY_SECONDS
        return self._elapsed() > self.seconds and not frequent

    def _elapsed(self) -> float:
        return time.monotonic() - self.last

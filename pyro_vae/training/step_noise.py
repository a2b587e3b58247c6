"""The noise of a training step: a function of a number that is drawn for each step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pyro_vae.errors import NotTraceable
from pyro_vae.pairs.noise import CounterDraws, SiteNoise, key_of, new_number
from pyro_vae.pairs.pair import Batch


class StepNoise:
    """Draws the number of each step, on the CPU, so that the noise is the same on every device.

    Arguments:
        on: whether noise comes from these numbers. Otherwise torch's generators draw it.
        prepare: the preparation of a minibatch, which may binarize.
    """

    def __init__(self, on: bool, prepare: Callable[[Sequence[Tensor]], Batch]) -> None:
        self.on, self.prepare = on, prepare
        self._drawn = torch.tensor(0x1B7C5A9D2E3F4861)  # for trials before the first step
        self.number = self._drawn
        """The number of this step, on the pair's device. It is the same tensor in every step."""

    def place(self, device: torch.device) -> None:
        """Keep the number on a device."""
        self.number = self._drawn.to(device)

    def draw(self) -> None:
        """Draw the number of the next step."""
        if self.on:
            new_number(out=self._drawn)
            if self.number is not self._drawn:
                self.number.fill_(self._drawn.item())

    def draw_several(self, count: int) -> Tensor:
        """Draw the numbers of several steps, each in a row of 16 bytes."""
        rows = torch.zeros(count, 2, dtype=torch.int64)
        if self.on:
            rows[:, 0] = torch.stack([new_number() for _ in range(count)])
        return rows

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Draw the number of a step if its programs raise an error, as in the eager engine."""
        try:
            yield
        except NotTraceable:  # the eager engine takes this step
            raise
        except Exception:
            self.draw()
            raise

    @contextmanager
    def of(self, number: Tensor) -> Iterator[Callable[[Sequence[Tensor]], Batch]]:
        """Draw from the key of a number inside, and give the preparation of a minibatch."""
        if not self.on:
            yield self.prepare
            return
        draws = CounterDraws(key_of(number))

        def prepare(batch: Sequence[Tensor]) -> Batch:
            with draws:
                return self.prepare(batch)

        with SiteNoise(draws):
            yield prepare

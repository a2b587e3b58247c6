"""Schedules: functions of the epoch, for the KL weight and for the learning rate.

A schedule is any callable from the epoch to a number. The epoch is a float: it also grows within
an epoch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from typing import TypeAlias

Schedule: TypeAlias = Callable[[float], float]


@dataclass(frozen=True)
class LinearSchedule:
    """A straight line from ``start`` to ``end`` over ``epochs`` epochs, then ``end``.

    As a KL weight: the warm-up of Bowman et al., 2016 (https://arxiv.org/abs/1511.06349).

    >>> [LinearSchedule(epochs=10)(epoch) for epoch in (0, 5, 20)]
    [0.0, 0.5, 1.0]
    """

    epochs: float
    start: float = 0.0
    end: float = 1.0

    def __call__(self, epoch: float) -> float:
        return self.start + (self.end - self.start) * _fraction(epoch, self.epochs)


@dataclass(frozen=True)
class CyclicalSchedule:
    """A straight line from ``start`` to ``end``, then ``end``, repeated every ``period`` epochs.

    The line takes the fraction ``rise`` of each period.
    Fu et al., Cyclical annealing schedule, 2019 (https://arxiv.org/abs/1903.10145).

    >>> [CyclicalSchedule(period=10)(epoch) for epoch in (0, 2.5, 5, 9, 10)]
    [0.0, 0.5, 1.0, 1.0, 0.0]
    """

    period: float
    rise: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __call__(self, epoch: float) -> float:
        return LinearSchedule(self.rise * self.period, self.start, self.end)(epoch % self.period)


@dataclass(frozen=True)
class CosineSchedule:
    """Half a cosine from ``start`` to ``end`` over ``epochs`` epochs, then ``end``.

    As a learning rate: Loshchilov & Hutter, SGDR, 2017 (https://arxiv.org/abs/1608.03983).

    >>> [round(CosineSchedule(epochs=10)(epoch), 3) for epoch in (0, 5, 20)]
    [1.0, 0.5, 0.0]
    """

    epochs: float
    start: float = 1.0
    end: float = 0.0

    def __call__(self, epoch: float) -> float:
        fraction = _fraction(epoch, self.epochs)
        return self.end + (self.start - self.end) * (1 + cos(pi * fraction)) / 2


def _fraction(epoch: float, epochs: float) -> float:
    return min(epoch / epochs, 1.0) if epochs > 0 else 1.0


def present_names(words: str) -> str:
    """Replace the names of schedules of version 0.1.0 in the words of a job.

    >>> present_names("Linear(epochs=10, start=0.0, end=1.0)")
    'LinearSchedule(epochs=10, start=0.0, end=1.0)'
    """
    return re.sub(r"\b(Linear|Cyclical|Cosine)(?=\()", r"\1Schedule", words)

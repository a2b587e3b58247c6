"""Circular numbers, such as angles, directions and times of the day."""

from math import pi
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


class Circular(dist.TorchDistribution):
    r"""A von Mises distribution of numbers with a period T, in the units of the data.

    :math:`p(x) = \frac{1}{T\,I_0(\kappa)} e^{\kappa \cos(2\pi (x - m) / T)}`, which integrates
    to one over a period.

    Arguments:
        loc: the direction m, of any size.
        concentration: :math:`\kappa`, above 0.
        start: draws are from ``start`` to ``start + period``.
        period: T.

    It has a mode but not a mean, because 359 and 1 degrees are neighbors.

    >>> fn = Circular(torch.tensor(23.0), torch.tensor(4.0), torch.tensor(0.0), torch.tensor(24.0))
    >>> bool(torch.isclose(fn.log_prob(torch.tensor(0.5)), fn.log_prob(torch.tensor(21.5))))
    True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "loc": constraints.real,
        "concentration": constraints.positive,
    }
    support = constraints.real
    has_rsample = False

    def __init__(self, loc: Tensor, concentration: Tensor, start: Tensor, period: Tensor) -> None:
        self.loc, self.concentration = torch.broadcast_tensors(loc, concentration)
        self.start, self.period = start, period
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Circular":
        shape = torch.Size(batch_shape)
        loc, concentration = self.loc.expand(shape), self.concentration.expand(shape)
        return Circular(loc, concentration, self.start, self.period)

    @property
    def mean(self) -> Tensor:
        return torch.full_like(self.loc, torch.nan)

    @property
    def mode(self) -> Tensor:
        return self.wrapped(self.loc)

    def wrapped(self, value: Tensor) -> Tensor:
        """The same points of the circle, from ``start`` to ``start + period``."""
        return self.start + torch.remainder(value - self.start, self.period)

    def log_prob(self, value: Tensor) -> Tensor:
        # cos(d) - 1 and I_0 scaled by exp(-k) keep their digits for a large concentration.
        half = (pi / self.period) * (value - self.loc)
        normalizer = torch.special.i0e(self.concentration).log() + self.period.log()
        return -2 * self.concentration * half.sin().square() - normalizer

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            scale = (2 * pi / self.period).double()
            loc, concentration = self.loc.double() * scale, self.concentration.double()
            turned = torch.remainder(loc + pi, 2 * pi) - pi
            angle = dist.VonMises(turned, concentration, validate_args=False).sample(
                torch.Size(sample_shape)
            )
            return self.wrapped((angle / scale).to(self.loc))


def circle_of(fn: Any) -> Any:
    """The distribution inside ``fn`` that has a period; None if no entry is circular.

    It has ``period``, which is 0 for entries that are not circular, and ``wrapped``.
    """
    while not hasattr(fn, "period"):
        if isinstance(fn, dist.VonMises):
            start = torch.as_tensor(-pi).to(fn.loc)
            return Circular(fn.loc, fn.concentration, start, -2 * start)
        if not hasattr(fn, "base_dist"):
            return None
        fn = fn.base_dist
    return fn if bool((fn.period > 0).any()) else None


def on_its_circle(fn: Any, value: Tensor) -> Tensor:
    """The same points, circular numbers within the period from which ``fn`` draws.

    >>> fn = Circular(torch.tensor(23.0), torch.tensor(4.0), torch.tensor(0.0), torch.tensor(24.0))
    >>> on_its_circle(fn, torch.tensor(25.0))
    tensor(1.)
    """
    circle = circle_of(fn)
    return value if circle is None else circle.wrapped(value)


def near(value: Tensor, around: Tensor, period: Tensor) -> Tensor:
    """The same points of the circle, within half a period of ``around``; unchanged for period 0.

    >>> near(torch.tensor(359.0), torch.tensor(10.0), torch.tensor(360.0))
    tensor(-1.)
    """
    turns = ((value - around) / torch.where(period > 0, period, 1.0)).round()
    return value - turns * period


def circular_mean(values: Tensor, weights: Tensor, period: Tensor) -> Tensor:
    """The direction of the weighted sum of points of the circle over dimension 0.

    It is within half a period of the first value. For period 0, the first value is returned.

    >>> hours = torch.tensor([23.0, 1.0])
    >>> circular_mean(hours, torch.tensor([0.5, 0.5]), torch.tensor(24.0))
    tensor(24.)
    """
    angle = (2 * pi / torch.where(period > 0, period, 1.0)) * values
    sums = ((weights * part(angle)).sum(0) for part in (torch.sin, torch.cos))
    return near(torch.atan2(*sums) * period / (2 * pi), values[0], period)

"""Bijections of one coordinate, which a flow layer applies to each coordinate."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.parts.factors import bounded_scale


class Bijection(Protocol):
    """A map of each coordinate, with ``outputs`` parameters, of shape (..., outputs, dim).

    Both directions return the result and the log derivative of the forward map.
    """

    outputs: int

    def __call__(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]: ...
    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]: ...


class Affine(nn.Module):
    r"""Shift and scale each coordinate, :math:`y = s x + m`.

    Arguments:
        low, high: bounds of every :math:`s` (see `pyro_vae.parts.factors.bounded_scale`).

    >>> y, log_slope = Affine()(torch.ones(3), torch.zeros(2, 3))
    >>> y, log_slope
    (tensor([1., 1., 1.]), tensor([0., 0., 0.]))
    """

    outputs = 2

    def __init__(self, low: float = 0.1, high: float = 10.0) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self._parameters_of(raw)
        return scale * x + shift, scale.log()

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self._parameters_of(raw)
        return (y - shift) / scale, scale.log()

    def _parameters_of(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = raw.unbind(-2)
        return shift, bounded_scale(scale, self.low, self.high)


class Spline(nn.Module):
    r"""Map each coordinate by a monotone rational-quadratic spline, the identity outside a box.

    Arguments:
        bins: the number of pieces of the spline, at least 2.
        bound: the spline maps the interval from -bound to bound onto itself.
        low, high: bounds of the slopes at the knots. The width and the height of each bin are also
            at least ``low`` times those of equal bins.

    Raises `UsageError` if ``bins`` is below 2 or ``bound`` is not positive.
    Durkan et al., Neural Spline Flows, 2019 (https://arxiv.org/abs/1906.04032).

    >>> spline = Spline(bins=4)
    >>> raw = torch.linspace(-1, 1, spline.outputs)[:, None]
    >>> y, _ = spline(torch.tensor([0.5]), raw)
    >>> spline.inverse(y, raw)[0]
    tensor([0.5000])
    """

    def __init__(
        self, bins: int = 8, bound: float = 5.0, low: float = 0.1, high: float = 10.0
    ) -> None:
        super().__init__()
        if bins < 2 or not bound > 0:
            raise UsageError(
                "`bins` must be at least 2 and `bound` must be positive, "
                f"got bins={bins} and bound={bound}"
            )
        self.bins, self.bound, self.low, self.high = bins, bound, low, high
        self.outputs = 3 * bins - 1

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        x_knots, y_knots, slopes = self._knots(raw)
        inside = x.clamp(-self.bound, self.bound)
        left, width, bottom, height, before, after = self._bin(inside, x_knots, y_knots, slopes)
        t = ((inside - left) / width).clamp(0, 1)
        y, log_slope = _rational_quadratic(t, height / width, before, after)
        return self._placed(x, bottom + height * y, log_slope)

    def inverse(self, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        x_knots, y_knots, slopes = self._knots(raw)
        inside = y.clamp(-self.bound, self.bound)
        bottom, height, left, width, before, after = self._bin(inside, y_knots, x_knots, slopes)
        # The root in [0, 1] of a t^2 + b t + c, in a form without cancellation.
        r, slope = (inside - bottom) / height, height / width
        bend = r * (before + after - 2 * slope)
        a, b, c = slope - before + bend, before - bend, -slope * r
        t = (2 * c / (-b - (b * b - 4 * a * c).clamp(min=1e-12).sqrt())).clamp(0, 1)
        _, log_slope = _rational_quadratic(t, slope, before, after)
        return self._placed(y, left + width * t, log_slope)

    def _knots(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The knots on both axes and the slopes at the knots, each (..., dim, bins + 1)."""
        widths, heights, slopes = raw.mT.split([self.bins, self.bins, self.bins - 1], -1)
        slopes = F.pad(bounded_scale(slopes, self.low, self.high), (1, 1), value=1.0)
        return self._edges(widths), self._edges(heights), slopes

    def _edges(self, raw: Tensor) -> Tensor:
        shares = self.low / self.bins + (1 - self.low) * raw.softmax(-1)
        inner = 2 * self.bound * shares[..., :-1].cumsum(-1) - self.bound
        # The ends are set exactly; the sum of all shares would have rounding errors.
        return F.pad(F.pad(inner, (1, 0), value=-self.bound), (0, 1), value=self.bound)

    @staticmethod
    def _bin(value: Tensor, along: Tensor, across: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        """Start and size of a value's bin on both axes, and the slopes at its ends.

        The value lies on the axis ``along``.
        """
        number = (value[..., None] >= along[..., 1:-1]).sum(-1, keepdim=True)
        shape = number.shape[:-1]
        found = [
            knots.expand(*shape, -1).gather(-1, number + step).squeeze(-1)
            for knots in (along, across, slopes)
            for step in (0, 1)
        ]
        return (found[0], found[1] - found[0], found[2], found[3] - found[2], *found[4:])

    def _placed(self, value: Tensor, bent: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        within = value.abs() < self.bound
        return torch.where(within, bent, value), torch.where(within, log_slope, 0.0)


def _rational_quadratic(
    t: Tensor, slope: Tensor, before: Tensor, after: Tensor
) -> tuple[Tensor, Tensor]:
    """The height in a unit bin at t, and the log slope.

    Arguments:
        slope: the mean slope of the bin.
        before, after: the slopes at its ends.
    """
    rest = t * (1 - t)
    below = slope + (before + after - 2 * slope) * rest
    height = (slope * t * t + before * rest) / below
    above = after * t * t + 2 * slope * rest + before * (1 - t).square()
    return height, 2 * (slope / below).log() + above.log()

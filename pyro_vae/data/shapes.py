"""A data set of drawn shapes with known factors of variation."""

from math import pi

import torch
from torch import Tensor

SIZE = 32
"""Height and width of an image, in pixels."""

SCALES = torch.linspace(4.4, 8.6, 4)
"""Radii, in pixels."""

ROTATIONS = torch.arange(6) * (pi / 12)
"""Angles in radians, below a quarter turn, so that no two images are equal."""

POSITIONS = torch.linspace(9.0, 23.0, 8)
"""Centers, in pixels."""

FACTORS = ("shape", "scale", "rotation", "x", "y")
"""The factors of an image, in the order of the columns of `draw`."""


def draw() -> tuple[Tensor, Tensor]:
    """Draw all 4,608 images, one for each combination of the factors.

    The shape is a square, an ellipse or a heart. Returns the images (n, 1, 32, 32) as uint8 with
    values 0 and 255, and the index of the value of each factor (n, 5), in the order of ``FACTORS``.

    >>> images, factors = draw()
    >>> images.shape, factors[-1]
    (torch.Size([4608, 1, 32, 32]), tensor([2, 3, 5, 7, 7]))
    """
    counts = (len(_INSIDE), len(SCALES), len(ROTATIONS), len(POSITIONS), len(POSITIONS))
    factors = torch.cartesian_prod(*map(torch.arange, counts))
    parts = [_drawn(rows) for rows in factors.split(len(factors) // len(_INSIDE))]
    return torch.cat(parts), factors


def _drawn(factors: Tensor) -> Tensor:
    """The images of one shape."""
    _, scale, rotation, x, y = factors.T[..., None, None]
    row, column = torch.meshgrid(*[torch.arange(SIZE) + 0.5] * 2, indexing="ij")
    right, up = column - POSITIONS[x], POSITIONS[y] - row
    angle = ROTATIONS[rotation]
    u = (angle.cos() * right + angle.sin() * up) / SCALES[scale]
    v = (angle.cos() * up - angle.sin() * right) / SCALES[scale]
    inside = _INSIDE[int(factors[0, 0])](u, v)
    return (inside * 255).to(torch.uint8)[:, None]


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) < 0.72


def _ellipse(u: Tensor, v: Tensor) -> Tensor:
    return u.square() + (2 * v).square() < 1


def _heart(u: Tensor, v: Tensor) -> Tensor:
    u, v = 1.25 * u, 1.25 * v + 0.1
    return (u.square() + v.square() - 1).pow(3) < u.square() * v.pow(3)


_INSIDE = (_square, _ellipse, _heart)

"""Standardization inside a likelihood: networks see standard units, densities have the data's."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Independent

from pyro_vae.errors import UsageError
from pyro_vae.parts.factors import Family, made
from pyro_vae.parts.networks import Shape

LEAST_DIGITS = 100
"""The least number of steps of the floating-point type in one standard deviation of the data."""


def require_rows(x: Tensor, shape: Shape) -> None:
    """Raise `UsageError` unless x has rows of this shape."""
    if tuple(x.shape[1:]) != tuple(shape) or x.dim() == 0:
        raise UsageError(
            f"must have rows of shape {tuple(shape)}, got an array of shape {tuple(x.shape)}; "
            "standardize rows before by_group puts them into groups",
            argument="x",
        )


def varies(center: Tensor, spread: Tensor) -> Tensor:
    """Which entries vary by more than the rounding errors of a constant, booleans."""
    return spread > 1e-13 * center.abs()


def require_precision(center: Tensor, spread: Tensor, dtype: torch.dtype) -> None:
    """Raise `UsageError` if numbers of this type cannot tell the values of an entry apart.

    Densities use squares of the values, which the type must represent, too.
    """
    kind, vary = torch.finfo(dtype), varies(center, spread)
    lost = vary & (spread < LEAST_DIGITS * kind.eps * center.abs())
    least, most = kind.tiny**0.4, kind.max**0.4
    extreme = vary & ~((spread >= least) & (spread <= most))
    for wrong, why in (
        (lost, "which {} cannot represent: subtract a number near the mean from the column"),
        (extreme, "whose square {} cannot represent: give the column another unit"),
    ):
        if bool(wrong.any()):
            at = int(wrong.flatten().nonzero()[0])
            mean, width = center.flatten()[at].item(), spread.flatten()[at].item()
            raise UsageError(
                f"column {at} of x has mean {mean:.6g} and standard deviation {width:.3g}, "
                f"{why.format(dtype)}"
            )


class Standardized(Family):
    r"""A `Gaussian` or `StudentT` in standard units, with densities in the units of the data.

    :math:`p(x|z) = p_u\big((x - c)/s \,\big|\, z\big) / s`, where the constants c and s are
    buffers. They are saved with the pair, so a loaded pair takes raw rows.

    Arguments:
        likelihood: the family of the standardized data, or its class.
        data_shape: the shape of one datum.

    Call `standardize` with the training data. The encoder sees :math:`(x - c)/s`.

    >>> import torch, pyro_vae as pv
    >>> x = torch.tensor([[100.0], [300.0]])
    >>> likelihood = Standardized(pv.Gaussian(1.0), (1,)).standardize(x)
    >>> likelihood(torch.zeros(1, 1), (1,)).mean
    tensor([[200.]])
    """

    center: Tensor
    spread: Tensor

    def __init__(self, likelihood: Family | type[Family], data_shape: Shape) -> None:
        super().__init__()
        self.likelihood, self.data_shape = made(likelihood), tuple(data_shape)
        self.register_buffer("center", torch.zeros(self.data_shape))
        self.register_buffer("spread", torch.ones(self.data_shape))

    def standardize(self, x: Tensor) -> "Standardized":
        """Set c and s to the mean and the standard deviation of each entry of rows (n, ...).

        Missing entries (NaN) are left out. A constant entry keeps s = 1. Returns the family.
        Raises `UsageError` for rows of another shape, and for an entry whose standard deviation is
        too small beside its mean, too small or too large for the type of the constants.
        """
        require_rows(x, self.data_shape)
        x = x.double()
        center = x.nanmean(0)
        spread = (x - center).square().nanmean(0).sqrt()
        require_precision(center, spread, self.center.dtype)
        self.center.copy_(center.nan_to_num(0.0))
        self.spread.copy_(torch.where(varies(center, spread), spread, 1.0))
        return self

    def view(self, shape: Shape) -> nn.Module | None:
        return StandardUnits(self)

    def outputs(self, shape: Shape) -> int:
        return self.likelihood.outputs(shape)

    def forward(self, raw: Tensor, shape: Shape) -> dist.TorchDistribution:
        fn: Any = self.likelihood(raw, shape)
        inner = fn.base_dist if isinstance(fn, Independent) else fn
        if not isinstance(inner, (dist.Normal, dist.StudentT)):
            raise UsageError(
                f"Standardized needs a Gaussian or StudentT likelihood, got "
                f"{type(self.likelihood).__name__}"
            )
        loc, scale = self.center + self.spread * inner.loc, self.spread * inner.scale
        if isinstance(inner, dist.StudentT):
            moved: Any = dist.StudentT(inner.df, loc, scale, validate_args=False)
        else:
            moved = dist.Normal(loc, scale, validate_args=False)
        return moved.to_event(len(shape))


class StandardUnits(nn.Module):
    """The view of data in the standard units of a `Standardized` likelihood.

    Arguments:
        standardized: the likelihood, whose constants are used.
    """

    standardized: Standardized

    def __init__(self, standardized: Standardized) -> None:
        super().__init__()
        # PyroModule would give the family a second name; with torch's method it keeps its own.
        nn.Module.add_module(self, "standardized", standardized)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.standardized.center) / self.standardized.spread

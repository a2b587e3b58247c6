"""The Pareto shape of the largest importance weights: whether their mean is reliable."""

from math import ceil, log, log10

import torch
from torch import Tensor

from pyro_vae.errors import UsageError

LEAST = 21
"""Least number of weights with a tail to fit: five weights must exceed a sixth one."""

STEADY = 0.01
"""Weights whose relative standard deviation is at most this give log p(x) whatever their tail."""

FITTED_CELLS = 2**22
"""Numbers in the largest tensor of a fit."""

_SMALLEST = log(torch.finfo(torch.float64).tiny)


def tail_length(num_samples: int) -> int:
    """Return the number of weights in the tail."""
    return ceil(min(num_samples / 5, 3 * num_samples**0.5))


def threshold(num_samples: int) -> float:
    r"""Return :math:`\min(1 - 1/\log_{10} S, 0.7)`, the largest shape with a reliable mean.

    >>> threshold(100), threshold(5000)
    (0.5, 0.7)
    """
    return min(1 - 1 / log10(num_samples), 0.7) if num_samples > 1 else 0.0


def unreliable(pareto_k: Tensor, deviation: Tensor, limit: float) -> Tensor:
    """Return which weights do not give a reliable mean: their shape is over the limit, and they
    vary. The tail of weights that hardly vary is noise without effect.

    Arguments:
        pareto_k: the shapes of their tails, (n,).
        deviation: the standard deviations of the weights, relative to their means, (n,).
        limit: the `threshold` for their number.
    """
    return ~(pareto_k <= limit) & ((deviation > STEADY) | ~pareto_k.isfinite())


def pareto_shape(log_weights: Tensor) -> Tensor:
    r"""Return the shape :math:`\hat k` of a generalized Pareto distribution fitted to each tail.

    The tail contains the weights above the (M+1)-th largest, with :math:`M = \lceil \min(S/5,
    3\sqrt S) \rceil`. A distribution of shape k has a finite mean if k < 1 and a finite variance
    if k < 1/2. The fit is the estimator of Zhang & Stephens (2009) with a weak prior at 1/2, as in
    Vehtari et al., Pareto smoothed importance sampling, JMLR 25, 2024.

    Arguments:
        log_weights: logarithms of the weights, of shape (n, S).

    Returns a float64 tensor of shape (n,). An entry is 0 if the largest weight occurs five times or
    more, as with discrete latents: such weights are bounded. It is infinite if a weight is infinite
    or NaN, if all weights are 0, or if other ties leave fewer than five weights above the rest.
    Raises `UsageError` for fewer than 21 weights.

    >>> steep = -(torch.arange(1, 1001) / 1001).log()[None]  # weights of Pareto shape 1
    >>> bool((pareto_shape(steep) - 1).abs() < 0.2)
    True
    """
    samples = log_weights.shape[1]
    if samples < LEAST:
        raise UsageError(f"the tail fit needs at least {LEAST} weights, got {samples}")
    greatest = log_weights.double().topk(tail_length(samples) + 1).values
    return shape_of_greatest(greatest)


def shape_of_greatest(greatest: Tensor) -> Tensor:
    """Compute `pareto_shape` from the M+1 largest log weights, (n, M+1), in descending order."""
    points = 30 + int(greatest.shape[1] ** 0.5)
    rows = max(1, FITTED_CELLS // (points * greatest.shape[1]))
    return torch.cat([_fitted(part) for part in greatest.split(rows)])


class Greatest:
    """The largest log weights of each row of data, collected from parts."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.parts: list[Tensor] = []

    def add(self, log_weights: Tensor) -> None:
        """Add further weights of all rows, of shape (draws, n)."""
        self.parts.append(log_weights.T)
        if sum(part.shape[1] for part in self.parts) > 4 * self.number:
            self.parts = [self.values()]

    def values(self) -> Tensor:
        """Return the largest so far, (n, number), in descending order."""
        together = torch.cat(self.parts, 1)
        return together.topk(min(self.number, together.shape[1])).values


def _fitted(greatest: Tensor) -> Tensor:
    x = greatest - greatest[:, :1]
    cutoff = x[:, -1:].clamp(min=_SMALLEST)
    inside = x > cutoff
    excess = torch.where(inside, x.exp() - cutoff.exp(), 0.0)
    length = inside.sum(1)
    shape = _generalized_pareto(excess, length.clamp(min=1))
    bounded = (x == 0).sum(1) > 4
    return torch.where(bounded, 0.0, torch.where(length > 4, shape, torch.inf))


def _generalized_pareto(excess: Tensor, length: Tensor) -> Tensor:
    r"""Return the shape by the posterior mean of :math:`b = -k / \sigma` over a grid of points.

    Arguments:
        excess: excesses over the cutoff, (n, M), in descending order; the rest of a row is 0.
        length: the number of excesses of each row, (n,).
    """
    points = 30 + length.double().sqrt().floor()
    index = torch.arange(1, int(points.max()) + 1, device=excess.device, dtype=torch.float64)
    quarter = (length / 4 + 0.5).floor().long().clamp(min=1)  # the rank, from the smallest up
    quartile = excess.gather(1, (length - quarter)[:, None])
    b = (1 - (points[:, None] / (index - 0.5)).sqrt()) / (3 * quartile) + 1 / excess[:, :1]
    k = torch.log1p(-b[:, :, None] * excess[:, None, :]).sum(2) / length[:, None]
    log_profile = length[:, None] * ((-b / k).log() - k - 1)
    log_profile = torch.where(index <= points[:, None], log_profile, -torch.inf)
    weights = log_profile.softmax(1)
    # A quartile of 0 gives NaN weights. Then only the prior remains.
    kept = weights >= 10 * torch.finfo(torch.float64).eps
    weights = torch.where(kept, weights, 0.0)
    b = (torch.where(kept, b, 0.0) * weights).sum(1) / weights.sum(1).clamp(min=0.5)
    k = torch.log1p(-b[:, None] * excess).sum(1) / length
    return (length * k + 10 * 0.5) / (length + 10)

"""Moments of the guide and of the posterior at each row, from weighted draws."""

from collections.abc import Container
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.inference.inference_data import unit_names
from pyro_vae.inference.moment_matching import Draws, is_circular, matched, shape_of, weights
from pyro_vae.pairs.moments import is_category
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.particles import Particles

MOST_CORRELATED = 32
"""With more units, their correlations are left out: the cost grows with the square."""


class Units:
    """The units of the local latents with moments, as one vector of numbers for each draw.

    Arguments:
        particles: the draws of a pair.
        batch: a prepared batch, whose first rows are drawn to find the shapes.
        among: the latents to use; the default is all latents of the guide.
    """

    def __init__(
        self, particles: Particles, batch: Batch, among: Container[str] | None = None
    ) -> None:
        drawn = particles.draw(1, tuple(tensor[:2] for tensor in batch))
        self.left_out: dict[str, str] = {}
        self.circular: dict[str, bool] = {}
        self.names: list[str] = []
        for name, site in particles.sites.items():
            if among is not None and name not in among:
                self.left_out[name] = "the model does not have it"
                continue
            if is_category(site["fn"]):
                self.left_out[name] = "it is a category, which has no moments"
                continue
            self.circular[name] = is_circular(site["fn"])
            units = unit_names(name, drawn.values[name].shape[2:])
            wraps = ("cos({})", "sin({})") if self.circular[name] else ("{}",)
            self.names += [wrap.format(unit) for wrap in wraps for unit in units]
        number = len(self.names) if len(self.names) <= MOST_CORRELATED else 0
        if number < len(self.names):
            self.left_out["correlations"] = f"there are more than {MOST_CORRELATED} units"
        self.pairs = torch.triu_indices(number, number, 1)

    @property
    def number(self) -> int:
        """The number of units and pairs of units, which is that of the moments of a row."""
        return len(self.names) + self.pairs.shape[1]

    def vector(self, values: dict[str, Tensor]) -> Tensor:
        """The units as numbers, of shape (draws, n, units), in float64."""
        parts = []
        for name, circular in self.circular.items():
            value = values[name].reshape(*values[name].shape[:2], -1).double()
            parts += [value.cos(), value.sin()] if circular else [value]
        return torch.cat(parts, -1)

    def counts(self, counts: dict[str, Tensor]) -> Tensor:
        """Which units are not masked, of shape (n, units)."""
        return torch.cat(
            [
                counts[name].reshape(len(counts[name]), -1).repeat(1, 2 if circular else 1)
                for name, circular in self.circular.items()
            ],
            -1,
        )


class Compared(NamedTuple):
    """The fields of `LocalCalibration` with a row for each datum."""

    shift: Tensor
    shift_errors: Tensor
    log_scale: Tensor
    log_scale_errors: Tensor
    correlation: Tensor
    correlation_errors: Tensor
    guide_k: Tensor
    pareto_k: Tensor


class _WeightedMoments(NamedTuple):
    """Weighted moments of all K draws, or K moments without one draw each."""

    mean: Tensor
    """Of shape (..., n, units)."""
    log_scale: Tensor
    """The logarithm of the standard deviation, (..., n, units)."""
    correlation: Tensor
    """Of shape (..., n, pairs)."""


def compared(
    particles: Particles, units: Units, batch: Batch, num_samples: int, limit: float
) -> Compared:
    """Compare the moments of the guide with those of the posterior; rows with k > limit are NaN."""
    # Other draws find the maps, so that the moments do not depend on them.
    found, guide_k = matched(particles, Draws(batch, particles.draw(num_samples, batch)))
    drawn = particles.draw(num_samples, batch)
    log_weights = weights(particles, found, Draws(batch, drawn))
    ours = _moments(units, drawn.values, torch.zeros_like(log_weights))
    theirs = _moments(units, found(drawn.values), log_weights)
    whole, without = (_differences(*both) for both in zip(ours, theirs, strict=True))
    pareto_k = shape_of(log_weights)
    counts = units.counts(drawn.counts) & (pareto_k <= limit)[:, None]
    of = (counts, counts, counts[:, units.pairs].all(1))
    estimates = map(_jackknife, whole, without, of)
    return Compared._make([*chain.from_iterable(estimates), guide_k, pareto_k])


def _differences(ours: _WeightedMoments, theirs: _WeightedMoments) -> tuple[Tensor, Tensor, Tensor]:
    """The shift, the logarithm of the ratio of scales, and the difference of correlations."""
    return (
        (ours.mean - theirs.mean) / theirs.log_scale.exp(),
        ours.log_scale - theirs.log_scale,
        ours.correlation - theirs.correlation,
    )


def _jackknife(whole: Tensor, without: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate without its bias of order 1 / K, and its standard error; NaN where it is not."""
    last = len(without) - 1
    middle = without.mean(0)
    value = whole - last * (middle - whole)
    error = (last * (without - middle).square().mean(0)).sqrt()
    known = counts & value.isfinite() & error.isfinite()
    return torch.where(known, value, torch.nan), torch.where(known, error, torch.nan)


def _moments(
    units: Units, values: dict[str, Tensor], log_weights: Tensor
) -> tuple[_WeightedMoments, _WeightedMoments]:
    """Moments by self-normalized weights: of all draws, and without each draw."""
    shares = log_weights.softmax(0)[..., None]
    z = units.vector(values)
    center = (shares * z).sum(0)
    z = z - center
    first, second = units.pairs
    sums = shares * z, shares * z.square(), shares * z[..., first] * z[..., second]

    def moments(mean: Tensor, square: Tensor, product: Tensor) -> _WeightedMoments:
        variance = square - mean.square()
        constant = variance <= 1e-12 * (1 + center.square())
        scale = torch.where(constant, torch.nan, variance).sqrt()
        covariance = product - mean[..., first] * mean[..., second]
        correlation = covariance / (scale[..., first] * scale[..., second])
        return _WeightedMoments(center + mean, scale.log(), correlation)

    whole = moments(*(part.sum(0) for part in sums))
    return whole, moments(*((part.sum(0) - part) / (1 - shares) for part in sums))

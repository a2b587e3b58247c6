"""Whether data are in the range that a pair starts from, by the draws that its model has."""

from typing import Any, cast

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.data.preparation import Preparation
from pyro_vae.data.sources import Arrays, Source
from pyro_vae.pairs.pair import Batch, Pair, Site
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import data_site
from pyro_vae.pairs.traces import trace

FAR = 20.0
"""How many spreads of the model's draws a column may be from them: a network's first outputs are
near 0, with a spread near 1, and whole spreads away its gradients are of the range, not the data.
A spread under 1 counts as 1, as a small fixed scale says nothing of what a network reaches."""

APART = 500.0
"""How far apart the scales of two columns may be: a factor of 1,000 is more, whichever rows are
looked at, and that of 8-bit pixels is 255 at most."""

RANGE_ROWS = 256
"""Rows that are looked at."""

CURE = (
    "standardize x (subtract the mean of each column, divide by its standard deviation), or use a "
    "likelihood whose scale is learned and starts near that of x"
)


def range_fault(pair: nn.Module, rows: Source, prepare: Preparation) -> str | None:
    """What is wrong with the range of the data for a pair that is not trained yet, or None.

    Only of data under a distribution without bounds: counts, classes and intensities have a scale
    of their own.
    """
    try:
        with using(pair, seed=0), pyro.validation_enabled(False):
            batch = prepare(_some(rows))
            site = data_site(trace(cast(Pair, pair).model, batch))
            if not _unbounded(site["fn"].support):
                return None
            values, draws = (_columns(site, x, len(batch[0])) for x in _observed_and_drawn(site))
    except Exception:  # a user's own code may raise anything, and training says so better
        return None
    return _far(values, draws) or _apart(values, draws)


def _some(rows: Source) -> Batch:
    """Rows from all over the data, where they are in memory."""
    if not isinstance(rows, Arrays):
        return rows.first(RANGE_ROWS)
    index = torch.linspace(0, len(rows) - 1, min(RANGE_ROWS, len(rows))).long()
    return tuple(tensor[index.to(tensor.device)] for tensor in rows.tensors)


def _unbounded(support: Any) -> bool:
    """Whether a support holds real numbers without end."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    ends = (type(constraints.real), constraints.greater_than, constraints.greater_than_eq)
    return not support.is_discrete and isinstance(support, (*ends, constraints.less_than))


def _observed_and_drawn(site: Site) -> tuple[Tensor, Tensor]:
    return site["value"], site["fn"].sample()


def _columns(site: Site, value: Tensor, n: int) -> np.ndarray:
    """A value of the site by rows of the data (n, columns), what is masked as NaN."""
    mask = site["mask"]
    if isinstance(mask, Tensor):
        mask = mask.reshape(mask.shape + (1,) * len(site["fn"].event_shape))
        value = torch.where(mask, value, torch.nan)
    value = value.reshape(n, -1) if value.shape[:1] == (n,) else value.reshape(-1, 1)
    return value.double().cpu().numpy()


def _far(values: np.ndarray, draws: np.ndarray) -> str | None:
    """Whether columns are far from the draws, or all of them have far less spread."""
    center = np.nanmedian(draws, 0)
    spread = np.nanquantile(abs(draws - center), 0.68, 0)
    distance = np.nanquantile(abs(values - center), 0.9, 0)
    ratio = distance / np.maximum(spread, 1.0)
    column = int(np.nanargmax(ratio))
    if ratio[column] > FAR:
        return (
            f"the range of x is not that of the model before training: {(ratio > FAR).sum()} of "
            f"{len(ratio)} columns are far from its draws, column {column} the most, about "
            f"{distance[column]:.2g} away where they spread over {spread[column]:.2g}; {CURE}"
        )
    width = np.ptp(values, 0)
    if width.max() > 0 and (width < spread / APART).all():
        return (
            f"the range of x is not that of the model before training: its columns vary by "
            f"{width.max():.2g} at most, where the model's draws spread over {spread.max():.2g}; "
            f"{CURE}"
        )
    return None


def _apart(values: np.ndarray, draws: np.ndarray) -> str | None:
    """Whether the scales of two columns, next to those of the draws, are far apart.

    By their widths, which rare values do not make small, and by their mean deviations, which rare
    values do not make large.
    """
    spread = np.nanquantile(abs(draws - np.nanmedian(draws, 0)), 0.68, 0)
    width, deviation = np.ptp(values, 0), np.nanmean(abs(values - np.nanmedian(values, 0)), 0)
    varies = (width > 0) & (spread > 0)
    if varies.sum() < 2:
        return None
    at = np.flatnonzero(varies)
    scales = (width[at] / spread[at], deviation[at] / spread[at])
    small, large = at[scales[0].argmin()], at[scales[0].argmax()]
    if min(scale.max() / scale.min() for scale in scales) < APART:
        return None
    return (
        f"the columns of x differ in range: column {small} varies by {width[small]:.2g}, column "
        f"{large} by {width[large]:.2g}; {CURE}"
    )


def extreme(x: Tensor) -> str | None:
    """In words the greatest number of a minibatch, where it is far beyond those of other rows."""
    if not x.is_floating_point():
        return None
    greatest = x.detach().reshape(len(x), -1).abs().amax(1).double()
    if float(greatest.max()) <= APART * max(1.0, float(greatest.median())):
        return None
    return (
        f"x holds a number of size {float(greatest.max()):.2g}, where those of most rows are at "
        f"most {float(greatest.median()):.2g}"
    )

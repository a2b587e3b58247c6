"""Check before training whether the range of the data fits the range of the model's draws."""

from typing import Any, cast

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.data.preparation import Preparation
from pyro_vae.data.sources import Arrays, Source
from pyro_vae.pairs import masks
from pyro_vae.pairs.pair import Batch, Pair, Site
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import data_site
from pyro_vae.pairs.traces import trace

FAR = 20.0
"""The largest allowed distance of a column from the model's draws, in units of their spread.

The first outputs of a network are near 0, with a spread near 1. If the data are many spreads away,
the gradients depend on the range and not on the structure of the data. A spread below 1 counts as
1, because a small fixed scale does not limit what a network can reach."""

APART = 500.0
"""The largest allowed ratio between the scales of two columns.

A factor of 1,000 exceeds it, whichever rows are used. The factor between 8-bit pixels is at most
255."""

RANGE_ROWS = 256
"""The number of rows that are checked."""

FEWEST_ENTRIES = 10
"""Columns with fewer observed entries, as of padded members, have no reliable range."""

CURE = (
    "standardize x (subtract the mean of each column and divide by its standard deviation), or use "
    "a likelihood with a learned scale that starts near the scale of x"
)


def range_fault(pair: nn.Module, rows: Source, prepare: Preparation) -> str | None:
    """Describe what is wrong with the range of the data for an untrained pair, or return None.

    Only data under a likelihood with unbounded support are checked, because counts, classes and
    intensities have a fixed scale.
    """
    try:
        with using(pair, seed=0), pyro.validation_enabled(False):
            batch = prepare(_some(rows))
            site = data_site(trace(cast(Pair, pair).model, batch))
            if not _unbounded(site["fn"].support):
                return None
            values, draws = (_columns(site, x, len(batch[0])) for x in _observed_and_drawn(site))
            known = ~np.isnan(values).all(0)
            values, draws = values[:, known], draws[:, known]
    except Exception:  # the code of a user may raise anything; training reports it better
        return None
    return _far(values, draws) or _apart(values, draws)


def _some(rows: Source) -> Batch:
    """Evenly spaced rows of data in memory, or the first rows of a stream."""
    if not isinstance(rows, Arrays):
        return rows.first(RANGE_ROWS)
    index = torch.linspace(0, len(rows) - 1, min(RANGE_ROWS, len(rows))).long()
    return tuple(tensor[index.to(tensor.device)] for tensor in rows.tensors)


def _unbounded(support: Any) -> bool:
    """Whether a support contains arbitrarily large real numbers."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    ends = (type(constraints.real), constraints.greater_than, constraints.greater_than_eq)
    return not support.is_discrete and isinstance(support, (*ends, constraints.less_than))


def _observed_and_drawn(site: Site) -> tuple[Tensor, Tensor]:
    return site["value"], site["fn"].sample()


def _columns(site: Site, value: Tensor, n: int) -> np.ndarray:
    """A value of the site as an array (n, columns), with NaN for masked entries."""
    value = masks.hidden_as_nan({**site, "value": value})
    value = value.reshape(n, -1) if value.shape[:1] == (n,) else value.reshape(-1, 1)
    never = value.isnan().all(0)  # a column that is always masked has neither range nor spread
    return torch.where(never, 0.0, value).double().cpu().numpy()


def _far(values: np.ndarray, draws: np.ndarray) -> str | None:
    """A message if columns are far from the draws, or if all columns vary far less than they do."""
    center = np.nanmedian(draws, 0)
    spread = np.nanquantile(abs(draws - center), 0.68, 0)
    distance = np.nanquantile(abs(values - center), 0.9, 0)
    ratio = distance / np.maximum(spread, 1.0)
    column = int(np.nanargmax(ratio))
    if ratio[column] > FAR:
        return (
            f"the range of x differs from that of the untrained model: {(ratio > FAR).sum()} of "
            f"{len(ratio)} columns are far from the draws of the model. Column {column} is the "
            f"farthest, at a distance of about {distance[column]:.2g} from draws with a spread of "
            f"{spread[column]:.2g}; {CURE}"
        )
    width = _width(values)
    if width.max() > 0 and (width < spread / APART).all():
        return (
            f"the range of x differs from that of the untrained model: the columns of x vary by at "
            f"most {width.max():.2g}, but the draws of the model have a spread of "
            f"{spread.max():.2g}; {CURE}"
        )
    return None


def _width(values: np.ndarray) -> np.ndarray:
    """The range of each column, without missing entries."""
    return np.nanmax(values, 0) - np.nanmin(values, 0)


def _apart(values: np.ndarray, draws: np.ndarray) -> str | None:
    """A message if the scales of two columns, relative to those of the draws, are far apart.

    Both the range and the mean deviation of the columns must differ: rare values do not make the
    range small, and they do not make the mean deviation large. Columns that few rows have, such as
    the last member of the largest group, are left out.
    """
    spread = np.nanquantile(abs(draws - np.nanmedian(draws, 0)), 0.68, 0)
    width, deviation = _width(values), np.nanmean(abs(values - np.nanmedian(values, 0)), 0)
    seen = (~np.isnan(values)).sum(0)
    often = (2 * seen >= seen.max()) & (seen >= FEWEST_ENTRIES)
    varies = (width > 0) & (spread > 0) & often
    if varies.sum() < 2:
        return None
    at = np.flatnonzero(varies)
    scales = (width[at] / spread[at], deviation[at] / spread[at])
    small, large = at[scales[0].argmin()], at[scales[0].argmax()]
    if min(scale.max() / scale.min() for scale in scales) < APART:
        return None
    return (
        f"the columns of x differ in range: column {small} varies by {width[small]:.2g} and column "
        f"{large} by {width[large]:.2g}; {CURE}"
    )


def extreme(x: Tensor) -> str | None:
    """Describe the largest value of a minibatch if it is far larger than those of other rows."""
    if not x.is_floating_point():
        return None
    greatest = x.detach().reshape(len(x), -1).abs().amax(1).double()
    if float(greatest.max()) <= APART * max(1.0, float(greatest.median())):
        return None
    return (
        f"x holds a value of size {float(greatest.max()):.2g}, but the largest value of the median "
        f"row has size {float(greatest.median()):.2g}"
    )

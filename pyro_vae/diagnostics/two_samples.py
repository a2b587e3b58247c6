"""Compare two samples: of numbers, of codes, of residuals."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PERMUTATIONS = 200
"""Random permutations of the rows of both samples, for the errors of a difference."""

SHUFFLED_CELLS = 2**20
"""Numbers in the permuted rows that are compared at once."""

FOLDS = 3
"""Folds of the classifier; each row is scored by a classifier that has not seen it."""

WIDEST = 30
"""Number of columns whose dependence is measured. Of more columns a random subset is taken."""

SQUARES = 10
"""With at most this many columns, the classifier also sees their products."""

CLIP, NORMAL_MEDIAN = 10, 0.6745
"""Residuals are clipped at so many deviations; the median of the size of a standard normal."""


class Difference(NamedTuple):
    """How much a number differs between two samples."""

    value: float
    """The number of the first sample minus that of the second."""
    deviations: float
    """The difference in standard deviations of the same difference between random halves."""


class Separation(NamedTuple):
    """How well a classifier tells the rows of two samples apart, on rows it has not seen."""

    auc: float
    """The probability that a row of the first sample has the higher score; 0.5 is chance."""
    deviations: float
    """Its distance from 0.5, in standard deviations under equal distributions."""
    nats: float
    """Mean log odds of the first sample: a lower bound on the KL of the two distributions, up to
    the error of the mean; at least 0."""


def separation(first: Tensor, second: Tensor, seed: int = 0) -> Separation:
    """Train a classifier to tell two samples (n, d) and (m, d) apart, and score all rows.

    The log odds are the mean of those of a logistic regression on the columns, their squares and
    their products, and those of gradient-boosted trees. Lopez-Paz & Oquab, Revisiting classifier
    two-sample tests, 2017.
    """
    from scipy.stats import rankdata

    x = torch.cat([first, second]).double().flatten(1).numpy()
    y = np.repeat([1, 0], [len(first), len(second)])
    odds = _log_odds(x, y, seed) - np.log(len(first) / len(second))
    n, m = len(first), len(second)
    auc = (rankdata(odds)[:n].sum() - n * (n + 1) / 2) / (n * m)
    error = ((n + m + 1) / (12 * n * m)) ** 0.5
    return Separation(float(auc), float((auc - 0.5) / error), max(0.0, float(odds[:n].mean())))


def _log_odds(x: "np.ndarray", y: "np.ndarray", seed: int) -> "np.ndarray":
    """Return the log odds of each row, by classifiers that were trained on the other folds."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    powers = [PolynomialFeatures(2, include_bias=False)] if x.shape[1] <= SQUARES else []
    smooth = make_pipeline(StandardScaler(), *powers, LogisticRegression(max_iter=200))
    trees = HistGradientBoostingClassifier(
        max_iter=40, max_leaf_nodes=8, early_stopping=False, random_state=seed
    )
    found = np.zeros(len(x))
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, y):
        for model in (smooth, trees):
            p = model.fit(x[train], y[train]).predict_proba(x[test])[:, 1].clip(1e-6, 1 - 1e-6)
            found[test] += np.log(p / (1 - p)) / 2
    return found


def difference(
    statistic: Callable[[Tensor], Tensor], first: Tensor, second: Tensor, seed: int = 0
) -> list[Difference]:
    """Compare statistics of two samples of rows by random permutations of all rows.

    Under equal distributions each assignment of the rows to the samples has the same probability.

    Arguments:
        statistic: maps samples (..., n, d) to numbers (..., s).
    """
    rows, n = torch.cat([first, second]), len(first)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(rows), generator=generator) for _ in range(PERMUTATIONS)]
    shuffled = []
    for part in torch.stack(orders).split(max(1, SHUFFLED_CELLS // rows.numel())):
        halves = rows[part].split([n, len(rows) - n], -2)
        shuffled.append(statistic(halves[0]) - statistic(halves[1]))
    value, null = statistic(first) - statistic(second), torch.cat(shuffled)
    deviations = (value - null.mean(0)) / null.std(0).clamp(min=1e-12)
    return [Difference(*pair) for pair in zip(value.tolist(), deviations.tolist(), strict=True)]


def scale_statistics(residuals: Tensor) -> Tensor:
    r"""Return three statistics of the scale of standardized residuals (..., n, d); NaN is missing.

    They are the logarithm of the mean square; and the nats per row that a scale for each row, and a
    scale for each column, would gain: :math:`\tfrac12 \sum (c - 1 - \log c)` with c the mean
    square of the row or column. (A part of the gain is chance; the difference of two samples
    cancels it.)
    """
    squares = residuals.square()
    if bool(squares.sum().isnan()):
        number, present = (seen := ~squares.isnan()).sum(-1), seen.to(squares.dtype).mean(-2)
        by_row, by_column = squares.nanmean(-1), squares.nanmean(-2)
        whole = squares.nanmean((-2, -1))
    else:  # three times as fast
        number, present = torch.tensor(squares.shape[-1]), torch.ones(())
        by_row, by_column = squares.mean(-1), squares.mean(-2)
        whole = by_column.mean(-1)
    rows = 0.5 * (number * _excess(by_row)).nanmean(-1)
    columns = 0.5 * (present * _excess(by_column)).nansum(-1)
    return torch.stack([whole.log(), rows, columns], -1)


def _excess(c: Tensor) -> Tensor:
    return c - 1 - c.clamp(min=1e-12).log()


def correlation_statistic(residuals: Tensor) -> Tensor:
    r"""Return the nats per row in the correlations C, :math:`-\tfrac12 \log \det C`."""
    r = residuals.double().nan_to_num(0.0)
    r = (r - r.mean(-2, keepdim=True)) / r.std(-2, keepdim=True).clamp(min=1e-12)
    c = r.mT @ r / (r.shape[-2] - 1) + 1e-9 * torch.eye(r.shape[-1], dtype=r.dtype)
    return -0.5 * torch.linalg.slogdet(c)[1]


def clipped(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Clip standardized residuals of both samples at `CLIP` deviations, or as many times the robust
    deviation of a column in either sample if this is larger.

    An element that a model predicts almost surely, such as a background pixel, has residuals near 0
    and rarely one of 1,000. Their mean square says nothing.
    """
    medians = [side.abs().nanmedian(0).values.nan_to_num(0.0) for side in (first, second)]
    limit = CLIP * (torch.maximum(*medians) / NORMAL_MEDIAN).clamp(min=1)
    return first.clamp(-limit, limit), second.clamp(-limit, limit)


def explained(causes: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    r"""Regress standardized residuals (..., n, d) on causes (..., n, k); NaN is missing.

    The terms are a constant, the causes and their squares, and of few causes the products, but at
    most a quarter of the number of rows. Returns the nats per row that the regression would gain
    as a part of the mean, :math:`\tfrac12 \sum_j (m_j - l_j)` with the mean squares m before and l
    after it (corrected for the number of terms); and the residuals after it.
    """
    n, holes = residuals.shape[-2], residuals.isnan()
    q, _ = torch.linalg.qr(_terms(causes)[..., : n // 4])
    seen = n - holes.sum(-2, keepdim=True)
    slopes = q.mT @ residuals.nan_to_num(0.0) * (n / seen)
    chance = q.shape[-1] / seen.clamp(min=2 * q.shape[-1])
    left = (residuals - q @ slopes).mul_((1 - chance).rsqrt())
    gained = residuals.square().nansum((-2, -1)) - left.square().nansum((-2, -1))
    return 0.5 * gained / n, left


def _terms(causes: Tensor) -> Tensor:
    z = causes - causes.mean(-2, keepdim=True)
    first, second = torch.triu_indices(width := z.shape[-1], width, 1)
    products = z[..., first] * z[..., second] if width <= SQUARES else z[..., :0]
    return torch.cat([z.new_ones(*z.shape[:-1], 1), z, z.square(), products], -1)


def some_columns(width: int, seed: int = 0) -> Tensor:
    """Return the indices of at most `WIDEST` columns, at random."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    return order[:WIDEST].sort().values

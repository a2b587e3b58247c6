"""A simple model of the same data beside a pair: probabilistic PCA, or independent columns."""

from math import log, pi
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALLEST = 1e-8
"""The least variance of the noise, relative to the mean variance of the columns. Below it, a
column is a linear function of others, and the likelihood has no maximum."""


class Baseline(NamedTuple):
    """log p(x) of held-out rows under a simple model that is fitted to the training rows."""

    name: str
    log_likelihood: float
    """Mean over the rows, nats per example, in the units of the data."""


def ppca(train: Tensor, held: Tensor, dim: int) -> float | None:
    r"""log p(x) of held-out rows (n, d) under probabilistic PCA, in closed form.

    :math:`x \sim N(m, W W^T + s^2 I)` with q latents, in standard units of each column. The maximum
    likelihood has the q greatest eigenvectors of the covariance, and :math:`s^2` is the mean of the
    other eigenvalues. The density is that of x, so the logarithms of the columns' standard
    deviations are subtracted. None if :math:`s^2` is 0 or there are fewer than two rows.

    Tipping & Bishop, Probabilistic principal component analysis, 1999.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> round(ppca(x, x, 1), 3)  # N(1, 1)
    -1.419
    """
    train, held = train.double(), held.double()
    center, spread = train.mean(0), train.std(0, correction=0)
    kept = spread > 0
    if len(train) < 2 or not bool(kept.all()):
        return None
    z, rows = (train - center) / spread, (held - center) / spread
    values, vectors = torch.linalg.eigh(z.T @ z / len(z))
    d = len(values)
    q = min(dim, d - 1)
    noise = values[: d - q].mean()
    if noise < SMALLEST:
        return None
    variances = torch.cat([noise.expand(d - q), values[d - q :]])
    squares = ((rows @ vectors).square() / variances).sum(1)
    logs = -0.5 * (squares + variances.log().sum() + d * log(2 * pi))
    return (logs - spread.log().sum()).mean().item()


def independent_bits(train: Tensor, held: Tensor) -> float:
    """log p(x) of held-out rows in [0, 1] under independent columns of 0 and 1.

    Intensities are probabilities of 1, so the result is the mean over their binarizations. The
    shares of the training rows have one row of each value added.

    >>> x = torch.tensor([[0.0], [1.0]])
    >>> round(independent_bits(x, x), 3)  # log(1 / 2)
    -0.693
    """
    train, held = train.flatten(1).double(), held.flatten(1).double()
    share = (train.sum(0) + 1) / (len(train) + 2)
    return (held * share.log() + (1 - held) * (1 - share).log()).sum(1).mean().item()


def independent_codes(train: Tensor, held: Tensor, number: int) -> Tensor:
    """log p of codes (n,) under the shares of the training rows, plus one row of each code."""
    known = train[~train.isnan()].long()
    shares = (torch.bincount(known, minlength=number) + 1.0).double()
    logs = (shares / shares.sum()).log()
    return torch.where(held.isnan(), 0.0, logs[held.nan_to_num(0.0).long()])


def independent_numbers(train: Tensor, held: Tensor) -> Tensor:
    """log p of numbers (n,) under the normal distribution of the known training rows."""
    known = train[~train.isnan()].double()
    scale = known.std(correction=0).clamp(min=1e-12)
    logs = torch.distributions.Normal(known.mean(), scale, validate_args=False).log_prob(
        held.double()
    )
    return torch.where(held.isnan(), 0.0, logs)


def of_table(schema: Any, train: Tensor, held: Tensor, dim: int) -> Baseline:
    """PCA of the numeric columns with shares of the categories, or independent columns.

    Rows with missing entries have no PCA in closed form.
    """
    columns = schema.data
    numeric = [j for j, column in enumerate(columns) if not column.coded]
    whole = not bool(train[:, numeric].isnan().any() | held[:, numeric].isnan().any())
    found = ppca(train[:, numeric], held[:, numeric], dim) if whole and numeric else None
    total = 0.0 if found is None else found
    name = "independent columns" if found is None else "probabilistic PCA"
    if found is not None and len(numeric) < len(columns):
        name += " and shares of categories"
    for j, column in enumerate(columns):
        if column.coded:
            number = len(column.categories)
            total += independent_codes(train[:, j], held[:, j], number).mean().item()
        elif found is None:
            total += independent_numbers(train[:, j], held[:, j]).mean().item()
    return Baseline(name, total)

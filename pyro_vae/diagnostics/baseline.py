"""A simple model of the same data beside a pair: probabilistic PCA, or independent entries."""

from math import inf, log, pi
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.parts.recurrent import token_lengths

SMALLEST = 1e-8
"""The least variance of the noise, relative to the mean variance of the columns. Below it, a
column is a linear function of others, and the likelihood has no maximum."""

MOST_CONCENTRATED = 1e4
"""The largest concentration of angles, which equal angles would make infinite."""


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


def independent_levels(train: Tensor, held: Tensor, levels: int) -> float:
    """log p(x) of held-out rows of levels 0 to levels - 1, as rounded normal entries.

    The first and the last level extend to infinity. The training rows have one row added that is
    spread evenly over all levels.

    >>> x = torch.tensor([[0.0], [1.0]])  # n = 2 rows: (2 * 0.5 + 1 * 0.5) / 3 for each level
    >>> round(independent_levels(x, x, 2), 3)
    -0.693
    """
    train, held = train.flatten(1).double(), held.flatten(1).double()
    center, spread = train.mean(0), train.std(0, correction=0).clamp(min=1e-6)
    low = torch.where(held < 0.5, -inf, (held - 0.5 - center) / spread)
    high = torch.where(held > levels - 1.5, inf, (held + 0.5 - center) / spread)
    normal = torch.special.ndtr(high) - torch.special.ndtr(low)
    n = len(train)
    return ((n * normal + 1 / levels) / (n + 1)).log().sum(1).mean().item()


def independent_counts(train: Tensor, held: Tensor, by_total: bool = False) -> float:
    r"""log p(x) of held-out counts (n, ...) under independent negative binomials, in closed form.

    The mean :math:`m` of a column is that of the training rows, plus one row of ones. With
    ``by_total`` it is the share of the column in the total of the row, as for a likelihood with a
    library size. The variance is :math:`m + m^2 / r`, with the :math:`r` that fits the squared
    residuals. A column whose residuals are not above the mean is Poisson.

    >>> x = torch.tensor([[0.0], [2.0]])  # Poisson with mean 1
    >>> round(independent_counts(x, x), 3)  # (-1 + (-1 - log 2)) / 2
    -1.347
    """
    train, held = train.flatten(1).double(), held.flatten(1).double()
    sums = train.sum(0) + 1
    if by_total:
        mean, means = ((x.sum(1, keepdim=True) * (sums / sums.sum())) for x in (train, held))
    else:
        mean, means = ((sums / (len(train) + 1)).expand_as(x) for x in (train, held))
    extra = ((train - mean).square() - mean).sum(0) / mean.square().sum(0)  # 1 / r
    poisson = torch.distributions.Poisson(means).log_prob(held)
    r = 1 / extra.clamp(min=1e-8)
    gamma = torch.lgamma(held + r) - torch.lgamma(r) - torch.lgamma(held + 1)
    binomial = gamma + r * torch.log(r / (r + means)) + held * torch.log(means / (r + means))
    return torch.where(extra > 1e-8, binomial, poisson).sum(1).mean().item()


def pairs_of_characters(train: Tensor, held: Tensor, number: int) -> float:
    """log p(x) of held-out rows of tokens (n, length): each token depends on the one before it.

    Token 0 ends a row and also comes before its first token. The pairs of the training rows have
    each pair added once.

    >>> x = torch.tensor([[1, 0, 0]])  # the pairs (0, 1) and (1, 0), each (1 + 1) / (1 + 2)
    >>> round(pairs_of_characters(x, x, 2), 3)  # 2 log(2 / 3)
    -0.811
    """
    counts = torch.ones(number * number, dtype=torch.double)
    counts += torch.bincount(_pairs(train, number), minlength=number * number)
    logs = counts.view(number, number).log()
    logs = (logs - logs.logsumexp(1, keepdim=True)).flatten()
    return (logs[_pairs(held, number)].sum() / len(held)).item()


def _pairs(tokens: Tensor, number: int) -> Tensor:
    """The pairs of a token and the one before it as numbers (m,), up to the end of each row."""
    tokens = tokens.long()
    before = torch.nn.functional.pad(tokens[:, :-1], (1, 0))
    inside = torch.arange(tokens.shape[1]) < token_lengths(tokens)[:, None]
    return (before * number + tokens)[inside]


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


def independent_angles(train: Tensor, held: Tensor, period: float) -> Tensor:
    """log p of circular numbers (n,) under the von Mises distribution of the known training rows.

    Its mean direction and its concentration, at most `MOST_CONCENTRATED`, have maximum likelihood.
    """
    from scipy.stats import vonmises

    scale = 2 * pi / period
    concentration, loc, _ = vonmises.fit(train[~train.isnan()].double().numpy() * scale, fscale=1)
    concentration = min(concentration, MOST_CONCENTRATED)
    logs = vonmises.logpdf(held.double().numpy() * scale, concentration, loc) + log(scale)
    return torch.from_numpy(logs).where(~held.isnan(), 0.0)


def of_table(schema: Any, train: Tensor, held: Tensor, dim: int) -> Baseline:
    """PCA of the continuous and positive columns, and the other columns independent of them.

    A count has a probability, like a category, and a circular number has no mean, so a normal
    distribution serves neither. Rows with missing entries have no PCA in closed form.
    """
    columns = schema.data
    numeric = [j for j, column in enumerate(columns) if column.kind in ("continuous", "positive")]
    whole = not bool(train[:, numeric].isnan().any() | held[:, numeric].isnan().any())
    found = ppca(train[:, numeric], held[:, numeric], dim) if whole and numeric else None
    total = 0.0 if found is None else found
    name = "independent columns" if found is None else "probabilistic PCA"
    if found is not None and len(numeric) < len(columns):
        coded = all(column.coded for j, column in enumerate(columns) if j not in numeric)
        name += " and shares of categories" if coded else " and independent columns"
    for j, column in enumerate(columns):
        if found is None or j not in numeric:
            total += _independent(column, train[:, j], held[:, j])
    return Baseline(name, total)


def _independent(column: Any, train: Tensor, held: Tensor) -> float:
    """log p of a column by itself, the mean over the held-out rows; 0 for a missing entry."""
    if column.kind == "count":
        rows = held[~held.isnan()][:, None]
        known = train[~train.isnan()][:, None]
        return independent_counts(known, rows) * len(rows) / len(held) if len(rows) else 0.0
    if column.coded:
        logs = independent_codes(train, held, len(column.categories))
    elif column.kind == "circular":
        logs = independent_angles(train, held, column.period)
    else:
        logs = independent_numbers(train, held)
    return logs.mean().item()

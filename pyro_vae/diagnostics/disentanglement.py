"""Disentanglement: whether each factor of the data has its own unit of the code."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from pyro_vae.errors import UsageError
from pyro_vae.pairs.arrays import as_tensor

BINS = 20
"""Number of bins of equal width for the mutual information of a unit and a factor."""

TREES = 20
"""Number of trees in a forest that predicts a factor."""

LEAST_ROWS = 6
"""A forest needs at least two rows in the held-out third."""

VOTES, VOTERS = 800, 64
"""Votes of the FactorVAE score (one half for training, one half for testing), and rows in each."""


class Disentanglement(NamedTuple):
    """Scores of codes against the factors of the data; 1 is best.

    These scores need the true factors. Without assumptions, no objective reaches good scores
    (Locatello et al., 2019, https://arxiv.org/abs/1811.12359).
    """

    mig: float
    r"""Mutual information gap: the difference between the two units with the most information about
    a factor, :math:`(I_1 - I_2)/H`, by histograms, averaged over factors. Near 0 for noise. Chen et
    al., 2018."""
    sap: float
    """Separated attribute predictability: the same difference in squared correlation. Near 0 for
    noise. Kumar, Sattigeri & Balakrishnan, 2018."""
    disentanglement: float
    """DCI: whether each unit is important for only one factor, by importances in random forests,
    weighted by the importance of the unit. Eastwood & Williams, 2018."""
    completeness: float
    """DCI: whether each factor needs only one unit, averaged over factors."""
    informativeness: float
    """DCI: 1 minus the error of the forests on a held-out third, relative to the error of the mean.
    For noise it is near 0 and slightly negative."""
    factor_vae: float
    """Accuracy of a vote that finds the fixed factor from the unit that varies least. For noise it
    is 1/factors. Kim & Mnih, 2018."""


def disentanglement_scores(codes: Tensor, factors: Tensor, *, seed: int = 0) -> Disentanglement:
    """Score codes against the factors of the data.

    Arguments:
        codes: posterior means (n, units), for example from `pyro_vae.encode`.
        factors: the index of each factor's value, integers (n, factors). Rows with -1 (missing) are
            left out. The order of the values matters for SAP and DCI, which predict them as
            numbers.
        seed: random seed of the forests and votes.

    Factors should be independent over the rows, as in all combinations or a random subset of them.
    If two factors are dependent, they cannot have separate units.

    Raises `UsageError` for shapes that do not match, for fewer than two units, and if a factor or
    all units are constant.

    >>> import torch
    >>> factors = torch.cartesian_prod(torch.arange(5), torch.arange(4), torch.arange(6))
    >>> scores = disentanglement_scores(factors.double(), factors)
    >>> [round(score, 2) for score in scores]
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    z, v = _checked(codes, factors)
    dci = _dci(z, v, seed)
    return Disentanglement(_mig(z, v), _sap(z, v), *dci, _factor_vae(z, v, seed))


def _checked(codes: Tensor, factors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays, without rows that lack a factor."""
    codes = codes.detach() if isinstance(codes, Tensor) else as_tensor(codes, "codes")
    factors = as_tensor(factors, "factors")
    if codes.dim() != 2 or factors.dim() != 2 or len(codes) != len(factors):
        raise UsageError(
            "`codes` must have shape (n, units) and `factors` shape (n, factors), got "
            f"{tuple(codes.shape)} and {tuple(factors.shape)}"
        )
    if factors.is_floating_point():
        raise UsageError(f"must be integers, got {factors.dtype}", argument="factors")
    known = (factors.long() >= 0).all(1)
    if int(known.sum()) < LEAST_ROWS:
        raise UsageError(
            f"must be known (not -1) in at least {LEAST_ROWS} rows, got {int(known.sum())}",
            argument="factors",
        )
    z, v = codes[known].double().cpu().numpy(), factors[known].cpu().numpy()
    if not np.isfinite(z).all():
        raise UsageError("must be finite", argument="codes")
    for k in range(v.shape[1]):
        if (v[:, k] == v[0, k]).all():
            raise UsageError(f"factor {k} must have at least 2 values, got 1")
    if z.shape[1] < 2 or not (z.std(0) > 0).any():
        raise UsageError(
            f"must have at least 2 units, of which at least one varies, got {z.shape[1]}",
            argument="codes",
        )
    return z, v


def _mig(z: np.ndarray, v: np.ndarray) -> float:
    from sklearn.metrics import mutual_info_score

    cut = np.stack([np.digitize(unit, _edges(unit)) for unit in z.T])
    gaps = []
    for factor in v.T:
        information = [mutual_info_score(factor, unit) for unit in cut]
        gaps.append(_gap(information) / mutual_info_score(factor, factor))
    return float(np.mean(gaps))


def _edges(unit: np.ndarray) -> np.ndarray:
    return np.linspace(unit.min(), unit.max(), BINS + 1)[1:-1]


def _sap(z: np.ndarray, v: np.ndarray) -> float:
    def standard(a: np.ndarray) -> np.ndarray:
        return (a - a.mean(0)) / np.where(a.std(0) > 0, a.std(0), 1)

    squared = (standard(z).T @ standard(v) / len(z)) ** 2
    return float(np.mean([_gap(factor) for factor in squared.T]))


def _gap(scores: Sequence[float]) -> float:
    second, first = sorted(scores)[-2:]
    return first - second


def _dci(z: np.ndarray, v: np.ndarray, seed: int) -> tuple[float, float, float]:
    from sklearn.ensemble import RandomForestRegressor

    order = np.random.default_rng(seed).permutation(len(z))
    held, train = np.split(order, [len(z) // 3])
    importances, errors = [], []
    for factor in v.T:
        forest = RandomForestRegressor(TREES, random_state=seed).fit(z[train], factor[train])
        importances.append(forest.feature_importances_)
        wrong = np.mean((forest.predict(z[held]) - factor[held]) ** 2)
        errors.append(np.sqrt(wrong / np.mean((factor[train].mean() - factor[held]) ** 2)))
    return *_purities(np.stack(importances, 1)), float(1 - np.mean(errors))


def _purities(importances: np.ndarray) -> tuple[float, float]:
    """Return disentanglement and completeness of importances (units, factors)."""
    weights = importances.sum(1) / importances.sum()
    by_unit, by_factor = (1 - _entropy(part) for part in (importances, importances.T))
    return float(weights @ by_unit), float(by_factor.mean())


def _entropy(rows: np.ndarray) -> np.ndarray:
    """Return the entropy of each row as a distribution, relative to that of the uniform one."""
    from scipy.stats import entropy

    if rows.shape[1] == 1:
        return np.zeros(len(rows))
    total = rows.sum(1, keepdims=True)
    uniform = np.full_like(rows, 1 / rows.shape[1])
    return entropy(np.where(total > 0, rows, uniform), axis=1) / np.log(rows.shape[1])


def _factor_vae(z: np.ndarray, v: np.ndarray, seed: int) -> float:
    random, scale = np.random.default_rng(seed), z.std(0)
    votes = np.zeros((2, z.shape[1], v.shape[1]))
    for vote in range(VOTES):
        k = random.integers(v.shape[1])
        alike = np.flatnonzero(v[:, k] == v[random.integers(len(v)), k])
        rows = random.choice(alike, VOTERS)
        spread = z[rows].var(0) / np.where(scale > 0, scale**2, 1)
        votes[vote % 2, np.where(scale > 0, spread, np.inf).argmin(), k] += 1
    train, test = votes
    return float(test[np.arange(z.shape[1]), train.argmax(1)].sum() / test.sum())

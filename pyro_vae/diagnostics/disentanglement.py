"""Disentanglement: whether each factor that made the data has a unit of the code to itself."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from pyro_vae.errors import UsageError
from pyro_vae.pairs.arrays import as_tensor

BINS = 20
"""Bins of equal width into which each unit is cut for its mutual information with the factors."""

TREES = 20
"""Trees of a forest that predicts a factor."""

VOTES, VOTERS = 800, 64
"""Votes of the FactorVAE score, a half to learn from and a half to judge by, and rows in each."""


class Disentanglement(NamedTuple):
    """Scores of codes against the factors that made the data; 1 is best.

    None can be told without factors, and no objective reaches a good one without assumptions
    (Locatello et al., 2019, https://arxiv.org/abs/1811.12359).
    """

    mig: float
    r"""Mutual information gap: mean over factors of the difference between the two units that tell
    most of it, :math:`(I_1 - I_2)/H`, by histograms. Near 0 on noise. Chen et al., 2018."""
    sap: float
    """Separated attribute predictability: the same difference in squared correlation. Near 0 on
    noise. Kumar, Sattigeri & Balakrishnan, 2018."""
    disentanglement: float
    """DCI: whether a unit is important for one factor alone, by importances in random forests,
    weighed by the unit's importance. Eastwood & Williams, 2018."""
    completeness: float
    """DCI: whether a factor needs one unit alone, mean over factors."""
    informativeness: float
    """DCI: 1 - the error of the forests on a held-out third, relative to that of the mean; near
    0 on noise, and somewhat below."""
    factor_vae: float
    """Accuracy of telling which factor was held fixed by the unit that varies least: 1/factors, by
    chance, on noise. Kim & Mnih, 2018."""


def disentanglement_scores(codes: Tensor, factors: Tensor, *, seed: int = 0) -> Disentanglement:
    """Score codes against the factors that made the data.

    Arguments:
        codes: posterior means (n, units), as of `pyro_vae.encode`.
        factors: the index of each factor's value, integers (n, factors), -1 where it is missing:
            such rows are left out. Their order counts in SAP and DCI, which predict them as
            numbers.
        seed: of the forests and votes.

    Factors should be independent over the rows, as in all combinations or a random part of them:
    a factor that goes along with another cannot have a unit to itself.

    Raises `UsageError` for shapes that do not fit, fewer than two units, and a factor or all units
    that do not vary.

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
    """Both as arrays, of the rows that have every factor."""
    codes = codes.detach() if isinstance(codes, Tensor) else as_tensor(codes, "codes")
    factors = as_tensor(factors, "factors")
    if codes.dim() != 2 or factors.dim() != 2 or len(codes) != len(factors):
        raise UsageError(
            "codes (n, units) and factors (n, factors) are expected, tensors of shapes "
            f"{tuple(codes.shape)} and {tuple(factors.shape)} came"
        )
    if factors.is_floating_point():
        raise UsageError(f"factors are whole numbers, {factors.dtype} came")
    known = (factors.long() >= 0).all(1)
    if int(known.sum()) < 2:
        raise UsageError("factors are missing (-1) in all rows but one, or in all")
    z, v = codes[known].double().cpu().numpy(), factors[known].cpu().numpy()
    if not np.isfinite(z).all():
        raise UsageError("codes are not finite")
    for k in range(v.shape[1]):
        if (v[:, k] == v[0, k]).all():
            raise UsageError(f"factor {k} has one value only, two or more are expected")
    if z.shape[1] < 2 or not (z.std(0) > 0).any():
        raise UsageError(f"two units or more, of which one varies, are expected; {z.shape[1]} came")
    return z, v


def _mig(z: np.ndarray, v: np.ndarray) -> float:
    from sklearn.metrics import mutual_info_score

    cut = np.stack([np.digitize(unit, _edges(unit)) for unit in z.T])
    gaps = []
    for factor in v.T:
        told = [mutual_info_score(factor, unit) for unit in cut]
        gaps.append(_gap(told) / mutual_info_score(factor, factor))
    return float(np.mean(gaps))


def _edges(unit: np.ndarray) -> np.ndarray:
    return np.linspace(unit.min(), unit.max(), BINS + 1)[1:-1]


def _sap(z: np.ndarray, v: np.ndarray) -> float:
    def standard(a: np.ndarray) -> np.ndarray:
        return (a - a.mean(0)) / np.where(a.std(0) > 0, a.std(0), 1)

    squared = (standard(z).T @ standard(v) / len(z)) ** 2
    return float(np.mean([_gap(factor) for factor in squared.T]))


def _gap(told: Sequence[float]) -> float:
    second, first = sorted(told)[-2:]
    return first - second


def _dci(z: np.ndarray, v: np.ndarray, seed: int) -> tuple[float, float, float]:
    from sklearn.ensemble import RandomForestRegressor

    order = np.random.default_rng(seed).permutation(len(z))
    held, learnt = np.split(order, [len(z) // 3])
    importances, errors = [], []
    for factor in v.T:
        forest = RandomForestRegressor(TREES, random_state=seed).fit(z[learnt], factor[learnt])
        importances.append(forest.feature_importances_)
        wrong = np.mean((forest.predict(z[held]) - factor[held]) ** 2)
        errors.append(np.sqrt(wrong / np.mean((factor[learnt].mean() - factor[held]) ** 2)))
    return *_purities(np.stack(importances, 1)), float(1 - np.mean(errors))


def _purities(importances: np.ndarray) -> tuple[float, float]:
    """Disentanglement and completeness of importances (units, factors)."""
    weights = importances.sum(1) / importances.sum()
    by_unit, by_factor = (1 - _entropy(part) for part in (importances, importances.T))
    return float(weights @ by_unit), float(by_factor.mean())


def _entropy(rows: np.ndarray) -> np.ndarray:
    """Of each row as a distribution, over that of the uniform one."""
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
    learnt, judged = votes
    return float(judged[np.arange(z.shape[1]), learnt.argmax(1)].sum() / judged.sum())

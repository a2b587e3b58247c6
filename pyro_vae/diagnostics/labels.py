"""How well codes and discrete latents predict the labels of data."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import Preparation
from pyro_vae.data.sources import Source
from pyro_vae.errors import UsageError
from pyro_vae.inference.passes import DRAWS
from pyro_vae.pairs import enumeration, summing
from pyro_vae.pairs.scope import using


class LabelScores:
    """The scores that the labels allow, and the reasons why others are missing."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"probe_accuracy": None}
        self.missing: dict[str, str] = {}

    def take(self, names: Sequence[str], compute: Callable[[], Any]) -> None:
        """Compute scores with these names; a `UsageError` becomes the reason if they fail."""
        try:
            value = compute()
        except UsageError as error:
            self.missing |= dict.fromkeys(names, str(error))
            return
        values = value if isinstance(value, tuple) else (value,)
        self.found |= dict(zip(names, values, strict=True))


def score_classes(
    scores: LabelScores,
    pair: nn.Module,
    rows: Source,
    prepare: Preparation,
    labels: Tensor,
    batch_size: int,
    seed: int,
) -> None:
    """Score how well the most probable values of the first discrete latent predict labels."""
    first = prepare(rows.first(2))
    names = enumeration.discrete(pair, first)
    if not names:
        return
    with using(pair, seed):
        named = summing.is_named(pair, first, names[0])
    with using(pair, seed):  # the same draws as in `predict`
        probabilities = torch.cat(
            [
                summing.probabilities(pair, prepare(batch), names[0], DRAWS)
                for batch in rows.batches(batch_size)
            ]
        ).cpu()
    known = labels >= 0
    sure, found = probabilities[known].max(1)
    true, classes = labels[known], probabilities.shape[1]
    if named:
        scores.take(("accuracy", "calibration_error"), lambda: _named(sure, found, true, classes))
        return
    scores.take(("clustering_accuracy",), lambda: clustering_accuracy(found, _some(true)))
    scores.take(("mutual_information",), lambda: _mutual_information(found, _some(true, 2)))


def _named(sure: Tensor, found: Tensor, true: Tensor, classes: int) -> tuple[float, float]:
    """Return accuracy and calibration error of predictions that are labels."""
    if len(_some(true)) and int(true.max()) >= classes:
        raise UsageError(
            f"labels must be between 0 and {classes - 1}, the classes of the pair, got "
            f"{int(true.max())}"
        )
    right = (found == true).double()
    return right.mean().item(), calibration_error(sure, right)


def _some(labels: Tensor, classes: int = 1, of: str = "x") -> Tensor:
    """Return the labels if they have enough classes; raise `UsageError` otherwise."""
    if len(labels) == 0:
        raise UsageError(f"every label of {of} is missing (-1)")
    if len(labels.unique()) < classes:
        raise UsageError(
            f"every label of {of} is {int(labels[0])}, but this score needs two classes"
        )
    return labels


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    r"""Compute the expected calibration error, the mean distance of probability and accuracy.

    :math:`\sum_b \tfrac{n_b}{n} |\mathrm{accuracy}_b - \mathrm{confidence}_b|`

    Arguments:
        confidence: the probability of each prediction, of shape (n,).
        right: 1 for each correct prediction and 0 otherwise, of the same shape.
        bins: number of bins of equal width.

    Naeini et al., 2015; Guo et al., 2017 (https://arxiv.org/abs/1706.04599).

    >>> calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([1.0, 0.0]))
    0.25
    """
    which = (confidence.double() * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, which, right.double() - confidence.double())
    return gaps.abs().sum().item() / len(right)


def clustering_accuracy(clusters: Tensor, labels: Tensor) -> float:
    """Return the accuracy of clusters (n,) as labels (n,), under the best one-to-one matching.

    >>> clustering_accuracy(torch.tensor([1, 1, 0, 2]), torch.tensor([0, 0, 1, 1]))
    0.75
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(labels.numpy(), clusters.numpy())
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / len(labels))


def _mutual_information(clusters: Tensor, labels: Tensor) -> float:
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(labels.numpy(), clusters.numpy()))


def flat_codes(codes: dict[str, Tensor]) -> Tensor:
    return torch.cat([code.float() for code in codes.values()], 1)


def probe_accuracy_of(
    codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor
) -> float:
    """Return the accuracy of a linear classifier on the rows that have labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known, asked = labels >= 0, test_labels >= 0
    labels, test_labels = _some(labels[known], 2, "train"), _some(test_labels[asked])
    if not bool(torch.isfinite(codes).all() and torch.isfinite(test_codes).all()):
        raise UsageError("posterior means are not finite in some rows")
    strange = sorted(set(test_labels.tolist()) - set(labels.tolist()))
    if strange:
        warnings.warn(
            f"the linear probe counts {int(np.isin(test_labels, strange).sum())} rows as errors, "
            f"because train lacks their labels: {', '.join(map(str, strange[:10]))}",
            stacklevel=4,
        )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(codes[known].numpy(), labels.numpy())
    return float(probe.score(test_codes[asked].numpy(), test_labels.numpy()))

"""L-C2ST: a classifier that tells the guide's draws from true latents, read at real rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import Tensor, nn

from pyro_vae.data.preparation import whole
from pyro_vae.data.sources import Rows
from pyro_vae.diagnostics.guide_rows import GuideRows, SimulatedRows, guide_rows
from pyro_vae.errors import UsageError
from pyro_vae.pairs.masks import missing_entries
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.particles import Particles
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.threads import alone

MOST_INPUTS = 8
"""Principal components of x and of the guide's moments that the classifier reads."""

LEAST_SCALE = 1e-6
"""A constant unit has the scale 0; it is divided by this number instead."""

FARTHEST = 20.0
"""Standardized latents are cut here, so that one far value does not dominate the classifier."""


@dataclass(frozen=True)
class LocalC2ST:
    """The results of `local_c2st`."""

    statistic: Tensor
    """The mean of (d - 1/2)^2 over draws of the guide at each row, (n,). Here d is the probability
    that the classifier gives to the guide. 0 means that it cannot tell, and 1/4 that it can."""
    p_values: Tensor
    """For each row, the probability of such a statistic if the guide is exact, (n,)."""
    overall_statistic: float
    """The mean of ``statistic`` over rows."""
    overall_p_value: float
    """The probability of such a mean if the guide is exact; at least 1 / (num_null + 1)."""
    null: Tensor
    """The statistics after training on shuffled classes, of shape (num_null, n)."""
    accuracy: float
    """The share of right answers of the classifier on simulations that it did not see; 0.5 means
    that it cannot tell."""
    num_simulations: int
    """Simulated data on which the classifier is trained."""

    def worst(self, number: int = 10) -> Tensor:
        """Return the indices of the rows with the largest statistic over that of their null."""
        return (self.statistic - self.null.mean(0)).argsort(descending=True)[:number]

    def as_dict(self) -> dict[str, Any]:
        """Return the overall test and the number of rows with small p-values for metrics.json."""
        return {
            "num_examples": len(self.statistic),
            "num_simulations": self.num_simulations,
            "num_null": len(self.null),
            "statistic": self.overall_statistic,
            "null_statistic": self.null.mean().item(),
            "p_value": self.overall_p_value,
            "rows_with_p_at_most_0.05": int((self.p_values <= 0.05).sum()),
            "accuracy": self.accuracy,
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        few = int((self.p_values <= 0.05).sum())
        return "\n".join(
            [
                f"L-C2ST statistic      {self.overall_statistic:.4f}, "
                f"{self.null.mean():.4f} if the guide is exact",
                f"p-value               {self.overall_p_value:.3f}",
                f"rows with p <= 0.05   {few} of {len(self.p_values)}",
                f"accuracy              {self.accuracy:.3f} on model draws, 0.5 if exact",
            ]
        )


@alone()
def local_c2st(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_simulations: int = 1000,
    num_draws: int = 50,
    num_null: int = 50,
    classifier: Any = None,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> LocalC2ST:
    r"""Test whether the guide equals the posterior at each row, with a classifier.

    The classifier learns to tell :math:`(z, x) \sim p(z, x)`, with the true latents of simulated
    data, from :math:`(z, x),\ z \sim q(z|x)`, at the same x. If the guide is exact, it cannot. At a
    real row :math:`x_o` the statistic is the mean of :math:`(d(z, x_o) - \tfrac12)^2` over
    :math:`z \sim q(z|x_o)`. Its distribution for an exact guide is that of classifiers trained on
    classes that are swapped at random within each x.

    Latents enter after standardization by the guide's mean and scale. x enters as the principal
    components of x and of these means and scales.

    Arguments:
        pair: any pair with ``template(n)`` and without global latents.
        x, context: real data, as `pyro_vae.fit` takes them. Simulations take rows of the context.
        num_simulations: simulated data, at least 100.
        num_draws: draws of the guide at each real row.
        num_null: classifiers on swapped classes, at least 19; the price of the test.
        classifier: any classifier of scikit-learn with ``predict_proba``. The default is a logistic
            regression on all products of two inputs.
        binarize, seed: as in `pyro_vae.evaluate`.
        progress: show a bar with the seconds of all classifiers.

    Raises `UsageError` for global latents, and if the model cannot simulate data.
    Linhart, Gramfort & Rodrigues, 2023 (https://arxiv.org/abs/2306.03580).

    >>> from pyro_vae.models.exact import linear_gaussian
    >>> pair = linear_gaussian(spread=0.5)
    >>> x = pair.marginal().sample((20,))
    >>> found = local_c2st(pair, x, num_simulations=400, num_null=19, progress=False)
    >>> found.overall_p_value <= 0.2
    True
    """
    for name, value, least in (
        ("num_simulations", num_simulations, 100),
        ("num_draws", num_draws, 2),
        ("num_null", num_null, 19),
    ):
        if value < least:
            raise UsageError(f"must be at least {least}, got {value}", argument=name)
    real = whole(pair, x, context, binarize)
    with using(pair, seed):
        truth, simulated, observed = _drawn(pair, real, num_simulations, num_draws)
    inputs = _Inputs(simulated)
    swaps = np.random.default_rng(seed)
    model = classifier if classifier is not None else _classifier()
    total = num_null + 2
    with bar(progress, total, "L-C2ST", delay=2) as shown:
        both = inputs(simulated, truth), inputs(simulated, simulated.values)
        at = inputs(observed, observed.values)
        half = num_simulations // 2
        accuracy = _accuracy(model, both, half)
        shown.update(1)
        found = []
        for trial in range(num_null + 1):
            swap = swaps.random(num_simulations) < 0.5 if trial else np.zeros(num_simulations, bool)
            found.append(_statistic(clone(model), both, swap, at, len(real[0])))
            shown.update(1)
    statistic, null = found[0], torch.stack(found[1:])
    return LocalC2ST(
        statistic,
        _p_value(statistic, null),
        statistic.mean().item(),
        _p_value(statistic.mean(), null.mean(1)).item(),
        null,
        accuracy,
        num_simulations,
    )


def _drawn(
    pair: nn.Module, real: Batch, number: int, draws: int
) -> tuple[Tensor, GuideRows, GuideRows]:
    """True latents of simulated data (1, number, units), the guide there, and at real data."""
    made = SimulatedRows(pair, number, real[1:], "local_c2st", missing_entries(real[0]))
    given, drawn = (tuple(batch[0].shape[1:]) for batch in (real, made.batch))
    if given != drawn:
        raise UsageError(
            f"rows of x must have shape {drawn}, as those of template(n) that the model draws, got "
            f"{given}"
        )
    observed = guide_rows(Particles(pair, real), made.units, real, draws)
    return made.truth, made.guide(1), observed


class _Inputs:
    """The inputs of the classifier; those of the rows are components of x and of the moments."""

    def __init__(self, rows: GuideRows) -> None:
        self.reduced = [
            make_pipeline(StandardScaler(), PCA(min(MOST_INPUTS, *part.shape), random_state=0)).fit(
                part
            )
            for part in _known(rows)
        ]

    def __call__(self, rows: GuideRows, values: Tensor) -> Any:
        """Return the inputs at these values, of shape (draws, n, inputs)."""
        z = (values - rows.mean) / rows.scale.clamp(min=LEAST_SCALE)
        z = torch.where(rows.counts, z, 0.0).clamp(-FARTHEST, FARTHEST)
        both = zip(self.reduced, _known(rows), strict=True)
        known = np.concatenate([pipeline.transform(part) for pipeline, part in both], 1)
        return np.concatenate([z.numpy(), np.broadcast_to(known, (len(z), *known.shape))], 2)


def _known(rows: GuideRows) -> tuple[Any, Any]:
    """What is known of the rows: x, and the guide's means and log scales."""
    parts = rows.mean, rows.scale.clamp(min=LEAST_SCALE).log()
    moments = torch.cat([torch.where(rows.counts, part, 0.0) for part in parts], 1)
    return rows.x.numpy(), moments.numpy()


def _classifier() -> Any:
    """A logistic regression on products of two inputs: exact for normals with linear errors."""
    return make_pipeline(
        PolynomialFeatures(2, include_bias=False),
        StandardScaler(),
        LogisticRegression(C=0.1, max_iter=1000),
    )


def _fit(model: Any, both: tuple[Any, Any], swap: Any, rows: slice) -> Any:
    """Fit the classifier to these simulations; some have their two classes swapped."""
    truth, guide = (part[0, rows] for part in both)
    swap = swap[rows]
    inputs = np.concatenate([truth, guide])
    return model.fit(inputs, np.concatenate([swap, ~swap]))


def _statistic(model: Any, both: tuple[Any, Any], swap: Any, at: Any, n: int) -> Tensor:
    fitted = _fit(model, both, swap, slice(None))
    probability = fitted.predict_proba(at.reshape(-1, at.shape[2]))[:, 1]
    return torch.from_numpy((probability - 0.5) ** 2).reshape(-1, n).mean(0)


def _accuracy(model: Any, both: tuple[Any, Any], half: int) -> float:
    """The share of right answers on the second half of the simulations, after the first."""
    fitted = _fit(clone(model), both, np.zeros(both[0].shape[1], bool), slice(half))
    said = [fitted.predict(part[0, half:]) for part in both]
    return float(np.mean([~said[0], said[1]]))


def _p_value(statistic: Tensor, null: Tensor) -> Tensor:
    return (1 + (null >= statistic).sum(0)).double() / (1 + len(null))

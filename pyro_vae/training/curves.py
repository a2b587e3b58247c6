"""Draw the history of a training."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.pairs.figures import BLUE, FONT, GRAY, ORANGE, new_figure, padded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = (
    ("elbo", "ELBO", "nats per example"),
    ("reconstruction", "reconstruction", "nats per example"),
    ("kl", "KL", "nats per example"),
    ("gradient_norm", "gradient norm", "mean over the epoch, and greatest"),
)
"""Columns of history.csv, their titles and units."""


def curves(history: Mapping[str, Sequence[float]]) -> "Figure":
    """ELBO, reconstruction, KL and gradient norm by epoch, from the columns of history.csv."""
    figure = new_figure(9, 5.2)
    for axis, (column, title, unit) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        if column == "gradient_norm":
            axis.plot(history["epoch"], history[column], color=BLUE, linewidth=1.3)
            if f"{column}_max" in history:
                axis.plot(history["epoch"], history[f"{column}_max"], color=GRAY, linewidth=1)
            axis.set_yscale("log")
        else:
            _both_parts(axis, history, column)
        if "validation_bound" in history:
            kept = history["epoch"][_kept(np.asarray(history["validation_bound"], float))]
            axis.axvline(kept, color=GRAY, linewidth=0.8, linestyle=":", label="kept epoch")
        axis.set_title(title, fontsize=FONT)
        axis.set_xlabel("epoch", fontsize=FONT)
        axis.set_ylabel(unit, fontsize=FONT)
        axis.tick_params(labelsize=FONT)
        if column == "elbo":
            axis.legend(fontsize=FONT, frameon=False)
    return figure


def _both_parts(axis: Any, history: Mapping[str, Sequence[float]], column: str) -> None:
    """A column for training and validation data, with limits for the settled part of both."""
    limits = []
    for name, label, color in (
        (column, "train", BLUE),
        (f"validation_{column}", "validation", ORANGE),
    ):
        if name in history:
            values = np.asarray(history[name], float)
            axis.plot(history["epoch"], values, color=color, label=label, linewidth=1.3)
            # The large range of the first epochs would hide the rest of the curve.
            limits.append(padded(values[len(values) // 20 :]))
    axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _kept(bounds: np.ndarray) -> int:
    """The place of the kept epoch: of the greatest finite bound, else the last one."""
    finite = np.where(np.isfinite(bounds), bounds, -np.inf)
    return int(finite.argmax()) if np.isfinite(bounds).any() else -1

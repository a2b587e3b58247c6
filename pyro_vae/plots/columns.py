"""Draw the columns of a table beside the samples of a pair."""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_vae.data.schema import Column, Schema
from pyro_vae.pairs.figures import BLUE, FONT, ORANGE, literal, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 30
"""The largest number of columns that are drawn."""


def marginals(schema: Schema, x: Tensor, drawn: Tensor) -> "Figure":
    """The marginal distribution of each column, of the data and of samples."""
    columns = schema.data[:MOST]
    wide = min(5, len(columns))
    high = -(-len(columns) // wide)
    figure = new_figure(2.2 * wide, 1.7 * high + 0.3)
    axes = figure.subplots(high, wide, squeeze=False).flatten()
    for axis in axes[len(columns) :]:
        axis.axis("off")
    for j, column in enumerate(columns):
        both = [part[:, j][~part[:, j].isnan()].cpu().numpy() for part in (x, drawn)]
        (_bars if column.coded else _histogram)(axes[j], column, both)
        axes[j].set_title(literal(column.name[:24]), fontsize=FONT)
        axes[j].tick_params(labelsize=FONT)
        axes[j].set_yticks([])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", fontsize=FONT, ncols=2)
    return figure


def _histogram(axis: Any, column: Column, both: list[np.ndarray]) -> None:
    low, high = _limits(both[0])
    edges = np.linspace(low, high, 25)
    for values, color, label in zip(both, (BLUE, ORANGE), ("data", "samples"), strict=True):
        heights = np.histogram(values, edges)[0] / max(1, len(values))
        axis.stairs(heights, edges, color=color, label=label, fill=color == BLUE, alpha=0.8)


def _bars(axis: Any, column: Column, both: list[np.ndarray]) -> None:
    number = len(column.categories)
    for place, (values, color, label) in enumerate(
        zip(both, (BLUE, ORANGE), ("data", "samples"), strict=True)
    ):
        shares = np.bincount(values.astype(int), minlength=number) / max(1, len(values))
        axis.bar(np.arange(number) + 0.4 * place, shares, 0.4, color=color, label=label)
    words = [literal(str(category)[:8]) for category in column.categories]
    axis.set_xticks(np.arange(number) + 0.2, words, rotation=60 if number > 3 else 0)


def pairwise_plots(schema: Schema, x: Tensor, drawn: Tensor) -> "Figure | None":
    """Up to four neighboring pairs of numeric columns, of the data and of samples."""
    numeric = [j for j, column in enumerate(schema.data) if not column.coded]
    pairs = list(pairwise(numeric))[:4]
    if not pairs:
        return None
    figure = new_figure(2.6 * len(pairs), 2.6)
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axis, (i, j) in zip(axes, pairs, strict=True):
        for part, color in ((x, BLUE), (drawn, ORANGE)):
            axis.scatter(part[:, i].cpu(), part[:, j].cpu(), s=3, color=color, alpha=0.5)
        for name, k in (("x", i), ("y", j)):
            known = x[:, k][~x[:, k].isnan()].cpu().numpy()
            getattr(axis, f"set_{name}lim")(*_limits(known))
            label = literal(schema.data[k].name[:24])
            getattr(axis, f"set_{name}label")(label, fontsize=FONT)
        axis.tick_params(labelsize=FONT)
    return figure


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The range of most data, with a margin; rare values far away do not fit."""
    low, high = np.quantile(values, [0.005, 0.995]) if len(values) else (0.0, 1.0)
    margin = 0.1 * (high - low) or 0.5
    return float(low - margin), float(high + margin)

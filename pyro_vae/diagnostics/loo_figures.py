"""The figure of LOO-PIT values."""

from typing import TYPE_CHECKING

import torch

from pyro_vae.diagnostics.loo_pit import INTERVALS, LooPit
from pyro_vae.pairs.figures import BLUE, FONT, GRAY, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 20


def loo_pit_bars(found: LooPit) -> "Figure":
    """Plot the histogram of LOO-PIT values, and the coverage of predictive intervals.

    Arguments:
        found: the result of `pyro_vae.loo_pit`.
    """
    figure = new_figure(7.2, 2.8)
    left, right = figure.subplots(1, 2)
    pit = found.pit[~found.pit.isnan()]
    counts = torch.histc(pit.clamp(0, 1), BINS, 0, 1) / len(pit) * BINS
    left.bar([(i + 0.5) / BINS for i in range(BINS)], counts.tolist(), 1 / BINS, color=BLUE)
    left.axhline(1, color=ORANGE, linewidth=1)
    left.set_title("LOO-PIT of the entries", fontsize=FONT)
    left.set_xlabel("1 everywhere if the model is right", fontsize=FONT)
    right.errorbar(INTERVALS, found.coverage, 2 * found.coverage_errors, fmt="o", color=BLUE)
    right.plot((0.45, 1), (0.45, 1), color=GRAY, linewidth=1)
    right.set_title("coverage of predictive intervals", fontsize=FONT)
    right.set_xlabel("probability", fontsize=FONT)
    for axis in (left, right):
        axis.tick_params(labelsize=FONT)
    return figure

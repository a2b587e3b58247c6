"""Figures of what the diagnostics found: each function returns a matplotlib ``Figure``."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_vae.importance import LogLikelihood
from pyro_vae.plots import BLUE, GREY, ORANGE, _figure, _strip, intensity, is_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reliability(estimate: LogLikelihood, x: Tensor, number: int = 8) -> "Figure":
    """Pareto k of each datum's weights, and the data least to be trusted with theirs.

    Arguments:
        estimate: of `pyro_vae.log_likelihood`, from 21 samples or more.
        x: the data it was made from, of shape (n, *data_shape).
        number: how many of the worst are shown.
    """
    worst = estimate.worst(min(number, len(x)))
    figure = _figure(8, 4.4)
    panels = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.4, 1])
    above, below = panels[:, 0]
    axis = above.subplots()
    k = estimate.pareto_k[torch.isfinite(estimate.pareto_k)].numpy()
    bins = np.linspace(min(-0.2, k.min(initial=0)), max(1.2, k.max(initial=0)), 50)
    axis.hist(k, bins=bins, color=BLUE)
    axis.axvline(estimate.k_threshold, color=ORANGE, linewidth=1, linestyle="--")
    axis.axvline(1, color=GREY, linewidth=1, linestyle=":")
    over = int((estimate.pareto_k > estimate.k_threshold).sum())
    infinite = len(estimate.pareto_k) - len(k)
    axis.set_title(
        f"{over} of {len(x)} data over {estimate.k_threshold:.2f}, {infinite} infinite", fontsize=9
    )
    axis.set_xlabel("Pareto k of the weights", fontsize=8)
    axis.set_ylabel("data", fontsize=8)
    axis.tick_params(labelsize=7)
    shown = intensity(x[worst])
    axes = below.subplots(1, len(worst), squeeze=False)[0]
    for axis, row, image in zip(axes, worst.tolist(), shown, strict=True):
        axis.set_axis_off()
        if is_picture(shown):
            axis.imshow(_strip(image[None], 1), vmin=0, vmax=1, interpolation="nearest")
        else:
            axis.plot(image.detach().cpu().float().flatten(), color=BLUE, linewidth=0.8)
        axis.set_title(f"row {row}\nk {estimate.pareto_k[row]:.2f}", fontsize=7)
    below.suptitle("least to be trusted", fontsize=9)
    return figure

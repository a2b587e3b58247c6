"""Figures of global and group latents; each function returns a matplotlib ``Figure``."""

from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_vae.inference.joint_nuts import JointPosterior
from pyro_vae.pairs.figures import FONT, GRAY, ORANGE, literal, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def global_marginals(result: JointPosterior, number: int = 8) -> "Figure":
    """Plot the marginals of global and group latents under NUTS and under the guide.

    Arguments:
        result: the result of `pyro_vae.nuts` for a pair with global or group latents.
        number: how many units are shown, those with the largest disagreement first.
    """
    found = result.shared
    apart = found.disagreement[0].nan_to_num(-1.0, posinf=1e30)
    shown = apart.argsort(descending=True)[:number].tolist()
    columns = min(4, len(shown))
    rows = ceil(len(shown) / columns)
    figure = new_figure(2.5 * columns + 0.4, 2.2 * rows + 0.4)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    exact, guide = _units(found.draws, 2), _units(found.guide_draws, 1)
    for axis, i in zip(axes, shown, strict=False):
        parts = (("NUTS", exact[:, i], GRAY), ("guide", guide[:, i], ORANGE))
        low, high = torch.cat([exact[:, i], guide[:, i]]).aminmax()
        for name, draws, color in parts:
            bins = np.linspace(float(draws.min()), float(draws.max()) + 1e-9, 25)
            style = {"alpha": 0.5} if name == "NUTS" else {"histtype": "step", "linewidth": 1.3}
            axis.hist(draws.numpy(), bins=bins, density=True, color=color, label=name, **style)
        axis.set_xlim(float(low), float(high) + 1e-9)
        axis.set_title(
            f"shift {found.shift[0, i]:.2f}, scale {found.scale_ratio[0, i]:.2f}", fontsize=FONT
        )
        axis.set_xlabel(literal(found.units[i]), fontsize=FONT)
        axis.set_yticks([])
        axis.tick_params(labelsize=FONT)
    for axis in axes[len(shown) :]:
        axis.remove()
    axes[0].legend(fontsize=FONT, frameon=False)
    return figure


def _units(draws: dict[str, Tensor], leading: int) -> Tensor:
    """Concatenate draws of all sites to (draws, units)."""
    parts = [value.flatten(0, leading - 1).flatten(1).double() for value in draws.values()]
    return torch.cat(parts, 1)

"""The shared parts of all figures: colors, grids of images, lines of text, PNG."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.text import as_text
from pyro_vae.pairs.figures import BLUE, FONT, literal, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def is_picture(x: Tensor) -> bool:
    """Whether data can be shown as pictures: (n, channels, height, width) with 1 or 3 channels."""
    return x.dim() == 4 and x.shape[1] in (1, 3)


CELL = 0.62
"""The width and the height of a picture in a grid, in inches."""


def grid(rows: Sequence[tuple[str, Tensor]], title: str = "") -> "Figure":
    """Rows of pictures with a label to the left; data that are not pictures become curves."""
    tiled = all(is_picture(images) for _, images in rows)
    figure = (_pictures if tiled else _curves)(rows)
    if title:
        figure.suptitle(literal(title), fontsize=FONT)
    return figure


def _pictures(rows: Sequence[tuple[str, Tensor]]) -> "Figure":
    columns = max(len(images) for _, images in rows)
    figure = new_figure(CELL * columns + 1.3, CELL * len(rows) + 0.1)
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (label, images) in zip(axes, rows, strict=True):
        axis.set_axis_off()
        # One picture for a whole row is drawn many times faster than one for each image.
        axis.imshow(_strip(images, columns), vmin=0, vmax=1, interpolation="nearest")
        _label(axis, label)
    return figure


MOST_CURVES = 6
"""The largest number of curves in a row of a grid."""


def _curves(rows: Sequence[tuple[str, Tensor]]) -> "Figure":
    """Curves over their index, all with the same scales; axes are at the left and at the bottom."""
    columns = min(MOST_CURVES, max(len(images) for _, images in rows))
    figure = new_figure(1.25 * columns + 1.3, 0.9 * len(rows) + 0.5)
    axes = figure.subplots(len(rows), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    size = max(images.shape[1:].numel() for _, images in rows)
    starts = 1.2 * max(size - 1, 1) * np.arange(columns)
    for axis, (label, images) in zip(axes, rows, strict=True):
        some = np.linspace(0, len(images) - 1, min(columns, len(images))).astype(int)
        # One axis for a whole row is drawn many times faster than one for each curve.
        for start, image in zip(starts, images[some], strict=False):
            values = image.detach().cpu().float().flatten()
            axis.axvline(start, color="black", linewidth=0.8)
            axis.plot(start + np.arange(len(values)), values, color=BLUE, linewidth=0.8)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(labelsize=FONT)
        axis.margins(x=0.01)
        axis.locator_params(axis="y", nbins=3)
        axis.set_ylabel(literal(label), fontsize=FONT, rotation=0, ha="right", va="center")
    places = sorted({0, size - 1})
    ticks = [(start + place, place) for start in starts for place in places]
    axes[-1].set_xticks(*zip(*ticks, strict=True))
    figure.supxlabel("place in the datum", fontsize=FONT)
    return figure


def _label(axis: Any, label: str) -> None:
    where, words = axis.transAxes, literal(label)
    axis.text(-0.01, 0.5, words, transform=where, ha="right", va="center", fontsize=FONT)


def lines(rows: Sequence[tuple[str, Tensor]], vocabulary: str, across: bool = False) -> str:
    """Tokens as labeled lines: one block for each entry, or with ``across`` one for each datum."""
    width = max(len(label) for label, _ in rows)
    blocks = [
        [f"{label:<{width}}  {line}".strip() for line in as_text(tokens, vocabulary)]
        for label, tokens in rows
    ]
    if across:
        blocks = [list(block) for block in zip(*blocks, strict=True)]
    return "\n\n".join("\n".join(block) for block in blocks)


def alike(made: Tensor, x: Tensor) -> Tensor:
    """Reshape what a pair made to the shape of the data, which the pair may have flattened."""
    for leading in range(1, made.dim()):
        if made.shape[leading:].numel() == x.shape[1:].numel():
            return made.reshape(*made.shape[:leading], *x.shape[1:])
    return made


def intensity(x: Tensor) -> Tensor:
    """8-bit pixels as floats in [0, 1]; other data, and 8-bit data of 0 and 1, as they are."""
    return x / 255 if x.dtype == torch.uint8 and int(x.max()) > 1 else x


def _strip(images: Tensor, columns: int) -> np.ndarray:
    """Pictures side by side on white, as an array (height, width, 3)."""
    n, _, height, width = images.shape
    gap = max(1, width // 12)
    strip = np.ones((height, columns * (width + gap) - gap, 3), dtype=np.float32)
    images = images.nan_to_num(0.5)  # masked entries are gray
    arrays = images.detach().cpu().float().clamp(0, 1).expand(n, 3, height, width).numpy()
    for i, array in enumerate(arrays):
        strip[:, i * (width + gap) : i * (width + gap) + width] = array.transpose(1, 2, 0)
    return strip

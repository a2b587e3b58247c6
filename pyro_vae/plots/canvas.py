"""The shared parts of all figures: colors, grids of images, lines of text, PNG."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

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


def grid(rows: Sequence[tuple[str, Tensor]], title: str) -> "Figure":
    """Rows of pictures with a label to the left; data that are not pictures become curves."""
    columns = max(len(images) for _, images in rows)
    figure = new_figure(0.75 * columns + 1.4, 0.75 * len(rows) + 0.45)
    tiled = all(is_picture(images) for _, images in rows)
    axes = figure.subplots(len(rows), 1 if tiled else columns, squeeze=False)
    for line, (label, images) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        if tiled:
            # One picture for a whole row is drawn many times faster than one for each image.
            line[0].imshow(_strip(images, columns), vmin=0, vmax=1, interpolation="nearest")
        for axis, image in zip(line, [] if tiled else images, strict=False):
            axis.plot(image.detach().cpu().float().flatten(), color=BLUE, linewidth=0.8)
        place, words = line[0].transAxes, literal(label)
        line[0].text(-0.01, 0.5, words, transform=place, ha="right", va="center", fontsize=FONT)
    figure.suptitle(literal(title), fontsize=FONT)
    return figure


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


def png(figure: "Figure") -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


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

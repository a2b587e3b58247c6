"""What all figures share: size of text, colors, limits of axes, words without formulas."""

import io
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GRAY = "#1f6f8b", "#d1603d", "#8a8a8a"

FONT = 9
"""The size of all text of all figures, in points."""

DPI = 130


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this size in inches, which does not use the state of pyplot.

    A notebook shows it, also if pyplot was never imported.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, ceil(10 * height) / 10), dpi=DPI, layout="constrained")
    vars(figure)["_repr_png_"] = partial(png, figure)
    return figure


def png(figure: "Figure") -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def literal(text: str) -> str:
    """Escape text of a run, such as the name of a site, so that matplotlib reads no formulas in it.

    >>> literal("$z$")
    '\\\\$z\\\\$'
    """
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text).replace("$", r"\$")


def padded(values: np.ndarray) -> tuple[float, float]:
    """The limits of an axis for these values, with a margin of 5 % of their range."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    margin = 0.05 * (values.max() - values.min()) or 0.1
    return float(values.min() - margin), float(values.max() + margin)

"""Draw a datum beside its reconstruction, as one SVG picture: images, curves, cells or text."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pyro_vae.data.schema import Schema
from pyro_vae.data.table_values import frame_of
from pyro_vae.data.text import as_text
from pyro_vae.pairs.figures import ORANGE
from pyro_vae.plots.canvas import BLUE, intensity, is_picture

WIDTH = 300
"""The width of a card in pixels."""

MOST_LINES = 24
"""The largest number of lines of a card with numbers."""

MOST_ENTRIES = 1000
"""The largest number of entries of a curve."""

FEW = 12
"""Vectors of up to this many entries are shown as numbers, and longer ones as curves."""

_COLORS = (BLUE, ORANGE, "#4a7c3a")
_TEXT = 'font-family="system-ui, sans-serif" font-size="12" fill="#222"'

Columns = Sequence[tuple[str, Tensor]]
"""The titles and values of what a card compares."""


@dataclass(frozen=True)
class Cards:
    """How the data of a run are drawn."""

    schema: Schema | None = None
    """The columns of a row or, if the data are groups of rows, of a member."""
    vocabulary: str | None = None

    def draw(self, columns: Columns) -> str:
        """Values of one datum side by side. The first column is the datum itself."""
        if self.schema is not None:
            return _lines(columns, [_cells(self.schema, value) for _, value in columns])
        if self.vocabulary is not None:
            return _texts([(title, as_text(x[None], self.vocabulary)[0]) for title, x in columns])
        if is_picture(columns[0][1][None]):
            return _pictures(columns)
        if columns[0][1].numel() <= FEW:
            return _lines(columns, [_entries(value) for _, value in columns])
        return _curves(columns)


def _svg(width: float, height: float, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" style="max-width:100%;height:auto">'
        f'<rect width="100%" height="100%" fill="#fff"/>{body}</svg>'
    )


def _words(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {_TEXT}{more}>{html.escape(text)}</text>'


def _pictures(columns: Columns) -> str:
    side = min(140, (WIDTH - 10 * len(columns)) / max(2, len(columns)))
    body, tall = "", 0.0
    for i, (title, image) in enumerate(columns):
        height = side * image.shape[-2] / image.shape[-1]
        tall, left = max(tall, height), 5 + i * (side + 8)
        source = base64.b64encode(png(image)).decode()
        body += _words(left, 14, title)
        body += (
            f'<image x="{left:g}" y="20" width="{side:g}" height="{height:g}" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{source}"/>'
        )
    return _svg(10 + len(columns) * (side + 8), tall + 26, body)


def png(image: Tensor) -> bytes:
    """A picture (channels, height, width) with values from 0 to 1; missing entries are gray."""
    from matplotlib.image import imsave

    values = intensity(image[None])[0].detach().cpu().float().nan_to_num(0.5).clamp(0, 1)
    buffer = io.BytesIO()
    imsave(buffer, values.expand(3, *values.shape[1:]).permute(1, 2, 0).numpy(), format="png")
    return buffer.getvalue()


def _curves(columns: Columns) -> str:
    height, top = 130, 20 + 15 * len(columns)
    whole = [value.detach().cpu().double().flatten() for _, value in columns]
    values = [one[:MOST_ENTRIES].numpy() for one in whole]
    seen = np.concatenate([one[np.isfinite(one)] for one in values])
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0)
    high = high if high > low else low + 1.0
    body = ""
    for i, ((title, _), line) in enumerate(zip(columns, values, strict=True)):
        across = np.linspace(40, WIDTH - 5, len(line))
        down = top + height * (high - line) / (high - low)
        body += _words(40, 14 + 15 * i, title).replace("#222", _COLORS[i % 3])
        body += "".join(_path(across[a:b], down[a:b], _COLORS[i % 3]) for a, b in _runs(line))
    body += _words(2, top + 8, f"{high:.3g}") + _words(2, top + height, f"{low:.3g}")
    if len(whole[0]) > MOST_ENTRIES:
        said = f"the first {MOST_ENTRIES} of {len(whole[0])} entries"
        body += _words(40, top + height + 18, said)
    return _svg(WIDTH, top + height + 26, body)


def _runs(line: np.ndarray) -> list[tuple[int, int]]:
    """The stretches of a line without missing entries."""
    known = np.concatenate([[False], np.isfinite(line), [False]])
    edges = np.flatnonzero(known[1:] != known[:-1])
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _path(across: np.ndarray, down: np.ndarray, color: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    if len(across) == 1:
        return f'<circle cx="{across[0]:.1f}" cy="{down[0]:.1f}" r="1.5" fill="{color}"/>'
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.3"/>'


def _cells(schema: Schema, x: Tensor) -> list[tuple[str, str]]:
    """The name and the value of each cell of a row (columns,) or of members (m, columns)."""
    rows = x if x.dim() == 2 else x[None]
    table = frame_of(schema, rows.detach().cpu()).to_pydict()
    return [
        (name if x.dim() == 1 else f"{name} of member {i}", in_words(values[i]))
        for i in range(len(rows))
        for name, values in table.items()
    ]


def _entries(x: Tensor) -> list[tuple[str, str]]:
    places = np.ndindex(*x.shape)
    flat = x.detach().cpu().flatten().tolist()
    return [
        (f"[{', '.join(map(str, place))}]", in_words(None if value != value else value))
        for place, value in zip(places, flat, strict=True)
    ]


def in_words(value: Any) -> str:
    """A value of a cell: a rounded number, a category, or "missing"."""
    if value is None:
        return "missing"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lines(columns: Columns, cells: Sequence[list[tuple[str, str]]]) -> str:
    """A line for each entry: its name, and its value in each column."""
    wide = 105.0
    width = 130 + wide * len(columns)
    body = "".join(
        _words(130 + wide * i, 14, title, ' font-weight="600"')
        for i, (title, _) in enumerate(columns)
    )
    lines = list(zip(*cells, strict=True))
    for at, line in enumerate(lines[:MOST_LINES]):
        down = 32 + 17 * at
        body += _words(4, down, _cut(line[0][0], 19))
        body += "".join(
            _words(130 + wide * i, down, _cut(value, 15)) for i, (_, value) in enumerate(line)
        )
    shown = min(len(lines), MOST_LINES)
    if len(lines) > shown:
        body += _words(4, 32 + 17 * shown, f"and {len(lines) - shown} more")
    return _svg(width, 32 + 17 * (shown + (len(lines) > shown)), body)


def _texts(columns: Sequence[tuple[str, str]]) -> str:
    body, down = "", 14
    for title, text in columns:
        body += _words(4, down, title, ' font-weight="600"')
        for start in range(0, max(1, len(text)), 44):
            down += 16
            body += _words(4, down, text[start : start + 44])
        down += 22
    return _svg(WIDTH + 40, down - 12, body)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def part_of(x: Tensor, member: int | None, size: int | None) -> Tensor:
    """What a point shows of its datum: a member of a group, the members that count, or all."""
    if member is not None:
        return x[member]
    return x if size is None or size < 0 else x[:size]

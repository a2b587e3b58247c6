"""The colors of the points, and their legends in HTML."""

import html
from collections.abc import Sequence

import numpy as np
from torch import Tensor

PALETTE = (
    "#1f6f8b", "#d1603d", "#4a7c3a", "#7b5ea7", "#c9a227",
    "#b5446e", "#3aa6a0", "#7d5a3c", "#5b7bd5", "#8a8a8a",
)  # fmt: skip
"""The colors of labels; more labels than colors repeat them."""

GRAY = "#8a8a8a"

SURE, UNSURE, OVER = "#1f6f8b", "#c9a227", "#c0392b"
"""Pareto k at most 0.5, so that weights have a variance; up to its limit; and over its limit."""

LOW, HIGH = (31, 40, 110), (240, 200, 60)
"""The colors of the ends of a range of numbers."""

Colored = tuple[list[str], str]
"""The color of each point, and the legend."""


def plain(n: int) -> Colored:
    """All points in one color."""
    return [PALETTE[0]] * n, ""


def by_label(labels: Sequence[str]) -> Colored:
    """A color for each label."""
    names = sorted(set(labels), key=_numbers_first)
    color = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    legend = "".join(_chip(color[name], name) for name in names[: 2 * len(PALETTE)])
    more = len(names) - 2 * len(PALETTE)
    if len(names) > len(PALETTE):
        legend += " (colors repeat)" + (f" and {more} more" if more > 0 else "")
    return [color[label] for label in labels], legend


def by_pareto_k(k: Tensor, limit: float) -> Colored:
    """A color for each band of reliability; NaN is gray.

    Arguments:
        limit: the largest k that is reliable with this number of samples.
    """
    low = min(0.5, limit)
    colors = [_band(value, low, limit) for value in k.tolist()]
    legend = _chip(SURE, f"up to {low:.2g}")
    legend += _chip(UNSURE, f"{low:.2g} to {limit:.2g}") if low < limit else ""
    legend += _chip(OVER, f"over {limit:.2g}: not reliable")
    missing = _chip(GRAY, "not known") if GRAY in colors else ""
    return colors, f"Pareto k: {legend}{missing}"


def by_number(values: Tensor, what: str) -> Colored:
    """A color between two ends, from the least to the greatest finite value."""
    numbers = values.double().numpy()
    seen = numbers[np.isfinite(numbers)]
    if not len(seen):
        return [GRAY] * len(numbers), f"{what}: not finite"
    low, high = float(seen.min()), float(seen.max())
    share = np.clip((numbers - low) / ((high - low) or 1.0), 0.0, 1.0)
    colors = [GRAY if value != value else _between(value) for value in share.tolist()]
    ends = f"linear-gradient(90deg, {_between(0)}, {_between(1)})"
    bar = f'<span class="bar" style="background:{ends}"></span>'
    return colors, f"{html.escape(what)}: {low:.4g} {bar} {high:.4g}"


def _band(k: float, low: float, limit: float) -> str:
    if k != k:
        return GRAY
    return SURE if k <= low else UNSURE if k <= limit else OVER


def _between(share: float) -> str:
    mixed = (round(a + share * (b - a)) for a, b in zip(LOW, HIGH, strict=True))
    return "#" + "".join(f"{one:02x}" for one in mixed)


def _chip(color: str, words: str) -> str:
    dot = f'<span class="dot" style="background:{color}"></span>'
    return f'<span class="chip">{dot}{html.escape(words)}</span>'


def _numbers_first(label: str) -> tuple[bool, float, str]:
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label

"""The words and small tables of the page, in HTML."""

import html
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pyro_vae.explore.view import Change, View

STYLE = """
:host { font: 14px/1.45 system-ui, sans-serif; color: #222 }
h1 { font-size: 1.25rem; margin: .8rem 0 .2rem; overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: .6rem 0 .3rem } p { margin: .2rem 0; color: #555 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .1rem .9rem .1rem 0; text-align: right; font-weight: 400 }
td, th { white-space: nowrap } th { color: #555 } td:first-child { text-align: left }
.chip { display: inline-block; margin-right: .8rem; white-space: nowrap }
.dot { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .3rem }
.bar { display: inline-block; width: 8rem; height: .7rem; border-radius: 3px;
       vertical-align: middle }
.faint { color: #555 } svg { max-width: 100%; height: auto }
"""

MOST_UNITS = 12
"""The largest number of units whose change is listed."""


def head(title: str, view: View) -> str:
    """What the page shows."""
    name = html.escape(type(view.pair).__name__)
    sites = ", ".join(html.escape(one.site) for one in view.levels)
    what = "data" if view.held.sizes is None else "groups"
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in view.notes)
    if view.held.sizes is not None:
        notes += "<p>A datum is a group. Its members are shown one after the other.</p>"
    return (
        f"<h1>{html.escape(title)}</h1><p>{name}; latents {sites}; {len(view.held.x)} {what}. "
        "Hover over a point to see its datum and its reconstruction. Click it to refine its "
        f"approximate posterior. All bounds are in nats per example.</p>{notes}"
    )


def datum(view: View, row: int, member: int | None, card: str) -> str:
    """The chosen datum, its numbers and its reconstruction."""
    member_of = "" if member is None else f", member {member}"
    told = [] if view.held.labels is None else [f"label {html.escape(view.held.labels[row])}"]
    if view.likelihood is not None:
        value, k = view.likelihood.per_datum[row].item(), view.likelihood.pareto_k[row].item()
        told += [f"log p(x) {value:.2f}", f"Pareto k {k:.2f}"]
    what = "Datum" if view.held.sizes is None else "Group"
    return f"<h2>{what} {html.escape(view.ids[row])}{member_of}</h2><p>{', '.join(told)}</p>{card}"


def change(found: Change, card: str, size: int | None = None) -> str:
    """What a refinement changed: bounds, and each unit of the code.

    Arguments:
        size: the number of members that count, if the datum is a group.
    """
    before, after = found.before, found.after
    gain = after.elbo - before.elbo
    error = (before.elbo_standard_error**2 + after.elbo_standard_error**2) ** 0.5
    verdict = f"The ELBO rises by {gain:.2f} ± {error:.2f} nats."
    if all(bool((a == b).all()) for a, b in zip(*map(_flat, found.means), strict=True)):
        verdict = "The refined posterior was not better, so the guide's is kept."
    rows = [
        ("ELBO", before.elbo, after.elbo),
        ("log p(x)", before.value, after.value),
        ("Pareto k", before.pareto_k[0].item(), after.pareto_k[0].item()),
    ]
    bounds = _table(
        ["", "guide", "refined"], [(name, f"{a:.3f}", f"{b:.3f}") for name, a, b in rows]
    )
    units = _table(["mean ± scale", "guide", "refined"], _units(found, size))
    return f"<h2>Refined posterior</h2><p>{verdict}</p>{bounds}{units}{card}"


def _flat(values: dict[str, Tensor]) -> list[Tensor]:
    return [value.flatten() for value in values.values()]


def _units(found: Change, size: int | None) -> list[tuple[str, str, str]]:
    """The units that move most, with their means and scales; padding is left out."""
    moves = []
    for site, old in found.means[0].items():
        gaps = (found.means[1][site].double() - old.double()).abs()[0]
        if size is not None and gaps.dim() > 1 and size >= 0:
            gaps = gaps[:size]
        for unit, place in enumerate(np.ndindex(*gaps.shape)):
            both = [
                _mean_and_scale(found.means[i][site], found.scales[i].get(site), unit)
                for i in (0, 1)
            ]
            name = f"{site}[{', '.join(map(str, place))}]" if place else site
            moves.append((gaps[place].item(), (name, both[0], both[1])))
    moves.sort(key=lambda move: -move[0])
    listed = [line for _, line in moves[:MOST_UNITS]]
    more = len(moves) - len(listed)
    return [*listed, (f"and {more} units that move less", "", "")] if more else listed


def _mean_and_scale(mean: Tensor, scale: Tensor | None, unit: int) -> str:
    said = f"{mean.flatten()[unit].item():.3f}"
    return said if scale is None else f"{said} ± {scale.flatten()[unit].item():.3f}"


def shared(view: View) -> str:
    """The means and scales of latents that all rows share."""
    lines = []
    for site, (mean, scale) in view.shared.items():
        for unit in range(min(MOST_UNITS, mean.numel())):
            index = "" if mean.dim() == 0 else f"[{unit}]"
            lines.append((f"{site}{index}", _mean_and_scale(mean, scale, unit)))
        if mean.numel() > MOST_UNITS:
            lines.append((f"and {mean.numel() - MOST_UNITS} more of {site}", ""))
    if not lines:
        return ""
    return f"<h2>Global and group latents</h2>{_table(['', 'mean ± scale'], lines)}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(one)}</th>" for one in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def error(message: str) -> str:
    """Why something cannot be shown."""
    return f"<p><b>{html.escape(message)}</b></p>"


def moved(number: int) -> str:
    """How many units differ from the code of the datum."""
    if not number:
        return "This is the code of the datum. Move a slider to decode another code."
    return (
        "1 unit differs from the code of the datum."
        if number == 1
        else (f"{number} units differ from the code of the datum.")
    )

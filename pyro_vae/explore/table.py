"""The table of the page: a line for each point of a level."""

from typing import Any

from torch import Tensor

from pyro_vae.data.table_values import frame_of
from pyro_vae.explore.cards import FEW, Cards, in_words
from pyro_vae.explore.levels import Level
from pyro_vae.explore.view import View

MOST_COLUMNS = 30
"""The largest number of columns of the data that the table shows."""


def columns_of(view: View, cards: Cards, level: Level) -> dict[str, list[Any]]:
    """The columns of the table by title: id, label, scores, the data, and the code."""
    rows = level.rows.tolist()
    found: dict[str, list[Any]] = {"id": [view.ids[row] for row in rows]}
    if level.members is not None:
        found["member"] = level.members.tolist()
    if view.held.labels is not None:
        found["label"] = [view.held.labels[row] for row in rows]
    if view.likelihood is not None:
        found["log p(x)"] = view.likelihood.per_datum.cpu()[level.rows].tolist()
        found["Pareto k"] = view.likelihood.pareto_k.cpu()[level.rows].tolist()
    found |= {_free(name, found): values for name, values in _data(view, cards, level).items()}
    for unit in level.order[:FEW]:
        found[f"{level.site}[{unit}]"] = level.codes[:, unit].tolist()
    return found


def _data(view: View, cards: Cards, level: Level) -> dict[str, list[Any]]:
    """The columns of tables, and the entries of short vectors; nothing of larger data."""
    x: Tensor = view.held.x
    x = x[level.rows] if level.members is None else x[level.rows, level.members]
    if x.dim() != 2 or cards.vocabulary is not None:
        return {}
    if cards.schema is not None:
        table = frame_of(cards.schema, x.cpu()).to_pydict()
        named = list(table.items())[:MOST_COLUMNS]
        return {name: [in_words(value) for value in values] for name, values in named}
    width = x.shape[1] if x.shape[1] <= FEW else 0
    return {f"x[{j}]": x[:, j].double().tolist() for j in range(width)}


def _free(name: str, taken: dict[str, Any]) -> str:
    """A title that no other column has."""
    return f"{name} (data)" if name in taken else name

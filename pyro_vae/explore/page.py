"""The page: a plane of codes, the chosen datum, sliders and a table, in each session's document."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from bokeh.core.templates import FILE
from bokeh.document import Document
from bokeh.models import Column, ColumnDataSource, HoverTool, TapTool
from bokeh.models.widgets import (
    DataTable,
    Div,
    NumberFormatter,
    Select,
    Slider,
    StringFormatter,
    TableColumn,
    Toggle,
)
from bokeh.plotting import figure
from jinja2 import Environment
from torch import Tensor

from pyro_vae.errors import UsageError, first_line
from pyro_vae.explore import colors, words
from pyro_vae.explore.cards import Cards, Columns, part_of
from pyro_vae.explore.levels import Level
from pyro_vae.explore.table import columns_of
from pyro_vae.explore.template import TEMPLATE
from pyro_vae.explore.view import View

MOST_SLIDERS = 10
"""The largest number of sliders: those of the units with the largest KL."""


@dataclass
class Page:
    """What all sessions of a page share."""

    view: View
    cards: Cards
    title: str
    steps: int = 300
    """The number of steps of a refinement."""
    prefix: str = ""
    """The path of the page, with its token."""

    def fill(self, document: Document) -> None:
        """Build the page of one session."""
        session = Session(self, document)
        document.title = f"{self.title} · pyro-vae"
        document.template = Environment(autoescape=False).from_string(
            "{% extends base %}\n" + TEMPLATE
        )
        document.template_variables["base"] = FILE
        for name, part in session.parts().items():
            part.name = name
            document.add_root(part)

    def card(self, level: int, point: int) -> str:
        """The datum of a point and its reconstruction."""
        at = self.view.levels[level]
        row = int(at.rows[point])
        return self.compared(at, point, {"reconstruction": self.view.reconstructions[row]})

    def compared(self, level: Level, point: int, others: dict[str, Tensor]) -> str:
        """The datum of a point beside other values of its shape."""
        row, member = int(level.rows[point]), member_of(level, point)
        sizes = self.view.held.sizes
        size = None if sizes is None else int(sizes[row])
        values: Columns = [("datum", self.view.held.x[row]), *others.items()]
        return self.cards.draw([(name, part_of(x, member, size)) for name, x in values])


def member_of(level: Level, point: int) -> int | None:
    """The member of its group that a point shows, if points are members."""
    return None if level.members is None else int(level.members[point])


class Session:
    """The widgets of one open page, and what happens when they change."""

    def __init__(self, page: Page, document: Document) -> None:
        self.page, self.view, self.document = page, page.view, document
        self.number = self.point = 0
        self.filling = False
        self.source, self.moves = ColumnDataSource(), ColumnDataSource()
        self.head = _words(words.head(page.title, self.view))
        self.legend, self.datum, self.change, self.moved = (_words("") for _ in range(4))
        self.shared = _words(words.shared(self.view))
        sites: list[Any] = [(str(i), one.site) for i, one in enumerate(self.view.levels)]
        self.chosen = Select(title="latent", options=sites, value="0", sizing_mode="stretch_width")
        self.across = Select(title="horizontal axis", sizing_mode="stretch_width")
        self.up = Select(title="vertical axis", sizing_mode="stretch_width")
        self.color = Select(title="color", sizing_mode="stretch_width")
        hold = "draw the other latents from the model"
        self.free = Toggle(label=hold, visible=len(self.view.levels) > 1)
        self.sliders = Column(sizing_mode="stretch_width")
        self.knobs: list[Slider] = []
        self.plane = self._plane()
        self.table = DataTable(
            source=self.source,
            sizing_mode="stretch_width",
            height=300,
            index_position=None,
            autosize_mode="none",
        )
        self._show_level()
        self._listen()

    @property
    def level(self) -> Level:
        """The level that is shown."""
        return self.view.levels[self.number]

    def parts(self) -> dict[str, Any]:
        """The parts of the page by their names in the template."""
        return {
            "head": self.head,
            "level": self.chosen,
            "across": self.across,
            "up": self.up,
            "color": self.color,
            "legend": self.legend,
            "plane": self.plane,
            "datum": self.datum,
            "change": self.change,
            "hold": self.free,
            "sliders": self.sliders,
            "moved": self.moved,
            "table": self.table,
            "shared": self.shared,
        }

    def _plane(self) -> Any:
        plane = figure(
            height=520,
            sizing_mode="stretch_width",
            tools="pan,box_zoom,wheel_zoom,reset",
            output_backend="canvas",
        )
        plane.toolbar.logo = None
        points = plane.scatter(
            "across", "up", source=self.source, size=6, color="color", alpha=0.8,
            selection_line_color="black", nonselection_alpha=0.5,
        )  # fmt: skip
        plane.segment("x0", "y0", "x1", "y1", source=self.moves, line_width=2, line_color="black")
        plane.scatter(
            "x1", "y1", source=self.moves, size=9, color="black", marker="x", line_width=2
        )
        tip = '<div style="max-width:330px"><b>@name</b><br><img src="@card" alt="datum"></div>'
        plane.add_tools(HoverTool(renderers=[points], tooltips=tip, point_policy="snap_to_data"))
        tap = TapTool(renderers=[points])
        plane.add_tools(tap)
        plane.toolbar.active_tap = tap
        return plane

    def _listen(self) -> None:
        _when(self.chosen, "value", self._choose_level)
        for axis in (self.across, self.up):
            _when(axis, "value", self._changed(self._place))
        _when(self.color, "value", self._changed(self._paint))
        _when(self.free, "active", self._move)
        _when(self.source.selected, "indices", self._click)

    def _choose_level(self) -> None:
        self.number = int(self.chosen.value)
        self.filling = True
        self._show_level()
        self.filling = False

    def _changed(self, do: Callable[[], None]) -> Callable[[], None]:
        """Do something, but not while the choices of another level are filled in."""
        return lambda: None if self.filling else do()

    def _show_level(self) -> None:
        names: list[Any] = list(self.level.axes.items())
        self.point = 0
        self.across.options = self.up.options = names
        self.across.value = self.up.value = names[0][0]
        if len(names) > 1:
            self.up.value = names[1][0]
        kinds: list[Any] = self._colors()
        self.color.options = kinds
        if self.color.value not in kinds:
            self.color.value = kinds[0]
        self._fill_table()
        self._place()
        self._paint()
        self._show_point()

    def _fill_table(self) -> None:
        found = columns_of(self.page.view, self.page.cards, self.level)
        points = range(len(self.level.rows))
        data: dict[str, Any] = {f"column{i}": values for i, values in enumerate(found.values())}
        base = f"{self.page.prefix}/card/{self.number}"
        data |= {"card": [f"{base}/{i}" for i in points], "name": self._names()}
        data |= {"across": list(points), "up": list(points), "color": [colors.GRAY] * len(points)}
        self.source.selected.indices = []
        self.source.data = data
        self.table.columns = [
            TableColumn(
                field=f"column{i}",
                title=title,
                formatter=_formatter(values),
                width=_width(title, values),
            )
            for i, (title, values) in enumerate(found.items())
        ]

    def _names(self) -> list[str]:
        level, ids = self.level, self.view.ids
        rows = level.rows.tolist()
        members = [None] * len(rows) if level.members is None else level.members.tolist()
        return [
            ids[row] if member is None else f"{ids[row]}, member {member}"
            for row, member in zip(rows, members, strict=True)
        ]

    def _colors(self) -> list[str]:
        found = ["label"] if self.view.held.labels is not None else []
        found += ["Pareto k", "log p(x)"] if self.view.likelihood is not None else []
        found += ["group"] if self.level.members is not None else []
        return [*found, *self._classes(), "one color"]

    def _classes(self) -> dict[str, list[str]]:
        """The most probable class of each datum, for each discrete latent of one unit."""
        return {
            f"latent {one.site}": [f"{value:g}" for value in one.codes[:, 0].tolist()]
            for one in self.view.levels
            if not one.movable and one.members is None and one.codes.shape[1] == 1
        }

    def _place(self) -> None:
        """Put the points where the axes say."""
        across, up = self.across.value, self.up.value
        flat = self.level.codes.shape[1] == 1
        at = {"across": self.level.coordinates(across).tolist()}
        at["up"] = [0.0] * len(at["across"]) if flat else self.level.coordinates(up).tolist()
        self.source.data = {**self.source.data, **at}
        self.plane.xaxis.axis_label = self.level.axes[across]
        self.plane.yaxis.axis_label = "" if flat else self.level.axes[up]
        self.moves.data = {name: [] for name in ("x0", "y0", "x1", "y1")}

    def _paint(self) -> None:
        rows, found = self.level.rows, self.view.likelihood
        if self.color.value == "label" and self.view.held.labels is not None:
            made = colors.by_label([self.view.held.labels[row] for row in rows.tolist()])
        elif self.color.value == "group":
            made = colors.by_label([self.view.ids[row] for row in rows.tolist()])
        elif self.color.value == "Pareto k" and found is not None:
            made = colors.by_pareto_k(found.pareto_k.cpu()[rows], found.k_threshold)
        elif self.color.value == "log p(x)" and found is not None:
            made = colors.by_number(found.per_datum.cpu()[rows], "log p(x)")
        elif self.color.value in self._classes():
            classes = self._classes()[self.color.value]
            made = colors.by_label([classes[row] for row in rows.tolist()])
        else:
            made = colors.plain(len(rows))
        self.source.data = {**self.source.data, "color": made[0]}
        self.legend.text = made[1]

    def _show_point(self) -> None:
        """Show the chosen datum, and set the sliders to its code."""
        card = self.page.card(self.number, self.point)
        member = member_of(self.level, self.point)
        self.datum.text = words.datum(self.view, int(self.level.rows[self.point]), member, card)
        self.change.text = '<p class="faint">Click a point to refine its posterior.</p>'
        self.knobs = [self._slider(unit) for unit in self._units()]
        self.sliders.children = list(self.knobs)
        self.moved.text = "" if self.knobs else "The latent is discrete."
        if self.knobs:
            self._move()

    def _units(self) -> list[int]:
        return self.level.order[:MOST_SLIDERS] if self.level.movable else []

    def _slider(self, unit: int) -> Slider:
        codes = self.level.codes[:, unit]
        value, low, high = codes[self.point].item(), codes.min().item(), codes.max().item()
        margin = 0.5 * (high - low) if low < 0 else 0.0  # a positive latent stays within the codes
        low, high = low - margin, high + margin
        slider = Slider(
            start=low,
            end=high if high > low else low + 1.0,
            value=value,
            step=((high - low) or 1.0) / 200,
            title=f"{self.level.site}[{unit}]",
            format="0.00",
            sizing_mode="stretch_width",
        )
        _when(slider, "value_throttled", self._move)
        return slider

    def _move(self) -> None:
        """Decode the code that the sliders say."""
        start = self.level.first_unit(self.point)
        code = self.level.codes[self.point]
        units = {
            start + unit: slider.value
            for unit, slider in zip(self._units(), self.knobs, strict=True)
            if slider.value != code[unit].item()
        }
        row = int(self.level.rows[self.point])
        try:
            made = self.view.moved(row, self.level.site, units, hold=not self.free.active)
        except UsageError as error:
            self.moved.text = words.error(first_line(error))
            return
        card = self.page.compared(self.level, self.point, {"decoded": made})
        self.moved.text = f"<p>{words.moved(len(units))}</p>{card}"

    def _click(self) -> None:
        chosen = self.source.selected.indices
        if not chosen:
            return
        self.point = chosen[0]
        self._show_point()
        self.moves.data = {name: [] for name in ("x0", "y0", "x1", "y1")}
        self.change.text = '<p class="faint">Refining…</p>'
        # The page shows the datum first, and the refinement after it.
        self.document.add_timeout_callback(partial(self._refine, self.number, self.point), 30)

    def _refine(self, number: int, point: int) -> None:
        """Refine the posterior of a datum, unless another one has been chosen since."""
        if (number, point) != (self.number, self.point):
            return
        row, level = int(self.level.rows[point]), self.level
        try:
            found = self.view.refined(row, steps=self.page.steps)
        except UsageError as error:
            self.change.text = words.error(first_line(error))
            return
        made = {"guide": found.reconstructions[0], "refined": found.reconstructions[1]}
        sizes = self.view.held.sizes
        size = None if sizes is None else int(sizes[row])
        card = self.page.compared(level, point, made)
        self.change.text = words.change(found, card, size)
        self.moves.data = self._line(level, point, [means[level.site] for means in found.means])

    def _line(self, level: Level, point: int, means: list[Tensor]) -> dict[str, list[float]]:
        """The line in the plane from the old mean to the new one."""
        start, units = level.first_unit(point), level.codes.shape[1]
        codes = [one.cpu().double().flatten()[start : start + units][None] for one in means]
        ends: dict[str, list[float]] = {}
        for i, code in enumerate(codes):
            ends[f"x{i}"] = level.projected(self.across.value, code).tolist()
            up = level.projected(self.up.value, code).tolist()
            ends[f"y{i}"] = [0.0] if units == 1 else up
        return ends


def _when(widget: Any, name: str, do: Callable[[], None]) -> None:
    """Do something when a property of a widget changes."""

    def changed(attr: str, old: Any, new: Any) -> None:
        do()

    widget.on_change(name, changed)


def _words(text: str) -> Div:
    return Div(text=text, stylesheets=[words.STYLE], sizing_mode="stretch_width")


def _width(title: str, values: list[Any]) -> int:
    """The width of a column of the table in pixels: that of its first values."""
    longest = max([9, len(title), *(len(str(one)) for one in values[:50] if isinstance(one, str))])
    return 20 + 7 * min(longest, 24)


def _formatter(values: list[Any]) -> Any:
    if all(isinstance(value, float) for value in values):
        return NumberFormatter(format="0.[000]", nan_format="missing")
    return StringFormatter()

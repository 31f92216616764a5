"""The page itself: a Bokeh document on the scheduler's dashboard, like those of Dask beside it. Runs on the scheduler's event loop.

A document looks at the board twice a second and changes what has changed: plots get the new points alone, words are sent when they
differ. What is not looked at costs nothing.
"""

from __future__ import annotations

import math
from typing import Any

from bokeh import layouts
from bokeh.core.properties import without_property_validation
from bokeh.document import Document
from bokeh.models.callbacks import CustomJS
from bokeh.models.formatters import CustomJSTickFormatter, NumeralTickFormatter
from bokeh.models.ranges import DataRange1d
from bokeh.models.sources import ColumnDataSource
from bokeh.models.tools import CustomJSHover, HoverTool
from bokeh.models.widgets.inputs import Select
from bokeh.models.widgets.markups import Div
from bokeh.plotting import figure
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.dashboard.core import BokehApplication
from distributed.dashboard.scheduler import template_variables
from tornado.ioloop import IOLoop

from flowps.cluster.dashboard import html
from flowps.cluster.dashboard.board import PAGE, SILENT_S, Board, Run, Series

_LOOK_MS = 500
_PLOT_HEIGHT = 215
_GAP = 10
_BLUE, _ORANGE, _GREEN, _PALE = "#3b77af", "#d9822b", "#2f7d4f", "#e9c9a6"
_CLOCK = """
const s = Math.floor(%s / 1000), h = Math.floor(s / 3600), m = Math.floor(s / 60) %% 60, pad = n => String(n).padStart(2, "0")
return (h ? h + ":" + pad(m) : m) + ":" + pad(s %% 60)
"""
_TEMPLATE = """
{% extends "simple.html" %}
{% block extra_resources %}
<style>
#flowps-lost { display: none; background: #f9dcdb; color: #a42522; padding: 8px 14px; border-radius: 6px; margin: 6px 0; }
body.flowps-lost #flowps-lost { display: block; }
</style>
{% endblock %}
{% block content %}
<div id="flowps-lost">The scheduler does not answer any more, so the run may have ended: this is the last that was heard.</div>
{{ plot_div }}
{{ plot_script }}
{% endblock %}
"""


def serve(scheduler: Any, board: Board, prefix: str) -> None:
    """Add the page to the dashboard of `scheduler`, below `prefix`, and a link to it to Dask's menu."""

    def make(scheduler: Any, extra: dict[str, Any], doc: Document) -> None:
        doc.template = env.from_string(_TEMPLATE)
        doc.template_variables.update(extra)
        doc.theme = BOKEH_THEME
        _Page(board, doc)

    variables = template_variables(scheduler)
    # All pages of this scheduler share this list.
    if PAGE not in variables["pages"]:
        variables["pages"].append(PAGE)
    application = BokehApplication({f"/{PAGE}": make}, scheduler, prefix=prefix, template_variables=variables)
    scheduler.http_application.add_application(application)  # which stops it with the scheduler
    application.initialize(IOLoop.current())
    application.start()


class _Page:
    """One document: a browser that has the page open."""

    def __init__(self, board: Board, doc: Document) -> None:
        self._board, self._doc = board, doc
        self._chosen = ""  # the run that was chosen; "": always the newest
        self._drawn: tuple[str, int] | None = None  # the run that is drawn, and its version
        self._select = Select(title="", options=[], width=300, margin=(4, 0, 0, 0), visible=False)
        self._select.on_change("value", self._choose)
        self._head, self._stages, self._shards, self._notes = _div(), _div(), _div(), _div()
        time = DataRange1d(start=0)
        self._steps, self._intervals = _Points("rate", "loss"), _Points("logloss", "auc")
        rate = _Plot("examples/s", time, "0.[0]a", [(self._steps, "rate", "examples/s", _BLUE, 2)])
        rate.figure.y_range.start = 0
        mean = (self._intervals, "logloss", "mean of an interval", _ORANGE, 2)
        loss = _Plot("loss", time, "0.[000]", [(self._steps, "loss", "single steps", _PALE, 1), mean])
        auc = _Plot("AUC", time, "0.[000]", [(self._intervals, "auc", "AUC of an interval", _GREEN, 2)])
        self._all_plots = (rate, loss, auc)
        self._plots = layouts.row([], sizing_mode="stretch_width", spacing=_GAP)
        tables = layouts.row(
            [self._stages, layouts.column([self._shards, self._notes], sizing_mode="stretch_width", spacing=_GAP)],
            sizing_mode="stretch_width", spacing=_GAP,
        )  # fmt: skip
        self.update()
        doc.add_root(layouts.column([self._select, self._head, self._plots, tables], sizing_mode="stretch_width", spacing=_GAP))
        doc.add_periodic_callback(self.update, _LOOK_MS)
        doc.js_on_event("connection_lost", CustomJS(code="document.body.classList.add('flowps-lost')"))
        doc.js_on_event("client_reconnected", CustomJS(code="document.body.classList.remove('flowps-lost')"))
        board.watchers.append(self._look)
        doc.on_session_destroyed(lambda _: board.watchers.remove(self._look))

    @without_property_validation
    def update(self) -> None:
        """Draw what has changed."""
        run = self._board.find(self._chosen) or self._board.newest()
        if run is None:
            _write(self._head, html.nothing())
            return
        self._offer(run)
        silent_s = run.silent_s if run.silent_s >= SILENT_S else 0.0
        if self._drawn != (run.name, run.version) or silent_s:
            self._draw(run, silent_s)
            self._drawn = run.name, run.version

    def _draw(self, run: Run, silent_s: float) -> None:
        glance = run.glance
        self._doc.title = f"flowps: {glance.name}"
        # One text for all that changes with every step: each change is a message.
        _write(self._head, html.header(glance, silent_s) + html.verdict(glance) + html.tiles(glance))
        for div, write in ((self._stages, html.stages), (self._shards, html.shards), (self._notes, html.notes)):
            _write(div, write(glance))
        self._steps.draw(run.name, run.steps)
        self._intervals.draw(run.name, run.intervals)
        for plot in self._all_plots:
            plot.focus()
        figures = [plot.figure for plot in self._all_plots if plot.has_lines]
        if self._plots.children != figures:
            self._plots.children = figures

    def _offer(self, shown: Run) -> None:
        """Let one choose where there are several."""
        runs = list(self._board.choices())
        if shown not in runs:
            runs.append(shown)
        options: list[Any] = [(run.name, f"{run.glance.name} ({html.clock(run.glance.began_at)}, {run.state})") for run in runs]
        if self._select.options != options:
            self._select.options = options
        if self._select.value != shown.name:
            self._select.value = shown.name
        if self._select.visible != (len(runs) > 1):
            self._select.visible = len(runs) > 1

    def _choose(self, attribute: str, old: str, new: str) -> None:
        newest = self._board.newest()
        self._chosen = "" if newest is not None and new == newest.name else new
        self.update()

    def _look(self) -> None:
        """A run has ended: the scheduler may be gone before the next look."""
        self._doc.add_next_tick_callback(self.update)


class _Plot:
    """Lines over the time of a run.

    time    shared by all, so that one sees what happened together
    lines   whose points, which column of them, and the name, color and width of each; the last one is the calmest
    """

    def __init__(
        self, title: str, time: DataRange1d, number_format: str, lines: list[tuple[_Points, str, str, str, int]]
    ) -> None:  # fmt: skip
        clock = CustomJSHover(code=_CLOCK % "value")
        self.figure = _figure(title, time, number_format)
        self.figure.y_range.range_padding = 0.1 if len(lines) == 1 else 1.0
        self._columns = [(points, column) for points, column, *_ in lines]
        self._drawn: list[Any] = []
        self._is_focused = False
        for points, column, name, color, width in lines:
            legend = {"legend_label": name} if len(lines) > 1 else {}
            drawn = self.figure.line("ms", column, source=points.source, color=color, line_width=width, **legend)
            self._drawn.append(drawn)
            tips = [(name, f"@{column}{{{'0,0' if column == 'rate' else '0.0000'}}}"), ("at", "@ms{custom}")]
            self.figure.add_tools(HoverTool(renderers=[drawn], tooltips=tips, formatters={"@ms": clock}, mode="vline"))
        if len(lines) > 1:
            self.figure.legend.update(label_text_font_size="11px", border_line_alpha=0, background_fill_alpha=0.7, padding=2)

    @property
    def has_lines(self) -> bool:
        """Whether there is something to see."""
        return any(points.known[column] > 1 for points, column in self._columns)

    def focus(self) -> None:
        """Have the scale follow the calm line, once there is one."""
        points, column = self._columns[-1]
        is_focused = points.known[column] > 1
        if is_focused != self._is_focused:
            self._is_focused = is_focused
            self.figure.y_range.renderers = [self._drawn[-1]] if is_focused else "auto"


class _Points:
    """A series as plots use it, under these names, and how much of it they have. `known`: how many values each column has."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self.source: Any = ColumnDataSource({name: [] for name in ("ms", *names)})
        self.known = dict.fromkeys(names, 0)
        self._has: tuple[str, int] | None = None
        self._rows = 0

    def draw(self, run: str, series: Series) -> None:
        """Have all of the series of a run; only what is new is sent."""
        is_same = self._has == (run, series.generation)
        rows = series.rows[self._rows :] if is_same else series.rows
        if is_same and not rows:
            return
        columns = list(zip(*rows, strict=True)) if rows else [()] * (1 + len(self._names))
        data = {"ms": [1000.0 * (seconds or 0.0) for seconds in columns[0]]}
        for name, column in zip(self._names, columns[1:], strict=True):
            data[name] = [math.nan if value is None else value for value in column]
            self.known[name] = (self.known[name] if is_same else 0) + sum(value is not None for value in column)
        if is_same:
            self.source.stream(data)
        else:
            self.source.data = data
        self._has, self._rows = (run, series.generation), len(series.rows)


def _figure(title: str, time: DataRange1d, number_format: str) -> Any:
    """An empty plot over time."""
    made: Any = figure(
        title=title, x_range=time, height=_PLOT_HEIGHT, sizing_mode="stretch_width", tools="xpan,box_zoom,reset", margin=0,
        x_axis_type="datetime", background_fill_color="white", border_fill_color="white", outline_line_color="#e4e4e4",
        min_border_left=50, min_border_right=14, min_border_bottom=32,
        styles={"border": "1px solid #e4e4e4", "border-radius": "6px", "overflow": "hidden"},
    )  # fmt: skip
    made.xaxis.formatter = CustomJSTickFormatter(code=_CLOCK % "tick")
    made.yaxis.formatter = NumeralTickFormatter(format=number_format)
    made.grid.grid_line_color = "#eee"
    made.axis.axis_line_color = made.axis.major_tick_line_color = "#bbb"
    made.axis.minor_tick_line_color = None
    made.toolbar.autohide = True
    return made


def _div() -> Div:
    return Div(text="", sizing_mode="stretch_width", margin=0, disable_math=True, stylesheets=[html.CSS])


def _write(div: Div, text: str) -> None:
    """Sent to the browser only if it differs."""
    if div.text != text:
        div.text = text

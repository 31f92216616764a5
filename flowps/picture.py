"""Pictures of runs: the bars of `compare` as a file, and the curves, boxes and bars of `report` as SVG inside its page.

Covers drawing; what is drawn comes from `run_record`, what is written around it from the commands, which import this module only
when they draw: matplotlib takes a second. Nothing here needs a display or keeps state, so any thread may draw.

A page's pictures take their colours from the page: they are drawn in stand-ins, and `page_svg` puts CSS variables in their place,
so one picture serves a light and a dark page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from flowps.cluster.shard_report import ShardReport
from flowps.errors import OutputError
from flowps.run_record import MAIN_STAGES, RunRecord, names_of, seconds_of, stages_of
from flowps.status.event import Evaluated, Interval, StatusReport
from flowps.status.stage import StageSummary

MOST_RUNS = 8  # that colours can tell apart
_MOST_STAGES = 26  # of a comparison: as many as a screen shows
_MOST_SHARDS = 16  # of a picture; the page's table has them all
_MOST_CHARACTERS = 40  # of a run's name
_MOST_POINTS = 600  # of a curve
_LEAST_MS = 1e-3  # shorter times are drawn as this
_WIDTH = 12.0  # inches


@dataclass(frozen=True)
class _Theme:
    """Colours by what they are for."""

    ink: str
    muted: str
    grid: str
    surface: str
    series: tuple[str, ...]


_PAPER = _Theme(
    "#1b2430", "#5b6675", "#e3e7ec", "#ffffff",
    ("#2f6fdb", "#e8710a", "#0f9d7a", "#c2408f", "#b88a00", "#7653d0", "#3aa6c9", "#7a7f87"),
)  # fmt: skip
_STAND_INS = _Theme("#010101", "#010102", "#010103", "#010104", tuple(f"#0101{16 + k:02x}" for k in range(MOST_RUNS)))
_VARIABLES = {"#010101": "--ink", "#010102": "--muted", "#010103": "--grid", "#010104": "--surface"} | {
    stand_in: f"--series-{k + 1}" for k, stand_in in enumerate(_STAND_INS.series)
}


def draw_comparison(records: Sequence[RunRecord], path: Path) -> None:
    """Write a picture of at most MOST_RUNS runs to `path`: their rates, and P50 with P95 of their stages.

    The format is that which the name ends with. Raises OutputError.
    """
    with _style(_PAPER):
        figure = _comparison(records)
        try:
            figure.savefig(path, dpi=160, metadata={"Software": None} if path.suffix.lower() == ".png" else {"Date": None})
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _comparison(records: Sequence[RunRecord]) -> Figure:
    """Rates above, a group of bars per stage below; sizes are in inches, so that text has its room whatever there is to show."""
    stages = _longest(records, stages_of(records))
    runs, theme = len(records), _PAPER
    names = [name if len(name) <= _MOST_CHARACTERS else f"…{name[1 - _MOST_CHARACTERS :]}" for name in names_of(records)]
    thick = 0.17 if runs > 1 else 0.24
    of_stage, of_rates = thick * runs + 0.15, 0.27 * runs + 0.1
    left = 0.095 * max(map(len, [*stages, *names])) + 0.35
    key_columns = min(runs, int((_WIDTH - 0.6) / (0.105 * max(map(len, names)) + 0.6)))
    keys_tall = 0.24 * -(-runs // key_columns)
    top, between, bottom = 0.96 + keys_tall, 1.1, 0.5
    tall = top + of_rates + between + of_stage * max(1, len(stages)) + bottom
    figure = Figure((_WIDTH, tall))

    def place(above: float, height: float) -> Axes:
        return figure.add_axes((left / _WIDTH, 1 - (above + height) / tall, (_WIDTH - left - 0.35) / _WIDTH, height / tall))

    rates, times = place(top, of_rates), place(top + of_rates + between, of_stage * max(1, len(stages)))
    others = " · ".join(names[1:])
    title = f"{others if len(others) <= _MOST_CHARACTERS else f'{runs - 1} runs'} against {names[0]}"
    figure.text(0.3 / _WIDTH, 1 - 0.4 / tall, title, fontsize=16, fontweight="bold", va="center")
    found = [record.examples_per_s for record in records]
    most = max((rate for rate in found if rate is not None), default=1.0)
    for k, rate in enumerate(found):
        rates.barh(k, rate or 0.0, 0.7, color=theme.series[k])
        partly = "" if records[k].ending is not None else f"  (not finished, step {records[k].steps:,})"
        said = ("–" if rate is None else f"{rate:,.0f}") + partly
        rates.annotate(said, (rate or 0.0, k), (6, 0), textcoords="offset points", va="center", fontsize=10, fontweight="bold")
    rates.set_yticks(range(runs), names)
    rates.set_ylim(runs - 0.45, -0.55)
    rates.set_xlim(0, most * (1.12 if all(record.ending is not None for record in records) else 1.4))
    rates.xaxis.set_major_formatter(FuncFormatter(_thousands))
    rates.xaxis.set_major_locator(MaxNLocator(6))
    rates.set_title("Examples per second in steady state")
    _bare(rates, "x")
    _stage_bars(times, records, stages, thick / of_stage)
    times.set_title("Time of each stage in ms, log scale: bar P50, whisker P95, and both in figures", pad=11)
    keys = [Patch(color=theme.series[k], label=name) for k, name in enumerate(names)]
    figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(0.2 / _WIDTH, 1 - 0.58 / tall), ncols=key_columns, fontsize=11)
    return figure


def training_svg(record: RunRecord) -> str:
    """Loss and AUC over steps; empty where no interval was trained."""
    intervals = _thinned(_as_learned(record))
    if not intervals:
        return ""
    evaluations = [event for event in record.events() if isinstance(event, Evaluated)]
    theme = _STAND_INS
    with _style(theme):
        figure = Figure((_WIDTH, 3.5))
        for k, (axes, what) in enumerate(zip(figure.subplots(1, 2), ("logloss", "auc"), strict=True)):
            title = ("Logloss", "AUC")[k]
            for label, of, color, width in (
                ("each interval", "metrics", theme.series[0], 1.8),
                ("epoch so far", "epoch_metrics", theme.muted, 1.2),
            ):
                points = [(event.step, value) for event in intervals if (value := getattr(getattr(event, of), what)) is not None]
                mark = "o" if len(points) == 1 else ""
                axes.plot(*_columns(points), color=color, linewidth=width, label=label, marker=mark, markersize=4)
            for data, marker, color in (("valid", "o-", theme.series[2]), ("test", "D", theme.series[1])):
                of_data = [event for event in evaluations if event.data == data]
                found = [(event.step, value) for event in of_data if (value := getattr(event.metrics, what)) is not None]
                if found:
                    axes.plot(*_columns(found), marker, color=color, markersize=7, label=data, markeredgecolor=theme.surface)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            _bare(axes, "y")
            axes.legend(loc="best")
        figure.subplots_adjust(left=0.055, right=0.99, top=0.9, bottom=0.15, wspace=0.13)
        return page_svg(figure, "training", "Logloss and AUC over training steps")


def rate_svg(record: RunRecord) -> str:
    """Examples/s over the time spent training; empty where no interval was trained."""
    intervals = _thinned([event for event in record.events() if isinstance(event, Interval)])
    if not intervals:
        return ""
    edges = [0.0]
    for event in intervals:
        edges.append(edges[-1] + seconds_of(event))
    theme = _STAND_INS
    with _style(theme):
        figure = Figure((_WIDTH, 2.9))
        axes = figure.subplots()
        rates = [event.examples_per_s for event in intervals]
        axes.stairs(rates, edges, fill=True, color=theme.series[0], alpha=0.18)
        axes.stairs(rates, edges, color=theme.series[0], linewidth=1.6, baseline=None, label="each interval")
        top = max(rates)
        steady = record.examples_per_s
        if steady is not None:
            top = max(top, steady)
            said = f"steady state: {steady:,.0f}" if record.ending is not None else f"mean but the first: {steady:,.0f}"
            axes.axhline(steady, color=theme.series[1], linewidth=1.5, linestyle=(0, (5, 3)), label=said)
        axes.set_ylim(0, top * 1.07 or 1)
        axes.set_xlim(0, edges[-1] or 1)
        axes.set_xlabel("seconds of training, evaluation and checkpoints left out")
        axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _bare(axes, "y")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.012, 1.0), ncols=2)
        figure.subplots_adjust(left=0.07, right=0.985, top=0.89, bottom=0.17)
        return page_svg(figure, "rate", "Examples per second over the time of the run")


def stages_svg(record: RunRecord) -> str:
    """How long the trainer's stages took; empty where nothing was measured."""
    if record.last is None or not record.last.stages:
        return ""
    rows = [(name, 0, record.last.stages[name]) for name in stages_of([record])]
    return _boxes(rows, "stages", "P50, P95, P99 and longest time of each stage of the trainer")


def shard_stages_svg(record: RunRecord) -> str:
    """How long the stages of the shards took, the busiest ones; empty where nothing was measured."""
    if record.last is None:
        return ""
    shards = sorted(record.last.shards, key=lambda of: -sum(stage.total_us for stage in of.stages.values()))[:MOST_RUNS]
    shards.sort(key=lambda of: of.shard)
    names = dict.fromkeys(name for of in shards for name in of.stages)
    rows = [
        (f"{name} · shard {of.shard}" if len(shards) > 1 else name, k, of.stages[name])
        for name in names
        for k, of in enumerate(shards)
        if name in of.stages
    ]
    return _boxes(rows, "shard-stages", "P50, P95, P99 and longest time of each stage of the shards") if rows else ""


def times_svg(record: RunRecord) -> str:
    """How the times of the main stages went, over the time of the run; empty with fewer than two status reports."""
    reports = list(_every(list(record.reports())))
    stages = [name for name in MAIN_STAGES if sum(name in report.stages for _, report in reports) > 1]
    if not stages:
        return ""
    theme = _STAND_INS
    with _style(theme):
        figure = Figure((_WIDTH, 2.6 * ((len(stages) + 1) // 2) + 0.5))
        panels = figure.subplots((len(stages) + 1) // 2, 2, squeeze=False, sharex=True).flat
        for axes, name in zip(panels, stages, strict=False):
            found = [(seconds, report.stages[name]) for seconds, report in reports if name in report.stages]
            seconds, p50, p95 = ([at for at, _ in found], [_ms(of.p50_us) for _, of in found], [_ms(of.p95_us) for _, of in found])
            axes.fill_between(seconds, p50, p95, color=theme.series[0], alpha=0.15, linewidth=0)
            axes.plot(seconds, p50, color=theme.series[0], linewidth=1.8)
            axes.plot(*_columns(_window_means(found)), color=theme.series[1], linewidth=1.4, drawstyle="steps-pre")
            axes.set_yscale("log")
            axes.set_title(name)
            _log_ms(axes, "y")
            _bare(axes, "y")
            axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
        for axes in list(panels)[len(stages) :]:
            axes.set_visible(False)
        for axes in figure.axes[-2:]:
            axes.set_xlabel("seconds")
            axes.xaxis.set_tick_params(labelbottom=True)
        keys = [
            Line2D([], [], color=theme.series[0], linewidth=1.8, label="P50 since the run began"),
            Patch(color=theme.series[0], alpha=0.15, label="up to P95"),
            Line2D([], [], color=theme.series[1], linewidth=1.4, label="mean between two reports"),
        ]
        tall = figure.get_figheight()
        figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(0.045, 1.0), ncols=3)
        figure.subplots_adjust(left=0.055, right=0.99, top=1 - 0.65 / tall, bottom=0.5 / tall, wspace=0.13, hspace=0.32)
        return page_svg(figure, "times", "Times of the main stages over the time of the run, in milliseconds")


def shards_svg(shards: Sequence[ShardReport]) -> str:
    """Each shard's share of the load, predicted and measured; empty with one shard or no figures."""
    known = [(k, shard) for k, shard in enumerate(shards) if shard.predicted is not None or shard.measured is not None]
    if len(shards) < 2 or not known:
        return ""
    known.sort(key=lambda item: -(item[1].measured or item[1].predicted).time)  # type: ignore[union-attr]
    known = sorted(known[:_MOST_SHARDS], key=lambda item: item[0])
    theme, tall = _STAND_INS, 0.36 * len(known) + 1.1
    with _style(theme):
        figure = Figure((_WIDTH, tall))
        for axes, what in zip(figure.subplots(1, 4, sharey=True), ("lookups", "rows", "bytes", "time"), strict=True):
            for row, (_, shard) in enumerate(known):
                measured, predicted = (100 * getattr(load, what) if load is not None else None
                                       for load in (shard.measured, shard.predicted))  # fmt: skip
                if measured is not None:
                    axes.barh(row, measured, 0.56, color=theme.series[0])
                    right = max(measured, predicted or 0.0, 100 / len(shards))  # where no line goes through it
                    axes.annotate(f"{measured:.1f}", (right, row), (5, 0), textcoords="offset points", va="center", fontsize=9)
                if predicted is not None:
                    axes.plot([predicted, predicted], [row - 0.38, row + 0.38], color=theme.series[1], linewidth=2.6)
            axes.axvline(100 / len(shards), color=theme.muted, linewidth=1, linestyle=(0, (2, 3)))
            axes.set_xlim(0, axes.get_xlim()[1] * 1.22)
            axes.set_title(what)
            axes.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g} %"))
            _bare(axes, "x")
        figure.axes[0].set_yticks(range(len(known)), [f"shard {k}" for k, _ in known])
        figure.axes[0].set_ylim(len(known) - 0.5, -0.5)
        keys = [
            Patch(color=theme.series[0], label="measured"),
            Line2D([], [], color=theme.series[1], linewidth=2.6, label="predicted"),
            Line2D([], [], color=theme.muted, linewidth=1, linestyle=(0, (2, 3)), label="even share"),
        ]
        figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(0.065, 1.0), ncols=3)
        figure.subplots_adjust(left=0.075, right=0.99, top=1 - 0.68 / tall, bottom=0.36 / tall, wspace=0.08)
        return page_svg(figure, "shards", "Each shard's share of the load, predicted and measured")


def page_svg(figure: Figure, name: str, says: str) -> str:
    """A figure as an `<svg>` element for a page, as wide as its place and in the page's fonts and colours.

    name   different for each picture of a page
    says   what it shows, for those who do not see it
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style[^>]*>.*?</style>|<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    start, end = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', start)
    end = re.sub(r'\bid="', f'id="{name}-', end)
    end = re.sub(r'\b(url\(|href=")#', rf"\g<1>#{name}-", end)
    end = re.sub(r"#0101[0-9a-f]{2}", lambda found: f"var({_VARIABLES[found[0]]})", end)
    return f'<svg {box[0] if box else ""} role="img" aria-label="{escape(says)}">{end.strip()}'


def _stage_bars(axes: Axes, records: Sequence[RunRecord], stages: Sequence[str], thick: float) -> None:
    theme, longest = _PAPER, _LEAST_MS * 10
    axes.set_xscale("log")
    for row, stage in enumerate(stages):
        for k, record in enumerate(records):
            of = record.last.stages.get(stage) if record.last is not None else None
            if of is None:
                continue
            at = row + (k - (len(records) - 1) / 2) * thick
            p50, p95 = _ms(of.p50_us), _ms(of.p95_us)
            longest = max(longest, p95)
            axes.barh(at, p50 - _LEAST_MS, thick * 0.86, left=_LEAST_MS, color=theme.series[k])
            axes.plot([p50, p95], [at, at], color=theme.ink, linewidth=1.1, solid_capstyle="butt")
            axes.plot([p95, p95], [at - thick * 0.3, at + thick * 0.3], color=theme.ink, linewidth=1.1)
            axes.annotate(
                f"{_short(of.p50_us / 1000)} / {_short(of.p95_us / 1000)}",
                (p95, at),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=theme.muted,
            )
    for row in range(1, len(stages)):
        axes.axhline(row - 0.5, color=theme.grid, linewidth=0.7)
    axes.set_yticks(range(len(stages)), stages)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in MAIN_STAGES else "normal")
    axes.set_ylim(len(stages) - 0.5, -0.5)
    axes.axhline(len([stage for stage in stages if stage in MAIN_STAGES]) - 0.5, color=theme.muted, linewidth=1)
    axes.set_xlim(_LEAST_MS, longest * 10)
    _log_ms(axes, "x")
    _bare(axes, "x")
    axes.xaxis.set_tick_params(labeltop=True)


def _boxes(rows: Sequence[tuple[str, int, StageSummary]], name: str, says: str) -> str:
    """A line per stage: a box from P50 to P95, a whisker to P99, a dot at the longest. rows: label, colour, times."""
    theme, tall = _STAND_INS, 0.27 * len(rows) + 0.95
    with _style(theme):
        figure = Figure((_WIDTH, tall))
        axes = figure.subplots()
        axes.set_xscale("log")
        for row, (_, color, of) in enumerate(rows):
            p50, p95, p99, most = (_ms(us) for us in (of.p50_us, of.p95_us, of.p99_us, of.max_us))
            axes.plot([p95, p99], [row, row], color=theme.series[color], linewidth=1.6, solid_capstyle="butt")
            axes.plot([p99, p99], [row - 0.2, row + 0.2], color=theme.series[color], linewidth=1.6)
            axes.barh(row, p95 - p50, 0.56, left=p50, color=theme.series[color], alpha=0.45)
            axes.plot([p50, p50], [row - 0.36, row + 0.36], color=theme.series[color], linewidth=3.2)
            axes.plot(most, row, "o", color=theme.muted, markersize=3.6)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        for tick in axes.get_yticklabels():
            tick.set_fontweight("bold" if tick.get_text() in MAIN_STAGES else "normal")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        shown = [_ms(us) for _, _, of in rows for us in (of.p50_us, of.max_us)]
        axes.set_xlim(min(shown) / 1.4, max(shown) * 1.6)
        _log_ms(axes, "x")
        axes.set_xlabel("ms, log scale")
        _bare(axes, "x")
        keys = [
            Line2D([], [], color=theme.series[0], linewidth=3.2, label="P50"),
            Patch(color=theme.series[0], alpha=0.45, label="to P95"),
            Line2D([], [], color=theme.series[0], linewidth=1.6, label="to P99"),
            Line2D([], [], color=theme.muted, linestyle="", marker="o", markersize=3.6, label="longest"),
        ]
        figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(0.155, 1.0), ncols=4)
        figure.subplots_adjust(left=0.17, right=0.99, top=1 - 0.36 / tall, bottom=0.55 / tall)
        return page_svg(figure, name, says)


@contextmanager
def _style(theme: _Theme) -> Iterator[None]:
    """matplotlib's settings while a figure is made and written."""
    settings: Any = {
        "text.parse_math": False,  # names may hold dollars
        "svg.fonttype": "none", "svg.hashsalt": "flowps", "svg.image_inline": True,
        "font.family": "DejaVu Sans", "font.size": 10, "text.color": theme.ink,
        "figure.facecolor": theme.surface, "axes.facecolor": "none", "axes.edgecolor": theme.grid, "axes.labelcolor": theme.muted,
        "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlecolor": theme.ink, "axes.titlelocation": "left",
        "axes.axisbelow": True, "xtick.color": theme.muted, "ytick.color": theme.muted, "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.ink, "grid.color": theme.grid, "grid.linewidth": 0.8, "legend.frameon": False,
        "legend.labelcolor": theme.ink, "legend.fontsize": 9.5, "legend.handlelength": 1.4, "lines.solid_capstyle": "round",
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name that the font cannot show has boxes
        yield


def _bare(axes: Axes, grid: str) -> None:
    """No frame, and lines for one axis alone."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(False)
    axes.grid(True, axis=grid)  # type: ignore[arg-type]
    axes.tick_params(length=0, which="both", pad=5)
    if grid == "x":
        axes.spines["bottom"].set_visible(False)


def _log_ms(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    for steps in ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
        ticks = [step * 10.0**power for power in range(-4, 9) for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) >= 3:  # fewer are no scale
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,.10g}"))
    axis.set_minor_locator(NullLocator())


def _longest(records: Sequence[RunRecord], stages: Sequence[str]) -> list[str]:
    """The stages that are drawn, in order: all, or the main ones and those that took most time in any run."""
    others = [stage for stage in stages if stage not in MAIN_STAGES]
    most: Mapping[str, float] = {
        stage: max(r.last.stages[stage].total_us for r in records if r.last is not None and stage in r.last.stages)
        for stage in others
    }
    drawn = sorted(others, key=lambda stage: -most[stage])[: _MOST_STAGES - len(MAIN_STAGES)]
    return [stage for stage in stages if stage in MAIN_STAGES or stage in drawn]


def _as_learned(record: RunRecord) -> list[Interval]:
    """The intervals that the model has learned from: those that a run has gone back behind are left out."""
    found: list[Interval] = []
    for event in record.events():
        if isinstance(event, Interval):
            while found and found[-1].step >= event.step:
                found.pop()
            found.append(event)
    return found


def _thinned(intervals: Sequence[Interval]) -> list[Interval]:
    """At most _MOST_POINTS intervals, each the sum or mean of neighbours."""
    size = -(-len(intervals) // _MOST_POINTS) or 1
    return [_joined(intervals[at : at + size]) if size > 1 else intervals[at] for at in range(0, len(intervals), size)]


def _joined(parts: Sequence[Interval]) -> Interval:
    examples, seconds = sum(of.metrics.examples for of in parts), sum(seconds_of(of) for of in parts)
    aucs = [of.metrics.auc for of in parts if of.metrics.auc is not None]
    metrics = type(parts[-1].metrics)(
        examples, sum(aucs) / len(aucs) if aucs else None,
        sum(of.metrics.logloss * of.metrics.examples for of in parts) / (examples or 1),
        parts[-1].metrics.prob_mean, parts[-1].metrics.real_mean,
    )  # fmt: skip
    last = parts[-1]
    return Interval(last.epoch, last.step, last.steps_per_s, examples / seconds if seconds else 0.0, metrics, last.epoch_metrics)


def _every(reports: Sequence[tuple[float, StatusReport]]) -> Iterator[tuple[float, StatusReport]]:
    """Some of the reports, evenly, and the last."""
    step = -(-len(reports) // _MOST_POINTS) or 1
    yield from (report for k, report in enumerate(reports) if k % step == 0 or k == len(reports) - 1)


def _window_means(found: Sequence[tuple[float, StageSummary]]) -> list[tuple[float, float]]:
    """End of each window between two reports, and the mean time in it; none where nothing passed or the run began anew."""
    means: list[tuple[float, float]] = []
    for (began, before), (seconds, now) in pairwise(found):
        if now.count > before.count:
            mean = _ms((now.total_us - before.total_us) / (now.count - before.count))
            means += [(seconds, mean)] if means else [(began, mean), (seconds, mean)]
    return means


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _ms(us: float) -> float:
    """As drawn: a log scale has no zero."""
    return max(us / 1000, _LEAST_MS)


def _short(ms: float) -> str:
    """Two or three digits."""
    if ms < _LEAST_MS:
        return f"< {_LEAST_MS}"
    return f"{ms:,.0f}" if ms >= 99.95 else f"{ms:.1f}" if ms >= 9.995 else f"{ms:.2f}" if ms >= 0.1 else f"{ms:#.2g}"


def _thousands(value: float, _: int | None) -> str:
    return f"{value:,.10g}"

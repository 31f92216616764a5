"""The page of a published model: how it was judged, what it was trained on, and quality over slots. It needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from flowps.quality import Quality
from flowps.serving.manifest import Manifest
from flowps.version import __version__
from workflows.store import Record

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 860, 220, 60, 24
_MOST_SHOWN = 12  # names below the curve

FIGURES = (
    ("AUC", "auc", ".4f"), ("PR-AUC", "pr_auc", ".4f"), ("logloss", "logloss", ".4f"),
    ("normalised entropy", "normalised_entropy", ".4f"), ("calibration", "calibration", ".3f"),
)  # fmt: skip
"""What is shown of a Quality: name, attribute, format."""


def page(record: Record, history: Sequence[Record], manifest: Manifest) -> str:
    """As HTML. `history`: of the models before, the newest last."""
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        files("workflows").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    shown = [*history, record]
    return template.render(
        record=record, manifest=manifest, version=__version__, figures=figures(record),
        created=datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        curve=curve([of.slot for of in shown], {
            "new model, fixed set": [of.quality.auc for of in shown],
            "live model on the slot, before": [of.preview.auc if of.preview is not None else None for of in shown],
        }),
    )  # fmt: skip


def figures(record: Record) -> list[tuple[str, ...]]:
    """Name of a figure; of the new model, of the live one, and of the live one on the slot."""

    rows = (*FIGURES, ("samples", "samples", ",d"))
    return [(name, *(cell(of, key, form) for of in (record.quality, record.live, record.preview))) for name, key, form in rows]


def cell(of: Quality | None, key: str, form: str) -> str:
    """A figure as people read it."""
    value = None if of is None else getattr(of, key)
    return "–" if value is None else format(value, form)


def curve(names: Sequence[str], series: dict[str, list[float | None]]) -> Markup:
    """Lines over `names` as SVG; a gap where a value is None."""
    values = [value for of in series.values() for value in of if value is not None]
    if not values:
        return Markup("")
    low, high = min(values), max(values)
    margin = max(0.05 * (high - low), 0.001)
    low, high = low - margin, high + margin
    step = (_WIDTH - _LEFT - 20) / max(1, len(names) - 1)

    def place(at: int, value: float) -> str:
        return f"{_LEFT + at * step:.1f},{(_HEIGHT - _BOTTOM) * (high - value) / (high - low):.1f}"

    drawn = []
    for tick in range(5):
        value = low + (high - low) * tick / 4
        y = (_HEIGHT - _BOTTOM) * (1 - tick / 4)
        drawn.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3f}</text>'
        )
    every = -(-len(names) // _MOST_SHOWN)
    for at in range(0, len(names), every):
        drawn.append(f'<text x="{_LEFT + at * step:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{Markup.escape(names[at])}</text>')
    for number, (name, of) in enumerate(series.items()):
        for run in _runs(of):
            points = " ".join(place(at, value) for at, value in run)
            dots = "".join(f'<circle r="3" cx="{p.split(",")[0]}" cy="{p.split(",")[1]}"/>' for p in points.split())
            drawn.append(f'<g class="line{number}"><title>{Markup.escape(name)}</title><polyline points="{points}"/>{dots}</g>')
    return Markup(f'<svg viewBox="0 -8 {_WIDTH} {_HEIGHT + 8}" role="img">{"".join(drawn)}</svg>')


def _runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Neighbouring values, between gaps."""
    runs: list[list[tuple[int, float]]] = [[]]
    for at, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((at, value))
    return [run for run in runs if run]

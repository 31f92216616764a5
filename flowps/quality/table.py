"""How a person sees a `Quality`: headline figures, calibration by bucket and slice tables, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowps.quality.column import Value
from flowps.quality.figures import Gauc, Quality, SliceRow, SliceTable

_NOTHING = "n/a"
_WORDS = 60  # the widest note
_NAME = 26  # the widest value of a slice; longer ones are folded
_LONGEST = 80
_COARSE = 1 / 64  # bins wider than this move an AUC visibly


def show(quality: Quality, console: Console) -> None:
    """Print all of it."""
    console.print(_headline(quality))
    if quality.buckets:
        console.print()
        console.print(_calibration(quality))
    for of in quality.slices:
        console.print()
        console.print(_slices(of))


def _headline(of: Quality) -> Table:
    table = Table(title="quality", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("", max_width=_WORDS, overflow="fold")
    for row in _figures(of):
        table.add_row(*row)
    return table


def _figures(of: Quality) -> Iterator[tuple[str, str, Text]]:
    """Name, value and remark of the headline figures."""
    missing = f"every label is {int(of.positives > 0)}" if of.samples else "no samples"

    def row(name: str, value: float | None, digits: int, remark: str = "") -> tuple[str, str, Text]:
        return name, _number(value, digits), Text(missing if value is None else remark)

    yield "samples", f"{of.samples:,}", Text("")
    yield "positives", f"{of.positives:,}", Text("")
    yield row("AUC", of.auc, 5)
    if of.gauc is not None:
        yield "GAUC", _number(of.gauc.value, 5), Text(_gauc(of.gauc))
    yield row("PR-AUC", of.pr_auc, 5)
    yield row("logloss", of.logloss, 5)
    yield row("normalised entropy", of.normalised_entropy, 5, "logloss / entropy of the mean label")
    yield row("mean prediction", of.mean_prediction, 5)
    yield row("mean label", of.mean_label, 5)
    yield row("calibration", of.calibration, 4, "mean prediction / mean label")
    yield row("ECE", of.ece, 5, "expected calibration error of the buckets below")


def _gauc(of: Gauc) -> str:
    counted = f"groups with both classes {of.groups:,} (samples {of.samples:,})"
    left_out = f"with one class, left out, {of.one_class_groups:,} (samples {of.one_class_samples:,})"
    return f"by {_printable(of.column)}: {counted}; {left_out}"


def _calibration(of: Quality) -> Table:
    table = _numbers("calibration by prediction", "bucket", "samples", "from", "to", "prediction", "label", "calibration")
    for k, bucket in enumerate(of.buckets):
        table.add_row(
            str(k + 1), f"{bucket.samples:,}", _number(bucket.low, 5), _number(bucket.high, 5), _number(bucket.mean_prediction, 5),
            _number(bucket.mean_label, 5), _number(bucket.calibration, 4),
        )  # fmt: skip
    table.columns[0].justify = "right"
    return table


def _slices(of: SliceTable) -> Table:
    table = _numbers(f"by {_printable(of.column)}", "value", "samples", "label", "prediction", "calibration", "AUC", "logloss")
    for row in of.rows:
        table.add_row(*_cells(_name(row.value), row))
    if of.others is not None:
        table.add_row(*_cells(Text(f"(others: {of.values - len(of.rows):,})"), of.others))
    if of.bin_width > _COARSE:
        table.caption = f"AUC by bins of {of.bin_width:.3g} in the logit: the column has many values"
        table.caption_justify = "left"
    return table


def _cells(name: Text, row: SliceRow) -> tuple[Text | str, ...]:
    return (
        name, f"{row.samples:,}", _number(row.mean_label, 5), _number(row.mean_prediction, 5), _number(row.calibration, 4),
        _number(row.auc, 4), _number(row.logloss, 5),
    )  # fmt: skip


def _numbers(title: str, first: str, *rest: str) -> Table:
    """A table whose first column names, the others are numbers; only the first gives way when there is no room."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first, max_width=_NAME, overflow="fold")
    for name in rest:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(value: float | None, digits: int) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"


def _name(value: Value) -> Text:
    """Text, so that brackets in a value are not taken for rich's markup."""
    if value is None:
        return Text("(null)")
    if isinstance(value, bool):
        return Text(str(value).lower())
    return Text(_printable(value) if isinstance(value, str) else str(value)) if value != "" else Text('""')


def _printable(name: str) -> str:
    shown = "".join(of if of.isprintable() else "\N{REPLACEMENT CHARACTER}" for of in name)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"

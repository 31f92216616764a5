"""What a person sees of a `Quality`."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from flowps.quality import Quality, Tally, cells, show
from tests.quality.naive import column, sample, scored


def shown(quality: Quality, width: int = 100) -> str:
    file = io.StringIO()
    show(quality, Console(file=file, width=width, force_terminal=False, color_system=None))
    return file.getvalue()


def lines_of(text: str, *starts: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.startswith(starts)]


def test_all_figures():
    labels, logits = sample(20_000)
    cities = np.array(["Rome", "Oslo", "Lima"])[np.random.default_rng(0).integers(0, 3, 20_000)]
    quality = scored(labels, logits, {"city": column(cities)}, column(np.arange(20_000) % 5_000), rows=2)
    text = shown(quality)
    gauc, (table,) = quality.gauc, quality.slices
    assert gauc is not None
    assert table.others is not None
    head = lines_of(text, "samples", "AUC", "GAUC", "PR-AUC", "logloss", "calibration  ")
    assert head[:2] == ["samples 20,000", f"AUC {quality.auc:.5f}"]
    assert head[2].startswith(f"GAUC {gauc.value:.5f} by user: groups with both classes {gauc.groups:,}")
    assert f"one class, left out, {gauc.one_class_groups:,}" in " ".join(text.split())
    assert f"PR-AUC {quality.pr_auc:.5f}" in head
    assert len(lines_of(text, *(f"{k:6d} " for k in range(1, 11)))) == 10, "buckets"
    first = table.rows[0]
    assert lines_of(text, str(first.value)) == [
        f"{first.value} {first.samples:,} {first.mean_label:.5f} {first.mean_prediction:.5f} {first.calibration:.4f} "
        f"{first.auc:.4f} {first.logloss:.5f}"
    ]
    assert lines_of(text, "(others: 1)")[0].split()[2] == f"{table.others.samples:,}"


@pytest.mark.parametrize("width", [80, 100, 300])
def test_no_wider_than_a_page_and_no_number_is_cut(width: int):
    labels, logits = sample(30)
    names = ["[red]x[/red]", "", None, "a\nb", "長" * 200, "word " * 40]
    quality = scored(labels, logits * 1e6, {"[bold]" * 4: column(names * 5)}, column(["u"] * 30))
    text = shown(quality, width)
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= min(width, 100)
    assert "[red]x" in text
    assert "by [bold][bold]" in text
    assert lines_of(text, "(null)", '""', "a�b") != []
    assert "…" in text, "a very long value is shortened"
    for row in quality.slices[0].rows:
        assert f"{row.logloss:.5f}" in text


def test_nothing_is_said_as_such():
    text = shown(Tally(("age",), "user").result())
    assert lines_of(text, "AUC", "logloss", "calibration") == [
        "AUC n/a no samples",
        "logloss n/a no samples",
        "calibration n/a no samples",
    ]


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_said_as_such(label: int):
    text = shown(scored(np.full(9, label, np.float32), np.zeros(9, np.float32), {"b": column([True, False, None] * 3)}))
    said = f"n/a every label is {label}"
    assert lines_of(text, "AUC", "PR-AUC", "normalised") == [f"AUC {said}", f"PR-AUC {said}", f"normalised entropy {said}"]
    assert [line.split()[0] for line in lines_of(text, "true", "false", "(null)")] == ["false", "true", "(null)"]


def test_coarse_bins_are_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cells, "MAX_CELLS", 100)
    labels, logits = sample(5_000)
    slices = {"age": column(np.arange(5_000) % 10)}
    quality = scored(labels, logits, slices)
    assert f"AUC by bins of {quality.slices[0].bin_width:.3g} in the logit" in shown(quality)
    monkeypatch.undo()
    assert "AUC by bins" not in shown(scored(labels, logits, slices))

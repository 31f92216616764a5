"""The page's curve, and the demonstration's days."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps.errors import DataError
from workflows.demo import BAD, DAYS, FIRST, arrive, main, prepare
from workflows.report import curve


def test_a_curve_has_a_gap_where_there_is_no_value() -> None:
    drawn = str(curve(["a", "b", "<c>", "d"], {"one & two": [0.5, None, 0.7, 0.6], "three": [None] * 4}))
    points = [run.split() for run in re.findall(r'<polyline points="([^"]*)"', drawn)]
    assert [len(run) for run in points] == [1, 2]
    heights = [float(of.split(",")[1]) for run in points for of in run]
    assert heights[1] < heights[2] < heights[0], "up is more"
    assert "&lt;c&gt;" in drawn
    assert "<title>one &amp; two</title>" in drawn
    assert curve(["a"], {"x": [None]}) == ""
    assert "<polyline" in curve(["a"], {"x": [0.5]})


def test_days_of_the_demonstration(tmp_path: Path) -> None:
    """Every sample of the three weeks, and before, is in the fixed set or in one day; one day's labels are shuffled."""
    begin = (FIRST.toordinal() - 719_163) * 86_400
    at = np.arange(begin - 86_400 * 3, begin + 86_400 * (DAYS + 2), 600)
    rng = np.random.default_rng(0)
    table = pa.table({"timestamp": at, "user_id": at // 600, "label": (rng.random(len(at)) < 0.5).astype(np.int8)})
    for name, rows in (("train", table.slice(0, 2000)), ("valid", table.slice(2000, 500)), ("test", table.slice(2500))):
        pq.write_table(rows, tmp_path / f"{name}.parquet")
    files = prepare(tmp_path, tmp_path / "demo")
    assert len(files) == DAYS + 1
    parts = [pq.read_table(path) for path in [*files, tmp_path / "demo" / "fixed.parquet"]]
    seen = pa.concat_tables(parts).sort_by("timestamp")
    wanted = table.slice(0, (3 + DAYS) * 144)
    assert seen["timestamp"].equals(wanted["timestamp"])
    by_time = dict(zip(table["timestamp"].to_pylist(), table["label"].to_pylist(), strict=True))
    for k, part in enumerate(parts):
        labels = [by_time[t] for t in part["timestamp"].to_pylist()]
        assert (part["label"].to_pylist() != labels) == (k == BAD + 1)
        assert sorted(part["label"].to_pylist()) == sorted(labels)
    arrive(files[1], tmp_path / "demo", FIRST)
    assert (tmp_path / "demo" / "days" / f"date={FIRST}" / "_SUCCESS").exists()


def test_data_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no such file; give the folder of MovieLens 100k"):
        prepare(tmp_path, tmp_path / "demo")
    assert main([str(tmp_path), "--to", str(tmp_path / "demo")]) == 1
    assert "give the folder of MovieLens 100k" in capsys.readouterr().err

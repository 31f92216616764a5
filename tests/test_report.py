"""The command that says what a run has left, as a person runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from flowps.cluster.shard_report import PlacementReport, ShardReport
from flowps.ps.load import SlotLoad
from flowps.ps.placement import ShardLoad
from flowps.report import main
from flowps.status.event import Finished, Metrics

SHARDS = [
    ShardReport("ps-0", ["user", "item (1/2)"], ShardLoad(0.4, 0.5, 0.5, 0.45), ShardLoad(0.41, 0.5, 0.52, 0.55)),
    ShardReport("ps-1", ["item (2/2)"], ShardLoad(0.6, 0.5, 0.5, 0.55), ShardLoad(0.59, 0.5, 0.48, 0.45)),
]


def run_of(folder: Path, *, finished: bool) -> Path:
    """The files of a run on two shards."""
    report = PlacementReport("measured on the first 100 examples", SHARDS, {"user": SlotLoad(1.0, 0.5, 10)})
    (folder / "placement.json").write_bytes(msgspec.json.encode(report))
    if finished:
        end = Finished(2, 30, 960, 4.0, 1.0, 0.0, 0.0, 0.0, False)
        test = Metrics(100, 0.75, 0.5, 0.25, 0.25)
        (folder / "summary.json").write_bytes(msgspec.json.encode({"finished": end, "test": test, "rows": 20}))
    return folder


def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main([str(run_of(tmp_path, finished=True))]) == 0
    said = capsys.readouterr().out
    assert "trained: 960 examples, 30 steps, 2 epoch(s) in 4.0 s" in said
    assert "test: auc = 0.7500" in said
    assert "shards: predicted → measured share in %" in said
    line = next(line for line in said.splitlines() if "ps-0" in line)
    assert "2: user, item (1/2)" in line
    assert "40.0→41.0" in line
    assert "busiest shard: 1.10× the mean predicted, 1.10× the mean measured (load measured on the first 100 examples)" in said


def test_a_run_that_has_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_of(tmp_path, finished=False))]) == 0
    assert "the run has not finished, or failed" in capsys.readouterr().out.replace("\n", "")


def test_a_directory_that_is_no_runs(tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, "-m", "flowps.report", str(tmp_path)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"error: {tmp_path}/placement.json: cannot be read: No such file or directory; is this the")


def test_a_file_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "placement.json").write_text('{"shards": 3}')
    assert main([str(tmp_path)]) == 1
    assert "is no file of this version of flowps" in capsys.readouterr().err

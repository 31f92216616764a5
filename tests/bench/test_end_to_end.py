"""The benchmark over files made elsewhere: one JSON object with what the tables and other tools read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import end_to_end
from flowps.synthetic import criteo, generate


def test_files_of_the_same_columns_made_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = generate(criteo(), tmp_path / "made", rows=60_000, test_rows=5_000)
    for split, files in (("train", made.train_files), ("test", made.test_files)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for file in files:
            file.rename(tmp_path / "data" / split / f"part-{file.name}")
    result = tmp_path / "result.json"
    arguments = [
        "criteo",
        "--data",
        str(tmp_path / "data"),
        "--runs",
        "1",
        "--json",
        str(result),
        "--",
        "--data.batch_size",
        "1024",
    ]
    monkeypatch.setattr(sys, "argv", ["bench.end_to_end", *arguments])
    assert end_to_end.main() == 0
    found = json.loads(result.read_text(encoding="utf-8"))
    assert (found["workload"], found["net"], found["mode"]) == ("criteo", "small", "embedded")
    assert found["examples_per_s"] > 0
    assert found["cpu_s_per_million"] > 0
    assert found["peak_rss_bytes"] > 1 << 26
    assert found["first_step_s"] > 0
    assert found["first_step_cold_s"] > 0
    assert 0 <= found["trainer_wait_share"] <= 1
    assert found["empty_reads"] == 0
    assert 0.5 < found["test_auc"] < found["best_auc"] == pytest.approx(made.best_auc)
    assert found["machine"]["cores"] >= 1


def test_a_folder_without_the_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.end_to_end", "criteo", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no train\*\.parquet and no folder train/"):
        end_to_end.main()

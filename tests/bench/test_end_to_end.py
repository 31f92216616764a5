"""The benchmark over files made elsewhere: one JSON object with what the tables and other tools read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import end_to_end
from flowps.synthetic import criteo, generate


def a_run(examples_per_s: float, tree_cpu_s_per_million: float | None = 40.0) -> dict[str, Any]:
    figures = dict.fromkeys(end_to_end._MEDIANS, 1.0)
    return {**figures, "examples_per_s": examples_per_s, "tree_cpu_s_per_million": tree_cpu_s_per_million, "best_auc": 0.8}


def test_both_modes_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    generate(criteo(), tmp_path / "data", rows=1000, test_rows=100)
    to, done = tmp_path / "result.json", list[str]()

    @contextmanager
    def training(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[None]:
        assert "--data.test" not in arguments
        done.append(f"warm {arguments[arguments.index('--cluster.mode') + 1]}")
        yield

    def run(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
        done.append(arguments[arguments.index("--cluster.mode") + 1])
        assert arguments[arguments.index("--ps.num_shards") + 1] == {"embedded": "1", "processes": "3"}[done[-1]]
        assert arguments[-2:] == ["--seed", "5"]
        if done[-1] == "embedded":
            return a_run(100.0 * len(done))
        return a_run(50.0 * len(done), tree_cpu_s_per_million=60.0)

    monkeypatch.setattr(end_to_end, "training", training)
    monkeypatch.setattr(end_to_end, "_run", run)
    arguments = ["criteo", "--compare", "--data", str(tmp_path / "data"), "--runs", "3", "--shards", "3", "--json", str(to)]
    monkeypatch.setattr(sys, "argv", ["bench.end_to_end", *arguments, "--", "--seed", "5"])
    assert end_to_end.main() == 0
    one, several = "embedded", "processes"
    assert done == [f"warm {one}", f"warm {several}", one, several, several, one, one, several]
    found = json.loads(to.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == found
    assert (found["rounds"], found["shards"], found["target"]) == (3, 3, {"ratio_at_least": 0.5})
    (of,) = found["workloads"]
    assert (of["workload"], of["net"]) == ("criteo", "small")
    assert [run["examples_per_s"] for run in of["embedded"]["runs"]] == [300, 600, 700]
    assert (of["embedded"]["examples_per_s"], of["processes"]["examples_per_s"]) == (600, 250)
    assert of["ratio"] == of["processes"]["examples_per_s"] / of["embedded"]["examples_per_s"]
    assert (of["ratio_least"], of["ratio_most"]) == pytest.approx((250 / 600, 200 / 300))
    assert of["tree_cpu_ratio"] == 1.5
    table = end_to_end.markdown(found)
    assert "| `criteo` | small | processes, 3 shards | 250 (200–400) | 0.42 (0.42–0.67) | 60.0 |" in table
    of["processes"]["tree_cpu_s_per_million"] = None
    assert "| – |" in end_to_end.markdown(found)


def test_cpu_of_all_processes_is_between_two_lines_of_metrics() -> None:
    lines = [("Started", None, 1.0), ("Interval", 10, 3.0), ("Interval", 20, 4.0), ("Interval", 40, 8.0), ("Evaluated", 40, 9.0)]
    usage = end_to_end.Usage(samples=[({"type": kind, "step": step}, cpu_s, 0) for kind, step, cpu_s in lines])
    assert end_to_end.tree_cpu_s_per_million(usage, 100) == pytest.approx(5.0 / 3000 * 1e6)
    assert end_to_end.tree_cpu_s_per_million(end_to_end.Usage(samples=usage.samples[:2]), 100) is None


def test_neither_a_workload_nor_a_comparison(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.end_to_end"])
    with pytest.raises(SystemExit):
        end_to_end.main()
    assert "name a workload, or give --compare" in capsys.readouterr().err


def test_a_folder_without_the_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.end_to_end", "criteo", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no train\*\.parquet and no folder train/"):
        end_to_end.main()

"""`bench.all`: which command makes which result."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from bench import all as bench_all
from bench.table import RESULTS


def test_knobs_stay_behind_the_dashes() -> None:
    assert bench_all.command_of("end_to_end dsp_ctr -- --trainer.in_flight 4", Path("to.json"))[1:] == [
        "-m", "bench.end_to_end", "dsp_ctr", "--json", "to.json", "--", "--trainer.in_flight", "4",
    ]  # fmt: skip


def test_a_folder_is_one_word() -> None:
    assert bench_all.command_of("storage {}", Path("to.json"), "my films")[1:] == [
        "-m", "bench.storage", "my films", "--json", "to.json",
    ]  # fmt: skip


def test_every_result_is_made_by_a_benchmark_that_is_there_and_has_been_made() -> None:
    for name, command in (bench_all._COMMANDS | bench_all._OF_ML1M).items():
        assert importlib.util.find_spec(f"bench.{command.split()[0]}") is not None, command
        assert (RESULTS / f"{name}.json").exists(), f"run `python -m bench.all --only {name}`"


def test_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    monkeypatch.setattr(bench_all, "write_tables", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["bench.all", "--only", "map"])
    assert bench_all.main() == 0
    assert ran == [[sys.executable, "-m", "bench.map", "--json", str(RESULTS / "map.json")]]


def test_torch_may_be_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, check: pytest.fail(f"{command} was run"))
    monkeypatch.setattr(bench_all, "write_tables", lambda: 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench.all", "--only", "rival-1-criteo-small-torch"])
    assert bench_all.main() == 0
    assert "rival-1-criteo-small-torch is left out and stays as it is: torch is not installed" in capsys.readouterr().err


def test_an_unknown_result_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.all", "--only", "mapp"])
    with pytest.raises(SystemExit):
        bench_all.main()
    assert "unknown result 'mapp'; there are end_to_end-criteo-small, " in capsys.readouterr().err

"""`--trace`: every batch's way through all threads and processes, in a file that trace viewers open."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flowps.cluster import tracing
from flowps.train import main
from tests.cluster.conftest import Command, train_command, train_words

BATCHES = 6  # of those that are traced, from TRACED on
FIRST = 5


def spans_of(path: Path) -> tuple[list[dict[str, Any]], dict[int, str], dict[tuple[int, int], str]]:
    """All spans, the names of processes and of threads."""
    events = json.loads(path.read_text())["traceEvents"]
    named = [event for event in events if event["ph"] == "M"]
    processes = {event["pid"]: event["args"]["name"].split(" ")[0] for event in named if event["name"] == "process_name"}
    threads = {(event["pid"], event["tid"]): event["args"]["name"] for event in named if event["name"] == "thread_name"}
    return [event for event in events if event["ph"] == "X"], processes, threads


def finished(command: Command, path: Path) -> None:
    said = command.succeed()
    assert f" spans in {path}, for https://ui.perfetto.dev" in said


def test_every_batch_passes_every_stage_in_order(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """In one process; `long_processes` has several."""
    path = tmp_path / "traces" / "out.json"
    words = train_words(samples, tmp_path / "run", *tracing_to(path), "--cluster.mode", "embedded")
    assert main([str(word) for word in words]) == 0
    assert f" spans in {path}, for https://ui.perfetto.dev" in " ".join(capsys.readouterr().out.split())
    check_every_batch("embedded", path)


def tracing_to(path: Path) -> tuple[object, ...]:
    """Knobs of a run that traces batches to a file, with two shards."""
    traced = ("--trace", path, "--status.trace_from", FIRST, "--status.trace_batches", BATCHES)
    return (*traced, "--cluster.dashboard", "", "--ps.num_shards", 2)


def check_every_batch(mode: str, path: Path) -> None:
    """The trace, in a file, of a run in a mode."""
    spans, processes, threads = spans_of(path)
    assert set(processes.values()) == {"trainer-0", "shard-0", "shard-1", "hub"}
    for batch in range(FIRST, FIRST + BATCHES):
        own = {(processes[span["pid"]], span["name"]): span for span in spans if span.get("args") == {"batch": batch}}
        way = [
            ("trainer-0", "EmbeddingLookup"), ("shard-0", "Lookup"), ("shard-0", "Pool"), ("trainer-0", "TrainStep"),
            ("trainer-0", "PushGrad"), ("shard-0", "Push"),
        ]  # fmt: skip
        assert own.keys() >= set(way)
        starts = [own[stage]["ts"] for stage in way]
        assert starts == sorted(starts), "one after the other, and a shard's part within the trainer's"
        for outer, inner in (
            (("trainer-0", "EmbeddingLookup"), ("shard-0", "Lookup")),
            (("trainer-0", "PushGrad"), ("shard-0", "Push")),
        ):
            slack_us = 2000  # of two processes' clocks
            assert own[inner]["ts"] + own[inner]["dur"] <= own[outer]["ts"] + own[outer]["dur"] + slack_us
    assert {span["args"]["batch"] for span in spans if "args" in span} == set(range(FIRST, FIRST + BATCHES))
    assert "flowps-push" in threads.values()
    assert any(name.startswith("flowps-feed-") for name in threads.values())
    assert any(processes[span["pid"]] == "hub" and span["name"] == "DecodePartition" for span in spans) or mode == "embedded"


def test_a_file_that_cannot_be_written_is_refused_before_training(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    knobs = ("--trace", tmp_path / "file" / "out.json", "--cluster.dashboard", "")
    with closing(train_command(samples, tmp_path / "run", *knobs)) as command:
        said = command.refuse()
    assert said.endswith("out.json cannot be written: File exists; give another file")
    assert "step 5," not in command.said


@pytest.mark.parametrize(("behind_s", "found_s"), [(0.0, 0.0), (0.004, 0.0), (7.0, 7.0), (-7.0, -7.0)])
def test_clocks_of_other_machines_are_put_right_and_those_of_this_one_left_alone(
    monkeypatch: pytest.MonkeyPatch, behind_s: float, found_s: float
) -> None:
    """An answer takes 10 ms; a difference of less than half of that may be none."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(tracing, "time", SimpleNamespace(time=lambda: clock.now))

    def run(function: object, workers: list[str]) -> dict[str, float]:
        clock.now += 0.010
        return {workers[0]: clock.now - 0.005 - behind_s}

    assert tracing._ahead(run, "tcp://there:1") == pytest.approx(found_s, abs=1e-9)

"""Spans of threads and processes, and the file that trace viewers open."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from flowps.status import trace as trace_module
from flowps.status.trace import NO_BATCH, RoleSpans, Trace, write


def test_spans_are_kept_for_the_batches_asked_for_and_what_happens_meanwhile() -> None:
    trace = Trace(first=2, last=4)
    for batch in (1, NO_BATCH, 2, NO_BATCH, 3, 4, NO_BATCH, 2):
        trace.add(f"Step{batch}", 1.0, 2.0, batch)
    (spans,) = trace.take("trainer-0", "here:1")
    assert [name for name, *_ in spans.spans] == ["Step2", "Step-1", "Step3", "Step2"]


def test_times_are_on_the_unix_clock_and_nothing_is_taken_twice() -> None:
    trace = Trace()
    trace.add("Step", 1.0, 3.0, 0)
    (spans,) = trace.take("trainer-0", "here:1")
    ((_, _, began, ended, _),) = spans.spans
    assert ended - began == pytest.approx(2.0)
    assert began > 1e9
    assert trace.take("trainer-0", "here:1")[0].spans == []


def test_what_is_too_much_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MOST_SPANS", 3)
    trace = Trace()
    for batch in range(5):
        trace.add("Step", 0.0, 1.0, batch)
    (spans,) = trace.take("trainer-0", "here:1")
    assert (len(spans.spans), spans.left_out) == (3, 2)


@pytest.mark.usefixtures("hurried_switching")
def test_threads_add_at_once() -> None:
    trace, threads, each = Trace(), 4, 500

    def work() -> None:
        for batch in range(each):
            trace.add("Step", 0.0, 1.0, batch)

    workers = [threading.Thread(target=work, name=f"worker-{k}") for k in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    (spans,) = trace.take("trainer-0", "here:1")
    assert len(spans.spans) == threads * each
    assert {spans.threads[thread] for _, thread, *_ in spans.spans} <= {f"worker-{k}" for k in range(threads)}


def test_processes_come_together_on_one_clock(tmp_path: Path) -> None:
    """The shard's clock is 100 s behind; its lookup lies within the trainer's."""
    feed, step = ("EmbeddingLookup", 1, 1000.0, 1000.010, 5), ("TrainStep", 2, 1000.02, 1000.03, 5)
    trainer = RoleSpans("trainer-0", "a:1", {1: "feed", 2: "main"}, [feed, step])
    shard = RoleSpans("shard-0", "b:2", {7: "server"}, [("Lookup", 7, 900.002, 900.008, 5)])
    hub = RoleSpans("hub", "c:3", {9: "hub-0"}, [("DecodePartition", 9, 999.0, 999.5, NO_BATCH)])
    path = tmp_path / "trace.json"
    assert write(path, [trainer, shard, hub], {"a:1": 0.0, "b:2": 100.0, "c:3": 0.0}) == 4
    events = json.loads(path.read_text())["traceEvents"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert spans["DecodePartition"]["ts"] == 0
    lookup, whole = spans["Lookup"], spans["EmbeddingLookup"]
    assert whole["ts"] < lookup["ts"] < lookup["ts"] + lookup["dur"] < whole["ts"] + whole["dur"]
    assert lookup["args"] == {"batch": 5}
    names = {event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] in ("process_name", "thread_name")}
    assert names == {"trainer-0 (a:1)", "shard-0 (b:2)", "hub (c:3)", "feed", "main", "server", "hub-0"}
    assert len({(event["pid"], event["tid"]) for event in spans.values()}) == 4
    # One arrow, from a lookup to the step: what lies within another is not after it.
    arrows = [event for event in events if event["ph"] in "sf"]
    assert [event["ph"] for event in arrows].count("s") == [event["ph"] for event in arrows].count("f") >= 1


def test_an_empty_trace_is_a_file_too(tmp_path: Path) -> None:
    assert write(tmp_path / "trace.json", [], {}) == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == []

"""The reporter's thread: reports now and then, and once at the end about the whole run."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from flowps.status import reporter as reporter_module
from flowps.status.event import Event, StatusReport
from flowps.status.reporter import Reporter
from flowps.status.run_status import RunStatus

FOREVER_S = 1e6


def reporter_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "flowps-status"]


def test_the_end_is_reported_once():
    status, events = RunStatus(), list[Event]()
    status.observe("TrainStep", 0.25)
    status.count("dropped", 3)
    reporter = Reporter(status, events.append, FOREVER_S, lambda: 17)
    reporter.close()
    reporter.close()
    (event,) = events
    assert isinstance(event, StatusReport)
    assert event.step == 17
    assert event.stages == status.summaries()
    assert event.counters == {"dropped": 3}
    assert event.bottleneck is None
    assert event.seconds >= 0
    assert reporter_threads() == []


def test_reports_come_again_and_again():
    third, events = threading.Event(), list[Event]()

    def emit(event: Event) -> None:
        events.append(event)
        if len(events) == 3:
            third.set()

    reporter = Reporter(RunStatus(), emit, 1e-4, lambda: len(events))
    try:
        assert third.wait(30)
    finally:
        reporter.close()
    reports = [event for event in events if isinstance(event, StatusReport)]
    assert len(reports) == len(events) >= 4
    assert [event.step for event in reports] == list(range(len(reports))), "asked for the step anew each time"
    assert [event.seconds for event in reports] == sorted(event.seconds for event in reports)
    assert reporter_threads() == []


def test_a_report_judges_the_time_since_the_one_before_and_the_last_one_the_whole_run(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 10.0, 20.0, 40.0])
    monkeypatch.setattr(reporter_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    status, events, reporters = RunStatus(), list[StatusReport](), list[Reporter]()
    made, twice = threading.Event(), threading.Event()
    status.observe("TrainerWait", 5.0)
    status.observe("TrainerWaitForRead", 5.0)

    def emit(event: Event) -> None:
        assert isinstance(event, StatusReport)
        events.append(event)
        if len(events) == 1:
            status.observe("TrainerWait", 0.01)
        if len(events) == 2:
            # Stay in the second report until `close` has begun, so that there is no third before the last.
            assert made.wait(30)
            twice.set()
            assert reporters[0]._ended.wait(30)

    reporters.append(Reporter(status, emit, 1e-4, lambda: 0))
    made.set()
    try:
        assert twice.wait(30)
    finally:
        reporters[0].close()
    first, second, last = (event.bottleneck for event in events)
    assert first is not None
    assert "waited 50% of the last 10 s" in first
    assert second is None, "since the first report the trainer waited 10 ms of 10 s"
    assert last is not None
    assert "waited 13% of the last 40 s" in last
    assert [event.seconds for event in events] == [10.0, 20.0, 40.0]


def test_the_last_report_judges_the_training_whatever_comes_after_it(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 10.0, 500.0])
    monkeypatch.setattr(reporter_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    status, events = RunStatus(), list[Event]()
    reporter = Reporter(status, events.append, FOREVER_S, lambda: 0)
    for stage in ("TrainerWait", "TrainerWaitForLookup"):
        status.observe(stage, 2.0)
    reporter.judge()
    status.observe("TrainerWait", 400.0)  # of something else
    reporter.close()
    (event,) = events
    assert isinstance(event, StatusReport)
    assert event.bottleneck is not None
    assert "waited 20% of the last 10 s" in event.bottleneck
    assert "EmbeddingLookup" in event.bottleneck
    assert event.seconds == 500.0


def test_an_error_of_a_subscriber_is_raised_at_the_end():
    raised, error = threading.Event(), OSError("disk full")

    def emit(event: Event) -> None:
        raised.set()
        raise error

    reporter = Reporter(RunStatus(), emit, 1e-4, lambda: 0)
    assert raised.wait(30)
    with pytest.raises(OSError, match="disk full") as caught:
        reporter.close()
    assert caught.value is error
    reporter.close()
    assert reporter_threads() == []


def test_closing_does_not_wait_for_the_interval():
    """Would run into the test's time limit otherwise."""
    reporter = Reporter(RunStatus(), lambda event: None, FOREVER_S, lambda: 0)
    reporter.close()
    assert reporter_threads() == []

"""The reporter's thread: reports now and then, once when the first steps are over, when training is, and at the end."""

from __future__ import annotations

import threading

import pytest

from flowps.status.event import Event, TrainerStatus
from flowps.status.reporter import Reporter
from flowps.status.run_status import RunStatus

FOREVER_S = 1e6


def reporter_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "flowps-status"]


def phases(events: list[Event]) -> list[str]:
    return [event.phase for event in events if isinstance(event, TrainerStatus)]


def test_the_end_is_reported_once():
    status, events = RunStatus(), list[Event]()
    status.observe("TrainStep", 0.25)
    status.count("dropped", 3)
    reporter = Reporter(status, events.append, FOREVER_S, lambda: 17, trainer=3)
    reporter.close()
    reporter.close()
    (event,) = events
    assert isinstance(event, TrainerStatus)
    assert (event.trainer, event.step, event.phase) == (3, 17, "ended")
    assert event.stages == status.summaries()
    assert event.counters == {"dropped": 3}
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
    reports = [event for event in events if isinstance(event, TrainerStatus)]
    assert len(reports) == len(events) >= 4
    assert [event.step for event in reports] == list(range(len(reports))), "asked for the step anew each time"
    assert [event.seconds for event in reports] == sorted(event.seconds for event in reports)
    assert phases(events)[:3] == ["going"] * 3
    assert reporter_threads() == []


def test_that_the_first_steps_are_over_is_said_once():
    events = list[Event]()
    reporter = Reporter(RunStatus(), events.append, FOREVER_S, lambda: 0)
    for _ in range(3):
        reporter.warm()
    reporter.trained()
    reporter.close()
    assert phases(events) == ["warm", "trained", "ended"]


def test_nothing_is_going_on_after_training():
    """Whatever the evaluation takes, the verdict is that of the training."""
    events, going = list[Event](), threading.Event()

    def emit(event: Event) -> None:
        events.append(event)
        going.set()

    reporter = Reporter(RunStatus(), emit, 1e-4, lambda: 0)
    assert going.wait(30)
    reporter.trained()
    count = len(events)
    threading.Event().wait(0.05)
    reporter.close()
    assert phases(events)[count - 1 :] == ["trained", "ended"]


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

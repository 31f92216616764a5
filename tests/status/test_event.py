"""Events cross processes as plain data and come back as they were."""

from __future__ import annotations

import math
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.status.event import (
    Evaluated,
    Event,
    Finished,
    Interval,
    Metrics,
    Progress,
    Scored,
    Started,
    StatusReport,
    from_wire,
    to_wire,
)
from flowps.status.stage import StageSummary
from tests.status.samples import (
    AT_CUT,
    EVALUATED,
    FINISHED,
    INTERVAL,
    NOTHING,
    ONE_CLASS,
    PROGRESS,
    REMARK,
    REPORT,
    SAVED,
    STARTED,
    TRAINER,
    WRITTEN,
)

SAMPLES: list[Event] = [
    STARTED,
    PROGRESS,
    msgspec.structs.replace(PROGRESS, auc=None, loss=float("nan"), examples_per_s=float("inf")),
    INTERVAL,
    Interval(1, 10, 1.0, 1.0, ONE_CLASS, NOTHING),
    AT_CUT,
    WRITTEN,
    SAVED,
    REMARK,
    EVALUATED,
    Evaluated(1, 0, 0.0, NOTHING),
    Scored(1, 4096),
    REPORT,
    StatusReport(0.0, 0, {}, {}),
    TRAINER,
    FINISHED,
    msgspec.structs.replace(FINISHED, stopped=True),
]


def leaves(value: Any) -> list[Any]:
    """Types of all containers and values in a message."""
    inside = [*value.values(), *value] if isinstance(value, dict) else value if isinstance(value, list) else []
    return [type(value), *(leaf for v in inside for leaf in leaves(v))]


def same(left: Any, right: Any) -> bool:
    """Equal, where NaN equals NaN."""
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    return left == right and type(left) is type(right)


def over_the_wire(event: Event) -> Event:
    """As Dask sends it: msgpack."""
    return from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(to_wire(event))))


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_as_it_was(event: Event):
    back = over_the_wire(event)
    assert type(back) is type(event)
    assert same(to_wire(back), to_wire(event))


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: type(event).__name__)
def test_a_message_is_builtins_only(event: Event):
    assert set(leaves(to_wire(event))) <= {dict, list, tuple, str, int, float, bool, type(None)}


def test_every_kind_of_event_is_tried_here():
    assert {type(event) for event in SAMPLES} == set(get_args(Event))


def test_nested_parts_keep_their_types():
    report, interval = over_the_wire(REPORT), over_the_wire(INTERVAL)
    assert isinstance(report, StatusReport)
    assert isinstance(interval, Interval)
    assert report.stages == REPORT.stages
    assert isinstance(report.stages["EmbeddingLookup"], StageSummary)
    assert isinstance(interval.epoch_metrics, Metrics)


def test_none_and_nan_stay_apart():
    back = over_the_wire(msgspec.structs.replace(PROGRESS, auc=None, loss=float("nan")))
    assert isinstance(back, Progress)
    assert back.auc is None
    assert math.isnan(back.loss)


@settings(max_examples=50, deadline=None)
@given(st.builds(Started) | st.builds(Finished) | st.builds(Progress) | st.builds(StatusReport) | st.builds(Interval))
def test_any_event_comes_back_as_it_was(event: Event):
    back = from_wire(to_wire(event))
    assert type(back) is type(event)
    assert same(to_wire(back), to_wire(event))


@pytest.mark.parametrize(
    "message", [{}, {"type": "Unheard"}, {"type": "Progress", "epoch": 1}, {"type": "Evaluated", "epoch": "x"}]
)
def test_what_is_no_event_is_refused(message: dict[str, Any]):
    with pytest.raises(msgspec.ValidationError):
        from_wire(message)

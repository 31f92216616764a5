"""What becomes of a trainer's figures: with those of shards and processes a report, and a verdict that is news or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from flowps.cluster.observer import Observer
from flowps.cluster.plan import Plan
from flowps.status.event import Event, Phase, Started, StatusReport, TrainerStatus
from flowps.status.figures import ShardFigures, Usage
from flowps.status.stage import StageSummary
from tests.status.samples import SHARD


class Roles:
    def __init__(self) -> None:
        self.asked = 0

    def figures(self) -> list[ShardFigures]:
        self.asked += 1
        return [SHARD]

    def usage(self) -> list[Usage]:
        return [Usage("a:1", "a", 0.1 * self.asked, 1, 64)]


def said(seconds: float, phase: Phase, trainer: int = 0, **total_s: float) -> TrainerStatus:
    stages = {name: StageSummary(int(seconds * 10), s * 1e6, 1.0, 2.0, 3.0, 4.0) for name, s in total_s.items()}
    return TrainerStatus(trainer, seconds, int(seconds), phase, stages, {"feed_queue_empty": 1})


@pytest.fixture
def observe(make_plan: Callable[..., Plan]) -> tuple[Callable[..., None], list[StatusReport]]:
    """Tell an observer, that has seen the start, events; what it has published."""
    published, roles = list[Event](), Roles()
    observer = Observer(make_plan(), published.append)
    observer.see(Started(1, 2, 2, 3, ["CPU"]), cast(Any, roles))

    def tell(*events: Event) -> None:
        for event in events:
            observer.see(event, cast(Any, roles))

    return tell, cast("list[StatusReport]", published)


Observe = tuple[Callable[..., None], list[StatusReport]]


def test_a_report_has_everything(observe: Observe) -> None:
    tell, reports = observe
    other = said(9.0, "going", trainer=1, TrainStep=3.0)
    tell(other, said(10.0, "going", TrainStep=9.9))
    (report,) = reports
    assert (report.seconds, report.step, report.counters) == (10.0, 10, {"feed_queue_empty": 1})
    assert report.shards == [SHARD]
    assert report.usage[0].process == "a:1"
    assert report.others == [other]
    assert report.verdict is not None
    assert report.verdict.bound_by == "TrainStep"
    assert report.is_news


def test_only_a_verdict_that_names_something_else_is_news(observe: Observe) -> None:
    tell, reports = observe
    tell(said(10.0, "going", TrainStep=9.9), said(20.0, "going", TrainStep=19.8))
    waited = {"TrainerWait": 8.0, "TrainerWaitForRead": 8.0, "HubWait": 8.0}
    tell(said(30.0, "going", TrainStep=21.0, **waited), said(40.0, "ended", TrainStep=21.0, **waited))
    assert [report.verdict and report.verdict.bound_by for report in reports] == [
        "TrainStep", "TrainStep", "DecodePartition", "DecodePartition"
    ]  # fmt: skip
    assert [report.is_news for report in reports] == [True, False, True, True], "the last one is news in any case"


def test_the_last_verdict_is_that_of_the_training_without_its_first_steps_and_its_evaluation(observe: Observe) -> None:
    tell, reports = observe
    slow_start = {"TrainerWait": 50.0, "TrainerWaitForPermit": 50.0}
    tell(
        said(60.0, "warm", TrainStep=5.0, **slow_start), said(70.0, "trained", TrainStep=14.8, **slow_start),
        said(500.0, "ended", TrainStep=14.8, TrainerWait=400.0, TrainerWaitForPermit=50.0, TrainerWaitForRead=350.0),
    )  # fmt: skip
    (report,) = reports
    assert report.seconds == 500.0
    assert report.verdict is not None
    assert report.verdict.bound_by == "TrainStep"
    assert "it took 98% of the time" in report.verdict.evidence


def test_a_run_that_ends_with_its_first_steps_is_judged_by_them(observe: Observe) -> None:
    tell, reports = observe
    tell(*(said(10.0, phase, TrainStep=9.5) for phase in ("warm", "trained", "ended")))
    (report,) = reports
    assert report.verdict is not None
    assert report.verdict.bound_by == "TrainStep"


def test_before_the_start_nothing_is_asked(make_plan: Callable[..., Plan]) -> None:
    published, roles = list[Event](), Roles()
    observer = Observer(make_plan(), published.append)
    observer.see(said(1.0, "going", TrainStep=0.5), cast(Any, roles))
    assert (published, roles.asked) == ([], 0)

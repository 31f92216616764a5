"""`Observer`: puts together what the trainers say of themselves and what shards and processes answer when asked, and judges it.

Called by the thread that watches the run: `see` with every event. What becomes of the reports is the subscribers' business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from flowps.cluster.plan import Plan
from flowps.status.event import Event, Started, StatusReport, TrainerStatus
from flowps.status.figures import Moment, Setup, ShardFigures, Usage
from flowps.status.verdict import Verdict, judge


class Roles(Protocol):
    """What an observer uses of a run's roles."""

    def figures(self) -> list[ShardFigures]:
        """Of every shard."""

    def usage(self) -> list[Usage]:
        """Of every process, the first trainer's first."""


class Observer:
    """Of one attempt of a run. `publish`: told every report."""

    def __init__(self, plan: Plan, publish: Callable[[Event], None]) -> None:
        self._plan, self._publish = plan, publish
        self._setup: Setup | None = None
        self._start = self._first = self._before = Moment(0.0, {})
        self._others: dict[int, TrainerStatus] = {}
        self._verdict: Verdict | None = None

    def see(self, event: Event, roles: Roles) -> None:
        """Take notice of an event; publish a report when the first trainer has said what it measures."""
        if isinstance(event, Started):
            assignment = self._plan.assignment
            self._setup = Setup(
                event.hub_threads, event.tasks_in_flight, event.feed_threads, event.in_flight, len(assignment.shards),
                not assignment.is_one_process,
                event.multiplies_bfloat16 and self._plan.config.trainer.precision == "float32",
            )  # fmt: skip
            self._start = self._first = self._before = Moment(0.0, {}, roles.figures(), roles.usage())
        if not isinstance(event, TrainerStatus):
            return
        if event.trainer:
            self._others[event.trainer] = event
            return
        if self._setup is None:
            return
        now = Moment(event.seconds, event.stages, roles.figures(), roles.usage())
        known = self._verdict
        if event.phase == "warm":
            self._first = self._before = now
            return
        if event.phase == "going":
            self._verdict = judge(self._before, now, self._setup)
        elif event.phase == "trained":
            # Of a run that ends with its first steps: better of those than none.
            self._verdict = judge(self._first, now, self._setup) or judge(self._start, now, self._setup)
            return
        news = event.phase == "ended" or _name(self._verdict) != _name(known)
        self._before = now
        self._publish(
            StatusReport(
                event.seconds, event.step, event.stages, event.counters, now.shards, now.usage, list(self._others.values()),
                self._verdict, news,
            )
        )  # fmt: skip


def _name(verdict: Verdict | None) -> tuple[str, int | None] | None:
    return None if verdict is None else (verdict.bound_by, verdict.shard)

"""Scoring files with a trained run: start the shards with its rows and the scorers, follow them, collect what they return.

Covers what evaluation and prediction have in common. What is scored by whom, and what becomes of it, they say themselves.
"""

from __future__ import annotations

import math
import queue
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import distributed

from flowps.cluster.plan import Plan
from flowps.cluster.resume import Resume
from flowps.cluster.roles import Roles
from flowps.cluster.score_role import ScoreTask, Sink, score
from flowps.cluster.watch import WATCH_S
from flowps.errors import LostRoleError, StoppedError
from flowps.hub.partition import Partition
from flowps.hub.stream import ReadSpec
from flowps.status.event import Event, Scored, from_wire

_POLL_S = 0.2  # how long an interrupt may wait to be seen
_MOST_LOSSES = 3  # of workers, one after the other
_STOP_S = 60.0  # for a batch to be scored
_SAID_S = 10.0  # between two words of progress


@dataclass(frozen=True)
class Share:
    """What one scorer is to do: its partitions, and what makes the sink of their predictions."""

    partitions: tuple[Partition, ...]
    sink: Callable[[], AbstractContextManager[Sink]]


@dataclass(frozen=True)
class Scoring:
    """What is scored, and with what.

    model      the run's dense model, for one that nobody can build by name
    plan       for the workers that are there now: where shards and scorers are to be; called anew after a loss
    shares     for so many scorers; called anew after a loss: what is done is not to be done again
    """

    resume: Resume
    model: str
    read: ReadSpec
    plan: Callable[[], Plan]
    shares: Callable[[int], list[Share]]


def run_scoring(
    client: distributed.Client, scoring: Scoring, say: Callable[[str], None], interrupted: Callable[[], bool]
) -> list[Any]:
    """What the sinks have returned. When a worker is lost it is begun again. Raises what a role raised, StoppedError at a stop."""
    losses = 0
    while True:
        planned = scoring.plan()
        try:
            return _attempt(client, planned, scoring, say, interrupted)
        except LostRoleError as error:
            losses += 1
            if losses > _MOST_LOSSES or not planned.config.cluster.has_processes or interrupted():
                raise
            say(f"{error}; what was not finished is scored again")


def _attempt(
    client: distributed.Client, planned: Plan, scoring: Scoring, say: Callable[[str], None], interrupted: Callable[[], bool]
) -> list[Any]:
    run_id, events = f"flowps-{uuid.uuid4().hex[:12]}", queue.SimpleQueue[Event]()
    shares = [share for share in scoring.shares(planned.config.trainer.count) if share.partitions]
    total = sum(partition.num_rows for share in shares for partition in share.partitions)
    client.subscribe_topic(run_id, lambda event: events.put(from_wire(event[1])))
    roles = Roles(client, planned, run_id, say)
    try:
        addresses = roles.start_shards(scoring.resume)
        for number, share in enumerate(shares):
            task = ScoreTask(
                run_id, number, addresses, roles.token, share.partitions, scoring.read, share.sink, scoring.resume.url,
                scoring.resume.state, scoring.model,
            )  # fmt: skip
            roles.start_trainer(score, task)
        _follow(roles, events, _Told(total, say), interrupted)
        return [scorer.result() for scorer in roles.trainers]
    finally:
        roles.stop()
        client.unsubscribe_topic(run_id)
        roles.close()


class _Told:
    """Says now and then how far scoring is."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say = total, say
        self._samples: dict[int, int] = {}
        self._told = time.monotonic()
        self._first: tuple[float, int] | None = None  # when something was heard first, and how much had been scored

    def see(self, event: Event) -> None:
        """Take notice of an event."""
        if not isinstance(event, Scored):
            return
        self._samples[event.scorer] = event.samples
        now = time.monotonic()
        if self._first is None:
            self._first = now, event.samples
        if now - self._told >= _SAID_S:
            self._told, done = now, sum(self._samples.values())
            seconds, before = now - self._first[0], self._first[1]
            rate = f" ({(done - before) / seconds:,.0f} examples/sec)" if seconds > 0 else ""
            self._say(f"scored {done:,} of {self._total:,} samples{rate}")


def _follow(roles: Roles, events: queue.SimpleQueue[Event], told: _Told, interrupted: Callable[[], bool]) -> None:
    """Until all scorers have ended. Raises the error of the first that has failed by itself.

    And StoppedError when they were asked to stop and one of them does not: Dask may have lost its task.
    """
    asked_at, watched = math.inf, time.monotonic()
    while not all(scorer.done() for scorer in roles.trainers):
        if interrupted() and asked_at == math.inf:
            asked_at = time.monotonic()
            roles.request_stop()
        if time.monotonic() - asked_at > _STOP_S:
            raise StoppedError(f"stopped by a signal; a scorer has not ended within {_STOP_S:.0f} s")
        if time.monotonic() - watched >= WATCH_S:
            roles.check()
            watched = time.monotonic()
        if any(scorer.status in ("error", "cancelled", "lost") for scorer in roles.trainers):
            break
        try:
            told.see(events.get(timeout=_POLL_S))
        except queue.Empty:
            continue
    if any(scorer.status != "finished" for scorer in roles.trainers):
        roles.raise_first()

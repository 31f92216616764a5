"""A run from plan to run directory: start the roles, pass their events on, stop them when asked, collect what they leave."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import distributed

from flowps.cluster import roles
from flowps.cluster.plan import Plan
from flowps.cluster.run_dir import RunDir
from flowps.errors import FlowpsError, RunDirError
from flowps.ps.table import TableStats
from flowps.status.event import Event, Finished, Metrics, from_wire

_POLL_S = 0.2  # how long an interrupt may wait to be seen
_STOP_S = 60.0  # for a step to end and the model to be saved
_LAST_EVENT_S = 30.0  # events travel beside the result; the last one may come after it


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    finished: Finished
    test: Metrics | None
    rows: int
    tables: tuple[TableStats, ...] = ()

    def summary(self, plan: Plan) -> dict[str, object]:
        """The content of summary.json."""
        return {
            "examples_per_epoch": plan.train_rows,
            "rows": self.rows,
            "tables": self.tables,
            "best_auc": plan.best_auc,
            "finished": self.finished,
            "test": self.test,
        }


def run(
    client: distributed.Client,
    plan: Plan,
    run_dir: RunDir,
    subscribers: Sequence[Callable[[Event], None]],
    interrupted: Callable[[], bool],
) -> Result:
    """Train on `client`. Every event goes to every subscriber, on the calling thread.

    `interrupted` is asked a few times a second; once it says True the trainer stops after its step, and what was trained is saved.
    Raises what a role or a subscriber raised, after saving the rows, unless nothing was trained or the model has given NaN.
    """
    run_id = f"flowps-{uuid.uuid4().hex[:12]}"
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    client.subscribe_topic(run_id, lambda event: events.put(from_wire(event[1])))
    shards: list[Any] = []
    trainer = None
    try:
        for k in range(len(plan.placement.shards)):
            shards.append(client.submit(roles.ShardActor, run_id, plan, k, actor=True, pure=False).result())
        trainer = client.submit(roles.train, run_id, plan, str(run_dir.model), pure=False, retries=0)
        try:
            _follow(client, run_id, trainer, events, subscribers, interrupted)
            finished, test = trainer.result()
        except BaseException as error:
            _stop(client, run_id, trainer)
            saved = _rescue(shards, run_dir, model_failed=isinstance(error, RunDirError))
            if saved and isinstance(error, FlowpsError):
                raise type(error)(f"{error}; {saved}") from error
            raise
        tables = tuple(stats for actor in shards for stats in actor.stats().result())
        return Result(finished, test, _export(shards, run_dir), tables)
    finally:
        if trainer is not None:
            _stop(client, run_id, trainer)
        client.unsubscribe_topic(run_id)
        for actor in shards:
            with suppress(Exception):  # the error that ends the run is the one to show
                actor.close().result()


def _stop(client: distributed.Client, run_id: str, trainer: distributed.Future) -> None:
    """End a trainer that still runs, because a subscriber has failed: nothing may be taken from under it."""
    if not trainer.done():
        client.run(roles.request_stop, run_id)
        with suppress(TimeoutError):  # it is stuck: the error that ended the run matters more
            distributed.wait(trainer, timeout=_STOP_S)


def _rescue(shards: Sequence[Any], run_dir: RunDir, model_failed: bool) -> str:
    """Save the rows of a run that has failed; in words, what is left of it.

    "" if the trainer has left no model, because there was nothing to save; but not if it could not be written (`model_failed`): the
    rows may well be.
    """
    has_model = run_dir.model.exists()
    if not has_model and not model_failed:
        return ""
    try:
        rows = _export(shards, run_dir)
    except FlowpsError as error:
        return f"of what was trained before only the dense model is in {run_dir.path}: {error}" if has_model else ""
    if not rows and not has_model:
        return ""
    return f"what was trained before, {rows:,} rows {'and the' if has_model else 'without the'} dense model, is in {run_dir.path}"


def _export(shards: Sequence[Any], run_dir: RunDir) -> int:
    return sum(actor.export(str(run_dir.embeddings)).result() for actor in shards)


def _follow(
    client: distributed.Client, run_id: str, trainer: distributed.Future, events: queue.SimpleQueue[Event],
    subscribers: Sequence[Callable[[Event], None]], interrupted: Callable[[], bool],
) -> None:  # fmt: skip
    """Pass events on until the trainer's last one, or until it has failed."""
    asked = False
    while True:
        if interrupted() and not asked:
            asked = True
            client.run(roles.request_stop, run_id)
        done = trainer.done()
        failed = trainer.status in ("error", "cancelled", "lost")
        try:
            event = events.get(timeout=_LAST_EVENT_S if done and not failed else _POLL_S)
        except queue.Empty:
            if failed:
                return
            if done:
                raise FlowpsError(f"the trainer ended, but its last event did not arrive within {_LAST_EVENT_S:.0f} s") from None
            continue
        for subscriber in subscribers:
            subscriber(event)
        if isinstance(event, Finished):
            return

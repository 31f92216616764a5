"""A run from plan to run directory: start the roles, pass their events on, stop them when asked, collect what they leave."""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import distributed
import msgspec

from flowps.checkpoint.ledger import Ledger
from flowps.checkpoint.manifest import best, chain
from flowps.checkpoint.store import Store
from flowps.cluster.observer import Observer
from flowps.cluster.plan import Plan
from flowps.cluster.resume import Resume
from flowps.cluster.roles import Roles
from flowps.cluster.run_dir import RunDir
from flowps.cluster.saver import Saver
from flowps.cluster.shard_report import PlacementReport, ShardReport
from flowps.cluster.trainer_role import Trained
from flowps.cluster.watch import WATCH_S
from flowps.errors import CheckpointError, FlowpsError, LostRoleError, RunDirError
from flowps.ps.placement import describe, predict, shares
from flowps.ps.shard import ShardWork
from flowps.ps.table import TableStats
from flowps.status.event import AtCut, Evaluated, Event, Finished, Metrics, Progress, Remark, Started, TrainerStatus, from_wire

WORSE = "trained after the best evaluation"  # why the ledger says that samples were dropped

_POLL_S = 0.2  # how long an interrupt may wait to be seen
_WRITING_S = 0.02  # between two looks at whether a checkpoint is written
_LAST_EVENT_S = 30.0  # events travel beside the result; the last one may come after it
_MOST_LOSSES = 3  # one after the other without a checkpoint between: going back again would not help


@dataclass(frozen=True)
class Result:
    """What a run came to.

    test         of the first label; `more`: of every other, by its name
    checkpoint   the name of the one that has what it ended with; "": there is none
    run_dir      where its files are
    """

    finished: Finished
    test: Metrics | None
    rows: int
    placement: PlacementReport
    ledger: Ledger
    tables: tuple[TableStats, ...] = ()
    checkpoint: str = ""
    run_dir: str = ""
    more: dict[str, Metrics] = field(default_factory=dict)

    def summary(self, plan: Plan) -> dict[str, object]:
        """The content of summary.json."""
        return {
            "examples_per_epoch": plan.train_rows,
            "rows": self.rows,
            "tables": self.tables,
            "best_auc": plan.best_auc,
            "finished": self.finished,
            "ledger": self.ledger,
            "test": self.test,
            "more": self.more,
            "checkpoint": self.checkpoint,
        }


@dataclass(frozen=True)
class Start:
    """Where a run begins and what it does after a loss.

    saves_to   folder of the checkpoints; "": there are none
    resume     the checkpoint to begin with; None: at the beginning
    again      waits for the workers that are needed to go on from a checkpoint and plans anew; None: a loss ends the run
    replace    waits for workers for the shards that are lost: the plan with them; None: all roles go back when a shard is lost
    """

    saves_to: str = ""
    resume: Resume | None = None
    again: Callable[[Resume | None], Plan] | None = None
    replace: Callable[[Plan, Sequence[int]], Plan] | None = None


def run(
    client: distributed.Client,
    plan: Plan,
    run_dir: RunDir,
    subscribers: Sequence[Callable[[Event], None]],
    interrupted: Callable[[], bool],
    start: Start = Start(),
) -> Result:
    """Train on `client`. Every event goes to every subscriber, on the calling thread.

    `interrupted` is asked a few times a second; once it says True the trainers stop after their step, and what was trained is
    saved. When a shard or trainer is lost, all go back to the newest checkpoint, or, with `start.replace`, the shard alone. When a
    later evaluation was no better than an earlier one, all end as they were at that. Raises what a role or a subscriber raised,
    after saving the rows, unless nothing was trained or the model has given NaN.
    """
    result = _attempts(client, plan, run_dir, subscribers, interrupted, start)
    if not result.finished.goes_back_to:
        return result
    best = _best_of([start.saves_to, *([] if start.resume is None else [start.resume.url])], result.finished)
    _publish(Remark(f"the best evaluation was at {_where(best)}: the run ends with its rows and weights"), subscribers)
    ledger = _without(result.ledger, best.ledger)
    plan = plan if start.again is None else start.again(best)
    saves_to = start.saves_to
    start = replace(start, saves_to="", resume=best, replace=None)
    again = _attempts(client, plan, run_dir, subscribers, interrupted, start, result.finished)
    there = again.placement.loads
    loads = {name: msgspec.structs.replace(load, rows=there[name].rows) for name, load in result.placement.loads.items()}
    placement = msgspec.structs.replace(result.placement, loads=loads)
    where = best.last.name if best.url == saves_to else f"{best.url}/{best.last.name}"
    run_dir.place(placement)
    return replace(again, ledger=ledger, placement=placement, tables=result.tables, checkpoint=where)


def _attempts(
    client: distributed.Client, plan: Plan, run_dir: RunDir, subscribers: Sequence[Callable[[Event], None]],
    interrupted: Callable[[], bool], start: Start, trained: Finished | None = None,
) -> Result:  # fmt: skip
    """See `run`. `trained`: how training has ended, of a run that has only its end left: the test, and what it leaves."""
    resume, losses = start.resume, 0
    ledger = Ledger() if resume is None else resume.ledger
    while True:
        attempt = _Attempt(client, plan, run_dir, subscribers, interrupted, start, trained)
        try:
            return attempt.run(resume, ledger, goes_back=start.again is not None and losses < _MOST_LOSSES)
        except LostRoleError as error:
            losses = 0 if attempt.newest is not None else losses + 1
            if start.again is None or losses > _MOST_LOSSES or interrupted():
                raise
            resume = attempt.newest or resume
            ledger = Ledger() if resume is None else resume.ledger
            if trained is None:
                ledger = ledger.go_back(max(0, attempt.examples - ledger.trained) + attempt.replayed - ledger.replayed)
            _publish(Remark(f"{error}; all roles go back to {_where(resume)}"), subscribers)
            plan = start.again(resume)


class _Attempt:
    """A run from its beginning, or a checkpoint, until it has ended or lost a role."""

    def __init__(
        self, client: distributed.Client, plan: Plan, run_dir: RunDir, subscribers: Sequence[Callable[[Event], None]],
        interrupted: Callable[[], bool], start: Start, trained: Finished | None,
    ) -> None:  # fmt: skip
        self._trained = trained
        self._more: dict[str, Metrics] = {}  # of the test, of every label but the first
        self._client, self._plan, self._run_dir, self._subscribers = client, plan, run_dir, subscribers
        self._interrupted, self._saves_to, self._replace = interrupted, start.saves_to, start.replace
        self._losses: dict[str, int] = {}  # by the checkpoint that a shard went back to
        self._run_id = f"flowps-{uuid.uuid4().hex[:12]}"
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._saver: Saver | None = None
        self.examples = self.replayed = 0
        """Trained by the model as it was last heard of, and read again before that."""

    @property
    def newest(self) -> Resume | None:
        """The newest checkpoint of this attempt."""
        return None if self._saver is None else self._saver.newest

    def run(self, resume: Resume | None, ledger: Ledger, goes_back: bool) -> Result:
        """Start the roles, follow them, collect what they leave. `goes_back`: whether another attempt follows a loss."""
        plan, run_dir = self._plan, self._run_dir
        self.examples, self.replayed = ledger.trained, ledger.replayed
        self._client.subscribe_topic(self._run_id, lambda event: self._events.put(from_wire(event[1])))
        report = expected(plan)
        run_dir.place(report)
        roles = Roles(self._client, plan, self._run_id, lambda text: self._publish(Remark(text)))
        self._saver = saver = Saver(plan, self._saves_to, self._run_id, ledger, self._publish)
        self._observer = Observer(plan, self._publish)
        try:
            roles.start(str(run_dir.model), self._saves_to, resume, ledger, trains=self._trained is None)
            try:
                self._follow(roles, saver, resume)
                trained = roles.trained()
            except BaseException as error:
                roles.stop()
                if isinstance(error, LostRoleError) and goes_back:
                    raise
                saved = _rescue(roles, run_dir, model_failed=isinstance(error, RunDirError))
                if saved and isinstance(error, FlowpsError):
                    raise type(error)(f"{error}; {saved}") from error
                raise
            if plan.config.trace and self._trained is None:
                self._publish(Remark(roles.trace(Path(plan.config.trace).absolute())))
            run_dir.check_model()
            tables = tuple(stats for of_shard in roles.ask_shards("stats") for stats in of_shard)
            work = roles.ask_shards("work")  # before the export, which takes time too
            rows = {} if trained.finished.goes_back_to else _export(roles, run_dir)
            report = _measured(expected(self._plan), self._plan, work, trained, rows)
            run_dir.place(report)
            checkpoint = saver.newest.last.name if saver.newest is not None else ""
            finished = self._trained or trained.finished
            return Result(
                finished, trained.test, sum(rows.values()), report, saver.ledger, tables, checkpoint, more=self._more
            )  # fmt: skip
        finally:
            roles.stop()
            self._client.unsubscribe_topic(self._run_id)
            roles.close()

    def _follow(self, roles: Roles, saver: Saver, begun: Resume | None) -> None:
        """Pass events on until the trainers' last one, and the last checkpoint is written, or until a trainer has failed."""
        looked = _Looked(time.monotonic())
        while not looked.finished or saver.is_writing:
            try:
                self._look(looked, roles, saver)
            except LostRoleError as error:
                if self._replace is None or not error.shards or saver.is_at_end or self._interrupted():
                    raise
                self._bring_back(error, roles, saver, saver.newest or begun)

    def _look(self, looked: _Looked, roles: Roles, saver: Saver) -> None:
        """See what has changed, for a moment at most."""
        if self._interrupted() and not looked.asked:
            looked.asked = True
            roles.request_stop()
        if time.monotonic() - looked.watched >= WATCH_S:
            roles.check()
            looked.watched = time.monotonic()
        saver.tick(roles)
        done = all(trainer.done() for trainer in roles.trainers)
        failed = [trainer for trainer in roles.trainers if trainer.status in ("error", "cancelled", "lost")]
        lacks = done and not failed and not looked.finished and not saver.is_writing
        try:
            event = self._events.get(timeout=_LAST_EVENT_S if lacks else _WRITING_S if saver.is_writing else _POLL_S)
        except queue.Empty:
            if failed:
                roles.raise_first()
            if lacks:
                raise FlowpsError(f"the trainer ended, but its last event did not arrive within {_LAST_EVENT_S:.0f} s") from None
            return
        if isinstance(event, Progress | AtCut):
            self.examples = max(self.examples, event.examples)
        if isinstance(event, Evaluated) and event.data == "test":
            self._more = event.more
        if isinstance(event, Finished):
            looked.finished = True
            if event.goes_back_to:  # it ends when it has
                return
            event = self._trained or event
        if self._trained is not None and isinstance(event, Started | TrainerStatus):
            return  # of a trainer that has not trained
        self._publish(event)
        saver.see(event, roles)
        self._observer.see(event, roles)

    def _bring_back(self, error: LostRoleError, roles: Roles, saver: Saver, resume: Resume | None) -> None:
        """Start the shards that were lost anew, as at a checkpoint, while the trainers wait. Raises `error` if they cannot."""
        assert self._replace is not None
        saver.give_up()
        where = _where(resume)
        self._losses[where] = self._losses.get(where, 0) + 1
        if self._losses[where] > _MOST_LOSSES or not roles.lose(error.shards):
            raise error
        names = [f"shard {k}" for k in error.shards]
        go = "goes" if len(names) == 1 else "go"
        self._publish(Remark(f"{error}; {' and '.join(names)} {go} back to {where} alone"))
        self._plan = self._replace(self._plan, error.shards)
        for name, samples in zip(names, roles.replace(error.shards, self._plan, resume), strict=True):
            saver.come_back(name, samples)
            self._publish(Remark(f"{name} is back; its rows have not learned {samples:,} of the samples trained since {where}"))

    def _publish(self, event: Event) -> None:
        _publish(event, self._subscribers)


@dataclass
class _Looked:
    """What was seen and done so far while following the roles.

    watched   when workers were looked at, seconds of the monotonic clock
    asked     whether the trainers were asked to stop
    finished  whether their last event has come
    """

    watched: float
    asked: bool = False
    finished: bool = False


def _best_of(urls: Sequence[str], finished: Finished) -> Resume:
    """The checkpoint that the run is to end with, of its folder or that where it began. Raises CheckpointError if it has gone."""
    for url in urls:
        store = Store(url)
        manifest = best(store, finished.goes_back_to)
        if manifest is not None:
            return Resume(url, tuple(chain(store, manifest)))
    raise CheckpointError(
        f"{', '.join(dict.fromkeys(urls))}: the best evaluation was at step {finished.goes_back_to:,}, but there is no checkpoint "
        "of it; the run directory has the dense model that training ended with, its last checkpoint the rows too"
    )


def _without(ended: Ledger, best: Ledger) -> Ledger:
    """The ledger of a run that ends as it was at `best`: what was trained since then is dropped."""
    since = {WORSE: ended.trained - best.trained + ended.dropped.get(WORSE, 0)}
    return msgspec.structs.replace(ended, trained=best.trained, dropped={**ended.dropped, **since})


def _where(resume: Resume | None) -> str:
    """Where roles that go back to it go back to, in words."""
    return f"step {resume.last.step:,}" if resume is not None and resume.goes_on else "the beginning"


def expected(plan: Plan) -> PlacementReport:
    """The placement, and the load that is expected of each shard."""
    slots = plan.schema.slots
    wire = not plan.assignment.is_one_process
    loads = predict(plan.placement, slots, plan.forecast.loads, wire=wire) if plan.forecast else [None] * len(plan.placement.shards)
    shards = [
        ShardReport(offer.name, describe(pieces, slots), load)
        for offer, pieces, load in zip(plan.assignment.shards, plan.placement.shards, loads, strict=True)
    ]
    return PlacementReport(plan.forecast.source if plan.forecast else "one shard has everything", shards)


def _rescue(roles: Roles, run_dir: RunDir, model_failed: bool) -> str:
    """Save the rows of a run that has failed; in words, what is left of it.

    "" if the trainer has left no model, because there was nothing to save; but not if it could not be written (`model_failed`): the
    rows may well be.
    """
    has_model = run_dir.model.exists()
    if not has_model and not model_failed:
        return ""
    try:
        rows = sum(_export(roles, run_dir).values())
    except Exception as error:  # a shard may be what has failed; the error that ended the run is the one to raise
        why = f": {error}" if isinstance(error, RunDirError) else ""
        return f"of what was trained before only the dense model is in {run_dir.path}{why}" if has_model else ""
    if not rows and not has_model:
        return ""
    return f"what was trained before, {rows:,} rows {'and the' if has_model else 'without the'} dense model, is in {run_dir.path}"


def _export(roles: Roles, run_dir: RunDir) -> dict[str, int]:
    """Save all rows; how many each slot has."""
    found: dict[str, int] = {}
    for of_shard in roles.ask_shards("export", str(run_dir.embeddings)):
        for slot, rows in of_shard.items():
            found[slot] = found.get(slot, 0) + rows
    return found


def _measured(
    report: PlacementReport, plan: Plan, work: Sequence[ShardWork], trained: Trained, rows: dict[str, int]
) -> PlacementReport:  # fmt: skip
    """The report with what the run has measured."""
    found = shares([(w.signs, w.rows, w.bytes, w.busy_s) for w in work])
    shards = [msgspec.structs.replace(shard, measured=load) for shard, load in zip(report.shards, found, strict=True)]
    loads = {
        slot.name: msgspec.structs.replace(load, rows=rows.get(slot.name, 0))
        for slot, load in zip(plan.schema.slots, trained.loads, strict=True)
    }
    return msgspec.structs.replace(report, shards=shards, loads=loads)


def _publish(event: Event, subscribers: Sequence[Callable[[Event], None]]) -> None:
    for subscriber in subscribers:
        subscriber(event)

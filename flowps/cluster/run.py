"""A run from plan to run directory: start the roles, pass their events on, stop them when asked, collect what they leave."""

from __future__ import annotations

import queue
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import distributed
import msgspec

from flowps.cluster.offer import TRAINER_KEY, Offer, workers_now
from flowps.cluster.plan import Plan
from flowps.cluster.run_dir import RunDir
from flowps.cluster.shard_report import PlacementReport, ShardReport
from flowps.cluster.shard_role import ShardActor
from flowps.cluster.trainer_role import Handout, Trained, TrainerTask, request_stop, reserve_port, train
from flowps.errors import ClusterError, FlowpsError, RunDirError, StoppedError
from flowps.ps.placement import describe, predict, shares
from flowps.ps.shard import ShardWork
from flowps.ps.table import TableStats
from flowps.status.event import Event, Finished, Metrics, Remark, from_wire

_POLL_S = 0.2  # how long an interrupt may wait to be seen
_STOP_S = 60.0  # for a step to end and the model to be saved
_LAST_EVENT_S = 30.0  # events travel beside the result; the last one may come after it
_WATCH_S = 2.0  # between two looks at whether the workers are still there


_CANCELLED = FlowpsError("a trainer was cancelled by somebody else on the cluster")


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    finished: Finished
    test: Metrics | None
    rows: int
    placement: PlacementReport
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

    `interrupted` is asked a few times a second; once it says True the trainers stop after their step, and what was trained is
    saved. Raises what a role or a subscriber raised, after saving the rows, unless nothing was trained or the model has given NaN.
    """
    run_id = f"flowps-{uuid.uuid4().hex[:12]}"
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    client.subscribe_topic(run_id, lambda event: events.put(from_wire(event[1])))
    report = expected(plan)
    run_dir.place(report)
    roles = _Roles(client, plan, run_id, lambda text: _publish(Remark(text), subscribers))
    try:
        roles.start(str(run_dir.model))
        try:
            _follow(roles, events, subscribers, interrupted)
            trained = roles.trained()
        except BaseException as error:
            roles.stop()
            saved = _rescue(roles, run_dir, model_failed=isinstance(error, RunDirError))
            if saved and isinstance(error, FlowpsError):
                raise type(error)(f"{error}; {saved}") from error
            raise
        run_dir.check_model()
        tables = tuple(stats for of_shard in roles.ask_shards("stats") for stats in of_shard)
        work = roles.ask_shards("work")  # before the export, which takes time too
        rows = _export(roles, run_dir)
        report = _measured(report, plan, work, trained, rows)
        run_dir.place(report)
        return Result(trained.finished, trained.test, sum(rows.values()), report, tables)
    finally:
        roles.stop()
        client.unsubscribe_topic(run_id)
        roles.close()


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


class _Roles:
    """The roles of a run on their workers."""

    def __init__(self, client: distributed.Client, plan: Plan, run_id: str, remark: Callable[[str], None]) -> None:
        self._client, self._plan, self._run_id, self._remark = client, plan, run_id, remark
        self._address = client.scheduler.address
        self._shards: list[Any] = []
        self.trainers: list[distributed.Future] = []
        self._handout: Any = None
        self._unread_since: float | None = None  # when it was seen first that partitions wait and nobody is there to read them

    def start(self, model_path: str) -> None:
        """Create the shards, serve them where a trainer is in another process, and start the trainers."""
        plan, token = self._plan, secrets.token_hex(32)
        created = [
            self._submit(ShardActor, self._run_id, plan, k, offer=offer, actor=True)
            for k, offer in enumerate(plan.assignment.shards)
        ]
        for future in created:
            self._shards.append(self._wait(future))
        served = not plan.assignment.is_one_process
        addresses = self.ask_shards("serve", token) if served else [""] * len(self._shards)
        peers, handout = self._group() if plan.config.trainer.count > 1 else ([], None)
        for number, offer in enumerate(plan.assignment.trainers):
            task = TrainerTask(self._run_id, number, addresses, token, model_path, peers, handout)
            self.trainers.append(
                self._submit(train, task, plan, offer=offer, retries=0, key=f"{TRAINER_KEY}{self._run_id}-{number}")
            )

    def _group(self) -> tuple[list[str], Any]:
        """Where the trainers wait for each other, and who gives them partitions."""
        trainers = self._plan.assignment.trainers
        ports = self._client.run(reserve_port, workers=[offer.address for offer in trainers])
        peers = [f"[{o.host}]:{ports[o.address]}" if ":" in o.host else f"{o.host}:{ports[o.address]}" for o in trainers]
        self._handout = self._wait(self._submit(Handout, offer=trainers[0], actor=True))  # lives as long as this refers to it
        return peers, self._handout

    def ask_shards(self, method: str, *arguments: object) -> list[Any]:
        """Call a method of all shards' actors at once; their answers in order."""
        asked = [getattr(shard, method)(*arguments) for shard in self._shards]
        return [self._wait(answer) for answer in asked]

    def trained(self) -> Trained:
        """What the first trainer has returned, who speaks for all, once all have ended. Raises what any of them has raised."""
        while distributed.wait(self.trainers, timeout=_STOP_S).not_done:
            self.check()
        if any(trainer.status == "error" for trainer in self.trainers):
            self.raise_first()
        return self.trainers[0].result()

    def check(self) -> None:
        """Raise ClusterError when a worker that holds a shard or a trainer has gone, or when nobody reads any more."""
        there = self._there()
        if not there:
            raise ClusterError(f"the scheduler at {self._address} does not answer any more, or has lost all its workers")
        for what, offers in (("shard", self._plan.assignment.shards), ("trainer", self._plan.assignment.trainers)):
            for k, offer in enumerate(offers):
                if offer.address not in there:
                    raise ClusterError(
                        f"worker {offer.name} at {offer.address} was lost, and {what} {k} with it: look into its log; was it "
                        "killed for its memory?"
                    )
        self._check_hubs(there)

    def _check_hubs(self, there: Mapping[str, Mapping[str, Any]]) -> None:
        """Say so when partitions wait and no worker may read them; give up when none has come within cluster.wait_s."""
        if self._plan.assignment.may_read(there) or not self._waits_for_hub():
            self._unread_since = None
            return
        wait_s, now = self._plan.config.cluster.wait_s, time.monotonic()
        if self._unread_since is None:
            self._unread_since = now
            self._remark(
                f"all workers that offer HUB are gone: waiting up to {wait_s:g} s for one to read on; start a worker with "
                "--resources HUB=2"
            )
        elif now - self._unread_since >= wait_s:
            raise ClusterError(
                f"all workers that offer HUB are gone, and none has come within {wait_s:g} s: look into their logs, start one with "
                "--resources HUB=2, or let the run wait longer with cluster.wait_s"
            )

    def _waits_for_hub(self) -> bool:
        """Whether a hub task waits for a worker that may run it."""
        # A lambda goes there whole: the scheduler's machine needs no flowps.
        waiting: bool = self._client.run_on_scheduler(
            lambda dask_scheduler: any("HUB" in (task.resource_restrictions or ()) for task in dask_scheduler.unrunnable)
        )
        return waiting

    def request_stop(self, failed: bool = False) -> None:
        """Ask all trainers to stop after their step; if a role has `failed`, without waiting for each other."""
        there = self._there()
        workers = [offer.address for offer in self._plan.assignment.trainers if offer.address in there]
        if workers:
            self._client.run(request_stop, self._run_id, failed, workers=workers)

    def _there(self) -> Mapping[str, Mapping[str, Any]]:
        """The workers that the scheduler still has; none, where it does not answer."""
        if self._client.status != "running":  # Dask would wait for it to come back
            return {}
        try:
            return workers_now(self._client, timeout_s=_STOP_S)
        except (OSError, TimeoutError, RuntimeError):  # Dask's errors of a connection that is lost, or was given up
            return {}

    def raise_first(self) -> None:
        """Raise the error of the trainer that has failed by itself, not because of another."""
        self.check()
        errors = [trainer.exception() for trainer in self.trainers if trainer.status == "error"]
        raise next((e for e in errors if not isinstance(e, StoppedError | ClusterError)), errors[0] if errors else _CANCELLED)

    def stop(self) -> None:
        """End trainers that still run, because something else has failed: nothing may be taken from under them."""
        there = self._there()
        trainers = zip(self.trainers, self._plan.assignment.trainers, strict=False)
        running = [trainer for trainer, offer in trainers if not trainer.done() and offer.address in there]
        if running:
            for shard in self._shards:
                with suppress(Exception):  # it may be what has failed
                    shard.release().result(timeout=_WATCH_S)
            self.request_stop(failed=True)
            with suppress(TimeoutError):  # one is stuck: the error that ended the run matters more
                distributed.wait(running, timeout=_STOP_S)

    def close(self) -> None:
        """Give the shards' memory back."""
        for shard in self._shards:
            with suppress(Exception):  # the error that ends the run is the one to show
                shard.close().result(timeout=_STOP_S)

    def _submit(self, function: Callable[..., object], *arguments: object, offer: Offer, **how: Any) -> distributed.Future:
        return self._client.submit(function, *arguments, workers=[offer.address], allow_other_workers=False, pure=False, **how)

    def _wait(self, future: Any) -> Any:
        """The result of something that runs on a worker, as long as all workers are there."""
        while True:
            try:
                return future.result(timeout=_WATCH_S)
            except TimeoutError:
                self.check()


def _rescue(roles: _Roles, run_dir: RunDir, model_failed: bool) -> str:
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


def _export(roles: _Roles, run_dir: RunDir) -> dict[str, int]:
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


def _follow(
    roles: _Roles, events: queue.SimpleQueue[Event], subscribers: Sequence[Callable[[Event], None]],
    interrupted: Callable[[], bool],
) -> None:  # fmt: skip
    """Pass events on until the trainers' last one, or until one has failed."""
    asked, watched = False, time.monotonic()
    while True:
        if interrupted() and not asked:
            asked = True
            roles.request_stop()
        if time.monotonic() - watched >= _WATCH_S:
            roles.check()
            watched = time.monotonic()
        done = all(trainer.done() for trainer in roles.trainers)
        failed = [trainer for trainer in roles.trainers if trainer.status in ("error", "cancelled", "lost")]
        try:
            event = events.get(timeout=_LAST_EVENT_S if done and not failed else _POLL_S)
        except queue.Empty:
            if failed:
                roles.raise_first()
            if done:
                raise FlowpsError(f"the trainer ended, but its last event did not arrive within {_LAST_EVENT_S:.0f} s") from None
            continue
        _publish(event, subscribers)
        if isinstance(event, Finished):
            return


def _publish(event: Event, subscribers: Sequence[Callable[[Event], None]]) -> None:
    for subscriber in subscribers:
        subscriber(event)

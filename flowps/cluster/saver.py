"""`Saver`: the command's side of checkpoints. When all trainers are at a cut it has the shards copied, lets training go on, and
publishes the manifest once everything is on disk. It keeps the ledger.

Called by the thread that watches the run: `see` with every event, `tick` a few times a second. Does not decide when a cut is due
(trainers do) or what is lost (`run`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from flowps.checkpoint.file import FileEntry
from flowps.checkpoint.ledger import Ledger, Taken
from flowps.checkpoint.manifest import Manifest, ShardPart, prune, publish
from flowps.checkpoint.store import Store
from flowps.cluster.cut import checkpoint_name
from flowps.cluster.plan import Plan
from flowps.cluster.resume import Resume, settings_of
from flowps.cluster.shard_role import SaveTask
from flowps.errors import CheckpointError
from flowps.status.event import AtCut, Event, Remark, Saved, TrainerWritten

NEGATIVES = "negatives"  # why the ledger says that samples were dropped: data.negative_rate


class Roles(Protocol):
    """What a saver uses of a run's roles."""

    def ask_shards(self, method: str, *arguments: object) -> list[Any]:
        """Call a method of all shards' actors at once; their answers in order."""

    def go_on(self, step: int) -> None:
        """Let the trainers go on after their cut."""


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    at: AtCut
    ledger: Ledger
    is_full: bool
    began: float
    pause_s: float
    shards: list[ShardPart | None]
    trainer: list[FileEntry] = field(default_factory=list)


class Saver:
    """Of one attempt of a run: from its start, or a checkpoint, until it ends or loses a role.

    url      folder of the checkpoints; "": there are none, only the ledger is kept
    ledger   at the beginning
    publish  told every event that comes of it
    """

    def __init__(self, plan: Plan, url: str, run_id: str, ledger: Ledger, publish_event: Callable[[Event], None]) -> None:
        self._plan, self._url, self._run_id, self._publish = plan, url, run_id, publish_event
        self._knobs = plan.config.checkpoint
        self._store = Store(url) if url else None
        self._first = self._ledger = ledger
        self._at: dict[int, AtCut] = {}
        self._written: dict[int, TrainerWritten] = {}
        self._pending: _Pending | None = None
        self._deferred: dict[int, AtCut] | None = None  # the last cut, while the checkpoint before it is being written
        self._newest: list[Manifest] = []  # of this attempt, from the last full one on
        self._count = 0
        self.is_at_end = False
        """Whether the trainers have come to their last cut."""

    @property
    def ledger(self) -> Ledger:
        """At the last cut."""
        return self._ledger

    @property
    def newest(self) -> Resume | None:
        """The newest checkpoint that this attempt has written."""
        return Resume(self._url, tuple(self._newest)) if self._newest else None

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is not finished, or not begun."""
        return self._pending is not None or self._deferred is not None

    def see(self, event: Event, roles: Roles) -> None:
        """Take notice of an event; at a cut of all trainers, have everything copied."""
        if isinstance(event, TrainerWritten):
            self._written[event.step] = event
        if not isinstance(event, AtCut):
            return
        self._at[event.trainer] = event
        if len(self._at) < self._plan.config.trainer.count:
            return
        at, self._at = self._at, {}
        self.is_at_end = at[0].last
        if self._store is None:
            self._ledger = self._ledger_at(at)
        elif self._pending is None:
            self._cut(at, roles)
        elif at[0].last or at[0].is_best:
            self._deferred = at  # the trainers wait
        else:
            self._say(f"no checkpoint after step {at[0].step}: the one before is still being written")
            roles.go_on(at[0].step)

    def tick(self, roles: Roles) -> None:
        """Publish what has been written, and begin what had to wait for it."""
        pending = self._pending
        if pending is None:
            if self._deferred is not None:
                at, self._deferred = self._deferred, None
                self._cut(at, roles)
            return
        try:
            if None in pending.shards:
                found = roles.ask_shards("saved")
                pending.shards = [old if new is None else new for new, old in zip(found, pending.shards, strict=True)]
            written = self._written.pop(pending.at.step, None)
            if written is not None and written.error:
                raise CheckpointError(written.error)
            if written is not None:
                pending.trainer = [msgspec.convert(file, FileEntry) for file in written.files]
            if None not in pending.shards and pending.trainer:
                self._pending = None
                self._complete(pending)
        except CheckpointError as error:
            self._pending = None
            self._failed(error)

    def give_up(self) -> None:
        """A shard was lost: what is being written will not come to an end, and the next one must be a full one."""
        self._pending, self._count = None, 0

    def come_back(self, shard: str, samples: int) -> None:
        """A shard has come back without what it has learned of so many samples."""
        self._ledger = self._ledger.come_back(shard, samples)

    def _cut(self, at: Mapping[int, AtCut], roles: Roles) -> None:
        self._ledger = self._ledger_at(at)
        try:
            # Else the run has ended right after a cut. That of a best evaluation is another one: the trainer's state has more.
            if not self._newest or self._newest[-1].step != at[0].step or at[0].is_best:
                self._copy(at[0], roles)
        except CheckpointError as error:
            self._failed(error)
        finally:
            roles.go_on(at[0].step)

    def _ledger_at(self, at: Mapping[int, AtCut]) -> Ledger:
        """What is trained now. Counted twice, by what trainers have been given and by what of the partitions is trained."""
        first, before = at[0], self._ledger
        trained = first.examples - before.trained
        read = sum(of.read for of in at.values()) + self._first.read - before.read
        negatives = (
            sum(of.left_out for of in at.values()) + self._first.dropped.get(NEGATIVES, 0) - before.dropped.get(NEGATIVES, 0)
        )
        taken = [Taken(*of) for trainer in at.values() for of in trainer.taken]
        if first.epoch > before.epoch:
            rows = self._plan.train_rows
            ended = before.ended + rows * (first.epoch - before.epoch)
            before = msgspec.structs.replace(before, epoch=first.epoch, ended=ended, done=[])
        # What was looked up for a step that did not come, at a stop of several trainers, is read again when the run goes on.
        left = read - trained - negatives if first.last else 0
        return before.advance(read - left, trained, taken, {NEGATIVES: negatives} if negatives else {}).go_back(left)

    def _copy(self, at: AtCut, roles: Roles) -> None:
        began = time.perf_counter()
        is_full = not self._newest or self._count % self._knobs.full_every == 0
        since = None if is_full else self._newest[-1].step
        name = checkpoint_name(self._run_id, at.step, at.is_best)
        task = SaveTask(self._url, name, at.step, since, self._knobs.copy_mib << 20)
        roles.ask_shards("save", task)
        shards: list[ShardPart | None] = [None] * len(self._plan.placement.shards)
        self._pending = _Pending(at, self._ledger, is_full, began, time.perf_counter() - began, shards)

    def _complete(self, pending: _Pending) -> None:
        assert self._store is not None
        at, shards = pending.at, [part for part in pending.shards if part is not None]
        seconds = time.perf_counter() - pending.began
        manifest = Manifest(
            name=checkpoint_name(self._run_id, at.step, at.is_best), step=at.step, epoch=at.epoch, created=time.time(),
            base="" if pending.is_full else self._newest[-1].name, schema=self._plan.schema.to_json(),
            settings={**settings_of(self._plan.config), "capacity_rows": list(self._plan.capacity_rows)}, shards=shards,
            trainer=pending.trainer, is_best=at.is_best, ledger=msgspec.to_builtins(pending.ledger),
            rows=sum(int(state["rows"]) for part in shards for state in part.states), seconds=seconds,
        )  # fmt: skip
        publish(self._store, manifest)
        self._newest = [manifest] if pending.is_full else [*self._newest, manifest]
        self._count += 1
        kind, size = "full" if pending.is_full else "delta", sum(file.size_bytes for file in manifest.files())
        self._publish(Saved(manifest.name, at.step, kind, manifest.rows, size, pending.pause_s, seconds))
        prune(self._store, self._knobs.keep, [m.name for m in self._newest])

    def _failed(self, error: CheckpointError) -> None:
        """Go on without, where that is allowed; the next one is a full one."""
        self._pending, self._count = None, 0
        if self._knobs.on_error == "stop":
            raise error
        self._say(f"no checkpoint: {error}")

    def _say(self, text: str) -> None:
        self._publish(Remark(text))

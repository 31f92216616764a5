"""What runs on workers: a shard as a Dask actor, the trainer as one long-running task.

Here the rooms meet: the trainer is given the hub's streams and the shards' client. In one process the client calls the shards
directly; the actor only creates, saves and reports its shard.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import distributed

from flowps.cluster.plan import Plan
from flowps.errors import FlowpsError, RunDirError
from flowps.hub.partition import epoch_order
from flowps.hub.stream import HubStream
from flowps.ps.client import PsClient
from flowps.ps.export import export_rows
from flowps.ps.shard import Shard
from flowps.ps.table import TableStats
from flowps.status.event import Event, Finished, Metrics, Started, to_wire
from flowps.status.run_status import RunStatus

if TYPE_CHECKING:  # importing it imports TensorFlow, which only a process with a trainer does
    from flowps.trainer.loop import Trainer

# What of each run lives in this process. Written by actors and the trainer task, read by the trainer task and `request_stop`.
_shards: dict[tuple[str, int], Shard] = {}
_stops: dict[str, threading.Event] = {}


class ShardActor:
    """Shard `number` of the plan, as a Dask actor."""

    def __init__(self, run_id: str, plan: Plan, number: int) -> None:
        self._key = (run_id, number)
        slots = plan.placement.shards[number]
        self._shard: Shard | None = Shard(
            [plan.schema.slots[s] for s in slots],
            [plan.capacity_rows[s] for s in slots],
            plan.config.seed,
            plan.config.trainer.in_flight,
            plan.config.ps.threads,
            [plan.allocate[s] for s in slots],
        )
        _shards[self._key] = self._shard

    def export(self, folder: str) -> int:
        """Write the shard's rows as Parquet, one file per slot, and return their number."""
        if self._shard is None:
            raise FlowpsError("the shard was closed: its rows are gone")
        try:
            return export_rows(self._shard.rows(), Path(folder))
        except OSError as error:
            raise RunDirError(f"{folder}: the rows cannot be written: {error.strerror or error}") from None

    def stats(self) -> list[TableStats]:
        """What each table has done and holds."""
        return [] if self._shard is None else self._shard.stats()

    def close(self) -> None:
        """Give the memory back."""
        if self._shard is not None:
            self._shard.close()
        self._shard = None
        _shards.pop(self._key, None)


def request_stop(run_id: str) -> None:
    """Ask the trainer of a run in this process to stop after its current step. Run on the trainer's worker."""
    _stops.setdefault(run_id, threading.Event()).set()


def train(run_id: str, plan: Plan, model_path: str) -> tuple[Finished, Metrics | None]:
    """The trainer's task: train, evaluate, save the dense model. Events go to the Dask topic `run_id`."""
    try:
        return _train(run_id, plan, model_path)
    except Exception:
        raise
    except BaseException as error:  # it would take the Dask worker down, and nobody would hear of it
        raise FlowpsError(f"the trainer was ended by {type(error).__name__}: {error}; does your model call sys.exit?") from error


def _train(run_id: str, plan: Plan, model_path: str) -> tuple[Finished, Metrics | None]:
    # Seceding frees the thread for hub tasks: this one waits for them.
    distributed.secede()
    # TensorFlow only where a trainer runs.
    from flowps.trainer.loop import Surroundings, Trainer
    from flowps.trainer.models import ModelSpec

    worker, client, status = distributed.get_worker(), distributed.get_client(), RunStatus()

    def stream(epoch: int, training: bool) -> HubStream:
        parts = epoch_order(plan.train, plan.config.seed, epoch, plan.config.data.shuffle) if training else plan.test
        return HubStream(client, parts, plan.read_spec(training), epoch, plan.tasks_in_flight, status)

    def emit(event: Event) -> None:
        worker.log_event(run_id, to_wire(event))

    slots = plan.schema.slots
    max_lens = [slot.max_len if slot.pooling == "none" else 0 for slot in slots]
    spec = ModelSpec.of(
        [s.name for s in slots], [s.dim for s in slots], len(plan.schema.dense), plan.config.net.hidden, max_lens
    )  # fmt: skip
    with _shard_client(run_id, plan) as shards, _stop_flag(run_id) as stop:
        around = Surroundings(
            train=lambda epoch: stream(epoch, True), test=(lambda: stream(0, False)) if plan.test else None,
            lookup=shards.lookup, push=shards.push, emit=emit, status=status, stop=stop,
        )  # fmt: skip
        trainer = Trainer(spec, plan.config, around)
        emit(Started(trainer.feed_threads, plan.config.trainer.in_flight, plan.hub_threads, plan.tasks_in_flight, trainer.devices))
        try:
            trained = trainer.run()
        except BaseException:
            # What was learned before is not lost with the run. The error that ended it is the one to show.
            if trainer.is_worth_saving:
                with suppress(RunDirError):
                    _save(trainer, model_path)
            raise
    _save(trainer, model_path)
    return trained.finished, trained.test


def _save(trainer: Trainer, path: str) -> None:
    """Whole or not at all."""
    unfinished = Path(path).with_suffix(".unfinished.keras")  # Keras goes by the ending
    try:
        trainer.model.save(unfinished)
        unfinished.rename(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise RunDirError(f"{path}: the dense model cannot be written: {error.strerror or error}") from None


@contextmanager
def _shard_client(run_id: str, plan: Plan) -> Iterator[PsClient]:
    keys = [(run_id, k) for k in range(len(plan.placement.shards))]
    missing = [k for k in keys if k not in _shards]
    if missing:
        raise FlowpsError(f"shard {missing[0][1]} is not in the trainer's process; the embedded mode keeps all roles in one")
    client = PsClient([_shards[k] for k in keys], plan.placement)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def _stop_flag(run_id: str) -> Iterator[threading.Event]:
    flag = _stops.setdefault(run_id, threading.Event())
    try:
        yield flag
    finally:
        _stops.pop(run_id, None)

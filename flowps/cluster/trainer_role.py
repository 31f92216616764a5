"""What runs where a trainer is: one long-running Dask task.

Here the rooms meet: the trainer is given the hub's streams and a client of the shards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import distributed

from flowps.cluster.plan import Plan
from flowps.cluster.shard_role import security_of, shard_here, signature
from flowps.errors import FlowpsError, RunDirError
from flowps.hub.partition import epoch_order
from flowps.hub.stream import HubStream
from flowps.ps.client import PsClient
from flowps.ps.endpoint import Endpoint
from flowps.ps.load import SlotLoad
from flowps.ps.shard import Shard
from flowps.ps.wire.remote import RemoteShard
from flowps.status.event import Event, Finished, Metrics, Started, to_wire
from flowps.status.run_status import RunStatus

if TYPE_CHECKING:  # importing it imports TensorFlow, which only a process with a trainer does
    from flowps.trainer.loop import Trainer

# The runs with a trainer in this process, and whether they are to stop.
_stops: dict[str, threading.Event] = {}


@dataclass(frozen=True)
class Trained:
    """What a trainer's task returns. `loads`: of every slot, rows not counted."""

    finished: Finished
    test: Metrics | None
    loads: list[SlotLoad]


def request_stop(run_id: str) -> None:
    """Ask the trainer of a run in this process to stop after its current step. Run on the trainer's worker."""
    _stops.setdefault(run_id, threading.Event()).set()


def train(run_id: str, plan: Plan, number: int, addresses: list[str], token: str, model_path: str) -> Trained:
    """The task of trainer `number`: train, evaluate, save the dense model. Events go to the Dask topic `run_id`.

    addresses   where each shard is served; "" for one that is not
    """
    try:
        return _train(run_id, plan, number, addresses, token, model_path)
    except Exception:
        raise
    except BaseException as error:  # it would take the Dask worker down, and nobody would hear of it
        raise FlowpsError(f"the trainer was ended by {type(error).__name__}: {error}; does your model call sys.exit?") from error


def _train(run_id: str, plan: Plan, number: int, addresses: list[str], token: str, model_path: str) -> Trained:
    # Seceding frees the thread for hub tasks: this one waits for them.
    distributed.secede()
    # TensorFlow only where a trainer runs.
    from flowps.trainer.loop import Surroundings, Trainer
    from flowps.trainer.models import ModelSpec

    worker, client, status = distributed.get_worker(), distributed.get_client(), RunStatus()

    def stream(epoch: int, training: bool) -> HubStream:
        parts = epoch_order(plan.train, plan.config.seed, epoch, plan.config.data.shuffle) if training else plan.test
        return HubStream(client, parts, plan.read_spec(training), epoch, plan.tasks_in_flight, status, plan.assignment.hub_placing)

    def emit(event: Event) -> None:
        worker.log_event(run_id, to_wire(event))

    slots = plan.schema.slots
    max_lens = [slot.max_len if slot.pooling == "none" else 0 for slot in slots]
    spec = ModelSpec.of(
        [s.name for s in slots], [s.dim for s in slots], len(plan.schema.dense), plan.config.net.hidden, max_lens
    )  # fmt: skip
    with _shard_client(run_id, plan, addresses, token, status) as shards, _stop_flag(run_id) as stop:
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
    return Trained(trained.finished, trained.test, shards.meter.loads([0] * len(slots)))


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
def _shard_client(run_id: str, plan: Plan, addresses: list[str], token: str, status: RunStatus) -> Iterator[PsClient]:
    """A client of all shards, each reached by the shortest way there is."""
    cluster, slots = plan.config.cluster, plan.schema.slots
    with ExitStack() as opened:
        shards: list[Shard | Endpoint] = []
        for k, pieces in enumerate(plan.placement.shards):
            here = shard_here(run_id, k)
            if here is not None:
                shards.append(here)
                continue
            if not addresses[k]:
                raise FlowpsError(f"shard {k} is not in the trainer's process, and is not served to others")
            remote = RemoteShard(
                addresses[k], k, run_id, signature(plan, k), security_of(plan.config, token), half=cluster.wire == "float16",
                max_message_bytes=cluster.max_message_mib << 20, timeout_s=cluster.rpc_timeout_s, count=status.count,
            )  # fmt: skip
            opened.callback(remote.close)
            if pieces:
                remote.connect(cluster.connect_timeout_s)
            shards.append(remote)
        client = PsClient(shards, plan.placement, slots, status)
        opened.callback(client.close)
        yield client


@contextmanager
def _stop_flag(run_id: str) -> Iterator[threading.Event]:
    flag = _stops.setdefault(run_id, threading.Event())
    try:
        yield flag
    finally:
        _stops.pop(run_id, None)

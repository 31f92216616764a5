"""What runs where a trainer is: one long-running Dask task.

Here the rooms meet: the trainer is given the hub's streams and a client of the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distributed

from flowps.checkpoint.file import FileEntry
from flowps.checkpoint.ledger import Ledger
from flowps.checkpoint.store import Store
from flowps.cluster.cut import TrainerCuts, gate_of
from flowps.cluster.long_task import stop_flag, watched, way_out
from flowps.cluster.plan import Plan
from flowps.cluster.prometheus import serve_here, tell_ledger
from flowps.cluster.resume import left_of
from flowps.cluster.role_status import status_of
from flowps.cluster.shard_client import shard_client
from flowps.cluster.shard_role import alone
from flowps.config import Net
from flowps.errors import FlowpsError, RunDirError
from flowps.hub.partition import Partition, epoch_order
from flowps.hub.schema import Schema
from flowps.hub.stream import HubStream
from flowps.ps.load import SlotLoad
from flowps.ps.numbering import batch_id
from flowps.status.event import Event, Finished, Metrics, Started, TrainerStatus, to_wire

if TYPE_CHECKING:  # importing it imports TensorFlow, which only a process with a trainer does
    from flowps.trainer.group import Group
    from flowps.trainer.loop import Trainer
    from flowps.trainer.models import ModelSpec
    from flowps.trainer.state import Cut


@dataclass(frozen=True)
class Trained:
    """What a trainer's task returns. `loads`: of every slot, rows not counted."""

    finished: Finished
    test: Metrics | None
    loads: list[SlotLoad]


class Handout:
    """Gives the partitions of each epoch to the trainers, one at a time, to whoever asks next. A Dask actor beside trainer 0."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}

    def take(self, epoch: int) -> int:
        """The place, in the epoch's order, of the next partition that nobody has."""
        place = self._next.get(epoch, 0)
        # The slowest trainer may still ask in the epoch before.
        self._next = {**{e: n for e, n in self._next.items() if e >= epoch - 1}, epoch: place + 1}
        return place


@dataclass(frozen=True)
class TrainerTask:
    """What trainer `number` is told.

    addresses  where each shard is served; "" for one that is not
    token      that shards want to see
    peers      where the trainers wait for each other, host:port; empty for one alone
    handout    who gives out partitions; None for one alone
    saves_to   folder of the checkpoints; "": there are none
    state      where this run begins: the file of a trainer's state in that folder's store `state_in`; None: at the beginning
    is_warm    whether only the dense weights are taken from it, as far as they fit
    ledger     what was trained until there
    trains     whether anything is to be trained: otherwise only the test is left
    """

    run_id: str
    number: int
    addresses: list[str]
    token: str
    model_path: str
    peers: list[str] = field(default_factory=list)
    handout: Any = None
    saves_to: str = ""
    state_in: str = ""
    state: FileEntry | None = None
    is_warm: bool = False
    ledger: Ledger | None = None
    trains: bool = True


def reserve_port() -> int:
    """Runs on a trainer's worker: a port for its group."""
    from flowps.trainer.group import hold_port

    return hold_port()


def train(task: TrainerTask, plan: Plan) -> Trained:
    """Train, evaluate, save the dense model. Trainer 0 speaks for all: its events go to the Dask topic `run_id`."""
    try:
        return _train(task, plan)
    except Exception as error:
        raise alone(error) from None
    except BaseException as error:  # it would take the Dask worker down, and nobody would hear of it
        raise FlowpsError(f"the trainer was ended by {type(error).__name__}: {error}; does your model call sys.exit?") from error


def _train(task: TrainerTask, plan: Plan) -> Trained:
    # Seceding frees the thread for hub tasks: this one waits for them.
    distributed.secede()
    # TensorFlow only where a trainer runs.
    from flowps.trainer.loop import Trainer
    from flowps.trainer.setup import devices, multiplies_bfloat16
    from flowps.trainer.state import State
    from flowps.trainer.surroundings import Surroundings

    worker, client, status = (
        distributed.get_worker(),
        distributed.get_client(),
        status_of(plan.config, task.run_id, f"trainer-{task.number}"),
    )
    number, speaks = task.number, task.number == 0
    serve_here()
    if speaks:
        tell_ledger(task.run_id, task.ledger, worker.log_event)

    def stream(parts: Iterable[Partition], epoch: int, training: bool) -> HubStream:
        return HubStream(
            client, parts, plan.read_spec(training), epoch, plan.tasks_in_flight, status, plan.assignment.hub_placing,
            fetch_ahead=not plan.assignment.is_read_here,
        )  # fmt: skip

    def leave_by(leave: Callable[[], None]) -> None:
        way_out(task.run_id, leave)

    def send(event: Event) -> None:
        worker.log_event(task.run_id, to_wire(event))

    def emit(event: Event) -> None:
        if speaks or isinstance(event, TrainerStatus):
            send(event)

    def evaluation(parts: Sequence[Partition]) -> Callable[[], HubStream] | None:
        own = parts[number :: plan.config.trainer.count]
        return (lambda: stream(own, 0, training=False)) if parts else None

    spec = model_spec(plan.schema, plan.config.net)
    with (
        stop_flag(task.run_id) as stop,
        shard_client(task.run_id, task.addresses, task.token, plan, status, leave_by) as (shards, ways),
        _group(task, plan) as group, ExitStack() as opened,
    ):  # fmt: skip
        leave_by(gate_of(task.run_id).give_up)
        opened.enter_context(watched(worker, task.run_id))
        cuts = opened.enter_context(
            TrainerCuts(task.run_id, number, task.saves_to, send, lambda path: trainer.model.save_weights(path))
        )

        def cut(cut: Cut) -> None:
            ways.cut(cut.step)
            cuts.cut(cut)

        state = None if task.state is None else State.of_bytes(Store(task.state_in).get(task.state))
        around = Surroundings(
            train=lambda epoch: stream(cuts.follow(_own_partitions(task, plan, epoch)), epoch, training=True),
            test=evaluation(plan.test), valid=evaluation(plan.valid), trains=task.trains, build=plan.build,
            lookup=lambda ticket, batch, training: shards.lookup(batch_id(number, ticket), batch, training),
            find=lambda ticket, batch: shards.find(batch_id(number, ticket), batch),
            push=lambda ticket, gradient, scale: shards.push(batch_id(number, ticket), gradient, scale),
            emit=emit, status=status, stop=stop, group=group,
            attend=lambda ticket: shards.attend(batch_id(number, ticket)) if plan.steps_together else None,
            give_up=lambda ticket: shards.forget(batch_id(number, ticket)) if plan.steps_together else None,
            # Where they step together, giving up has done it.
            forget=lambda ticket: None if plan.steps_together else shards.forget(batch_id(number, ticket)),
            cut=cut,
            resume=None if state is None or task.is_warm else state,
            warm_start=state.arrays if state is not None and task.is_warm else None,
        )  # fmt: skip
        trainer = Trainer(spec, plan.config, around)
        chosen = trainer.feed_threads, plan.config.trainer.in_flight, plan.hub_threads, plan.tasks_in_flight
        emit(Started(*chosen, devices(), multiplies_bfloat16()))
        try:
            trained = trainer.run()
        except BaseException:
            # What was learned before is not lost with the run. The error that ended it is the one to show.
            if speaks and trainer.is_worth_saving:
                with suppress(RunDirError):
                    _save(trainer, task.model_path)
            raise
    if speaks:
        _save(trainer, task.model_path)
    return Trained(trained.finished, trained.test, shards.meter.loads([0] * len(plan.schema.slots)))


def model_spec(schema: Schema, net: Net) -> ModelSpec:
    """What a model of these columns is built from."""
    from flowps.trainer.models import ModelSpec

    slots = schema.slots
    max_lens = [slot.max_len if slot.pooling == "none" else 0 for slot in slots]
    return ModelSpec.of(
        [s.name for s in slots], [s.dim for s in slots], len(schema.dense), None, max_lens,
        net=net, labels=schema.labels, dense_names=schema.dense,
    )  # fmt: skip


def _own_partitions(task: TrainerTask, plan: Plan, epoch: int) -> Iterator[Partition]:
    """The partitions that this trainer reads in an epoch: all, or whichever it is given when it asks for the next."""
    order = epoch_order(plan.train, plan.config.seed, epoch, plan.config.data.shuffle)
    if task.ledger is not None and epoch == task.ledger.epoch:
        order = list(left_of(order, task.ledger))
    if task.handout is None:
        yield from order
        return
    while (place := task.handout.take(epoch).result()) < len(order):
        yield order[place]


@contextmanager
def _group(task: TrainerTask, plan: Plan) -> Iterator[Group | None]:
    if not task.peers:
        yield None
        return
    from flowps.trainer.group import Group

    group = Group(task.peers, task.number, plan.config.cluster.collective_timeout_s)
    way_out(task.run_id, group.abort)
    yield group


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

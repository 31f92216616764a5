"""What runs where samples are scored: one long-running Dask task, as a trainer's, that looks up and predicts and changes nothing.

It reads its partitions in order, each from its own first sample, so that what is scored does not depend on who else scores. What
becomes of the predictions is a sink's business.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import distributed
import numpy as np
import pyarrow as pa

from flowps.batch import Batch, Float32
from flowps.checkpoint.file import FileEntry
from flowps.checkpoint.store import Store
from flowps.cluster.long_task import stop_flag, watched, way_out
from flowps.cluster.plan import Plan
from flowps.cluster.prometheus import serve_here
from flowps.cluster.role_status import status_of
from flowps.cluster.shard_client import shard_client
from flowps.cluster.shard_role import alone
from flowps.cluster.trainer_role import model_spec
from flowps.errors import FlowpsError, StoppedError
from flowps.hub.partition import Partition
from flowps.hub.stream import PartitionBatches, PartitionStream, ReadSpec
from flowps.ps.numbering import batch_id
from flowps.status.event import Scored, to_wire

if TYPE_CHECKING:  # importing it imports TensorFlow
    from flowps.trainer.forward import Forward
    from flowps.trainer.models import ModelSpec

_TOLD_S = 0.5  # between two words of how far it is


class Sink(Protocol):
    """Where predictions go. Called by one thread."""

    def take(self, partition: Partition, columns: pa.Table | None, labels: Float32, logits: Float32) -> None:
        """All samples of a partition, in the order of its file: labels and logits [n], or [n, labels]; `columns` as asked for."""

    def result(self) -> Any:
        """After the last partition: what is sent to the command."""


@dataclass(frozen=True)
class ScoreTask:
    """What scorer `number` is told.

    addresses   where each shard is served; "" for one that is not
    token       that shards want to see
    partitions  to score
    read        how they are read
    sink        makes the sink, which is left, with an error or without, before the task ends
    url, state  the file of the dense weights, in the store of checkpoints `url`
    model       the run's dense model, for one that nobody can build by name
    """

    run_id: str
    number: int
    addresses: list[str]
    token: str
    partitions: tuple[Partition, ...]
    read: ReadSpec
    sink: Callable[[], AbstractContextManager[Sink]]
    url: str
    state: FileEntry
    model: str


def score(task: ScoreTask, plan: Plan) -> Any:
    """Score the task's partitions; what its sink makes of them. Says how far it is on the Dask topic `run_id`."""
    try:
        return _score(task, plan)
    except Exception as error:
        raise alone(error) from None
    except BaseException as error:  # it would take the Dask worker down, and nobody would hear of it
        raise FlowpsError(f"the scorer was ended by {type(error).__name__}: {error}; does your model call sys.exit?") from error


def _score(task: ScoreTask, plan: Plan) -> Any:
    distributed.secede()  # frees the thread for hub tasks: this one waits for them
    # TensorFlow only where it is needed.
    from flowps.trainer.feed import FeedQueue, default_feed_threads
    from flowps.trainer.score import scored

    worker, client = distributed.get_worker(), distributed.get_client()
    status = status_of(plan.config, task.run_id, f"scorer-{task.number}")
    serve_here()
    spec, knobs = model_spec(plan.schema, plan.config.net), plan.config.trainer

    def leave_by(leave: Callable[[], None]) -> None:
        way_out(task.run_id, leave)

    with (
        stop_flag(task.run_id) as stop,
        shard_client(task.run_id, task.addresses, task.token, plan, status, leave_by) as (shards, _),
        watched(worker, task.run_id),
        task.sink() as sink,
    ):
        forward = _forward(task, plan, spec)
        order = [(partition, 0) for partition in task.partitions]
        parts = PartitionStream(
            client, order, task.read, 0, plan.tasks_in_flight, status, plan.assignment.hub_placing,
            fetch_ahead=not plan.assignment.is_read_here,
        )  # fmt: skip
        stream = _Batches(parts, task.partitions)
        feeds = FeedQueue(
            stream, lambda ticket, batch: shards.lookup(batch_id(task.number, ticket), batch, False),
            width=spec.width, dense_width=spec.dense_width, permits=knobs.in_flight,
            threads=knobs.feed_threads or default_feed_threads(knobs.in_flight), first_ticket=0, stop=stop, status=status,
            stage=forward.stage, starving=False,
        )  # fmt: skip
        labels: list[Float32] = []
        logits: list[Float32] = []
        samples, told = 0, time.monotonic()
        for batch, found in scored(feeds, stream, forward, status):
            labels.append(batch.labels)
            logits.append(found)
            samples += batch.size
            partition, columns = stream.begun[0]
            if sum(map(len, labels)) == partition.num_rows:
                stream.begun.popleft()
                sink.take(partition, columns, np.concatenate(labels), np.concatenate(logits))
                labels, logits = [], []
            if time.monotonic() - told >= _TOLD_S:
                told = time.monotonic()
                worker.log_event(task.run_id, to_wire(Scored(task.number, samples)))
        if stop.is_set():
            raise StoppedError("scoring samples: the run was asked to stop")
        return sink.result()


class _Batches:
    """The batches of partitions, one by one. Read by one feed thread at a time; `begun` is also the scorer's, at its other end."""

    def __init__(self, parts: PartitionStream, order: tuple[Partition, ...]) -> None:
        self._parts, self._order = parts, iter(order)
        self._ready: deque[Batch] = deque()
        self.begun: deque[tuple[Partition, pa.Table | None]] = deque()
        """Partitions of which a batch was read, in order, with the columns that were brought along."""

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Batch:
        while not self._ready:
            part: PartitionBatches = next(self._parts)
            self.begun.append((next(self._order), part.columns))
            self._ready.extend(part.batches)
        return self._ready.popleft()

    def close(self) -> None:
        """See PartitionStream."""
        self._parts.close()


def _forward(task: ScoreTask, plan: Plan, spec: ModelSpec) -> Forward:
    """The dense model as it was at the checkpoint."""
    from flowps.trainer.forward import Forward
    from flowps.trainer.models import build_or_read
    from flowps.trainer.setup import prepare_tensorflow
    from flowps.trainer.state import State

    config = plan.config
    prepare_tensorflow(config)
    model = build_or_read(config.model, Path(task.model), spec, config.trainer.precision)
    forward = Forward(model, spec, config.trainer.jit_compile, config.data.negative_rate)
    forward.restore(State.of_bytes(Store(task.url).get(task.state)).part("step/"))
    return forward

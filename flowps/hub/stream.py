"""Partitions → what tasks have read of them, in order and bounded, each partition a Dask task; and → a stream of batches.

Covers submitting, order, back-pressure and stitching at partition borders. Decoding is done by `read_partition` in the task.
Dask recomputes what a lost worker had; nothing of that is rewritten here.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import distributed
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flowps.batch import Batch
from flowps.errors import ClusterError, StoppedError
from flowps.hub.decode import Columns, Dense, cut, decode
from flowps.hub.partition import Partition, read_table
from flowps.hub.schema import Schema, check_same
from flowps.status.run_status import RunStatus
from flowps.version import __version__


@dataclass(frozen=True)
class ReadSpec:
    """What every hub task of a run needs to know.

    shuffle        the samples of a partition, in every epoch anew
    negative_rate  share of the samples with label 0 that are kept
    labelled       whether the files have labels that are wanted
    columns        that are brought along as they are
    """

    schema: Schema
    dense: Dense
    batch_size: int
    shuffle: bool
    seed: int
    negative_rate: float = 1.0
    labelled: bool = True
    columns: tuple[str, ...] = ()
    version: str = __version__

    @property
    def read(self) -> list[str]:
        """The columns that are read."""
        used = self.schema.columns if self.labelled else self.schema.features
        return list(dict.fromkeys([*used, *self.columns]))

    @property
    def strings(self) -> set[str]:
        """Those whose strings are only hashed."""
        types = self.schema.types
        return {s.name for s in self.schema.slots if types[s.name] in (pa.string(), pa.large_string())} - set(self.columns)


@dataclass(frozen=True)
class PartitionBatches:
    """What a hub task gives back.

    `batches` in order: the first one completes the batch that the partitions before left open, all others are whole, and the
    last one may be the beginning of a batch that the next partitions complete. `began` and `ended`: the task's own time, by the
    Unix clock of `worker`, its process; `thread`: in which it ran. `columns`: those that were asked for, in the batches' order.
    """

    batches: list[Batch]
    began: float
    ended: float
    worker: str
    thread: int = 0
    columns: pa.Table | None = None


def read_partition(partition: Partition, spec: ReadSpec, epoch: int, open_rows: int) -> PartitionBatches:
    """The hub task: read, decode, shuffle and cut one partition. `open_rows` rows of the current batch have come before it."""
    began = time.time()
    if spec.version != __version__:  # of a worker that has joined after the run began
        raise ClusterError(
            f"a hub worker has flowps {__version__}, the run flowps {spec.version}: install the same version on all machines"
        )
    strings = spec.strings
    table = read_table(partition, spec.read, strings)
    # Strings of either width come as dictionaries of the narrow one.
    as_listed = {f.name for f in table.schema if f.name in strings and pa.types.is_dictionary(f.type)}
    found = {f.name: spec.schema.types[f.name] if f.name in as_listed else f.type for f in table.schema}
    check_same(spec.schema.types, found, [n for n in spec.read if n in spec.schema.types], partition.url, "the files as listed")
    columns = decode(table, spec.schema, spec.dense, partition.url, partition.first_row, spec.labelled)
    order, key = None, [spec.seed, epoch, partition.first_row, *partition.url.rsplit("/", 1)[-1].encode()]
    if spec.shuffle:
        order = np.random.default_rng(key).permutation(partition.num_rows)
    if partition.skip:
        order = (np.arange(partition.num_rows) if order is None else order)[partition.skip :]
    left = partition.rows_left
    first = min((spec.batch_size - open_rows) % spec.batch_size, left)
    bounds = [*([0] if first else []), *range(first, left, spec.batch_size), left]
    if spec.negative_rate < 1:
        batches = _cut_sampled(columns, order, bounds, spec.negative_rate, key)
    else:
        batches = cut(columns, order, bounds)
    brought = table.select(list(spec.columns)) if spec.columns else None
    if brought is not None and order is not None:
        brought = brought.take(order)
    return PartitionBatches(batches, began, time.time(), f"{socket.gethostname()}:{os.getpid()}", threading.get_ident(), brought)


def _cut_sampled(
    columns: Columns, order: NDArray[np.int64] | None, bounds: Sequence[int], negative_rate: float, key: Sequence[int]
) -> list[Batch]:  # fmt: skip
    """As `cut`, of the positive samples and a share of the negative ones: the same of a row, wherever its partition is cut.

    A batch is cut where it would be with all samples, so that it is known beforehand; it may be left without any.
    """
    rows = len(columns.labels)
    kept = (columns.labels > 0.5) | (np.random.default_rng([*key, 1]).random(rows) < negative_rate)
    order = np.arange(rows) if order is None else order
    stays = kept[order]
    left = np.concatenate([[0], np.cumsum(stays)])[np.array(bounds)]
    batches = cut(columns, order[stays], left.tolist())
    return [replace(b, left_out=hi - lo - b.size) for b, (lo, hi) in zip(batches, pairwise(bounds), strict=True)]


class PartitionStream(Iterator[PartitionBatches]):
    """Iterator over what the tasks have read, partition by partition.

    Parameters
    ----------
    client : where the tasks run.
    order : the partitions in reading order, each with the samples of an open batch that come before it; taken one by one, as tasks
        are submitted.
    tasks_in_flight : at most this many partitions are being decoded or wait, decoded, to be read.
    status : gets `DecodePartition` (time of each task), `HubWait` (until a task has ended), `HubTransfer` (until its batches are
        here), and counts `empty_reads`.
    placing : keywords of `Client.submit` that say on which workers the tasks may run.
    fetch_ahead : bring the next partition here while the batches of this one are read; of use where it comes from another process.

    One thread at a time may call `next`; `close` may come from any thread and makes a waiting `next` raise StoppedError.
    A task's exception (DataError, …) is raised by `next`, and by every later one: nobody reads on behind a gap. The end is
    StopIteration. `next` blocks in Dask until the task has ended and does not poll; a task that comes back without samples would be
    counted as an empty read, and the plan has none.
    """

    def __init__(
        self,
        client: distributed.Client,
        order: Iterable[tuple[Partition, int]],
        spec: ReadSpec,
        epoch: int,
        tasks_in_flight: int,
        status: RunStatus,
        placing: Mapping[str, Any] = MappingProxyType({}),
        fetch_ahead: bool = False,
    ) -> None:
        self._client, self._spec, self._epoch, self._status, self._placing = client, spec, epoch, status, placing
        self._tasks = iter(order)
        self._fetcher = ThreadPoolExecutor(1, "flowps-hub-fetch") if fetch_ahead else None
        self._fetching: tuple[Any, Future[PartitionBatches]] | None = None  # a task of `_futures`, and its result on the way
        self._lock = threading.Lock()  # guards everything below
        self._closed = False
        self._futures: deque[Any] = deque()
        self._awaited: Any = None  # taken from `_futures`, so that `close` still finds it
        self._error: BaseException | None = None
        for _ in range(tasks_in_flight):
            self._submit()

    def __next__(self) -> PartitionBatches:
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StoppedError("reading samples: the stream was closed")
            self._awaited = self._futures.popleft() if self._futures else None
        if self._awaited is None:
            raise StopIteration
        part = self._wait(self._awaited)
        self._submit()
        self._account(part)
        return part

    def close(self) -> None:
        """Give up what has not been read. Idempotent."""
        with self._lock:
            self._closed = True
            futures, self._futures = [*self._futures], deque()
            if self._awaited is not None:
                futures.append(self._awaited)
        for future in futures:
            future.cancel()  # ends a `result` that waits
        if self._fetcher is not None:
            self._fetcher.shutdown(wait=True)

    def _submit(self) -> None:
        for partition, open_rows in self._tasks:
            future = self._client.submit(read_partition, partition, self._spec, self._epoch, open_rows, pure=False, **self._placing)
            with self._lock:
                if not self._closed:
                    self._futures.append(future)
                    return
            future.cancel()  # `close` came meanwhile and has not seen it
            return

    def _wait(self, future: Any) -> PartitionBatches:
        """The task's result: Dask waits on until the task has ended, somewhere else too if its worker is lost."""
        try:
            result = self._result(future)
        except BaseException as error:
            if self._closed and isinstance(error, CancelledError):
                raise StoppedError("reading samples: the stream was closed") from None
            if isinstance(error, distributed.KilledWorker):
                error = ClusterError(
                    f"the workers that read a partition died, {error.allowed_failures + 1} one after the other; the last was "
                    f"{error.last_worker.name}: look into its log; if memory ran out, lower data.tasks_in_flight or write the "
                    "files with smaller row groups"
                )
            with self._lock:
                self._error = error
            raise error
        finally:
            with self._lock:
                self._awaited = None
            future.release()  # of an error too: its traceback, kept with the future, would keep this stream
        return result

    def _result(self, future: Any) -> PartitionBatches:
        fetching, self._fetching = self._fetching, None
        ahead = fetching is not None and fetching[0] is future
        result: PartitionBatches = fetching[1].result() if fetching is not None and ahead else self._fetch(future)
        if self._fetcher is not None:
            with self._lock:
                following = self._futures[0] if self._futures and not self._closed else None
                if following is not None:
                    self._fetching = following, self._fetcher.submit(self._fetch, following)
        return result

    def _fetch(self, future: Any) -> PartitionBatches:
        """Wait for a task, and bring its result here."""
        with self._status.timed("HubWait"):
            distributed.wait(future)
        with self._status.timed("HubTransfer"):
            result: PartitionBatches = future.result()
        return result

    def _account(self, part: PartitionBatches) -> None:
        self._status.observe("DecodePartition", part.ended - part.began)
        if self._status.trace is not None:
            self._status.trace.add_elsewhere("hub", part.worker, "DecodePartition", part.thread, part.began, part.ended)
        self._status.count("hub_bytes", sum(batch.nbytes for batch in part.batches))
        if not part.batches:
            self._status.count("empty_reads")


class HubStream(Iterator[Batch]):
    """Iterator over the batches of one epoch: of exactly `spec.batch_size` samples read each, the last one of less.

    order   the partitions of this epoch, in reading order

    The other parameters, threads and errors are PartitionStream's.
    """

    def __init__(self, client: distributed.Client, order: Iterable[Partition], spec: ReadSpec, *more: Any, **keywords: Any) -> None:
        self._batch_size = spec.batch_size
        self._parts = PartitionStream(client, self._plan(order), spec, *more, **keywords)
        self._ready: deque[Batch] = deque()
        self._open: list[Batch] = []

    def __next__(self) -> Batch:
        while not self._ready:
            part = next(self._parts, None)
            if part is None:
                if not self._open:
                    raise StopIteration
                return self._stitch()
            for batch in part.batches:
                self._open.append(batch)
                if sum(piece.read for piece in self._open) == self._batch_size:
                    self._ready.append(self._stitch())
        return self._ready.popleft()

    def close(self) -> None:
        """Give up what has not been read. Idempotent."""
        self._parts.close()

    def _plan(self, order: Iterable[Partition]) -> Iterator[tuple[Partition, int]]:
        """Each partition with the samples of the open batch that have come before it."""
        rows = 0
        for partition in order:
            yield partition, rows % self._batch_size
            rows += partition.rows_left

    def _stitch(self) -> Batch:
        whole = Batch.concat(self._open)
        self._open = []
        return whole

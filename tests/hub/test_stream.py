"""`HubStream` over a real embedded Dask cluster: whole batches in order, bounded, and an end that is never mistaken."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import distributed
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.batch import Batch
from flowps.config import Config, Data, Slot
from flowps.errors import ClusterError, DataError, StoppedError
from flowps.hub.decode import Dense
from flowps.hub.partition import Partition, epoch_order, list_files, partitions, read_table
from flowps.hub.schema import Schema, infer
from flowps.hub.stream import HubStream, PartitionBatches, PartitionStream, ReadSpec, read_partition
from flowps.status.run_status import RunStatus
from tests.hub import naive

WAIT_S = 60  # how long a test waits for what must happen at once, before it fails
COLUMNS = {"label": pa.int8(), "x": pa.float64(), "u": pa.int64(), "h": pa.list_(pa.string())}
SCHEMA = infer(COLUMNS, Config())


@pytest.fixture(scope="module")
def client() -> Iterator[distributed.Client]:
    """Dask in this process. Without a dashboard address it would take port 8787."""
    with (
        dask.config.set({"distributed.worker.profile.enabled": False}),
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, memory_limit=0, scheduler_kwargs={"dashboard": False},
            dashboard_address="127.0.0.1:0", worker_dashboard_address="127.0.0.1:0",
        ) as cluster,
        distributed.Client(cluster) as client,
    ):  # fmt: skip
        yield client


def rows(num_rows: int) -> pa.Table:
    """x is the number of the row, so that any batch tells which rows it has."""
    return pa.table(
        {
            "label": pa.array([i % 2 for i in range(num_rows)], pa.int8()),
            "x": [float(i) for i in range(num_rows)],
            "u": [i % 5 if i % 7 else None for i in range(num_rows)],
            "h": [[f"{i}.{k}" for k in range(i % 4)] for i in range(num_rows)],
        },
        schema=pa.schema(COLUMNS),
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., list[Partition]]:
    """Write a file with one row group per size; gives its partitions, one per row group."""

    def write_file(sizes: Sequence[int], table: pa.Table | None = None, name: str = "a.parquet") -> list[Partition]:
        table = rows(sum(sizes)) if table is None else table
        with pq.ParquetWriter(tmp_path / name, table.schema) as writer:
            for lo, hi in pairwise(np.cumsum([0, *sizes])):
                writer.write_table(table.slice(lo, hi - lo))
        return partitions(list_files([str(tmp_path / name)], "data.train"), 1)

    return write_file


def spec_of(batch_size: int, *, shuffle: bool = False, seed: int = 0, schema: Schema = SCHEMA) -> ReadSpec:
    return ReadSpec(schema, Dense(), batch_size, shuffle, seed)


def ids(batches: Sequence[Batch]) -> list[int]:
    """The numbers of the rows, in the order of the batches."""
    return [int(x) for batch in batches for x in batch.dense[:, 0]]


def check_rows(batches: Sequence[Batch]) -> None:
    """Whatever rows are in the batches, they are whole: each with its own label and bags."""
    samples = naive.samples(rows(1 + max(ids(batches))), SCHEMA, Dense())
    for batch in batches:
        naive.assert_same(batch, naive.batch([samples[i] for i in ids([batch])]))


def check_sizes(batches: Sequence[Batch], batch_size: int) -> None:
    """All batches have `batch_size` rows, only the last may have fewer, none has none."""
    sizes = [batch.size for batch in batches]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= batch_size


class Direct:
    """In place of a Dask client: computes a task when it is submitted."""

    def submit(self, function: Callable[..., Any], *args: Any, pure: bool) -> Done:
        return Done(function(*args))


class Done:
    """A future that is done."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self.key = f"task-{id(self)}"

    def result(self, timeout: float | None = None) -> Any:
        return self._value

    def release(self) -> None: ...

    def cancel(self) -> None: ...


class Watched:
    """A Dask client that counts what is submitted; `asked` is set when the stream begins to wait for a task."""

    def __init__(self, client: distributed.Client) -> None:
        self._client = client
        self.submitted = 0
        self.asked = threading.Event()

    def submit(self, *args: Any, **kwargs: Any) -> WatchedFuture:
        self.submitted += 1
        return WatchedFuture(self._client.submit(*args, **kwargs), self.asked)


class WatchedFuture:
    """A Dask future that tells when it is asked."""

    def __init__(self, future: distributed.Future, asked: threading.Event) -> None:
        self._future, self._asked = future, asked

    def result(self, timeout: float | None = None) -> Any:
        self._asked.set()
        return self._future.result(timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._future, name)


class Gate:
    """Stands in front of `read_table` in the hub tasks: the partitions in `shut` (by first row) wait there for `open`."""

    def __init__(self) -> None:
        self.shut: set[int] = set()
        self.open = threading.Event()
        self.passed = threading.Semaphore(0)  # released for each partition that was read

    def read_table(self, partition: Partition, columns: Sequence[str], strings: Collection[str]) -> pa.Table:
        if partition.first_row in self.shut and not self.open.wait(WAIT_S):
            raise AssertionError("the gate was not opened")
        table = read_table(partition, columns, strings)
        self.passed.release()
        return table


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr("flowps.hub.stream.read_table", gate.read_table)
    yield gate
    gate.open.set()


def held(client: distributed.Client) -> int:
    """Futures that the client holds, after what has been asked of its event loop so far."""
    gc.collect()  # what an earlier test dropped is not to vanish between two counts
    client.sync(asyncio.sleep, 0)
    return len(client.futures)


# --- whole batches, in order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "batch_size"),
    [
        ([10], 3),
        ([3, 3, 3, 3], 4),
        ([1] * 7, 3),
        ([5, 1, 9, 2], 4),
        ([4, 4], 4),
        ([8, 4], 4),
        ([7], 7),
        ([6, 6], 12),
        ([2, 3], 100),
        ([1], 1),
        ([5, 4], 1),
        ([1, 1, 1, 20, 1], 6),
    ],
)
@pytest.mark.parametrize("tasks_in_flight", [1, 3])
def test_batches_are_whole_and_in_the_order_of_the_file(
    client: distributed.Client, write: Any, sizes: list[int], batch_size: int, tasks_in_flight: int
) -> None:
    before = held(client)
    found = list(HubStream(client, write(sizes), spec_of(batch_size), 0, tasks_in_flight, RunStatus()))
    check_sizes(found, batch_size)
    assert ids(found) == list(range(sum(sizes)))
    check_rows(found)
    assert held(client) == before


@pytest.mark.usefixtures("client")
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    batch_size=st.integers(1, 30),
    tasks_in_flight=st.integers(1, 8),
    shuffle=st.booleans(),
)
def test_any_sizes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], batch_size: int, tasks_in_flight: int, shuffle: bool
) -> None:
    path = tmp_path_factory.mktemp("data") / "a.parquet"
    with pq.ParquetWriter(path, pa.schema(COLUMNS)) as writer:
        for lo, hi in pairwise(np.cumsum([0, *sizes])):
            writer.write_table(rows(hi).slice(lo))
    parts = epoch_order(partitions(list_files([str(path)], "data.train"), 1), 0, 0, shuffle)
    spec = spec_of(batch_size, shuffle=shuffle)
    found = list(HubStream(Direct(), parts, spec, 0, tasks_in_flight, RunStatus()))
    check_sizes(found, batch_size)
    assert sorted(ids(found)) == list(range(sum(sizes)))
    check_rows(found)


def test_batches_keep_their_order_when_a_later_task_ends_first(client: distributed.Client, write: Any, gate: Gate) -> None:
    gate.shut = {0}
    stream = HubStream(client, write([3, 3, 3, 3]), spec_of(5), 0, 4, RunStatus())
    for _ in range(3):
        assert gate.passed.acquire(timeout=WAIT_S)
    gate.open.set()
    assert ids(list(stream)) == list(range(12))


def test_no_partitions_no_batches(client: distributed.Client) -> None:
    stream = HubStream(client, [], spec_of(4), 0, 2, RunStatus())
    assert list(stream) == []


def test_the_end_stays_the_end(client: distributed.Client, write: Any) -> None:
    stream = HubStream(client, write([3, 2]), spec_of(4), 0, 2, RunStatus())
    assert [batch.size for batch in stream] == [4, 1]
    assert next(stream, None) is None


def test_each_task_is_timed_once(client: distributed.Client, write: Any) -> None:
    status = RunStatus()
    list(HubStream(client, write([3, 3, 3]), spec_of(2), 0, 2, status))
    summary = status.summaries()["DecodePartition"]
    assert summary.count == 3
    assert 0 < summary.max_us < WAIT_S * 1e6


# --- shuffling --------------------------------------------------------------------------------------------------------


def shuffled(client: Any, parts: Sequence[Partition], *, seed: int = 0, epoch: int = 0, in_flight: int = 3) -> list[int]:
    order = epoch_order(parts, seed, epoch, True)
    found = list(HubStream(client, order, spec_of(7, shuffle=True, seed=seed), epoch, in_flight, RunStatus()))
    check_sizes(found, 7)
    check_rows(found)
    return ids(found)


def test_shuffled_is_a_permutation_of_partitions_and_of_rows_inside(client: distributed.Client, write: Any) -> None:
    parts = write([10, 20, 30, 40])
    found = shuffled(client, parts)
    assert sorted(found) == list(range(100))
    order = epoch_order(parts, 0, 0, True)
    assert [p.first_row for p in order] != [p.first_row for p in parts]
    start = 0
    for part in order:
        inside = found[start : start + part.num_rows]
        expected = list(range(part.first_row, part.first_row + part.num_rows))
        assert sorted(inside) == expected != inside
        start += part.num_rows


def test_seed_and_epoch_make_the_order(client: distributed.Client, write: Any) -> None:
    parts = write([10, 20, 30])
    first = shuffled(client, parts, seed=1, epoch=2)
    assert shuffled(client, parts, seed=1, epoch=2) == first
    assert shuffled(client, parts, seed=1, epoch=2, in_flight=1) == first
    assert shuffled(client, parts, seed=1, epoch=3) != first
    assert shuffled(client, parts, seed=2, epoch=2) != first


def test_partitions_of_one_size_are_not_shuffled_alike(write: Any) -> None:
    """By file name and first row."""
    parts = [*write([30, 30], name="a.parquet"), *write([30], name="b.parquet")]
    spec = spec_of(100, shuffle=True)
    orders = [tuple(i - p.first_row for i in ids(read_partition(p, spec, 0, 0).batches)) for p in parts]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len(set(orders)) == 3


def test_rows_inside_a_partition_are_shuffled_by_seed_and_epoch(write: Any) -> None:
    (part,) = write([30])
    orders = {
        (s, e): tuple(ids(read_partition(part, spec_of(100, shuffle=True, seed=s), e, 0).batches))
        for s in range(2)
        for e in range(3)
    }
    assert len(set(orders.values())) == 6
    assert tuple(ids(read_partition(part, spec_of(7, shuffle=True, seed=1), 2, 0).batches)) == orders[1, 2]


def test_moving_the_data_does_not_change_the_order(write: Any, tmp_path: Path) -> None:
    (part,) = write([30])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.parquet").rename(tmp_path / "elsewhere" / "a.parquet")
    moved = replace(part, url=str(tmp_path / "elsewhere" / "a.parquet"))
    spec = spec_of(100, shuffle=True)
    assert ids(read_partition(moved, spec, 3, 0).batches) == ids(read_partition(write([30])[0], spec, 3, 0).batches)


# --- weights ----------------------------------------------------------------------------------------------------------


def with_weights(num_rows: int) -> tuple[pa.Table, Schema]:
    """`rows` and a weight for each value of h and of u, no two alike."""
    table = rows(num_rows)
    lists = [[i + k / 4 for k in range(len(h))] for i, h in enumerate(table.column("h").to_pylist())]
    table = table.append_column("hw", pa.array(lists, pa.list_(pa.float32()))).append_column("uw", pa.array(range(num_rows)))
    slots = (Slot(name="h", weights="hw"), Slot(name="u", weights="uw"))
    return table, infer({f.name: f.type for f in table.schema}, Config(slot=slots))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("sizes", "batch_size"), [([10, 20, 30, 40], 7), ([3, 3, 3], 100), ([8, 4], 4), ([1] * 7, 3)])
def test_shares_go_with_their_signs(
    client: distributed.Client, write: Any, sizes: list[int], batch_size: int, shuffle: bool
) -> None:
    """Shuffled, cut, and joined at the borders of partitions, over Dask."""
    table, schema = with_weights(sum(sizes))
    parts = write(sizes, table)
    spec = spec_of(batch_size, shuffle=shuffle, schema=schema)
    found = list(HubStream(client, epoch_order(parts, 0, 1, shuffle), spec, 1, 2, RunStatus()))
    check_sizes(found, batch_size)
    assert sorted(ids(found)) == list(range(sum(sizes)))
    samples = naive.samples(table, schema, Dense())
    for batch in found:
        naive.assert_same(batch, naive.batch([samples[i] for i in ids([batch])]))


def test_bad_weights_in_a_task_reach_next(client: distributed.Client, write: Any, tmp_path: Path) -> None:
    table, schema = with_weights(9)
    bad = pa.array([None if i == 5 else i for i in range(9)])
    parts = write([3, 3, 3], table.set_column(table.schema.get_field_index("uw"), "uw", bad))
    stream = HubStream(client, parts, spec_of(3, schema=schema), 0, 2, RunStatus())
    assert next(stream).size == 3
    with pytest.raises(DataError) as refusal:
        next(stream)
    assert str(refusal.value).startswith(f"{tmp_path}/a.parquet: column 'uw', row 5: found null, expected ")


@pytest.mark.parametrize("values", [None, ["1", "2"], [1.5, 2.5], [[1], [2]]])
def test_a_file_rewritten_with_other_weights_is_refused(write: Any, values: list[Any] | None) -> None:
    table, schema = with_weights(2)
    table = table.drop_columns(["uw"])
    if values is not None:
        table = table.append_column("uw", pa.array(values))
    with pytest.raises(DataError, match=r"a\.parquet.* 'uw'"):
        read_partition(write([2], table)[0], spec_of(4, schema=schema), 0, 0)


# --- one task ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "open_rows", "sizes"),
    [(10, 0, [4, 4, 2]), (10, 1, [3, 4, 3]), (10, 2, [2, 4, 4]), (2, 1, [2]), (3, 1, [3]), (4, 0, [4]), (1, 3, [1])],
)
def test_a_task_completes_the_open_batch_first(write: Any, num_rows: int, open_rows: int, sizes: list[int]) -> None:
    found = read_partition(write([num_rows])[0], spec_of(4), 0, open_rows)
    assert [batch.size for batch in found.batches] == sizes
    assert ids(found.batches) == list(range(num_rows))
    assert 0 < found.ended - found.began < 60


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("u", None),
        ("label", None),
        ("u", ["1", "2"]),
        ("u", [1.5, 2.5]),
        ("u", [[1], [2]]),
        ("x", ["1", "2"]),
        ("label", ["0", "1"]),
    ],
)
def test_a_file_rewritten_with_other_columns_is_refused(write: Any, column: str, values: list[Any] | None) -> None:
    """A file that changed after the schema was made must not be trained on as something else."""
    table = rows(2).drop_columns([column])
    if values is not None:
        table = table.append_column(column, pa.array(values))
    with pytest.raises(DataError) as refusal:
        read_partition(write([2], table)[0], spec_of(4), 0, 0)
    assert "a.parquet" in str(refusal.value)
    assert repr(column) in str(refusal.value)


# --- fewer negatives --------------------------------------------------------------------------------------------------

RARE = 12  # one in so many samples is positive


def rare(num_rows: int) -> pa.Table:
    """`rows` with few positives, and a weight for each sample."""
    table = rows(num_rows).set_column(0, "label", pa.array([int(i % RARE == 5) for i in range(num_rows)], pa.int8()))
    return table.append_column("w", pa.array([i / 8 for i in range(num_rows)]))


RARE_SCHEMA = infer({f.name: f.type for f in rare(1).schema}, Config(data=Data(sample_weight="w")))


def sampled(batch_size: int, rate: float, *, shuffle: bool = False, seed: int = 0) -> ReadSpec:
    return replace(spec_of(batch_size, shuffle=shuffle, seed=seed, schema=RARE_SCHEMA), negative_rate=rate)


def check_rare(batches: Sequence[Batch]) -> None:
    """The samples that are there are whole, each with its own label, weight and bags."""
    samples = naive.samples(rare(1 + max(ids(batches))), RARE_SCHEMA, Dense())
    for batch in batches:
        if batch.size:
            naive.assert_same(batch, naive.batch([samples[i] for i in ids([batch])]))
        assert batch.weights is not None
        assert batch.weights.tolist() == [i / 8 for i in ids([batch])]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("sizes", "batch_size"), [([50, 7, 61], 10), ([30, 30], 200), ([5] * 20, 8), ([40, 40], 1)])
@pytest.mark.usefixtures("client")  # Dask waits for futures of any kind only where there is one
def test_a_share_of_the_negatives_is_left_out_and_counted(sizes: list[int], batch_size: int, shuffle: bool, write: Any) -> None:
    """Batches are cut where they would be with all samples; a batch may be left without any."""
    parts, total = write(sizes, rare(sum(sizes))), sum(sizes)
    found = list(HubStream(Direct(), parts, sampled(batch_size, 0.3, shuffle=shuffle), 0, 2, RunStatus()))
    assert [batch.read for batch in found] == [min(batch_size, total - at) for at in range(0, total, batch_size)]
    kept = ids(found)
    assert len(set(kept)) == len(kept)
    assert {i for i in range(total) if i % RARE == 5} <= set(kept), "every positive sample is there"
    assert 0.15 < (len(kept) - sum(i % RARE == 5 for i in range(total))) / total < 0.45
    check_rare(found)
    everything = list(HubStream(Direct(), parts, sampled(batch_size, 1.0, shuffle=shuffle), 0, 2, RunStatus()))
    assert [ids([batch]) for batch in found] == [[i for i in ids([batch]) if i in set(kept)] for batch in everything]
    assert [batch.left_out for batch in everything] == [0] * len(everything)


def test_negatives_are_drawn_by_seed_and_epoch_and_a_larger_share_has_the_smaller_one_in_it(write: Any) -> None:
    (part,) = write([400], rare(400))

    def kept(rate: float, *, seed: int = 0, epoch: int = 0) -> set[int]:
        return set(ids(read_partition(part, sampled(50, rate, seed=seed), epoch, 0).batches))

    assert kept(0.5) == kept(0.5)
    assert len({frozenset(kept(0.5, seed=seed, epoch=epoch)) for seed in range(2) for epoch in range(2)}) == 4
    assert kept(0.2) < kept(0.5) < kept(0.9) < kept(1.0)
    every_epoch = [kept(0.5, epoch=epoch) for epoch in range(12)]
    assert set().union(*every_epoch) == set(range(400)), "a negative sample that is left out comes in another epoch"


def test_partitions_of_one_size_do_not_leave_out_the_same_rows(write: Any) -> None:
    first, second = (
        {i % 100 for i in ids(read_partition(p, sampled(50, 0.5), 0, 0).batches)} for p in write([100, 100], rare(200))
    )
    assert first != second


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("skip", [1, 20, 37, 99])
def test_what_is_left_of_a_partition_has_the_same_samples_as_the_whole(write: Any, skip: int, shuffle: bool) -> None:
    """So that a run that goes on in the middle of an epoch trains what it would have trained."""
    (part,) = write([100], rare(100))
    spec = sampled(10, 0.3, shuffle=shuffle)
    whole = read_partition(part, spec, 3, 0).batches
    rest = read_partition(replace(part, skip=skip), spec, 3, skip % 10).batches
    assert sum(batch.read for batch in rest) == 100 - skip
    full = [batch for batch in rest if skip % 10 == 0 or batch is not rest[0]]
    for ours, wanted in zip(full, whole[len(whole) - len(full) :], strict=True):
        naive_ids = ids([wanted])
        assert (ids([ours]), ours.left_out) == (naive_ids, wanted.left_out)
    assert ids(rest) == ids(whole)[len(ids(whole)) - len(ids(rest)) :]


@pytest.mark.usefixtures("client")  # Dask waits for futures of any kind only where there is one
def test_a_batch_of_which_all_samples_were_left_out_is_there_with_its_count(write: Any) -> None:
    (part,) = write([RARE * 4], rare(RARE * 4))
    found = read_partition(part, sampled(4, 1e-9), 0, 0).batches
    assert [(batch.size, batch.left_out) for batch in found] == [(0, 4), (1, 3), (0, 4)] * 4
    assert [batch.labels.tolist() for batch in found if batch.size] == [[1.0]] * 4
    assert all(batch.dense.shape == (batch.size, 1) and len(batch.signs) == batch.offsets[-1] for batch in found)
    joined = list(HubStream(Direct(), write([7] * 6, rare(42)), sampled(4, 1e-9), 0, 2, RunStatus()))
    assert sum(batch.read for batch in joined) == 42
    assert ids(joined) == [5, 17, 29, 41]
    assert [batch.read for batch in joined] == [4] * 10 + [2]


# --- without labels; columns that are brought along -------------------------------------------------------------------


def test_without_labels_their_columns_are_not_read(write: Any) -> None:
    spec = replace(spec_of(4, schema=RARE_SCHEMA), labelled=False)
    assert spec.read == ["x", "u", "h"]
    (part,) = write([6], rare(6).drop_columns(["label", "w"]))
    (first, second) = read_partition(part, spec, 0, 0).batches
    assert ids([first, second]) == list(range(6))
    assert (first.labels.tolist(), first.weights) == ([0.0] * 4, None)
    assert replace(spec, labelled=True).read == ["label", "w", "x", "u", "h"]


def test_columns_are_brought_along_in_the_order_of_the_samples(write: Any) -> None:
    table = rows(10).append_column("id", pa.array([f"n{i}" for i in range(10)]))
    (part,) = write([10], table)
    for shuffle in (False, True):
        for skip in (0, 4):
            spec = replace(spec_of(4, shuffle=shuffle), columns=("id", "u"))
            assert spec.read == ["label", "x", "u", "h", "id"], "each column is read once"
            found = read_partition(replace(part, skip=skip), spec, 0, 0)
            assert found.columns is not None
            assert found.columns.column_names == ["id", "u"]
            assert found.columns.column("id").to_pylist() == [f"n{i}" for i in ids(found.batches)]
            assert found.columns.column("u").to_pylist() == [i % 5 if i % 7 else None for i in ids(found.batches)]
    assert read_partition(part, spec_of(4), 0, 0).columns is None


def test_partitions_come_one_by_one_with_their_batches_and_columns(client: distributed.Client, write: Any) -> None:
    parts = write([5, 3, 9])
    status = RunStatus()
    spec = replace(spec_of(4), columns=("u",))
    stream = PartitionStream(client, [(part, 0) for part in parts], spec, 0, 2, status)
    found = list(stream)
    assert [[batch.size for batch in part.batches] for part in found] == [[4, 1], [3], [4, 4, 1]]
    assert [len(part.columns or ()) for part in found] == [5, 3, 9]
    assert [i for part in found for i in ids(part.batches)] == list(range(17))
    assert status.stage("DecodePartition").summary().count == 3
    assert status.counters()["hub_bytes"] == sum(batch.nbytes for part in found for batch in part.batches)
    with pytest.raises(StopIteration):
        next(stream)
    stream.close()


@pytest.mark.usefixtures("client")  # Dask waits for futures of any kind only where there is one
def test_open_rows_of_a_partition_are_what_its_first_batch_completes(write: Any) -> None:
    parts = write([5, 3, 9])
    stream = PartitionStream(Direct(), zip(parts, [3, 0, 1], strict=True), spec_of(4), 0, 1, RunStatus())
    assert [[batch.size for batch in part.batches] for part in stream] == [[1, 4], [3], [3, 4, 2]]


def test_a_partition_stream_that_is_closed_or_has_failed_says_so_again(client: distributed.Client, write: Any) -> None:
    table = rows(9).set_column(0, "label", pa.array([0, 1, 0, 1, 7, 0, 1, 0, 1], pa.int8()))
    stream = PartitionStream(client, [(part, 0) for part in write([3, 3, 3], table)], spec_of(3), 0, 2, RunStatus())
    assert ids(next(stream).batches) == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(DataError, match=r"column 'label', row 4: found 7, expected a label of 0 or 1"):
            next(stream)
    stream.close()
    closed = PartitionStream(client, [(part, 0) for part in write([3, 3])], spec_of(3), 0, 2, RunStatus())
    closed.close()
    closed.close()
    with pytest.raises(StoppedError, match="reading samples: the stream was closed"):
        next(closed)


def test_a_worker_with_another_version_is_told_what_to_do(write: Any) -> None:
    with pytest.raises(ClusterError, match=r"the run flowps 0\.0\.0: install the same version on all machines"):
        read_partition(write([3])[0], replace(spec_of(3), version="0.0.0"), 0, 0)


# --- back-pressure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks_in_flight", [1, 2, 5])
def test_tasks_in_flight_are_bounded(client: distributed.Client, write: Any, tasks_in_flight: int) -> None:
    """Submitted and not yet read: never more than asked for, and as many as asked for while there are any."""
    parts = write([3] * 8)
    watched, status = Watched(client), RunStatus()
    stream = HubStream(watched, parts, spec_of(2), 0, tasks_in_flight, status)
    assert watched.submitted == tasks_in_flight
    for _ in stream:
        read = status.summaries()["DecodePartition"].count
        assert watched.submitted == min(len(parts), read + tasks_in_flight)
    assert watched.submitted == len(parts)


def test_more_tasks_in_flight_than_partitions(client: distributed.Client, write: Any) -> None:
    watched = Watched(client)
    assert len(list(HubStream(watched, write([3, 3]), spec_of(2), 0, 100, RunStatus()))) == 3
    assert watched.submitted == 2


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_in_a_task_reaches_next(client: distributed.Client, write: Any, tmp_path: Path) -> None:
    labels = pa.array([0] * 7 + [9] + [0] * 4, pa.int8())
    parts = write([3, 3, 3, 3], rows(12).set_column(0, "label", labels))
    stream = HubStream(client, parts, spec_of(3), 0, 2, RunStatus())
    assert [next(stream).size, next(stream).size] == [3, 3]
    with pytest.raises(DataError) as refusal:
        next(stream)
    assert str(refusal.value).startswith(f"{tmp_path}/a.parquet: column 'label', row 7: found 9, expected ")


def test_nobody_reads_on_behind_an_error(client: distributed.Client, write: Any) -> None:
    """The second `next` may come from another thread, and must not take what follows, or the end, for the next batch."""
    parts = write([3, 3, 3], rows(9).set_column(0, "label", pa.array([0] * 4 + [9] + [0] * 4, pa.int8())))
    stream = HubStream(client, parts, spec_of(3), 0, 3, RunStatus())
    assert next(stream).size == 3
    for _ in range(3):
        with pytest.raises(DataError, match="row 4: found 9"):
            next(stream)


def test_what_a_lost_worker_had_is_computed_again(write: Any) -> None:
    """Both workers hold finished partitions when one is killed."""
    parts = write([3] * 8)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, scheduler_kwargs={"dashboard": False},
            dashboard_address="127.0.0.1:0", worker_dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):  # fmt: skip
        client.wait_for_workers(2)
        stream = HubStream(client, parts, spec_of(4), 0, 8, RunStatus())
        distributed.wait(list(stream._parts._futures), timeout=WAIT_S)
        worker = next(address for address, tasks in client.has_what().items() if tasks)
        os.kill(client.run(os.getpid, workers=[worker])[worker], signal.SIGKILL)
        found = list(stream)
    assert ids(found) == list(range(24))
    check_rows(found)


def test_an_error_leaves_no_future_behind(client: distributed.Client, write: Any) -> None:
    """Dask keeps the exception with the future: unless that is released, its traceback keeps the stream and all it holds."""
    before = held(client)
    stream = HubStream(client, write([3], rows(3).set_column(0, "label", [[0, 9, 0]])), spec_of(3), 0, 1, RunStatus())
    with pytest.raises(DataError):
        next(stream)
    stream.close()
    assert held(client) == before


def test_a_file_that_vanishes_during_the_epoch(client: distributed.Client, write: Any, tmp_path: Path) -> None:
    stream = HubStream(client, write([3, 3, 3]), spec_of(3), 0, 1, RunStatus())
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataError, match=r"a\.parquet: row groups \[\d\] cannot be read"):
        list(stream)


# --- closing ----------------------------------------------------------------------------------------------------------


def test_close_wakes_a_next_that_waits(client: distributed.Client, write: Any, gate: Gate) -> None:
    """The task itself never ends: its read waits at the gate."""
    gate.shut = {0}
    watched, before = Watched(client), held(client)
    stream = HubStream(watched, write([3, 3, 3]), spec_of(2), 0, 2, RunStatus())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, stream)
        assert watched.asked.wait(WAIT_S)
        stream.close()
        with pytest.raises(StoppedError, match="reading samples"):
            waiting.result(timeout=WAIT_S)
    assert held(client) == before


def test_close_gives_up_what_was_not_read(client: distributed.Client, write: Any, gate: Gate) -> None:
    gate.shut = {0, 3, 6}
    watched, before = Watched(client), held(client)
    stream = HubStream(watched, write([3] * 6), spec_of(3), 0, 3, RunStatus())
    assert held(client) == before + 3
    stream.close()
    stream.close()
    assert held(client) == before
    assert watched.submitted == 3


@pytest.mark.parametrize("batches_before", [0, 1, 2])
def test_next_after_close_is_stopped_not_at_the_end(client: distributed.Client, write: Any, batches_before: int) -> None:
    """An end, or a short last batch, would pass for a complete epoch. Of 5 + 5 + 5 rows, 4 + 4 leave 2 in an open batch."""
    stream = HubStream(client, write([5, 5, 5]), spec_of(4), 0, 1, RunStatus())
    assert [next(stream).size for _ in range(batches_before)] == [4] * batches_before
    stream.close()
    with pytest.raises(StoppedError):
        next(stream)


def test_close_between_the_look_and_the_pop_of_next(client: distributed.Client, write: Any) -> None:
    """Another thread closes when `next` has seen that there are futures. It may be first or not; `next` must know either."""
    stream = HubStream(client, write([3, 3]), spec_of(2), 0, 2, RunStatus())
    looked, closed = threading.Event(), threading.Event()

    def close() -> None:
        looked.wait(WAIT_S)
        stream.close()
        closed.set()

    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(close)

        class Racing(deque[Any]):
            def __len__(self) -> int:
                size = super().__len__()
                if not looked.is_set():
                    looked.set()
                    closed.wait(0.3)  # in vain where `next` has locked it out
                return size

        stream._parts._futures = Racing(stream._parts._futures)
        with suppress(StoppedError):
            assert ids([next(stream)]) == [0, 1]
        closing.result(timeout=WAIT_S)


# --- empty reads ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("client")  # Dask waits for futures of any kind only where there is one
def test_a_task_without_samples_is_an_empty_read(write: Any) -> None:
    """The plan passes empty row groups over; should one come all the same, it is counted and read over."""
    parts = write([3, 3])
    nothing = PartitionBatches([], 0.0, 0.1, "here:1")

    class Client:
        def submit(self, function: Callable[..., Any], part: Partition, *args: Any, pure: bool) -> Done:
            return Done(function(part, *args) if part in parts else nothing)

    status = RunStatus()
    order = [replace(parts[0], num_rows=0), *parts, replace(parts[0], num_rows=0)]
    assert ids(list(HubStream(Client(), order, spec_of(6), 0, 2, status))) == list(range(6))
    assert status.counters()["empty_reads"] == 2


def test_waiting_for_a_slow_task_is_no_empty_read(client: distributed.Client, write: Any, gate: Gate) -> None:
    gate.shut = {0}
    watched, status = Watched(client), RunStatus()
    stream = HubStream(watched, write([3]), spec_of(3), 0, 1, status)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, stream)
        assert watched.asked.wait(WAIT_S)
        gate.open.set()
        assert waiting.result(timeout=WAIT_S).size == 3
    assert not status.counters().get("empty_reads")

"""`Plan`: everything decided before a role starts: files, schema, partitions, placement, capacities, and that it fits in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from dask.system import CPU_COUNT
from distributed.system import MEMORY_LIMIT

from flowps.config import Config, Slot
from flowps.errors import CapacityError, ConfigError
from flowps.hub.decode import Dense
from flowps.hub.partition import Partition, SampleFile, list_files, partitions
from flowps.hub.schema import Schema, check_same, infer
from flowps.hub.stream import ReadSpec
from flowps.ps.memory import MAX_ROWS, row_bytes
from flowps.ps.placement import Placement, place

_LEAST_ROWS = 1024  # a slot's automatic share of memory below this is no embedding table any more
_GIB = 2.0**30


@dataclass(frozen=True)
class Memory:
    """Projected need in bytes, against what the machine has available now."""

    tables: int
    feeds: int
    partitions: int
    available: int


@dataclass(frozen=True)
class Plan:
    """A run, ready to start.

    capacity_rows   what each slot adds to its table's bound
    allocate        whether a slot's rows were asked for: their memory is then taken at the start
    best_auc        known for generated test data only
    """

    config: Config
    schema: Schema
    train: tuple[Partition, ...]
    test: tuple[Partition, ...]
    placement: Placement
    capacity_rows: tuple[int, ...]
    allocate: tuple[bool, ...]
    memory: Memory
    best_auc: float | None

    @property
    def train_rows(self) -> int:
        """Samples of one epoch."""
        return sum(p.num_rows for p in self.train)

    @property
    def test_rows(self) -> int:
        """Samples of the evaluation."""
        return sum(p.num_rows for p in self.test)

    @property
    def tasks_in_flight(self) -> int:
        """Hub tasks that may run or wait."""
        return tasks_in_flight(self.config)

    @property
    def hub_threads(self) -> int:
        """Threads for hub tasks."""
        return hub_threads(self.config)

    def read_spec(self, training: bool) -> ReadSpec:
        """What hub tasks need; evaluation reads in storage order."""
        data = self.config.data
        return ReadSpec(
            self.schema, Dense(data.dense_fill, data.log1p), data.batch_size, data.shuffle and training, self.config.seed
        )


def plan(config: Config) -> Plan:
    """List the data, infer the schema, place the slots, project the memory.

    Raises ConfigError without data.train, DataError and SchemaError for the files, CapacityError when it cannot fit.
    """
    data = config.data
    if not data.train:
        raise ConfigError(
            "data.train: no training data; give --data.train 'dir/*.parquet' or a run's TOML file (--help lists all knobs)"
        )
    train_files = list_files(data.train, "data.train", data.exclude)
    schema = infer(train_files[0].columns, config)
    test_files: list[SampleFile] = []
    if data.test:
        test_files = list_files(data.test, "data.test", data.exclude)
        found = test_files[0]
        check_same(schema.types, found.columns, schema.columns, found.url, train_files[0].url)
    placement = place(schema.slots, config.ps.num_shards)
    train, test = (tuple(partitions(files, data.partition_rows)) for files in (train_files, test_files))
    largest = max(p.num_rows for p in (*train, *test))
    # Decoded values are 8 bytes, once in storage order and once cut into batches.
    in_hub = int(tasks_in_flight(config) * largest * max(f.values_per_row for f in (*train_files, *test_files)) * 16)
    asked = [_asked_rows(slot) for slot in schema.slots]
    capacity_rows, memory = _capacities(schema.slots, asked, placement.width, in_hub, config)
    return Plan(
        config, schema, train, test, placement, capacity_rows, tuple(rows > 0 for rows in asked), memory,
        _best_auc(test_files),
    )  # fmt: skip


def hub_threads(config: Config) -> int:
    """Threads for hub tasks."""
    return config.cluster.threads or int(CPU_COUNT)


def tasks_in_flight(config: Config) -> int:
    """Hub tasks that may run or wait."""
    return config.data.tasks_in_flight or hub_threads(config) + 1


def available_memory() -> int:
    """Bytes this process may still take: the machine's available memory, or what a container's limit leaves of it."""
    return min(psutil.virtual_memory().available, MEMORY_LIMIT - psutil.Process().memory_info().rss)


def _asked_rows(slot: Slot) -> int:
    """The rows that a slot's settings ask for; 0: none said."""
    if slot.capacity_rows and slot.capacity_bytes:
        raise ConfigError(f"slot {slot.name!r}: capacity_rows and capacity_bytes are both set; give one")
    if slot.capacity_bytes and slot.capacity_bytes < row_bytes(slot):
        raise ConfigError(f"slot {slot.name!r}: capacity_bytes = {slot.capacity_bytes} holds no row of {row_bytes(slot)} bytes")
    return slot.capacity_rows or slot.capacity_bytes // row_bytes(slot)


def _capacities(
    slots: Sequence[Slot], asked: Sequence[int], width: int, in_hub: int, config: Config
) -> tuple[tuple[int, ...], Memory]:
    """Rows each slot adds to its table's bound, and the projected memory.

    A slot that asks for none gets an equal share of what ps.memory_share leaves after batches, partitions and the other slots.
    """
    available = available_memory()
    # Embeddings and gradients of each batch in flight, and once more inside the TensorFlow step.
    feeds = (config.trainer.in_flight + 1) * 2 * config.data.batch_size * width * 4
    fixed = sum(rows * row_bytes(slot) for rows, slot in zip(asked, slots, strict=True))
    if feeds + in_hub + fixed > available:
        raise CapacityError(
            f"the run does not fit in memory: {fixed / _GIB:.1f} GiB for {sum(asked):,} rows "
            f"(capacity_rows of {sum(1 for rows in asked if rows)} slots), {in_hub / _GIB:.1f} GiB for partitions being "
            f"decoded ({tasks_in_flight(config)} tasks; row groups are not split) and {feeds / _GIB:.1f} GiB for batches in flight "
            f"({len(slots)} slots, {width} floats per sample × {config.data.batch_size} samples × {config.trainer.in_flight + 1} "
            f"batches, twice), but {available / _GIB:.1f} GiB are available; lower capacity_rows, dim, data.batch_size, "
            "trainer.in_flight or data.tasks_in_flight, or exclude columns"
        )
    automatic = [slot for rows, slot in zip(asked, slots, strict=True) if not rows]
    budget = available * config.ps.memory_share - feeds - in_hub - fixed
    share = {id(slot): max(0, int(budget / len(automatic) / row_bytes(slot))) for slot in automatic}
    if automatic and min(share.values()) < _LEAST_ROWS:
        raise CapacityError(
            f"ps.memory_share = {config.ps.memory_share} of {available / _GIB:.1f} GiB leaves {max(0.0, budget) / _GIB:.2f} GiB "
            f"for the {len(automatic)} slots without capacity_rows: fewer than {_LEAST_ROWS} rows each; raise ps.memory_share, "
            "set capacity_rows, lower dim or data.batch_size, or exclude columns"
        )
    rows = tuple(min(n or share[id(slot)], MAX_ROWS) for n, slot in zip(asked, slots, strict=True))
    tables = sum(n * row_bytes(slot) for n, slot in zip(rows, slots, strict=True))
    return rows, Memory(tables, feeds, in_hub, available)


def _best_auc(files: Sequence[SampleFile]) -> float | None:
    """The AUC that generated test data says is the best reachable."""
    found = {file.metadata.get("flowps.best_auc") for file in files}
    return float(next(iter(found)) or "nan") if len(found) == 1 and None not in found else None

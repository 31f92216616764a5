"""`Plan`: everything decided before a role starts: files, schema, partitions, placement, capacities, and that it fits in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flowps.cluster.assign import Assignment
from flowps.cluster.forecast import Forecast, forecast
from flowps.cluster.offer import is_loopback
from flowps.cluster.resume import Resume, check_fits
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
    """Projected need in bytes, against what the machines have available now."""

    tables: int
    feeds: int
    partitions: int
    available: int


@dataclass(frozen=True)
class Plan:
    """A run, ready to start.

    forecast        what the placement was made from; None for one shard, which has everything
    capacity_rows   what each slot adds to its table's bound
    allocate        whether a slot's rows were asked for: their memory is then taken at the start
    best_auc        known for generated test data only
    valid           what is evaluated on between epochs
    build           makes the model from a ModelSpec, where it was given as a function; None: the one that config.model names
    """

    config: Config
    schema: Schema
    train: tuple[Partition, ...]
    test: tuple[Partition, ...]
    assignment: Assignment
    placement: Placement
    forecast: Forecast | None
    capacity_rows: tuple[int, ...]
    allocate: tuple[bool, ...]
    memory: Memory
    best_auc: float | None
    valid: tuple[Partition, ...] = ()
    build: Callable[[Any], Any] | None = None

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
        """Hub tasks of one trainer that may run or wait."""
        return _tasks_in_flight(self.config, self.assignment)

    @property
    def hub_threads(self) -> int:
        """Hub tasks that can run at once."""
        return self.assignment.hub_threads

    @property
    def steps_together(self) -> bool:
        """Whether a step of all trainers is one step of the rows: the synchronous mode of several trainers."""
        return self.config.trainer.count > 1 and self.config.trainer.in_flight == 1

    def read_spec(self, training: bool) -> ReadSpec:
        """What hub tasks need; evaluation reads in storage order."""
        return _read_spec(self.config, self.schema, training)


def plan(config: Config, assignment: Assignment, resume: Resume | None = None) -> Plan:
    """List the data, infer the schema, place the slots, project the memory; for a run that goes on, as it was, where it can be.

    Raises ConfigError without data.train, DataError and SchemaError for the files, CheckpointError when the run would mean
    something else than the checkpoint `resume`, CapacityError when it cannot fit.
    """
    data = config.data
    _check_group(config, assignment)
    _check_early_stopping(config)
    if not data.train:
        raise ConfigError(
            "data.train: no training data; give --data.train 'dir/*.parquet' or a run's TOML file (--help lists all knobs)"
        )
    train_files = list_files(data.train, "data.train", data.exclude)
    schema = infer(train_files[0].columns, config)
    if resume is not None and resume.goes_on:
        check_fits(resume, config, schema)
    test_files, valid_files = (
        _evaluated(sources, knob, config, schema, train_files[0].url)
        for sources, knob in ((data.test, "data.test"), (data.valid, "data.valid"))
    )
    files_of = (train_files, test_files, valid_files)
    train, test, valid = (tuple(partitions(files, data.partition_rows)) for files in files_of)
    expected = forecast(config, schema, train[0], _read_spec(config, schema, training=False)) if config.ps.num_shards > 1 else None
    placement = resume.placement(schema, config.ps.num_shards) if resume is not None and resume.goes_on else None
    if placement is None:
        placement = place(
            schema.slots, config.ps.num_shards, expected.loads if expected else None, wire=not assignment.is_one_process
        )  # fmt: skip
    largest = max(p.num_rows for p in (*train, *test, *valid))
    # Decoded values are 8 bytes, once in storage order and once cut into batches.
    values_per_row = max(f.values_per_row for files in files_of for f in files)
    in_hub = int(config.trainer.count * _tasks_in_flight(config, assignment) * largest * values_per_row * 16)
    asked = [_asked_rows(slot) for slot in schema.slots]
    capacity_rows, memory = _capacities(schema.slots, asked, placement.width, in_hub, config, assignment)
    if resume is not None and resume.goes_on:
        capacity_rows = _as_before(capacity_rows, asked, resume)
    return Plan(
        config, schema, train, test, assignment, placement, expected, capacity_rows, tuple(rows > 0 for rows in asked), memory,
        _best_auc(test_files), valid,
    )  # fmt: skip


def _evaluated(sources: Sequence[str], knob: str, config: Config, schema: Schema, train_url: str) -> list[SampleFile]:
    """The files that are evaluated on; they have the columns of those that are trained on."""
    if not sources:
        return []
    # Not the weights of samples: every sample counts once.
    exclude = [*config.data.exclude, *([config.data.sample_weight] if config.data.sample_weight else [])]
    files = list_files(sources, knob, exclude)
    needed = [*schema.labels, *schema.features]
    check_same(schema.types, files[0].columns, needed, files[0].url, train_url)
    return files


def _check_early_stopping(config: Config) -> None:
    if (config.trainer.patience or config.trainer.evaluate_steps) and not config.data.valid:
        raise ConfigError(
            "trainer.patience and trainer.evaluate_steps are about evaluations on data.valid: give --data.valid, or leave them out"
        )
    if config.trainer.patience and not config.checkpoint.is_on:
        raise ConfigError(
            "trainer.patience: the run ends with the checkpoint of the best evaluation, but checkpoint.every_steps and "
            "checkpoint.every_s are 0: set one of them, or trainer.patience = 0"
        )


def _check_group(config: Config, assignment: Assignment) -> None:
    if config.trainer.count > 1 and not config.cluster.insecure:
        outside = [offer.host for offer in assignment.trainers if not is_loopback(offer.host)]
        if outside:
            raise ConfigError(
                f"trainer.count = {config.trainer.count} on {', '.join(outside[:3])}: trainers add up their gradients by "
                "TensorFlow's collectives, which know neither TLS nor a token; allow it in a network you trust with "
                "--cluster.insecure true"
            )
    if config.trainer.count > 1 and config.trainer.in_flight == 1 and config.checkpoint.recovery == "partial":
        raise ConfigError(
            "checkpoint.recovery = partial with several trainers and trainer.in_flight = 1: their batches are one step of a shard, "
            "which cannot be half there and half anew; use rollback, or trainer.in_flight of 2 or more"
        )


def _read_spec(config: Config, schema: Schema, training: bool) -> ReadSpec:
    data = config.data
    negative_rate = data.negative_rate if training else 1.0
    schema = schema if training else replace(schema, sample_weight="")  # every sample counts once
    return ReadSpec(
        schema, Dense(data.dense_fill, data.log1p), data.batch_size, data.shuffle and training, config.seed, negative_rate
    )


def _tasks_in_flight(config: Config, assignment: Assignment) -> int:
    return config.data.tasks_in_flight or math.ceil(assignment.hub_threads / config.trainer.count) + 1


def _asked_rows(slot: Slot) -> int:
    """The rows that a slot's settings ask for; 0: none said."""
    if slot.capacity_rows and slot.capacity_bytes:
        raise ConfigError(f"slot {slot.name!r}: capacity_rows and capacity_bytes are both set; give one")
    if slot.capacity_bytes and slot.capacity_bytes < row_bytes(slot):
        raise ConfigError(f"slot {slot.name!r}: capacity_bytes = {slot.capacity_bytes} holds no row of {row_bytes(slot)} bytes")
    return slot.capacity_rows or slot.capacity_bytes // row_bytes(slot)


@dataclass
class _Machine:
    """A host's part of each role, as a share of all of it, and its memory."""

    available: int = 0
    shards: float = 0.0
    trainers: float = 0.0
    hubs: float = 0.0
    names: set[str] = field(default_factory=set)


def _machines(assignment: Assignment) -> list[_Machine]:
    found: dict[str, _Machine] = {}
    for role, offers in (("shards", assignment.shards), ("trainers", assignment.trainers), ("hubs", assignment.hubs)):
        for offer in offers:
            machine = found.setdefault(offer.process.partition(":")[0], _Machine())
            machine.available = max(machine.available, offer.available)
            machine.names.add(offer.name)
            setattr(machine, role, getattr(machine, role) + 1 / len(offers))
    return list(found.values())


def _capacities(
    slots: Sequence[Slot], asked: Sequence[int], width: int, in_hub: int, config: Config, assignment: Assignment
) -> tuple[tuple[int, ...], Memory]:
    """Rows each slot adds to its table's bound, and the projected memory.

    A slot that asks for none gets an equal share of what ps.memory_share leaves after batches, partitions and the other slots. With
    several machines the one that has least to spare for its shards decides.
    """
    machines = _machines(assignment)
    available = sum(machine.available for machine in machines)
    # Embeddings and gradients of each batch in flight, and once more inside the TensorFlow step; of every trainer.
    feeds = config.trainer.count * (config.trainer.in_flight + 1) * 2 * config.data.batch_size * width * 4
    fixed = sum(rows * row_bytes(slot) for rows, slot in zip(asked, slots, strict=True))
    # Rows on their way into a checkpoint: never more than there are.
    most = (config.checkpoint.copy_mib << 20) * config.ps.num_shards if config.checkpoint.is_on else 0
    for machine in machines:
        need = machine.shards * (fixed + min(most, fixed)) + machine.hubs * in_hub + machine.trainers * feeds
        if need > machine.available:
            raise CapacityError(
                f"the run does not fit in memory: {machine.shards * fixed / _GIB:.1f} GiB for {sum(asked):,} rows "
                f"(capacity_rows of {sum(1 for rows in asked if rows)} slots), {machine.shards * min(most, fixed) / _GIB:.1f} GiB "
                f"for their copies at a checkpoint (checkpoint.copy_mib), {machine.hubs * in_hub / _GIB:.1f} GiB for "
                f"partitions being decoded ({_tasks_in_flight(config, assignment)} tasks; row groups are not split) and "
                f"{machine.trainers * feeds / _GIB:.1f} GiB for batches in flight ({len(slots)} slots, {width} floats per sample × "
                f"{config.data.batch_size} samples × {config.trainer.in_flight + 1} batches, twice), but "
                f"{machine.available / _GIB:.1f} GiB are available{_where(machine, machines)}; lower capacity_rows, dim, "
                "data.batch_size, trainer.in_flight or data.tasks_in_flight, or exclude columns"
            )
    automatic = [slot for rows, slot in zip(asked, slots, strict=True) if not rows]
    left = [(m.available * config.ps.memory_share - m.trainers * feeds - m.hubs * in_hub) / m.shards for m in machines if m.shards]
    budget = min(left) - fixed
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


def _as_before(rows: Sequence[int], asked: Sequence[int], resume: Resume) -> tuple[int, ...]:
    """Slots that ask for no rows get what they had, unless memory has become less: the tables are then exactly as they were."""
    before = resume.last.settings["capacity_rows"]
    fits = all(then <= now for then, now, n in zip(before, rows, asked, strict=True) if not n)
    return tuple(then if fits and not n else now for then, now, n in zip(before, rows, asked, strict=True))


def _where(machine: _Machine, machines: Sequence[_Machine]) -> str:
    return "" if len(machines) == 1 else f" to {', '.join(sorted(machine.names)[:4])}"


def _best_auc(files: Sequence[SampleFile]) -> float | None:
    """The AUC that generated test data says is the best reachable."""
    found = {file.metadata.get("flowps.best_auc") for file in files}
    return float(next(iter(found)) or "nan") if len(found) == 1 and None not in found else None

"""What is decided before a run: threads by the cores that may be used, and that it fits in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps.cluster import launch as launch_module
from flowps.cluster.launch import hub_threads
from flowps.cluster.plan import Plan
from flowps.config import Config
from flowps.errors import CapacityError, ConfigError, DataError, SchemaError
from flowps.ps.memory import row_bytes
from tests.cluster.conftest import ROWS, USERS, one_machine

GIB = 1 << 30


def test_hub_threads_are_the_cores_that_dask_counts(
    make_config: Callable[..., Config], make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask knows a container's share of the cores."""
    monkeypatch.setattr(launch_module, "CPU_COUNT", 3)
    assert hub_threads(make_config()) == 3
    assert hub_threads(make_config(("cluster.threads", 7))) == 7
    assert make_plan(offers=[one_machine(threads=3)]).tasks_in_flight == 4
    assert make_plan(("data.tasks_in_flight", 2)).tasks_in_flight == 2


def test_slots_without_capacity_share_what_is_left(make_plan: Callable[..., Plan]) -> None:
    made = make_plan(("ps.memory_share", 0.25), offers=[one_machine(available=8 * GIB)])
    (slot,), (rows,) = made.schema.slots, made.capacity_rows
    assert made.memory.tables == rows * row_bytes(slot)
    assert made.memory.tables + made.memory.feeds + made.memory.partitions == pytest.approx(2 * GIB, rel=1e-3)
    assert made.train_rows == ROWS


def test_rows_and_their_copies_must_fit(make_plan: Callable[..., Plan]) -> None:
    """A checkpoint copies them, up to checkpoint.copy_mib: without checkpoints, or with less of it, the same rows fit."""
    rows = ("slot_default.capacity_rows", 4_000_000)
    offers = [one_machine(available=GIB)]
    with pytest.raises(CapacityError, match=r"GiB for 4,000,000 rows .* for their copies at a checkpoint \(checkpoint\.copy_mib\)"):
        make_plan(rows, offers=offers)
    make_plan(rows, ("checkpoint.copy_mib", 64), offers=offers)
    make_plan(rows, ("checkpoint.every_s", 0), offers=offers)


def test_a_share_of_memory_too_small_for_a_table_is_refused(make_plan: Callable[..., Plan]) -> None:
    with pytest.raises(CapacityError) as refusal:
        make_plan(("ps.memory_share", 0.0001), offers=[one_machine(available=GIB)])
    assert re.search(
        r"ps.memory_share = 0.0001 of 1.0 GiB leaves 0.00 GiB for the 1 slots .*fewer than 1024 rows", str(refusal.value)
    )
    assert "set capacity_rows" in str(refusal.value)


def test_a_bound_in_bytes_is_one_in_rows(make_plan: Callable[..., Plan]) -> None:
    made = make_plan(("slot.user.capacity_bytes", 1_000_000))
    assert made.capacity_rows == (1_000_000 // row_bytes(made.schema.slots[0]),)
    assert made.allocate == (True,)
    assert make_plan().allocate == (False,)
    with pytest.raises(ConfigError, match="'user': capacity_rows and capacity_bytes are both set"):
        make_plan(("slot.user.capacity_bytes", 1_000_000), ("slot.user.capacity_rows", 10))
    with pytest.raises(ConfigError, match="holds no row of"):
        make_plan(("slot.user.capacity_bytes", 10))


def test_rows_asked_for_beyond_memory_are_refused_with_the_numbers(make_plan: Callable[..., Plan]) -> None:
    with pytest.raises(CapacityError) as refusal:
        make_plan(("slot.user.capacity_rows", 100_000_000), offers=[one_machine(available=GIB)])
    assert "for 100,000,000 rows (capacity_rows of 1 slots)" in str(refusal.value)
    assert "but 1.0 GiB are available; lower capacity_rows" in str(refusal.value)


def test_a_shard_cannot_come_back_alone_where_trainers_step_together(make_plan: Callable[..., Plan]) -> None:
    knobs = (("trainer.count", 2), ("checkpoint.recovery", "partial"), ("cluster.mode", "processes"))
    offers = [replace(one_machine(), process=f"machine:{k}") for k in range(2)]
    with pytest.raises(ConfigError, match=r"their batches are one step of a shard, .* use rollback, or trainer.in_flight of 2 or"):
        make_plan(*knobs, ("trainer.in_flight", 1), offers=offers)
    assert make_plan(*knobs, ("trainer.in_flight", 2), offers=offers)


# --- validation data, early stopping, labels --------------------------------------------------------------------------


def write_more(path: Path, rows: int = 250, row_group_size: int = 100, **columns: object) -> str:
    """A file like the training data, of so many rows, with other or more columns."""
    rng = np.random.default_rng(1)
    whole = {
        "label": rng.integers(0, 2, rows).astype(np.int8),
        "x": rng.random(rows, np.float32),
        "user": rng.integers(0, USERS, rows),
    }
    table = pa.table({**whole, **{name: np.resize(values, rows) for name, values in columns.items()}})
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


def test_validation_data_are_listed_beside_training_and_test(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    valid = write_more(tmp_path / "valid.parquet")
    made = make_plan(("data.valid", valid))
    assert [part.num_rows for part in made.valid] == [100, 100, 50]
    assert {part.url for part in made.valid} == {valid}
    assert (made.train_rows, made.test_rows, make_plan().valid) == (ROWS, 0, ())
    assert make_plan(("data.test", valid)).test_rows == 250


@pytest.mark.parametrize("knob", ["data.valid", "data.test"])
def test_files_that_are_evaluated_on_have_the_columns_of_the_training_data(
    make_plan: Callable[..., Plan], tmp_path: Path, knob: str
) -> None:
    with pytest.raises(SchemaError, match=r"other\.parquet: column 'user' is string, but int64 in .*data\.parquet; write both"):
        make_plan((knob, write_more(tmp_path / "other.parquet", user=np.array(["a", "b"]))))
    with pytest.raises(DataError, match=rf"{re.escape(knob)}: .*none\.parquet: no such file"):
        make_plan((knob, str(tmp_path / "none.parquet")))


def test_memory_for_partitions_counts_the_largest_file_of_all(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    large = write_more(tmp_path / "large.parquet", 5000, 5000)
    assert make_plan(("data.valid", large)).memory.partitions == 50 * make_plan().memory.partitions


@pytest.mark.parametrize(("knob", "value"), [("trainer.patience", 2), ("trainer.evaluate_steps", 10)])
def test_evaluations_without_validation_data_are_refused(make_plan: Callable[..., Plan], knob: str, value: int) -> None:
    with pytest.raises(ConfigError, match=r"are about evaluations on data\.valid: give --data\.valid, or leave them out"):
        make_plan((knob, value))


def test_patience_without_checkpoints_is_refused(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    """The best one's rows would be gone."""
    knobs = (("data.valid", write_more(tmp_path / "valid.parquet")), ("trainer.patience", 2))
    none = (("checkpoint.every_s", 0), ("checkpoint.every_steps", 0))
    with pytest.raises(
        ConfigError, match=r"ends with the checkpoint of the best evaluation, but .* set one of them, or trainer\.pat"
    ):
        make_plan(*knobs, *none)
    assert make_plan(*knobs).valid
    assert make_plan(*knobs, *none, ("checkpoint.every_steps", 1000)).valid
    assert make_plan(knobs[0], *none, ("trainer.evaluate_steps", 5)).valid, "evaluations alone need none"


def test_negatives_are_left_out_in_training_alone(make_plan: Callable[..., Plan]) -> None:
    made = make_plan(("data.negative_rate", 0.25))
    assert (made.read_spec(training=True).negative_rate, made.read_spec(training=False).negative_rate) == (0.25, 1.0)
    assert made.read_spec(training=True).labelled


def test_all_labels_and_the_weights_of_samples_are_read(make_plan: Callable[..., Plan], data: Path, tmp_path: Path) -> None:
    write_more(data, ROWS, buy=np.array([0, 1, 1], np.int8), w=np.array([0.5, 1.0]))
    knobs = (("data.extra_labels", "buy"), ("data.sample_weight", "w"))
    made = make_plan(*knobs)
    assert (made.schema.labels, made.read_spec(training=True).read) == (("label", "buy"), ["label", "buy", "w", "x", "user"])
    assert made.read_spec(training=False).read == ["label", "buy", "x", "user"]  # an evaluation counts every sample once
    assert make_plan(*knobs, ("data.valid", write_more(tmp_path / "no_w.parquet", ROWS, buy=np.array([0, 1, 1], np.int8)))).valid
    with pytest.raises(SchemaError, match=r"valid\.parquet: no column 'buy', which .*data\.parquet has"):
        make_plan(*knobs, ("data.valid", write_more(tmp_path / "valid.parquet")))

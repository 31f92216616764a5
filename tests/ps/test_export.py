"""Rows → Parquet: what is written is read back, under any name a column can have, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps.ps.export import export_rows, file_name
from flowps.ps.shard import Shard
from tests.ps import drawn, naive

NAMES = [
    "user_id",
    "a/b",
    "../up",
    "50%",
    "%2F",
    "城市",
    "Größe ü",
    "with space",
    "..",
    ".hidden",
    "a.parquet",
    "C:\\x",
    "*?",
]


def trained_shard(slots: list[Any]) -> Shard:
    """A shard that has taken one step on a few signs of each slot."""
    shard = Shard(slots, [50] * len(slots), seed=3, max_in_flight=1)
    bags: drawn.Bags = [[[naive.mix(100 * s + i + 1) for i in range(3)], [2**64 - 1 - s]] for s in range(len(slots))]
    columns = np.cumsum([0, *(slot.dim for slot in slots)])
    out = np.empty((2, columns[-1]), np.float32)
    shard.lookup(0, *drawn.arrays(bags), 2, np.arange(len(slots)), columns[:-1], out, training=True)
    shard.push(0, out)
    return shard


def test_long_names_are_shortened_and_stay_apart(tmp_path: Path) -> None:
    """File systems take names of 255 bytes; percent-encoded, 29 Chinese characters are longer."""
    names = ["特征列名称非常长" * 5, "特征列名称非常长" * 5 + "的", "a" * 200, "a" * 201, "a" * 4000]
    files = {file_name(name) for name in names}
    assert len(files) == len(names)
    assert file_name("a" * 200) == "a" * 200 + ".parquet"
    assert export_rows(trained_shard([drawn.slot(name, dim=2) for name in names]).rows(), tmp_path) == dict.fromkeys(names, 4)
    assert {path.name for path in tmp_path.iterdir()} == files
    found = {pq.read_schema(path).metadata[b"flowps.slot"].decode() for path in tmp_path.iterdir()}
    assert found == set(names)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Signs as uint64, weights and state as vectors of the slot's dim; slot and pooling in the metadata."""
    slots = [
        drawn.slot("a", dim=5),
        drawn.slot("b", dim=5, pooling="mean"),
        drawn.slot("c", dim=16, optimizer="sgd"),
    ]
    shard = trained_shard(slots)
    expected = {rows.slot.name: rows for rows in shard.rows()}
    assert sum(export_rows(shard.rows(), tmp_path / "new" / "folder").values()) == 12
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "a.parquet",
        "b.parquet",
        "c.parquet",
    ]
    for slot in slots:
        table = pq.read_table(tmp_path / "new" / "folder" / f"{slot.name}.parquet")
        rows = expected[slot.name]
        assert table.column_names == ["sign", "weights", "state"]
        np.testing.assert_array_equal(table["sign"].to_numpy(), rows.signs)
        assert table["sign"].to_numpy().dtype == np.uint64
        assert 2**64 - 1 - slots.index(slot) in rows.signs.tolist()
        weights = np.array(table["weights"].to_pylist(), np.float32)
        np.testing.assert_array_equal(weights, rows.weights)
        assert weights.shape == (4, slot.dim)
        if slot.optimizer == "adagrad":
            np.testing.assert_array_equal(np.array(table["state"].to_pylist(), np.float32), rows.state)
            assert (rows.state > slot.initial_accumulator).any()
        else:
            assert table["state"].null_count == 4
        assert table.schema.metadata[b"flowps.slot"] == slot.name.encode()
        assert table.schema.metadata[b"flowps.pooling"] == slot.pooling.encode()


def test_any_name_stays_inside_the_folder(tmp_path: Path) -> None:
    """Slashes, dots, percent signs and letters of any script: one file per slot, none outside, each knows its name."""
    folder = tmp_path / "rows"
    shard = trained_shard([drawn.slot(name) for name in NAMES])
    export_rows(shard.rows(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    files = list(folder.iterdir())
    assert {path.suffix for path in files} == {".parquet"}
    assert {pq.read_schema(path).metadata[b"flowps.slot"].decode() for path in files} == set(NAMES)
    assert len(files) == len(NAMES)
    assert (folder / "user_id.parquet").exists()


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    """The folder may be there already."""
    first, second = trained_shard([drawn.slot("s", dim=4)]), trained_shard([drawn.slot("s", dim=8)])
    export_rows(first.rows(), tmp_path)
    export_rows(second.rows(), tmp_path)
    assert len(pq.read_table(tmp_path / "s.parquet")["weights"][0]) == 8
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failing_write_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of the second slot: its old file is untouched, the first is whole."""
    shard = trained_shard([drawn.slot("a", dim=4), drawn.slot("b", dim=6)])
    export_rows(shard.rows(), tmp_path)
    before = (tmp_path / "b.parquet").read_bytes()
    write_table = pq.ParquetWriter.write_table

    def fill_the_disk(writer: Any, table: Any, *args: Any, **kwargs: Any) -> None:
        write_table(writer, table, *args, **kwargs)
        if table.schema.metadata[b"flowps.slot"] == b"b":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        export_rows(shard.rows(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]
    assert (tmp_path / "b.parquet").read_bytes() == before
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 4


def test_slots_without_rows(tmp_path: Path) -> None:
    """Every slot has a file, so that readers need not guess; a slot of no rows an empty one."""
    slots = [drawn.slot("s", dim=8), drawn.slot("t", dim=4), drawn.slot("u", dim=8)]
    assert export_rows(Shard(slots, [5, 5, 5], 0, 1).rows(), tmp_path) == {slot.name: 0 for slot in slots}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.parquet", "t.parquet", "u.parquet"]
    assert pq.read_table(tmp_path / "u.parquet").num_rows == 0
    assert pq.read_schema(tmp_path / "t.parquet").field("weights").type == pa.list_(pa.float32(), 4)


def test_many_rows_are_copied_and_written_piece_by_piece(tmp_path: Path) -> None:
    """Neither the copy nor a reader has to hold all rows at once, and the pieces are the whole."""
    shard = trained_shard([drawn.slot("s"), drawn.slot("t")])
    whole = {rows.slot.name: rows for rows in shard.rows()}
    pieces = [rows for rows in shard.rows(chunk_rows=2) if rows.slot.name == "s"]
    assert [len(rows.signs) for rows in pieces] == [2, 2]
    np.testing.assert_array_equal(np.concatenate([rows.signs for rows in pieces]), whole["s"].signs)
    np.testing.assert_array_equal(np.concatenate([rows.weights for rows in pieces]), whole["s"].weights)
    export_rows(shard.rows(chunk_rows=2), tmp_path)
    with pq.ParquetFile(tmp_path / "s.parquet") as file:
        assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [2, 2]

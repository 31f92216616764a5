"""The rows that a run has left, made into a bundle's: sorted, put together, and refused where they do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from flowps.config import Slot
from flowps.errors import BundleError, RunDirError
from flowps.ps.export import export_rows, file_name
from flowps.ps.shard import SlotRows
from flowps.serving import pack as pack_module
from flowps.serving.pack import check_parts, files_of, pack

DIM = 3


def left(folder: Path, slot: str, signs: list[int], part: str = "", dim: int = DIM) -> dict[int, list[float]]:
    """What a run leaves of a slot's rows, in a file of its own; sign → weights."""
    rng = np.random.default_rng(len(signs))
    weights = rng.normal(0, 1, (len(signs), dim)).astype(np.float32)
    state = np.ones((len(signs), dim), np.float32)
    chunk = SlotRows(Slot(name=slot, dim=dim), np.array(signs, np.uint64), weights, state)
    export_rows([chunk], folder, {slot: part})
    return dict(zip(signs, weights.tolist(), strict=True))


@pytest.mark.parametrize("block_rows", [2, 1 << 16])
def test_rows_of_all_parts_are_sorted_and_all_there(tmp_path, monkeypatch, block_rows):
    monkeypatch.setattr(pack_module, "_BLOCK_ROWS", block_rows)
    expected = left(tmp_path / "in", "a slot/ü", [9, 2**64 - 1, 0], ".part-1-of-2")
    expected |= left(tmp_path / "in", "a slot/ü", [2**63, 5], ".part-2-of-2")
    left(tmp_path / "in", "other", [1])
    found = files_of(tmp_path / "in")
    assert {slot: len(paths) for slot, paths in found.items()} == {"a slot/ü": 2, "other": 1}
    check_parts(found)
    (tmp_path / "out").mkdir()
    packed = pack("a slot/ü", DIM, found["a slot/ü"], tmp_path / "out", "float32")
    assert (packed.file, packed.rows, packed.error.most) == (file_name("a slot/ü"), 5, 0)
    table = pq.read_table(tmp_path / "out" / packed.file)
    assert table.column("sign").to_pylist() == sorted(expected)
    assert dict(zip(*(table.column(name).to_pylist() for name in ("sign", "weights")), strict=True)) == expected
    assert table.schema.metadata[b"flowps.slot"].decode() == "a slot/ü"


def test_a_slot_without_rows_has_a_file_without_rows(tmp_path):
    left(tmp_path, "a", [])
    packed = pack("a", DIM, files_of(tmp_path)["a"], tmp_path, "int8")
    assert packed.rows == 0
    assert pq.read_table(tmp_path / packed.file).num_rows == 0


def test_a_part_that_lacks_is_refused(tmp_path):
    for part in (1, 3):
        left(tmp_path, "a", [part], f".part-{part}-of-3")
    with pytest.raises(RunDirError, match="slot 'a' was split into 3 files, but 2 are there"):
        check_parts(files_of(tmp_path))


def test_a_sign_in_two_files_is_refused(tmp_path):
    left(tmp_path, "a", [1, 2, 3])
    left(tmp_path, "a", [7, 2], ".part-2-of-2")
    with pytest.raises(RunDirError, match=r"slot 'a' has sign 2 more than once; are files of another run among them\?"):
        pack("a", DIM, files_of(tmp_path)["a"], tmp_path / "out", "float32")


def test_rows_of_another_dim_are_refused(tmp_path):
    left(tmp_path, "a", [1, 2], dim=4)
    with pytest.raises(RunDirError, match=r"a.parquet: weights are .*\[4\], but schema.json says dim 3"):
        pack("a", DIM, files_of(tmp_path)["a"], tmp_path / "out", "float32")


def test_files_of_something_else_are_refused(tmp_path):
    left(tmp_path, "a", [1])
    pq.write_table(pq.read_table(tmp_path / "a.parquet").replace_schema_metadata({}), tmp_path / "b.parquet")
    with pytest.raises(RunDirError, match=r"b.parquet: does not say which slot its rows are of"):
        files_of(tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    with pytest.raises(RunDirError, match=r"b.parquet: cannot be read"):
        files_of(tmp_path)


def test_a_weight_that_does_not_fit_names_the_slot(tmp_path):
    chunk = SlotRows(Slot(name="a", dim=1), np.array([1], np.uint64), np.array([[1e6]], np.float32), np.empty((1, 0), np.float32))
    export_rows([chunk], tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "out")
    with pytest.raises(BundleError, match="slot 'a': a weight is 1e\\+06, more than float16 holds"):
        pack("a", 1, files_of(tmp_path / "in")["a"], tmp_path / "out", "float16")

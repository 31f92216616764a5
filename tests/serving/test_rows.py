"""Rows found by sign: against a dict, over all of uint64; and files that are not as they should be."""

from __future__ import annotations

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.errors import BundleError
from flowps.serving.manifest import EMBEDDINGS
from flowps.serving.pack import write_rows
from flowps.serving.quantize import Error, quantize
from flowps.serving.rows import Rows, load_tables, read_slot
from tests.serving.samples import DIMS, ROWS, make_bundle

SIGN = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1]))


@settings(deadline=None)
@given(st.lists(SIGN, unique=True, max_size=30), st.lists(SIGN, max_size=30), st.sampled_from(["float32", "float16", "int8"]))
def test_rows_are_a_dict(known, others, dtype):
    signs = np.array(sorted(known), np.uint64)
    weights = np.arange(1, 1 + 3 * len(signs), dtype=np.float32).reshape(-1, 3)
    rows = Rows(signs, *quantize(weights, dtype))
    expected = dict(zip(signs.tolist(), weights, strict=True))
    asked = np.array([*others, *known, *known], np.uint64)
    found, unknown = rows.read(asked)
    assert (found.dtype, found.shape) == (np.float32, (len(asked), 3))
    assert unknown == sum(sign not in expected for sign in asked.tolist())
    naive = [expected.get(sign, np.zeros(3)) for sign in asked.tolist()]
    np.testing.assert_allclose(found, np.array(naive).reshape(-1, 3), rtol=0 if dtype == "float32" else 0.02)
    found[:] = 0  # a copy
    assert rows.read(signs)[0].all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_what_is_written_is_read_again(tmp_path, dtype):
    rng = np.random.default_rng(0)
    signs = np.unique(rng.integers(0, 2**64, 150_000, dtype=np.uint64))
    weights = rng.normal(0, 0.1, (len(signs), 3)).astype(np.float32)
    path, error = tmp_path / EMBEDDINGS / "user.parquet", Error()
    path.parent.mkdir()
    blocks = [(signs[at : at + 50_000], weights[at : at + 50_000]) for at in range(0, len(signs), 50_000)]
    write_rows(path, "user", 3, dtype, blocks, error)
    slot = make_bundle(tmp_path / "out").manifest.slots[0]
    slot = msgspec.structs.replace(slot, rows=len(signs), dtype=dtype, dim=3)
    rows = read_slot(tmp_path, slot)
    np.testing.assert_array_equal(rows.signs, signs)
    found, unknown = rows.read(signs[::-1])
    assert unknown == 0
    assert np.abs(found[::-1] - weights).max() == pytest.approx(error.most)
    assert rows.nbytes == len(signs) * (8 + 3 * rows.weights.itemsize + (4 if dtype == "int8" else 0))
    # As others read it.
    table = pq.read_table(path)
    item = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}[dtype]
    assert table.schema.field("weights").type == pa.list_(item, 3)
    assert table.column("slot").unique().to_pylist() == ["user"]
    assert table.column_names == ["sign", "slot", "weights", *(["scale"] if dtype == "int8" else [])]
    # Three numbers of one byte, a sign and a scale: dictionary and compression hold the numbers to their bytes.
    assert path.stat().st_size < len(signs) * {"float32": 22, "float16": 16, "int8": 17}[dtype]


def test_tables_have_all_slots(tmp_path):
    make_bundle(tmp_path / "out")
    tables = load_tables(tmp_path / "out", verify=True)
    assert set(tables.rows) == set(DIMS)
    assert tables.num_rows == sum(map(len, ROWS.values()))
    assert tables.nbytes == 4 * (8 + 8) + (8 + 12)
    for name, rows in ROWS.items():
        found, _ = tables.rows[name].read(np.array(list(rows), np.uint64))
        np.testing.assert_array_equal(found, np.array(list(rows.values()), np.float32))
    found, unknown = tables.rows["empty"].read(np.array([0, 1], np.uint64))
    np.testing.assert_array_equal(found, np.zeros((2, 4)))
    assert unknown == 2


class TestFilesThatDoNotFit:
    def test_signs_out_of_order_are_refused(self, tmp_path):
        version = make_bundle(tmp_path / "out")
        path = version.folder / EMBEDDINGS / "user.parquet"
        table = pq.read_table(path)
        for order in ([1, 0, 2, 3], [0, 0, 2, 3]):
            pq.write_table(table.take(order), path)
            with pytest.raises(BundleError, match=r"user.parquet: its signs are not in ascending order"):
                read_slot(version.folder, version.manifest.slots[0])

    @pytest.mark.parametrize("change", [{"rows": 5}, {"dim": 3}, {"dtype": "int8"}])
    def test_another_number_or_type_is_refused(self, tmp_path, change):
        version = make_bundle(tmp_path / "out")
        slot = msgspec.structs.replace(version.manifest.slots[0], **change)
        with pytest.raises(BundleError, match=r"user.parquet: 4 rows of fixed_size_list<.*float>\[2\], not . rows of .*; export"):
            read_slot(version.folder, slot)

    def test_a_changed_page_is_found_without_the_checksums_of_files(self, tmp_path):
        version = make_bundle(tmp_path / "out")
        path = version.folder / EMBEDDINGS / "user.parquet"
        whole = path.read_bytes()
        refused = 0
        for at in range(4, len(whole) - pq.read_metadata(path).serialized_size - 8, 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
            try:
                rows = read_slot(version.folder, version.manifest.slots[0])
            except BundleError:
                refused += 1
            else:
                assert rows.signs.tolist() == sorted(ROWS["user"])  # of what is not read, like the column `slot`
        assert refused > 5

    def test_what_is_no_parquet_is_refused(self, tmp_path):
        version = make_bundle(tmp_path / "out")
        path = version.folder / EMBEDDINGS / "city.parquet"
        path.write_bytes(b"PAR1 no")
        with pytest.raises(BundleError, match=r"city.parquet: cannot be read: .*; copy the bundle again, or export again"):
            read_slot(version.folder, version.manifest.slots[1])

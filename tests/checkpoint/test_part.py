"""Arrays → files → the same arrays, chunk by chunk, from any place; nothing half-written stays."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from flowps.checkpoint.file import FileEntry
from flowps.checkpoint.part import PartWriter, read_section, verify
from flowps.checkpoint.store import Store
from flowps.errors import CheckpointError
from tests.checkpoint.samples import Columns, columns, part

CHUNKS: dict[str, list[Columns]] = {
    "rows": [columns(5, 1), columns(0, 2), columns(1, 3)],
    "no rows": [columns(0)],
    "types": [
        {str(kind): np.array([0, 1, 100], kind) for kind in ("u1", "i1", "u2", "i4", "i8", "u8", "f2", "f4", "f8")},
    ],
    "wide": [{"x": np.arange(12, dtype=kind).reshape(3, 4)} for kind in (np.uint64,)],
    "extremes": [
        {
            "sign": np.array([0, 2**63, 2**64 - 1], np.uint64),
            "weight": np.array([[np.nan], [-np.inf], [-0.0]], np.float32),
        }
    ],
    "not contiguous": [{"a": np.arange(20)[::2], "b": np.arange(40, dtype=np.float32).reshape(4, 10).T}],
}


def assert_same(found: list[Columns], expected: list[Columns]) -> None:
    assert [list(chunk) for chunk in found] == [list(chunk) for chunk in expected]
    for there, here in zip(found, expected, strict=True):
        for name, values in here.items():
            assert there[name].dtype == values.dtype
            assert there[name].shape == values.shape
            assert there[name].tobytes() == values.tobytes()


@pytest.mark.parametrize("name", CHUNKS)
def test_what_is_written_is_read_back(store: Store, name: str) -> None:
    chunks = CHUNKS[name]
    with PartWriter(store, "step-1/shard-0") as writer:
        for chunk in chunks:
            writer.write("some rows", chunk)
        (entry,) = writer.close()
    assert entry.path == "step-1/shard-0/some rows.arrow"
    assert (entry.section, entry.rows) == ("some rows", sum(len(next(iter(chunk.values()))) for chunk in chunks))
    assert store.sizes("step-1") == {entry.path: entry.size_bytes}
    assert_same(list(read_section(store, entry)), chunks)


def test_sections_are_written_side_by_side_and_listed_in_their_order(store: Store) -> None:
    names = ["b", "a/b", "城市", "..", "a"]
    with PartWriter(store, "p") as writer:
        for seed in range(3):
            for name in names:
                writer.write(name, columns(4, seed))
        entries = writer.close()
    assert [entry.section for entry in entries] == names
    assert set(store.sizes("p")) == {entry.path for entry in entries}
    for entry in entries:
        assert entry.path.count("/") == 1
        assert_same(list(read_section(store, entry)), [columns(4, seed) for seed in range(3)])
    verify(store, entries)


def test_files_are_those_of_arrow(tmp_path: Path, local: Store) -> None:
    """Anybody can read them."""
    entry, _ = part(local, "p")
    with pa.ipc.open_file(tmp_path / "checkpoints" / entry.path) as file:
        table = file.read_all()
    np.testing.assert_array_equal(table["sign"].to_numpy(), columns()["sign"])
    assert table.schema.field("weights").type == pa.list_(pa.float32(), 4)


def test_contiguous_arrays_are_not_copied(local: Store) -> None:
    """What is written is the memory of the array: it could be a gigabyte."""
    values = np.zeros((1000, 50), np.float32)
    before = pa.total_allocated_bytes()
    with PartWriter(local, "p") as writer:
        writer.write("rows", {"weights": values})
        assert pa.total_allocated_bytes() - before < values.nbytes // 2
        writer.close()


def test_no_shard_no_section_no_file(local: Store) -> None:
    with PartWriter(local, "p") as writer:
        assert writer.close() == []
    verify(local, [])


def test_arrays_that_do_not_fit_are_bugs(local: Store) -> None:
    with PartWriter(local, "p") as writer:
        with pytest.raises(AssertionError, match="bool is no type of a section"):
            writer.write("rows", {"a": np.zeros(3, bool)})
        with pytest.raises(ValueError, match="not all the same length"):
            writer.write("rows", {"a": np.zeros(3), "b": np.zeros(4)})
        writer.write("rows", {"a": np.zeros(3)})
        with pytest.raises(pa.ArrowInvalid, match="schema"):
            writer.write("rows", {"a": np.zeros(3, np.float32)})
    assert local.sizes("p") == {}


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["abort", "error", "nothing"])
def test_what_is_not_closed_leaves_nothing(store: Store, end: str) -> None:
    def write() -> None:
        with PartWriter(store, "p") as writer:
            writer.write("a", columns(1000))
            writer.write("b", columns())
            if end == "abort":
                writer.abort()
                writer.abort()
                assert writer.close() == []
            elif end == "error":
                raise KeyError

    if end == "error":
        with pytest.raises(KeyError):
            write()
    else:
        write()
    assert store.sizes("p") == {}


def test_what_is_closed_stays(local: Store) -> None:
    with PartWriter(local, "p") as writer:
        writer.write("a", columns())
        entries = writer.close()
        writer.abort()
    verify(local, entries)


def test_a_full_disk_leaves_nothing_of_the_part(small_disk: Path) -> None:
    store = Store(str(small_disk))

    def write() -> None:
        with PartWriter(store, "p") as writer:
            for _ in range(3):
                writer.write("a", {"weights": np.ones((100_000, 1), np.float32)})

    with pytest.raises(CheckpointError, match=r"/p/a\.arrow: cannot be written: No space left on device"):
        write()
    assert store.sizes("p") == {}


def test_a_disk_that_is_full_in_the_end_leaves_nothing_unfinished(small_disk: Path) -> None:
    """The last of a file is written when it is closed."""
    store = Store(str(small_disk))
    with PartWriter(store, "p") as writer:
        writer.write("a", columns())
        room = os.statvfs(small_disk)
        with open(small_disk / "filler", "wb") as filler:
            filler.write(b"x" * (room.f_bavail * room.f_frsize))
        # What is left of the section's last page takes some footers, not this one.
        for i in range(200):
            try:
                writer.write("a", columns(0, i))
            except CheckpointError:
                break
        with pytest.raises(CheckpointError, match=r"/p/a\.arrow: cannot be written: No space left on device"):
            writer.close()
    assert store.sizes("p") == {}


def test_an_error_on_closing_one_file_leaves_no_other_unfinished(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if target.name == "b.arrow":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with PartWriter(local, "p") as writer:
        for section in "abc":
            writer.write(section, columns())
        with pytest.raises(CheckpointError, match=r"/p/b\.arrow: cannot be written: Input/output error"):
            writer.close()
    assert list(local.sizes("p")) == ["p/a.arrow"]


def test_parts_are_written_by_several_threads_at_once(store: Store, hurried_switching: None) -> None:
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(lambda i: part(store, f"step/shard-{i}", 1000, i), range(8)))
    for i, (rows, _) in enumerate(entries):
        assert_same(list(read_section(store, rows)), [columns(1000, i)])


def test_a_section_with_other_content_than_its_checksum_is_refused(local: Store) -> None:
    rows, _ = part(local, "p")
    good = local.read(rows.path)
    local.put(rows.path, good.replace(columns()["sign"].tobytes(), bytes(40)))
    with pytest.raises(CheckpointError, match=r"/p/rows\.arrow: is damaged: its checksum is \w{32}, expected \w{32}; use another"):
        list(read_section(local, rows))


def as_section(store: Store, content: bytes, rows: int = 5) -> FileEntry:
    return msgspec.structs.replace(store.put("f", content), section="rows", rows=rows)


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"not of Arrow at all, but long enough", bytes(1000), b"\xff" * 1000])
def test_a_foreign_file_with_a_good_checksum_is_refused(memory: Store, content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"/f: (is no section of a checkpoint: .*; use another checkpoint|0 rows found)"):
        list(read_section(memory, as_section(memory, content)))


def test_an_arrow_file_of_another_make_is_refused(memory: Store) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema({"text": pa.string()})) as writer:
        writer.write_batch(pa.record_batch({"text": ["a", None]}))
    with pytest.raises(CheckpointError, match="/f: is no section of a checkpoint"):
        list(read_section(memory, as_section(memory, sink.getvalue().to_pybytes())))


def test_another_number_of_rows_is_refused(memory: Store) -> None:
    rows, _ = part(memory, "p")
    with pytest.raises(CheckpointError, match=r"/p/rows\.arrow: 5 rows found, expected 6; use another checkpoint"):
        list(read_section(memory, msgspec.structs.replace(rows, rows=6)))


def test_chunks_that_are_kept_are_not_overwritten(local: Store) -> None:
    """Memory is used again, but only when nothing looks into it, be it a slice of a column."""
    drawn = np.random.default_rng(0)
    chunks = [drawn.random((40_000 + 1000 * (i % 3), 16), np.float32) for i in range(12)]
    with PartWriter(local, "p") as writer:
        for chunk in chunks:
            writer.write("a", {"signs": np.arange(len(chunk), dtype=np.uint64), "weights": chunk})
        (entry,) = writer.close()
    kept = {}
    for i, found in enumerate(read_section(local, entry)):
        np.testing.assert_array_equal(found["weights"], chunks[i])
        if i % 2:
            kept[i] = found["weights"][10:20, 3].view(np.uint32) if i % 4 == 1 else memoryview(found["weights"])
        del found
    for i, part_of in kept.items():
        expected = chunks[i][10:20, 3].view(np.uint32) if i % 4 == 1 else chunks[i]
        np.testing.assert_array_equal(np.asarray(part_of), expected)


def test_an_error_of_the_reader_is_no_error_of_the_file(local: Store) -> None:
    rows, _ = part(local, "p")
    with pytest.raises(KeyError, match="none"):
        [chunk["none"] for chunk in read_section(local, rows)]


def test_a_reader_that_stops_early_leaves_no_file_open(local: Store) -> None:
    with PartWriter(local, "p") as writer:
        for _ in range(3):
            writer.write("a", columns())
        (entry,) = writer.close()
    before = os.listdir("/proc/self/fd")
    chunks = read_section(local, entry)
    next(chunks)
    del chunks
    assert os.listdir("/proc/self/fd") == before


# --- verify -----------------------------------------------------------------------------------------------------------


def test_every_fault_is_found_and_the_first_is_named(store: Store) -> None:
    entries: list[Any] = [entry for i in range(3) for entry in part(store, f"p/{i}")]
    verify(store, entries, threads=4)
    good = store.read(entries[5].path)
    store.put(entries[5].path, good[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"/p/2/admission\.arrow: is damaged"):
        verify(store, entries)
    store.put(entries[3].path, store.read(entries[3].path)[:-1])
    with pytest.raises(
        CheckpointError, match=r"/p/1/admission\.arrow: is truncated: found [\d,]+ bytes, expected [\d,]+; use another"
    ):
        verify(store, entries)
    store.remove(entries[2].path)
    with pytest.raises(CheckpointError, match=r"/p/1/rows\.arrow: is missing; bring it back, or use another checkpoint"):
        verify(store, entries)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flowps-verify")]

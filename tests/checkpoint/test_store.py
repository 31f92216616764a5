"""The store: what is written is read back from any place, whole or not at all; every refusal names the file and helps."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash

from flowps.checkpoint.store import Store
from flowps.errors import CheckpointError


def content(size_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size_bytes)


@pytest.mark.parametrize("size_bytes", [0, 1, 3 << 20, (6 << 20) + 1])
def test_what_is_written_is_read_back(store: Store, size_bytes: int) -> None:
    entry = store.put("a/b/城市 1.bin", content(size_bytes))
    assert (entry.path, entry.size_bytes) == ("a/b/城市 1.bin", size_bytes)
    assert entry.checksum == xxhash.xxh3_128_hexdigest(content(size_bytes))
    assert store.get(entry) == store.read(entry.path) == content(size_bytes)
    assert store.sizes("a") == {entry.path: size_bytes}
    assert store.folders() == ["a"]


def test_a_file_is_written_piece_by_piece(store: Store) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    with store.write("f") as sink:
        for data in (b"a", bytearray(b"bc"), memoryview(b""), values, np.empty((0, 4))):
            assert sink.write(data) == memoryview(data).nbytes
    assert store.get(sink.entry()) == b"abc" + values.tobytes()


def test_a_file_replaces_one_of_its_name(store: Store) -> None:
    store.put("f", b"before")
    assert store.get(store.put("f", b"now")) == b"now"


def test_a_block_that_fails_leaves_nothing(store: Store) -> None:
    def write() -> None:
        with store.write("a/f") as sink:
            sink.write(content(6 << 20))
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert store.sizes("a") == {}
    assert not store.exists("a/f")


def test_folders_and_files_are_deleted_and_need_not_be_there(store: Store) -> None:
    for path in ("a/1", "a/b/2", "c/3"):
        store.put(path, b"x")
    store.remove("a/1")
    assert not store.exists("a/1")
    assert store.exists("a/b/2")
    store.delete("a")
    assert store.folders() == ["c"]
    store.delete("a")
    store.remove("a/1")
    store.remove("none/f")
    assert store.sizes("a") == {}


def test_a_store_that_is_not_there_is_empty(store: Store) -> None:
    absent = Store(f"{store.url}/absent")
    assert absent.folders() == []
    assert not absent.exists("f")
    assert absent.read("f") is None


def test_a_store_crosses_processes(store: Store) -> None:
    entry = store.put("f", b"x")
    assert pickle.loads(pickle.dumps(store)).get(entry) == b"x"


def test_one_sees_what_another_writes(store: Store) -> None:
    other = Store(store.url)
    assert other.folders() == []
    entry = store.put("a/f", b"x")
    assert other.folders() == ["a"]
    assert other.get(entry) == b"x"
    store.delete("a")
    assert not other.exists("a/f")
    other.delete("a")


def test_threads_write_and_read_different_files_at_once(store: Store, hurried_switching: None) -> None:
    def write_and_read(i: int) -> bool:
        return store.get(store.put(f"same/folder/{i}", content(100_000 + i, i))) == content(100_000 + i, i)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, range(24)))
    assert len(store.sizes("same")) == 24


def test_threads_read_one_file_at_once(store: Store, hurried_switching: None) -> None:
    entry = store.put("f", content(3 << 20))
    with ThreadPoolExecutor(4) as pool:
        assert all(found == content(3 << 20) for found in pool.map(store.get, [entry] * 8))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(store: Store) -> None:
    entry = store.put("a/f", b"x")
    store.delete("a")
    with pytest.raises(CheckpointError, match=r"/a/f: is missing; bring it back, or use another checkpoint$"):
        store.get(entry)


@pytest.mark.parametrize(
    ("now", "complaint"),
    [(b"abc", "is truncated: found 3 bytes, expected 4"), (b"abcde", "is too long: found 5 bytes, expected 4")],
)
def test_a_file_of_another_size_is_refused(store: Store, now: bytes, complaint: str) -> None:
    entry = store.put("a/f", b"abcd")
    store.put("a/f", now)
    with pytest.raises(CheckpointError, match=f"/a/f: {complaint}; use another checkpoint$"):
        store.get(entry)


def test_a_file_of_other_content_is_refused(store: Store) -> None:
    entry = store.put("a/f", b"abcd")
    now = store.put("a/f", b"abce")
    with pytest.raises(CheckpointError, match=f"/a/f: is damaged: its checksum is {now.checksum}, expected {entry.checksum}; use "):
        store.get(entry)


def test_a_file_that_is_cut_short_while_it_is_read_is_refused(local: Store) -> None:
    entry = local.put("f", content(4 << 20))
    with local.open(entry) as source:
        source.read(1 << 20)
        os.truncate(local.shown("f"), 2 << 20)
        with pytest.raises(CheckpointError, match="/f: is truncated: found 2,097,152 bytes, expected 4,194,304"):
            source.finish()


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../f", "a/../../f"])
def test_no_path_leads_out_of_the_store(store: Store, path: str) -> None:
    entry = msgspec.structs.replace(store.put("f", b"x"), path=path)
    for use in (lambda: store.get(entry), lambda: store.put(path, b"x"), lambda: store.delete(path)):
        with pytest.raises(CheckpointError, match="is no path of a file in it; use another checkpoint"):
            use()


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match="place for checkpoints 'nowhere://x': cannot be used: ValueError: Protocol not known"
    ):
        Store("nowhere://x")


def test_a_bucket_that_is_not_there_is_refused_before_training(s3: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"s3://nobucket/x/trial-\d+: cannot be written: .*bucket does not exist; it has gone"
    ):
        Store("s3://nobucket/x").prepare()


def test_a_file_in_the_way_is_refused(tmp_path: Path, local: Store) -> None:
    local.put("f", b"x")
    with pytest.raises(CheckpointError, match=r"/f/g: cannot be written: (Not a directory|File exists)"):
        local.put("f/g", b"x")
    with pytest.raises(CheckpointError, match=r"cannot be written: (Not a directory|File exists)"):
        Store(local.shown("f")).prepare()
    (tmp_path / "checkpoints" / "folder").mkdir()
    with pytest.raises(CheckpointError, match="/folder: cannot be written: Is a directory; a folder is in its place"):
        local.put("folder", b"x")
    with pytest.raises(CheckpointError, match="/folder: cannot be read: "):
        local.read("folder")
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["f", "folder"]


def test_a_full_disk_is_said_and_leaves_what_was_there(small_disk: Path) -> None:
    store = Store(str(small_disk / "checkpoints"))
    store.prepare()
    entry = store.put("a/small", content(1000))
    complaint = "/a/large: cannot be written: No space left on device; free space there, or have checkpoints written elsewhere"
    with pytest.raises(CheckpointError, match=complaint):
        store.put("a/large", content(2 << 20))
    assert store.sizes("a") == {entry.path: 1000}
    assert store.get(entry) == content(1000)
    assert len(store.get(store.put("a/fits", content(500_000)))) == 500_000


def test_a_file_with_a_hole_is_not_finished_when_there_is_room_again(small_disk: Path) -> None:
    store = Store(str(small_disk))
    sink = store.create("a/f")
    with pytest.raises(CheckpointError, match="No space left on device"):
        sink.write(content(2 << 20))
    os.truncate(small_disk / "a" / "f.unfinished", 0)
    with pytest.raises(CheckpointError, match="/a/f: cannot be written: No space left on device"):
        sink.write(b"x")
    with pytest.raises(CheckpointError, match="/a/f: cannot be written: No space left on device"):
        sink.commit()
    assert store.sizes("a") == {}


@pytest.fixture
def read_only(small_disk: Path) -> Iterator[Path]:
    """A disk that cannot be written, with a store and a file `a/f` of one byte in it."""
    store = Store(str(small_disk / "checkpoints"))
    store.prepare()
    store.put("a/f", b"x")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    yield small_disk / "checkpoints"
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)


def test_a_disk_that_cannot_be_written_is_said(read_only: Path) -> None:
    store = Store(str(read_only))
    advice = "Read-only file system; give this user the right to it, or choose another place for checkpoints"
    with pytest.raises(CheckpointError, match=rf"/trial-\d+: cannot be written: {advice}"):
        store.prepare()
    with pytest.raises(CheckpointError, match=f"cannot be written: {advice}"):
        Store(f"{read_only}/new").prepare()
    with pytest.raises(CheckpointError, match=f"/a/f: cannot be deleted: {advice}"):
        store.remove("a/f")
    with pytest.raises(CheckpointError, match=f"/a: cannot be deleted: {advice}"):
        store.delete("a")
    assert store.read("a/f") == b"x"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EDQUOT, errno.EIO])
def test_what_the_system_refuses_is_said_in_its_words(local: Store, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fsync(file: int) -> None:
        raise OSError(number, os.strerror(number))

    local.put("a/f", b"x")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=f"/a/g: cannot be written: {os.strerror(number)}; ") as refusal:
        local.put("a/g", b"x")
    assert refusal.value.__cause__ is not None
    assert list(local.sizes("a")) == ["a/f"]


def test_a_file_whose_name_may_not_last_is_not_left(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in its place already when the folder cannot be brought to the disk."""

    def sync_folder(folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    local.put("a/f", b"x")
    monkeypatch.setattr("flowps.checkpoint.sink.sync_folder", sync_folder)
    with pytest.raises(CheckpointError, match="/a/g: cannot be written: Input/output error; the disk may be failing"):
        local.put("a/g", b"x")
    assert list(local.sizes("a")) == ["a/f"]


def test_file_systems_that_need_no_bringing_to_the_disk_are_used(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def not_of_folders(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(file)

    monkeypatch.setattr(os, "fsync", not_of_folders)
    assert local.get(local.put("a/f", b"x")) == b"x"


def test_a_folder_that_vanishes_while_a_file_is_written_is_said(tmp_path: Path, local: Store) -> None:
    sink = local.create("a/f")
    sink.write(b"x")
    shutil.rmtree(tmp_path / "checkpoints")
    gone = r"/a/f: cannot be written: No such file or directory; it has gone: was it deleted, or a disk unmounted\?"
    with pytest.raises(CheckpointError, match=gone):
        sink.commit()
    # Nor is it made again where a disk may have been.
    with pytest.raises(CheckpointError, match=gone):
        local.put("a/f", b"x")
    assert os.listdir(tmp_path) == []
    local.prepare()
    local.put("a/f", b"x")


def test_without_the_right_to_look_nothing_is_taken_for_missing(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def info(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(local._fs, "info", info)
    with pytest.raises(CheckpointError, match="/a: cannot be looked up: Permission denied; give this user the right to it"):
        local.exists("a")

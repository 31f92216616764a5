"""Manifests: what is published is found, newest first; chains of deltas; what is no checkpoint is said to be none, and why."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from flowps.checkpoint import manifest as module
from flowps.checkpoint.manifest import Manifest, best, chain, check, found, load, newest_valid, publish
from flowps.checkpoint.store import Store
from flowps.errors import CheckpointError
from flowps.version import __version__
from tests.checkpoint.samples import checkpoint, manifest, named, part, unfinished


def silent(text: str) -> None:
    raise AssertionError(text)


def rewrite(store: Store, made: Manifest, **changes: object) -> None:
    """As flowps would write it, with a good checksum."""
    content = msgspec.to_builtins(made) | changes
    store.put(f"{made.name}/manifest.json", module._frame(msgspec.json.encode(content)))


def test_what_is_published_is_found_as_it_was(store: Store) -> None:
    made = [checkpoint(store, step) for step in (100, 200)]
    assert [folder.manifest for folder in found(store)] == made[::-1]
    assert load(store, named(100)) == made[0]
    assert made[0].flowps == __version__
    assert newest_valid(store, silent) == made[1]
    assert check(store, made[1]) == [made[1]]


def test_manifests_are_json_that_people_can_read(memory: Store) -> None:
    checkpoint(memory, 1)
    text = memory.read(f"{named(1)}/manifest.json")
    assert msgspec.json.decode(text)["manifest"]["shards"][0]["pieces"] == [["城市", 0, 2]]
    assert len(text.splitlines()) > 20


def test_the_newest_is_first_by_step_then_by_time(memory: Store) -> None:
    for name, step, created in [("a", 2, 5.0), ("b", 10, 1.0), ("c", 2, 9.0)]:
        checkpoint(memory, step, name=name, created=created)
    unfinished(memory, 7)
    assert [folder.name for folder in found(memory)] == ["b", named(7), "c", "a"]


def test_a_store_without_checkpoints(store: Store) -> None:
    assert found(store) == []
    with pytest.raises(CheckpointError, match=r"there is no checkpoint$"):
        newest_valid(store, silent)
    with pytest.raises(
        CheckpointError, match=rf"/{named(1)}/manifest\.json: is missing, so {named(1)} is no checkpoint, or an unfin"
    ):
        load(store, named(1))


def test_a_crash_between_part_and_manifest_leaves_the_one_before(store: Store) -> None:
    before = checkpoint(store, 1)
    name = unfinished(store, 2)
    folder = found(store)[0]
    assert (folder.name, folder.manifest, folder.unfinished) == (name, None, True)
    said: list[str] = []
    assert newest_valid(store, said.append) == before
    assert said == [f"checkpoint {name} is passed over: {store.url}/{name}: is unfinished: it has no manifest.json"]


def test_a_process_that_is_killed_while_it_publishes_leaves_the_one_before(tmp_path: Path, local: Store) -> None:
    """In the middle of the manifest: it stands beside its place, where nobody looks."""
    before = checkpoint(local, 1)
    killed = """
import os, sys
from flowps.checkpoint.store import Store
os.fsync = lambda file: os._exit(9)
from tests.checkpoint.samples import manifest
from flowps.checkpoint.manifest import publish
store = Store(sys.argv[1])
publish(store, manifest(sys.argv[2], 2))
"""
    (tmp_path / "checkpoints" / named(2)).mkdir()
    assert subprocess.run([sys.executable, "-c", killed, local.url, named(2)], check=False).returncode == 9
    assert list(local.sizes(named(2))) == [f"{named(2)}/manifest.json.unfinished"]
    said: list[str] = []
    assert newest_valid(local, said.append) == before
    assert "is unfinished" in said[0]


def test_all_that_are_no_good_are_told_and_none_is_taken(memory: Store) -> None:
    for step in (1, 2):
        checkpoint(memory, step)
        memory.remove(f"{named(step)}/dense.weights")
    unfinished(memory, 3)
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"none of 3 folders is a whole checkpoint$"):
        newest_valid(memory, said.append)
    assert [remark.split()[1] for remark in said] == [named(3), named(2), named(1)]
    assert f"{memory.url}/{named(2)}/dense.weights: is missing" in said[1]


# --- what is not published --------------------------------------------------------------------------------------------


def test_a_manifest_is_not_replaced(store: Store) -> None:
    made = checkpoint(store, 1)
    with pytest.raises(CheckpointError, match=r"manifest\.json: is there already; write the checkpoint under another name"):
        publish(store, msgspec.structs.replace(made, seconds=9))
    assert load(store, named(1)) == made


@pytest.mark.parametrize("fault", ["missing", "truncated", "folder"])
def test_nothing_is_published_without_its_files(memory: Store, fault: str) -> None:
    entries = part(memory, f"{named(1)}/shard-0")
    if fault == "missing":
        memory.remove(entries[1].path)
    elif fault == "truncated":
        memory.put(entries[1].path, b"x")
    else:
        memory.delete(named(1))
    with pytest.raises(
        CheckpointError, match=r"\.arrow: (is missing, so there is no checkpoint .*; write it again|is truncated: found 1 )"
    ):
        publish(memory, manifest(named(1), 1, [entries]))
    assert not memory.exists(f"{named(1)}/manifest.json")


def test_nothing_is_published_without_its_base(store: Store) -> None:
    with pytest.raises(
        CheckpointError, match=f"/{named(2)}: needs {named(1)}, which cannot be had: .*/{named(1)}/manifest.json: is mis"
    ):
        publish(store, manifest(named(2), 2, [part(store, f"{named(2)}/shard-0")], base=named(1)))
    assert not store.exists(f"{named(2)}/manifest.json")


def test_a_manifest_that_cannot_be_written_is_none(small_disk: Path) -> None:
    store = Store(str(small_disk))
    entries = part(store, f"{named(1)}/shard-0")
    with pytest.raises(CheckpointError, match=r"/manifest\.json: cannot be written: No space left on device"):
        publish(store, manifest(named(1), 1, [entries], schema={"much": "x" * (1 << 20)}))
    assert [folder.unfinished for folder in found(store)] == [True]
    assert set(store.sizes(named(1))) == {entry.path for entry in entries}


# --- what is no checkpoint --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 2, 77])
def test_another_format_is_refused_with_the_version_that_reads_it(memory: Store, number: int) -> None:
    rewrite(memory, checkpoint(memory, 1), format=number, flowps="9.9", shards="whatever it may be")
    complaint = (
        f"manifest.json: has format {number}, of flowps 9.9; this is flowps {__version__}, which reads format 1: "
        "use that version, or another checkpoint"
    )
    assert complaint in found(memory)[0].reason
    with pytest.raises(CheckpointError, match="has format"):
        load(memory, named(1))


@pytest.mark.parametrize(
    ("changes", "complaint"), [({"step": "x"}, "Expected `int`, got `str`"), ({"format": None}, "Expected `int`, got `null`")]
)
def test_a_manifest_of_other_content_is_refused(memory: Store, changes: dict[str, object], complaint: str) -> None:
    rewrite(memory, checkpoint(memory, 1), **changes)
    assert f"/{named(1)}/manifest.json: is no manifest of a checkpoint: {complaint}" in found(memory)[0].reason


def test_a_folder_under_another_name_is_refused(memory: Store) -> None:
    checkpoint(memory, 1)
    for path in memory.sizes(named(1)):
        memory.put(path.replace(named(1), "copy"), memory.read(path))
    assert [folder.name for folder in found(memory) if folder.manifest] == [named(1)]
    with pytest.raises(
        CheckpointError, match=rf"/copy/manifest\.json: is that of {named(1)}; give the folder that name, or use another"
    ):
        load(memory, "copy")


def test_a_manifest_that_leads_out_of_the_store_is_passed_over(tmp_path: Path, local: Store) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    made = checkpoint(local, 1)
    entry = msgspec.structs.replace(local.put("f", b"x"), path="../secret")
    rewrite(local, msgspec.structs.replace(made, trainer=[entry]))
    with pytest.raises(CheckpointError, match=r"'\.\./secret' is no path of a file in it"):
        check(local, load(local, named(1)))


def test_a_manifest_that_cannot_be_read_is_no_unfinished_one(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(local, 1)

    def cat_file(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(local._fs, "cat_file", cat_file)
    (folder,) = found(local)
    assert folder.reason.endswith(
        "manifest.json: cannot be read: Input/output error; the disk may be failing; choose another place for checkpoints"
    )
    assert not folder.unfinished


# --- chains -----------------------------------------------------------------------------------------------------------


def chained(store: Store) -> list[Manifest]:
    """A full one, and two deltas."""
    return [checkpoint(store, step, base=named(step - 1) if step > 1 else "") for step in (1, 2, 3)]


def test_a_chain_goes_from_the_full_one_to_the_last(store: Store) -> None:
    made = chained(store)
    assert chain(store, made[2]) == check(store, made[2]) == made
    assert chain(store, made[0]) == made[:1]


@pytest.mark.parametrize("link", [1, 2])
def test_a_chain_with_a_missing_link_is_refused(memory: Store, link: int) -> None:
    made = chained(memory)
    memory.remove(f"{named(link)}/manifest.json")
    needed = f"/{named(link + 1)}: needs {named(link)}, which cannot be had: .*/{named(link)}/manifest.json: is missing"
    with pytest.raises(CheckpointError, match=needed):
        chain(memory, made[2])
    if link == 2:
        said: list[str] = []
        assert newest_valid(memory, said.append) == made[0]
        assert len(said) == 2


def test_a_chain_with_a_damaged_file_in_its_base_is_passed_over(memory: Store) -> None:
    older = checkpoint(memory, 0)
    chained(memory)
    memory.put(f"{named(1)}/dense.weights", b"DENSE WEIGHTS")
    said: list[str] = []
    assert newest_valid(memory, said.append) == older
    for step, remark in zip((3, 2, 1), said, strict=True):
        assert f"checkpoint {named(step)} is passed over: {memory.url}/{named(1)}/dense.weights: is damaged" in remark


def test_a_chain_that_needs_itself_is_refused(memory: Store) -> None:
    made = chained(memory)
    rewrite(memory, made[0], base=named(3))
    with pytest.raises(CheckpointError, match=f"/{named(3)}: needs itself, by way of {named(3)}; use another checkpoint"):
        chain(memory, made[2])


# --- the best evaluation ----------------------------------------------------------------------------------------------


def test_the_checkpoint_of_the_best_evaluation_is_found_by_its_step(store: Store) -> None:
    made = {step: checkpoint(store, step, is_best=step == 2) for step in (1, 2, 3)}
    assert best(store, 2) == made[2] == load(store, named(2))
    assert (load(store, named(2)).is_best, load(store, named(3)).is_best) == (True, False)
    assert best(store, 3) is None, "a checkpoint after that step, but not of its evaluation"
    assert [best(store, step) for step in (1, 7)] == [None, None]


def test_of_several_the_newest_counts(memory: Store) -> None:
    """A run that went back came by that step again; and a cut may have come before the evaluation."""
    for name, created, is_best in [("a", 1.0, True), ("b", 9.0, False), ("c", 5.0, True), ("d", 3.0, True)]:
        checkpoint(memory, 4, name=name, created=created, is_best=is_best)
    found_best = best(memory, 4)
    assert found_best is not None
    assert found_best.name == "c"


def test_a_manifest_from_before_there_were_evaluations_is_of_none(memory: Store) -> None:
    made = checkpoint(memory, 1)
    content = msgspec.to_builtins(made)
    del content["is_best"]
    memory.put(f"{made.name}/manifest.json", module._frame(msgspec.json.encode(content)))
    assert load(memory, named(1)) == made
    assert best(memory, 1) is None


def test_damaged_and_unfinished_folders_are_no_best_ones(memory: Store) -> None:
    checkpoint(memory, 3, is_best=True)
    memory.put(f"{named(3)}/manifest.json", b"damaged")
    unfinished(memory, 4)
    assert best(memory, 3) is None
    assert best(memory, 4) is None

"""Pruning: what goes, what stays, and that no manifest is left that needs what has gone, wherever it is interrupted."""

from __future__ import annotations

import uuid
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.checkpoint import manifest as module
from flowps.checkpoint.manifest import check, found, load, newest_valid, prune
from flowps.checkpoint.store import Store
from flowps.errors import CheckpointError
from tests.checkpoint.samples import checkpoint, manifest, named, part, unfinished


def fill(store: Store, bases: dict[int, int]) -> None:
    """Step → step of its base, 0 for a full one."""
    for step, base in bases.items():
        checkpoint(store, step, base=named(base) if base else "")


def steps(store: Store) -> list[int]:
    return [folder.manifest.step for folder in found(store) if folder.manifest]


FULL = dict.fromkeys(range(1, 6), 0)
CHAINS = {1: 0, 2: 1, 3: 2, 4: 0, 5: 4, 6: 5}


@pytest.mark.parametrize(
    ("bases", "keep", "in_use", "left"),
    [
        (FULL, 2, [], [5, 4]),
        (FULL, 9, [], [5, 4, 3, 2, 1]),
        (FULL, 1, [2], [5, 2]),
        (CHAINS, 1, [], [6, 5, 4]),
        (CHAINS, 3, [], [6, 5, 4]),
        (CHAINS, 4, [], [6, 5, 4, 3, 2, 1]),
        (CHAINS, 1, [2], [6, 5, 4, 2, 1]),
        ({1: 0, 2: 1, 3: 0}, 1, [], [3]),
    ],
)
def test_the_newest_stay_with_what_they_need(
    memory: Store, bases: dict[int, int], keep: int, in_use: list[int], left: list[int]
) -> None:
    fill(memory, bases)
    gone = sorted(set(bases) - set(left), reverse=True)
    assert prune(memory, keep, [named(step) for step in in_use]) == [named(step) for step in gone]
    assert steps(memory) == left
    assert memory.folders() == sorted(named(step) for step in left)
    for step in left:
        check(memory, load(memory, named(step)))
    assert prune(memory, keep, [named(step) for step in in_use]) == []


def test_pruning_is_the_same_in_every_place(store: Store) -> None:
    fill(store, {1: 0, 2: 0, 3: 2})
    assert prune(store, 1) == [named(1)]
    assert store.folders() == [named(2), named(3)]
    check(store, load(store, named(3)))


def test_unfinished_folders_go_when_a_newer_checkpoint_is_there(memory: Store) -> None:
    unfinished(memory, 1)
    assert prune(memory, 1) == []
    fill(memory, {2: 0})
    for step in (2, 3):
        part(memory, f"{named(step)}-b7/shard-0")
    memory.put("notes/by hand", b"x")
    memory.put("a file", b"x")
    unfinished(memory, 0)
    assert prune(memory, 1, [named(0)]) == [f"{named(2)}-b7", named(1)]
    assert memory.folders() == ["notes", named(0), named(2), f"{named(3)}-b7"]
    memory.remove("a file")


def test_a_broken_chain_does_not_count_as_kept(memory: Store) -> None:
    """Else the last that can be restored would go."""
    fill(memory, {1: 0, 2: 0, 3: 2, 4: 3})
    memory.remove(f"{named(3)}/manifest.json")
    assert prune(memory, 2) == [named(4)]
    assert steps(memory) == [2, 1]
    assert prune(memory, 1) == [named(1)]
    fill(memory, {5: 0})
    assert prune(memory, 1) == [named(2), named(3)]


@pytest.mark.parametrize("content", [b"damaged", None])
def test_what_cannot_be_read_stays_and_so_does_what_needs_it(memory: Store, content: bytes | None) -> None:
    """It may be of another version, or the disk may be there again tomorrow."""
    fill(memory, {1: 0, 2: 1, 3: 0, 4: 0})
    path = f"{named(1)}/manifest.json"
    other = msgspec.json.encode(msgspec.to_builtins(manifest(named(1), 1)) | {"format": 99})
    memory.put(path, content or module._frame(other))
    assert prune(memory, 1) == [named(3)]
    assert memory.folders() == [named(1), named(2), named(4)]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_wherever_it_is_interrupted_what_is_left_can_be_restored(data: st.DataObject) -> None:
    """Any chains, any crash between two calls of the store: every manifest left has its chain, and the kept ones are there."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    count = data.draw(st.integers(1, 7))
    bases = {step: data.draw(st.integers(0, step - 1)) for step in range(1, count + 1)}
    fill(store, bases)
    keep, calls = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 12))
    remove, delete, done = store.remove, store.delete, []

    def counted(action: str, name: str) -> None:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append((action, name))
        remove(name) if action == "remove" else delete(name)

    store.remove = lambda name: counted("remove", name)  # type: ignore[method-assign]
    store.delete = lambda name: counted("delete", name)  # type: ignore[method-assign]
    with suppress(KeyboardInterrupt):
        prune(store, keep)
    store.remove, store.delete = remove, delete  # type: ignore[method-assign]
    left = steps(store)
    assert left[:keep] == sorted(bases, reverse=True)[:keep]
    for step in left:
        check(store, load(store, named(step)))
    prune(store, keep)
    assert len(store.folders()) == len(steps(store))
    assert newest_valid(store, lambda text: None).step == count


def test_a_folder_that_cannot_be_deleted_is_named(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(local, {1: 0, 2: 0})

    def rm(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(local._fs, "rm", rm)
    with pytest.raises(CheckpointError, match=f"/{named(1)}: cannot be deleted: Permission denied; give this user the right to it"):
        prune(local, 1)
    assert steps(local) == [2]


@pytest.mark.parametrize(
    ("bases", "of_best", "keep", "left"),
    [
        (FULL, [2], 1, [5, 2]),
        (FULL, [1, 3], 1, [5, 3]),
        (FULL, [5], 1, [5]),
        (FULL, [4], 2, [5, 4]),
        (CHAINS, [2], 1, [6, 5, 4, 2, 1]),
        (CHAINS, [3, 5], 1, [6, 5, 4]),
    ],
)
def test_the_newest_of_a_best_evaluation_stays_with_what_it_needs(
    memory: Store, bases: dict[int, int], of_best: list[int], keep: int, left: list[int]
) -> None:
    """Older best ones go: they are not the best any more."""
    for step, base in bases.items():
        checkpoint(memory, step, base=named(base) if base else "", is_best=step in of_best)
    prune(memory, keep)
    assert steps(memory) == left
    for step in left:
        check(memory, load(memory, named(step)))


def test_a_best_one_whose_chain_is_broken_does_not_keep_an_older_one_from_staying(memory: Store) -> None:
    for step, base in {1: 0, 2: 0, 3: 2, 4: 0}.items():
        checkpoint(memory, step, base=named(base) if base else "", is_best=step in (1, 3))
    memory.remove(f"{named(2)}/manifest.json")
    prune(memory, 1)
    assert steps(memory) == [4, 1]

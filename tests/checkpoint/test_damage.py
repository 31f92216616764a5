"""A byte changed anywhere, in each kind of file: found, named, and the checkpoint before it is taken instead."""

from __future__ import annotations

import uuid
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.checkpoint.manifest import found, newest_valid
from flowps.checkpoint.part import read_section
from flowps.checkpoint.store import Store
from flowps.errors import CheckpointError
from tests.checkpoint.samples import checkpoint, named

KINDS = ["manifest.json", "shard-1/rows.arrow", "shard-1/admission.arrow", "dense.weights"]


@cache
def whole() -> dict[str, bytes]:
    """path → content of two checkpoints."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    for step in (1, 2):
        checkpoint(store, step)
    files = {path: store.read(path) for step in (1, 2) for path in store.sizes(named(step))}
    for step in (1, 2):
        store.delete(named(step))
    return files


def damaged(path: str, content: bytes | None) -> Store:
    """A store with those two, but for one file."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    for name, good in whole().items():
        if name != path:
            store.put(name, good)
        elif content is not None:
            store.put(name, content)
    return store


def assert_passed_over(store: Store, path: str) -> None:
    said: list[str] = []
    assert newest_valid(store, said.append).name == named(1)
    (remark,) = said
    assert remark.startswith(f"checkpoint {named(2)} is passed over: ")
    if not path.endswith("manifest.json") or "unfinished" not in remark:
        assert f"{store.url}/{path}: is " in remark
        assert "use another checkpoint" in remark


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_found(kind: str, data: st.DataObject) -> None:
    path = f"{named(2)}/{kind}"
    content = bytearray(whole()[path])
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    store = damaged(path, bytes(content))
    assert_passed_over(store, path)
    if kind.endswith(".arrow"):
        good = next(folder.manifest for folder in found(store) if folder.name == named(2))
        assert good is not None
        entry = next(entry for entry in good.files() if entry.path == path)
        with pytest.raises(CheckpointError, match=r"\.arrow: is damaged: its checksum"):
            list(read_section(store, entry))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_file_that_is_cut_short_is_found(kind: str, data: st.DataObject) -> None:
    path = f"{named(2)}/{kind}"
    content = whole()[path]
    assert_passed_over(damaged(path, content[: data.draw(st.integers(0, len(content) - 1))]), path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_found(kind: str) -> None:
    path = f"{named(2)}/{kind}"
    assert_passed_over(damaged(path, None), path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"", b"{}", b'{"checksum": "", "manifest": {}}\n', bytes(5000)])
def test_a_foreign_file_is_found(kind: str, content: bytes) -> None:
    path = f"{named(2)}/{kind}"
    assert_passed_over(damaged(path, content), path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "shard-1/admission.arrow"])  # which both have alike
def test_the_same_file_of_the_other_checkpoint_is_found(kind: str) -> None:
    path = f"{named(2)}/{kind}"
    assert_passed_over(damaged(path, whole()[f"{named(1)}/{kind}"]), path)


def test_sections_that_are_changed_at_every_byte_end_in_one_kind_of_error() -> None:
    """Whatever Arrow makes of it: no other exception comes out, and no end of the process."""
    path = f"{named(2)}/shard-1/rows.arrow"
    content = whole()[path]
    store = damaged("", None)
    entry = next(entry for folder in found(store) if folder.manifest for entry in folder.manifest.files() if entry.path == path)
    for place in range(len(content)):
        bits = (0x01, 0x80, 0xFF)[place % 3]
        store.put(path, content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :])
        with pytest.raises(CheckpointError):
            list(read_section(store, entry))

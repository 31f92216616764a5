"""The registry: models whole or not there, one of them live, and the way back; on a disk and in an object store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import msgspec
import numpy as np
import pytest

from flowps.checkpoint.store import Store
from flowps.errors import BundleError
from flowps.quality import Quality, Tally
from flowps.serving.bundle import open_version
from flowps.serving.manifest import Dense, Manifest, list_files, tensor, write_manifest
from workflows.store import Record, Registry


@pytest.fixture(params=["disk", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "registry")
        return
    yield "memory://flowps-registry/deep"
    memory = fsspec.filesystem("memory")
    if memory.exists("/flowps-registry"):
        memory.rm("/flowps-registry", recursive=True)


@pytest.fixture
def registry(url: str) -> Registry:
    registry = Registry(url)
    registry.prepare()
    return registry


def quality() -> Quality:
    tally = Tally()
    tally.update(np.array([0, 1], np.float32), np.array([-1, 1], np.float32))
    return tally.result(1)


def record_of(version: int, parent: int = 0) -> Record:
    return Record(
        version=version, created=1.5, attempt=version, slot=f"2024-09-{version:02d}", kind="new", parent=parent,
        run=f"/runs/{version}", checkpoint="step-1", examples=10, pipeline="/p.toml", quality=quality(),
        live=quality() if parent else None, preview=None, profile={"rows": 10},
        reasons=["AUC 1.0000, at least 0.5 (gate.least_auc)"],
    )  # fmt: skip


def bundle(folder: Path, content: str = "x") -> Path:
    (folder / "embeddings").mkdir(parents=True)
    (folder / "embeddings" / "a.parquet").write_text(content)
    (folder / "model.keras").write_text(content)
    write_manifest(
        folder,
        Manifest(
            created=1.0, run="r", steps=1, examples=1, test=None, labels=("label",), dense=Dense(), slots=(), logit_shift=0.0,
            inputs=(), output=tensor("output_0", "float32", [("label", 1)]), files=list_files(folder),
        ),
    )  # fmt: skip
    return folder


def publish(registry: Registry, tmp_path: Path, count: int = 1) -> None:
    for _ in range(count):
        version = registry.next_version()
        registry.put(bundle(tmp_path / f"bundle-{version}", f"model {version}"), record_of(version, registry.live()), "<p>page")
        registry.promote(version, "published")


def test_an_empty_one(registry: Registry) -> None:
    assert (registry.live(), registry.versions(), registry.promotions(), registry.before_live()) == (0, [], [], 0)
    assert registry.next_version() == 1
    with pytest.raises(BundleError, match="has no model 1; there are none"):
        registry.record(1)
    with pytest.raises(BundleError, match="has no model 1"):
        registry.promote(1, "promoted")


def test_what_is_put_is_there_and_live_when_it_is_promoted(registry: Registry, tmp_path: Path) -> None:
    registry.put(bundle(tmp_path / "b"), record_of(1), "<p>page")
    assert (registry.versions(), registry.kept(), registry.live()) == ([1], [1], 0)
    assert registry.record(1) == record_of(1)
    assert {file.path for file in registry.manifest(1).files} == {"embeddings/a.parquet", "model.keras"}
    promotion = registry.promote(1, "published")
    assert (promotion.version, promotion.before, promotion.why) == (1, 0, "published")
    assert registry.live() == 1
    assert registry.promotions() == [promotion]
    assert registry.promote(1, "published") == promotion, "it is live already"
    assert len(registry.promotions()) == 1


def test_on_a_disk_it_is_a_bundle_to_be_served(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    registry.prepare()
    publish(registry, tmp_path, 2)
    version = open_version(tmp_path / "registry" / "models", verify=True)
    assert version.number == 2
    registry.promote(1, "promoted")
    assert open_version(tmp_path / "registry" / "models").number == 1


def test_back_and_back_again(registry: Registry, tmp_path: Path) -> None:
    """A rollback goes to what was live before, not to what was rolled back."""
    publish(registry, tmp_path, 3)
    assert registry.before_live() == 2
    registry.promote(2, "rolled back")
    assert (registry.live(), registry.before_live()) == (2, 1)
    publish(registry, tmp_path)
    assert (registry.live(), registry.before_live()) == (4, 2)
    registry.promote(2, "rolled back")
    registry.promote(1, "rolled back")
    assert (registry.live(), registry.before_live()) == (1, 0)
    registry.promote(3, "promoted")
    assert (registry.live(), registry.before_live()) == (3, 1)
    assert [(of.version, of.before) for of in registry.promotions()] == [
        (1, 0),
        (2, 1),
        (3, 2),
        (2, 3),
        (4, 2),
        (2, 4),
        (1, 2),
        (3, 1),
    ]


def test_old_models_go_and_not_the_live_one_nor_the_one_before(registry: Registry, tmp_path: Path) -> None:
    publish(registry, tmp_path, 6)
    registry.promote(2, "promoted")
    assert registry.prune(2) == [1, 3, 4]
    assert registry.kept() == [2, 5, 6]
    assert registry.versions() == [1, 2, 3, 4, 5, 6], "their records stay"
    assert (registry.live(), registry.before_live()) == (2, 6)
    with pytest.raises(BundleError, match=r"models/3/manifest\.json: is missing"):
        registry.promote(3, "promoted")
    assert registry.live() == 2
    registry.promote(6, "rolled back")
    assert registry.before_live() == 5, "the one before that is there"
    assert registry.next_version() == 7, "a number is given once"


class Killed(BaseException):
    """As a kill: nothing that comes after it is done."""


@pytest.mark.parametrize("at", range(8))
def test_a_kill_while_it_is_published_leaves_the_old_model_or_the_new_one(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Before each write. Whoever comes next does it again, and all is as if there had been no kill."""
    registry = Registry(url)
    registry.prepare()
    publish(registry, tmp_path)
    new, record = bundle(tmp_path / "new", "model 2"), record_of(2, 1)
    writes, create = 0, Store.create

    def dying(self: Store, path: str) -> object:
        nonlocal writes
        if writes == at:
            raise Killed
        writes += 1
        return create(self, path)

    monkeypatch.setattr(Store, "create", dying)
    killed = False
    try:
        registry.put(new, record, "<p>page")
        registry.promote(2, "published")
    except Killed:
        killed = True
    monkeypatch.undo()
    assert killed == (at < 7), "three files, page, record, promotion, current"
    seen = Registry(url)
    assert seen.live() == (1 if killed else 2)
    assert seen.versions() == ([1] if at < 5 else [1, 2])
    for version in seen.versions():
        assert seen.manifest(version).files
    assert seen.before_live() in (0, 1)
    seen.put(new, record, "<p>page")
    seen.promote(2, "published")
    assert (seen.live(), seen.versions(), seen.before_live()) == (2, [1, 2], 1)
    assert [(of.version, of.before) for of in seen.promotions()] == [(1, 0), (2, 1)]


def test_a_number_that_another_pipeline_has_taken_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.put(bundle(tmp_path / "b"), record_of(1), "")
    registry.put(tmp_path / "b", record_of(1), "")
    other = msgspec.structs.replace(record_of(1), pipeline="/other.toml")
    with pytest.raises(BundleError, match=r"model 1 is there already, of slot 2024-09-01 and /p\.toml; give every pipeline"):
        registry.put(tmp_path / "b", other, "")


def test_a_kill_while_an_old_model_is_deleted_leaves_none_to_promote(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, tmp_path, 4)

    def kill(self: Store, folder: str) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", kill)
        with pytest.raises(Killed):
            registry.prune(2)
    with pytest.raises(BundleError, match=r"models/1/manifest\.json: is missing"):
        registry.promote(1, "promoted")
    assert registry.prune(2) == [1, 2]
    assert registry.kept() == [3, 4]


def test_what_a_killed_command_left_of_a_model_is_replaced(registry: Registry, tmp_path: Path) -> None:
    Store(registry.url).put("models/1/embeddings/b.parquet", b"of another slot")
    assert registry.next_version() == 2
    registry.put(bundle(tmp_path / "b"), record_of(1), "")
    assert set(Store(registry.url).sizes("models/1")) == {
        "models/1/embeddings/a.parquet", "models/1/model.keras", "models/1/manifest.json"
    }  # fmt: skip


def test_what_cannot_be_read_is_said(registry: Registry, tmp_path: Path) -> None:
    publish(registry, tmp_path)
    store = Store(registry.url)
    store.put("models/current", b"the newest")
    with pytest.raises(BundleError, match=r"models/current: holds 'the newest', expected the number of a model"):
        registry.live()
    store.put("records/1.json", b"{}")
    with pytest.raises(BundleError, match=r"records/1\.json: cannot be read: "):
        registry.record(1)

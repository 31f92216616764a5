"""A bundle followed as newer versions come: what is served, what is remarked, and that no call fails meanwhile."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from flowps.errors import BundleError, FlowpsError
from flowps.serving.client import Answer, EmbeddingClient
from flowps.serving.live import Live, Watcher
from flowps.serving.rows import Tables
from flowps.serving.wire.server import LookupServer
from tests.serving.samples import ROWS, make_bundle, make_live, spoil

LONG_S = 60.0  # never waited for in a test that passes
USER = np.array(list(ROWS["user"]), np.uint64)
WEIGHTS = np.array(list(ROWS["user"].values()), np.float32)


class Told:
    """A Meter that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.signs: list[tuple[str, int, int]] = []
        self.versions: list[int] = []
        self.failures = 0
        self.changed = threading.Condition()

    def answered(self, call: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.calls.append((call, code))

    def looked_up(self, slot: str, signs: int, unknown: int) -> None:
        self.signs.append((slot, signs, unknown))

    def loaded(self, tables: Tables) -> None:
        with self.changed:
            self.versions.append(tables.version.number)
            self.changed.notify_all()

    def failed(self) -> None:
        with self.changed:
            self.failures += 1
            self.changed.notify_all()


@contextmanager
def served(live: Live, told: Told) -> Iterator[EmbeddingClient]:
    with closing(LookupServer(live, told, "127.0.0.1", 0)) as server, EmbeddingClient(server.address, timeout_s=LONG_S) as client:
        yield client


@pytest.fixture
def out(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def live(out: Path, told: Told, said: list[str]) -> Live:
    return Live(out, told, said.append)


def read(live: Live) -> Any:
    return live.tables.rows["user"].read(USER)[0]


class TestRefresh:
    def test_without_anything_new_does_nothing(self, live, told, said):
        assert not live.refresh()
        assert (told.versions, said) == ([1], [])

    def test_serves_what_is_newer(self, live, out, told, said):
        before = live.tables
        make_bundle(out, factor=2)
        assert live.refresh()
        np.testing.assert_array_equal(read(live), 2 * WEIGHTS)
        np.testing.assert_array_equal(before.rows["user"].read(USER)[0], WEIGHTS)  # whoever has the old one keeps it
        assert told.versions == [1, 2]
        assert said == ["version 2 is served in place of 1: 5 rows"]
        assert not live.refresh()

    def test_goes_back_where_it_is_told_to(self, live, out, told):
        make_bundle(out, factor=2)
        live.refresh()
        (out / "current").write_text("1\n")
        assert live.refresh()
        np.testing.assert_array_equal(read(live), WEIGHTS)
        assert told.versions == [1, 2, 1]

    def test_sees_a_bundle_that_was_made_anew(self, live, out):
        shutil.rmtree(out)
        assert not live.refresh()
        make_bundle(out, factor=3)
        assert live.refresh()
        assert live.tables.version.number == 1
        np.testing.assert_array_equal(read(live), 3 * WEIGHTS)


class TestABrokenVersion:
    def test_is_remarked_once_and_the_old_one_stays(self, live, out, told, said):
        spoil(make_bundle(out, factor=2).folder / "embeddings" / "user.parquet")
        for _ in range(3):
            assert not live.refresh()
        assert told.failures == 1
        assert len(said) == 1
        assert "another version cannot be served: " in said[0]
        assert "user.parquet: is damaged: its SHA-256 is not that in the manifest" in said[0]
        assert said[0].endswith("; version 1 stays")
        np.testing.assert_array_equal(read(live), WEIGHTS)

    def test_is_served_once_it_is_mended(self, live, out, told):
        path = make_bundle(out, factor=2).folder / "embeddings" / "user.parquet"
        whole = path.read_bytes()
        path.write_bytes(whole[:50])
        assert not live.refresh()
        path.write_bytes(whole)
        assert live.refresh()
        np.testing.assert_array_equal(read(live), 2 * WEIGHTS)

    def test_is_passed_by_for_one_that_is_sound(self, live, out, told):
        spoil(make_bundle(out, factor=2).folder / "hash.json")
        live.refresh()
        make_bundle(out, factor=3)
        assert live.refresh()
        assert (told.versions, told.failures) == ([1, 3], 1)

    def test_does_not_make_the_old_one_load_again_when_it_goes(self, live, out, told):
        (out / "current").write_text("nonsense")
        assert not live.refresh()
        (out / "current").write_text("1")
        assert not live.refresh()
        assert (told.versions, told.failures) == ([1], 1)

    def test_for_which_there_is_no_memory_is_remarked(self, live, out, said, monkeypatch):
        def full(*arguments: object, **named: object) -> None:
            raise MemoryError

        make_bundle(out)
        monkeypatch.setattr("flowps.serving.live.load_tables", full)
        assert not live.refresh()
        assert "there is not enough memory for it beside the old one; version 1 stays" in said[0]

    def test_at_the_beginning_is_an_error(self, out, told):
        spoil(out / "1" / "schema.json" if (out / "1" / "schema.json").exists() else out / "1" / "hash.json")
        with pytest.raises(BundleError, match="SHA-256"):
            Live(out, told)
        assert told.versions == []


class TestUnderLoad:
    def test_no_call_fails_while_newer_versions_come(self, live, out, told):
        """Every answer is whole: all its rows are of the version that it names."""
        ended, errors, answers = threading.Event(), [], []
        versions = 5

        def ask(client: EmbeddingClient) -> None:
            try:
                while not ended.is_set():
                    answers.append(client.ask({"user": USER, "city": [5, 6]}))
                answers.append(client.ask({"user": USER, "city": [5, 6]}))
            except FlowpsError as error:
                errors.append(error)

        with served(live, told) as client, closing(Watcher(live, 0.01)):
            threads = [threading.Thread(target=ask, args=(client,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for number in range(2, versions + 1):
                if number == 4:
                    shutil.copytree(out / "3", out / "4")
                    spoil(out / "4" / "embeddings" / "city.parquet")
                    make_live(out, 4)
                    with told.changed:
                        assert told.changed.wait_for(lambda: told.failures == 1, LONG_S)
                    continue
                make_bundle(out, factor=number)
                with told.changed:
                    assert told.changed.wait_for(lambda n=number: told.versions[-1] == n, LONG_S)
            ended.set()
            for thread in threads:
                thread.join(LONG_S)
        assert not errors
        assert [answer.version for answer in answers] != []
        assert {answer.version for answer in answers} <= {1, 2, 3, 5}
        assert answers[-1].version == 5
        for answer in answers:
            np.testing.assert_array_equal(answer.rows["user"], answer.version * WEIGHTS)
            np.testing.assert_array_equal(answer.rows["city"], answer.version * np.array([[0.5, 0.25, 0.125], [0, 0, 0]]))
            assert answer.unknown == {"user": 0, "city": 1}

    def test_a_call_that_runs_ends_on_the_version_it_began_with(self, live, out, told):
        begun, go_on = threading.Event(), threading.Event()
        slow = live.tables

        class Slow:
            """Rows that take until they are told to go on."""

            dim = 2

            def read(self, signs: Any) -> Any:
                begun.set()
                assert go_on.wait(LONG_S)
                return slow.rows["user"].read(signs)

        live._tables = Tables(slow.version, MappingProxyType({**slow.rows, "user": Slow()}))
        found: list[Answer] = []
        with served(live, told) as client:
            asking = threading.Thread(target=lambda: found.append(client.ask({"user": USER, "city": [5]})))
            asking.start()
            assert begun.wait(LONG_S)
            make_bundle(out, factor=2)
            assert live.refresh()
            assert client.ask({"city": [5]}).version == 2
            go_on.set()
            asking.join(LONG_S)
        assert found[0].version == 1
        np.testing.assert_array_equal(found[0].rows["user"], WEIGHTS)
        np.testing.assert_array_equal(found[0].rows["city"], [[0.5, 0.25, 0.125]])

"""The ledger: attempts, steps, files and requests outlive their command; one command is at work at a time."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from flowps.errors import RunDirError
from workflows.ledger import Lease, LeaseError, Ledger, TrainedFile


def open_again(ledger: Ledger) -> Ledger:
    ledger.close()
    return Ledger(ledger.path.parent)


def test_attempts_and_their_steps_are_there_for_the_next_command(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "state")
    assert ledger.running() is None
    attempt = ledger.begin("2024-09-21T14:30", "new", base=3)
    assert (attempt.name, attempt.status, attempt.base, attempt.version) == ("2024-09-21T1430-1", "running", 3, 0)
    ledger.done(attempt, "check", {"of": [1, None]}, 0.5)
    ledger = open_again(ledger)
    assert ledger.running() == attempt
    assert ledger.result(attempt, "check") == {"of": [1, None]}
    assert ledger.result(attempt, "train") is None
    ledger.done(attempt, "train", {"of": "x"}, 1.5)
    assert ledger.steps(attempt) == {"check": (0.5, {"of": [1, None]}), "train": (1.5, {"of": "x"})}
    assert ledger.reserve(attempt, 7).version == 7
    assert ledger.reserve(attempt, 8).version == 7, "the first number stays"
    ended = open_again(ledger).end(attempt, "published", "as model 7")
    assert (ended.status, ended.why, ended.version) == ("published", "as model 7", 7)
    assert ended.ended is not None


def test_one_attempt_is_going_on_at_a_time(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        first = ledger.begin("a", "new", 0)
        with pytest.raises(sqlite3.IntegrityError):
            ledger.begin("b", "new", 0)
        ledger.end(first, "rejected", "")
        assert ledger.begin("b", "new", 0).id == 2, "what was refused has left nothing"
        assert [attempt.slot for attempt in ledger.attempts()] == ["a", "b"]
        assert [attempt.slot for attempt in ledger.attempts("b")] == ["b"]


def test_a_result_that_json_cannot_say_is_refused(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        attempt = ledger.begin("a", "new", 0)
        with pytest.raises(ValueError, match="not JSON compliant"):
            ledger.done(attempt, "check", {"of": float("nan")}, 0)
        assert ledger.result(attempt, "check") is None


def test_results_of_the_last_that_ended_so(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        for slot, status in (("a", "published"), ("b", "rejected"), ("c", "published"), ("d", "published")):
            attempt = ledger.begin(slot, "new", 0)
            ledger.done(attempt, "check", slot, 0)
            ledger.end(attempt, status, "")  # type: ignore[arg-type]
        assert ledger.last_results("check", "published", 2) == ["d", "c"]
        assert ledger.last_results("check", "rejected", 9) == ["b"]
        assert ledger.last_results("train", "published", 9) == []


def test_files_are_known_once_their_attempt_has_ended(tmp_path: Path) -> None:
    one, two = TrainedFile("/d/a", 10, 1.5, "aa", 3), TrainedFile("/d/b", 20, 2.5, "bb", 0)
    with closing(Ledger(tmp_path)) as ledger:
        attempt = ledger.begin("x", "new", 0)
        ledger.take(attempt, [one])
        ledger.take(attempt, [two, one])
        assert ledger.taken(attempt) == [one, two]
        assert ledger.known("x") == {}
        ledger.end(attempt, "superseded", "")
        assert ledger.known("x") == {}, "the slot begins anew"
        attempt = ledger.begin("x", "new", 0)
        ledger.take(attempt, [one, two])
        assert ledger.twin("aa", "y") == ""
        ledger.end(attempt, "published", "")
        assert ledger.known("x") == {"/d/a": one, "/d/b": two}
        assert ledger.twin("aa", "y") == "/d/a"
        assert ledger.twin("aa", "x") == "", "the slot may be trained anew"
        assert ledger.twin("bb", "y") == "", "files without rows are all alike"
        again = ledger.begin("x", "again", 1)
        newer = TrainedFile("/d/a", 11, 3.5, "cc", 4)
        ledger.take(again, [newer])
        ledger.end(again, "rejected", "")
        assert ledger.known("x")["/d/a"] == newer


def test_requests_are_kept_until_they_are_done(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        assert ledger.requested() is None
        attempt = ledger.begin("b", "new", 0)
        for _ in range(2):  # the second is the same
            ledger.request("a", "c")
        ledger.request("d", "e")
        found = ledger.requested()
        assert found is not None
        assert (found.first, found.last) == ("a", "c")
        assert found.since == attempt.id, "what was begun before"
        ledger.close_request()
        assert (found := ledger.requested()) is not None
        assert found.first == "d"
        ledger.close_request()
        assert ledger.requested() is None
        ledger.request("a", "c")
        assert ledger.requested() is not None, "asked for anew"


@pytest.mark.parametrize("content", [b"no database" * 200, "form"])
def test_what_is_no_ledger_is_refused(tmp_path: Path, content: bytes | str) -> None:
    if isinstance(content, bytes):
        (tmp_path / "ledger.sqlite").write_bytes(content)
    else:
        with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
            db.execute("PRAGMA user_version = 9")
    with pytest.raises(RunDirError, match=r"ledger\.sqlite: (cannot be used: |is of another version of flowps \(form 9)"):
        Ledger(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match="cannot be used"):
        Ledger(tmp_path / "file")


class TestLease:
    def test_one_command_is_at_work(self, tmp_path: Path) -> None:
        with closing(Ledger(tmp_path)) as ledger, closing(Ledger(tmp_path)) as other:
            lease = ledger.lease(60)
            with pytest.raises(LeaseError, match=r"process \d+ is at work on this pipeline; wait .* [56]\d s more"):
                other.lease(60)
            lease.check()
            lease.close()
            lease.close()
            other.lease(60).close()

    def test_it_is_renewed_while_its_command_lives(self, tmp_path: Path) -> None:
        with closing(Ledger(tmp_path)) as ledger, closing(ledger.lease(0.6)) as lease, closing(Ledger(tmp_path)) as other:
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                with pytest.raises(LeaseError):
                    other.lease(60)
                lease.check()
                time.sleep(0.05)

    def test_after_a_kill_another_command_takes_over(self, tmp_path: Path) -> None:
        with closing(Ledger(tmp_path)) as ledger, closing(Ledger(tmp_path)) as other:
            dead = ledger.lease(0.5)
            dead._closed.set()  # as if it had been killed: its thread renews no more
            dead._thread.join()
            with pytest.raises(LeaseError):  # its process lives
                other.lease(60)
            time.sleep(0.6)
            taken = other.lease(60)
            with pytest.raises(LeaseError, match="could not be renewed in time; another command may be at work"):
                dead.check()
            taken.check()
            taken.close()

    def test_that_of_a_process_that_is_no_more_is_taken_over_at_once(self, tmp_path: Path) -> None:
        root = Path(__file__).resolve().parents[2]
        code = (
            "import os, pathlib, sys; from workflows.ledger import Ledger; "
            "Ledger(pathlib.Path(sys.argv[1])).lease(3600); os._exit(9)"
        )
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root).returncode == 9
        with closing(Ledger(tmp_path)) as ledger, closing(ledger.lease(60)) as lease:
            lease.check()

    def test_that_of_another_machine_is_waited_for(self, tmp_path: Path) -> None:
        with closing(Ledger(tmp_path)) as ledger:
            with closing(sqlite3.connect(ledger.path)) as db, db:
                holder = "elsewhere, process 1 of boot x"
                db.execute("INSERT INTO lease VALUES (1, 1, ?, ?)", (holder, time.time() + 3600))
            with pytest.raises(LeaseError, match=r"sqlite: elsewhere, process 1 is at work on this pipeline"):
                ledger.lease(60)

    def test_one_that_wakes_up_late_finds_that_it_has_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its machine slept: by its own clock it may still be at work, but another one is."""
        with closing(Ledger(tmp_path)) as ledger, closing(Ledger(tmp_path)) as other:
            sleeps, real = threading.Event(), Lease._renew

            def renew(self: Lease) -> None:
                sleeps.wait(10)
                real(self)

            monkeypatch.setattr(Lease, "_renew", renew)
            late = ledger.lease(0.3)
            monkeypatch.setattr(Lease, "_renew", real)
            time.sleep(0.4)
            taken = other.lease(60)
            sleeps.set()
            late._thread.join(5)
            assert not late._thread.is_alive(), "it has seen that another one has it"
            with pytest.raises(LeaseError):
                late.check()
            late.close()
            with pytest.raises(LeaseError):
                ledger.lease(60)
            taken.close()

"""`Ledger`: what was done with which slot, in SQLite: attempts, their steps, the files that were trained, and who is at work.

A step is written down when it is done, in one transaction; so what a killed command has not finished is not there, and the next one
does it again. `lease` is held by one command at a time. Each method is a transaction; a Ledger is of one thread, a lease renews
itself on a thread and a connection of its own.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flowps.errors import FlowpsError, RunDirError

Kind = Literal["new", "late", "more", "again"]
Status = Literal["running", "published", "rejected", "skipped", "superseded"]

_TABLES = """
CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY, slot TEXT NOT NULL, kind TEXT NOT NULL, status TEXT NOT NULL, why TEXT NOT NULL,
    base INTEGER NOT NULL, version INTEGER NOT NULL, started REAL NOT NULL, ended REAL);
CREATE UNIQUE INDEX IF NOT EXISTS one_at_a_time ON attempts (status) WHERE status = 'running';
CREATE TABLE IF NOT EXISTS steps (
    attempt INTEGER NOT NULL REFERENCES attempts, step TEXT NOT NULL, ended REAL NOT NULL, seconds REAL NOT NULL,
    result TEXT NOT NULL, PRIMARY KEY (attempt, step));
CREATE TABLE IF NOT EXISTS files (
    attempt INTEGER NOT NULL REFERENCES attempts, slot TEXT NOT NULL, url TEXT NOT NULL, size INTEGER NOT NULL,
    modified REAL NOT NULL, digest TEXT NOT NULL, rows INTEGER NOT NULL, PRIMARY KEY (attempt, url));
CREATE INDEX IF NOT EXISTS by_digest ON files (digest);
CREATE INDEX IF NOT EXISTS by_slot ON files (slot);
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY, first TEXT NOT NULL, last TEXT NOT NULL, since INTEGER NOT NULL, done INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS lease (
    one INTEGER PRIMARY KEY CHECK (one = 1), token INTEGER NOT NULL, holder TEXT NOT NULL, expires REAL NOT NULL);
"""
_FORM = 1  # of the tables: user_version
_BUSY_S = 30.0


class LeaseError(FlowpsError):
    """Another command is at work on the pipeline, or has taken over from this one."""

    exit_code = 3


@dataclass(frozen=True)
class Attempt:
    """One way of a slot through the steps.

    kind      new; late: slots after it were trained before; more: files that came after the slot was trained; again: asked for
    base      the version that was live when it began, and whose rows it begins with; 0: none
    version   reserved for it in the registry; 0: it has not come so far
    why       of its end
    """

    id: int
    slot: str
    kind: Kind
    status: Status
    why: str
    base: int
    version: int
    started: float
    ended: float | None

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"{self.slot.replace(':', '')}-{self.id}"


@dataclass(frozen=True)
class Request:
    """That the slots from `first` to `last` be trained anew, those whose attempts are no newer than number `since`."""

    first: str
    last: str
    since: int


@dataclass(frozen=True)
class TrainedFile:
    """A file that an attempt took."""

    url: str
    size: int
    modified: float
    digest: str
    rows: int


class Ledger:
    """The ledger of the folder `state`, which is made if it is not there. Raises RunDirError where it cannot be used."""

    def __init__(self, state: Path) -> None:
        self.path = state / "ledger.sqlite"
        try:
            state.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            with self._transaction() as db:
                (form,) = db.execute("PRAGMA user_version").fetchone()
                if form not in (0, _FORM):
                    raise RunDirError(f"{self.path}: is of another version of flowps (form {form}, expected {_FORM})")
                for statement in _TABLES.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_FORM}")
        except (OSError, sqlite3.Error) as error:
            raise RunDirError(f"{self.path}: cannot be used: {error}") from None

    def close(self) -> None:
        """Idempotent."""
        self._db.close()

    # --- attempts -----------------------------------------------------------------------------------------------------

    def begin(self, slot: str, kind: Kind, base: int) -> Attempt:
        """A new attempt. There is one at a time."""
        with self._transaction() as db:
            cursor = db.execute(
                "INSERT INTO attempts (slot, kind, status, why, base, version, started) VALUES (?, ?, 'running', '', ?, 0, ?)",
                (slot, kind, base, time.time()),
            )
            return self._attempt(int(cursor.lastrowid or 0))

    def running(self) -> Attempt | None:
        """The attempt that was begun and has not ended."""
        row = self._db.execute("SELECT id FROM attempts WHERE status = 'running'").fetchone()
        return None if row is None else self._attempt(row[0])

    def attempts(self, slot: str = "") -> list[Attempt]:
        """All, or those of a slot, the oldest first."""
        where, values = ("WHERE slot = ?", (slot,)) if slot else ("", ())
        return [Attempt(*row) for row in self._db.execute(f"SELECT * FROM attempts {where} ORDER BY id", values)]

    def reserve(self, attempt: Attempt, version: int) -> Attempt:
        """Note the version that it will be published as; that of an earlier call stays."""
        with self._transaction() as db:
            db.execute("UPDATE attempts SET version = ? WHERE id = ? AND version = 0", (version, attempt.id))
        return self._attempt(attempt.id)

    def end(self, attempt: Attempt, status: Status, why: str) -> Attempt:
        """Of an attempt that has ended, how and why."""
        with self._transaction() as db:
            db.execute("UPDATE attempts SET status = ?, why = ?, ended = ? WHERE id = ?", (status, why, time.time(), attempt.id))
        return self._attempt(attempt.id)

    def _attempt(self, number: int) -> Attempt:
        return Attempt(*self._db.execute("SELECT * FROM attempts WHERE id = ?", (number,)).fetchone())

    # --- requests -----------------------------------------------------------------------------------------------------

    def request(self, first: str, last: str) -> None:
        """Note that slots are to be trained anew; one that is noted and not done yet stays as it is."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO requests (first, last, since, done) SELECT ?, ?, (SELECT coalesce(max(id), 0) FROM attempts), 0 "
                "WHERE NOT EXISTS (SELECT 1 FROM requests WHERE first = ? AND last = ? AND done = 0)",
                (first, last, first, last),
            )

    def requested(self) -> Request | None:
        """The oldest request that is not done."""
        row = self._db.execute("SELECT first, last, since FROM requests WHERE done = 0 ORDER BY id LIMIT 1").fetchone()
        return None if row is None else Request(*row)

    def close_request(self) -> None:
        """The oldest one is done."""
        with self._transaction() as db:
            db.execute("UPDATE requests SET done = 1 WHERE id = (SELECT min(id) FROM requests WHERE done = 0)")

    # --- steps --------------------------------------------------------------------------------------------------------

    def done(self, attempt: Attempt, step: str, result: Any, seconds: float) -> None:
        """Write down a step and what came of it, as JSON."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO steps VALUES (?, ?, ?, ?, ?)",
                (attempt.id, step, time.time(), seconds, json.dumps(result, allow_nan=False)),
            )

    def result(self, attempt: Attempt, step: str) -> Any:
        """What came of a step; None if it has not been done."""
        row = self._db.execute("SELECT result FROM steps WHERE attempt = ? AND step = ?", (attempt.id, step)).fetchone()
        return None if row is None else json.loads(row[0])

    def steps(self, attempt: Attempt) -> dict[str, tuple[float, Any]]:
        """step → seconds and result, in order."""
        found = self._db.execute("SELECT step, seconds, result FROM steps WHERE attempt = ? ORDER BY ended", (attempt.id,))
        return {step: (seconds, json.loads(result)) for step, seconds, result in found}

    def last_results(self, step: str, status: Status, count: int) -> list[Any]:
        """Of the last attempts of whole slots that have ended so, the newest first."""
        found = self._db.execute(
            "SELECT result FROM steps JOIN attempts ON attempt = id WHERE step = ? AND status = ? AND kind <> 'more' "
            "ORDER BY id DESC LIMIT ?",
            (step, status, count),
        )
        return [json.loads(row[0]) for row in found]

    # --- files --------------------------------------------------------------------------------------------------------

    def take(self, attempt: Attempt, files: Sequence[TrainedFile]) -> None:
        """Note the files of an attempt, in place of those that were noted before."""
        with self._transaction() as db:
            db.execute("DELETE FROM files WHERE attempt = ?", (attempt.id,))
            db.executemany(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(attempt.id, attempt.slot, of.url, of.size, of.modified, of.digest, of.rows) for of in files],
            )

    def taken(self, attempt: Attempt) -> list[TrainedFile]:
        """The files of an attempt."""
        found = self._db.execute(
            "SELECT url, size, modified, digest, rows FROM files WHERE attempt = ? ORDER BY url", (attempt.id,)
        )
        return [TrainedFile(*row) for row in found]

    def known(self, slot: str) -> dict[str, TrainedFile]:
        """url → the files of a slot's attempts that have ended, the newest of each."""
        found = self._db.execute(
            "SELECT url, size, modified, digest, rows FROM files JOIN attempts ON attempt = id "
            "WHERE files.slot = ? AND status NOT IN ('running', 'superseded') ORDER BY id",
            (slot,),
        )
        return {row[0]: TrainedFile(*row) for row in found}

    def twin(self, digest: str, slot: str) -> str:
        """The url of a file with this digest that was published with a slot, but with `slot`; "": there is none."""
        row = self._db.execute(
            "SELECT url FROM files JOIN attempts ON attempt = id WHERE digest = ? AND files.slot <> ? AND rows > 0 "
            "AND status = 'published' LIMIT 1",
            (digest, slot),
        ).fetchone()
        return "" if row is None else str(row[0])

    # --- the lease ----------------------------------------------------------------------------------------------------

    def lease(self, lease_s: float) -> Lease:
        """Be the only one at work, for `lease_s` and for as long as it is renewed. Raises LeaseError while another one is."""
        holder = _holder()
        with self._transaction() as db:
            row = db.execute("SELECT token, holder, expires FROM lease").fetchone()
            now = time.time()
            if row is not None and row[2] > now and not _is_dead(row[1]):
                raise LeaseError(
                    f"{self.path}: {row[1].partition(' of boot')[0]} is at work on this pipeline; wait until it has ended, or, if "
                    f"it has died, {row[2] - now:,.0f} s more"
                )
            token = 1 if row is None else int(row[0]) + 1
            db.execute("INSERT OR REPLACE INTO lease VALUES (1, ?, ?, ?)", (token, holder, now + lease_s))
        return Lease(self.path, token, lease_s)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _holder() -> str:
    return f"{socket.gethostname()}, process {os.getpid()} of boot {_boot()}"


def _boot() -> str:
    """This start of the machine; process numbers mean nothing beyond it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def _is_dead(holder: str) -> bool:
    """Whether the holder of a lease was a process of this machine, and is no more."""
    found = re.fullmatch(r"(.*), process (\d+) of boot (.*)", holder)
    if found is None or found[1] != socket.gethostname() or found[3] in ("unknown", "") or found[3] != _boot():
        return False
    try:
        os.kill(int(found[2]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is there, of another user
        return False
    return False


class Lease:
    """A lease that a thread of its own renews, three times while it lasts, until it is closed.

    `check` may be called by any thread.
    """

    def __init__(self, path: Path, token: int, lease_s: float) -> None:
        self._path, self._token, self._lease_s = path, token, lease_s
        self._closed = threading.Event()
        self._good_until = time.monotonic() + lease_s
        self._thread = threading.Thread(target=self._renew, name="flowps-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseError if it has gone to another command, or could not be renewed in time."""
        if time.monotonic() > self._good_until:
            raise LeaseError(f"{self._path}: the lease could not be renewed in time; another command may be at work")

    def close(self) -> None:
        """Give it back. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        with closing(sqlite3.connect(self._path, timeout=_BUSY_S)) as db, db:
            db.execute("UPDATE lease SET expires = 0 WHERE token = ?", (self._token,))

    def _renew(self) -> None:
        while not self._closed.wait(self._lease_s / 3):
            asked = time.monotonic()
            try:
                with closing(sqlite3.connect(self._path, timeout=self._lease_s / 3)) as db, db:
                    ours = db.execute(
                        "UPDATE lease SET expires = ? WHERE token = ?", (time.time() + self._lease_s, self._token)
                    ).rowcount
            except sqlite3.Error:  # busy, or a full disk: the next round
                continue
            if not ours:
                self._good_until = 0.0
                return
            self._good_until = asked + self._lease_s

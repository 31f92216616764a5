"""`Live`: the bundle that is served, followed as newer versions come.

A newer version is loaded beside the one that is served, and takes its place in one assignment: whoever reads the old one keeps it
until done. A version that cannot be loaded is remarked, once, and the old one stays; it is tried again when its files change.
Memory has room for both meanwhile.

Threads: `tables` may be read by any; `refresh` by one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from flowps.errors import FlowpsError
from flowps.serving.bundle import live_folder
from flowps.serving.manifest import MANIFEST
from flowps.serving.rows import Tables, load_tables


class Meter(Protocol):
    """Is told what happens; from any thread."""

    def answered(self, call: str, code: str, seconds: float) -> None:
        """A call has ended with this status code."""

    def looked_up(self, slot: str, signs: int, unknown: int) -> None:
        """Signs of a slot were read, so many of them without a row."""

    def loaded(self, tables: Tables) -> None:
        """This is served from now on."""

    def failed(self) -> None:
        """A newer version could not be loaded."""


class Live:
    """Serves the live version of the bundle in `out`, its files' checksums verified. Raises BundleError if there is none.

    say   told what people should know
    """

    def __init__(self, out: Path, meter: Meter, say: Callable[[str], None] = lambda text: None) -> None:
        self._out, self._meter, self._say = out, meter, say
        self._seen = self._served = _fingerprint(out)
        self._tables = load_tables(out, verify=True)
        meter.loaded(self._tables)

    @property
    def tables(self) -> Tables:
        """What is served now. One answer asks once."""
        return self._tables

    def refresh(self) -> bool:
        """Load the live version if it is another than the one last tried. Returns whether something else is served now."""
        seen = _fingerprint(self._out)
        if seen in (self._seen, self._served):
            self._seen = seen
            return False
        self._seen = seen
        try:
            tables = load_tables(self._out, verify=True)
        except (FlowpsError, MemoryError) as error:
            self._meter.failed()
            what = str(error) or "there is not enough memory for it beside the old one"
            self._say(f"another version cannot be served: {what}; version {self._tables.version.number} stays")
            return False
        before, self._tables, self._served = self._tables, tables, seen
        self._meter.loaded(tables)
        self._say(f"version {tables.version.number} is served in place of {before.version.number}: {tables.num_rows:,} rows")
        return True


class Watcher:
    """Calls `refresh` every `poll_s` seconds, in a thread of its own, until `close`."""

    def __init__(self, live: Live, poll_s: float) -> None:
        self._live, self._poll_s = live, poll_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flowps-serve-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; what it is loading is loaded first. Idempotent."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._poll_s):
            self._live.refresh()


def _fingerprint(out: Path) -> tuple[object, ...]:
    """What changes when another version is live, or when the files of the live one change."""
    with suppress(FlowpsError, OSError):
        folder = live_folder(out)
        found = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
        return (folder / MANIFEST).stat().st_ino, *((str(path), of.st_size, of.st_mtime_ns) for path, of in found)
    return ()

"""`Trace`: spans of stages, thread by thread, and the file that Perfetto and Chrome's tracing open.

A role has a trace only while it is asked for. Spans are taken from all processes in the end and put on one clock, the command's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

NO_BATCH = -1
MOST_SPANS = 1_000_000  # of one role: some 100 MB


class RoleSpans(msgspec.Struct, frozen=True):
    """What a role has traced.

    role, process   its name, and its process: host and pid
    threads         names by number
    spans           name, thread, begin and end in seconds of the role's Unix clock, batch
    left_out        spans that were too many
    """

    role: str
    process: str
    threads: dict[int, str]
    spans: list[tuple[str, int, float, float, int]]
    left_out: int = 0


class Trace:
    """Spans of one role, of the batches `first` … `last` - 1 and of what belongs to no batch meanwhile. Any thread may add."""

    def __init__(self, first: int = 0, last: float = float("inf")) -> None:
        self._first, self._last = first, last
        self._begun = first <= 0
        self._ended = False
        self._spans: list[tuple[str, int, float, float, int]] = []
        self._threads: dict[int, str] = {}
        self._left_out = 0
        self._elsewhere: dict[str, RoleSpans] = {}
        self._offset = time.time() - time.perf_counter()

    def add(self, name: str, began: float, ended: float, batch: int = NO_BATCH, thread: str = "") -> None:
        """Add a span by its two ends (time.perf_counter) on this thread, or on the one named."""
        if batch == NO_BATCH:
            if not self._begun or self._ended:
                return
        elif not self._first <= batch < self._last:
            self._ended = self._ended or batch >= self._last
            return
        else:
            self._begun = True
        if len(self._spans) >= MOST_SPANS:
            self._left_out += 1
            return
        ident = threading.get_ident() if not thread else hash(thread)
        if ident not in self._threads:
            self._threads[ident] = thread or threading.current_thread().name
        self._spans.append((name, ident, began, ended, batch))

    def add_elsewhere(self, role: str, process: str, name: str, thread: int, began: float, ended: float) -> None:
        """Add a span of a process that has no trace of its own, by its two ends on its Unix clock."""
        if not self._begun or self._ended:
            return
        of = self._elsewhere.setdefault(process, RoleSpans(role, process, {}, []))
        of.threads.setdefault(thread, f"{role}-{len(of.threads)}")
        of.spans.append((name, thread, began, ended, NO_BATCH))

    def take(self, role: str, process: str) -> list[RoleSpans]:
        """What was traced so far, of this role and elsewhere; it is not kept."""
        spans, self._spans = self._spans, []
        elsewhere, self._elsewhere = self._elsewhere, {}
        at = self._offset
        unix = [(name, thread, began + at, ended + at, batch) for name, thread, began, ended, batch in spans]
        return [RoleSpans(role, process, dict(self._threads), unix, self._left_out), *elsewhere.values()]


def write(path: Path, roles: Iterable[RoleSpans], clocks: dict[str, float]) -> int:
    """Write a file in Chrome's trace event format; returns the number of spans.

    clocks   seconds to add to the Unix clock of each process, to have the command's

    A batch's spans carry its number, and arrows lead from one to the next. Raises OSError.
    """
    found = [
        (role, name, thread, began + clocks.get(role.process, 0.0), ended + clocks.get(role.process, 0.0), batch)
        for role in roles
        for name, thread, began, ended, batch in role.spans
    ]
    start = min((span[3] for span in found), default=0.0)
    processes: dict[str, int] = {}
    threads: dict[tuple[str, int], int] = {}
    events: list[dict[str, Any]] = []
    ends: dict[int, list[tuple[float, float, int, int]]] = {}
    for role, name, thread, began, ended, batch in found:
        key = f"{role.role} ({role.process})"
        if key not in processes:
            pid = processes[key] = len(processes) + 1
            events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": key}})
            events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}})
        pid = processes[key]
        if (key, thread) not in threads:
            tid = threads[key, thread] = len(threads) + 1
            events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": role.threads[thread]}})
        tid = threads[key, thread]
        event = {
            "ph": "X",
            "name": name,
            "cat": "stage",
            "pid": pid,
            "tid": tid,
            "ts": _us(began - start),
            "dur": _us(ended - began),
        }
        if batch != NO_BATCH:
            event["args"] = {"batch": batch}
            ends.setdefault(batch, []).append((began - start, ended - start, pid, tid))
        events.append(event)
    for batch, spans in ends.items():
        spans.sort()
        for (_, ended, pid, tid), (began, _, to_pid, to_tid) in pairwise(spans):
            if (pid, tid) != (to_pid, to_tid) and began >= ended:
                arrow = {"name": "batch", "cat": "batch", "id": f"{batch}-{len(events)}"}
                events.append({**arrow, "ph": "s", "pid": pid, "tid": tid, "ts": _us(ended) - 0.001})
                events.append({**arrow, "ph": "f", "bp": "e", "pid": to_pid, "tid": to_tid, "ts": _us(began) + 0.001})
    path.write_bytes(msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"}))
    return len(found)


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)

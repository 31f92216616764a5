"""Traces of a run's roles: how they come together in one file, on one clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flowps.cluster.role_status import statuses_here
from flowps.errors import RunDirError
from flowps.status import trace as trace_file
from flowps.status.figures import usage_here
from flowps.status.trace import RoleSpans

Run = Callable[..., dict[str, Any]]
_PINGS = 5


def prepare(path: Path) -> None:
    """Make sure, before anything is trained, that the file can be written. Raises RunDirError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise RunDirError(f"trace: {path} cannot be written: {error.strerror or error}; give another file") from None


def take(run_id: str) -> tuple[str, list[RoleSpans]]:
    """What the roles of a run in this process have traced, and the process; nothing of it is kept. Run on every worker."""
    process = usage_here().process
    traces = {role: status.trace for (of, role), status in statuses_here().items() if of == run_id}
    return process, [spans for role, trace in traces.items() if trace is not None for spans in trace.take(role, process)]


def collect(run: Run, run_id: str, workers: Sequence[str], path: Path) -> str:
    """Write what all workers have traced to `path`; returns what to say of it, also where it cannot be written.

    run   calls a function on workers, as Dask's `Client.run`
    """
    clocks: dict[str, float] = {}
    found: list[RoleSpans] = []
    for address, (process, spans) in run(take, run_id, workers=workers, on_error="ignore").items():
        clocks[process] = _ahead(run, address)
        found += spans
    try:
        count = trace_file.write(path, found, clocks)
    except OSError as error:
        return f"trace: {path} cannot be written: {error.strerror or error}"
    left_out = sum(spans.left_out for spans in found)
    more = f"; {left_out:,} more did not fit: trace fewer batches (status.trace_from, status.trace_batches)" if left_out else ""
    return f"trace: {count:,} spans in {path}, for https://ui.perfetto.dev{more}"


def _ahead(run: Run, address: str) -> float:
    """Seconds that the clock here is ahead of a worker's: from the fastest of some answers, which came half way between.

    0 where that may be as well, as on the same machine: half way is only a guess.
    """
    took, ahead = min(_pings(run, address))
    return ahead if abs(ahead) > took / 2 else 0.0


def _pings(run: Run, address: str) -> Iterable[tuple[float, float]]:
    for _ in range(_PINGS):
        asked = time.time()
        there = run(time.time, workers=[address])[address]
        answered = time.time()
        yield answered - asked, (asked + answered) / 2 - there

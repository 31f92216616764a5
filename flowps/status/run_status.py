"""`RunStatus`: what one role of a run measures of itself, always on: timings of every stage, counters, and spans while traced.

Any thread may call anything here; an observation happens a few times per batch, never per row.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from types import TracebackType

from flowps.status.stage import Histogram, Stage, StageSummary
from flowps.status.trace import NO_BATCH, Trace


class RunStatus:
    """Stages and counters by name. Made on first use, so whoever times a stage just names it.

    trace   where the spans of stages go; None: nowhere
    """

    def __init__(self, trace: Trace | None = None) -> None:
        self.trace = trace
        self._lock = threading.Lock()
        self._stages: dict[str, Stage] = {}
        self._counters: defaultdict[str, int] = defaultdict(int)

    def stage(self, name: str) -> Stage:
        """The stage of that name; hold on to it where it is observed often."""
        found = self._stages.get(name)
        if found is None:
            with self._lock:
                found = self._stages.setdefault(name, Stage())
        return found

    def observe(self, name: str, seconds: float) -> None:
        """Add one time of a stage, in seconds."""
        self.stage(name).observe(seconds)

    def span(self, name: str, began: float, ended: float, batch: int = NO_BATCH) -> None:
        """Add one time of a stage by its two ends (time.perf_counter), on this thread, for a batch."""
        self.stage(name).observe(ended - began)
        if self.trace is not None:
            self.trace.add(name, began, ended, batch)

    def timed(self, name: str, batch: int = NO_BATCH) -> Timed:
        """Time a `with` block as one observation of a stage, for a batch; a block that raises is not counted."""
        return Timed(self, name, batch)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[name] += by

    def summaries(self) -> dict[str, StageSummary]:
        """Figures of every stage that was observed, by name."""
        with self._lock:
            stages = dict(self._stages)
        found = {name: stage.summary() for name, stage in stages.items()}
        return {name: summary for name, summary in found.items() if summary.count}

    def histograms(self) -> dict[str, Histogram]:
        """Times of every stage that was observed, by name."""
        with self._lock:
            stages = dict(self._stages)
        found = {name: stage.histogram() for name, stage in stages.items()}
        return {name: histogram for name, histogram in found.items() if histogram.count}

    def counters(self) -> Mapping[str, int]:
        """All counters."""
        with self._lock:
            return dict(self._counters)


class Timed:
    """A `with` block that is timed."""

    __slots__ = ("_batch", "_began", "_name", "_status")

    def __init__(self, status: RunStatus, name: str, batch: int) -> None:
        self._status, self._name, self._batch = status, name, batch

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._status.span(self._name, self._began, time.perf_counter(), self._batch)

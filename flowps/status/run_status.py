"""`RunStatus`: timings of every stage and counters, always on.

A stage's times go into a quantile sketch (DDSketch: Masson, Rim, Lee, "DDSketch: A Fast and Fully-Mergeable Quantile Sketch",
VLDB 2019; relative error 1 %), in µs. Sketches of several threads or processes merge without loss. Any thread may call
anything here; an observation happens a few times per batch, never per row.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ddsketch import DDSketch

RELATIVE_ERROR = 0.01


@dataclass(frozen=True)
class StageSummary:
    """One stage's times in µs. Quantiles are within 1 %; count, total and max are exact."""

    count: int
    total_us: float
    p50_us: float
    p95_us: float
    p99_us: float
    max_us: float


class Stage:
    """The times of one stage."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sketch = DDSketch(RELATIVE_ERROR)
        self._max_us = 0.0

    def observe(self, seconds: float) -> None:
        """Add one time, in seconds."""
        us = seconds * 1e6
        with self._lock:
            self._sketch.add(us)
            if us > self._max_us:
                self._max_us = us

    def merge(self, other: Stage) -> None:
        """Add all times of `other`, which stays as it is and must not be observed meanwhile by the same two in reverse order."""
        with other._lock:
            sketch, max_us = other._sketch, other._max_us
            with self._lock:
                self._sketch.merge(sketch)
                self._max_us = max(self._max_us, max_us)

    def summary(self) -> StageSummary:
        """The figures so far."""
        with self._lock:
            # The sketch's highest quantile may exceed the largest value by its error.
            p50, p95, p99 = (min(self._sketch.get_quantile_value(q) or 0.0, self._max_us) for q in (0.5, 0.95, 0.99))
            return StageSummary(int(self._sketch.count), self._sketch.sum, p50, p95, p99, self._max_us)


class RunStatus:
    """Stages and counters by name. Made on first use, so whoever times a stage just names it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, Stage] = {}
        self._counters: defaultdict[str, int] = defaultdict(int)

    def stage(self, name: str) -> Stage:
        """The stage of that name; hold on to it where it is observed often."""
        with self._lock:
            if name not in self._stages:
                self._stages[name] = Stage()
            return self._stages[name]

    def observe(self, name: str, seconds: float) -> None:
        """Add one time of a stage, in seconds."""
        self.stage(name).observe(seconds)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time the body as one observation of a stage; a body that raises is not counted."""
        start = time.perf_counter()
        yield
        self.observe(name, time.perf_counter() - start)

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

    def counters(self) -> Mapping[str, int]:
        """All counters."""
        with self._lock:
            return dict(self._counters)

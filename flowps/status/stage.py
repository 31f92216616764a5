"""`Stage`: the times of one stage, always on; a histogram that says quantiles within 1 %.

Buckets are those of DDSketch (Masson, Rim, Lee, "DDSketch: A Fast and Fully-Mergeable Quantile Sketch", VLDB 2019): their bounds
grow by 2 %, so histograms of several threads or processes add up without loss. An observation is one append; buckets are counted
later, many at a time.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Sequence

import msgspec
import numpy as np

RELATIVE_ERROR = 0.01
_GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_SCALE = 1 / math.log(_GROWTH)
_LEAST_US = 1e-3  # shorter times count as none
_NONE = -(1 << 31)  # their bucket
_MOST_PENDING = 1024


class StageSummary(msgspec.Struct, frozen=True):
    """One stage's times in µs. Quantiles are within 1 %; count, total and max are exact."""

    count: int
    total_us: float
    p50_us: float
    p95_us: float
    p99_us: float
    max_us: float


class Histogram(msgspec.Struct):
    """How often which times came, in µs: of bucket b, those above growth ** (b - 1) and up to growth ** b."""

    counts: dict[int, int] = msgspec.field(default_factory=dict)
    count: int = 0
    total_us: float = 0.0
    max_us: float = 0.0

    def add(self, times_us: Sequence[float]) -> None:
        """Count some times."""
        if not times_us:
            return
        times = np.asarray(times_us, np.float64)
        buckets = np.ceil(np.log(np.maximum(times, _LEAST_US)) * _SCALE).astype(np.int64)
        buckets[times < _LEAST_US] = _NONE
        counts = Counter(buckets.tolist())
        for bucket, count in counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.count += len(times)
        self.total_us += float(times.sum())
        self.max_us = max(self.max_us, float(times.max()))

    def merge(self, other: Histogram) -> None:
        """Count all that `other` has counted."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.count += other.count
        self.total_us += other.total_us
        self.max_us = max(self.max_us, other.max_us)

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """For each of the ascending shares the time in µs below which so many of all lie; 0 where there are none."""
        found: list[float] = []
        below, buckets = 0, iter(sorted(self.counts.items()))
        bucket = 0
        for share in shares:
            while self.count and below <= math.floor(share * (self.count - 1)):
                bucket, count = next(buckets)
                below += count
            # The middle of the bucket may exceed the largest time by the error.
            found.append(min(2 * _GROWTH**bucket / (_GROWTH + 1), self.max_us) if self.count and bucket != _NONE else 0.0)
        return found

    def up_to(self, bounds_us: Sequence[float]) -> list[int]:
        """How many times are at most each of the ascending bounds, as far as buckets tell."""
        ends = sorted(self.counts.items())
        found, below, k = list[int](), 0, 0
        for bound in bounds_us:
            last = math.floor(math.log(bound) * _SCALE + 1e-9)
            while k < len(ends) and ends[k][0] <= last:
                below += ends[k][1]
                k += 1
            found.append(below)
        return found

    def summary(self) -> StageSummary:
        """The figures."""
        p50, p95, p99 = self.quantiles((0.5, 0.95, 0.99))
        return StageSummary(self.count, self.total_us, p50, p95, p99, self.max_us)


class Stage:
    """The times of one stage. Any thread may call any method."""

    def __init__(self) -> None:
        self._pending: deque[float] = deque()  # appended to and taken from without a lock: each is atomic
        self._lock = threading.Lock()  # guards the histogram
        self._histogram = Histogram()

    def observe(self, seconds: float) -> None:
        """Add one time, in seconds."""
        self._pending.append(seconds * 1e6)
        if len(self._pending) >= _MOST_PENDING:
            self._count_pending()

    def summary(self) -> StageSummary:
        """The figures so far."""
        self._count_pending()
        with self._lock:
            return self._histogram.summary()

    def histogram(self) -> Histogram:
        """A copy of what was counted so far."""
        self._count_pending()
        found = Histogram()
        with self._lock:
            found.merge(self._histogram)
        return found

    def _count_pending(self) -> None:
        with self._lock:
            # As many as there are now: others may append for as long as this takes.
            self._histogram.add([self._pending.popleft() for _ in range(len(self._pending))])

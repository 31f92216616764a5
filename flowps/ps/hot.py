"""`HotSigns`: which signs are asked for most, from a sample of what is looked up.

A summary of counters in the manner of space-saving and Misra-Gries (Agarwal et al., "Mergeable Summaries", PODS 2012): the counts
of a sample are added to those kept, and the largest stay. A sign with more than 1 / `KEPT` of the sample cannot be missed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Uint64

KEPT = 256
EVERY, SAMPLE = 64, 2048  # every so many lookups, so many signs: some 5 µs a lookup


class HotSigns:
    """Called by one thread at a time."""

    def __init__(self) -> None:
        self._lookups = self._sampled = 0
        self._signs: Uint64 = np.empty(0, np.uint64)
        self._slots: NDArray[np.int64] = np.empty(0, np.int64)
        self._counts: NDArray[np.int64] = np.empty(0, np.int64)

    def observe(self, signs: Uint64, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        """See a lookup: signs uint64, those of slot k from starts[k] to stops[k]. Most lookups are passed over."""
        number, self._lookups = self._lookups, self._lookups + 1
        if number % EVERY:
            return
        ends = np.cumsum(stops - starts)
        total = int(ends[-1]) if len(ends) else 0
        if not total:
            return
        step = -(-total // SAMPLE)
        chosen = np.arange(number // EVERY % step, total, step)
        slots = np.searchsorted(ends, chosen, side="right")
        self._add(signs[starts[slots] + chosen - (ends - (stops - starts))[slots]], slots)
        self._sampled += len(chosen)

    def top(self, count: int) -> list[tuple[int, int, float]]:
        """The hottest: slot's position, sign, and its share of all signs, as estimated; the hottest first."""
        order = np.argsort(-self._counts, kind="stable")[:count]
        return [(int(self._slots[k]), int(self._signs[k]), float(self._counts[k]) / self._sampled) for k in order]

    def _add(self, signs: Uint64, slots: Sequence[int] | NDArray[np.int64]) -> None:
        found, first, counts = np.unique(signs, return_index=True, return_counts=True)
        together = np.concatenate([self._signs, found])
        both, place, where = np.unique(together, return_index=True, return_inverse=True)
        sums = np.zeros(len(both), np.int64)
        np.add.at(sums, where, np.concatenate([self._counts, counts]))
        of_slot = np.concatenate([self._slots, np.asarray(slots, np.int64)[first]])[place]
        if len(both) > KEPT:
            kept = np.argpartition(-sums, KEPT)[: KEPT + 1]
            least = kept[np.argmin(sums[kept])]
            # What does not stay takes its count from those that do: no count is too large, and none by more than the sum of these.
            sums -= sums[least]
            kept = kept[sums[kept] > 0]
            both, of_slot, sums = both[kept], of_slot[kept], sums[kept]
        self._signs, self._slots, self._counts = both, of_slot, sums

"""Sums of real numbers that do not depend on the order: multiples of 2^-40, added as integers.

Called by one thread per object.
"""

from __future__ import annotations

import numpy as np

from flowps.batch import Float32
from flowps.quality.cells import Float64, Int64

# 9e-13: a mean is off by half of that at most.
FRACTION_BITS = 40
# A logit beyond costs as much as one at ±2^20: its loss still fits an int64.
MAX_LOGIT = 2.0**20
# Halves of so many samples add up below 2^53, where float64 is exact: np.bincount adds in it.
_CHUNK = 1 << 20
_LOW = (1 << 32) - 1


def units(values: Float64) -> Int64:
    """Multiples of 2^-40, rounded; `values` float64 [n] in 0 … 2^20 + 1."""
    return np.rint(values * 2.0**FRACTION_BITS).astype(np.int64)


def losses_and_predictions(labels: Float32, logits: Float32) -> tuple[Int64, Int64]:
    """Of each sample the logloss in nats and the probability of a 1, int64 [n] each, in units of 2^-40; computed in float64.

    Processors with and without AVX-512 differ in the last bit of some exp, and so by one unit for one sample in 200,000: the mean
    of the losses by less than 1e-17. Of one kind they agree, wherever a sample stands in its array.
    """
    logits = np.clip(logits.astype(np.float64), -MAX_LOGIT, MAX_LOGIT)
    # One pass of exp serves both: p = 1 / (1 + e), and -log p = log1p(e) with e = exp(-|logit|) on the right side.
    small = np.exp(-np.abs(logits))
    losses = np.maximum(logits, 0) - logits * labels + np.log1p(small)
    return units(losses), units(np.where(logits >= 0, 1, small) / (1 + small))


class Sums:
    """Adds up units by number of value."""

    def __init__(self) -> None:
        # The upper and the lower 32 bits: room for 2^31 samples of the largest loss there is.
        self._parts: Int64 = np.zeros((2, 0), np.int64)

    def add(self, values: Int64, units: Int64) -> None:
        """Add `units` int64 [n], none negative, to the sums of `values` int64 [n]."""
        for start in range(0, len(values), _CHUNK):
            of, part = values[start : start + _CHUNK], units[start : start + _CHUNK]
            halves = [np.bincount(of, weights=half) for half in (part >> 32, part & _LOW)]
            self._put(np.array(halves, np.int64))

    def merge(self, other: Sums, numbers: Int64) -> None:
        """Add the sums of `other`, whose value number k is `numbers[k]` here. Leaves it as it is."""
        numbers = numbers[: other._parts.shape[1]]
        theirs = np.zeros((2, int(numbers.max(initial=-1)) + 1), np.int64)
        theirs[:, numbers] = other._parts
        self._put(theirs)

    def total(self, values: Int64) -> int:
        """The sum of units of all these values, each given once."""
        high, low = self._parts[:, values[values < self._parts.shape[1]]].sum(axis=1)
        return (int(high) << 32) + int(low)

    def _put(self, parts: Int64) -> None:
        if parts.shape[1] > self._parts.shape[1]:
            parts, self._parts = self._parts, parts
        self._parts[:, : parts.shape[1]] += parts
        # Carried at once: nothing overflows, and what is kept is the same whatever the order.
        self._parts[0] += self._parts[1] >> 32
        self._parts[1] &= _LOW

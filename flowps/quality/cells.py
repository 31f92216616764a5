"""`Cells`: how many samples have each (value, logit bin, label). AUC, PR-AUC and calibration by bucket need nothing else.

Counts are integers, so neither how samples are cut nor the order of merging leaves a trace. Called by one thread per object.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

# Bin k is centred on the logit k / 2^14 - 32: predictions closer than 6e-5, or beyond ±32, count as ties, as in
# trainer.metrics. That moves the AUC of logits that spread by 0.003 or more by less than 1e-5.
BIN_BITS = 20
BINS = 1 << BIN_BITS
LOGIT_RANGE = 32.0
BIN_WIDTH = 2 * LOGIT_RANGE / BINS

# A cell takes 16 bytes: 64 MB a column at most, and as much again while samples wait.
MAX_CELLS = 1 << 22
_WAITING = 1 << 19


def bins_of(logits: Float32) -> Int64:
    """The bin of each logit, int64 [n] in 0 … BINS - 1. Logits are finite."""
    bins = np.rint((np.clip(logits.astype(np.float64), -LOGIT_RANGE, LOGIT_RANGE) + LOGIT_RANGE) / BIN_WIDTH)
    return np.minimum(bins, BINS - 1).astype(np.int64)


def predictions_of(bins: Int64) -> Float64:
    """The probability in the middle of each bin, float64 [n]: off by 3e-5 of itself at most, for logits within ±32."""
    return np.asarray(1 / (1 + np.exp(LOGIT_RANGE - bins * BIN_WIDTH)))


class Counts(NamedTuple):
    """Cells side by side, sorted by value and then bin, each pair once; all int64 [cells]."""

    values: Int64
    bins: Int64
    positives: Int64
    negatives: Int64


class Cells:
    """Counts samples by (value, bin, label), at most `max_cells` of them.

    When there are more, two neighbouring bins become one, in all of the object, as often as it takes. A part of the samples
    never has more cells than all of them, so no part becomes coarser than the whole has to be, and the whole is as coarse
    whatever the order. With one bin left there are as many cells as values, twice: more than that must be allowed.
    """

    def __init__(self, max_cells: int) -> None:
        self._max = max_cells
        self._halvings = 0
        # value << 21 | bin << 1 | label; sorted, each once.
        self._keys: Int64 = np.empty(0, np.int64)
        self._counts: Int64 = np.empty(0, np.int64)
        self._waiting: list[Int64] = []
        self._num_waiting = 0

    @property
    def bin_width(self) -> float:
        """Predictions closer than this, in the logit, may count as ties."""
        self._settle()
        return BIN_WIDTH * 2.0**self._halvings

    def add(self, values: Int64, bins: Int64, labels: NDArray[np.bool_]) -> None:
        """Count samples: their value's number, their bin and their label, all [n]. Copied."""
        self._waiting.append((values << (BIN_BITS + 1)) | (bins << 1) | labels)
        self._num_waiting += len(values)
        # As many as there are cells, or adding them would cost the more the more cells there are.
        if self._num_waiting >= max(_WAITING, len(self._keys)):
            self._settle()

    def merge(self, other: Cells, numbers: Int64) -> None:
        """Add what `other` counted, whose value number k is `numbers[k]` here. Leaves it as it is."""
        self._settle()
        other._settle()
        self._halvings = max(self._halvings, other._halvings)
        low = (1 << (BIN_BITS + 1)) - 1
        theirs = (numbers[other._keys >> (BIN_BITS + 1)] << (BIN_BITS + 1)) | (other._keys & low)
        self._put(theirs, other._counts)

    def counts(self) -> Counts:
        """All that was counted, by value and bin."""
        self._settle()
        pairs = self._keys >> 1
        positive = (self._keys & 1).astype(bool)
        starts = starts_of(pairs)
        sums = [np.add.reduceat(np.where(of, self._counts, 0), starts) for of in (positive, ~positive)] if len(starts) else []
        pairs = pairs[starts]
        return Counts(pairs >> BIN_BITS, pairs & (BINS - 1), *(sums or [self._counts, self._counts]))

    def _settle(self) -> None:
        if not self._waiting:
            return
        keys = np.sort(np.concatenate(self._waiting))
        self._waiting, self._num_waiting = [], 0
        starts = starts_of(keys)
        self._put(keys[starts], np.diff(starts, append=len(keys)))

    def _put(self, keys: Int64, counts: Int64) -> None:
        """Add cells, in any order."""
        keys, counts = np.concatenate([self._keys, keys]), np.concatenate([self._counts, counts])
        while True:
            keys = keys & ~(((1 << self._halvings) - 1) << 1)
            order = np.argsort(keys, kind="stable")
            keys, counts = keys[order], counts[order]
            starts = starts_of(keys)
            if len(starts):
                keys, counts = keys[starts], np.add.reduceat(counts, starts)
            if len(keys) <= self._max or self._halvings == BIN_BITS:
                break
            self._halvings += 1
        self._keys, self._counts = keys, counts

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the distances between keys, which are small, and counts, in the fewest bytes that hold them."""
        self._settle()
        steps = np.diff(self._keys, prepend=0)
        return {"max": self._max, "halvings": self._halvings, "steps": narrow(steps), "counts": narrow(self._counts)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["max"])  # type: ignore[misc]
        self._halvings = state["halvings"]
        self._keys = np.cumsum(state["steps"], dtype=np.int64)
        self._counts = state["counts"].astype(np.int64)


def starts_of(values: NDArray[Any]) -> Int64:
    """Where runs of equal values start in `values` [n]; none when n is 0."""
    return np.flatnonzero(np.concatenate([np.ones(min(1, len(values)), bool), values[1:] != values[:-1]]))


def narrow(values: Int64) -> NDArray[Any]:
    """The same numbers, none negative, in the smallest unsigned type that holds them."""
    return values.astype(np.min_scalar_type(int(values.max())) if len(values) else np.uint8)

"""What the slots ask of the shards: counted on sample batches before a run, and on the batches of the run itself.

Covers counting only; `placement` spreads it. Reads batches and changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from flowps.batch import Batch, Uint64
from flowps.config import Slot

# What a shard spends, in ns of CPU: on a sign found and pooled, on a distinct row found and stepped, on a byte of the embeddings of
# one sample; and what the way there costs both sides in addition (`python -m bench.placement` fits them).
_SIGN_NS, _DISTINCT_NS, _BYTE_NS = 10.0, 100.0, 0.1
_WIRE_SIGN_NS, _WIRE_BYTE_NS = 14.0, 2.4
_SAMPLED_FIRST, _SAMPLED_EVERY = 4, 256  # batches in which distinct signs are counted: to sort every batch's would cost too much


class SlotLoad(msgspec.Struct, frozen=True):
    """What one slot brings.

    signs     per sample
    distinct  signs per sample that are the first of their kind in their batch: rows that a push steps
    rows      distinct signs in all that was counted
    """

    signs: float
    distinct: float
    rows: int

    def cost_ns(self, slot: Slot, share: float = 1.0, *, wire: bool = True) -> float:
        """CPU time per sample, when a shard has `share` of the slot's signs; its vector is pooled and sent whatever the share.

        wire   whether the shard is in another process
        """
        sign_ns, byte_ns = (_SIGN_NS + _WIRE_SIGN_NS, _BYTE_NS + _WIRE_BYTE_NS) if wire else (_SIGN_NS, _BYTE_NS)
        return share * (self.signs * sign_ns + self.distinct * _DISTINCT_NS) + slot.width * 4 * byte_ns


def measure(batches: Iterable[Batch]) -> list[SlotLoad]:
    """The load of every slot of `batches`, of which there must be one."""
    signs: list[list[Uint64]] = []
    samples = 0
    for batch in batches:
        samples += batch.size
        signs.append([batch.signs[start:stop] for start, stop in _bounds(batch)])
    distinct = [[np.unique(of_slot) for of_slot in of_batch] for of_batch in signs]
    return [
        SlotLoad(
            sum(len(of_batch[s]) for of_batch in signs) / samples,
            sum(len(of_batch[s]) for of_batch in distinct) / samples,
            len(np.unique(np.concatenate([of_batch[s] for of_batch in distinct]))),
        )
        for s in range(len(signs[0]))
    ]


class LoadMeter:
    """Counts what passes. Any thread may call any method."""

    def __init__(self, num_slots: int) -> None:
        self._lock = threading.Lock()  # guards everything below
        self._batches = self._samples = self._sampled = 0
        self._signs: NDArray[np.int64] = np.zeros(num_slots, np.int64)
        self._distinct: NDArray[np.int64] = np.zeros(num_slots, np.int64)

    def observe(self, batch: Batch) -> None:
        """Count a batch: its signs, and now and then how many of them are distinct."""
        with self._lock:
            number = self._batches
            self._batches += 1
            self._samples += batch.size
            self._signs += np.diff(batch.offsets[:: batch.size])
        if number < _SAMPLED_FIRST or number % _SAMPLED_EVERY == 0:
            distinct = [len(np.unique(batch.signs[start:stop])) for start, stop in _bounds(batch)]
            with self._lock:
                self._sampled += batch.size
                self._distinct += np.array(distinct, np.int64)

    def loads(self, rows: Sequence[int]) -> list[SlotLoad]:
        """What was counted so far; `rows`: of each slot, as the shards say."""
        with self._lock:
            samples, sampled = max(1, self._samples), max(1, self._sampled)
            counts = zip(self._signs, self._distinct, rows, strict=True)
            return [SlotLoad(float(s) / samples, float(d) / sampled, int(r)) for s, d, r in counts]


def _bounds(batch: Batch) -> list[tuple[int, int]]:
    """Where each slot's signs stand."""
    bounds = batch.offsets[:: batch.size]
    return [(int(start), int(stop)) for start, stop in pairwise(bounds)]

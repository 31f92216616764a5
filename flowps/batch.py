"""`Batch`: what travels from the hub to the trainer, and its slice that travels on to the shards.

Covers the layout and how pieces of a batch are joined at partition borders. Does not decode (hub) or look up (ps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowps.errors import DataError

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Uint64 = NDArray[np.uint64]

_MAX_SIGNS = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class Batch:
    """`size` samples as plain arrays. Read-only by agreement: any thread may read it, nobody writes after it is made.

    labels   float32 [size], each 0 or 1; with several label columns [size, labels]
    dense    float32 [size, dense_width], finite
    signs    uint64 [nnz], slot-major: first all signs of slot 0 in sample order, then slot 1, …
    shares   float32 [nnz], the weight of each sign in its bag, or None: all 1
    offsets  int32 [num_slots * size + 1]: the bag of slot s and sample b is `signs[offsets[k]:offsets[k + 1]]`, k = s * size + b
    weights  float32 [size], the weight of each sample in the loss, or None: all 1
    left_out samples that were read with these and left out on purpose; `size` may be 0 then
    """

    labels: Float32
    dense: Float32
    signs: Uint64
    offsets: Int32
    shares: Float32 | None = None
    weights: Float32 | None = None
    left_out: int = 0

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.labels)

    @property
    def read(self) -> int:
        """Number of samples that were read."""
        return self.size + self.left_out

    @property
    def num_slots(self) -> int:
        """Number of sparse slots; of a batch with samples."""
        return (len(self.offsets) - 1) // len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.labels, self.dense, self.signs, self.offsets, self.shares, self.weights)
        return sum(array.nbytes for array in arrays if array is not None)

    @staticmethod
    def concat(pieces: Sequence[Batch]) -> Batch:
        """Join `pieces`, in order, into one batch (copies; returns the piece itself when there is only one)."""
        left_out = sum(p.left_out for p in pieces)
        pieces = [p for p in pieces if p.size] or pieces[:1]
        if len(pieces) == 1:
            return pieces[0] if pieces[0].left_out == left_out else replace(pieces[0], left_out=left_out)
        num_slots = pieces[0].num_slots
        # Bag lengths as [slot, sample] make the join a concatenation along the sample axis.
        lengths = np.concatenate([np.diff(p.offsets).reshape(num_slots, p.size) for p in pieces], axis=1)
        bounds = [p.offsets[:: p.size] for p in pieces]

        def joined(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
            parts = [v[at[s] : at[s + 1]] for s in range(num_slots) for v, at in zip(values, bounds, strict=True)]
            return np.concatenate(parts) if parts else values[0][:0]

        weighted = any(p.shares is not None for p in pieces)
        return Batch(
            labels=np.concatenate([p.labels for p in pieces]),
            dense=np.concatenate([p.dense for p in pieces]),
            signs=joined([p.signs for p in pieces]),
            offsets=offsets_of(lengths),
            shares=joined([np.ones(len(p.signs), np.float32) if p.shares is None else p.shares for p in pieces])
            if weighted
            else None,
            weights=None if pieces[0].weights is None else np.concatenate([p.weights for p in pieces if p.weights is not None]),
            left_out=left_out,
        )


def offsets_of(lengths: Int32) -> Int32:
    """The offsets of a batch from its bags' lengths, int32 [num_slots, size]. Raises DataError beyond 2^31 signs."""
    offsets = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths.reshape(-1), out=offsets[1:])
    if offsets[-1] > _MAX_SIGNS:
        raise DataError(f"a batch of {lengths.shape[1]} samples has {offsets[-1]} signs, more than 2^31; lower data.batch_size")
    return offsets.astype(np.int32)

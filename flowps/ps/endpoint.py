"""`Endpoint`: how a client speaks to a shard, wherever it is; and the shard in the same process seen so.

Covers the protocol, and the shard's own line of embeddings. The way over the network is `wire`; trainers
that step together are in `together`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flowps.batch import Float32
from flowps.ps.memory import aligned_empty
from flowps.ps.parcel import Lines, Parcel
from flowps.ps.shard import Shard


class Endpoint(Protocol):
    """A shard that answers with lines of its own slots only. Any thread may call any method."""

    def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Float32 | None = None) -> Float32:
        """Pooled embeddings, float32 [size, shard width], C-contiguous; for the caller to read. As `Shard.lookup`.

        out   where to write them; None: anywhere
        """

    def find(self, batch_id: int, parcel: Parcel) -> None:
        """The first half of a training lookup: rows are found or created, and not read yet. As `Shard.find`."""

    def pool(self, batch_id: int, size: int, out: Float32 | None = None) -> Float32:
        """The other half, once for each batch that was found: what `lookup` returns, of the rows as they are now."""

    def push(self, batch_id: int, gradient: Lines, rate_scale: float) -> int:
        """Step the batch's rows with the gradient of the answer, [size, shard width]; returns their number. As `Shard.push`."""

    def forget(self, batch_id: int) -> None:
        """There will be no push."""


class LocalEndpoint(Endpoint):
    """`shard`, whose slots have `widths` floats each."""

    def __init__(self, shard: Shard, widths: Sequence[int]) -> None:
        self._shard = shard
        self._positions = np.arange(len(widths), dtype=np.int64)
        self._columns = np.cumsum([0, *widths], dtype=np.int64)[:-1]
        self._width = sum(widths)

    def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Float32 | None = None) -> Float32:
        """See Endpoint."""
        signs, offsets, shares = parcel.joined()
        if out is None:
            out = aligned_empty((parcel.size, self._width))
        self._shard.lookup(batch_id, signs, offsets, parcel.size, self._positions, self._columns, out, training, shares)
        return out

    def find(self, batch_id: int, parcel: Parcel) -> None:
        """See Endpoint."""
        signs, offsets, shares = parcel.joined()
        self._shard.find(batch_id, signs, offsets, parcel.size, self._positions, self._columns, shares)

    def pool(self, batch_id: int, size: int, out: Float32 | None = None) -> Float32:
        """See Endpoint."""
        if out is None:
            out = aligned_empty((size, self._width))
        self._shard.pool(batch_id, out)
        return out

    def push(self, batch_id: int, gradient: Lines, rate_scale: float) -> int:
        """See Endpoint."""
        return self._shard.push(batch_id, gradient.array(), rate_scale)

    def forget(self, batch_id: int) -> None:
        """See Endpoint."""
        self._shard.forget(batch_id)

"""`PsClient`: what a trainer calls. Slices a batch by placement, asks every shard at once, puts the answers in one buffer.

Covers shards in the same process, which write straight into the buffer. Any thread may call any method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Batch, Float32
from flowps.ps.placement import Placement
from flowps.ps.shard import Shard


class PsClient:
    """Lookups and pushes over `shards`, placed as `placement` says."""

    def __init__(self, shards: Sequence[Shard], placement: Placement) -> None:
        self._width = placement.width
        columns = np.array(placement.columns, np.int64)
        self._shards: list[tuple[Shard, NDArray[np.int64], NDArray[np.int64]]] = []
        for shard, slots in zip(shards, placement.shards, strict=True):
            if slots:
                positions = np.array(slots, np.int64)
                self._shards.append((shard, positions, columns[positions]))
        # The caller's thread serves the first shard itself.
        self._pool = ThreadPoolExecutor(max(1, len(self._shards) - 1), "flowps-ps-client")

    def lookup(self, batch_id: int, batch: Batch, training: bool) -> Float32:
        """Pooled embeddings of `batch`, float32 [size, width]. See `Shard.lookup` for `training` and the errors.

        When one shard fails, the others forget the batch.
        """
        out = np.empty((batch.size, self._width), np.float32)
        answered: list[Shard] = []

        def ask(k: int) -> None:
            shard, positions, columns = self._shards[k]
            shard.lookup(batch_id, batch.signs, batch.offsets, batch.size, positions, columns, out, training)
            answered.append(shard)

        try:
            self._on_every_shard(ask)
        except BaseException:
            if training:
                for shard in answered:
                    shard.forget(batch_id)
            raise
        return out

    def push(self, batch_id: int, grads: Float32) -> None:
        """Give every shard the gradient of the embeddings that `lookup` returned, float32 [size, width], C-contiguous."""
        self._on_every_shard(lambda k: self._shards[k][0].push(batch_id, grads))

    def close(self) -> None:
        """End the client's threads."""
        self._pool.shutdown(wait=True)

    def _on_every_shard(self, call: Callable[[int], object]) -> None:
        rest = [self._pool.submit(call, k) for k in range(1, len(self._shards))]
        try:
            if self._shards:
                call(0)
        finally:
            # Nobody leaves while a shard still writes into the buffer; the first error is raised.
            errors = [future.exception() for future in rest]
        for error in errors:
            if error is not None:
                raise error

"""`PsClient`: what a trainer calls. Slices a batch by placement, asks every shard at once, puts the answers in one buffer.

Covers shards in the same process, which write straight into the buffer. Any thread may call any method.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Batch, Float32
from flowps.ps.memory import aligned_empty
from flowps.ps.placement import Placement
from flowps.ps.shard import Shard
from flowps.ps.team import Team


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
        self._team = Team(max(1, len(self._shards)), "flowps-ps-client")

    def lookup(self, batch_id: int, batch: Batch, training: bool) -> Float32:
        """Pooled embeddings of `batch`, float32 [size, width]. See `Shard.lookup` for `training` and the errors.

        When one shard fails, the others forget the batch.
        """
        out = aligned_empty((batch.size, self._width))
        answered: list[Shard] = []

        def ask(k: int) -> None:
            shard, positions, columns = self._shards[k]
            shard.lookup(batch_id, batch.signs, batch.offsets, batch.size, positions, columns, out, training, batch.shares)
            answered.append(shard)

        try:
            self._team.run(ask, len(self._shards))
        except BaseException:
            if training:
                for shard in answered:
                    shard.forget(batch_id)
            raise
        return out

    def push(self, batch_id: int, grads: Float32, rate_scale: float = 1.0) -> None:
        """Give every shard the gradient of the embeddings that `lookup` returned, float32 [size, width], C-contiguous.

        rate_scale   what the learning rates of all slots are multiplied by in this push
        """
        self._team.run(lambda k: self._shards[k][0].push(batch_id, grads, rate_scale), len(self._shards))

    def close(self) -> None:
        """End the client's threads."""
        self._team.close()

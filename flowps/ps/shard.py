"""`Shard`: one PS partition of all tables. It answers lookups, remembers what each touched, and takes the pushes.

Covers batches' memory between lookup and push, and the shard's rows as a whole. Does not choose what lives here (placement) and
does not speak gRPC (service).

Threads: any thread may call any method; lookups and pushes of different batches overlap as far as their tables allow (see
`table`). The shard's own lock guards the memory of batches only and is never held while a kernel runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32, Int32, Uint64
from flowps.config import Slot
from flowps.errors import CapacityError, UnknownBatchError
from flowps.ps import optimizer
from flowps.ps.table import Bags, Table


@dataclass(frozen=True)
class SlotRows:
    """Some rows of one slot: signs uint64 [n], weights float32 [n, dim], state float32 [n, state width]."""

    slot: Slot
    signs: Uint64
    weights: Float32
    state: Float32


class Shard:
    """All rows of the slots `slots`.

    Parameters
    ----------
    slots : settings of the slots that live here.
    capacity_rows : for each slot, the rows it adds to its table's bound.
    seed : together with a sign decides a row's first weights.
    max_in_flight : batches that may be looked up and not yet pushed.
    """

    def __init__(self, slots: Sequence[Slot], capacity_rows: Sequence[int], seed: int, max_in_flight: int) -> None:
        self._slots = tuple(slots)
        self._max_in_flight = max_in_flight
        self._lock = threading.Lock()
        # None: reserved by a lookup that has not ended.
        self._remembered: dict[int, list[tuple[Bags, Int32]] | None] = {}
        members: dict[tuple[int, optimizer.Optimizer], list[int]] = {}
        for position, slot in enumerate(slots):
            members.setdefault((slot.dim, optimizer.of_slot(slot)), []).append(position)
        self._tables = [
            (np.array(of, np.int64), Table([slots[s] for s in of], of, sum(capacity_rows[s] for s in of), seed))
            for of in members.values()
        ]

    @property
    def num_rows(self) -> int:
        """Rows held in all tables."""
        return sum(table.num_rows for _, table in self._tables)

    def lookup(
        self, batch_id: int, signs: Uint64, offsets: Int32, size: int, positions: NDArray[np.int64], columns: NDArray[np.int64],
        out: Float32, training: bool,
    ) -> None:  # fmt: skip
        """Write the pooled vectors of a batch's bags to `out`, float32 [size, width], C-contiguous.

        signs, offsets   as in Batch; the shard's slots stand at `positions` in them, and go to `columns` of a line
        training         new signs get rows, and the batch is remembered under `batch_id` until its push; otherwise new signs
                         read zeros and nothing is remembered

        Aliases `signs` and `offsets` until the push. Raises CapacityError when a table is full or too many batches are in flight,
        and UnknownBatchError when `batch_id` is in flight already; the batch is then not remembered.
        """
        if training:
            self._reserve(batch_id)
        try:
            touched = []
            for members, table in self._tables:
                bags = Bags(signs, offsets, size, positions[members], columns[members])
                touched.append((bags, table.lookup(bags, out, create=training)))
        except BaseException:
            if training:
                self.forget(batch_id)
            raise
        if training:
            with self._lock:
                self._remembered[batch_id] = touched

    def forget(self, batch_id: int) -> None:
        """Give up the batch: there will be no push. Rows that its lookup created stay."""
        with self._lock:
            self._remembered.pop(batch_id, None)

    def push(self, batch_id: int, grads: Float32) -> int:
        """Step the rows that the lookup of `batch_id` touched with `grads`, float32 [size, width], the gradient of its `out`.

        Returns the number of distinct rows. Forgets the batch. Raises UnknownBatchError for a batch that is not in flight.
        """
        with self._lock:
            touched = self._remembered.get(batch_id)
            if touched is not None:
                del self._remembered[batch_id]
        if touched is None:
            raise UnknownBatchError(
                f"batch {batch_id}: a push came, but the shard remembers no lookup of it; was it pushed before, or never looked up?"
            )
        return sum(table.push(bags, rows, grads) for (_, table), (bags, rows) in zip(self._tables, touched, strict=True))

    def _reserve(self, batch_id: int) -> None:
        """Count the batch as in flight before its lookup begins, so that lookups at the same time cannot exceed the bound."""
        with self._lock:
            if batch_id in self._remembered:
                raise UnknownBatchError(
                    f"batch {batch_id}: looked up again before its push; every batch in flight needs an id of its own"
                )
            if len(self._remembered) >= self._max_in_flight:
                raise CapacityError(
                    f"batch {batch_id}: {self._max_in_flight} batches are looked up and not pushed yet; push before the next lookup"
                )
            self._remembered[batch_id] = None

    def rows(self, chunk_rows: int = 1 << 18) -> Iterator[SlotRows]:
        """A copy of the rows, slot by slot, at most `chunk_rows` at a time; a slot without rows comes once, empty.

        Beside the chunk it takes 24 bytes per row. The shard must not be pushed to meanwhile, or chunks differ in age.
        """
        for members, table in self._tables:
            signs, slots = table.entries()
            by_slot = np.argsort(slots, kind="stable")
            ends = np.searchsorted(slots[by_slot], members, side="right")
            for position, start, end in zip(members, [0, *ends], ends, strict=False):
                for at in range(start, max(end, start + 1), chunk_rows):
                    chosen = by_slot[at : min(at + chunk_rows, end)]
                    weights, state = np.split(table.values(chosen), [table.dim], axis=1)
                    yield SlotRows(self._slots[position], signs[chosen], weights, state)

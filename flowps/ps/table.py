"""`Table`: the rows of all slots that share dim and optimizer; an arena of rows and an index over their signs.

Covers memory, growth, and the calls into the kernels. Does not know batches' ids (shard) or where slots live (placement).

Threads: any thread may call any method. One lock per table is held while a kernel runs (without the GIL), never while waiting for
anything else; so lookups and pushes of different tables overlap, those of one table take turns, and each sees the other whole.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32, Int32, Uint64
from flowps.config import Slot
from flowps.errors import CapacityError
from flowps.ps import optimizer
from flowps.ps.kernels import index as index_kernels
from flowps.ps.kernels import pool as pool_kernels
from flowps.ps.kernels import update as update_kernels

Int64 = NDArray[np.int64]

MAX_ROWS = (1 << 31) - 2  # a row's number, plus one, fits 31 bits
_MAX_LOAD = 0.7  # at most 2.2 entries looked at per known sign and 6.1 per new one, on average (Knuth, TAOCP 3, 6.4)
_FIRST_INDEX_SIZE = 1 << 16
_ENTRY_BYTES = 16
_LINE_FLOATS = 16  # a cache line; rows start on one when dim allows
_POOLING = {"sum": pool_kernels.SUM, "mean": pool_kernels.MEAN}


@dataclass(frozen=True, slots=True)
class Bags:
    """Where the slots of a table stand in the arrays of one call.

    signs      uint64 [nnz], offsets int32 [num_slots * size + 1], as in Batch
    size       samples
    positions  int64 [k]: which slots of the arrays are the table's, in the table's order
    columns    int64 [k]: where each slot's vector starts in a line of the pooled buffer
    """

    signs: Uint64
    offsets: Int32
    size: int
    positions: Int64
    columns: Int64

    @property
    def starts(self) -> Int64:
        """First sign of each slot."""
        return self.offsets[self.positions * self.size].astype(np.int64)

    @property
    def stops(self) -> Int64:
        """One past the last sign of each slot."""
        return self.offsets[(self.positions + 1) * self.size].astype(np.int64)


class Table:
    """Rows of the slots `slots`, which must agree in dim and optimizer.

    A row is known by its sign alone: signs are seeded by slot, so two slots share one only by a collision of 64-bit hashes.

    Parameters
    ----------
    slots : settings of each slot; ids are their positions in the shard.
    capacity_rows : bound on the rows. Address space for all of them is taken at once, memory as rows are created; the index
        doubles as it fills, the only pause.
    seed : together with a sign decides the row's first weights.

    Raises CapacityError when the address space cannot be had, and from `lookup` when a new row would exceed `capacity_rows`.
    """

    def __init__(self, slots: Sequence[Slot], slot_ids: Sequence[int], capacity_rows: int, seed: int) -> None:
        self.slots = tuple(slots)
        self.dim = slots[0].dim
        self.optimizer = optimizer.of_slot(slots[0])
        self.stride = self.dim + self.optimizer.state_width(self.dim)
        self.capacity_rows = min(capacity_rows, MAX_ROWS)
        self._slot_ids = np.array(slot_ids, np.uint64)
        self._pooling = np.array([_POOLING[slot.pooling] for slot in slots], np.int32)
        self._scale = np.array([slot.init_scale for slot in slots], np.float32)
        self._params = np.array([optimizer.params_of_slot(slot) for slot in slots], np.float32)
        self._seed = np.uint64(seed)
        self._lock = threading.Lock()
        try:
            # Zeros cost no memory until they are touched: the operating system hands out pages as rows are written.
            self._arena = _aligned_zeros(self.capacity_rows * self.stride)
            self._seen = np.zeros(self.capacity_rows, np.int32)
        except MemoryError:
            raise CapacityError(
                f"a table of {self.capacity_rows:,} rows of {self.stride * 4} bytes "
                f"({self.capacity_rows * self.stride * 4 / 2**30:.1f} GiB) cannot be allocated; "
                f"lower capacity_rows of its slots: {self._names()}"
            ) from None
        self._num_rows = 0
        self._set_index(np.zeros(2 * _FIRST_INDEX_SIZE, np.uint64))
        self._distinct = np.empty(0, np.int32)
        self._sums = np.empty(0, np.float32)

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return self._num_rows

    def lookup(self, bags: Bags, out: Float32, create: bool) -> Int32:
        """Write the pooled vector of every bag to `out` (float32 [size, width]) and return the rows, int32 [signs of the slots].

        With `create`, a new sign gets a row; without, it reads zeros, its row is -1 and nothing changes.
        """
        rows = np.empty(int((bags.stops - bags.starts).sum()), np.int32)
        with self._lock:
            if create:
                self._find_or_create(bags, rows)
            else:
                index_kernels.find(bags.signs, bags.starts, bags.stops, self._index, self._shift, rows)
            pool_kernels.pool(
                rows, create, bags.offsets, bags.positions, bags.size, self._pooling, self._arena, self.dim, self.stride,
                out.reshape(-1), out.shape[1], bags.columns,
            )  # fmt: skip
        return rows

    def push(self, bags: Bags, rows: Int32, grads: Float32) -> int:
        """Step the `rows` that `lookup` returned for these bags with `grads`, float32 [size, width]. Returns the distinct rows."""
        most = int((bags.stops - bags.starts).max(initial=0))
        flat = grads.reshape(-1)
        flat.flags.writeable = False  # some are (TensorFlow's), and the kernel is compiled for one kind of array
        with self._lock:
            if len(self._distinct) < most:
                self._distinct = np.empty(most + most // 4, np.int32)
                self._sums = _aligned_zeros(len(self._distinct) * self.dim)
            return int(
                update_kernels.push(
                    rows, bags.offsets, bags.positions, bags.size, self._pooling, flat, grads.shape[1],
                    bags.columns, self._seen, self._distinct, self._sums, self._arena, self.dim, self.stride,
                    self.optimizer.kind, self._params,
                )
            )  # fmt: skip

    def entries(self) -> tuple[Uint64, Int32]:
        """Sign and slot id of every row in order of creation: uint64 [n], int32 [n]."""
        with self._lock:
            signs, slots = np.empty(self._num_rows, np.uint64), np.empty(self._num_rows, np.int32)
            index_kernels.entries(self._index, signs, slots)
            return signs, slots

    def values(self, rows: Int64) -> Float32:
        """A copy of the weights and state of `rows`, float32 [n, stride]."""
        with self._lock:
            return self._arena[: self._num_rows * self.stride].reshape(-1, self.stride)[rows]

    def rows(self) -> tuple[Uint64, Int32, Float32]:
        """A copy of all rows in order of creation: signs uint64 [n], slot ids int32 [n], values float32 [n, stride]."""
        signs, slots = self.entries()
        return signs, slots, self.values(np.arange(len(signs)))

    def _find_or_create(self, bags: Bags, rows: Int32) -> None:
        progress = np.array([0, 0, self._num_rows], np.int64)
        starts, stops = bags.starts, bags.stops
        try:
            while not index_kernels.find_or_create(
                bags.signs, starts, stops, self._slot_ids, self._index, self._shift, rows, progress, self._room(),
                self._arena, self.dim, self.stride, np.float32(self.optimizer.initial_state), self._scale, self._seed,
            ):  # fmt: skip
                if progress[index_kernels.ROWS] >= self.capacity_rows:
                    most = self.capacity_rows == MAX_ROWS
                    raise CapacityError(
                        f"the table of slots {self._names()} is full: {self.capacity_rows:,} rows"
                        f"{', the most that one table can hold; ' if most else '; raise their capacity_rows, or '}"
                        f"set hash_size to bound the signs{', or ps.num_shards to spread the slots' if most else ''}"
                    )
                self._grow_index()
        finally:
            self._num_rows = int(progress[index_kernels.ROWS])

    def _grow_index(self) -> None:
        """Double the index. All rows stay where they are."""
        old = self._index
        try:
            larger = np.zeros(2 * len(old), np.uint64)
        except MemoryError:
            raise CapacityError(
                f"the index of slots {self._names()} cannot grow to {2 * old.nbytes / 2**30:.1f} GiB; "
                "lower their capacity_rows, or set hash_size to bound the signs"
            ) from None
        self._set_index(larger)
        index_kernels.rebuild(old, larger, self._shift)

    def _room(self) -> int:
        """How many rows there may be before the index has to grow or the table is full."""
        return min(self.capacity_rows, int(len(self._index) // 2 * _MAX_LOAD))

    def _set_index(self, index: Uint64) -> None:
        self._index = index
        self._shift = np.uint64(64 - (len(index) // 2).bit_length() + 1)

    def _names(self) -> str:
        names = [slot.name for slot in self.slots]
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def row_bytes(slot: Slot) -> int:
    """Memory one row of a slot takes, index included, at the index's emptiest (just doubled)."""
    stride = slot.dim + optimizer.of_slot(slot).state_width(slot.dim)
    return stride * 4 + 4 + int(2 * _ENTRY_BYTES / _MAX_LOAD)


def _aligned_zeros(floats: int) -> Float32:
    """float32 zeros that start on a cache line."""
    raw = np.zeros(floats + _LINE_FLOATS, np.float32)
    first = (-raw.ctypes.data % (_LINE_FLOATS * 4)) // 4
    return raw[first : first + floats]

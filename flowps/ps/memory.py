"""`Memory`: the arrays of a table, how they are shared out to stripes, and how they grow.

Covers what is allocated, and who owns which rows. Does not find signs (kernels) or decide when a lookup may begin (recency).

Threads: `grant` is called by the owner of a stripe, beside other owners; `borrow` and `grow` by one thread, while no stripe has
another owner. Nothing here waits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32, Uint64
from flowps.config import Slot
from flowps.errors import CapacityError
from flowps.ps import optimizer
from flowps.ps.kernels import eviction as eviction_kernels
from flowps.ps.kernels import index as index_kernels
from flowps.ps.kernels import layout
from flowps.ps.team import Team

MAX_ROWS = (1 << 31) - 2  # a row's number, plus one, fits 31 bits
LOAD = 0.6  # at most 1.75 entries looked at per known sign and 3.6 per new one, on average (Knuth, TAOCP 3, 6.4)
_FIRST_SIZE = 1 << 16  # entries an index begins with that grows
_GROWTH = 1.5
_STRIPE_ROWS, _MAX_STRIPE_BITS = 16_384, 6  # the least rows a stripe has, the most stripes
_MIN_GRANT = 64  # rows
_ENTRY_BYTES = 16
LINE_BYTES = 64  # a cache line; rows start on one when dim allows
# What weights are stored in, as the kernels know it by the array's type; and how many fit into a float.
_STORAGE: dict[str, tuple[type[np.generic], int]] = {
    "float32": (np.float32, 1),
    "bfloat16": (np.uint16, 2),
    "float16": (np.int16, 2),
}


class Memory:
    """Arena, index and counters for `capacity_rows` rows of the slots `slots`; `kernels.layout` says where things stand.

    none       number of the row that stands for no row
    stride     floats of a row; widening: numbers of the weights' storage to each float
    weights    the arena, seen as what weights are stored in
    entries    of the index, pads not counted
    row_slots  int32: the slot of each row, by its place in `slots`
    next_row   the first row that no stripe has been given

    Parameters
    ----------
    allocate : take and touch all memory now. Otherwise address space is taken and memory as rows are created, and the index grows.

    Raises CapacityError when the memory cannot be had.
    """

    def __init__(self, slots: Sequence[Slot], capacity_rows: int, allocate: bool, team: Team) -> None:
        self._slots, self._team = slots, team
        self.capacity_rows = min(capacity_rows, MAX_ROWS)
        kind, self.widening = _STORAGE[slots[0].storage]
        self.stride = row_floats(slots[0])
        self.none = np.int32(self.capacity_rows)
        self._bits = min(_MAX_STRIPE_BITS, max(0, (self.capacity_rows // _STRIPE_ROWS).bit_length() - 1))
        self.bits, self.num_stripes = np.uint64(self._bits), 1 << self._bits
        # Stripes fill unevenly: six standard deviations above the mean, and the last grants are small.
        mean = self.capacity_rows / self.num_stripes
        slack = 6 * math.sqrt(mean) + _MIN_GRANT if self._bits else 0
        self.stripe_rows = math.ceil(mean + slack)
        self.max_size = math.ceil(self.stripe_rows / LOAD) + 1
        size = self.max_size if allocate else min(self.max_size, max(2, _FIRST_SIZE >> self._bits))
        try:
            # Zeros cost no memory until they are touched: the operating system hands out pages as rows are written.
            self.arena = _aligned_zeros((self.capacity_rows + 1) * self.stride, np.float32, allocate)
            self.row_slots = _aligned_zeros(self.capacity_rows + 1, np.int32, allocate)
            self.free = _aligned_zeros(self.num_stripes * self.stripe_rows, np.int32, allocate)
            self.index = self._new_index(size, allocate)
            self.sketch, self.sketch_width = self._new_sketch(allocate)
        except MemoryError:
            row = self.stride * 4
            raise CapacityError(
                f"a table of {self.capacity_rows:,} rows of {row} bytes ({self.capacity_rows * row / 2**30:.1f} GiB, and its "
                f"index) cannot be allocated; lower capacity_rows of its slots: {names(slots)}"
            ) from None
        self.weights = self.arena.view(kind)
        self.meta = np.zeros((self.num_stripes, layout.META), np.int64)
        self.meta[:, layout.FREE_AT] = np.arange(self.num_stripes) * self.stripe_rows
        self.next_row = 0
        self._lock = threading.Lock()  # guards next_row
        self._set_size(size)

    @property
    def bytes(self) -> int:
        """All that was taken, whether touched yet or not."""
        return sum(array.nbytes for array in (self.arena, self.row_slots, self.free, self.index, self.sketch, self.meta))

    def grant(self, stripe: int) -> None:
        """Give a stripe rows that were never used, or close it when there are none: it will evict."""
        line = self.meta[stripe]
        with self._lock:
            left = self.capacity_rows - self.next_row
            # As many again as the stripe has, so that rows lie close while there are few; less towards the end, so that all are
            # used; and no more than the stripe may have.
            held = int(line[layout.LIVE])
            wanted = max(_MIN_GRANT, min(left // (2 * self.num_stripes), held + _MIN_GRANT)) if self._bits else left
            rows = min(left, wanted, self.stripe_rows - held)
            line[layout.FRESH] = self.next_row
            line[layout.FRESH_END] = self.next_row + rows
            self.next_row += rows
            line[layout.CLOSED] = rows == 0

    def borrow(self, stripe: int, newest: int, oldest: np.uint64, ages: NDArray[np.int64]) -> bool:
        """Give a stripe whose rows are all in flight some of another stripe's. Returns whether there were any.

        Stripes own about equal parts of the rows, but a batch may need more of one. `newest`, `oldest` and `ages` are as for
        `kernels.eviction.make_room`.
        """
        line = self.meta[stripe]
        if line[layout.LIVE] >= line[layout.ROOM] and self.size < self.max_size:
            self.grow([stripe])
        if line[layout.LIVE] >= line[layout.ROOM] or line[layout.FREE]:  # the latter: a run of entries that fills the stripe's pad
            return False
        most = min(_MIN_GRANT, self.stripe_rows - int(line[layout.LIVE]))
        for other in np.argsort(self.meta[:, layout.LIVE]):
            lender = self.meta[other]
            unused = int(lender[layout.FRESH_END] - lender[layout.FRESH])
            if unused:
                lent = min(most, unused)
                lender[layout.FRESH_END] -= lent
                rows = np.arange(lender[layout.FRESH_END], lender[layout.FRESH_END] + lent)
            elif other != stripe and (
                lender[layout.FREE] or eviction_kernels.make_room(
                    other, self.index, self.entries, self.bits, self.meta, self.free, np.uint64(newest), oldest,
                    self.row_slots, np.empty(0, np.uint64), ages,
                )
            ):  # fmt: skip
                lent = min(most, int(lender[layout.FREE]))
                lender[layout.FREE] -= lent
                top = lender[layout.FREE_AT] + lender[layout.FREE]
                rows = self.free[top : top + lent].copy()
            else:
                continue
            self.free[line[layout.FREE_AT] :][:lent] = rows
            line[layout.FREE] = lent
            return True
        return False

    def grow(self, full: Sequence[int]) -> None:
        """Make the index larger by half, or close the stripes that are full when it is as large as it gets."""
        if self.size >= self.max_size:
            self.meta[full, layout.CLOSED] = 1
            return
        size = min(self.max_size, math.ceil(self.size * _GROWTH) + 1)
        larger = self._larger(size)
        old, self.index = self.index, larger
        self._set_size(size)
        self.meta[:, layout.CLOSED] = 0  # those that still find no rows are closed again
        parts = min(self._team.size, self.num_stripes)
        stripes = np.linspace(0, self.num_stripes, parts + 1).astype(np.int64)

        def work(part: int) -> None:
            index_kernels.rebuild(old, larger, self.entries, self.bits, stripes[part], stripes[part + 1])

        self._team.run(work, parts)

    def resize(self, size: int) -> None:
        """Give the index of a table without rows another size, at most `max_size`. Raises CapacityError where it cannot be had."""
        if size != self.size:
            self.index = self._larger(size)
            self._set_size(size)

    def _larger(self, size: int) -> Uint64:
        try:
            return self._new_index(size, touch=False)
        except MemoryError:
            raise CapacityError(
                f"the index of slots {names(self._slots)} cannot grow to {self.num_stripes * size * _ENTRY_BYTES / 2**30:.1f} GiB; "
                "lower their capacity_rows, or set hash_size to bound the signs"
            ) from None

    def _set_size(self, size: int) -> None:
        self.size = size
        self.entries = np.uint64(self.num_stripes * size)
        self.meta[:, layout.ROOM] = min(self.stripe_rows, int(size * LOAD))
        self.meta[:, layout.HAND] = 0

    def _new_index(self, size: int, touch: bool) -> Uint64:
        return _aligned_zeros(2 * self.num_stripes * (size + layout.PAD), np.uint64, touch)

    def _new_sketch(self, touch: bool) -> tuple[NDArray[np.uint8], int]:
        """Counters for the sights of signs without a row, if any slot counts them: four lines of four to each row."""
        if all(slot.admit_after <= 1 for slot in self._slots):
            return np.zeros(0, np.uint8), 0
        width = max(256, 4 * self.stripe_rows)
        return _aligned_zeros(self.num_stripes * 4 * width, np.uint8, touch), width


def names(slots: Sequence[Slot]) -> str:
    """Of the first few slots, for messages."""
    return ", ".join(slot.name for slot in slots[:5]) + (f" and {len(slots) - 5} more" if len(slots) > 5 else "")


def row_floats(slot: Slot) -> int:
    """Floats of a row: its weights as they are stored, and its state."""
    return -(-slot.dim // _STORAGE[slot.storage][1]) + optimizer.of_slot(slot).state_width(slot.dim)


def row_bytes(slot: Slot) -> int:
    """Memory one row of a slot takes when its table is full, its part of the index included."""
    counters = 16 if slot.admit_after > 1 else 0
    return row_floats(slot) * 4 + 8 + math.ceil(_ENTRY_BYTES / LOAD) + counters


def aligned_empty(shape: tuple[int, int]) -> Float32:
    """float32 that start on a cache line, C-contiguous, of any value."""
    count = shape[0] * shape[1]
    return _from_line_on(np.empty(count + LINE_BYTES // 4, np.float32), count).reshape(shape)


def _aligned_zeros(count: int, kind: type[np.generic], touch: bool) -> NDArray[Any]:
    """Zeros that start on a cache line; `touch`: with their memory behind them."""
    size = np.dtype(kind).itemsize
    raw = np.zeros(count + LINE_BYTES // size, kind)
    if touch:
        raw[:: 4096 // size] = 0
    return _from_line_on(raw, count)


def _from_line_on(raw: NDArray[Any], count: int) -> NDArray[Any]:
    """`count` elements of an array that has a cache line more, from its first cache line on."""
    first = (-raw.ctypes.data % LINE_BYTES) // raw.itemsize
    return raw[first : first + count]

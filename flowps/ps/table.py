"""`Table`: the rows of all slots that share dim, optimizer and storage; an arena of rows and an index over their signs.

Covers lookups, pushes and reads: the locks around the kernels, and how threads share their work. `memory` has the arrays and who
owns which part of them, `recency` what is in flight and what is old. Does not know batches' ids (shard) or where slots live
(placement).

Threads: any thread may call any method. Two locks, both held while kernels run (without the GIL), never while waiting for
another batch:

    index lock   find, create, evict, erase, list. An evaluation holds it while it pools, because it pins nothing.
    push lock    the steps of rows. Who needs both takes the index lock first.

So of one table at most one lookup searches and at most one push steps at a time, each with the team's threads; pooling, searching
and pushing of different batches overlap. What may be seen: a lookup that pools while a push of another batch steps the same row
reads it before or after that step, or, of a row longer than 64 bytes, a part before and a part after; staleness already means as
much. What may not: a row of a batch in flight is never evicted, expired or erased (rows looked up since the oldest batch in flight
stay), so a push always meets the rows its lookup found; and pushes never mix.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32, Int32, Uint64
from flowps.config import Slot
from flowps.errors import CapacityError
from flowps.ps import optimizer
from flowps.ps.kernels import draw as draw_kernels
from flowps.ps.kernels import eviction as eviction_kernels
from flowps.ps.kernels import index as index_kernels
from flowps.ps.kernels import layout
from flowps.ps.kernels import pool as pool_kernels
from flowps.ps.kernels import update as update_kernels
from flowps.ps.memory import LINE_BYTES, Memory, aligned_empty, names
from flowps.ps.recency import Recency
from flowps.ps.team import Team
from flowps.status.run_status import RunStatus
from flowps.status.trace import NO_BATCH

Int64 = NDArray[np.int64]

MIN_PART = 16_384  # signs for which another thread pays
_MAX_ORDINAL = (1 << 31) - 1
_POOLING = {"sum": pool_kernels.SUM, "mean": pool_kernels.MEAN, "sqrtn": pool_kernels.SQRTN, "none": pool_kernels.NONE}
_INITIALIZER = {
    "zeros": draw_kernels.CONSTANT,
    "constant": draw_kernels.CONSTANT,
    "uniform": draw_kernels.UNIFORM,
    "normal": draw_kernels.NORMAL,
    "truncated_normal": draw_kernels.TRUNCATED_NORMAL,
}
_NO_SHARES = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Bags:
    """Where the slots of a table stand in the arrays of one call.

    signs      uint64 [nnz], offsets int32 [num_slots * size + 1], as in Batch
    size       samples
    positions  int64 [k]: which slots of the arrays are the table's, in the table's order
    columns    int64 [k]: where each slot's vector starts in a line of the pooled buffer
    shares     float32 [nnz], the weight of each sign, or empty: all 1
    """

    signs: Uint64
    offsets: Int32
    size: int
    positions: Int64
    columns: Int64
    shares: Float32 = field(default_factory=lambda: _NO_SHARES)

    @property
    def starts(self) -> Int64:
        """First sign of each slot."""
        return self.offsets[self.positions * self.size].astype(np.int64)

    @property
    def stops(self) -> Int64:
        """One past the last sign of each slot."""
        return self.offsets[(self.positions + 1) * self.size].astype(np.int64)

    @property
    def places(self) -> Int64:
        """int64 [k + 1]: where each slot's rows stand when the table's are put one after the other."""
        return np.concatenate([[0], np.cumsum(self.stops - self.starts)])


class Buffers:
    """Arrays of one lookup that its push needs, used again by later lookups: see `kernels.index.find_or_create`."""

    def __init__(self, num_signs: int, parts: int, num_slots: int) -> None:
        self.rows = np.empty(num_signs + num_signs // 4, np.int32)
        self.ordinals = np.empty(len(self.rows), np.int32)
        # Untouched memory costs nothing: a part could have all the signs.
        self.distinct = np.empty(parts * (len(self.rows) + 2), np.int32)
        self.bounds = np.zeros((parts, 2 * num_slots), np.int64)


@dataclass(frozen=True, slots=True)
class Touched:
    """What lookup `number` keeps for its push. Slot k's signs stand from places[k] on; `unknown` signs have no row."""

    bags: Bags
    places: Int64
    buffers: Buffers
    number: int
    parts: int
    unknown: int


@dataclass(frozen=True, slots=True)
class TableStats:
    """Counts since the table was made, except `rows` and `index_load`, which are as they are now.

    rows                of at most `capacity_rows`; index_load: rows per entry of the index
    bytes               memory given to the table, whether touched yet or not
    lookups, pushes     training lookups and pushes
    inserted            rows created
    evicted             rows given up for room, those beyond their time among them
    expired             rows that have begun anew because they were beyond their time to live
    erased              rows given up by `erase`
    refused             sights of signs that were not admitted
    dropped             gradients of signs without a row, not applied
    unsound             gradients of rows that were NaN, infinite or beyond 3.4e15, not applied; the last one's slot and sign
    """

    slots: tuple[str, ...]
    rows: int
    capacity_rows: int
    index_load: float
    bytes: int
    lookups: int
    pushes: int
    inserted: int
    evicted: int
    expired: int
    erased: int
    refused: int
    dropped: int
    unsound: int
    last_unsound: tuple[str, int] | None


class Table:
    """Rows of the slots `slots`, which must agree in dim, optimizer and storage.

    A row is known by its sign alone: signs are seeded by slot, so two slots share one only by a collision of 64-bit hashes.

    Parameters
    ----------
    slots : settings of each slot; ids are their positions in the shard.
    capacity_rows : hard bound on the rows. When it is reached, the least recently used rows go.
    seed : together with a sign decides the row's first weights.
    team : threads that share the work of a call. The rows and the sums do not depend on how many there are.
    allocate : take and touch all memory now. Otherwise address space is taken and memory as rows are created, and the index grows
        by half when it is full, which is a pause.
    status : gets the stages Find and Pool of every lookup, PushSum (gradients added up per row) and PushStep of every push.

    Raises CapacityError when the memory cannot be had, and from `find` when the batches in flight need more rows than fit.
    """

    def __init__(
        self, slots: Sequence[Slot], slot_ids: Sequence[int], capacity_rows: int, seed: int, team: Team | None = None,
        allocate: bool = False, status: RunStatus | None = None,
    ) -> None:  # fmt: skip
        self._status = status or RunStatus()
        self.slots = tuple(slots)
        self.dim = slots[0].dim
        self.optimizer = optimizer.of_slot(slots[0])
        self.state_width = self.optimizer.state_width(self.dim)
        self._team = team or Team(1, "")
        self._slot_ids = np.array(slot_ids, np.int32)
        self._numbers = np.arange(len(slots), dtype=np.int32)
        self._pooling = np.array([_POOLING[slot.pooling] for slot in slots], np.int32)
        self._lengths = np.array([slot.max_len for slot in slots], np.int64)
        self._kinds = np.array([_INITIALIZER[slot.initializer] for slot in slots], np.int32)
        self._scales = np.array([initial_scale(slot) for slot in slots], np.float32)
        self._admit_after = np.array([slot.admit_after for slot in slots], np.int64)
        self._admit_share = np.array([slot.admit_probability for slot in slots], np.float64)
        self._initial = self.optimizer.first_state(self.dim)
        self._params = optimizer.Params(slots)
        self._seed = np.uint64(seed)
        self.memory = Memory(self.slots, capacity_rows, allocate, self._team)
        self.recency = Recency(self.slots)
        self._index_lock, self._push_lock, self._small_lock = threading.Lock(), threading.Lock(), threading.Lock()
        self._pushes = self._dropped = self._unsound = 0
        self._last_unsound: tuple[str, int] | None = None
        self._finders = [_Finder() for _ in range(self._team.size)]
        self._steppers = [_Stepper() for _ in range(self._team.size)]
        self._spare: list[Buffers] = []

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return int(self.memory.meta[:, layout.LIVE].sum())

    def read(self, bags: Bags, out: Float32) -> None:
        """Write the pooled vector of every bag to `out` (float32 [size, width]), for an evaluation.

        A sign that has no row reads zeros. Nothing changes, not even a row's recency.
        """
        places = bags.places
        buffers = self._take_buffers(int(places[-1]))
        with self._index_lock:
            self._find(bags.signs, bags.starts, bags.stops, places, buffers.rows)
            self._pool(bags, places, buffers.rows, out)
        self._give_back(buffers)

    def find(self, bags: Bags, batch: int = NO_BATCH) -> Touched:
        """Find the rows of all bags, for a step. A new sign gets a row. No weights are read: pushes may come before `pool` does.

        What `pool` and the push need is returned: it must come to `push` or `forget`.

        batch   whose lookup it is, for its spans
        """
        places = bags.places
        buffers = self._take_buffers(int(places[-1]))
        parts = self._parts(int(places[-1]), self.memory.num_stripes)
        with self._index_lock:
            number = self.recency.begin(parts * (int(places[-1]) + 2), self._lower)
            try:
                with self._status.timed("Find", batch):
                    unknown = self._find_or_create(bags, places, buffers, number, parts)
            except BaseException:
                self.recency.land(number)
                self._give_back(buffers)
                raise
        return Touched(bags, places, buffers, number, parts, unknown)

    def pool(self, touched: Touched, out: Float32, batch: int = NO_BATCH) -> None:
        """Write the pooled vector of every bag of what `find` has found to `out`, float32 [size, width]."""
        with self._status.timed("Pool", batch):
            self._pool(touched.bags, touched.places, touched.buffers.rows, out)

    def push(self, touched: Touched, grads: Float32, rate_scale: float = 1.0, batch: int = NO_BATCH) -> int:
        """Step the rows of a lookup, once, with `grads`, float32 [size, width]. Returns the rows stepped, summed over the slots.

        rate_scale   what the trainer's schedule multiplies the slots' learning rates by
        batch        whose push it is, for its spans
        """
        m = self.memory
        bags, buffers, parts = touched.bags, touched.buffers, touched.parts
        try:
            flat = grads.reshape(-1)
            flat.flags.writeable = False  # some are (TensorFlow's), and the kernel is compiled for one kind of array
            most = int((buffers.bounds[:parts, 1::2] - buffers.bounds[:parts, 0::2]).max(initial=0))
            with self._push_lock:
                began = time.perf_counter()
                params = self._params.at(self._pushes, rate_scale)

                def work(part: int) -> None:
                    it = self._steppers[part]
                    it.prepare(most * self.dim)
                    update_kernels.push(
                        self.optimizer.tag, buffers.ordinals, buffers.distinct, buffers.bounds[part], touched.places, bags.shares,
                        bags.offsets, bags.positions, bags.size, self._pooling, self._lengths, flat, grads.shape[1], bags.columns,
                        part, parts, it.sums, it.listed, it.scales, m.arena, m.weights, self.dim, m.stride,
                        m.widening, self.state_width, m.none, params, self._pushes, it.counts,
                    )  # fmt: skip

                self._team.run(work, parts)
                counts = [it.counts.tolist() for it in self._steppers[:parts]]
                self._observe_push(began, counts, batch)
                self._pushes += 1
                self._dropped += touched.unknown
            for of_part in counts:
                if of_part[update_kernels.UNSOUND]:
                    self._note_unsound(*of_part[update_kernels.UNSOUND : update_kernels.SUM_NS])
        finally:
            self.forget(touched)
        return sum(of_part[update_kernels.STEPPED] for of_part in counts)

    def _observe_push(self, began: float, counts: Sequence[Sequence[int]], batch: int) -> None:
        """Time adding gradients up and stepping rows: of the threads that shared the work, the slowest. They alternate by slot."""
        summed = began + max(of_part[update_kernels.SUM_NS] for of_part in counts) / 1e9
        stepped = summed + max(of_part[update_kernels.STEP_NS] for of_part in counts) / 1e9
        self._status.span("PushSum", began, summed, batch)
        self._status.span("PushStep", summed, stepped, batch)

    def _note_unsound(self, count: int, row: int, slot: int) -> None:
        """Count rows whose gradient was refused, and name one. Its batch is in flight, so the sign is there."""
        with self._index_lock:
            sign, _ = index_kernels.sign_of(self.memory.index, row)
            self._unsound += count
            self._last_unsound = self.slots[slot].name, int(sign)

    def forget(self, touched: Touched) -> None:
        """Give up a lookup's push: its rows may go when room is needed."""
        self.recency.land(touched.number)
        self._give_back(touched.buffers)

    def erase(self, signs: Uint64) -> int:
        """Give up the rows of `signs`, uint64 [n]. Returns how many went; those of batches in flight, and unknown ones, do not."""
        m = self.memory
        with self._index_lock:
            return int(eviction_kernels.erase(signs, m.index, m.entries, m.bits, m.meta, m.free, self.recency.oldest()))

    def entries(self) -> tuple[Uint64, Int32, Uint64]:
        """Sign, slot id and stamp of every row: uint64 [n], int32 [n], uint64 [n]. The larger the stamp, the later its last use."""
        with self._index_lock:
            n = self.num_rows
            signs, stamps, slots = np.empty(n, np.uint64), np.empty(n, np.uint64), np.empty(n, np.int32)
            index_kernels.listed(self.memory.index, self.memory.row_slots, signs, stamps, slots)
        return signs, self._slot_ids[slots], stamps

    def values(self, signs: Uint64) -> tuple[NDArray[np.bool_], Float32, Float32]:
        """A copy of the rows of `signs`, as they are between two pushes.

        Returns which of them have a row (bool [n]), and of those weights float32 [m, dim] and state float32 [m, state width].
        """
        m = self.memory
        rows = np.empty(len(signs), np.int32)
        with self._index_lock:
            one = np.array([0, len(signs)], np.int64)
            self._find(signs, one[:1], one[1:], one, rows)
            known = rows != m.none
            rows = rows[known]
            weights = np.empty((len(rows), self.dim), np.float32)
            state = np.empty((len(rows), self.state_width), np.float32)
            with self._push_lock:
                pool_kernels.copy_rows(
                    rows, m.arena, m.weights, self.dim, m.stride, m.widening, self.state_width,
                    weights.reshape(-1), state.reshape(-1),
                )  # fmt: skip
        return known, weights, state

    def stats(self) -> TableStats:
        """What the table has done and holds."""
        with self._index_lock:
            meta, size = self.memory.meta.sum(axis=0), len(self.memory.index) // 2
        return TableStats(
            slots=tuple(slot.name for slot in self.slots),
            rows=int(meta[layout.LIVE]),
            capacity_rows=self.memory.capacity_rows,
            index_load=float(meta[layout.LIVE] / size),
            bytes=self.memory.bytes,
            lookups=self.recency.lookups,
            pushes=self._pushes,
            inserted=int(meta[layout.INSERTED]),
            evicted=int(meta[layout.EVICTED]),
            expired=int(meta[layout.EXPIRED]),
            erased=int(meta[layout.ERASED]),
            refused=int(meta[layout.REFUSED]),
            dropped=self._dropped,
            unsound=self._unsound,
            last_unsound=self._last_unsound,
        )

    @contextmanager
    def at_rest(self) -> Iterator[Memory]:
        """The table's memory, for as long as which nobody else reads or writes it. No batch may be in flight."""
        with self._index_lock, self._push_lock:
            assert not self.recency.in_flight, "rows are saved and restored at a cut, when no batch is in flight"
            yield self.memory

    def resume(self, pushes: int, dropped: int = 0, unsound: int = 0, last_unsound: tuple[str, int] | None = None) -> None:
        """Go on counting where another table stopped: optimizers that correct their means go by the number of pushes."""
        with self._index_lock, self._push_lock:
            self._pushes, self._dropped, self._unsound, self._last_unsound = pushes, dropped, unsound, last_unsound

    # --- lookup -------------------------------------------------------------------------------------------------------

    def _find(self, signs: Uint64, starts: Int64, stops: Int64, places: Int64, rows: Int32) -> None:
        m = self.memory

        def work(part: int) -> None:
            mine = slice(bounds[part], bounds[part + 1])
            index_kernels.find(
                signs, starts[mine], stops[mine], m.index, m.entries, m.bits, m.none,
                rows[places[mine.start] :],
            )  # fmt: skip

        parts = min(self._parts(int(places[-1])), len(starts))
        # Slots are not cut: evaluations are not the hurry.
        bounds = np.searchsorted(places, np.linspace(0, places[-1], parts + 1)) if parts > 1 else np.array([0, len(starts)])
        bounds[0], bounds[-1] = 0, len(starts)
        self._team.run(work, parts)

    def _find_or_create(self, bags: Bags, places: Int64, buffers: Buffers, number: int, parts: int) -> int:
        """Returns the number of signs that got no row. The index lock is held."""
        m = self.memory
        starts, stops = bags.starts, bags.stops
        first_stamp, oldest = self.recency.in_flight[number], self.recency.oldest()
        valid = self.recency.valid(number, oldest)
        valid_of_slot = valid if valid.any() else valid[:0]
        reasons = [index_kernels.GROW] * parts
        finders = self._finders[:parts]
        for finder in finders:
            finder.progress[:] = 0

        def work(part: int) -> None:
            it = finders[part]
            while reasons[part] != index_kernels.DONE:
                reasons[part] = index_kernels.find_or_create(
                    bags.signs, starts, stops, places, part, parts, valid, buffers.rows, buffers.ordinals, buffers.distinct,
                    buffers.bounds[part], m.index, m.entries, m.bits, m.meta, m.free, first_stamp,
                    oldest, m.none, it.mine, it.homes, it.pending, it.ages, it.progress, self._numbers, m.row_slots,
                    valid_of_slot, m.arena, m.weights, self.dim, m.stride, m.widening, self._initial, self._kinds,
                    self._scales, self._seed, np.uint64(number), self._admit_after, self._admit_share, m.sketch,
                    m.sketch_width,
                )  # fmt: skip
                if reasons[part] in (index_kernels.GROW, index_kernels.FULL):
                    return
                if reasons[part] == index_kernels.GRANT:
                    m.grant(int(it.progress[index_kernels.STRIPE]))

        try:
            while True:
                self._team.run(work, parts)
                stopped = {k: int(finders[k].progress[index_kernels.STRIPE]) for k in range(parts) if reasons[k]}
                if not stopped:
                    return int(sum(finder.progress[index_kernels.UNKNOWN] for finder in finders))
                for k, stripe in stopped.items():
                    if reasons[k] == index_kernels.FULL and not m.borrow(stripe, first_stamp, oldest, finders[k].ages):
                        raise CapacityError(
                            f"the batches in flight need more rows than the table of slots {names(self.slots)} can hold: "
                            f"{m.capacity_rows:,} rows, {len(self.recency.in_flight)} batches in flight; raise capacity_rows of "
                            "these slots, or lower trainer.in_flight or data.batch_size"
                        )
                full = [stripe for k, stripe in stopped.items() if reasons[k] == index_kernels.GROW]
                if full:
                    m.grow(full)
        finally:
            # Also of a lookup that failed: what it has stamped is older than what comes.
            self.recency.pass_on(max(int(finder.progress[index_kernels.FOLLOWING]) for finder in finders) + 1)

    def _pool(self, bags: Bags, places: Int64, rows: Int32, out: Float32) -> None:
        m = self.memory
        parts = min(self._parts(int(places[-1])), bags.size)
        bounds = np.linspace(0, bags.size, parts + 1).astype(np.int64)
        flat = out.reshape(-1)
        floats = LINE_BYTES // 4
        streaming = not (out.ctypes.data % LINE_BYTES or out.shape[1] % floats or (bags.columns % floats).any())

        def work(part: int) -> None:
            pool_kernels.pool(
                rows, places, bags.shares, bags.offsets, bags.positions, bags.size, bounds[part], bounds[part + 1], self._pooling,
                self._lengths, m.weights, self.dim, m.stride, m.widening, flat, out.shape[1], bags.columns,
                streaming,
            )  # fmt: skip

        self._team.run(work, parts)

    def _parts(self, num_signs: int, most: int = 1 << 30) -> int:
        """Parts that work on this many signs is cut into, a power of two."""
        most = min(most, _MAX_ORDINAL // (num_signs + 2))
        return 1 << (max(1, min(self._team.size, num_signs // MIN_PART, most)).bit_length() - 1)

    def _lower(self, by: int) -> None:
        index_kernels.lower_stamps(self.memory.index, np.uint64(by))

    def _take_buffers(self, num_signs: int) -> Buffers:
        with self._small_lock:
            for k, buffers in enumerate(self._spare):
                if len(buffers.rows) >= num_signs:
                    return self._spare.pop(k)
            self._spare.clear()
        return Buffers(num_signs, self._team.size, len(self.slots))

    def _give_back(self, buffers: Buffers) -> None:
        with self._small_lock:
            self._spare.append(buffers)


class _Finder:
    """Scratch of one thread of a lookup."""

    def __init__(self) -> None:
        self.mine = np.empty(index_kernels.BLOCK, np.int32)
        self.homes = np.empty(index_kernels.HOMES, np.uint64)
        self.pending = np.empty(index_kernels.BLOCK, np.int32)
        self.ages = np.empty(eviction_kernels.CLASSES + 1, np.int64)
        self.progress = np.zeros(index_kernels.PROGRESS, np.int64)


class _Stepper:
    """Scratch of one thread of a push."""

    def __init__(self) -> None:
        self.sums = np.empty(0, np.float32)
        self.listed = np.empty(2 * update_kernels.LIST, np.int64)
        self.scales = np.empty(update_kernels.LIST, np.float32)
        self.counts = np.zeros(update_kernels.COUNTS, np.int64)

    def prepare(self, floats: int) -> None:
        """Room for the sums of a slot; counts at zero."""
        if len(self.sums) < floats:
            self.sums = aligned_empty((1, floats + floats // 4))[0]
        self.counts[:] = 0


def initial_scale(slot: Slot) -> float:
    """The scale of a slot's first weights: init_scale, divided by √dim where the slot asks for it."""
    if slot.initializer == "zeros":
        return 0.0
    return slot.init_scale / math.sqrt(slot.dim) if slot.init_by_dim else slot.init_scale

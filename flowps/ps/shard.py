"""`Shard`: one PS partition of all tables. It answers lookups, remembers what each touched, and takes the pushes.

Covers batches' memory between lookup and push, and the shard's rows as a whole. Does not choose what lives here (placement) and
does not speak gRPC (service).

Threads: any thread may call any method; lookups and pushes of different batches overlap as far as their tables allow (see
`table`). The shard's own lock guards the memory of batches only and is never held while a kernel runs.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32, Int32, Uint64
from flowps.config import Slot
from flowps.errors import CapacityError, DataError, UnknownBatchError
from flowps.ps import optimizer
from flowps.ps.hot import HotSigns
from flowps.ps.memory import row_bytes
from flowps.ps.numbering import step_of
from flowps.ps.restore import Keep, refill
from flowps.ps.snapshot import Chunk, Part, TableState, chunks, copiers, state_of
from flowps.ps.table import Bags, Table, TableStats, Touched
from flowps.ps.team import Team
from flowps.status.run_status import RunStatus


@dataclass(frozen=True)
class SlotRows:
    """Some rows of one slot: signs uint64 [n], weights float32 [n, dim], state float32 [n, state width]."""

    slot: Slot
    signs: Uint64
    weights: Float32
    state: Float32


@dataclass(frozen=True)
class ShardWork:
    """What a shard has done and holds: signs looked up in training, seconds in such lookups and in pushes, rows, their bytes."""

    signs: int
    busy_s: float
    rows: int
    bytes: int


@dataclass(frozen=True)
class ShardTraffic:
    """What is asked of a shard.

    in_flight   batches looked up and not pushed
    staleness   pushes of other batches between a batch's lookup and its own push → how many batches had so many
    signs       looked up in training, by slot
    hot         the signs asked for most: slot, sign, and its share of all signs, as estimated from a sample
    """

    in_flight: int
    staleness: dict[int, int]
    signs: dict[str, int]
    hot: list[tuple[str, int, float]]


@dataclass(frozen=True)
class _Remembered:
    """A batch between lookup and push.

    touched        what each table has found for it
    size, width    its samples, and the least floats of a line of its `out`
    busy_s         seconds of the lookup so far
    shape, pushes  of the `out` that it was pooled into, and the pushes before that; None: it was not pooled yet
    """

    touched: list[Touched]
    size: int
    width: int
    busy_s: float
    shape: tuple[int, ...] | None = None
    pushes: int = 0


class Shard:
    """All rows of the slots `slots`.

    Parameters
    ----------
    slots : settings of the slots that live here.
    capacity_rows : for each slot, the rows it adds to its table's bound.
    seed : together with a sign decides a row's first weights.
    max_in_flight : batches that may be looked up and not yet pushed.
    threads : that share the work of one lookup or push.
    allocate : for each slot, whether its rows are wanted in memory from the start; of a table, when all its slots say so.
    status : gets the stages Lookup and Push, and those of `Table`.
    """

    def __init__(
        self, slots: Sequence[Slot], capacity_rows: Sequence[int], seed: int, max_in_flight: int, threads: int = 1,
        allocate: Sequence[bool] = (), status: RunStatus | None = None,
    ) -> None:  # fmt: skip
        self.status = status or RunStatus()
        self._slots = tuple(slots)
        self._widths = np.array([slot.width for slot in slots], np.int64)
        self._max_in_flight = max_in_flight
        self._team = Team(threads, "flowps-ps")
        self._lock = threading.Lock()
        # What follows is guarded by the lock.
        self._busy_s, self._pushes = 0.0, 0
        self._signs = np.zeros(len(slots), np.int64)
        self._staleness: Counter[int] = Counter()
        self._hot = HotSigns()
        # None: reserved by a call that has not ended.
        self._remembered: dict[int, _Remembered | None] = {}
        members: dict[tuple[int, optimizer.Optimizer, str], list[int]] = {}
        for position, slot in enumerate(slots):
            members.setdefault((slot.dim, optimizer.of_slot(slot), slot.storage), []).append(position)
        self._tables = [
            (
                np.array(of, np.int64),
                Table(
                    [slots[s] for s in of], of, sum(capacity_rows[s] for s in of), seed, self._team,
                    allocate=len(allocate) > 0 and all(allocate[s] for s in of), status=self.status,
                ),
            )
            for of in members.values()
        ]  # fmt: skip

    @property
    def num_rows(self) -> int:
        """Rows held in all tables."""
        return sum(table.num_rows for _, table in self._tables)

    def lookup(
        self, batch_id: int, signs: Uint64, offsets: Int32, size: int, positions: NDArray[np.int64], columns: NDArray[np.int64],
        out: Float32, training: bool, shares: Float32 | None = None,
    ) -> None:  # fmt: skip
        """Write the pooled vectors of a batch's bags to `out`, float32 [size, width], C-contiguous.

        signs, offsets   as in Batch; the shard's slots stand at `positions` in them, and go to `columns` of a line
        training         new signs get rows, and the batch is remembered under `batch_id` until its push; otherwise new signs
                         read zeros and nothing is remembered
        shares           float32 [nnz], the weight of each sign in its bag; None: all 1

        Aliases `signs`, `offsets` and `shares` until the push. Raises CapacityError when the batches in flight need more rows than
        a table has, or too many batches are in flight, UnknownBatchError when `batch_id` is in flight already, and DataError for
        arrays that do not fit together; the batch is then not remembered.
        """
        self._check(batch_id, signs, offsets, size, positions, columns, out, shares)
        bags = self._bags(signs, offsets, size, positions, columns, shares)
        if not training:
            for (_, table), of in zip(self._tables, bags, strict=True):
                table.read(of, out)
            return
        began = time.perf_counter()
        found = self._find(batch_id, bags, size, columns)
        try:
            found = self._pool(batch_id, found, out)
        except BaseException:
            self._unreserve(batch_id)
            self._give_up(found.touched)
            raise
        self.status.span("Lookup", began, time.perf_counter(), step_of(batch_id))
        self._remember(batch_id, found)
        self._observe(signs, offsets, size, positions)

    def find(
        self, batch_id: int, signs: Uint64, offsets: Int32, size: int, positions: NDArray[np.int64], columns: NDArray[np.int64],
        shares: Float32 | None = None,
    ) -> None:  # fmt: skip
        """The first half of a training lookup: find or create the rows of a batch's bags. `pool` is the other.

        It reads no weights, so it may come before the pushes that the batch is to see. The batch is remembered from now on. For
        arguments, aliases and errors see `lookup`.
        """
        self._check(batch_id, signs, offsets, size, positions, columns, None, shares)
        found = self._find(batch_id, self._bags(signs, offsets, size, positions, columns, shares), size, columns)
        self._remember(batch_id, found)
        self._observe(signs, offsets, size, positions)

    def pool(self, batch_id: int, out: Float32) -> None:
        """Write the pooled vectors of what `find` has found to `out`, as `lookup` does, with the weights as they are now.

        Raises UnknownBatchError for a batch of which nothing was found, or that was given up or pooled before, and DataError where
        `out` does not fit it: the batch is then still in flight.
        """
        with self._lock:
            found = self._remembered.get(batch_id)
            if found is None or found.shape is not None:
                raise UnknownBatchError(
                    f"batch {batch_id}: its rows are to be pooled, but the shard remembers none; was it given up, or pooled before?"
                )
            if not _is_lines(out, found.size, found.width):
                raise DataError(
                    f"batch {batch_id}: rows are to be pooled into {out.dtype} {out.shape}, expected C-contiguous float32 of "
                    f"{found.size} samples, at least {found.width} floats wide"
                )
            self._remembered[batch_id] = None  # reserved by this call
        try:
            found = self._pool(batch_id, found, out)
            self.status.observe("Lookup", found.busy_s)
        finally:
            self._remember(batch_id, found)

    def forget(self, batch_id: int) -> None:
        """Give up the batch: there will be no push. Rows that its lookup created stay, until room is needed."""
        with self._lock:
            remembered = self._remembered.pop(batch_id, None)
        if remembered is not None:
            self._give_up(remembered.touched)

    def push(self, batch_id: int, grads: Float32, rate_scale: float = 1.0) -> int:
        """Step the rows that the lookup of `batch_id` touched with `grads`, float32 [size, width], the gradient of its `out`.

        rate_scale   what the trainer's schedule multiplies the slots' learning rates by

        Returns the number of rows stepped. Forgets the batch. Raises UnknownBatchError for a batch that is not in flight,
        or not pooled yet, and DataError for a gradient of another shape or type: one that is in flight stays so.
        """
        with self._lock:
            remembered = self._remembered.get(batch_id)
            if remembered is not None and remembered.shape is None:
                raise UnknownBatchError(
                    f"batch {batch_id}: a push came before its rows were pooled: there is no gradient of them yet"
                )
            if remembered is not None and (grads.shape != remembered.shape or grads.dtype != np.float32):
                raise DataError(
                    f"batch {batch_id}: a push has a gradient of {grads.dtype} {grads.shape}, expected float32 {remembered.shape}"
                )
            if remembered is not None:
                del self._remembered[batch_id]
        if remembered is None:
            raise UnknownBatchError(
                f"batch {batch_id}: a push came, but the shard remembers no lookup of it; was it pushed before, or never looked up?"
            )
        touched, step = remembered.touched, step_of(batch_id)
        began, stepped = time.perf_counter(), 0
        for k, (_, table) in enumerate(self._tables):
            try:
                stepped += table.push(touched[k], grads, rate_scale, step)
            except BaseException:
                self._give_up(touched[k + 1 :], first=k + 1)
                raise
        ended = time.perf_counter()
        self.status.span("Push", began, ended, step)
        with self._lock:
            self._busy_s += ended - began
            self._staleness[self._pushes - remembered.pushes] += 1
            self._pushes += 1
        return stepped

    def erase(self, slot: str, signs: Uint64) -> int:
        """Give up the rows of `signs`, uint64 [n], of a slot; rows of batches in flight stay. Returns how many went.

        A sign that comes again gets a new row. Raises KeyError for a slot that does not live here.
        """
        for members, table in self._tables:
            if slot in (self._slots[position].name for position in members):
                return table.erase(np.ascontiguousarray(signs, np.uint64))
        raise KeyError(slot)

    def stats(self) -> list[TableStats]:
        """What each table has done and holds."""
        return [table.stats() for _, table in self._tables]

    def work(self) -> ShardWork:
        """What was done so far."""
        sizes = [(table.num_rows, row_bytes(self._slots[members[0]])) for members, table in self._tables]
        with self._lock:
            signs, busy_s = int(self._signs.sum()), self._busy_s
        return ShardWork(signs, busy_s, sum(rows for rows, _ in sizes), sum(rows * size for rows, size in sizes))

    def traffic(self, hottest: int = 10) -> ShardTraffic:
        """What was asked so far; `hottest`: how many hot signs."""
        names = [slot.name for slot in self._slots]
        with self._lock:
            return ShardTraffic(
                len(self._remembered), dict(self._staleness), dict(zip(names, self._signs.tolist(), strict=True)),
                [(names[slot], sign, share) for slot, sign, share in self._hot.top(hottest)],
            )  # fmt: skip

    def rows(self, chunk_rows: int = 1 << 18) -> Iterator[SlotRows]:
        """A copy of the rows, slot by slot, at most `chunk_rows` at a time; a slot without rows comes once, empty.

        Beside the chunk it takes 32 bytes per row. Rows that are there at the beginning come unless they are evicted or erased
        meanwhile; each as it is between two pushes. Changes nothing and does not count as use of a row.
        """
        for members, table in self._tables:
            signs, slots, _ = table.entries()
            by_slot = np.argsort(slots, kind="stable")
            ends = np.searchsorted(slots[by_slot], members, side="right")
            for position, start, end in zip(members, [0, *ends], ends, strict=False):
                for at in range(start, max(end, start + 1), chunk_rows):
                    chosen = signs[by_slot[at : min(at + chunk_rows, end)]]
                    known, weights, state = table.values(chosen)
                    yield SlotRows(self._slots[position], chosen[known], weights, state)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def states(self) -> list[TableState]:
        """Of each table, all that a checkpoint needs of it beside its snapshot. At a cut."""
        return [state_of(table) for _, table in self._tables]

    def snapshot(self, name: int, since: int | None) -> Iterator[Chunk]:
        """A copy of the tables at this cut, section by section; `snapshot` says which there are.

        name    of the cut, for later ones to ask for what changed after it; the last 64 are remembered
        since   the name of an earlier cut: only what was touched after it; None: everything

        Raises KeyError, before anything is copied, when the cut `since` is not remembered: there was none, not of these tables,
        or too long ago. No batch may be in flight and nobody else may use the shard until the last chunk has been taken.
        """
        marks = [None if since is None else table.recency.since(since) for _, table in self._tables]
        for _, table in self._tables:
            table.recency.cut(name)
        return self._chunks(marks)

    def _chunks(self, marks: Sequence[int | None]) -> Iterator[Chunk]:
        team = copiers(self._team.size)
        try:
            for number, ((_, table), mark) in enumerate(zip(self._tables, marks, strict=True)):
                yield from chunks(table, number, mark, team)
        finally:
            team.close()

    def forget_cut(self, name: int) -> None:
        """Nothing will be asked for since this cut, or its snapshot was not kept. Idempotent."""
        for _, table in self._tables:
            table.recency.forget_cut(name)

    def restore(self, parts: Sequence[Part], keep: Keep) -> None:
        """Fill the shard, which has no rows yet, with those of earlier shards; `restore` says what will be as it was.

        parts   what the earlier shards have left; slots that do not live here are passed over, those without rows begin empty
        keep    which of some signs of a slot live here

        Raises CheckpointError where they are damaged or do not fit the slots, CapacityError where they are more than capacity_rows;
        the shard is then of no use.
        """
        assert not any(table.num_rows or table.recency.lookups for _, table in self._tables), "only a fresh shard can be restored"
        team = copiers(self._team.size)
        try:
            for _, table in self._tables:
                refill(table, parts, keep, team)
        finally:
            team.close()

    def close(self) -> None:
        """End the shard's threads. Idempotent."""
        self._team.close()

    def _bags(
        self, signs: Uint64, offsets: Int32, size: int, positions: NDArray[np.int64], columns: NDArray[np.int64],
        shares: Float32 | None,
    ) -> list[Bags]:  # fmt: skip
        """Of each table."""
        weighted = {} if shares is None else {"shares": shares}
        return [Bags(signs, offsets, size, positions[members], columns[members], **weighted) for members, _ in self._tables]

    def _find(self, batch_id: int, bags: Sequence[Bags], size: int, columns: NDArray[np.int64]) -> _Remembered:
        """Find or create the rows of `bags`. The batch is reserved from now on, unless this raises."""
        self._reserve(batch_id)
        began, step = time.perf_counter(), step_of(batch_id)
        touched: list[Touched] = []
        try:
            for (_, table), of in zip(self._tables, bags, strict=True):
                touched.append(table.find(of, step))
        except BaseException:
            self._unreserve(batch_id)
            self._give_up(touched)
            raise
        return _Remembered(touched, size, self._line(columns), time.perf_counter() - began)

    def _pool(self, batch_id: int, found: _Remembered, out: Float32) -> _Remembered:
        with self._lock:
            pushes = self._pushes
        began, step = time.perf_counter(), step_of(batch_id)
        for (_, table), touched in zip(self._tables, found.touched, strict=True):
            table.pool(touched, out, step)
        return replace(found, shape=out.shape, pushes=pushes, busy_s=found.busy_s + time.perf_counter() - began)

    def _unreserve(self, batch_id: int) -> None:
        """What was reserved for a call will not be remembered."""
        with self._lock:
            self._remembered.pop(batch_id, None)

    def _remember(self, batch_id: int, found: _Remembered) -> None:
        """What was reserved for a call is over; or given up, if `forget` came meanwhile."""
        with self._lock:
            if found.shape is not None:
                self._busy_s += found.busy_s
            given_up = batch_id not in self._remembered
            if not given_up:
                self._remembered[batch_id] = found
        if given_up:
            self._give_up(found.touched)

    def _observe(self, signs: Uint64, offsets: Int32, size: int, positions: NDArray[np.int64]) -> None:
        """Count a batch's signs."""
        starts, stops = offsets[positions * size].astype(np.int64), offsets[(positions + 1) * size].astype(np.int64)
        with self._lock:
            self._signs += stops - starts
            self._hot.observe(signs, starts, stops)

    def _check(
        self, batch_id: int, signs: Uint64, offsets: Int32, size: int, positions: NDArray[np.int64], columns: NDArray[np.int64],
        out: Float32 | None, shares: Float32 | None,
    ) -> None:  # fmt: skip
        """Refuse arrays that do not fit together: kernels do not look where they read and write. `out` may be None."""
        width = self._line(columns)
        last = int(positions.max(initial=-1)) + 1
        fits = {
            "signs": signs.dtype == np.uint64 and signs.flags.c_contiguous,
            "offsets": offsets.dtype == np.int32 and last * size < len(offsets) and offsets[last * size] <= len(signs),
            "out": out is None or _is_lines(out, size, width),
            "shares": shares is None or (shares.dtype == np.float32 and len(shares) == len(signs)),
        }
        wrong = [name for name, fit in fits.items() if not fit]
        if wrong:
            given = "" if out is None else f"out: {out.dtype} {out.shape}, "
            raise DataError(
                f"batch {batch_id}: {', '.join(wrong)} of a lookup of {size} samples and {len(signs)} signs do not have the types "
                f"and shapes that Shard.lookup expects ({given}{len(offsets)} offsets, {width} floats wide)"
            )

    def _line(self, columns: NDArray[np.int64]) -> int:
        """The least floats of a line in which the slots' vectors begin at `columns`."""
        return int((columns + self._widths).max(initial=0))

    def _give_up(self, touched: Sequence[Touched], first: int = 0) -> None:
        for (_, table), of in zip(self._tables[first:], touched, strict=False):
            table.forget(of)

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


def _is_lines(out: Float32, size: int, width: int) -> bool:
    """Whether vectors of so many samples, so many floats wide, can be written to `out`."""
    return out.dtype == np.float32 and out.flags.c_contiguous and out.ndim == 2 and len(out) == size and width <= out.shape[-1]

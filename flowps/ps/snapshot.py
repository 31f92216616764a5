"""What of a table goes into a checkpoint: its state, a few numbers, and its sections, copied chunk by chunk.

Covers the copying of a table at rest, whole or only what was touched since an earlier cut. `restore` is the way back; files are
somebody else's.

The sections, chunk after chunk of one before the next; each comes at least once, if empty:

    entries   sign uint64, word uint64 (row + 1 | stamp << 31, see `kernels.layout`): all entries in the order of the index; of
              a delta the touched ones
    rows      number int32, slot int32 (place in the table's slots), row float32 [n, stride] as it lies in the arena: all rows from
              0 on that were ever used, those given back among them; of a delta the rows of its entries
    order     of a delta only: number int32, the rows of all entries in the order of the index; those missing are gone
    free      row int32: the stripes' stacks of rows given back, one after the other; `meta` has their lengths
    sketch    sight uint8, where signs are admitted by sights: the counters

A chain is one whole snapshot and the deltas after it, each since the one before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from flowps.batch import Int32, Uint64
from flowps.ps.kernels import carry, layout
from flowps.ps.memory import Memory
from flowps.ps.table import Table
from flowps.ps.team import Team

Columns = dict[str, NDArray[Any]]
"""Arrays of equal length, 1-D or 2-D."""

CHUNK_BYTES = 1 << 26  # large enough for huge pages, small enough to be written and freed while the next is copied
MAX_COPIERS = 4  # threads: memory is what copying waits for, and few threads keep it busy


@dataclass(frozen=True)
class Chunk:
    """A piece of a section of the shard's table number `table`; the columns are copies, the receiver's own."""

    table: int
    section: str
    columns: Columns


class TableState(msgspec.Struct, frozen=True):
    """All of a table that is no large array.

    slots           names; a row's slot is its place here
    optimizer       of `kernels.step`: the type of the tag
    bits, size      of the index: 2^bits stripes of `size` entries
    sketch_width    counters of a line of the sketch; 0: none
    rows            entries
    next_row, meta  as in `memory` and `kernels.layout`
    ttl             for each time to live, number and first stamp of the lookups it is measured with

    The others are as in TableStats and Recency.
    """

    slots: list[str]
    dim: int
    optimizer: str
    storage: str
    stride: int
    capacity_rows: int
    bits: int
    size: int
    sketch_width: int
    rows: int
    next_row: int
    meta: list[list[int]]
    lookups: int
    next_stamp: int
    ttl: dict[int, list[tuple[int, int]]]
    pushes: int
    dropped: int
    unsound: int
    last_unsound: tuple[str, int] | None


@dataclass(frozen=True)
class Part:
    """The snapshots of one shard: the states of the last one, and a chain of readers, of the whole one first, then of the deltas.

    A reader gives the chunks of a section (table, section) in order; it is asked for some of them more than once.
    """

    states: Sequence[TableState]
    chain: Sequence[Callable[[int, str], Iterator[Columns]]]


def copiers(least: int) -> Team:
    """Threads to copy with, at least so many: nothing else runs at a cut. To be closed."""
    return Team(max(least, min(MAX_COPIERS, os.cpu_count() or 1)), "flowps-copy")


def shared(team: Team, count: int, work: Callable[[int, int, int], object]) -> None:
    """Call work(first, last, part) for equal parts of 0 … count - 1, by all threads of the team."""
    parts = max(1, min(team.size, count))
    bounds = [part * count // parts for part in range(parts + 1)]
    team.run(lambda part: work(bounds[part], bounds[part + 1], part), parts)


def state_of(table: Table) -> TableState:
    """A table's state, which must be at rest."""
    stats = table.stats()
    with table.at_rest() as m:
        return TableState(
            slots=list(stats.slots), dim=table.dim, optimizer=type(table.optimizer.tag).__name__, storage=table.slots[0].storage,
            stride=m.stride, capacity_rows=m.capacity_rows, bits=int(m.bits), size=m.size, sketch_width=m.sketch_width,
            rows=stats.rows, next_row=m.next_row, meta=m.meta.tolist(), lookups=table.recency.lookups,
            next_stamp=table.recency.next_stamp, ttl=table.recency.moments(), pushes=stats.pushes, dropped=stats.dropped,
            unsound=stats.unsound, last_unsound=stats.last_unsound,
        )  # fmt: skip


def chunks(table: Table, number: int, since: int | None, team: Team) -> Iterator[Chunk]:
    """The sections of a table, as table `number`.

    since   only what has a stamp of at least that; None: everything

    The table must stay at rest until the last chunk has been taken.
    """
    before = table.recency.lookups, table.stats().pushes
    sections = _whole(table, team) if since is None else _delta(table, np.uint64(since), team)
    for section, columns in sections:
        yield Chunk(number, section, columns)
    with table.at_rest() as m:
        free = _stacks(m)
    for row in _cut(free):
        yield Chunk(number, "free", {"row": row})
    for sight in _cut(m.sketch) if len(m.sketch) else ():
        yield Chunk(number, "sketch", {"sight": _copied(sight, team)})
    assert before == (table.recency.lookups, table.stats().pushes), "the table was used while it was copied"


def _whole(table: Table, team: Team) -> Iterator[tuple[str, Columns]]:
    """Entries and rows. No lock is held while the receiver has a chunk."""
    for first, last in _stripe_groups(table.memory):
        with table.at_rest() as m:
            columns = _entries(m, first, last, team)
        yield "entries", columns
    for pieces in list(_used(table.memory)) or [[]]:
        with table.at_rest() as m:
            columns = _rows(m, pieces, team)
        yield "rows", columns


def _delta(table: Table, since: np.uint64, team: Team) -> Iterator[tuple[str, Columns]]:
    """Touched entries, their rows, and the order of all."""
    with table.at_rest() as m:
        signs, words, order = _touched(m, since, team)
    for sign, word in zip(_cut(signs, 16), _cut(words, 16), strict=True):
        yield "entries", {"sign": sign, "word": word}
    for some in _cut(words, m.stride * 4 + 8):
        numbers = ((some & layout.ROW).astype(np.int64) - 1).astype(np.int32)
        slots, rows = np.empty(len(numbers), np.int32), np.empty((len(numbers), m.stride), np.float32)
        with table.at_rest():
            _gather(m, numbers, slots, rows, team)
        yield "rows", {"number": numbers, "slot": slots, "row": rows}
    for some in _cut(order):
        yield "order", {"number": some}


def _stripe_groups(m: Memory) -> Iterator[tuple[int, int]]:
    """Stripes first … last - 1 whose entries make up a chunk, or one stripe that alone has more."""
    first, held = 0, 0
    for stripe in range(m.num_stripes):
        live = int(m.meta[stripe, layout.LIVE])
        if held and (held + live) * 16 > CHUNK_BYTES:
            yield first, stripe
            first, held = stripe, 0
        held += live
    yield first, m.num_stripes


def _entries(m: Memory, first: int, last: int, team: Team) -> Columns:
    ends = np.cumsum(m.meta[first:last, layout.LIVE])
    signs, words = np.empty(ends[-1], np.uint64), np.empty(ends[-1], np.uint64)
    region = m.size + layout.PAD

    def work(begin: int, end: int, _: int) -> None:
        mine = slice(ends[begin - 1] if begin else 0, ends[end - 1])
        count = int(mine.stop - mine.start)
        found = carry.list_entries(
            m.index, (first + begin) * region, (first + end) * region, count, signs[mine], words[mine]
        )  # fmt: skip
        assert found == count, "a stripe's index and its number of entries disagree"

    shared(team, last - first, work)
    return {"sign": signs, "word": words}


def _touched(m: Memory, since: np.uint64, team: Team) -> tuple[Uint64, Uint64, Int32]:
    """Signs and words of the entries with so late a stamp, and the rows of all."""
    ends = np.cumsum(m.meta[:, layout.LIVE])
    # Room for all of them: untouched memory costs nothing.
    signs, words, order = np.empty(ends[-1], np.uint64), np.empty(ends[-1], np.uint64), np.empty(ends[-1], np.int32)
    region = m.size + layout.PAD
    found: dict[int, tuple[Uint64, Uint64]] = {}

    def work(begin: int, end: int, part: int) -> None:
        mine = slice(ends[begin - 1] if begin else 0, ends[end - 1])
        count = int(mine.stop - mine.start)
        there, touched = carry.list_touched(
            m.index, begin * region, end * region, count, since, order[mine], signs[mine], words[mine]
        )  # fmt: skip
        assert there == count, "a stripe's index and its number of entries disagree"
        found[part] = signs[mine][:touched], words[mine][:touched]

    shared(team, m.num_stripes, work)
    parts = [found[part] for part in sorted(found)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), order


def _used(m: Memory) -> Iterator[list[tuple[int, int]]]:
    """The rows ever used as pieces first … last - 1, those of a chunk together."""
    fresh = m.meta[:, [layout.FRESH, layout.FRESH_END]]
    fresh = fresh[fresh[:, 0] < fresh[:, 1]]
    fresh = fresh[np.argsort(fresh[:, 0])]
    most = max(1, CHUNK_BYTES // (m.stride * 4 + 8))
    pieces: list[tuple[int, int]] = []
    room = most
    for first, last in zip([0, *fresh[:, 1].tolist()], [*fresh[:, 0].tolist(), m.next_row], strict=True):
        at = first
        while at < last:
            upto = min(last, at + room)
            pieces.append((at, upto))
            room -= upto - at
            at = upto
            if not room:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces


def _rows(m: Memory, pieces: Sequence[tuple[int, int]], team: Team) -> Columns:
    count = sum(last - first for first, last in pieces)
    numbers, slots, rows = np.empty(count, np.int32), np.empty(count, np.int32), np.empty((count, m.stride), np.float32)
    arena = m.arena.reshape(-1, m.stride)
    to = 0
    for first, last in pieces:

        def work(begin: int, end: int, _: int, first: int = first, to: int = to) -> None:
            there, here = slice(first + begin, first + end), slice(to + begin, to + end)
            numbers[here] = np.arange(there.start, there.stop, dtype=np.int32)
            slots[here] = m.row_slots[there]
            rows[here] = arena[there]

        shared(team, last - first, work)
        to += last - first
    return {"number": numbers, "slot": slots, "row": rows}


def _gather(m: Memory, numbers: Int32, slots: Int32, rows: NDArray[np.float32], team: Team) -> None:
    flat = rows.reshape(-1)

    def work(first: int, last: int, _: int) -> None:
        carry.take_rows(numbers, first, last, m.arena, m.row_slots, m.stride, flat, slots)

    shared(team, len(numbers), work)


def _stacks(m: Memory) -> Int32:
    """All rows given back."""
    return np.concatenate([m.free[line[layout.FREE_AT] :][: line[layout.FREE]] for line in m.meta])


def _copied(array: NDArray[Any], team: Team) -> NDArray[Any]:
    copy = np.empty_like(array)

    def work(first: int, last: int, _: int) -> None:
        copy[first:last] = array[first:last]

    shared(team, len(array), work)
    return copy


def _cut(array: NDArray[Any], item_bytes: int = 0) -> Iterator[NDArray[Any]]:
    """Pieces of an array that make up a chunk each, at least one."""
    pieces = max(1, math.ceil(len(array) * (item_bytes or array.itemsize) / CHUNK_BYTES))
    for piece in range(pieces):
        yield array[piece * len(array) // pieces : (piece + 1) * len(array) // pieces]

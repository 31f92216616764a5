"""Puts the rows of a checkpoint back: `snapshot` the other way.

Covers a shard's tables, each from those of earlier shards that have its slots. Two ways:

    in place   a table of the same slots, capacity and layout, from one earlier table: every byte where it was, so that training
               goes on as if it had never stopped. Rows that live elsewhere now are then erased.
    anew       from any number of tables that share the slots' dim, optimizer and storage: each row with its weights and state
               under its sign, wherever there is room. Rows keep the order of their last use within an earlier table; between
               tables, whose stamps run at different rates, as if all had used up theirs in the same time. Times to live go on, a
               little late at most; counters of sights begin anew, and those of the statistics but for lookups and pushes.

Reads chunk by chunk and keeps 22 bytes for each row of the earlier table beside them. What is read may be damaged: all is checked
that a kernel would rely on, and that everything is there, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Int32, Uint64
from flowps.errors import CapacityError
from flowps.ps.kernels import carry, layout
from flowps.ps.kernels import eviction as eviction_kernels
from flowps.ps.memory import Memory, names
from flowps.ps.snapshot import Part, shared
from flowps.ps.source import WRONG, Source
from flowps.ps.table import Table
from flowps.ps.team import Team

Keep = Callable[[str, Uint64], NDArray[np.bool_]]
"""Which of some signs of a slot, by its name, belong here."""

_GROUP = 1 << 22  # rows whose signs `keep` sees together


def refill(table: Table, parts: Sequence[Part], keep: Keep, team: Team) -> None:
    """Fill a fresh table from the snapshots of earlier shards. After an error it is of no use.

    Raises CheckpointError where what is read is damaged or of slots of another kind, CapacityError where the rows do not fit.
    """
    wanted = {slot.name for slot in table.slots}
    sources = [
        Source(part, number, table)
        for part in parts
        for number, state in enumerate(part.states)
        if wanted.intersection(state.slots)
    ]
    if len(sources) == 1 and _in_place(table, sources[0], keep, team):
        return
    if sources:
        _anew(table, sources, keep, team)


# --- in place ---------------------------------------------------------------------------------------------------------


def _in_place(table: Table, source: Source, keep: Keep, team: Team) -> bool:
    """Make the table what the earlier one was. Returns whether it can: whether its layout is the same."""
    state = source.state
    with table.at_rest() as m:
        meta = _meta_of(table, source)
        if meta is None:
            return False
        found, order = source.entries(team)
        held = np.zeros(state.next_row, np.uint16)
        for snapshot in range(source.length):
            for numbers, slots, rows in source.read(snapshot, "rows"):
                _put(m, source, numbers, slots, rows, snapshot + 1, held, team)
        _enter(m, source, meta, found, order, held, team)
        elsewhere = _elsewhere(table, found, held, keep, team)
        _give_free(m, source, meta, held)
        m.meta[:], m.next_row = meta, state.next_row
        if len(m.sketch) and state.sketch_width:
            _fill(source, "sketch", m.sketch, len(m.sketch))
    table.recency.resume(state.lookups, state.next_stamp, state.ttl)
    table.resume(state.pushes, state.dropped, state.unsound, state.last_unsound)
    for signs in elsewhere:
        table.erase(signs)
    return True


def _meta_of(table: Table, source: Source) -> NDArray[np.int64] | None:
    """The stripes' lines of the earlier table, checked, if its layout is the table's, whose index then has its size."""
    state, m = source.state, table.memory
    same = state.slots == [slot.name for slot in table.slots] and state.capacity_rows == m.capacity_rows
    if not (same and state.bits == int(m.bits) and 1 <= state.size <= m.max_size):
        return None
    if [len(line) for line in state.meta] != [layout.META] * m.num_stripes:
        raise source.damaged("its state has another number of stripes than it says")
    try:
        meta = np.array(state.meta, np.int64)
    except OverflowError:
        raise source.damaged("a count of a stripe is out of range") from None
    m.resize(state.size)
    if (meta[:, [layout.ROOM, layout.FREE_AT]] != m.meta[:, [layout.ROOM, layout.FREE_AT]]).any():
        return None  # another version shared the memory out in another way
    fresh = meta[:, layout.FRESH_END] - meta[:, layout.FRESH]
    sizes = meta[:, [layout.LIVE, layout.FREE]].T
    sound = (
        (meta >= 0).all()
        and (fresh >= 0).all()
        and (meta[:, layout.FRESH_END] <= state.next_row).all()
        and (sizes <= state.next_row).all()
        and (sizes[0] <= meta[:, layout.ROOM]).all()
        and (sizes.sum(axis=0) + fresh <= m.stripe_rows).all()
        and (meta[:, layout.HAND] < state.size + layout.PAD).all()
        and sizes[0].sum() == state.rows
        and sizes.sum() + fresh.sum() == state.next_row
        and (not state.sketch_width or state.sketch_width == m.sketch_width or not len(m.sketch))
    )
    if not sound:
        raise source.damaged("the counts of its stripes do not add up")
    return meta


def _put(
    m: Memory, source: Source, numbers: Int32, slots: Int32, rows: NDArray[np.float32], snapshot: int, held: NDArray[np.uint16],
    team: Team,
) -> None:  # fmt: skip
    """Write rows where their numbers say."""
    flat, bad, num_slots = rows.reshape(-1), [-1], len(source.state.slots)
    flat.flags.writeable = False

    def work(first: int, last: int, _: int) -> None:
        bad.append(
            carry.put_rows(numbers, slots, flat, first, last, snapshot, num_slots, m.arena, m.row_slots, m.stride, held)
        )  # fmt: skip

    shared(team, len(numbers), work)
    if max(bad) >= 0:
        raise source.damaged(WRONG[carry.RANGE])


def _enter(
    m: Memory, source: Source, meta: NDArray[np.int64], found: Uint64, order: Int32, held: NDArray[np.uint16], team: Team
) -> None:  # fmt: skip
    """Enter all rows, each where it stood."""
    ends = np.cumsum(meta[:, layout.LIVE])
    wrong: list[int] = []

    def work(first: int, last: int, _: int) -> None:
        wrong.append(carry.enter(order, ends, first, last, source.stamps, found, held, m.index, m.entries, m.bits)[0])

    shared(team, m.num_stripes, work)
    if max(wrong) != carry.SOUND:
        raise source.damaged(WRONG[max(wrong)])
    if np.count_nonzero(held == carry.USED) != len(order):
        raise source.damaged(WRONG[carry.MISSING])


def _elsewhere(table: Table, found: Uint64, held: NDArray[np.uint16], keep: Keep, team: Team) -> list[Uint64]:
    """The signs of rows that do not belong here."""
    gone = []
    for at in range(0, len(held), _GROUP):
        signs: dict[tuple[int, int], Uint64] = {}

        def work(first: int, last: int, _: int, at: int = at, signs: dict[tuple[int, int], Uint64] = signs) -> None:
            mine = slice(at + first, at + last)
            for slot, lines in _by_slot(table, table.memory.row_slots[mine], held[mine] == carry.USED):
                signs[slot, first] = found[::2][mine][lines]

        shared(team, min(_GROUP, len(held) - at), work)
        for (slot, _), of_slot in signs.items():
            kept = _kept(keep, table.slots[slot].name, of_slot)
            if not kept.all():
                gone.append(of_slot[~kept])
    return gone


def _give_free(m: Memory, source: Source, meta: NDArray[np.int64], held: NDArray[np.uint16]) -> None:
    """Fill the stripes' stacks of rows given back; every row is then in use, given back or fresh, in one place."""
    given = np.empty(int(meta[:, layout.FREE].sum()), np.int32)
    _fill(source, "free", given, len(given))
    if len(given) and not 0 <= given.min() <= given.max() < len(held):
        raise source.damaged(WRONG[carry.RANGE])
    held[given] = carry.USED
    at = 0
    for line in meta:
        m.free[line[layout.FREE_AT] :][: line[layout.FREE]] = given[at : at + line[layout.FREE]]
        at += line[layout.FREE]
        held[line[layout.FRESH] : line[layout.FRESH_END]] = carry.USED
    # The counts add up to as many as there are: so none is there twice.
    if np.count_nonzero(held == carry.USED) != len(held):
        raise source.damaged("a row is neither in use nor given back, or both")


def _fill(source: Source, section: str, into: NDArray[Any], length: int) -> None:
    """Read a section of one column of the last snapshot."""
    at = 0
    for (array,) in source.read(source.length - 1, section):
        if len(array) > length - at:
            raise source.damaged(f"its section {section!r} is longer than {length:,}")
        into[at : at + len(array)] = array
        at += len(array)
    if at != length:
        raise source.damaged(f"its section {section!r} has length {at:,}, not {length:,}")


# --- anew -------------------------------------------------------------------------------------------------------------


def _anew(table: Table, sources: Sequence[Source], keep: Keep, team: Team) -> None:
    """Enter every row that belongs here."""
    latest = max(source.state.next_stamp for source in sources)
    lookups = max(source.state.lookups for source in sources)
    there = fitting = 0
    with table.at_rest() as m:
        for source in sources:
            for signs, stamps, slots, lines, rows in _rows_of(table, source, latest, keep, team):
                if there == fitting:
                    fitting += _adopt(m, source, signs, stamps, slots, lines, rows, latest)
                there += len(signs)  # also when they do not fit: how many there are is for the message
    if fitting < there:
        raise CapacityError(
            f"the checkpoint has {there:,} rows of the table of slots {names(table.slots)}, of which {fitting:,} fit: "
            f"{m.capacity_rows:,} rows; raise capacity_rows of these slots"
        )
    table.recency.resume(lookups, latest, _moments(sources, lookups, latest))
    table.resume(max(source.state.pushes for source in sources))


def _rows_of(
    table: Table, source: Source, latest: int, keep: Keep, team: Team
) -> Iterator[tuple[Uint64, Uint64, Int32, NDArray[np.int64], NDArray[np.float32]]]:
    """Of each chunk the rows that belong here: signs, stamps, slots, and which lines of the chunk's floats are theirs."""
    found, order = source.entries(team)
    if len(order) and not 0 <= order.min() <= order.max() < source.state.next_row:
        raise source.damaged(WRONG[carry.RANGE])
    snapshot_of = np.zeros(source.state.next_row, np.int64)
    snapshot_of[order] = (found[1::2] & layout.ROW)[order]
    if np.count_nonzero(snapshot_of) != len(order):
        raise source.damaged(WRONG[carry.MISSING])
    if len(order) and (found[1::2] >> layout.STAMP)[order].max() >= source.stamps:
        raise source.damaged(WRONG[carry.RANGE])
    places = {slot.name: place for place, slot in enumerate(table.slots)}
    place_of = np.array([places.get(name, -1) for name in source.state.slots], np.int32)
    for snapshot in range(source.length):
        for numbers, slots, rows in source.read(snapshot, "rows"):
            for array, end in ((numbers, source.state.next_row), (slots, len(place_of))):
                if len(array) and not 0 <= array.min() <= array.max() < end:
                    raise source.damaged(WRONG[carry.RANGE])
            chosen = snapshot_of[numbers] == snapshot + 1
            snapshot_of[numbers[chosen]] = 0  # it is there
            here = place_of[slots]
            lines = [np.empty(0, np.int64)]
            for slot, of_slot in _by_slot(table, np.maximum(here, 0), chosen & (here >= 0)):
                lines.append(of_slot[_kept(keep, table.slots[slot].name, found[2 * numbers[of_slot].astype(np.int64)])])
            mine = np.concatenate(lines)
            rows_of_mine = numbers[mine].astype(np.int64)
            stamps = _scaled(found[2 * rows_of_mine + 1] >> layout.STAMP, source.state.next_stamp, latest)
            yield found[2 * rows_of_mine], stamps, here[mine], mine, rows
    if snapshot_of.any():
        raise source.damaged(WRONG[carry.MISSING])


def _adopt(
    m: Memory, source: Source, signs: Uint64, stamps: Uint64, slots: Int32, lines: NDArray[np.int64], rows: NDArray[np.float32],
    latest: int,
) -> int:  # fmt: skip
    """Enter rows where there is room. Returns how many of them fit."""
    flat, ages = rows.reshape(-1), np.empty(eviction_kernels.CLASSES + 1, np.int64)
    flat.flags.writeable = False
    at = 0
    while True:
        reason, at = carry.adopt(
            signs, stamps, slots, lines, flat, at, m.index, m.entries, m.bits, m.meta, m.free, m.row_slots, m.arena, m.stride
        )
        if reason == carry.DONE:
            return len(signs)
        if reason == carry.KNOWN:
            raise source.damaged(WRONG[carry.TWICE])
        stripe = int(layout.stripe_of(signs[at], m.bits))
        if reason == carry.GRANT:
            m.grant(stripe)
        elif reason == carry.GROW:
            m.grow([stripe])
        elif not m.borrow(stripe, latest, np.uint64(0), ages):  # 0: nothing may be evicted
            return int(at)


def _scaled(stamps: Uint64, before: int, latest: int) -> Uint64:
    """Stamps below `before` as stamps below `latest`, which is not less: in the same order, and equal where both are equal."""
    return np.minimum((stamps * (latest / before)).astype(np.uint64), np.uint64(latest - 1))


def _moments(sources: Sequence[Source], lookups: int, latest: int) -> dict[int, list[tuple[int, int]]]:
    """What times to live are measured with: at each moment of any source, the least stamp of all of them: no row expires early."""
    moments: dict[int, list[tuple[int, int]]] = {}
    for life in {life for source in sources for life in source.state.ttl}:
        of_sources = []
        for state in (source.state for source in sources if life in source.state.ttl):
            begun = np.array(state.ttl[life], np.int64).reshape(-1, 2)
            # As many lookups ago as they were.
            of_sources.append(
                (begun[:, 0] + lookups - state.lookups, _scaled(begun[:, 1].astype(np.uint64), state.next_stamp, latest))
            )
        numbers = np.unique(np.concatenate([begun for begun, _ in of_sources]))
        firsts = [
            np.concatenate([[0], stamps.astype(np.int64)])[np.searchsorted(begun, numbers, side="right")]
            for begun, stamps in of_sources
        ]
        moments[life] = list(zip(numbers.tolist(), np.min(firsts, axis=0).tolist(), strict=True))
    return moments


# --- who belongs here -------------------------------------------------------------------------------------------------


def _by_slot(table: Table, slots: Int32, chosen: NDArray[np.bool_]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Slot after slot, the places of the chosen rows; slots without any are left out."""
    ends, lines = np.empty(len(table.slots), np.int64), np.empty(np.count_nonzero(chosen), np.int64)
    carry.group(slots, chosen, ends, lines)
    for slot, (first, last) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
        if last > first:
            yield slot, lines[first:last]


def _kept(keep: Keep, slot: str, signs: Uint64) -> NDArray[np.bool_]:
    kept = keep(slot, signs)
    assert kept.dtype == np.bool_
    assert kept.shape == signs.shape
    return kept

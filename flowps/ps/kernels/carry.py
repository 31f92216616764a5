"""Rows that leave for a checkpoint, and rows that come back from one.

Entries leave in the order of the index. Entered in that order into an empty index of the same size, each comes to stand where it
stood: the index is order-preserving and has no marks of erased entries, so that an entry stands at the first place from its home
on that no entry before it has taken.

What comes back is not trusted. Between reading and entering it stands by the number of its row:

    found    uint64 [2 * rows]: the row's sign, and stamp << 31 | the snapshot its entry is from, the chain's first being 1; 0: none
    held     uint16 [rows]: the snapshot its floats are from; USED: they are in the table
"""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import inlined, kernel
from flowps.ps.kernels.layout import (
    CLOSED,
    FREE,
    FRESH,
    FRESH_END,
    INSERTED,
    LIVE,
    ROOM,
    ROW,
    STAMP,
    home,
    is_last,
    stripe_of,
    take_row,
)
from flowps.ps.kernels.vector import lanes16, load_as, prefetch, store_as

_U0, _U1 = np.uint64(0), np.uint64(1)
_LINE = 16  # floats of a cache line
_AHEAD = 32  # rows between prefetch and use

USED = np.uint16(65_535)
MAX_CHAIN = 65_534

# Why `enter` has stopped: done; a row's number or stamp is out of range; its entry or its floats are missing; its sign belongs to
# another stripe, or stands in the index already; no entry is left in the stripe.
SOUND, RANGE, MISSING, STRIPE, TWICE, CROWDED = range(6)
# Why `adopt` has stopped: all are in; a stripe's index is full; a stripe needs fresh rows; the stripe is full for good; a sign of
# the slot stands in the index already.
DONE, GROW, GRANT, FULL, KNOWN = range(5)


@inlined
def _copy(source, at, target, to, floats):
    """target[to:to + floats] = source[at:at + floats], bit by bit."""
    d = 0
    while d + _LINE <= floats:
        store_as(target, to + d, load_as(lanes16(), source, at + d))
        d += _LINE
    while d < floats:
        target[to + d] = source[at + d]
        d += 1


@inlined
def _ask(arena, row, stride):
    """Ask for a row's lines."""
    for d in range(0, stride, _LINE):
        prefetch(arena, row * stride + d)


# --- out --------------------------------------------------------------------------------------------------------------


@kernel
def list_entries(index, first, last, count, signs, words):
    """Both words of the first `count` entries that are not empty among entries first … last - 1. Returns how many there were."""
    n = 0
    p = first
    while n < count and p < last:
        # Without a branch: which entries are empty cannot be foreseen.
        word = index[2 * p + 1]
        signs[n] = index[2 * p]
        words[n] = word
        n += np.int64(word != _U0)
        p += 1
    return n


@kernel
def list_touched(index, first, last, count, since, numbers, signs, words):
    """The rows of the first `count` entries among first … last - 1, and both words of those with a stamp of `since` or later.

    since   uint64 below 2^33. All outputs have room for `count`. Returns how many there were, and how many of them so late.
    """
    least = max(since << STAMP, _U1)  # an empty entry is not late
    n = touched = 0
    p = first
    while n < count and p < last:
        # Few are late, or nearly all: that can be foreseen; not so which are empty.
        word = index[2 * p + 1]
        numbers[n] = np.int32(np.int64(word & ROW) - 1)
        n += np.int64(word != _U0)
        if word >= least:
            signs[touched] = index[2 * p]
            words[touched] = word
            touched += 1
        p += 1
    return n, touched


@kernel
def take_rows(numbers, first, last, arena, row_slots, stride, rows, slots):
    """Copy the rows numbers[first:last] to the same lines of `rows`, float32 [n * stride], and their slots to `slots`."""
    for i in range(first, last):
        if i + _AHEAD < last:
            _ask(arena, np.int64(numbers[i + _AHEAD]), stride)
            prefetch(row_slots, np.int64(numbers[i + _AHEAD]))
        row = np.int64(numbers[i])
        _copy(arena, row * stride, rows, i * stride, stride)
        slots[i] = row_slots[row]


# --- back, to where they were -----------------------------------------------------------------------------------------


@kernel
def note(signs, words, first, last, snapshot, found, numbers):
    """Write the entries first … last - 1 of a snapshot to `found`, and their rows to `numbers` (int32).

    Returns the first whose row is out of range, or -1.
    """
    num_rows = len(found) // 2
    for i in range(first, last):
        if i + _AHEAD < last:
            prefetch(found, 2 * (np.int64(words[i + _AHEAD] & ROW) - 1))
        row = np.int64(words[i] & ROW) - 1
        if row < 0 or row >= num_rows:
            return i
        numbers[i] = np.int32(row)
        found[2 * row] = signs[i]
        found[2 * row + 1] = words[i] >> STAMP << STAMP | np.uint64(snapshot)
    return -1


@kernel
def put_rows(numbers, slots, rows, first, last, snapshot, num_slots, arena, row_slots, stride, held):
    """Write the lines first … last - 1 to the rows `numbers` says. Returns the first whose row or slot is out of range, or -1."""
    for i in range(first, last):
        row, slot = np.int64(numbers[i]), slots[i]
        if row < 0 or row >= len(held) or slot < 0 or slot >= num_slots:
            return i
        _copy(rows, i * stride, arena, row * stride, stride)
        row_slots[row] = slot
        held[row] = np.uint16(snapshot)
    return -1


@kernel
def enter(order, ends, first, last, next_stamp, found, held, index, entries, bits):
    """Enter the rows of the stripes first … last - 1 into the empty index, and note them as USED.

    order   int32, rows in the order of the index; stripe s has those before ends[s] (int64), from ends[s - 1] on

    Returns SOUND and where it ended, or what is wrong and the place in `order`. That no row stands there twice is for the caller to
    see: then as many are USED as there are.
    """
    i = ends[first - 1] if first > 0 else 0
    for stripe in range(first, last):
        while i < ends[stripe]:
            if i + 2 * _AHEAD < len(order):
                # No harm where a number is out of range: a prefetch never faults.
                prefetch(found, 2 * np.int64(order[i + 2 * _AHEAD]))
                prefetch(held, np.int64(order[i + 2 * _AHEAD]))
            row = np.int64(order[i])
            if row < 0 or row >= len(held):
                return RANGE, i
            sign, noted = found[2 * row], found[2 * row + 1]
            if noted & ROW == _U0 or noted & ROW != np.uint64(held[row]):
                return MISSING, i
            if noted >> STAMP >= next_stamp:
                return RANGE, i
            if stripe_of(sign, bits) != stripe:
                return STRIPE, i
            p = home(sign, entries, bits)
            while index[2 * p + 1] != _U0:
                if index[2 * p] == sign:
                    return TWICE, i
                p += 1
            if is_last(p, entries, bits, stripe):
                return CROWDED, i
            index[2 * p] = sign
            index[2 * p + 1] = noted >> STAMP << STAMP | np.uint64(row + 1)
            held[row] = USED
            i += 1
    return SOUND, i


# --- back, to wherever there is room ----------------------------------------------------------------------------------


@kernel
def group(slots, chosen, ends, lines):
    """Places of the chosen, slot after slot, to `lines` (int64); where slot s ends to ends[s] (int64 [slots])."""
    for s in range(len(ends)):
        ends[s] = 0
    for i in range(len(slots)):
        ends[slots[i]] += np.int64(chosen[i])
    before = np.int64(0)
    for s in range(len(ends)):
        before, ends[s] = before + ends[s], before
    for i in range(len(slots)):
        if chosen[i]:
            lines[ends[slots[i]]] = i
            ends[slots[i]] += 1


@kernel
def adopt(signs, stamps, slots, lines, rows, begin, index, entries, bits, meta, free, row_slots, arena, stride):
    """Give rows to the signs from `begin` on, with these stamps and slots, and the floats of the given lines of `rows`.

    A sign that another slot has brought already is passed over: such a collision of 64-bit hashes is one row.

    Returns DONE, or the reason for a stop, and the sign it stopped at: the caller helps and calls again.
    """
    for i in range(begin, len(signs)):
        sign = signs[i]
        p = home(sign, entries, bits)
        while index[2 * p + 1] != _U0 and index[2 * p] != sign:
            p += 1
        if index[2 * p + 1] != _U0:
            if row_slots[np.int64(index[2 * p + 1] & ROW) - 1] == slots[i]:
                return KNOWN, i
            continue
        stripe = stripe_of(sign, bits)
        full = meta[stripe, LIVE] >= meta[stripe, ROOM] or is_last(p, entries, bits, stripe)
        if full or (meta[stripe, FREE] == 0 and meta[stripe, FRESH] == meta[stripe, FRESH_END]):
            if meta[stripe, CLOSED] != 0:
                return FULL, i
            return GROW if full else GRANT, i
        row = take_row(stripe, meta, free)
        index[2 * p] = sign
        index[2 * p + 1] = np.uint64(row + 1) | (stamps[i] << STAMP)
        row_slots[row] = slots[i]
        _copy(rows, lines[i] * stride, arena, row * stride, stride)
        meta[stripe, LIVE] += 1
        meta[stripe, INSERTED] += 1
    return DONE, len(signs)

"""Signs → rows: find them, create them, list them. `layout` says where things stand.

rows    int32 [n]: row of each sign of a batch; the row `none` (zeros for ever) where a sign has none
"""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import kernel
from flowps.ps.kernels.admission import is_admitted
from flowps.ps.kernels.draw import begin, draw
from flowps.ps.kernels.eviction import make_room
from flowps.ps.kernels.layout import (
    CLOSED,
    EXPIRED,
    FREE,
    FREE_AT,
    FRESH,
    FRESH_END,
    INSERTED,
    LIVE,
    REFUSED,
    ROOM,
    ROW,
    STAMP,
    first_empty,
    home,
    is_last,
    stripe_of,
    take_row,
)
from flowps.ps.kernels.vector import prefetch

_U0, _U1, _U2 = np.uint64(0), np.uint64(1), np.uint64(2)
_LINE = 16  # floats of a cache line

AHEAD = 64  # signs between prefetch and use (`python -m bench.kernel` compares)
HOMES = 128  # places that are remembered from prefetch to use: a power of two above AHEAD
ROWS_AHEAD = 16  # new signs between prefetch and use of their rows
BLOCK = 2048  # signs that are searched before the new ones among them are created

# Why `find_or_create` has stopped: done; a stripe's index is full; a stripe needs fresh rows; nothing in it may be evicted.
DONE, GROW, GRANT, FULL = range(4)
# What it keeps between calls: the range it is in and the sign there, the pending signs and how many of them are done, the stripe
# that needs help, how many signs got no row, and the stamp that follows.
STEP, AT, PENDING, TAKEN, STRIPE, UNKNOWN, FOLLOWING = range(7)
PROGRESS = 7


@kernel
def find(signs, starts, stops, index, entries, bits, none, rows):
    """Rows of the signs of the ranges `signs[starts[k]:stops[k]]`, one range after the other, into `rows`."""
    n = 0
    for k in range(len(starts)):
        for i in range(starts[k], stops[k]):
            # Reading past a range asks for a line in vain at worst; past the array it would read foreign memory.
            if i + AHEAD < len(signs):
                prefetch(index, 2 * home(signs[i + AHEAD], entries, bits))
            sign = signs[i]
            p = _U2 * np.uint64(home(sign, entries, bits))
            row = none
            while True:
                entry = index[p + _U1]
                if entry == _U0:
                    break
                if index[p] == sign:
                    row = np.int32(np.int64(entry & ROW) - 1)
                    break
                p += _U2
            rows[n] = row
            n += 1


@kernel
def find_or_create(
    signs, starts, stops, places, part, parts, valid, rows, ordinals, distinct, bounds, index, entries, bits, meta, free,
    first_stamp, oldest, none, mine, homes, pending, ages, progress, slots, row_slots, valid_of_slot, arena, weights, dim, stride,
    widening, initial, kinds, scales, seed, now, admit_after, admit_share, sketch, sketch_width,
):  # fmt: skip
    """As `find`, for the signs of the stripes of one of `parts` (a power of two) equal parts, which the caller owns.

    A new sign gets a row.

    places     int64 [ranges]: range k's rows start at rows[places[k]]
    ordinals   int32, like rows: the stamp of each sign, less the lookup's `first_stamp`; this part's are equal to `part`, modulo
               `parts`; those of range k are in bounds[2k] … bounds[2k + 1] - 1 (int64 [2 * ranges]), or `part` for the row `none`
    distinct   int32: the row of each ordinal
    valid      uint64 [ranges]: a row with an older stamp has outlived its time: it starts anew
    mine       int32 [BLOCK], homes uint64 [HOMES], pending int32 [BLOCK], ages int64 [CLASSES + 1]: scratch
    progress   int64 [7], zeros at first: where to go on after a stop
    kinds, scales, admit_after, admit_share   per range: how rows begin (`draw`) and when
    now        the lookup's number, the key of admission by probability
    sketch     uint8 [2^bits * 4 * sketch_width]: sights of signs without a row (`_sight`)

    Threads that begin far apart do not write to the same cache lines, so each begins with another range.

    Returns DONE, or the reason for a stop, with the stripe in progress[STRIPE]: the caller helps and calls again.
    """
    part_bits = _U0
    while np.int64(1) << np.int64(part_bits) < parts:
        part_bits += _U1
    if progress[FOLLOWING] == 0:
        distinct[part] = none
        progress[FOLLOWING] = first_stamp + part + parts
    while progress[STEP] < len(starts):
        k = (part * len(starts) // parts + progress[STEP]) % len(starts)
        base = places[k] - starts[k]
        if progress[AT] == 0 and progress[PENDING] == 0:
            bounds[2 * k] = progress[FOLLOWING] - first_stamp
        floor = np.uint64(first_stamp + bounds[2 * k])
        while True:
            # New signs of the block that was searched last.
            if progress[TAKEN] < progress[PENDING]:
                reason = _create(
                    signs, base, rows, ordinals, distinct, pending, progress, index, entries, bits, meta, free, first_stamp, floor,
                    parts, oldest, valid[k], part, none, slots[k], row_slots, valid_of_slot, ages, arena, weights, dim, stride,
                    widening, initial, kinds[k], scales[k], seed, now, admit_after[k], admit_share[k], sketch, sketch_width,
                )  # fmt: skip
                if reason != DONE:
                    return reason
            progress[PENDING] = progress[TAKEN] = 0
            at = starts[k] + progress[AT]
            if at >= stops[k]:
                break
            # As many signs as hold a block of the caller's own.
            count = 0
            if parts == 1:
                count = min(BLOCK, stops[k] - at)
                for j in range(count):
                    mine[j] = np.int32(at + j)
                at += count
            else:
                while count < BLOCK and at < stops[k]:
                    until = min(at + BLOCK - count, stops[k])
                    for i in range(at, until):
                        mine[count] = np.int32(i)
                        # The stripes of a part are those of the same upper bits.
                        count += np.int64(stripe_of(signs[i], part_bits) == part)
                    at = until
            progress[PENDING] = _search(
                signs, mine, homes, count, base, rows, ordinals, distinct, pending, progress, index, entries, bits, first_stamp,
                floor, parts, valid[k],
            )  # fmt: skip
            progress[AT] = at - starts[k]
        bounds[2 * k + 1] = progress[FOLLOWING] - first_stamp
        progress[STEP] += 1
        progress[AT] = 0
    return DONE


@kernel
def _look_ahead(j, signs, mine, homes, index, entries, bits):
    """Note where sign mine[j] is at home, and ask for that line."""
    p = _U2 * np.uint64(home(signs[mine[j]], entries, bits))
    homes[j & (HOMES - 1)] = p
    prefetch(index, np.int64(p))


@kernel
def _search(
    signs, mine, homes, count, base, rows, ordinals, distinct, pending, progress, index, entries, bits, first_stamp, floor, parts,
    valid,
):  # fmt: skip
    """Find the signs at mine[:count], and note those that need a row, or a new one, in `pending`; returns how many."""
    following, zero, step = np.uint64(progress[FOLLOWING]), np.uint64(first_stamp), np.uint64(parts)
    num_pending = 0
    for j in range(min(AHEAD, count)):
        _look_ahead(j, signs, mine, homes, index, entries, bits)
    for j in range(count):
        i = np.int64(mine[j])
        p = homes[j & (HOMES - 1)]
        if j + AHEAD < count:
            _look_ahead(j + AHEAD, signs, mine, homes, index, entries, bits)
        sign = signs[i]
        while True:
            entry = index[p + _U1]
            if entry == _U0:
                pending[num_pending] = np.int32(i)
                num_pending += 1
                break
            if index[p] == sign:
                stamp = entry >> STAMP
                if stamp < valid:
                    pending[num_pending] = np.int32(i)
                    num_pending += 1
                    break
                # Without a branch: whether a sign is met for the first time cannot be foreseen.
                own = following if stamp < floor else stamp
                following += step if stamp < floor else _U0
                index[p + _U1] = (entry & ROW) | (own << STAMP)
                row = np.int32(np.int64(entry & ROW) - 1)
                rows[base + i] = row
                ordinals[base + i] = np.int32(np.int64(own - zero))
                distinct[np.int64(own - zero)] = row
                break
            p += _U2
    progress[FOLLOWING] = np.int64(following)
    return num_pending


@kernel
def _create(
    signs, base, rows, ordinals, distinct, pending, progress, index, entries, bits, meta, free, first_stamp, floor,
    parts, oldest, valid, part, none, slot, row_slots, valid_of_slot, ages, arena, weights, dim, stride, widening,
    initial, kind, scale, seed, now, admit_after, admit_share, sketch, sketch_width,
):  # fmt: skip
    """Give rows to the pending signs from progress[TAKEN] on; a sign may stand there twice, and be known by now."""
    for j in range(progress[TAKEN], progress[PENDING]):
        progress[TAKEN] = j
        if j + ROWS_AHEAD < progress[PENDING]:
            # The row that a sign soon to come will probably take.
            soon = stripe_of(signs[pending[j + ROWS_AHEAD]], bits)
            row = meta[soon, FRESH]
            if meta[soon, FREE] > 0:
                row = np.int64(free[meta[soon, FREE_AT] + meta[soon, FREE] - 1])
            prefetch(row_slots, row)
            for d in range(0, stride, _LINE):
                prefetch(arena, row * stride + d)
        i = np.int64(pending[j])
        sign = signs[i]
        p = home(sign, entries, bits)
        entry = index[2 * p + 1]
        while entry != _U0 and index[2 * p] != sign:
            p += 1
            entry = index[2 * p + 1]
        stripe = stripe_of(sign, bits)
        own = np.uint64(progress[FOLLOWING])
        if entry != _U0:
            row = np.int64(entry & ROW) - 1
            stamp = entry >> STAMP
            if stamp < valid:
                meta[stripe, EXPIRED] += 1
                draw(weights, row * stride * widening, dim, sign, seed, kind, scale)
                begin(arena, (row + 1) * stride - len(initial), initial)
            if stamp >= floor:
                own = stamp
        else:
            full = meta[stripe, LIVE] >= meta[stripe, ROOM] or is_last(p, entries, bits, stripe)
            used_up = meta[stripe, FREE] == 0 and meta[stripe, FRESH] == meta[stripe, FRESH_END]
            if (full or used_up) and meta[stripe, CLOSED] == 0:
                # Before its sight is counted: the sign comes here again when the caller has helped.
                progress[STRIPE] = stripe
                return GROW if full else GRANT
            if (admit_after > 1 or admit_share < 1.0) and not is_admitted(
                sign, stripe, sketch, sketch_width, meta, seed, now, admit_after, admit_share
            ):  # fmt: skip
                meta[stripe, REFUSED] += 1
                progress[UNKNOWN] += 1
                rows[base + i] = none
                ordinals[base + i] = np.int32(part)
                continue
            if full or used_up:
                freed = make_room(stripe, index, entries, bits, meta, free, own, oldest, row_slots, valid_of_slot, ages)
                p = first_empty(sign, index, entries, bits)
                if freed == 0 or is_last(p, entries, bits, stripe):
                    progress[STRIPE] = stripe
                    return FULL
            row = take_row(stripe, meta, free)
            index[2 * p] = sign
            row_slots[row] = slot
            draw(weights, row * stride * widening, dim, sign, seed, kind, scale)
            begin(arena, (row + 1) * stride - len(initial), initial)
            meta[stripe, LIVE] += 1
            meta[stripe, INSERTED] += 1
        if own == np.uint64(progress[FOLLOWING]):
            progress[FOLLOWING] += parts
        index[2 * p + 1] = np.uint64(row + 1) | (own << STAMP)
        rows[base + i] = np.int32(row)
        ordinals[base + i] = np.int32(np.int64(own) - first_stamp)
        distinct[np.int64(own) - first_stamp] = np.int32(row)
    progress[TAKEN] = progress[PENDING]
    return DONE


@kernel
def rebuild(old, new, entries, bits, first, last):
    """Enter everything of the old stripes first … last - 1 into the empty, larger index `new` of the same number of stripes."""
    region = len(old) // 2 // (1 << np.int64(bits))
    for p in range(first * region, last * region):
        if old[2 * p + 1] != _U0:
            q = first_empty(old[2 * p], new, entries, bits)
            new[2 * q] = old[2 * p]
            new[2 * q + 1] = old[2 * p + 1]


@kernel
def listed(index, row_slots, signs, stamps, slots):
    """Sign, stamp and slot of every entry, in order of the index. Returns how many there are."""
    n = 0
    for p in range(len(index) // 2):
        entry = index[2 * p + 1]
        if entry != _U0:
            signs[n] = index[2 * p]
            stamps[n] = entry >> STAMP
            slots[n] = row_slots[np.int64(entry & ROW) - 1]
            n += 1
    return n


@kernel
def lower_stamps(index, by):
    """Take `by` from every stamp, down to 0: they start again before they would pass 33 bits."""
    for p in range(len(index) // 2):
        entry = index[2 * p + 1]
        if entry != _U0:
            stamp = entry >> STAMP
            index[2 * p + 1] = (entry & ROW) | ((stamp - by if stamp > by else _U0) << STAMP)


@kernel
def sign_of(index, row):
    """The sign of a row, and whether there is one; looks through the whole index."""
    for p in range(len(index) // 2):
        if index[2 * p + 1] & ROW == np.uint64(row + 1):
            return index[2 * p], True
    return _U0, False

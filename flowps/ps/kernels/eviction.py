"""Rows that go: the least recently used when room is needed, and those that are erased."""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import kernel
from flowps.ps.kernels.layout import ERASED, EVICTED, FREE, FREE_AT, HAND, LIVE, PAD, ROW, STAMP, home, stripe_of
from flowps.ps.kernels.vector import bits_of

_U0, _U20 = np.uint64(0), np.uint64(20)
_ONE = np.uint64(127 << 3)  # exponent and upper three bits of the mantissa of 1.0
SEGMENT = 16_384  # entries that one sweep looks through: a bound on the pause that an eviction makes
CLASSES = 280  # of age: ages are below 2^34
_SHARE = 8  # one in so many of a segment's entries goes


@kernel
def make_room(stripe, index, entries, bits, meta, free, newest, oldest, row_slots, valid_of_slot, ages):
    """Evict from segment after segment until a row is free. Returns how many are; 0: everything in the stripe is in flight.

    newest         the stamp that follows
    valid_of_slot  uint64 [slots], the stamp below which a slot's rows have outlived their time, or empty
    ages           int64 [CLASSES + 1]: scratch
    """
    region = np.int64(entries >> bits) + PAD
    for _ in range(region // SEGMENT + 2):
        if _sweep(stripe, index, entries, bits, meta, free, newest, oldest, row_slots, valid_of_slot, ages) > 0:
            break
    return meta[stripe, FREE]


@kernel
def _sweep(stripe, index, entries, bits, meta, free, newest, oldest, row_slots, valid_of_slot, ages):
    """Evict the oldest eighth of the entries of the stripe's next segment, and those beyond their time. Returns how many.

    LRU by age classes: the oldest classes go. Entries in flight stay.
    """
    region = np.int64(entries >> bits) + PAD
    start = stripe * region
    lo = start + meta[stripe, HAND]
    hi = min(lo + SEGMENT, start + region)
    meta[stripe, HAND] = 0 if hi == start + region else hi - start
    for age in range(CLASSES + 1):
        ages[age] = 0
    for p in range(lo, hi):
        ages[_age_class(index[2 * p + 1], newest, oldest)] += 1
    live = hi - lo - ages[CLASSES]
    if live == 0:
        return 0
    # All of an older class than `limit` go, and as many of that class as are left of the quota.
    limit, left = CLASSES - 1, live // _SHARE + 1
    while ages[limit] < left:
        left -= ages[limit]
        limit -= 1
    evicted = 0
    p = lo
    while p < hi:
        entry = index[2 * p + 1]
        age = _age_class(entry, newest, oldest)
        expired = age < CLASSES and len(valid_of_slot) > 0 and entry >> STAMP < valid_of_slot[row_slots[np.int64(entry & ROW) - 1]]
        if expired or np.int64(age >= limit) & np.int64(age < CLASSES):
            if age == limit and not expired:
                left -= 1
                if left < 0:
                    p += 1
                    continue
            _forget(stripe, p, np.int64(entry & ROW) - 1, index, entries, bits, meta, free)
            meta[stripe, EVICTED] += 1
            evicted += 1
        else:
            p += 1  # else again with what has moved here
    return evicted


@kernel
def _age_class(entry, newest, oldest):
    """How old an entry is: eight classes to each doubling of its age in stamps. CLASSES: there is none, or it is in flight."""
    stamp = entry >> STAMP
    age = np.int64((bits_of(np.float32(np.int64(newest - stamp) + 1)) >> _U20) - _ONE)
    # Without a branch: which entries are empty cannot be foreseen.
    return CLASSES + (np.int64(entry != _U0) & np.int64(stamp < oldest)) * (age - CLASSES)


@kernel
def _forget(stripe, p, row, index, entries, bits, meta, free):
    """Take entry p out, move later ones of its run up so that probing still finds them, and give the row back."""
    hole = p
    q = p + 1
    while index[2 * q + 1] != _U0:
        if home(index[2 * q], entries, bits) <= hole:
            index[2 * hole] = index[2 * q]
            index[2 * hole + 1] = index[2 * q + 1]
            hole = q
        q += 1
    index[2 * hole + 1] = _U0
    free[meta[stripe, FREE_AT] + meta[stripe, FREE]] = np.int32(row)
    meta[stripe, FREE] += 1
    meta[stripe, LIVE] -= 1


@kernel
def erase(signs, index, entries, bits, meta, free, oldest):
    """Take signs out. Returns how many were there and not in flight; the others stay."""
    erased = 0
    for i in range(len(signs)):
        sign = signs[i]
        p = home(sign, entries, bits)
        while index[2 * p + 1] != _U0 and index[2 * p] != sign:
            p += 1
        entry = index[2 * p + 1]
        if entry != _U0 and (entry >> STAMP) < oldest:
            stripe = stripe_of(sign, bits)
            _forget(stripe, p, np.int64(entry & ROW) - 1, index, entries, bits, meta, free)
            meta[stripe, ERASED] += 1
            erased += 1
    return erased

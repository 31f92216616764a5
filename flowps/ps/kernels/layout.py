"""Where things stand in a table's index: entries, stripes, and a stripe's line of `meta`.

The index is one array of entries, cut into 2^bits stripes of `size` entries and PAD more; a stripe holds the signs whose mixed
upper bits say so, and whoever owns a stripe is alone with its entries, its rows and its line of `meta`. Inside a stripe: open
addressing with linear probing, order-preserving (the home of a sign grows with its mixed bits), no wrap-around: entries that run
over the end of a stripe stand in its PAD.

    index   uint64 [2 * 2^bits * (size + PAD)]: entry p is (sign, row + 1 | stamp << 31) at 2p and 2p + 1; second word 0: empty
    meta    int64 [2^bits, META], one line per stripe: see the names below

Stamps are given one after the other: in a training lookup each distinct sign of each slot gets the next one when it is first met.
So stamps order the signs by their last use, and within a lookup the stamp of a sign is its place among the distinct signs:
whoever sums gradients needs no other search. Rows with a stamp ≥ `oldest` belong to batches in flight and are never evicted,
expired or erased.
"""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import inlined, kernel

# Signs are hashes already; multiplying spreads those that are not (Knuth, TAOCP 3, 6.4, Fibonacci hashing).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_U0, _U32 = np.uint64(0), np.uint64(32)
ROW = np.uint64(0x7FFFFFFF)  # the part of an entry's second word that is the row, plus one
STAMP = np.uint64(31)  # what it is shifted by for the stamp

PAD = 1024  # entries after a stripe: at the load kept here a run of entries is much shorter

# A stripe's line of `meta`. LIVE: entries; ROOM: entries it may have; FRESH … FRESH_END: rows never used; FREE: rows given back,
# on the stack at FREE_AT; CLOSED: no fresh rows will come, evict; HAND: entry at which the next sweep begins. The rest count.
LIVE, ROOM, FRESH, FRESH_END, FREE, FREE_AT, CLOSED, HAND = range(8)
INSERTED, EVICTED, EXPIRED, REFUSED, ERASED, SIGHTS = range(8, 14)
META = 16


@kernel
def home(sign, entries, bits):
    """The entry at which probing for a sign starts, in an index of `entries` = 2^bits * size entries (pads not counted)."""
    high = (sign * _GOLDEN) >> _U32
    return np.int64((high * entries) >> _U32) + stripe_of(sign, bits) * PAD


@kernel
def stripe_of(sign, bits):
    """The stripe of a sign."""
    return np.int64(((sign * _GOLDEN) >> _U32) >> (_U32 - bits))


@inlined
def take_row(stripe, meta, free):
    """A row for a stripe that has one: one that was given back, or one that was never used."""
    if meta[stripe, FREE] > 0:
        meta[stripe, FREE] -= 1
        return np.int64(free[meta[stripe, FREE_AT] + meta[stripe, FREE]])
    meta[stripe, FRESH] += 1
    return meta[stripe, FRESH] - 1


@kernel
def is_last(p, entries, bits, stripe):
    """Whether entry p is the last of its stripe's pad, which stays empty so that probing ends."""
    size = np.int64(entries >> bits)
    return p == (stripe + 1) * (size + PAD) - 1


@kernel
def first_empty(sign, index, entries, bits):
    p = home(sign, entries, bits)
    while index[2 * p + 1] != _U0:
        p += 1
    return p

"""Find signs in a table's index, create rows for new ones, rebuild the index, list it.

Open addressing with linear probing over one array of (sign, row) pairs: a hit costs one cache line for sign and row together.
Lines are asked for `AHEAD` signs before they are used, so that many misses overlap.
"""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import kernel
from flowps.ps.kernels.vector import prefetch, splat16, store16, uniform16

# Signs are hashes already; multiplying spreads those that are not (Knuth, TAOCP 3, 6.4, Fibonacci hashing).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_U0, _U1, _U2, _U30, _U27, _U31, _U32 = (np.uint64(n) for n in (0, 1, 2, 30, 27, 31, 32))
_LOW32 = np.uint64(0xFFFFFFFF)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_UNIT = np.float32(2.0**-23)

_LINE = 16  # floats of a cache line
AHEAD = 32  # signs between prefetch and use: the best of 0, 8, 16 and 32 (`python -m bench.kernel`)

# What `find_or_create` keeps between calls, in one int64 array.
RANGE, NEXT, ROWS = 0, 1, 2  # the range it is in, the next sign there, rows in the table


@kernel
def find(signs, starts, stops, index, shift, rows):
    """Rows of the signs of the ranges `signs[starts[k]:stops[k]]`, one range after the other, into `rows`; -1 where unknown."""
    mask = np.uint64(len(index) // 2 - 1)
    n = 0
    for k in range(len(starts)):
        for i in range(starts[k], stops[k]):
            # Reading past a range asks for a line in vain at worst; past the array it would read foreign memory.
            if i + AHEAD < len(signs):
                prefetch(index, np.int64(((signs[i + AHEAD] * _GOLDEN) >> shift) * _U2))
            sign = signs[i]
            p = (sign * _GOLDEN) >> shift
            row = np.int32(-1)
            while True:
                entry = index[_U2 * p + _U1]
                if entry == _U0:
                    break
                if index[_U2 * p] == sign:
                    row = np.int32(np.int64(entry & _LOW32) - 1)
                    break
                p = (p + _U1) & mask
            rows[n] = row
            n += 1


@kernel
def find_or_create(signs, starts, stops, slots, index, shift, rows, progress, max_rows, arena, dim, stride, state, scale, seed):
    """As `find`, but a new sign gets the next row: weights drawn from the sign, state filled with `state`.

    `progress` int64 [3] (RANGE, NEXT, ROWS) says where to go on and is updated. Returns True when all ranges are done, False when
    the table has reached `max_rows`: the caller makes room (a larger index) and calls again, or gives up.
    `slots` uint64 [ranges] goes into the entries, `scale` float32 [ranges] bounds the first weights.
    """
    mask = np.uint64(len(index) // 2 - 1)
    n = np.int64(0)
    for k in range(progress[RANGE]):
        n += stops[k] - starts[k]
    n += progress[NEXT]
    num_rows = progress[ROWS]
    for k in range(progress[RANGE], len(starts)):
        first = starts[k] + progress[NEXT]
        for i in range(first, stops[k]):
            if i + AHEAD < len(signs):
                prefetch(index, np.int64(((signs[i + AHEAD] * _GOLDEN) >> shift) * _U2))
            sign = signs[i]
            p = (sign * _GOLDEN) >> shift
            while True:
                entry = index[_U2 * p + _U1]
                if entry == _U0:
                    if num_rows == max_rows:
                        progress[RANGE], progress[NEXT], progress[ROWS] = k, i - starts[k], num_rows
                        return False
                    index[_U2 * p] = sign
                    index[_U2 * p + _U1] = np.uint64(num_rows + 1) | (slots[k] << _U32)
                    # Of the row after the next one, which has been brought in by then; a prefetch never faults.
                    for d in range(0, stride, _LINE):
                        prefetch(arena, (num_rows + 2) * stride + d)
                    _draw(arena, num_rows * stride, dim, sign, seed, scale[k])
                    _fill(arena, num_rows * stride + dim, stride - dim, state)
                    rows[n] = num_rows
                    num_rows += 1
                    break
                if index[_U2 * p] == sign:
                    rows[n] = np.int32(np.int64(entry & _LOW32) - 1)
                    break
                p = (p + _U1) & mask
            n += 1
        progress[NEXT] = 0
    progress[RANGE], progress[ROWS] = len(starts), num_rows
    return True


@kernel
def _draw(arena, at, dim, sign, seed, scale):
    """`dim` weights uniform in [-scale, scale), from counter-based random numbers keyed by (sign, seed).

    SplitMix64's output function (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) of the
    counter; the upper 24 bits make the float.
    """
    key = sign ^ (seed * _MIX2)
    d = 0
    while d + 16 <= dim:
        store16(arena, at + d, uniform16(key, np.uint64(d + 1)) * splat16(scale))
        d += 16
    while d < dim:
        z = key + np.uint64(d + 1) * _GOLDEN
        z = (z ^ (z >> _U30)) * _MIX1
        z = (z ^ (z >> _U27)) * _MIX2
        z ^= z >> _U31
        arena[at + d] = (np.float32(np.int32(z >> np.uint64(40))) * _UNIT - np.float32(1)) * scale
        d += 1


@kernel
def _fill(arena, at, count, value):
    d = 0
    while d + 16 <= count:
        store16(arena, at + d, splat16(value))
        d += 16
    while d < count:
        arena[at + d] = value
        d += 1


@kernel
def rebuild(old, new, shift):
    """Enter everything of index `old` into the empty, larger index `new`."""
    mask = np.uint64(len(new) // 2 - 1)
    for at in range(0, len(old), 2):
        if old[at + 1] != _U0:
            p = (old[at] * _GOLDEN) >> shift
            while new[_U2 * p + _U1] != _U0:
                p = (p + _U1) & mask
            new[_U2 * p] = old[at]
            new[_U2 * p + _U1] = old[at + 1]


@kernel
def entries(index, signs, slots):
    """For each row: its sign and slot (uint64 [rows], int32 [rows])."""
    for at in range(0, len(index), 2):
        entry = index[at + 1]
        if entry != _U0:
            row = np.int64(entry & _LOW32) - 1
            signs[row] = index[at]
            slots[row] = np.int32(entry >> _U32)

"""Split one slot's bags by sign range, for a slot that lives on several shards; and move vectors in and out of a shard's lines."""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import inlined, kernel
from flowps.ps.kernels.pool import scale_of
from flowps.ps.kernels.vector import lanes16, load_as, store_as

_U32 = np.uint64(32)


@inlined
def part_of(sign, parts):
    """Which of `parts` (uint64) equal ranges of all 2^64 signs holds this one."""
    return np.int64(((sign >> _U32) * parts) >> _U32)


@kernel
def split(signs, shares, offsets, first, size, parts, pooling, starts, lengths, split_signs, split_shares):
    """Sort the bags offsets[first] … offsets[first + size] by the range of their signs; within a bag and range order stays.

    shares        float32 [signs of the batch], or empty: all 1
    parts         uint64
    starts        int64 [parts + 1], out: where each range's signs begin, and their number
    lengths       int32 [parts * size], out: signs of each range in each bag
    split_signs   uint64 [signs of the slot], out: range after range
    split_shares  float32 likewise, out, or empty where the pooling is SUM and there are no shares: each sign's weight in the sum
                  that the ranges' sums add up to; the divisor of MEAN and SQRTN is in it
    """
    count = np.int64(parts)
    for i in range(count * size):
        lengths[i] = 0
    for p in range(count + 1):
        starts[p] = 0
    for b in range(size):
        for i in range(offsets[first + b], offsets[first + b + 1]):
            p = part_of(signs[i], parts)
            lengths[p * size + b] += 1
            starts[p] += 1
    total = np.int64(0)
    for p in range(count + 1):
        total, starts[p] = total + starts[p], total
    for b in range(size):
        lo, hi = offsets[first + b], offsets[first + b + 1]
        scale = scale_of(lo, hi, pooling, shares, 0)
        for i in range(lo, hi):
            p = part_of(signs[i], parts)
            split_signs[starts[p]] = signs[i]
            if len(split_shares) > 0:
                split_shares[starts[p]] = scale * (shares[i] if len(shares) > 0 else np.float32(1))
            starts[p] += 1
    for p in range(count, 0, -1):  # each has moved to the beginning of the next
        starts[p] = starts[p - 1]
    starts[0] = 0


@kernel
def move(source, source_width, source_columns, target, target_width, target_columns, widths, size):
    """target[b, target_columns[k] + d] = source[b, source_columns[k] + d] for d < widths[k], every k and b < size.

    source, target   float32 [size * width], flat
    """
    for b in range(size):
        for k in range(len(widths)):
            at, to = b * source_width + source_columns[k], b * target_width + target_columns[k]
            d = 0
            while d + 16 <= widths[k]:
                store_as(target, to + d, load_as(lanes16(), source, at + d))
                d += 16
            while d < widths[k]:
                target[to + d] = source[at + d]
                d += 1

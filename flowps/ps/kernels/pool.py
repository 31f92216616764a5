"""Read rows: the pooled vector of every bag, written into its place in the batch's buffer."""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import kernel
from flowps.ps.kernels.index import AHEAD
from flowps.ps.kernels.vector import load8, load16, prefetch, splat8, splat16, store8, store16

SUM, MEAN = 0, 1
_LINE = 16  # floats of a cache line


@kernel
def pool(rows, known, offsets, positions, size, pooling, arena, dim, stride, out, width, columns):
    """Pool the bags of some slots of a batch of `size` samples.

    rows       int32, the rows of the slots' signs, slot after slot, as `index.find` leaves them; -1 adds zeros
    known      whether none of them is -1
    offsets    int32, the batch's; the slots stand at `positions` (int64 [k]) in it
    pooling    int32 [k], SUM or MEAN (the sum divided by the bag's number of signs)
    out        float32 [size * width]; slot k of sample b goes to out[b * width + columns[k]:][:dim]; an empty bag gives zeros
    """
    n = len(rows)
    base = np.int64(0)
    for k in range(len(positions)):
        first = positions[k] * size
        shift = base - offsets[first]
        if known and dim == _LINE and pooling[k] == SUM:
            _sum_lines(rows, base, offsets, first, size, arena, stride, out, width, columns[k])
            base += offsets[first + size] - offsets[first]
            continue
        for b in range(size):
            lo = offsets[first + b] + shift
            hi = offsets[first + b + 1] + shift
            for i in range(lo, hi):
                if i + AHEAD < n:
                    for d in range(0, dim, _LINE):
                        prefetch(arena, np.int64(rows[i + AHEAD]) * stride + d)
            scale = np.float32(1)
            if pooling[k] == MEAN and hi - lo > 1:
                scale = np.float32(1) / np.float32(hi - lo)
            _pool_bag(rows, lo, hi, arena, dim, stride, out, b * width + columns[k], scale)
        base += offsets[first + size] - offsets[first]


@kernel
def _sum_lines(rows, lo, offsets, first, size, arena, stride, out, width, column):
    """The bags of one slot for the dim and pooling used most, without the loops and branches of all others."""
    shift = lo - offsets[first]
    for b in range(size):
        hi = offsets[first + b + 1] + shift
        total = splat16(np.float32(0))
        for i in range(lo, hi):
            if i + AHEAD < len(rows):
                prefetch(arena, np.int64(rows[i + AHEAD]) * stride)
            total = total + load16(arena, np.int64(rows[i]) * stride)
        store16(out, b * width + column, total)
        lo = hi


@kernel
def _pool_bag(rows, lo, hi, arena, dim, stride, out, to, scale):
    """out[to:to + dim] = scale * sum of the rows lo … hi."""
    d = 0
    while d + 16 <= dim:
        wide = splat16(np.float32(0))
        for i in range(lo, hi):
            if rows[i] >= 0:
                wide = wide + load16(arena, np.int64(rows[i]) * stride + d)
        store16(out, to + d, wide * splat16(scale))
        d += 16
    if d + 8 <= dim:
        half = splat8(np.float32(0))
        for i in range(lo, hi):
            if rows[i] >= 0:
                half = half + load8(arena, np.int64(rows[i]) * stride + d)
        store8(out, to + d, half * splat8(scale))
        d += 8
    while d < dim:
        total = np.float32(0)
        for i in range(lo, hi):
            if rows[i] >= 0:
                total += arena[np.int64(rows[i]) * stride + d]
        out[to + d] = total * scale
        d += 1

"""Read rows: the pooled vector of every bag, written into its place in the batch's buffer."""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import inlined, kernel
from flowps.ps.kernels.index import AHEAD
from flowps.ps.kernels.vector import fence, fill, lane, lanes8, lanes16, load_as, prefetch, store_as, stream_as

SUM, MEAN, SQRTN, NONE = 0, 1, 2, 3
_LINE = 16  # floats of a cache line
FAST_DIM = 16  # the dim used most has loops of its own


@kernel
def pool(
    rows,
    places,
    shares,
    offsets,
    positions,
    size,
    begin,
    end,
    pooling,
    lengths,
    arena,
    dim,
    stride,
    widening,
    out,
    width,
    columns,
    streaming,
):
    """Pool the bags of some slots of the samples begin … end - 1 of a batch of `size`.

    rows       int32, the rows of the slots' signs as `index.find` leaves them, slot k's from rows[places[k]] on
    shares     float32 [signs of the batch], the weight of each sign, or empty: all 1
    offsets    int32, the batch's; the slots stand at `positions` (int64 [k]) in it
    pooling    int32 [k]: SUM; MEAN and SQRTN, the sum divided by the bag's number of signs and its root (weighted: by the sum of
               the weights, and the root of the sum of their squares); NONE: no sum but the first lengths[k] rows one after
               the other, zeros after the last
    arena      rows of `stride` floats, `dim` weights first, `widening` numbers of the storage to each float
    out        float32 [size * width]; slot k of sample b goes to out[b * width + columns[k]:]; an empty bag gives zeros
    streaming  whether all those places start on a cache line: vectors of a line's length are then written past the caches, which
               need not read the lines first (`python -m bench.kernel` compares)
    """
    for k in range(len(positions)):
        first = positions[k] * size
        base = places[k] - offsets[first]
        if pooling[k] == NONE:
            for b in range(begin, end):
                lo, hi = offsets[first + b] + base, offsets[first + b + 1] + base
                to = b * width + columns[k]
                _copy_bag(rows, lo, min(hi, lo + lengths[k]), shares, -base, arena, dim, stride * widening, out, to, lengths[k])
        elif dim == FAST_DIM and pooling[k] == SUM and len(shares) == 0:
            _sum_lines(rows, base, offsets, first, begin, end, arena, stride * widening, out, width, columns[k], streaming)
        else:
            for b in range(begin, end):
                lo, hi = offsets[first + b] + base, offsets[first + b + 1] + base
                for i in range(lo + AHEAD, min(hi + AHEAD, len(rows))):
                    for d in range(0, dim, _LINE):
                        prefetch(arena, np.int64(rows[i]) * stride * widening + d)
                scale = scale_of(lo, hi, pooling[k], shares, -base)
                _pool_bag(rows, lo, hi, shares, -base, arena, dim, stride * widening, out, b * width + columns[k], scale)


@inlined
def scale_of(lo, hi, pooling, shares, base):
    """What the sum of a bag is multiplied by; shares[i + base] is the weight of the sign at place i."""
    if pooling in (SUM, NONE) or hi <= lo:
        return np.float32(1)
    found = np.float32(0)
    if len(shares) == 0:
        found = np.float32(hi - lo)
    else:
        for i in range(lo, hi):
            share = shares[i + base]
            found += share if pooling == MEAN else share * share
    if pooling == SQRTN:
        found = np.float32(np.sqrt(found))
    return np.float32(1) / found if found != np.float32(0) else np.float32(0)


@kernel
def _sum_lines(rows, base, offsets, first, begin, end, arena, stride, out, width, column, streaming):
    """The bags of one slot for the dim and pooling used most, without the loops and branches of all others."""
    lo = offsets[first + begin] + base
    for b in range(begin, end):
        hi = offsets[first + b + 1] + base
        summed = lanes16()
        for i in range(lo, hi):
            if i + AHEAD < len(rows):
                prefetch(arena, np.int64(rows[i + AHEAD]) * stride)
            summed = summed + load_as(lanes16(), arena, np.int64(rows[i]) * stride)
        if streaming:
            stream_as(out, b * width + column, summed)
        else:
            store_as(out, b * width + column, summed)
        lo = hi
    if streaming:
        fence()


@inlined
def _pool_bag(rows, lo, hi, shares, base, arena, dim, stride, out, to, scale):
    """out[to:to + dim] = scale * sum of the rows lo … hi, each times its share."""
    d = 0
    while d + 16 <= dim:
        store_as(out, to + d, _pool_lanes(lanes16(), rows, lo, hi, shares, base, arena, stride, d, scale))
        d += 16
    if d + 8 <= dim:
        store_as(out, to + d, _pool_lanes(lanes8(), rows, lo, hi, shares, base, arena, stride, d, scale))
        d += 8
    while d < dim:
        store_as(out, to + d, _pool_lanes(lane(), rows, lo, hi, shares, base, arena, stride, d, scale))
        d += 1


@inlined
def _pool_lanes(like, rows, lo, hi, shares, base, arena, stride, d, scale):
    summed = like
    if len(shares) == 0:
        for i in range(lo, hi):
            summed = summed + load_as(like, arena, np.int64(rows[i]) * stride + d)
    else:
        for i in range(lo, hi):
            summed = summed + load_as(like, arena, np.int64(rows[i]) * stride + d) * fill(like, shares[i + base])
    return summed * fill(like, scale)


@kernel
def _copy_bag(rows, lo, hi, shares, base, arena, dim, stride, out, to, length):
    """The rows one after the other, times their shares, and zeros up to `length` rows."""
    for i in range(lo, hi):
        if i + AHEAD < len(rows):
            prefetch(arena, np.int64(rows[i + AHEAD]) * stride)
        _pool_bag(rows, i, i + 1, shares, base, arena, dim, stride, out, to, np.float32(1))
        to += dim
    for d in range(to, to + (length - max(hi - lo, 0)) * dim):
        out[d] = np.float32(0)


@kernel
def copy_rows(rows, arena, weights, dim, stride, widening, state_width, to_weights, to_state):
    """Copy rows: weights widened to float32 [n * dim], state float32 [n * state width]."""
    for n in range(len(rows)):
        at = np.int64(rows[n]) * stride
        d = 0
        while d + 16 <= dim:
            store_as(to_weights, n * dim + d, load_as(lanes16(), weights, at * widening + d))
            d += 16
        while d < dim:
            store_as(to_weights, n * dim + d, load_as(lane(), weights, at * widening + d))
            d += 1
        for d in range(state_width):
            to_state[n * state_width + d] = arena[at + stride - state_width + d]

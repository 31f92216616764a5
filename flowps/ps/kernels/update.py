"""Step rows: gradients summed per distinct row of a slot, then the optimizer once per row.

The distinct rows need no search: the lookup has numbered them (`index`). Order, and so the sums' rounding, is that of the batch,
whichever thread does it.
"""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import inlined, kernel
from flowps.ps.kernels.clock import clock_ns
from flowps.ps.kernels.pool import FAST_DIM, MEAN, NONE, SQRTN, scale_of
from flowps.ps.kernels.step import CLIP_NORM, CLIP_VALUE, PENALTY, condition, is_sound, step_row
from flowps.ps.kernels.vector import bits_of, fill, lane, lanes8, lanes16, load_as, prefetch, random_word, store_as

_U32 = np.uint64(32)
_LINE = 16  # floats of a cache line
_ROWS_AHEAD = 16  # rows between prefetch and step
LIST = 1024  # gradients that are listed before they are summed

# What a push counts: rows stepped, rows whose gradient was not finite (and one of them with its slot), and nanoseconds in which
# gradients were summed and rows stepped.
STEPPED, UNSOUND, UNSOUND_ROW, UNSOUND_SLOT, SUM_NS, STEP_NS, COUNTS = range(7)


@kernel
def push(
    tag, ordinals, distinct, bounds, places, shares, offsets, positions, size, pooling, lengths, grads, width, columns, part,
    parts, sums, listed, scales, arena, weights, dim, stride, widening, state_width, none, params, pushes, counts,
):  # fmt: skip
    """One step of every row that the slots at `positions` touched and whose ordinal is `part` modulo `parts`.

    ordinals, distinct, bounds   as `index.find_or_create` leaves them for this part
    places, shares, offsets, positions, size, pooling, lengths, columns, dim, stride, widening   as for `pool.pool`
    tag        the optimizer (`step`), params float32 [slots, NUM_PARAMS]
    grads      float32 [size * width], read-only, the gradient of each pooled vector
    sums       float32 [most ordinals of one slot * dim], listed int64 [2 * LIST], scales float32 [LIST]: scratch
    pushes     how many pushes came before, the key of stochastic rounding
    counts     int64 [COUNTS], see above
    """
    before = clock_ns()
    for k in range(len(positions)):
        first = positions[k] * size
        base = places[k] - offsets[first]
        lo, hi = bounds[2 * k], bounds[2 * k + 1]
        _clear(sums, (hi - lo) * dim)
        if parts == 1 and dim == FAST_DIM and pooling[k] != NONE and len(shares) == 0:
            _sum_lines(ordinals, base, offsets, first, size, pooling[k], grads, width, columns[k], lo, sums)
        else:
            _sum(ordinals, base, shares, offsets, first, size, pooling[k], lengths[k], grads, width, columns[k], part, parts, lo,
                 sums, listed, scales, dim)  # fmt: skip
        summed = clock_ns()
        counts[SUM_NS] += summed - before
        if dim == FAST_DIM:
            _step_slot(tag, k, lo, hi, parts, distinct, sums, arena, weights, FAST_DIM, stride, widening, state_width, params[k],
                       pushes, counts)  # fmt: skip
        else:
            _step_slot(tag, k, lo, hi, parts, distinct, sums, arena, weights, dim, stride, widening, state_width, params[k],
                       pushes, counts)  # fmt: skip
        before = clock_ns()
        counts[STEP_NS] += before - summed


@inlined
def _step_slot(tag, k, lo, hi, parts, distinct, sums, arena, weights, dim, stride, widening, state_width, params, pushes, counts):
    conditioned = params[PENALTY] != 0.0 or params[CLIP_VALUE] > 0.0 or params[CLIP_NORM] > 0.0
    for ordinal in range(lo, hi, parts):
        if ordinal + _ROWS_AHEAD * parts < hi:
            ahead = np.int64(distinct[ordinal + _ROWS_AHEAD * parts]) * stride
            for d in range(0, stride, _LINE):
                prefetch(arena, ahead + d)
        row, at = np.int64(distinct[ordinal]), (ordinal - lo) * dim
        if not is_sound(sums, at, dim):
            counts[UNSOUND] += 1
            counts[UNSOUND_ROW], counts[UNSOUND_SLOT] = row, k
            continue
        w_at, s_at = row * stride * widening, (row + 1) * stride - state_width
        if conditioned:
            condition(params, sums, at, weights, w_at, dim)
        key = np.uint64(0)
        if widening > 1:
            # Of what is added to what, not of the row's number, which depends on the order of arrival.
            bits = bits_of(sums[at]) | bits_of(load_as(lane(), weights, w_at)) << _U32
            key = random_word(bits, np.uint64(pushes))
        step_row(tag, params, weights, w_at, arena, s_at, sums, at, dim, key)
        counts[STEPPED] += 1


@kernel
def _sum_lines(ordinals, base, offsets, first, size, pooling, grads, width, column, floor, sums):
    """`_sum` for the dim used most: a bag's gradient stays in registers."""
    lo = offsets[first] + base
    for b in range(size):
        hi = offsets[first + b + 1] + base
        grad = load_as(lanes16(), grads, b * width + column)
        if pooling in (MEAN, SQRTN) and hi - lo > 1:
            share = np.float32(hi - lo)
            grad = grad * fill(lanes16(), np.float32(1) / (share if pooling == MEAN else np.float32(np.sqrt(share))))
        for i in range(lo, hi):
            ordinal = np.int64(ordinals[i])
            if ordinal < floor:
                continue  # a sign without a row
            at = (ordinal - floor) * _LINE
            store_as(sums, at, load_as(lanes16(), sums, at) + grad)
        lo = hi


@kernel
def _sum(
    ordinals, base, shares, offsets, first, size, pooling, length, grads, width, column, part, parts, floor, sums, listed, scales,
    dim,
):  # fmt: skip
    """Sum the gradients of each of a slot's ordinals that are this part's in `sums`, from `floor` on."""
    count = 0
    for b in range(size):
        lo, hi = offsets[first + b] + base, offsets[first + b + 1] + base
        of = b * width + column
        scale = scale_of(lo, hi, pooling, shares, -base)
        if pooling == NONE:
            hi = min(hi, lo + length)
        for i in range(lo, hi):
            # Listed without a branch: whether an ordinal is this part's cannot be foreseen.
            ordinal = np.int64(ordinals[i])
            listed[2 * count], listed[2 * count + 1] = ordinal, of
            scales[count] = scale if len(shares) == 0 else scale * shares[i - base]
            count += np.int64(ordinal & (parts - 1) == part) & np.int64(ordinal >= floor)
            if pooling == NONE:
                of += dim
            if count == LIST:
                _add_listed(listed, scales, count, floor, grads, sums, dim)
                count = 0
    _add_listed(listed, scales, count, floor, grads, sums, dim)


@kernel
def _add_listed(listed, scales, count, floor, grads, sums, dim):
    """sums of each listed ordinal += its scale * its gradient."""
    if dim == FAST_DIM:
        for j in range(count):
            _add_lanes(lanes16(), sums, (listed[2 * j] - floor) * FAST_DIM, grads, listed[2 * j + 1], scales[j])
        return
    for j in range(count):
        at, of, scale = (listed[2 * j] - floor) * dim, listed[2 * j + 1], scales[j]
        d = 0
        while d + 16 <= dim:
            _add_lanes(lanes16(), sums, at + d, grads, of + d, scale)
            d += 16
        if d + 8 <= dim:
            _add_lanes(lanes8(), sums, at + d, grads, of + d, scale)
            d += 8
        while d < dim:
            _add_lanes(lane(), sums, at + d, grads, of + d, scale)
            d += 1


@inlined
def _add_lanes(like, sums, at, grads, of, scale):
    store_as(sums, at, load_as(like, sums, at) + load_as(like, grads, of) * fill(like, scale))


@kernel
def _clear(sums, count):
    d = 0
    while d + 16 <= count:
        store_as(sums, d, lanes16())
        d += 16
    while d < count:
        sums[d] = np.float32(0)
        d += 1

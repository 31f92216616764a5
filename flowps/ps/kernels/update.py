"""Step rows: gradients summed per distinct row of a slot, then the optimizer once per row.

The distinct rows are found without sorting: `seen[row]` holds the row's place in the slot's list while the slot is worked on, and
is cleared after. Order, and so the sums' rounding, is that of first occurrence: the same for a given batch, always.
"""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import kernel
from flowps.ps.kernels.index import AHEAD
from flowps.ps.kernels.pool import MEAN
from flowps.ps.kernels.vector import load8, load16, prefetch, splat8, splat16, sqrt8, sqrt16, store8, store16

SGD, ADAGRAD = 0, 1
_LINE = 16  # floats of a cache line


@kernel
def push(
    rows, offsets, positions, size, pooling, grads, width, columns, seen, distinct, sums, arena, dim, stride, optimizer, params
):
    """One step of every row that the slots at `positions` touched. Returns the number of distinct rows, summed over the slots.

    rows, offsets, positions, size, pooling, columns   as for `pool.pool`; rows are all ≥ 0
    grads      float32 [size * width], read-only, the gradient of each pooled vector
    seen       int32 [capacity], all 0 before and after
    distinct   int32 [most signs of one slot], sums float32 [the same * dim]: scratch
    optimizer  SGD or ADAGRAD, params float32 [ranges, 2] one line per slot: learning rate, epsilon
    """
    total = np.int64(0)
    base = np.int64(0)
    for k in range(len(positions)):
        first = positions[k] * size
        if dim == _LINE:
            found = _sum_lines(rows, base, offsets, first, size, pooling[k], grads, width, columns[k], seen, distinct, sums)
        else:
            found = _sum(rows, base, offsets, first, size, pooling[k], grads, width, columns[k], seen, distinct, sums, dim)
        for u in range(found):
            seen[distinct[u]] = 0
        if optimizer == SGD:
            _sgd(distinct, found, sums, arena, dim, stride, params[k, 0])
        else:
            _adagrad(distinct, found, sums, arena, dim, stride, params[k, 0], params[k, 1])
        total += found
        base += offsets[first + size] - offsets[first]
    return total


@kernel
def _sum_lines(rows, lo, offsets, first, size, pooling, grads, width, column, seen, distinct, sums):
    """`_sum` for the dim used most: a bag's gradient stays in registers."""
    found = 0
    shift = lo - offsets[first]
    for b in range(size):
        hi = offsets[first + b + 1] + shift
        grad = load16(grads, b * width + column)
        if pooling == MEAN and hi - lo > 1:
            grad = grad * splat16(np.float32(1) / np.float32(hi - lo))
        for i in range(lo, hi):
            if i + AHEAD < len(rows):
                prefetch(seen, np.int64(rows[i + AHEAD]))
            u = np.int64(seen[rows[i]]) - 1
            if u < 0:
                distinct[found] = rows[i]
                store16(sums, found * _LINE, grad)
                found += 1
                seen[rows[i]] = found
            else:
                store16(sums, u * _LINE, load16(sums, u * _LINE) + grad)
        lo = hi
    return found


@kernel
def _sum(rows, lo, offsets, first, size, pooling, grads, width, column, seen, distinct, sums, dim):
    """List the distinct rows of a slot in `distinct` and sum their gradients in `sums`; returns how many there are."""
    found = 0
    shift = lo - offsets[first]
    for b in range(size):
        hi = offsets[first + b + 1] + shift
        scale = np.float32(1)
        if pooling == MEAN and hi - lo > 1:
            scale = np.float32(1) / np.float32(hi - lo)
        for i in range(lo, hi):
            if i + AHEAD < len(rows):
                prefetch(seen, np.int64(rows[i + AHEAD]))
            u = np.int64(seen[rows[i]]) - 1
            if u < 0:
                u = found
                distinct[u] = rows[i]
                found += 1
                seen[rows[i]] = found
                _clear(sums, u * dim, dim)
            _add(sums, u * dim, grads, b * width + column, dim, scale)
        lo = hi
    return found


@kernel
def _clear(sums, at, dim):
    for d in range(at, at + dim):
        sums[d] = np.float32(0)


@kernel
def _add(sums, at, grads, of, dim, scale):
    """sums[at:at + dim] += scale * grads[of:of + dim]."""
    d = 0
    while d + 16 <= dim:
        store16(sums, at + d, load16(sums, at + d) + load16(grads, of + d) * splat16(scale))
        d += 16
    if d + 8 <= dim:
        store8(sums, at + d, load8(sums, at + d) + load8(grads, of + d) * splat8(scale))
        d += 8
    while d < dim:
        sums[at + d] += grads[of + d] * scale
        d += 1


@kernel
def _sgd(distinct, found, sums, arena, dim, stride, rate):
    """w -= rate * g."""
    for u in range(found):
        if u + AHEAD < found:
            prefetch(arena, np.int64(distinct[u + AHEAD]) * stride)
        _add(arena, np.int64(distinct[u]) * stride, sums, u * dim, dim, -rate)


@kernel
def _adagrad(distinct, found, sums, arena, dim, stride, rate, epsilon):
    """a += g²; w -= rate * g / sqrt(a + epsilon).

    Duchi, Hazan, Singer, "Adaptive subgradient methods", JMLR 2011, with epsilon under the root as Keras has it.
    """
    for u in range(found):
        if u + AHEAD < found:
            ahead = np.int64(distinct[u + AHEAD]) * stride
            prefetch(arena, ahead)
            prefetch(arena, ahead + dim)
        at = np.int64(distinct[u]) * stride
        g = u * dim
        d = 0
        while d + 16 <= dim:
            wide = load16(sums, g + d)
            wide_sum = load16(arena, at + dim + d) + wide * wide
            store16(arena, at + dim + d, wide_sum)
            step = splat16(rate) * wide / sqrt16(wide_sum + splat16(epsilon))
            store16(arena, at + d, load16(arena, at + d) - step)
            d += 16
        if d + 8 <= dim:
            half = load8(sums, g + d)
            half_sum = load8(arena, at + dim + d) + half * half
            store8(arena, at + dim + d, half_sum)
            store8(arena, at + d, load8(arena, at + d) - splat8(rate) * half / sqrt8(half_sum + splat8(epsilon)))
            d += 8
        while d < dim:
            total = arena[at + dim + d] + sums[g + d] * sums[g + d]
            arena[at + dim + d] = total
            arena[at + d] -= rate * sums[g + d] / np.sqrt(total + epsilon)
            d += 1

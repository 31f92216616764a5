"""A new row: its first weights, drawn from its sign alone, and its first state.

Random numbers are counter-based (`vector.random_word`), keyed by sign and seed: the same row whatever the order of arrival, the
thread or the shard. Uniform weight d is number d of `vector.uniform_as`, a normal one is made of the words at counters 2d + 1 and
2d + 2; numbers that are drawn again use counters 2 * dim further.
"""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import kernel
from flowps.ps.kernels.vector import fill, lane, lanes8, lanes16, load_as, random_word, store_as, uniform_as

CONSTANT, UNIFORM, NORMAL, TRUNCATED_NORMAL = 0, 1, 2, 3
_SEED_MIX = np.uint64(0x94D049BB133111EB)
_U1, _U11 = np.uint64(1), np.uint64(11)
_UNIT = 2.0**-53
_TRUNCATED_AT = 2.0  # standard deviations, as in Keras


@kernel
def draw(weights, at, dim, sign, seed, kind, scale):
    """Write `dim` weights to `weights` (any storage) from element `at` on.

    kind   CONSTANT: all `scale`; UNIFORM: in [-scale, scale); NORMAL: mean 0 and standard deviation `scale`; TRUNCATED_NORMAL:
           the same, drawn again where it is more than 2 `scale` away
    """
    key = sign ^ (seed * _SEED_MIX)
    d = 0
    if kind <= UNIFORM:
        while d + 16 <= dim:
            _line(lanes16(), weights, at, d, key, kind, scale)
            d += 16
        if d + 8 <= dim:
            _line(lanes8(), weights, at, d, key, kind, scale)
            d += 8
        while d < dim:
            _line(lane(), weights, at, d, key, kind, scale)
            d += 1
        return
    while d < dim:
        counter = np.uint64(2 * d + 1)
        number = _normal(key, counter)
        while kind == TRUNCATED_NORMAL and abs(number) > _TRUNCATED_AT:
            counter += np.uint64(2 * dim)
            number = _normal(key, counter)
        store_as(weights, at + d, np.float32(number * np.float64(scale)))
        d += 1


@kernel
def _line(like, weights, at, d, key, kind, scale):
    if kind == CONSTANT:
        store_as(weights, at + d, fill(like, scale))
    else:
        store_as(weights, at + d, uniform_as(like, key, np.uint64(d)) * fill(like, scale))


@kernel
def _normal(key, counter):
    """Box and Muller, Ann. Math. Stat. 29 (1958), from two 53-bit uniform numbers."""
    first = (np.float64(np.int64(random_word(key, counter) >> _U11)) + 1.0) * _UNIT  # in (0, 1]
    second = np.float64(np.int64(random_word(key, counter + _U1) >> _U11)) * _UNIT
    return np.sqrt(-2.0 * np.log(first)) * np.cos(2.0 * np.pi * second)


@kernel
def begin(state, at, initial):
    """Copy the first state, float32 [state width], to `state` from element `at` on."""
    width = len(initial)
    d = 0
    while d + 16 <= width:
        store_as(state, at + d, load_as(lanes16(), initial, d))
        d += 16
    while d < width:
        state[at + d] = initial[d]
        d += 1

"""One step of one row: the optimizers.

An optimizer is a tag, a named tuple whose type decides at compile time which code a push becomes (tuples of two types compare
equal when their codes are). Those that go element by element are
written once, as `move` of lanes (`vector`), and run 16, 8 and 1 wide; those that look at a row as a whole write `step_row`.

    params   float32 [slots, NUM_PARAMS], one line per slot, names below
    state    floats behind a row's weights: the first `dim` (or 1) of them are the optimizer's first state, and so on
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from flowps.ps.kernels import OPTIONS, inlined, kernel
from flowps.ps.kernels.vector import (
    all_finite,
    fill,
    lane,
    lanes8,
    lanes16,
    larger,
    load_as,
    root,
    smaller,
    store_as,
    store_rounded,
    total,
)

# A slot's line of parameters. DECAY: learning rate times decoupled weight decay; PENALTY: L2 in the gradient; 0: no clipping;
# REST1, REST2: 1 - BETA1 and 1 - BETA2, which float32 could not tell from BETA; CORRECT1, CORRECT2: 1 / (1 - beta^steps);
# SCALE: what the schedule multiplies the ftrls' gradients by, whose learning rate scales all that was learnt.
RATE, EPSILON, BETA1, BETA2, REST1, REST2, L1, L2, GROUP, DECAY, PENALTY, CLIP_VALUE, CLIP_NORM, BOUND = range(14)
CORRECT1, CORRECT2, SCALE = range(14, 17)
NUM_PARAMS = 17
_LARGEST = np.float32(1e23)  # times a gradient of 3.4e15 it is infinite: sums of squares of larger ones are, or nearly so
_LEAST_DIVISOR = np.float32(1e-12)
_INLINED = {**OPTIONS, "forceinline": True}


class Sgd(NamedTuple):
    """w -= rate · g."""

    code: int = 1


class Momentum(NamedTuple):
    """m = beta1 · m - rate · g; w += m. Polyak, USSR Comp. Math. 4 (1964)."""

    code: int = 2


class Adagrad(NamedTuple):
    """a += g²; w -= rate · g / √(a + epsilon). Duchi, Hazan, Singer, JMLR 12 (2011)."""

    code: int = 3


class RowWiseAdagrad(NamedTuple):
    """a += mean(g²), one number per row; w -= rate · g / √(a + epsilon). Gupta et al., arXiv:1409.5058; FBGEMM."""

    code: int = 4


class Adam(NamedTuple):
    """m += (1 - beta1)(g - m); v += (1 - beta2)(g² - v); w -= rate · m̂ / (√v̂ + epsilon), touched rows only.

    Kingma, Ba, ICLR 2015; the bias corrections are in RATE. With DECAY it is AdamW: Loshchilov, Hutter, ICLR 2019.
    """

    code: int = 5


class AmsGrad(NamedTuple):
    """Adam whose v̂ never falls. Reddi, Kale, Kumar, ICLR 2018, as Keras has it."""

    code: int = 6


class RmsProp(NamedTuple):
    """v = beta2 · v + (1 - beta2) g²; w -= rate · g / √(v + epsilon). Tieleman, Hinton, Coursera (2012)."""

    code: int = 7


class Ftrl(NamedTuple):
    """FTRL-Proximal with L1 and L2. McMahan et al., KDD 2013; state n (sum of squares) and z."""

    code: int = 8


class GroupFtrl(NamedTuple):
    """FTRL-Proximal with an L2,1 penalty on the row: rows whose ‖soft(z)‖ ≤ GROUP · √dim are zero. Ni et al., CIKM 2019."""

    code: int = 9


class Lamb(NamedTuple):
    """Adam's step times ‖w‖ / ‖step‖, the row being LAMB's layer. You et al., ICLR 2020."""

    code: int = 10


_MOVES: dict[type, Callable[..., Any]] = {}
_ROWS: dict[type, Callable[..., Any]] = {}


def _for(registry: dict[type, Callable[..., Any]], tag: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        registry[tag] = function
        return function

    return register


def move(tag, params, like, w, g, state, at, dim):
    """The new weights; reads and writes the state of these lanes: state j from state[at + j * dim] on."""
    raise NotImplementedError("compiled code only")


def step_row(tag, params, weights, w_at, state, s_at, grads, g_at, dim, key):
    """Step a whole row with the gradient grads[g_at:g_at + dim]."""
    raise NotImplementedError("compiled code only")


@overload(move, jit_options=_INLINED)
def _move(tag, params, like, w, g, state, at, dim):
    return _MOVES[tag.instance_class]


@overload(step_row, jit_options=_INLINED)
def _step_row(tag, params, weights, w_at, state, s_at, grads, g_at, dim, key):
    return _ROWS.get(tag.instance_class, _by_lanes)


# --- element by element -----------------------------------------------------------------------------------------------


@_for(_MOVES, Sgd)
def _sgd(tag, params, like, w, g, state, at, dim):
    return w - fill(like, params[RATE]) * g


@_for(_MOVES, Momentum)
def _momentum(tag, params, like, w, g, state, at, dim):
    m = load_as(like, state, at) * fill(like, params[BETA1]) - fill(like, params[RATE]) * g
    store_as(state, at, m)
    return w + m


@_for(_MOVES, Adagrad)
def _adagrad(tag, params, like, w, g, state, at, dim):
    a = load_as(like, state, at) + g * g
    store_as(state, at, a)
    return w - fill(like, params[RATE]) * g / root(a + fill(like, params[EPSILON]))


@_for(_MOVES, Adam)
def _adam(tag, params, like, w, g, state, at, dim):
    m, v = load_as(like, state, at), load_as(like, state, at + dim)
    m = m + (g - m) * fill(like, params[REST1])
    v = v + (g * g - v) * fill(like, params[REST2])
    store_as(state, at, m)
    store_as(state, at + dim, v)
    return w - fill(like, params[RATE]) * m / (root(v) + fill(like, params[EPSILON]))


@_for(_MOVES, AmsGrad)
def _amsgrad(tag, params, like, w, g, state, at, dim):
    m, v, most = load_as(like, state, at), load_as(like, state, at + dim), load_as(like, state, at + 2 * dim)
    m = m + (g - m) * fill(like, params[REST1])
    v = v + (g * g - v) * fill(like, params[REST2])
    most = larger(most, v)
    store_as(state, at, m)
    store_as(state, at + dim, v)
    store_as(state, at + 2 * dim, most)
    return w - fill(like, params[RATE]) * m / (root(most) + fill(like, params[EPSILON]))


@_for(_MOVES, RmsProp)
def _rmsprop(tag, params, like, w, g, state, at, dim):
    v = load_as(like, state, at) * fill(like, params[BETA2]) + g * g * fill(like, params[REST2])
    store_as(state, at, v)
    return w - fill(like, params[RATE]) * g / root(v + fill(like, params[EPSILON]))


@kernel
def _dual(params, like, w, g, state, at, dim):
    """Update n and z of FTRL. Returns z softened by L1, and what it is divided by."""
    n, z = load_as(like, state, at), load_as(like, state, at + dim)
    more = n + g * g
    before, after = root(n), root(more)
    z = z + fill(like, params[SCALE]) * g - (after - before) / fill(like, params[RATE]) * w
    store_as(state, at, more)
    store_as(state, at + dim, z)
    l1 = fill(like, params[L1])
    softened = z - larger(smaller(z, l1), like - l1)
    divisor = after / fill(like, params[RATE]) + fill(like, np.float32(2) * params[L2] + params[BETA1] / params[RATE])
    return softened, larger(divisor, fill(like, _LEAST_DIVISOR))


@_for(_MOVES, Ftrl)
def _ftrl(tag, params, like, w, g, state, at, dim):
    softened, divisor = _dual(params, like, w, g, state, at, dim)
    return like - softened / divisor


@inlined
def _lanes(tag, params, like, weights, w_at, state, s_at, grads, g_at, dim, d, key):
    w = load_as(like, weights, w_at + d)
    w = w - w * fill(like, params[DECAY])
    w = move(tag, params, like, w, load_as(like, grads, g_at + d), state, s_at + d, dim)
    _keep(params, like, weights, w_at, d, w, key)


@inlined
def _keep(params, like, weights, w_at, d, w, key):
    bound = fill(like, params[BOUND])
    store_rounded(weights, w_at + d, smaller(larger(w, like - bound), bound), key, np.uint64(d))


def _by_lanes(tag, params, weights, w_at, state, s_at, grads, g_at, dim, key):
    d = 0
    while d + 16 <= dim:
        _lanes(tag, params, lanes16(), weights, w_at, state, s_at, grads, g_at, dim, d, key)
        d += 16
    if d + 8 <= dim:
        _lanes(tag, params, lanes8(), weights, w_at, state, s_at, grads, g_at, dim, d, key)
        d += 8
    while d < dim:
        _lanes(tag, params, lane(), weights, w_at, state, s_at, grads, g_at, dim, d, key)
        d += 1


# --- row by row -------------------------------------------------------------------------------------------------------


@inlined
def square_sum(values, at, dim):
    """Sum of squares of values[at:at + dim]."""
    found = np.float32(0)
    d = 0
    while d + 16 <= dim:
        wide = load_as(lanes16(), values, at + d)
        found += total(wide * wide)
        d += 16
    while d < dim:
        one = load_as(lane(), values, at + d)
        found += one * one
        d += 1
    return found


@_for(_ROWS, RowWiseAdagrad)
def _row_wise_adagrad(tag, params, weights, w_at, state, s_at, grads, g_at, dim, key):
    a = state[s_at] + square_sum(grads, g_at, dim) / np.float32(dim)
    state[s_at] = a
    step = params[RATE] / np.float32(np.sqrt(a + params[EPSILON]))
    d = 0
    while d + 16 <= dim:
        wide = load_as(lanes16(), weights, w_at + d)
        wide = wide - wide * fill(lanes16(), params[DECAY]) - fill(lanes16(), step) * load_as(lanes16(), grads, g_at + d)
        _keep(params, lanes16(), weights, w_at, d, wide, key)
        d += 16
    while d < dim:
        one = load_as(lane(), weights, w_at + d)
        one = one - one * params[DECAY] - step * grads[g_at + d]
        _keep(params, lane(), weights, w_at, d, one, key)
        d += 1


@_for(_ROWS, GroupFtrl)
def _group_ftrl(tag, params, weights, w_at, state, s_at, grads, g_at, dim, key):
    squares = np.float32(0)
    for d in range(dim):
        # What the weight is made of takes the gradient's place until the row's norm is known.
        w = load_as(lane(), weights, w_at + d)
        softened, divisor = _dual(params, lane(), w, grads[g_at + d], state, s_at + d, dim)
        squares += softened * softened
        grads[g_at + d] = softened / divisor
    norm, limit = np.float32(np.sqrt(squares)), params[GROUP] * np.float32(np.sqrt(np.float32(dim)))
    shrink = np.float32(1) - limit / norm if norm > limit else np.float32(0)
    for d in range(dim):
        _keep(params, lane(), weights, w_at, d, -shrink * grads[g_at + d], key)


@_for(_ROWS, Lamb)
def _lamb(tag, params, weights, w_at, state, s_at, grads, g_at, dim, key):
    squares, norm = np.float32(0), np.float32(0)
    for d in range(dim):
        w, g, m, v = load_as(lane(), weights, w_at + d), grads[g_at + d], state[s_at + d], state[s_at + dim + d]
        w = w - w * params[DECAY]
        m = m + (g - m) * params[REST1]
        v = v + (g * g - v) * params[REST2]
        state[s_at + d], state[s_at + dim + d] = m, v
        step = m * params[CORRECT1] / (np.float32(np.sqrt(v * params[CORRECT2])) + params[EPSILON])
        grads[g_at + d] = step
        squares += step * step
        norm += w * w
    trust = np.float32(1)
    if norm > np.float32(0) and squares > np.float32(0):
        trust = np.float32(np.sqrt(norm)) / np.float32(np.sqrt(squares))
    for d in range(dim):
        w = load_as(lane(), weights, w_at + d)
        _keep(params, lane(), weights, w_at, d, w - w * params[DECAY] - trust * params[RATE] * grads[g_at + d], key)


# --- the gradient before it -------------------------------------------------------------------------------------------


@inlined
def is_sound(grads, at, dim):
    """Whether a gradient is free of NaN, infinity, and numbers beyond 3.4e15, whose squares would be infinite soon."""
    sound = True
    d = 0
    while d + 16 <= dim:
        sound = sound and all_finite(load_as(lanes16(), grads, at + d) * fill(lanes16(), _LARGEST))
        d += 16
    while d < dim:
        sound = sound and all_finite(load_as(lane(), grads, at + d) * _LARGEST)
        d += 1
    return sound


@kernel
def condition(params, grads, at, weights, w_at, dim):
    """Add the L2 penalty's gradient, and clip: first each element, then the row's norm."""
    for d in range(dim):
        g = grads[at + d] + params[PENALTY] * load_as(lane(), weights, w_at + d)
        if params[CLIP_VALUE] > np.float32(0):
            g = min(max(g, -params[CLIP_VALUE]), params[CLIP_VALUE])
        grads[at + d] = g
    if params[CLIP_NORM] > np.float32(0):
        norm = np.float32(np.sqrt(square_sum(grads, at, dim)))
        if norm > params[CLIP_NORM]:
            for d in range(dim):
                grads[at + d] *= params[CLIP_NORM] / norm

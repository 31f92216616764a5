"""Slow, obvious twins of a row's life: how it begins (`kernels.draw`), steps (`kernels.step`) and is rounded (`kernels.vector`).

One row at a time, in float64 and Python integers, from a slot's settings themselves: no line of parameters, no lanes. The last
section is the way to one row: a table of one slot, looked up and pushed with one sign a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32
from flowps.config import Slot
from flowps.ps.table import Bags, Table
from tests.ps.naive import GOLDEN, WORD, mix

Float64 = NDArray[np.float64]
Step = Callable[[Slot, float, int, Float64, list[Float64], Float64], tuple[Float64, list[Float64]]]
"""slot, rate, number of the push (from 1), weights [dim], parts of the state [dim or 1], gradient [dim] → weights, parts."""

FTRLS = ("ftrl", "group_ftrl", "group_adagrad")


# --- a step -----------------------------------------------------------------------------------------------------------


def step_row(slot: Slot, weights: Any, state: Any, grad: Any, push: int, rate_scale: float = 1.0) -> tuple[Float64, Float64]:
    """Weights [dim] and state [width] of a row after push number `push` (from 1) of its table."""
    weights, state, grad = (np.array(given, np.float64) for given in (weights, state, grad))
    if not np.isfinite(grad).all():
        return weights, state
    rate = slot.learning_rate * rate_scale
    parts = np.split(state, len(first_parts(slot))) if len(state) else []
    grad = condition(slot, weights, grad)
    weights, parts = STEPS[slot.optimizer](slot, rate, push, weights - rate * decay_of(slot) * weights, parts, grad)
    return bound(slot, weights), np.array(parts, np.float64).reshape(-1)


def condition(slot: Slot, weights: Float64, grad: Float64) -> Float64:
    """The gradient with the L2 penalty's, then clipped element by element, then to a norm."""
    if slot.optimizer not in FTRLS:
        grad = grad + slot.l2 * weights
    if slot.clip_value > 0:
        grad = np.clip(grad, -slot.clip_value, slot.clip_value)
    norm = math.sqrt(sum(g * g for g in grad))
    if 0 < slot.clip_norm < norm:
        grad = grad * (slot.clip_norm / norm)
    return grad


def decay_of(slot: Slot) -> float:
    """Decoupled weight decay, of which the ftrls have none."""
    if slot.optimizer in FTRLS:
        return 0.0
    return slot.weight_decay or (0.004 if slot.optimizer == "adamw" else 0.0)


def bound(slot: Slot, weights: Float64) -> Float64:
    """The weights within `weight_bound`, if there is one."""
    return np.clip(weights, -slot.weight_bound, slot.weight_bound) if slot.weight_bound > 0 else weights


def first_parts(slot: Slot) -> list[float]:
    """First value of each part of the state."""
    return {
        "sgd": [],
        "momentum": [0.0],
        "adagrad": [slot.initial_accumulator],
        "rowwise_adagrad": [slot.initial_accumulator],
        "adam": [0.0, 0.0],
        "adamw": [0.0, 0.0],
        "amsgrad": [0.0, 0.0, 0.0],
        "rmsprop": [0.0],
        "ftrl": [slot.initial_accumulator, 0.0],
        "group_ftrl": [slot.initial_accumulator, 0.0],
        "group_adagrad": [slot.initial_accumulator, 0.0],
        "lamb": [0.0, 0.0],
    }[slot.optimizer]


def first_state(slot: Slot) -> Float32:
    """The state of a new row: rowwise adagrad has one number, all others one per weight in each part."""
    width = 1 if slot.optimizer == "rowwise_adagrad" else slot.dim
    return np.array([value for value in first_parts(slot) for _ in range(width)], np.float32)


def _sgd(slot: Slot, rate: float, push: int, w: Any, state: Any, g: Any) -> Any:
    return w - rate * g, state


def _momentum(slot: Slot, rate: float, push: int, w: Any, state: Any, g: Any) -> Any:
    m = slot.momentum * state[0] - rate * g
    return w + m, [m]


def _adagrad(slot: Slot, rate: float, push: int, w: Any, state: Any, g: Any) -> Any:
    a = state[0] + g**2
    return w - rate * g / np.sqrt(a + slot.epsilon), [a]


def _rowwise_adagrad(slot: Slot, rate: float, push: int, w: Any, state: Any, g: Any) -> Any:
    a = state[0] + np.mean(g**2)
    return w - rate * g / np.sqrt(a + slot.epsilon), [a]


def _moments(slot: Slot, push: int, state: Any, g: Any) -> Any:
    """Adam's two moments, and both with their bias taken out."""
    m = slot.beta1 * state[0] + (1 - slot.beta1) * g
    v = slot.beta2 * state[1] + (1 - slot.beta2) * g**2
    return m, v, m / (1 - slot.beta1**push), v / (1 - slot.beta2**push)


def _adam(slot: Slot, rate: float, push: int, w: Any, state: Any, g: Any) -> Any:
    m, v, _, _ = _moments(slot, push, state, g)
    return w - _corrected(slot, rate, push) * m / (np.sqrt(v) + slot.epsilon), [m, v]


def _amsgrad(slot: Slot, rate: float, push: int, w: Any, state: Any, g: Any) -> Any:
    m, v, _, _ = _moments(slot, push, state, g)
    most = np.maximum(state[2], v)
    return w - _corrected(slot, rate, push) * m / (np.sqrt(most) + slot.epsilon), [m, v, most]


def _corrected(slot: Slot, rate: float, push: int) -> float:
    """The rate with both bias corrections, as at the end of section 2 of the paper and in Keras: epsilon is not corrected."""
    return rate * math.sqrt(1 - slot.beta2**push) / (1 - slot.beta1**push)


def _rmsprop(slot: Slot, rate: float, push: int, w: Any, state: Any, g: Any) -> Any:
    v = slot.rho * state[0] + (1 - slot.rho) * g**2
    return w - rate * g / np.sqrt(v + slot.epsilon), [v]


def _lamb(slot: Slot, rate: float, push: int, w: Any, state: Any, g: Any) -> Any:
    m, v, m_hat, v_hat = _moments(slot, push, state, g)
    step = m_hat / (np.sqrt(v_hat) + slot.epsilon)
    norm, length = np.linalg.norm(w), np.linalg.norm(step)
    trust = norm / length if norm > 0 and length > 0 else 1.0
    return w - rate * trust * step, [m, v]


def _dual(slot: Slot, rate: float, beta: float, w: Any, state: Any, g: Any) -> Any:
    """FTRL's n and z, z softened by L1, and each weight's divisor."""
    n = state[0] + g**2
    z = state[1] + g - (np.sqrt(n) - np.sqrt(state[0])) / rate * w
    softened = np.sign(z) * np.maximum(np.abs(z) - slot.l1, 0)
    return n, z, softened, (beta + np.sqrt(n)) / rate + 2 * slot.l2


def _ftrl(slot: Slot, rate: float, push: int, w: Any, state: Any, g: Any) -> Any:
    n, z, softened, divisor = _dual(slot, rate, slot.ftrl_beta, w, state, g)
    return -softened / divisor, [n, z]


def _group_ftrl(slot: Slot, rate: float, push: int, w: Any, state: Any, g: Any) -> Any:
    beta = 0.0 if slot.optimizer == "group_adagrad" else slot.ftrl_beta
    n, z, softened, divisor = _dual(slot, rate, beta, w, state, g)
    norm, limit = np.linalg.norm(softened), slot.l21 * math.sqrt(len(w))
    return (-(1 - limit / norm) * softened / divisor if norm > limit else np.zeros_like(w)), [n, z]


STEPS: dict[str, Step] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "adagrad": _adagrad,
    "rowwise_adagrad": _rowwise_adagrad,
    "adam": _adam,
    "adamw": _adam,
    "amsgrad": _amsgrad,
    "rmsprop": _rmsprop,
    "ftrl": _ftrl,
    "group_ftrl": _group_ftrl,
    "group_adagrad": _group_ftrl,
    "lamb": _lamb,
}


# --- a beginning ------------------------------------------------------------------------------------------------------


def first_weights(slot: Slot, sign: int, seed: int) -> Float32:
    """The first weights of a sign's row, in float32, before they are stored in anything narrower."""
    scale = np.float32(slot.init_scale / (math.sqrt(slot.dim) if slot.init_by_dim else 1))
    key = sign ^ (seed * 0x94D049BB133111EB & WORD)
    if slot.initializer == "zeros":
        return np.zeros(slot.dim, np.float32)
    if slot.initializer == "constant":
        return np.full(slot.dim, scale)
    if slot.initializer == "uniform":
        return np.array([_uniform(key, d) for d in range(slot.dim)], np.float32) * scale
    cut = 2.0 if slot.initializer == "truncated_normal" else math.inf
    return np.array([_normal(key, d, slot.dim, cut) * float(scale) for d in range(slot.dim)], np.float32)


def _word(key: int, counter: int) -> int:
    """SplitMix64 of a key at a counter."""
    return mix(key + counter * GOLDEN & WORD)


def _uniform(key: int, d: int) -> float:
    """Number d in [-1, 1): a multiple of 2^-23, two of them from each word, the lower half first."""
    half = _word(key, d // 2 + 1) >> (32 * (d % 2)) & 0xFFFFFFFF
    return (half >> 8) / 2**23 - 1


def _normal(key: int, d: int, dim: int, cut: float) -> float:
    """Box and Muller's cosine, drawn again from counters 2 * dim further until it is within the cut."""
    counter = 2 * d + 1
    while True:
        first, second = ((_word(key, counter) >> 11) + 1) / 2**53, (_word(key, counter + 1) >> 11) / 2**53
        number = math.sqrt(-2 * math.log(first)) * math.cos(2 * math.pi * second)
        if abs(number) <= cut:
            return number
        counter += 2 * dim


# --- 16 bits ----------------------------------------------------------------------------------------------------------


def bits_as_float32(storage: str, bits: Any) -> Float32:
    """What 16 bits in a storage stand for."""
    bits = np.asarray(bits, np.uint16)
    if storage == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _magnitudes(storage: str) -> Float32:
    """All finite numbers of a storage that are not negative: the number at place b is that of the bits b."""
    return bits_as_float32(storage, np.arange({"float16": 0x7C00, "bfloat16": 0x7F80}[storage]))


def neighbours(storage: str, values: Any) -> tuple[Float32, Float32]:
    """Of each value, the stored numbers next to it towards zero and away from it; both itself where it is one.

    Beyond the largest number both are that one.
    """
    values = np.asarray(values, np.float32)
    stored = _magnitudes(storage)
    at = np.searchsorted(stored, np.abs(values), side="right") - 1
    exact = stored[at] == np.abs(values)
    after = np.where(exact, at, np.minimum(at + 1, len(stored) - 1))
    return np.copysign(stored[at], values), np.copysign(stored[after], values)


def nearest(storage: str, values: Any) -> Float32:
    """The values rounded to the nearest stored number; where two are as near, to the one whose last bit is 0."""
    values = np.asarray(values, np.float32)
    lower, upper = neighbours(storage, values)
    down = np.abs(values.astype(np.float64) - lower)
    up = np.abs(upper.astype(np.float64) - values)
    even = np.searchsorted(_magnitudes(storage), np.abs(lower)) % 2 == 0
    return np.where((down < up) | ((down == up) & even), lower, upper)


# --- one sign a sample ------------------------------------------------------------------------------------------------


def table_of(*slots: Slot, capacity_rows: int = 1000, seed: int = 0) -> Table:
    """A table of these slots."""
    return Table(slots, range(len(slots)), capacity_rows, seed)


def bags_of(signs: Sequence[int] | NDArray[np.uint64]) -> Bags:
    """The bags of a table of one slot: each sample has one of the signs."""
    size = len(signs)
    column = np.zeros(1, np.int64)
    return Bags(np.array(signs, np.uint64), np.arange(size + 1, dtype=np.int32), size, column, column)


def begin(table: Table, signs: Sequence[int] | NDArray[np.uint64]) -> Float32:
    """Look the signs up, so that they have rows, and give up the push. Returns the vectors, float32 [samples, dim]."""
    out = np.full((len(signs), table.dim), np.nan, np.float32)
    touched = table.find(bags_of(signs))
    table.pool(touched, out)
    table.forget(touched)
    return out


def push(table: Table, signs: Sequence[int] | NDArray[np.uint64], grads: Any, rate_scale: float = 1.0) -> int:
    """Look the signs up and push a gradient for each sample, [samples, dim]. Returns the rows stepped."""
    out = np.empty((len(signs), table.dim), np.float32)
    touched = table.find(bags_of(signs))
    table.pool(touched, out)
    return table.push(touched, np.array(grads, np.float32).reshape(out.shape), rate_scale)


def rows_of(table: Table, signs: Sequence[int] | NDArray[np.uint64]) -> tuple[Float32, Float32]:
    """Weights [n, dim] and state [n, width] of signs that all have a row."""
    known, weights, state = table.values(np.array(signs, np.uint64))
    assert known.all()
    return weights, state

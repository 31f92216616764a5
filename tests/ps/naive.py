"""Slow, obvious twins of `flowps.ps.kernels` and of `flowps.ps.table.Table`: Python integers, dicts, one row at a time.

An index here is a dict {sign: (row, slot)}; `decode` and `encode` go between it and the kernels' array. Arithmetic on
weights is in float32 and in the kernels' documented order (a bag from left to right, gradients by first occurrence), so
that twins agree closely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32, Int32, Uint64
from flowps.config import Slot
from flowps.errors import CapacityError

Known = dict[int, tuple[int, int]]
Bags = list[list[list[int]]]

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


# --- the index --------------------------------------------------------------------------------------------------------


def shift_of(size: int) -> np.uint64:
    """What an index of `size` entries shifts a multiplied sign by: all but the upper log2(size) bits go."""
    return np.uint64(64 - (size.bit_length() - 1))


def home(sign: int, size: int) -> int:
    """The entry at which probing for a sign starts."""
    return (sign * GOLDEN & WORD) * size >> 64


def sign_at_home(position: int, size: int, low: int) -> int:
    """A sign whose probing starts at `position`; another one for every `low` < 2**64 / size."""
    return (position * ((1 << 64) // size) + low) * pow(GOLDEN, -1, 1 << 64) & WORD


def encode(known: Mapping[int, tuple[int, int]], size: int) -> Uint64:
    """The array of an index of `size` entries: each sign in turn at the first free entry from its home on."""
    assert len(known) < size
    index = np.zeros(2 * size, np.uint64)
    for sign, (row, slot) in known.items():
        p = home(sign, size)
        while index[2 * p + 1]:
            p = (p + 1) % size
        index[2 * p], index[2 * p + 1] = sign, (row + 1) | slot << 32
    return index


def decode(index: Uint64) -> Known:
    """The dict of an index's array. Fails when a sign stands in it twice."""
    known: Known = {}
    for sign, entry in index.reshape(-1, 2).tolist():
        if entry:
            assert sign not in known
            known[sign] = ((entry & 0xFFFFFFFF) - 1, entry >> 32)
    return known


# --- index.py ---------------------------------------------------------------------------------------------------------


def find(signs: Sequence[int], ranges: Sequence[tuple[int, int]], known: Known) -> list[int]:
    """Twin of `index.find`."""
    return [known.get(signs[i], (-1, 0))[0] for start, stop in ranges for i in range(start, stop)]


def find_or_create(
    signs: Sequence[int], ranges: Sequence[tuple[int, int]], slots: Sequence[int], known: Known, values: list[Float32],
    max_rows: int, dim: int, stride: int, state: float, scale: Sequence[float], seed: int,
) -> tuple[bool, list[int], list[int]]:  # fmt: skip
    """Twin of `index.find_or_create` from the beginning. `known` and `values` grow. Returns done, rows, progress."""
    rows: list[int] = []
    for k, (start, stop) in enumerate(ranges):
        for i in range(start, stop):
            if signs[i] not in known:
                if len(known) == max_rows:
                    return False, rows, [k, i - start, len(known)]
                known[signs[i]] = len(known), slots[k]
                values.append(new_row(signs[i], seed, dim, stride - dim, scale[k], state))
            rows.append(known[signs[i]][0])
    return True, rows, [len(ranges), 0, len(known)]


def new_row(sign: int, seed: int, dim: int, state_width: int, scale: float, state: float) -> Float32:
    """The first weights and state of a sign's row."""
    return np.concatenate([draw(sign, seed, dim, scale), np.full(state_width, state, np.float32)])


def draw(sign: int, seed: int, dim: int, scale: float) -> Float32:
    """SplitMix64 of the counters 1 … dim, keyed by sign and seed; its upper 24 bits make a float32 in ±scale."""
    key = sign ^ (seed * 0x94D049BB133111EB & WORD)
    weights = [(mix(key + (d + 1) * GOLDEN & WORD) >> 40) / 2**23 - 1 for d in range(dim)]
    return np.array(weights, np.float32) * np.float32(scale)


def mix(z: int) -> int:
    """SplitMix64's output function, a bijection of 64-bit words."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return z ^ (z >> 31)


# --- pool.py and update.py --------------------------------------------------------------------------------------------


def bags_of(rows: Int32, offsets: Int32, positions: NDArray[np.int64], size: int) -> list[list[Int32]]:
    """[slot][sample] → the rows of that bag."""
    lengths = np.diff(offsets).reshape(-1, size)[positions].reshape(-1)
    bags = np.split(rows, np.cumsum(lengths)[:-1])
    return [bags[k * size : (k + 1) * size] for k in range(len(positions))]


def pool_bag(rows: Sequence[int], arena: Float32, dim: int, mean: bool) -> Float32:
    """The pooled vector of one bag; `arena` is float32 [capacity, stride]."""
    total = np.zeros(dim, np.float32)
    for row in rows:
        if row >= 0:
            total += arena[row, :dim]
    return total / np.float32(len(rows)) if mean and len(rows) else total


def sum_gradients(bags: Sequence[Sequence[int]], grads: Float32, mean: bool) -> dict[int, Float32]:
    """{row: summed gradient} of one slot, in order of first occurrence; grads float32 [size, dim]."""
    sums: dict[int, Float32] = {}
    for bag, grad in zip(bags, grads, strict=True):
        for row in bag:
            share = grad / np.float32(len(bag)) if mean else grad
            sums[int(row)] = sums.get(int(row), np.zeros_like(grad)) + share
    return sums


def step_sgd(row: Float32, grad: Float32, rate: float, epsilon: float) -> None:
    """w -= rate · g."""
    row -= np.float32(rate) * grad


def step_adagrad(row: Float32, grad: Float32, rate: float, epsilon: float) -> None:
    """a += g²; w -= rate · g / √(a + epsilon)."""
    weights, squares = np.split(row, 2)
    squares += grad * grad
    weights -= np.float32(rate) * grad / np.sqrt(squares + np.float32(epsilon))


STEPS = {"sgd": step_sgd, "adagrad": step_adagrad}


# --- table.py ---------------------------------------------------------------------------------------------------------


@dataclass
class NaiveTable:
    """`Table` over bags as lists: [slot][sample] → signs. `values[row]`: weights and state, in order of creation."""

    slots: Sequence[Slot]
    slot_ids: Sequence[int]
    capacity_rows: int
    seed: int
    known: Known = field(default_factory=dict)
    values: list[Float32] = field(default_factory=list)

    def lookup(self, bags: Bags, create: bool) -> tuple[Bags, list[list[Float32]]]:
        """[slot][sample] → rows, and → pooled vector. Raises CapacityError at the first new sign that has no place."""
        if create:
            for slot, slot_id, samples in zip(self.slots, self.slot_ids, bags, strict=True):
                for sign in (sign for bag in samples for sign in bag):
                    if sign not in self.known:
                        if len(self.known) == self.capacity_rows:
                            raise CapacityError
                        self.known[sign] = len(self.known), slot_id
                        width, state = (slot.dim, slot.initial_accumulator) if slot.optimizer == "adagrad" else (0, 0.0)
                        self.values.append(new_row(sign, self.seed, slot.dim, width, slot.init_scale, state))
        rows = [[[self.known.get(sign, (-1, 0))[0] for sign in bag] for bag in samples] for samples in bags]
        dim = self.slots[0].dim
        arena = np.array([value[:dim] for value in self.values], np.float32).reshape(-1, dim)
        pooled = [
            [pool_bag(bag, arena, dim, slot.pooling == "mean") for bag in samples]
            for slot, samples in zip(self.slots, rows, strict=True)
        ]
        return rows, pooled

    def push(self, rows: Bags, grads: Sequence[Float32]) -> int:
        """Step the rows of a lookup with [slot] → float32 [size, dim]. Returns the sum of the slots' distinct rows."""
        distinct = 0
        for slot, samples, grad in zip(self.slots, rows, grads, strict=True):
            sums = sum_gradients(samples, grad, slot.pooling == "mean")
            for row, total in sums.items():
                STEPS[slot.optimizer](self.values[row], total, slot.learning_rate, slot.epsilon)
            distinct += len(sums)
        return distinct

"""Slow, obvious twins of `flowps.ps.kernels` and of `flowps.ps.table.Table`: Python integers, dicts, one row at a time.

Arithmetic on weights is in float32 and in the kernels' documented order (a bag from left to right, gradients in the order of the
batch), so that twins agree closely. The optimizers' twins are in `twins`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flowps.batch import Float32
from flowps.config import Slot
from flowps.ps import optimizer
from flowps.ps.table import initial_scale

Bags = list[list[list[int]]]

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


# --- signs ------------------------------------------------------------------------------------------------------------


def home(sign: int, size: int) -> int:
    """The entry at which probing for a sign starts, in an index of one stripe."""
    return (sign * GOLDEN & WORD) * size >> 64


def sign_at_home(position: int, size: int, low: int) -> int:
    """A sign whose probing starts at `position`; another one for every `low` < 2**64 / size."""
    return (position * ((1 << 64) // size) + low) * pow(GOLDEN, -1, 1 << 64) & WORD


def mix(z: int) -> int:
    """SplitMix64's output function, a bijection of 64-bit words."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return z ^ (z >> 31)


def draw(sign: int, seed: int, dim: int, scale: float) -> Float32:
    """Uniform first weights: two to each SplitMix64 word of the counters 1, 2, …, keyed by sign and seed; lower half first."""
    key = sign ^ (seed * 0x94D049BB133111EB & WORD)
    words = [mix(key + (d // 2 + 1) * GOLDEN & WORD) >> 32 * (d % 2) & 0xFFFFFFFF for d in range(dim)]
    return np.array([(word >> 8) / 2**23 - 1 for word in words], np.float32) * np.float32(scale)


# --- bags -------------------------------------------------------------------------------------------------------------


def pool_bag(
    rows: Sequence[Float32], slot: Slot, shares: Sequence[float] | None = None
) -> Float32:  # fmt: skip
    """The pooled vector of one bag's rows (weights; zeros for a sign without a row), each with its share."""
    if slot.pooling == "none":
        out = np.zeros((slot.max_len, slot.dim), np.float32)
        for place, row in enumerate(rows[: slot.max_len]):
            out[place] = row * np.float32(1 if shares is None else shares[place])
        return out.reshape(-1)
    total = np.zeros(slot.dim, np.float32)
    for place, row in enumerate(rows):
        total += row * np.float32(1 if shares is None else shares[place])
    return total * np.float32(divisor(slot, len(rows), shares))


def divisor(slot: Slot, count: int, shares: Sequence[float] | None = None) -> float:
    """What a bag's sum is multiplied by."""
    if not count or slot.pooling in ("sum", "none"):
        return 1.0
    weights = np.ones(count) if shares is None else np.array(shares, np.float64)
    by = weights.sum() if slot.pooling == "mean" else np.sqrt((weights**2).sum())
    return 0.0 if by == 0 else 1 / by


def sum_gradients(
    bags: Sequence[Sequence[int]], slot: Slot, grads: Float32, shares: Sequence[Sequence[float]] | None = None
) -> dict[int, Float32]:  # fmt: skip
    """{sign: summed gradient} of one slot; grads float32 [size, slot.width]."""
    sums: dict[int, Float32] = {}
    for b, bag in enumerate(bags):
        scale = divisor(slot, len(bag), None if shares is None else shares[b])
        for place, sign in enumerate(bag):
            if slot.pooling == "none":
                sums.setdefault(sign, np.zeros(slot.dim, np.float32))
                if place >= slot.max_len:
                    continue
            at = place * slot.dim if slot.pooling == "none" else 0
            share = np.float32(scale * (1 if shares is None else shares[b][place]))
            sums[sign] = sums.get(sign, np.zeros(slot.dim, np.float32)) + share * grads[b, at : at + slot.dim]
    return sums


# --- split.py ---------------------------------------------------------------------------------------------------------


def part_of(sign: int, parts: int) -> int:
    """Which of `parts` ranges has a sign, by its upper half."""
    return (sign >> 32) * parts >> 32


def weights_of(pooling: str, count: int, shares: Sequence[np.float32] | None = None) -> list[np.float32]:
    """The weight of every sign of a bag in the plain sum that is its pooled vector, float32 as the kernels."""
    given = [np.float32(1)] * count if shares is None else list(shares)
    if pooling == "sum":
        return given
    total = np.float32(0)
    for share in given:
        total += share if pooling == "mean" else share * share
    by = total if pooling == "mean" else np.sqrt(total)
    return [np.float32(0 if by == 0 else np.float32(1) / by) * share for share in given]


def split(
    bags: Sequence[Sequence[int]], parts: int, pooling: str, shares: Sequence[Sequence[np.float32]] | None = None
) -> list[list[list[tuple[int, np.float32]]]]:  # fmt: skip
    """[part][sample] → (sign, weight), of one slot's bags."""
    found: list[list[list[tuple[int, np.float32]]]] = [[[] for _ in bags] for _ in range(parts)]
    for b, bag in enumerate(bags):
        weights = weights_of(pooling, len(bag), None if shares is None else shares[b])
        for sign, weight in zip(bag, weights, strict=True):
            found[part_of(sign, parts)][b].append((sign, weight))
    return found


# --- carry.py ---------------------------------------------------------------------------------------------------------

PAD = 1024
Entries = list[tuple[int, int]]
"""(sign, row + 1 | stamp << 31), (_, 0) where there is none."""


def home_in(sign: int, bits: int, size: int) -> int:
    """The entry at which probing for a sign starts, in an index of 2^bits stripes of `size` entries and their pads."""
    mixed = (sign * GOLDEN & WORD) >> 32
    return (mixed * (size << bits) >> 32) + stripe_in(sign, bits) * PAD


def stripe_in(sign: int, bits: int) -> int:
    """The stripe of a sign."""
    return (sign * GOLDEN & WORD) >> (64 - bits)


def listed(index: Entries) -> Entries:
    """Those that are not empty."""
    return [(sign, word) for sign, word in index if word]


def entered(entries: Entries, bits: int, size: int) -> Entries:
    """An index with these entries, one after the other, each at the first place from its home on that is empty."""
    index = [(0, 0)] * ((size + PAD) << bits)
    for sign, word in entries:
        p = home_in(sign, bits, size)
        while index[p][1]:
            p += 1
        index[p] = sign, word
    return index


def grouped(slots: Sequence[int], chosen: Sequence[bool], num_slots: int) -> list[list[int]]:
    """[slot] → the places of the chosen ones."""
    return [[i for i, slot in enumerate(slots) if slot == s and chosen[i]] for s in range(num_slots)]


# --- table.py ---------------------------------------------------------------------------------------------------------


def new_row(slot: Slot, sign: int, seed: int) -> Float32:
    """First weights and state of a sign's row."""
    state = optimizer.of_slot(slot).first_state(slot.dim)
    return np.concatenate([draw(sign, seed, slot.dim, initial_scale(slot)), state])


def step(row: Float32, grad: Float32, slot: Slot, scale: float = 1.0) -> None:
    """One step of a row, in place: sgd and adagrad."""
    rate = np.float32(slot.learning_rate * scale)
    if slot.optimizer == "sgd":
        row[: slot.dim] -= rate * grad
        return
    assert slot.optimizer == "adagrad"
    weights, squares = np.split(row, 2)
    squares += grad * grad
    weights -= rate * grad / np.sqrt(squares + np.float32(slot.epsilon))


@dataclass
class NaiveTable:
    """A table without a bound, over bags as lists: [slot][sample] → signs. `rows[sign]`: weights and state."""

    slots: Sequence[Slot]
    seed: int
    rows: dict[int, Float32] = field(default_factory=dict)

    def new(self, slot: Slot, sign: int) -> Float32:
        """What a row of a sign begins as."""
        return new_row(slot, sign, self.seed)

    def create(self, bags: Bags) -> None:
        """Give every sign a row."""
        for slot, samples in zip(self.slots, bags, strict=True):
            for sign in (sign for bag in samples for sign in bag):
                if sign not in self.rows:
                    self.rows[sign] = self.new(slot, sign)

    def pooled(self, bags: Bags) -> list[list[Float32]]:
        """[slot][sample] → pooled vector."""
        return [
            [pool_bag([self.weights(sign, slot) for sign in bag], slot) for bag in samples]
            for slot, samples in zip(self.slots, bags, strict=True)
        ]

    def weights(self, sign: int, slot: Slot) -> Float32:
        """A sign's weights, zeros where it has no row."""
        row = self.rows.get(sign)
        return np.zeros(slot.dim, np.float32) if row is None else row[: slot.dim]

    def push(self, bags: Bags, grads: Sequence[Float32]) -> int:
        """Step the rows of a lookup with [slot] → float32 [size, slot.width]. Returns the sum of the slots' distinct rows."""
        distinct = 0
        for slot, samples, grad in zip(self.slots, bags, grads, strict=True):
            sums = sum_gradients(samples, slot, grad)
            for sign, total in sums.items():
                step(self.rows[sign], total, slot)
            distinct += len(sums)
        return distinct


def same(ours: Mapping[int, Float32], theirs: Mapping[int, Float32]) -> None:
    """Assert that two tables hold the same rows, but for rounding."""
    assert ours.keys() == theirs.keys()
    for sign, row in ours.items():
        np.testing.assert_allclose(row, theirs[sign], rtol=1e-4, atol=1e-4)

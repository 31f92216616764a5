"""Batches of signs in the shapes that the table is measured with: `dsp_ctr`, `criteo` and `uniform`, without files or labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowps.synthetic import criteo, dsp_ctr

NAMES = ("dsp_ctr", "criteo", "uniform")
_UNIFORM_SLOTS, _UNIFORM_SIZE = 26, 4096


@dataclass(frozen=True)
class SignBatch:
    """Signs uint64 [nnz], slot-major, and offsets int32 [num_slots * size + 1], as in `flowps.batch.Batch`."""

    signs: NDArray[np.uint64]
    offsets: NDArray[np.int32]


@dataclass(frozen=True)
class Shape:
    """`size` samples a batch; of each slot how many values there are and how many a sample has, at least one, on average."""

    size: int
    cardinalities: tuple[int, ...]
    mean_signs: tuple[float, ...]
    zipf_exponent: float

    @property
    def num_slots(self) -> int:
        """Slots of a batch."""
        return len(self.cardinalities)


def shape_of(name: str, rows: int) -> Shape:
    """The shape of a workload; `uniform` draws from `rows` values, the others from what their data sets have."""
    if name == "uniform":
        return Shape(_UNIFORM_SIZE, (rows // _UNIFORM_SLOTS,) * _UNIFORM_SLOTS, (1.0,) * _UNIFORM_SLOTS, 0.0)
    described, size = {"dsp_ctr": (dsp_ctr(), 1024), "criteo": (criteo(), 4096)}[name]
    return Shape(
        size,
        tuple(slot.cardinality for slot in described.slots),
        tuple(slot.mean_signs for slot in described.slots),
        described.zipf_exponent,
    )


def draw(shape: Shape, seed: int = 0) -> Iterator[SignBatch]:
    """Batches of a shape, one after the other, for ever."""
    random = np.random.default_rng(seed)
    thresholds = {n: _thresholds(n, shape.zipf_exponent) for n in set(shape.cardinalities)}
    while True:
        lengths = np.array([1 + random.poisson(mean - 1, shape.size) for mean in shape.mean_signs])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        signs = [
            sign(slot, _ranks(random, n, thresholds[n], int(of_slot.sum())))
            for slot, (n, of_slot) in enumerate(zip(shape.cardinalities, lengths, strict=True))
        ]
        yield SignBatch(np.concatenate(signs), offsets)


def every_sign(shape: Shape, at_a_time: int = 1 << 16) -> Iterator[SignBatch]:
    """All signs of a shape, in batches of one sample."""
    for slot, n in enumerate(shape.cardinalities):
        for first in range(0, n, at_a_time):
            signs = sign(slot, np.arange(first, min(n, first + at_a_time)))
            counts = np.zeros(shape.num_slots, np.int64)
            counts[slot] = len(signs)
            yield SignBatch(signs, np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def sign(slot: int, ranks: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A 64-bit hash of (slot, rank): SplitMix64's output function."""
    z = (np.uint64(slot) << np.uint64(32) | ranks.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _thresholds(cardinality: int, exponent: float) -> NDArray[np.float64] | None:
    if exponent == 0:
        return None
    share = np.arange(1, cardinality + 1) ** -exponent
    return np.cumsum(share / share.sum())[:-1]


def _ranks(
    random: np.random.Generator, cardinality: int, thresholds: NDArray[np.float64] | None, count: int
) -> NDArray[np.int64]:  # fmt: skip
    if thresholds is None:
        return random.integers(0, cardinality, count)
    return np.searchsorted(thresholds, random.random(count))

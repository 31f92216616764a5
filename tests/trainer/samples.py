"""Small batches and specs for the trainer's tests."""

from __future__ import annotations

import numpy as np

from flowps.batch import Batch


def make_batch(size: int = 2, num_slots: int = 1, dense_width: int = 1, value: float = 0.0, seed: int = 0) -> Batch:
    """A batch of single-valued slots whose dense columns are all `value`."""
    rng = np.random.default_rng(seed)
    return Batch(
        labels=rng.integers(0, 2, size).astype(np.float32),
        dense=np.full((size, dense_width), value, np.float32),
        signs=rng.integers(0, 50, num_slots * size).astype(np.uint64),
        offsets=np.arange(num_slots * size + 1, dtype=np.int32),
    )


def make_bags(bags: list[list[list[int]]], labels: list[float], dense: np.ndarray) -> Batch:
    """A batch of `bags[slot][sample]`, each a list of signs."""
    flat = [bag for slot in bags for bag in slot]
    offsets = np.zeros(len(flat) + 1, np.int32)
    np.cumsum([len(bag) for bag in flat], out=offsets[1:])
    signs = np.array([sign for bag in flat for sign in bag], np.uint64)
    return Batch(np.array(labels, np.float32), dense.astype(np.float32), signs, offsets)

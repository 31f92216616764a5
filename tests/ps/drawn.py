"""What the tests of the parameter server draw from, and the layout they put it in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from msgspec import structs
from numpy.typing import NDArray

from flowps.batch import Batch
from flowps.config import Slot
from flowps.ps.placement import Piece, Placement
from tests.ps import naive

bounded = partial(settings, deadline=None, database=None)  # JIT compiling is slow, and a test leaves nothing behind

EDGES = (0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
# The upper 20 bits of these are ones after multiplying: in any index of up to 2**20 entries they all want the last one.
LAST_HOME = tuple(naive.sign_at_home(2**20 - 1, 2**20, low) for low in range(8))

signs = st.one_of(st.sampled_from(EDGES), st.sampled_from(LAST_HOME), st.integers(0, naive.WORD))
seeds = st.one_of(st.sampled_from((0, 2**63 - 1)), st.integers(0, 2**63 - 1))  # of rows: the range of config.seed
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)  # for numbers whose values do not matter one by one
dims = st.integers(1, 40)  # 16-wide once and twice, 8-wide, scalar tails, and all of them together

Bags = list[list[list[int]]]
"""[slot][sample] → signs."""


def bags(num_slots: int, size: int, of: st.SearchStrategy[int], most: int = 4) -> st.SearchStrategy[Bags]:
    """Bags of up to `most` signs drawn from `of`, empty ones included."""
    bag = st.lists(of, max_size=most)
    samples = st.lists(bag, min_size=size, max_size=size)
    return st.lists(samples, min_size=num_slots, max_size=num_slots)


def arrays(of: Bags) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Signs and offsets, as in Batch, of bags."""
    flat = [bag for samples in of for bag in samples]
    offsets = np.zeros(len(flat) + 1, np.int32)
    np.cumsum([len(bag) for bag in flat], out=offsets[1:])
    return np.array([sign for bag in flat for sign in bag], np.uint64), offsets


def batch(of: Bags) -> Batch:
    """A batch with these bags and no dense columns."""
    size = len(of[0])
    return Batch(np.zeros(size, np.float32), np.empty((size, 0), np.float32), *arrays(of))


def weighted(of: Bags, random: np.random.Generator) -> Batch:
    """A batch with these bags, each sign with a share of its own, now and then 0."""
    plain = batch(of)
    shares = random.choice([0.0, 0.25, 0.5, 1.0, 2.0, 3.0], len(plain.signs), p=[0.1, 0.18, 0.18, 0.18, 0.18, 0.18])
    return replace(plain, shares=shares.astype(np.float32))


def random_bags(random: np.random.Generator, num_slots: int, size: int, values: int, most: int = 5) -> Bags:
    """Bags of 0 to `most` signs; each slot has `values` different ones, and no two slots share any, as if hashed."""

    def bag(s: int) -> list[int]:
        return [naive.mix((s << 32) + int(v)) for v in random.integers(0, values, random.integers(0, most + 1))]

    return [[bag(s) for _ in range(size)] for s in range(num_slots)]


def slot(name: str, **settings: Any) -> Slot:
    """Settings of a slot: weights wide enough to matter, the rest as by default."""
    return Slot(name=name, **{"init_scale": 0.5, "dim": 8, **settings})


def any_placement(random: np.random.Generator, slots: Sequence[Slot], num_shards: int) -> Placement:
    """Slots and parts of slots anywhere, as long as no shard has two parts of one and those with pooling none are whole."""
    shards: list[list[Piece]] = [[] for _ in range(num_shards)]
    for s, slot in enumerate(slots):
        parts = 1 if slot.pooling == "none" else int(random.integers(1, num_shards + 1))
        for part, k in enumerate(random.permutation(num_shards)[:parts]):
            shards[k].append(Piece(s, part, parts))
    columns = np.cumsum([0, *(slot.width for slot in slots)]).tolist()
    return Placement(tuple(tuple(sorted(shard)) for shard in shards), tuple(columns[:-1]), columns[-1])


def piece_slots(pieces: Sequence[Piece], slots: Sequence[Slot]) -> list[Slot]:
    """A shard's slots: a part's sum is added to that of the others."""
    return [slots[p.slot] if p.parts == 1 else structs.replace(slots[p.slot], pooling="sum") for p in pieces]

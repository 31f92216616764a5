"""The slow and obvious twin of `hub.hashing`, `hub.decode` and `Batch.concat`.

Plain Python, one value at a time, over `to_pylist` and the xxhash package. Knows the published rule, nothing of Arrow's
buffers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from flowps.batch import Batch
from flowps.config import Slot
from flowps.hub.decode import Dense
from flowps.hub.schema import Schema


@dataclass(frozen=True)
class Sample:
    """One row: its label, its dense numbers, and one bag of signs per slot; `shares` of the signs if any slot has weights."""

    label: float
    dense: tuple[float, ...]
    bags: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...] | None = None


def seed(slot_name: str) -> int:
    """The seed of a slot's signs."""
    return xxhash.xxh64_intdigest(slot_name.encode("utf-8"), seed=0)


def sign(value: str | int | bool, slot_name: str, hash_size: int = 0) -> int:
    """The sign of one value."""
    data = value.encode("utf-8") if isinstance(value, str) else (int(value) % 2**64).to_bytes(8, "little")
    found = xxhash.xxh64_intdigest(data, seed=seed(slot_name))
    if hash_size:
        found = xxhash.xxh64_intdigest((found % hash_size).to_bytes(8, "little"), seed=seed(slot_name))
    return found


def bag(value: Any, slot: Slot) -> tuple[int, ...]:
    """The signs of one cell: none for null, one for a value, one for each value of a list."""
    values = value if isinstance(value, list) else [value]
    return tuple(sign(v, slot.name, slot.hash_size) for v in values if v is not None)


def shares(value: Any, weight: Any, slot: Slot) -> tuple[float, ...]:
    """The shares of the signs of one cell: the weights of its values, but for those that are null; without weights 1 each."""
    if not slot.weights:
        return (1.0,) * len(bag(value, slot))
    if isinstance(value, list) or isinstance(weight, list):
        pairs = list(zip(value or [], weight or [], strict=True))
    else:
        pairs = [(value, weight)]
    return tuple(float(np.float32(w)) for v, w in pairs if v is not None)


def number(value: Any, how: Dense) -> float:
    """One cell of a dense column."""
    x = how.fill if value is None else float(value)
    return math.copysign(math.log1p(abs(x)), x) if how.log1p else x


def samples(table: pa.Table, schema: Schema, how: Dense) -> list[Sample]:
    """Every row of `table`."""
    cells = {name: table.column(name).to_pylist() for name in schema.columns}
    cells[""] = [None] * table.num_rows  # the weights of a slot without
    weighted = any(slot.weights for slot in schema.slots)
    return [
        Sample(
            label=float(cells[schema.label][row]),
            dense=tuple(number(cells[name][row], how) for name in schema.dense),
            bags=tuple(bag(cells[slot.name][row], slot) for slot in schema.slots),
            shares=tuple(shares(cells[slot.name][row], cells[slot.weights][row], slot) for slot in schema.slots)
            if weighted
            else None,
        )
        for row in range(table.num_rows)
    ]


def batch(rows: Sequence[Sample]) -> Batch:
    """The batch of at least one row: bags laid out slot by slot, sample by sample. If any row has shares, those of others are 1."""
    signs: list[int] = []
    of_signs: list[float] = []
    offsets = [0]
    for s in range(len(rows[0].bags)):
        for row in rows:
            signs += row.bags[s]
            of_signs += row.shares[s] if row.shares is not None else [1.0] * len(row.bags[s])
            offsets.append(len(signs))
    dense = np.array([row.dense for row in rows], np.float64).astype(np.float32)
    return Batch(
        labels=np.array([row.label for row in rows], np.float32),
        dense=dense.reshape(len(rows), len(rows[0].dense)),
        signs=np.array(signs, np.uint64),
        offsets=np.array(offsets, np.int32),
        shares=np.array(of_signs, np.float32) if any(row.shares is not None for row in rows) else None,
    )


def rows_of(found: Batch) -> list[Sample]:
    """A batch, back as rows."""
    k = [[s * found.size + b for s in range(found.num_slots)] for b in range(found.size)]

    def bags(values: NDArray[Any], b: int) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(values[found.offsets[i] : found.offsets[i + 1]].tolist()) for i in k[b])

    return [
        Sample(
            label=float(found.labels[b]),
            dense=tuple(float(x) for x in found.dense[b]),
            bags=bags(found.signs, b),
            shares=None if found.shares is None else bags(found.shares, b),
        )
        for b in range(found.size)
    ]


def concat(pieces: Sequence[Batch]) -> Batch:
    """The pieces' rows, one after the other, in one batch."""
    return batch([row for piece in pieces for row in rows_of(piece)])


def assert_same(ours: Batch, expected: Batch) -> None:
    """Same shapes, dtypes, labels, signs, shares and offsets; dense numbers at most one float32 step apart (for log1p)."""
    dtypes = {"labels": np.float32, "dense": np.float32, "signs": np.uint64, "offsets": np.int32, "shares": np.float32}
    for name, dtype in dtypes.items():
        found, wanted = getattr(ours, name), getattr(expected, name)
        if wanted is None:
            assert found is None, name
            continue
        assert found.dtype == dtype, name
        assert found.shape == wanted.shape, name
        if name == "dense":
            np.testing.assert_array_max_ulp(found, wanted, maxulp=1)
        else:
            np.testing.assert_array_equal(found, wanted, err_msg=name)

"""An Arrow table → batches: columns checked and converted whole, then cut into batches in the (shuffled) order of rows.

Covers labels, dense columns, slots of every supported type and their weights, and nulls. Does not read files and keeps no state;
runs inside a hub task, on one thread, mostly without the GIL. No Python runs per row or per value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flowps.batch import Batch, Float32, Uint64, offsets_of
from flowps.config import Slot
from flowps.errors import DataError
from flowps.hub.hashing import (
    bag_lengths,
    hash_strings,
    hash_words,
    place_bags,
    place_singles,
    slot_seed,
)
from flowps.hub.schema import Schema

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bags:
    """The values of one slot in storage order: row r has `values[starts[r]:starts[r + 1]]`, or just `values[r]` if starts is None.

    values    uint64: words of integers that `hashing`, a seed and a hash_size, makes signs of; signs where that is None
    shares    the weight of each value, if the slot has weights
    """

    values: Uint64
    hashing: tuple[np.uint64, np.uint64] | None
    starts: Int64 | None = None
    shares: Float32 | None = None

    @property
    def signs(self) -> Uint64:
        """The signs of the values."""
        if self.hashing is None:
            return self.values
        signs = np.empty(len(self.values), np.uint64)
        hash_words(self.values, *self.hashing, signs)
        return signs

    def place(self, order: Int64, bounds: Int64, bases: Int64, ends: Int64, signs: Uint64, shares: Float32 | None) -> None:
        """Write signs and shares of rows `order[bounds[k]:bounds[k + 1]]` from `bases[k]` to `ends[k]`, for each batch k."""
        # Integers are hashed only now: the signs of one slot are still in the cache when they are placed.
        for values, out in ((self.signs, signs), (self.shares, shares)):
            if values is None or out is None:
                continue
            if self.starts is None:
                place_singles(values, order, bounds, bases, out)
            else:
                place_bags(values, self.starts, order, bounds, bases, ends, out)


@dataclass(frozen=True, slots=True)
class Columns:
    """A decoded partition, in storage order: labels and weights as in `Batch`, dense [n, dense_width], one Bags per slot."""

    labels: Float32
    dense: Float32
    slots: tuple[Bags, ...]
    weights: Float32 | None = None


@dataclass(frozen=True, slots=True)
class Dense:
    """How dense columns become numbers: nulls become `fill`, then sign(x)·ln(1 + |x|) is taken if `log1p`."""

    fill: float = 0.0
    log1p: bool = False


def decode(table: pa.Table, schema: Schema, dense: Dense, where: str, first_row: int = 0, labelled: bool = True) -> Columns:
    """Check and convert the columns of `table`. Errors name `where` (the file) and the row, counted from `first_row`.

    labelled   whether `table` has labels and the weights of samples; without them all labels are 0

    Raises DataError for a label that is null or neither 0 nor 1, for NaN or infinity in a dense column, for a sample's weight that
    is no finite number from 0, and for weights of values that are null, NaN, infinite, or not as many as the values.
    """
    place = _Place(where, first_row)
    labels = [_labels(_whole(table, name), name, place) for name in schema.labels] if labelled else []
    return Columns(
        labels=labels[0] if len(labels) == 1 else np.stack(labels, 1) if labels else np.zeros(table.num_rows, np.float32),
        dense=_dense(table, schema.dense, dense, place),
        slots=tuple(_bags(table, slot, place) for slot in schema.slots),
        weights=_sample_weights(_whole(table, schema.sample_weight), schema.sample_weight, place)
        if schema.sample_weight and labelled
        else None,
    )


def cut(columns: Columns, order: Int64 | None, bounds: Sequence[int]) -> list[Batch]:
    """Batches of the rows `order[bounds[i]:bounds[i + 1]]` (storage order if None). `order` and `bounds` cover all rows.

    Slot by slot through all batches, so that one slot's signs stay in the cache. The batches are views of arrays that they share.
    They have shares if any slot has; those of the others are 1.
    """
    if order is None:
        order = np.arange(len(columns.labels), dtype=np.int64)
    ranges = list(pairwise(bounds))
    lengths = np.ones((len(columns.slots), len(order)), np.int32)
    for s, bags in enumerate(columns.slots):
        if bags.starts is not None:
            bag_lengths(bags.starts, order, lengths[s])
    offsets = [offsets_of(lengths[:, lo:hi]) for lo, hi in ranges]
    first = np.cumsum([0, *(of_batch[-1] for of_batch in offsets)])
    signs = np.empty(first[-1], np.uint64)
    shares = np.ones(first[-1], np.float32) if any(bags.shares is not None for bags in columns.slots) else None
    edges = np.array(bounds, np.int64)
    # Where the signs of each slot begin in each batch, and the last ones end: [batch, slots + 1].
    slots = np.arange(len(columns.slots) + 1)
    at = first[:-1, None] + [of_batch[slots * (hi - lo)] for of_batch, (lo, hi) in zip(offsets, ranges, strict=True)]
    for s, bags in enumerate(columns.slots):
        bags.place(order, edges, at[:, s].copy(), at[:, s + 1].copy(), signs, shares)
    labels, dense = columns.labels[order], columns.dense[order]
    weights = None if columns.weights is None else columns.weights[order]
    return [
        Batch(labels[lo:hi], dense[lo:hi], signs[a:b], offsets[k], None if shares is None else shares[a:b],
              None if weights is None else weights[lo:hi])
        for k, ((lo, hi), (a, b)) in enumerate(zip(ranges, pairwise(first), strict=True))
    ]  # fmt: skip


# --- columns --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a bad value stands, for messages."""

    where: str
    first_row: int

    def refuse(
        self, column: str, bad: NDArray[np.bool_], values: NDArray[Any] | str, expected: str, or_else: str = ""
    ) -> DataError:
        """The error for the rows that are `bad`; `values` has what was found in each row, or says it of the first bad one."""
        row = int(np.argmax(bad))
        found = values if isinstance(values, str) else repr(values[row].item())
        return DataError(
            f"{self.where}: column {column!r}, row {self.first_row + row}: found {found}, expected {expected} "
            f"({int(bad.sum())} such rows in this partition); clean the data{or_else}"
        )


def _whole(table: pa.Table, name: str) -> pa.Array:
    """The column as one array (copies only if it came in several chunks)."""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _nulls(column: pa.Array) -> NDArray[np.bool_]:
    return column.is_null().to_numpy(zero_copy_only=False)


def _labels(column: pa.Array, name: str, place: _Place) -> Float32:
    if column.null_count:
        raise place.refuse(name, _nulls(column), "null", "0 or 1")
    values = column.to_numpy(zero_copy_only=False)
    bad = (values != 0) & (values != 1)
    if bad.any():
        raise place.refuse(name, bad, values, "a label of 0 or 1")
    return values.astype(np.float32)


def _sample_weights(column: pa.Array, name: str, place: _Place) -> Float32:
    values = _floats(column, math.nan)
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        found = column[int(np.argmax(bad))].as_py()
        raise place.refuse(name, bad, "null" if found is None else repr(found), "the weight of a sample, a finite number from 0")
    return values


def _dense(table: pa.Table, names: Sequence[str], how: Dense, place: _Place) -> Float32:
    out = np.empty((table.num_rows, len(names)), np.float32)
    for i, name in enumerate(names):
        column = _whole(table, name)
        values = _floats(column, how.fill)
        bad = ~np.isfinite(values)
        if bad.any():
            found = column.to_numpy(zero_copy_only=False)
            raise place.refuse(name, bad, found, "a finite float32 number or null", " or leave the column out")
        out[:, i] = np.copysign(np.log1p(np.abs(values)), values) if how.log1p else values
    return out


def _floats(column: pa.Array, fill: float) -> Float32:
    """Numbers of any type as float32. A double beyond float32 becomes infinite here, and is refused with the others."""
    return column.cast(pa.float32(), safe=False).fill_null(fill).to_numpy(zero_copy_only=False)


def _bags(table: pa.Table, slot: Slot, place: _Place) -> Bags:
    """Signs of a slot column, and their shares; nulls, null lists and nulls inside lists give no sign."""
    values, starts = _flat(_whole(table, slot.name))
    values = _null_by_index(values)
    shares = _shares(_whole(table, slot.weights), slot, values, starts, place) if slot.weights else None
    if values.null_count:
        starts = _ranks(values) if starts is None else _ranks(values)[starts]
        values = values.drop_null()
    bags = Bags(*_words(values, slot), starts, shares)
    return _shortened(bags, slot.max_len) if slot.pooling == "none" else bags


def _shortened(bags: Bags, most: int) -> Bags:
    """The first `most` signs of each row: what a sequence is not read to gets no row either."""
    if bags.starts is None or (lengths := np.diff(bags.starts)).max(initial=0) <= most:
        return bags
    kept = np.arange(bags.starts[-1]) - np.repeat(bags.starts[:-1], lengths) < most
    starts = np.concatenate([[0], np.cumsum(np.minimum(lengths, most))])
    return Bags(bags.values[kept], bags.hashing, starts, None if bags.shares is None else bags.shares[kept])


def _flat(column: pa.Array) -> tuple[pa.Array, Int64 | None]:
    """The values of all rows, and where those of each row start, int64 [n + 1]; None where each row is one value."""
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        starts = np.zeros(len(column) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        return column.flatten(), starts  # leaves out what null lists may hide
    return column, None


def _shares(column: pa.Array, slot: Slot, values: pa.Array, starts: Int64 | None, place: _Place) -> Float32:
    """The weights of the slot's `values` that are not null; of the others they may be anything."""
    weights, starts_of_weights = _flat(column)
    if starts is not None and starts_of_weights is not None:
        lengths, expected = np.diff(starts_of_weights), np.diff(starts)
        bad = lengths != expected
        if bad.any():
            row = int(np.argmax(bad))
            found = f"a list of {lengths[row]}" if column[row].is_valid else "null"
            wanted = f"a list of {expected[row]}: one weight for each value of slot {slot.name!r}"
            raise place.refuse(slot.weights, bad, found, wanted)
    shares = _floats(weights, math.nan)
    used = values.is_valid().to_numpy(zero_copy_only=False)
    bad = used & ~np.isfinite(shares)
    if bad.any():
        at = np.flatnonzero(bad)
        bad_rows = np.zeros(len(column), bool)
        bad_rows[at if starts is None else np.searchsorted(starts, at, side="right") - 1] = True
        found = weights[int(at[0])].as_py()
        wanted = f"a finite float32 number, the weight of a value of slot {slot.name!r}"
        raise place.refuse(slot.weights, bad_rows, "null" if found is None else repr(found), wanted)
    return shares[used]


def _null_by_index(values: pa.Array) -> pa.Array:
    """Rows that use a null entry of a dictionary, as rows whose index is null: `null_count` and `drop_null` see only those."""
    if not pa.types.is_dictionary(values.type) or not values.dictionary.null_count:
        return values
    return pa.DictionaryArray.from_arrays(pc.if_else(values.is_valid(), values.indices, None), values.dictionary)


def _ranks(values: pa.Array) -> Int64:
    """For each place 0 … n the number of values before it that are not null."""
    ranks = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values.is_valid().to_numpy(zero_copy_only=False), out=ranks[1:])
    return ranks


def _words(values: pa.Array, slot: Slot) -> tuple[Uint64, tuple[np.uint64, np.uint64] | None]:
    """Values and hashing of `Bags`, of flat values without nulls. Integers are hashed where they are placed, others here."""
    hashing = slot_seed(slot.name), np.uint64(slot.hash_size)
    if pa.types.is_dictionary(values.type):
        # A dictionary may hold nulls that no index uses: they hash as anything.
        of_entry = Bags(*_words(values.dictionary.fill_null(_zero(values.type.value_type)), slot)).signs
        indices = values.indices.to_numpy(zero_copy_only=False)
        return of_entry[indices] if len(indices) else np.empty(0, np.uint64), None
    if not pa.types.is_string(values.type) and not pa.types.is_large_string(values.type):
        words = values if pa.types.is_uint64(values.type) else values.cast(pa.int64())
        return words.to_numpy().view(np.uint64), hashing
    signs = np.empty(len(values), np.uint64)
    width = np.int64 if pa.types.is_large_string(values.type) else np.int32
    _, offsets, data = values.buffers()
    starts = np.frombuffer(offsets, width, len(values) + 1, values.offset * width().itemsize) if len(values) else np.zeros(1, width)
    text = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    hash_strings(text, starts.astype(np.int64), *hashing, signs)
    return signs, None


def _zero(found: pa.DataType) -> pa.Scalar:
    text = pa.types.is_string(found) or pa.types.is_large_string(found)
    return pa.scalar("" if text else (False if pa.types.is_boolean(found) else 0), found)

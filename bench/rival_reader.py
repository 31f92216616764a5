"""What `bench.rival` trains on: Parquet files as batches of row numbers in one table that all slots share.

Every slot has the same number of buckets, and after them one row for nulls; slot k has the rows from k * (buckets + 1) on. Values
share a row where they fall into the same bucket. Strings are hashed once for each entry of a row group's dictionary.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flowps.batch import Float32, Uint64

T = TypeVar("T")
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

LABEL = "label"
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Knuth, The Art of Computer Programming 3, 6.4
_HALF = np.uint64(32)


@dataclass(frozen=True)
class Shape:
    """Columns by what they are taken for: lists and strings for slots, numbers dense; and the buckets of a slot, a power of two."""

    slots: tuple[str, ...]
    dense: tuple[str, ...]
    buckets: int

    @staticmethod
    def of(file: str, buckets: int) -> Shape:
        """The columns of a file."""
        if buckets < 2 or buckets & (buckets - 1):
            raise ValueError(f"{buckets} buckets; expected a power of two, and at least 2")
        fields = [field for field in pq.read_schema(file) if field.name != LABEL]
        slots = tuple(field.name for field in fields if pa.types.is_list(field.type) or _is_string(field.type))
        return Shape(slots, tuple(field.name for field in fields if field.name not in slots), buckets)

    @property
    def num_rows(self) -> int:
        """Of the table."""
        return len(self.slots) * (self.buckets + 1)


@dataclass(frozen=True)
class Samples:
    """Some samples; slots in the order of `Shape`.

    rows      int32: of sample after sample, and in a sample of slot after slot
    offsets   int64 [n * slots + 1]: where those of a sample's slot begin; its last number is their number
    dense     float32 [n, dense columns]
    labels    float32 [n]
    """

    rows: Int32
    offsets: Int64
    dense: Float32
    labels: Float32

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, first: int, last: int) -> Samples:
        """Samples from `first` to before `last`; views, but for the offsets."""
        slots = (len(self.offsets) - 1) // len(self)
        offsets = self.offsets[first * slots : last * slots + 1]
        return Samples(
            self.rows[offsets[0] : offsets[-1]], offsets - offsets[0], self.dense[first:last], self.labels[first:last]
        )  # fmt: skip

    def followed_by(self, other: Samples) -> Samples:
        """Both, copied."""
        return Samples(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]]),
            np.concatenate([self.dense, other.dense]),
            np.concatenate([self.labels, other.labels]),
        )


def batches(
    files: Sequence[str], shape: Shape, size: int, *, log1p: bool = False, shuffle: np.random.Generator | None = None
) -> Iterator[Samples]:  # fmt: skip
    """All samples, `size` and in the end fewer at a time.

    log1p     take sign(x) * ln(1 + |x|) of dense columns
    shuffle   the row groups of all files, and the samples of each; None: as they lie
    """
    schema = pq.read_schema(files[0])
    strings = [name for name in shape.slots if _is_string(schema.field(name).type)]
    opened = [pq.ParquetFile(file, read_dictionary=strings) for file in files]
    groups = [(file, group) for file in opened for group in range(file.num_row_groups)]
    if shuffle is not None:
        groups = [groups[at] for at in shuffle.permutation(len(groups))]
    left: Samples | None = None
    for file, group in groups:
        table = file.read_row_group(group, columns=[LABEL, *shape.slots, *shape.dense], use_threads=False)
        order = None if shuffle is None else shuffle.permutation(len(table))
        samples = _samples(table, shape, order, log1p)
        first = 0
        if left is not None:
            first = min(size - len(left), len(samples))
            left = left.followed_by(samples.part(0, first))
            if len(left) < size:
                continue
            yield left
        last = len(samples) - (len(samples) - first) % size
        for at in range(first, last, size):
            yield samples.part(at, at + size)
        left = samples.part(last, len(samples)) if last < len(samples) else None
    if left is not None:
        yield left


def _samples(table: pa.Table, shape: Shape, order: Int64 | None, log1p: bool) -> Samples:
    """The samples of a row group, in this order."""
    n, slots = len(table), len(shape.slots)
    order = np.arange(n) if order is None else order
    rows, counts = list[Int32](), np.ones((n, slots), np.int64)
    for slot, name in enumerate(shape.slots):
        column = table[name].combine_chunks()
        if pa.types.is_list(column.type):
            counts[:, slot] = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
            column = column.flatten()
        rows.append(buckets_of(column, shape.buckets) + np.int32(slot * (shape.buckets + 1)))
    joined, offsets = _joined(rows, counts, order)
    dense = np.empty((n, len(shape.dense)), np.float32)
    for at, name in enumerate(shape.dense):
        dense[:, at] = pc.fill_null(table[name].combine_chunks(), 0).to_numpy(zero_copy_only=False)
    if log1p:
        dense = np.copysign(np.log1p(np.abs(dense)), dense)
    labels = table[LABEL].to_numpy().astype(np.float32)
    return Samples(joined, offsets, dense[order], labels[order])


def _joined(rows: list[Int32], counts: Int64, order: Int64) -> tuple[Int32, Int64]:
    """Slot after slot → sample after sample, in this order; and the offsets there."""
    offsets = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts[order].reshape(-1), out=offsets[1:])
    if len(offsets) == offsets[-1] + 1 and (counts == 1).all():
        return np.stack(rows, axis=1)[order].reshape(-1), offsets
    starts = np.empty_like(counts)
    starts[order] = offsets[:-1].reshape(counts.shape)
    joined = np.empty(offsets[-1], np.int32)
    for slot, of_slot in enumerate(rows):
        count = counts[:, slot]
        shifts = starts[:, slot] - (np.cumsum(count) - count)
        joined[np.repeat(shifts, count) + np.arange(len(of_slot))] = of_slot
    return joined, offsets


def buckets_of(values: pa.Array, buckets: int) -> Int32:
    """The bucket of each value, `buckets` for nulls."""
    if pa.types.is_dictionary(values.type) or _is_string(values.type):
        values = values.dictionary_encode()
        of_entries = np.append(_mixed(hash_strings(values.dictionary), buckets), np.int32(buckets))
        return of_entries[pc.fill_null(values.indices, len(of_entries) - 1).to_numpy()]
    found = _mixed(pc.fill_null(values, 0).to_numpy(zero_copy_only=False).astype(np.uint64), buckets)
    if values.null_count:
        found[pc.is_null(values).to_numpy(zero_copy_only=False)] = buckets
    return found


def _mixed(numbers: Uint64, buckets: int) -> Int32:
    """The high bits of a product, after the high half was folded into the low one."""
    found = numbers >> _HALF
    found ^= numbers
    found *= _MULTIPLIER
    found >>= np.uint64(65 - buckets.bit_length())
    return found.astype(np.int32)


def hash_strings(strings: pa.Array) -> Uint64:
    """64 bits of each, of strings without nulls: the sum of (byte + 1) * m^(place + 1), of all strings at once."""
    strings = strings.cast(pa.large_binary())
    _, offsets, data = strings.buffers()
    bounds = (
        np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1] if offsets else np.zeros(1, np.int64)
    )
    lengths = np.diff(bounds)
    if not lengths.any():
        return np.zeros(len(strings), np.uint64)
    powers = np.cumprod(np.full(lengths.max(), _MULTIPLIER))
    terms = np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]].astype(np.uint64) + np.uint64(1)
    terms *= powers[np.arange(len(terms)) - np.repeat(bounds[:-1] - bounds[0], lengths)]
    sums = np.zeros(len(terms) + 1, np.uint64)
    np.cumsum(terms, out=sums[1:])
    sums = sums[bounds - bounds[0]]
    return sums[1:] - sums[:-1]


def ahead(made: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The same, made by a thread of its own, `depth` in advance. It ends when this is closed; what it raises is raised here."""
    done: SimpleQueue[Any] = SimpleQueue()
    room, stop, end = threading.Semaphore(depth), threading.Event(), object()

    def make() -> None:
        try:
            for one in made:
                done.put((one, None))
                room.acquire()
                if stop.is_set():
                    return
            done.put((end, None))
        except BaseException as error:  # of the one who waits
            done.put((end, error))

    thread = threading.Thread(target=make, name="rival-reader")
    thread.start()
    try:
        while True:
            one, error = done.get()
            room.release()
            if error is not None:
                raise error
            if one is end:
                return
            yield one
    finally:
        stop.set()
        room.release()  # it may wait for room
        thread.join()


def _is_string(of: pa.DataType) -> bool:
    return pa.types.is_string(of) or pa.types.is_large_string(of)

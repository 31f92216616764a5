"""Columns that samples are told apart by: which types may be one, their values as numbers, and as hashes.

A null is a value of its own. Refuses what has no few, exact values: floats, lists, times.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from flowps.batch import Uint64
from flowps.errors import DataError
from flowps.quality.cells import Int64

Kind = Literal["integer", "string", "boolean"]
Value = str | int | bool | None

# Beyond, a column is an id: a table by value says nothing, and every process would keep all values.
MAX_VALUES = 100_000
_NULL = np.uint64(0x9E3779B97F4A7C15)


class Column:
    """The kind of one column, found in the first array that has one. `role` and `name` are for messages."""

    def __init__(self, role: Literal["slice", "group"], name: str) -> None:
        self.role = role
        self.name = name
        self.kind: Kind | None = None

    def plain(self, array: Any) -> tuple[Any, Kind | None]:
        """A pyarrow array (chunked, dictionary) as one of int64, uint64, bool or binary, and its kind; None: all of it null.

        Raises DataError for a type that cannot be sliced or grouped by, and for a kind that is not that of other files.
        """
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
        if pa.types.is_dictionary(array.type):
            kind = self._kind(array.type.value_type, array.type)
            array = array.dictionary_decode()
        else:
            kind = self._kind(array.type, array.type)
        self._check_same(kind)
        if kind == "string":
            # Bytes: a string that is not UTF-8 is a value too.
            array = array.cast(pa.large_binary())
        elif kind == "integer" and array.type != pa.uint64():
            array = array.cast(pa.int64())
        return array, kind

    def learn(self, kind: Kind | None) -> None:
        """Remember the kind, for those that come. Raises DataError for another one."""
        self._check_same(kind)
        self.kind = self.kind or kind

    def _check_same(self, kind: Kind | None) -> None:
        if self.kind is not None and kind is not None and kind != self.kind:
            raise DataError(
                f"{self.role} column {self.name!r}: {kind} in some files, {self.kind} in others, "
                "expected one type; cast the column in some of the files"
            )

    def _kind(self, found: pa.DataType, whole: pa.DataType) -> Kind | None:
        types = pa.types
        if types.is_null(found):
            return None
        if types.is_integer(found):
            return "integer"
        if types.is_boolean(found):
            return "boolean"
        if types.is_string(found) or types.is_large_string(found) or types.is_string_view(found):
            return "string"
        expected = "expected integers, strings, booleans or dictionaries of those"
        if types.is_floating(found) or types.is_decimal(found):
            advice = "bucket the numbers into integers or strings first"
        elif types.is_nested(found):
            advice = "name a column that has one value a sample"
        else:
            advice = "cast the column"
        raise DataError(f"{self.role} column {self.name!r} is {whole}, {expected}; {advice}")


class Values:
    """The values of a slice column, numbered from 0 as they come. At most MAX_VALUES."""

    def __init__(self, name: str) -> None:
        self.column = Column("slice", name)
        self._numbers: dict[Any, int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def encode(self, array: Any) -> Int64:
        """The number of each value of a pyarrow array, int64 [n]. Raises DataError for a wrong type, and for too many values."""
        array, kind = self.column.plain(array)
        distinct, codes = _encode(array)
        numbers = self._take(distinct)
        self.column.learn(kind)
        return numbers[codes]

    def merge(self, other: Values) -> Int64:
        """Take the values of `other`; returns their numbers here, int64 [values]. Raises DataError as `encode`."""
        self.column.learn(other.column.kind)
        return self._take(list(other._numbers))

    def listed(self) -> list[Value]:
        """The values, by number."""
        return [of.decode("utf-8", "replace") if isinstance(of, bytes) else of for of in self._numbers]

    def ranks(self) -> list[tuple[bool, Any]]:
        """What to sort the values by, by number: themselves, null last."""
        return [(of is None, of) for of in self._numbers]

    def _take(self, distinct: list[Any]) -> Int64:
        new = [of for of in distinct if of not in self._numbers]
        if len(self._numbers) + len(new) > MAX_VALUES:
            raise DataError(
                f"slice column {self.column.name!r}: more than {MAX_VALUES:,} different values, which no table can show; "
                "slice by a column with fewer, or bucket it first (for one figure over many groups use the group column: GAUC)"
            )
        for of in new:
            self._numbers[of] = len(self._numbers)
        return np.fromiter((self._numbers[of] for of in distinct), np.int64, len(distinct))


def hashes(array: Any) -> Uint64:
    """64 bits for each value of an array as `Column.plain` gives it, uint64 [n]: integers as they are, xxh64 of strings' bytes.

    Among m values two share their bits with a probability of m²/2^65: 3e-6 for ten million. Those would be one group.
    """
    if pa.types.is_large_binary(array.type):
        distinct, codes = _encode(array)
        found = (int(_NULL) if of is None else xxhash.xxh64_intdigest(of) for of in distinct)
        return np.fromiter(found, np.uint64, len(distinct))[codes]
    if pa.types.is_null(array.type):
        return np.full(len(array), _NULL)
    nulls = np.asarray(array.is_null())
    filled = np.asarray(array.fill_null(False if pa.types.is_boolean(array.type) else 0))
    return np.where(nulls, _NULL, filled.astype(np.uint64))


def _encode(array: Any) -> tuple[list[Any], NDArray[np.int32]]:
    """The distinct values of an array, a null among them, and the place of each value in that list."""
    if pa.types.is_null(array.type):
        return [None][: len(array)], np.zeros(len(array), np.int32)
    encoded = array.dictionary_encode(null_encoding="encode")
    return encoded.dictionary.to_pylist(), np.asarray(encoded.indices)

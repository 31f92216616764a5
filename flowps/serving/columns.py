"""Whatever rows come in → a pyarrow.Table with the columns that a bundle needs, of types that the hub decodes as in training.

The type decides the sign: the string "5" and the integer 5 are different values, so one is never taken for the other. Integers of
another width, whole floats, other string types and dictionaries are cast, as that loses nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flowps.errors import SchemaError
from flowps.hub.saved import Values
from flowps.serving.manifest import BundleSlot, Manifest

_ACCEPTED = "a pyarrow.Table, a data frame of pandas or polars, a dict of columns, or a list of dicts"


def conform(rows: Any, manifest: Manifest) -> pa.Table:
    """The columns that the bundle needs of `rows`; others are left out.

    rows   see _ACCEPTED. In a list of dicts a key that one row lacks is null there; one that all lack is a missing column.

    Raises SchemaError for columns that are missing or of a type that was not trained on.
    """
    slots = manifest.slots
    weights = {slot.weights: slot for slot in slots if slot.weights}
    needed = list(dict.fromkeys([*manifest.dense.columns, *(slot.name for slot in slots), *weights]))
    table = _table(rows, needed)
    columns: dict[str, Any] = {}
    for name in manifest.dense.columns:
        columns[name] = _dense(table.column(name), name)
    for slot in slots:
        columns[slot.name] = _slot(_plain(table.column(slot.name)), slot)
    for name, slot in weights.items():
        columns[name] = _weights(_plain(table.column(name)), name, slot)
    return pa.table(columns)


def _table(rows: Any, needed: Sequence[str]) -> pa.Table:
    if isinstance(rows, pa.RecordBatch):
        rows = pa.Table.from_batches([rows])
    if isinstance(rows, Mapping):
        _check_names(rows, needed)
        return _joined({name: _array(rows[name], name) for name in needed})
    if isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
        if not rows:
            return pa.table({name: pa.nulls(0) for name in needed})
        _check_names(dict.fromkeys(key for row in rows for key in row), needed)
        return _joined({name: _array([row.get(name) for row in rows], name) for name in needed})
    if not isinstance(rows, pa.Table):
        if not hasattr(rows, "__arrow_c_stream__"):
            raise SchemaError(f"rows to score: found {type(rows).__name__}, expected {_ACCEPTED}")
        try:
            rows = pa.table(rows)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise SchemaError(f"rows to score: {type(rows).__name__} gives no table: {_one_line(error)}") from None
    _check_names(rows.column_names, needed)
    twice = [name for name in needed if rows.column_names.count(name) > 1]
    if twice:
        raise SchemaError(f"rows to score: more than one column is named {twice[0]!r}; rename them")
    return rows


def _joined(columns: Mapping[str, Any]) -> pa.Table:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise SchemaError(f"rows to score: columns of different lengths: {lengths}")
    return pa.table(dict(columns))


def _check_names(found: Iterable[str], needed: Sequence[str]) -> None:
    there = [str(name) for name in found]
    missing = [name for name in needed if name not in there]
    if missing:
        near = difflib.get_close_matches(missing[0], there, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f" (columns: {', '.join(there[:20]) or 'none'})"
        raise SchemaError(f"rows to score: no column {', '.join(map(repr, missing))}{hint}")


def _array(values: Any, name: str) -> Any:
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise SchemaError(
            f"rows to score: column {name!r} is {values!r:.60}, expected a list or array; one row is [{{{name!r}: value}}]"
        )
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise SchemaError(f"rows to score: column {name!r} is no column of one type: {_one_line(error)}") from None


def _dense(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    found = column.type
    if pa.types.is_null(found):
        return column.cast(pa.float32())
    if pa.types.is_decimal(found):
        return column.cast(pa.float64())
    if not (pa.types.is_floating(found) or pa.types.is_integer(found) or pa.types.is_boolean(found)):
        raise SchemaError(f"rows to score: column {name!r} is {found}, expected numbers: it was a dense column in training")
    return column


def _slot(column: pa.ChunkedArray, slot: BundleSlot) -> pa.ChunkedArray:
    if pa.types.is_null(column.type):
        return column.cast(_of(slot.is_list, pa.string() if slot.values == "string" else pa.int64()))
    is_list, found = _unwrapped(column.type)
    if is_list != slot.is_list:
        wanted = "a list of values in each row" if slot.is_list else "one value in each row"
        raise SchemaError(f"rows to score: column {slot.name!r} is {column.type}, expected {wanted}: slot trained on {slot.type}")
    wanted_type = _decodable(found, slot.values)
    if wanted_type is None:
        of = "strings" if slot.values == "string" else "integers or booleans"
        raise SchemaError(
            f"rows to score: column {slot.name!r} is {column.type}, expected {of}: slot trained on {slot.type}, "
            "and a string has another sign than an integer; cast the column"
        )
    try:
        return column if wanted_type == found else column.cast(_of(is_list, wanted_type))
    except pa.ArrowException as error:
        raise SchemaError(
            f"rows to score: column {slot.name!r} is {column.type} and cannot become {wanted_type} without loss: {_one_line(error)}"
        ) from None


def _weights(column: pa.ChunkedArray, name: str, slot: BundleSlot) -> pa.ChunkedArray:
    if pa.types.is_null(column.type):
        return column.cast(_of(slot.is_list, pa.float32()))
    is_list, found = _unwrapped(column.type)
    if is_list != slot.is_list or not (pa.types.is_floating(found) or pa.types.is_integer(found) or pa.types.is_null(found)):
        wanted = "a list of numbers in each row" if slot.is_list else "one number in each row"
        raise SchemaError(
            f"rows to score: column {name!r} is {column.type}, expected {wanted}: it has the weights of slot {slot.name!r}"
        )
    return column.cast(_of(is_list, pa.float32())) if pa.types.is_null(found) else column


def _decodable(found: pa.DataType, values: Values) -> pa.DataType | None:
    """The type that values of type `found` are cast to, itself if the hub decodes it; None: they are not of that kind."""
    inner = found.value_type if pa.types.is_dictionary(found) else found
    if pa.types.is_null(inner):
        return pa.string() if values == "string" else pa.int64()
    text = pa.types.is_string(inner) or pa.types.is_large_string(inner)
    whole = pa.types.is_integer(inner) or pa.types.is_boolean(inner)
    if values == "null":  # nothing was learned of any value
        return found if text or whole else None
    if values == "string":
        return found if text else None
    return found if whole else pa.int64() if pa.types.is_floating(found) else None


def _unwrapped(found: pa.DataType) -> tuple[bool, pa.DataType]:
    is_list = bool(pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found))
    return is_list, found.value_type if is_list else found


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Views of lists and strings, as polars gives them, as lists and strings; the hub knows no views, and Arrow casts only some."""
    if not _has_view(column.type):
        return column
    chunks = [_without_views(chunk) for chunk in column.chunks]
    return pa.chunked_array(chunks) if chunks else _plain(pa.chunked_array([pa.nulls(0, column.type)]))


def _has_view(found: pa.DataType) -> bool:
    if pa.types.is_list_view(found) or pa.types.is_large_list_view(found):
        return True
    is_list, value = _unwrapped(found)
    if is_list or pa.types.is_dictionary(found):
        return _has_view(value if is_list else found.value_type)
    return bool(pa.types.is_string_view(found))


def _without_views(array: pa.Array) -> pa.Array:
    found = array.type
    if pa.types.is_string_view(found):
        return array.cast(pa.large_string())
    if not _has_view(found):
        return array
    if pa.types.is_dictionary(found):
        return pa.DictionaryArray.from_arrays(array.indices, _without_views(array.dictionary))
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)  # null is as good as empty
    return pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]), _without_views(array.flatten()))


def _of(is_list: bool, value: pa.DataType) -> pa.DataType:
    return pa.large_list(value) if is_list else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

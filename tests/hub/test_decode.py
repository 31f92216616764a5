"""Decoding against its slow twin, over tables of every supported type, chunked and sliced; and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.batch import Batch
from flowps.config import Config, Data, Slot
from flowps.errors import DataError
from flowps.hub.decode import Dense, cut, decode
from flowps.hub.schema import Schema, infer
from tests.hub import naive

WHERE = "/data/day=1/part-0.parquet"
PLAIN = Dense()
F32_MAX = float(np.finfo(np.float32).max)


def schema_of(table: pa.Table, slot: Sequence[Slot] = (), **data: Any) -> Schema:
    return infer({f.name: f.type for f in table.schema}, Config(data=Data(**data), slot=tuple(slot)))


def batches_of(table: pa.Table, schema: Schema, how: Dense, order: Sequence[int] | None, bounds: Sequence[int]) -> list[Batch]:
    columns = decode(table, schema, how, WHERE)
    return cut(columns, None if order is None else np.array(order, np.int64), bounds)


def check(table: pa.Table, schema: Schema | None = None, how: Dense = PLAIN) -> Batch:
    """Decode the table as one batch, hold it against the twin, return it."""
    schema = schema or schema_of(table)
    (found,) = batches_of(table, schema, how, None, [0, table.num_rows])
    naive.assert_same(found, naive.batch(naive.samples(table, schema, how)))
    return found


def check_slot(values: pa.Array | pa.ChunkedArray) -> Batch:
    """The same for a table of one slot."""
    return check(pa.table({"label": pa.array([0, 1] * len(values), pa.int8())[: len(values)], "u": values}))


def refusal_of(table: pa.Table, how: Dense = PLAIN, first_row: int = 0, slot: Sequence[Slot] = (), **data: Any) -> str:
    """The message with which decoding the table is refused."""
    schema = schema_of(table, slot, **data)
    with pytest.raises(DataError) as refusal:
        decode(table, schema, how, WHERE, first_row)
    return str(refusal.value)


# --- any table  -------------------------------------------------------------------------------------------------------

# Smallest and largest value of each integer type.
INTS = {pa.type_for_alias(f"int{bits}"): (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)}
INTS |= {pa.type_for_alias(f"uint{bits}"): (0, 2**bits - 1) for bits in (8, 16, 32, 64)}
SCALARS = [*INTS, pa.bool_(), pa.string(), pa.large_string()]
INDICES = [pa.int8(), pa.int16(), pa.int64(), pa.uint8(), pa.uint32()]


def values_of(found: pa.DataType) -> st.SearchStrategy[Any]:
    """Values of a type, null among them."""
    if pa.types.is_dictionary(found):
        return values_of(found.value_type)
    if found in INTS:
        lo, hi = INTS[found]
        return st.none() | st.integers(lo, hi) | st.sampled_from([lo, hi, 0, 1])
    if pa.types.is_boolean(found):
        return st.none() | st.booleans()
    if pa.types.is_null(found):
        return st.none()
    if pa.types.is_fixed_size_list(found):
        return st.none() | st.lists(values_of(found.value_type), min_size=found.list_size, max_size=found.list_size)
    if pa.types.is_list(found) or pa.types.is_large_list(found):
        return st.none() | st.just([]) | st.lists(values_of(found.value_type), max_size=4)
    return st.none() | st.text(max_size=40) | st.sampled_from(["", "a", "é" * 20])


scalars = st.sampled_from(SCALARS)
flats = scalars | st.builds(pa.dictionary, st.sampled_from(INDICES), scalars)
slot_types = flats | st.one_of(
    flats.map(pa.list_),
    flats.map(pa.large_list),
    st.builds(pa.list_, flats, st.integers(0, 3)),
    st.sampled_from([pa.list_(pa.null()), pa.large_list(pa.null()), pa.list_(pa.null(), 2)]),
)


@st.composite
def columns(draw: st.DrawFn, found: pa.DataType, rows: Sequence[Any], values: st.SearchStrategy[Any]) -> pa.ChunkedArray:
    """`rows` as 1 … 3 chunks (empty ones too), each sliced out of a longer array, with `values` around."""
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=2)))
    chunks = []
    for lo, hi in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        before, after = draw(st.lists(values, max_size=2)), draw(st.lists(values, max_size=2))
        whole = pa.array([*before, *rows[lo:hi], *after], found)
        chunks.append(whole.slice(len(before), hi - lo))
    return pa.chunked_array(chunks, type=found)


WEIGHTS = {
    pa.float32(): st.floats(-F32_MAX, F32_MAX, width=32),
    pa.float64(): st.floats(-F32_MAX, F32_MAX),
    pa.int8(): st.integers(-128, 127),
    pa.int64(): st.integers(-(2**50), 2**50),
    pa.uint32(): st.integers(0, 2**32 - 1),
}


@st.composite
def weights(draw: st.DrawFn, of_slot: pa.DataType, rows: Sequence[Any]) -> pa.ChunkedArray:
    """A column of weights for a slot's rows. Those of nulls are anything; a row without values has null or an empty list."""
    number = draw(st.sampled_from(list(WEIGHTS)))
    weight, unused = WEIGHTS[number], st.none() | WEIGHTS[number]
    if pa.types.is_floating(number):
        unused |= st.sampled_from([math.nan, math.inf])

    def of_cell(cell: Any) -> Any:
        if is_list and cell:
            return [draw(unused if value is None else weight) for value in cell]
        if is_list:
            return draw(st.none() | st.just([]))
        return draw(unused if cell is None else weight)

    fixed = pa.types.is_fixed_size_list(of_slot)
    is_list = fixed or pa.types.is_list(of_slot) or pa.types.is_large_list(of_slot)
    if not is_list:
        return draw(columns(number, [of_cell(cell) for cell in rows], unused))
    if fixed and of_slot.list_size and draw(st.booleans()):
        found, around = pa.list_(number, of_slot.list_size), st.none()
    else:
        found, around = draw(st.sampled_from([pa.list_(number), pa.large_list(number)])), st.none() | st.lists(unused, max_size=3)
    cells = [of_cell(cell) for cell in rows]
    return draw(columns(found, [None if pa.types.is_fixed_size_list(found) and not cell else cell for cell in cells], around))


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, Schema]:
    """1 … 10 rows: a label, two dense columns and three slots of any type, folded or not, weighted or not."""
    num_rows = draw(st.integers(1, 10))
    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    labels = draw(st.sampled_from([pa.int8(), pa.uint64(), pa.bool_(), pa.float32(), pa.float64()]))
    types = {
        "label": (labels, st.booleans() if labels == pa.bool_() else st.integers(0, 1)),
        "x": (draw(st.sampled_from([pa.float32(), pa.float64()])), st.none() | st.floats(-1e6, 1e6, width=32)),
        "n": (draw(st.sampled_from([pa.int16(), pa.int64()])), st.none() | st.integers(-30_000, 30_000)),
    }
    for name in ("s0", "s1", "城市"):
        found = draw(slot_types)
        types[name] = (found, values_of(found))
    n = before + num_rows + after
    table = pa.table(
        {name: draw(columns(found, draw(st.lists(v, min_size=n, max_size=n)), v)) for name, (found, v) in types.items()}
    )
    slots = [Slot(name="s1", hash_size=draw(st.sampled_from([0, 1, 3, 1000, 2**62])), weights=draw(st.sampled_from(["", "s1 w"])))]
    slots += [Slot(name=name, weights=f"{name} w") for name in draw(st.lists(st.sampled_from(["s0", "城市"]), unique=True))]
    for slot in slots:
        if slot.weights:
            column = table.column(slot.name)
            table = table.append_column(slot.weights, draw(weights(column.type, column.to_pylist())))
    return table.slice(before, num_rows), schema_of(table, slots, dense=("n",))


@settings(max_examples=200, deadline=None)
@given(st.data(), tables(), st.booleans(), st.sampled_from([0.0, -1.5, 1e30]))
def test_any_table_in_any_order_cut_anywhere(
    data: st.DataObject, given_table: tuple[pa.Table, Schema], log1p: bool, fill: float
) -> None:
    table, schema = given_table
    how = Dense(fill, log1p)
    num_rows = table.num_rows
    order = data.draw(st.none() | st.permutations(range(num_rows)))
    bounds = sorted({0, num_rows, *data.draw(st.lists(st.integers(0, num_rows), max_size=3))})
    found = batches_of(table, schema, how, order, bounds)
    rows = naive.samples(table, schema, how)
    ordered = rows if order is None else [rows[i] for i in order]
    expected = [naive.batch(ordered[lo:hi]) for lo, hi in pairwise(bounds)]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        naive.assert_same(ours, theirs)


@pytest.mark.parametrize("found", SCALARS, ids=str)
def test_one_row(found: pa.DataType) -> None:
    assert len(check_slot(pa.array(["1"]).cast(found)).signs) == 1
    assert len(check_slot(pa.array([None], found)).signs) == 0


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["", "", ""]),
        pa.array([None, "", None], pa.large_string()),
        pa.array([[""], [], ["", ""]]),
        pa.array([[], [], []], pa.list_(pa.string())),
        pa.array([None, None, None], pa.large_list(pa.int64())),
        pa.array([[None], [], None], pa.list_(pa.null())),
        pa.array([[None, None], None, [None, None]], pa.list_(pa.string(), 2)),
        pa.array([None, None, None], pa.dictionary(pa.int8(), pa.string())),
    ],
    ids=lambda values: f"{values.type} {values.to_pylist()}",
)
def test_little_or_nothing_in_it(values: pa.Array) -> None:
    check_slot(values)


def test_a_table_without_slots_or_without_dense_columns() -> None:
    table = pa.table({"label": [0, 1], "x": [0.5, None], "u": [1, 2]})
    only_dense = check(table, schema_of(table, exclude=("u",)))
    assert (only_dense.num_slots, only_dense.dense.shape) == (0, (2, 1))
    only_slots = check(table, schema_of(table, exclude=("x",)))
    assert (only_slots.num_slots, only_slots.dense.shape) == (1, (2, 0))


def test_one_value_has_one_sign_whatever_its_column() -> None:
    """The published rule: integers of any width, plain, in a dictionary or a list."""
    arrays = [pa.array([5, 1], t) for t in INTS]
    arrays += [pa.array([5, 1], pa.dictionary(pa.int8(), pa.uint16())), pa.array([[5], [1]], pa.list_(pa.int16()))]
    assert {tuple(check_slot(a).signs.tolist()) for a in arrays} == {(naive.sign(5, "u"), naive.sign(1, "u"))}
    texts = [pa.array(["é"], t) for t in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))]
    assert {check_slot(a).signs[0] for a in texts} == {naive.sign("é", "u")}
    assert check_slot(pa.array([True])).signs[0] == naive.sign(1, "u")
    assert naive.sign("5", "u") != naive.sign(5, "u")


# --- Arrow's corners  -------------------------------------------------------------------------------------------------


def test_values_that_null_lists_hide_are_left_out() -> None:
    """A null list may still span values in storage."""
    values = pa.ListArray.from_arrays(
        pa.array([0, 2, 4, 5], pa.int32()), pa.array([1, 2, 3, 4, 5]), mask=pa.array([False, True, False])
    )
    assert values.to_pylist() == [[1, 2], None, [5]]
    assert check_slot(values).offsets.tolist() == [0, 2, 2, 3]
    assert check_slot(values.slice(1)).offsets.tolist() == [0, 0, 1]


def test_null_values_that_hide_text_are_left_out() -> None:
    hidden = pa.StringArray.from_buffers(
        3,
        pa.py_buffer(np.array([0, 2, 4, 6], np.int32).tobytes()),
        pa.py_buffer(b"aabbcc"),
        pa.py_buffer(bytes([0b101])),
        null_count=1,
    )
    assert hidden.to_pylist() == ["aa", None, "cc"]
    check_slot(hidden)


def test_a_dictionary_with_entries_that_no_row_uses() -> None:
    values = pa.DictionaryArray.from_arrays(pa.array([2, 2, None, 0], pa.int8()), pa.array(["a", "unused", "c"]))
    assert len(check_slot(values).signs) == 3


def test_a_dictionary_with_a_null_entry_that_no_row_uses() -> None:
    values = pa.DictionaryArray.from_arrays(pa.array([2, 0, None, 0], pa.int8()), pa.array(["a", None, "c"]))
    assert len(check_slot(values).signs) == 3
    numbers = pa.DictionaryArray.from_arrays(pa.array([2, 0], pa.int8()), pa.array([7, None, 9], pa.uint16()))
    assert len(check_slot(numbers).signs) == 2


@pytest.mark.parametrize("entries", [pa.array(["a", None, "c"]), pa.array([7, None, 9]), pa.array([True, None, False])])
def test_a_row_that_uses_a_null_entry_of_a_dictionary_is_null(entries: pa.Array) -> None:
    """Null in the dictionary is as null as null in the indices, and must not shift the signs of the rows after it."""
    values = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2, 1, 0], pa.int8()), entries)
    assert values.to_pylist().count(None) == 3
    check_slot(values)


def test_a_list_that_uses_a_null_entry_of_a_dictionary() -> None:
    values = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2, 1, 0], pa.int8()), pa.array(["a", None, "c"]))
    check_slot(pa.ListArray.from_arrays(pa.array([0, 2, 2, 4, 6], pa.int32()), values))


@pytest.mark.parametrize("wrap", [lambda t: t, pa.list_, pa.large_list, lambda t: pa.list_(t, 1)])
def test_chunks_with_dictionaries_of_their_own(wrap: Any) -> None:
    """Row groups have their own dictionaries: one code, two values."""
    flat = pa.dictionary(pa.int8(), pa.string())
    found = wrap(flat)
    rows = [["a", "b"], ["b", "c"]] if found == flat else [[["a"], ["b"]], [["b"], ["c"]]]
    check_slot(pa.chunked_array([pa.array(r, found) for r in rows]))


def test_dictionary_codes_up_to_the_end_of_their_type() -> None:
    entries = pa.array([f"v{i}" for i in range(256)])
    check_slot(pa.DictionaryArray.from_arrays(pa.array([255, 128, 0], pa.uint8()), entries))


# --- labels  ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([True, False, True]),
        pa.array([1, 0, 1], pa.uint8()),
        pa.array([1, 0, 1], pa.int64()),
        pa.array([1.0, 0.0, 1.0], pa.float32()),
        pa.array([1.0, -0.0, 1.0], pa.float64()),
        pa.array(np.array([1, 0, 1], np.float16)),
    ],
    ids=lambda values: str(values.type),
)
def test_labels_of_any_number_type(labels: pa.Array) -> None:
    assert check(pa.table({"label": labels, "u": [1, 2, 3]})).labels.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (pa.array([0, 1, 2], pa.int8()), "found 2"),
        (pa.array([0, 1, -1], pa.int64()), "found -1"),
        (pa.array([0, 1, 2**64 - 1], pa.uint64()), "found 18446744073709551615"),
        (pa.array([0.0, 1.0, 0.5]), "found 0.5"),
        (pa.array([0.0, 1.0, math.nan]), "found nan"),
        (pa.array([0.0, 1.0, math.inf], pa.float32()), "found inf"),
        (pa.array([0, 1, None], pa.int8()), "found null"),
        (pa.array([True, False, None]), "found null"),
        (pa.array([0.0, 1.0, None]), "found null"),
    ],
)
def test_a_label_that_is_not_0_or_1_is_refused(labels: pa.Array, shown: str) -> None:
    message = refusal_of(pa.table({"label": labels, "u": [1, 2, 3]}), first_row=1000)
    assert message.startswith(f"{WHERE}: column 'label', row 1002: {shown}, expected ")
    assert "0 or 1" in message
    assert "1 such rows" in message


def test_the_first_bad_label_is_shown_and_all_are_counted() -> None:
    message = refusal_of(pa.table({"label": pa.chunked_array([[0, 1], [3, 4], [5]]), "u": [1] * 5}))
    assert "row 2: found 3" in message
    assert "3 such rows" in message


# --- dense columns  ---------------------------------------------------------------------------------------------------


def test_nulls_become_the_fill() -> None:
    table = pa.table({"label": [0, 1, 0], "x": [1.5, None, -2.0], "n": pa.array([None, 2, None], pa.int32())})
    found = check(table, schema_of(table, dense=("n",)), Dense(fill=-1.0))
    assert found.dense.tolist() == [[1.5, -1.0], [-1.0, 2.0], [-2.0, -1.0]]


def test_log1p_keeps_the_sign_and_comes_after_the_fill() -> None:
    table = pa.table({"label": [0, 1, 0, 1, 0], "x": [math.e - 1, 1 - math.e, 0.0, None, 1e-6]})
    found = check(table, how=Dense(fill=math.e - 1, log1p=True))
    np.testing.assert_allclose(found.dense[:, 0], [1, -1, 0, 1, 1e-6], rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-F32_MAX, F32_MAX, width=32), min_size=1, max_size=8))
def test_log1p_is_symmetric(values: list[float]) -> None:
    labels = [0] * len(values)
    found, mirrored = (
        check(pa.table({"label": labels, "x": pa.array(v, pa.float32())}), how=Dense(log1p=True))
        for v in (values, [-x for x in values])
    )
    np.testing.assert_array_equal(found.dense, -mirrored.dense)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([True, False, None]),
        pa.array([-128, 127, None], pa.int8()),
        pa.array(np.array([0.5, -2, 65504], np.float16)),
        pa.array([1e-45, -F32_MAX, F32_MAX], pa.float64()),
        pa.array([2**24, -(2**24), None], pa.int64()),
    ],
    ids=lambda values: str(values.type),
)
def test_numbers_of_any_type_can_be_dense(values: pa.Array) -> None:
    table = pa.table({"label": [0, 1, 0], "x": values})
    check(table, schema_of(table, dense=("x",)))


@pytest.mark.parametrize(
    "values",
    [pa.array([2**53 + 1, -(2**63), 2**63 - 1]), pa.array([2**53 + 1, 2**63, 2**64 - 1], pa.uint64())],
    ids=lambda values: str(values.type),
)
def test_integers_that_floats_cannot_hold_exactly_are_rounded(values: pa.Array) -> None:
    table = pa.table({"label": [0, 1, 0], "x": values})
    check(table, schema_of(table, dense=("x",)))


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (pa.array([0.5, None, math.nan]), "found nan"),
        (pa.array([0.5, None, math.inf]), "found inf"),
        (pa.array([0.5, 1.5, -math.inf], pa.float32()), "found -inf"),
        (pa.array(np.array([0.5, 1.5, np.nan], np.float16)), "found nan"),
        (pa.array([0.5, None, 1e39]), "found 1e+39"),
        (pa.array([0.5, 1.5, -1e300]), "found -1e+300"),
    ],
)
@pytest.mark.parametrize("log1p", [False, True])
def test_what_is_not_a_finite_float32_is_refused(values: pa.Array, shown: str, log1p: bool) -> None:
    table = pa.table({"label": [0, 1, 0], "n": [1.0, 2.0, 3.0], "x": values})
    message = refusal_of(table, Dense(log1p=log1p), first_row=70_000)
    assert message.startswith(f"{WHERE}: column 'x', row 70002: {shown}, expected ")
    assert "finite" in message
    assert "1 such rows" in message
    assert "leave the column out" in message


def test_null_is_no_nan_to_the_refusal() -> None:
    """Nulls before the bad value are not the bad value."""
    message = refusal_of(pa.table({"label": [0] * 4, "x": [None, None, math.inf, None]}))
    assert "row 2: found inf" in message
    assert "1 such rows" in message


# --- weights  ---------------------------------------------------------------------------------------------------------

WEIGHTED = (Slot(name="u", weights="w"),)


def with_weights(values: Any, weights: Any) -> pa.Table:
    """A table of a slot u and its weights w."""
    return pa.table({"label": [0] * len(values), "u": values, "w": weights})


def shares_of(values: Any, weights: Any) -> list[float]:
    """The shares of the table's signs, held against the twin."""
    table = with_weights(values, weights)
    found = check(table, schema_of(table, WEIGHTED))
    assert found.shares is not None
    return found.shares.tolist()


def test_without_weights_there_are_no_shares() -> None:
    assert check_slot(pa.array([[1, 2], None, [3]])).shares is None


@pytest.mark.parametrize(
    "weights",
    [
        pa.array([0.5, 2, -1]),
        pa.array([0.5, 2, -1], pa.float32()),
        pa.array(np.array([0.5, 2, -1], np.float16)),
    ],
    ids=lambda weights: str(weights.type),
)
def test_one_weight_for_each_value(weights: pa.Array) -> None:
    assert shares_of([1, 2, 3], weights) == [0.5, 2.0, -1.0]
    starts = pa.array([0, 2, 2, 3], pa.int32())
    lists = pa.ListArray.from_arrays(starts, weights)
    assert shares_of([["a", "b"], [], ["c"]], lists) == [0.5, 2.0, -1.0]
    assert shares_of(pa.array([["a", "b"], None, ["c"]], pa.large_list(pa.string())), lists) == [0.5, 2.0, -1.0]


def test_weights_of_nulls_go_with_them_whatever_they_are() -> None:
    assert shares_of([1, None, 3, None], [0.5, 7.0, 2.0, None]) == [0.5, 2.0]
    assert shares_of([[1, None], [None, None], [2]], [[0.5, math.nan], [None, math.inf], [2.0]]) == [0.5, 2.0]
    entries = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2], pa.int8()), pa.array(["a", None, "c"]))
    assert shares_of(entries, [0.5, None, None, 2.0]) == [0.5, 2.0]


def test_a_row_without_values_has_no_weights() -> None:
    assert shares_of([None, [], None, [], [1]], [None, [], [], None, [0.5]]) == [0.5]
    assert shares_of(pa.array([None, None], pa.list_(pa.string())), pa.array([None, None], pa.list_(pa.float32()))) == []


def test_weights_that_null_lists_hide_are_left_out() -> None:
    hidden = pa.ListArray.from_arrays(
        pa.array([0, 2, 4, 5], pa.int32()), pa.array([1.0, 2.0, math.nan, 4.0, 5.0]), mask=pa.array([False, True, False])
    )
    assert shares_of([[1, 2], None, [5]], hidden) == [1.0, 2.0, 5.0]


def test_slots_without_weights_next_to_one_with_weigh_1() -> None:
    table = pa.table({"label": [0, 1], "a": [[1, 2], [3]], "u": [[1], [2, 3]], "w": [[0.5], [2.0, 3.0]], "z": [1, None]})
    found = check(table, schema_of(table, WEIGHTED))
    assert found.shares is not None
    assert found.shares.tolist() == [1.0, 1.0, 1.0, 0.5, 2.0, 3.0, 1.0]


def test_two_slots_may_share_their_weights() -> None:
    table = pa.table({"label": [0, 1], "a": [[1, None], [3]], "u": [["x", "y"], ["z"]], "w": [[0.5, 2.0], [3.0]]})
    found = check(table, schema_of(table, [*WEIGHTED, Slot(name="a", weights="w")]))
    assert found.shares is not None
    assert found.shares.tolist() == [0.5, 3.0, 0.5, 2.0, 3.0]


@pytest.mark.parametrize(
    ("values", "weights", "row", "shown"),
    [
        ([1, 2, 3], [0.5, 1.0, None], 2, "null, expected a finite"),
        ([1, 2, 3], [0.5, None, math.nan], 1, "null, expected a finite"),
        ([1, None, 3], [0.5, None, math.nan], 2, "nan, expected a finite"),
        ([1, None, 3], [0.5, None, math.inf], 2, "inf, expected a finite"),
        ([1, 2, 3], [0.5, 1.0, 1e39], 2, "1e+39, expected a finite"),
        ([1, 2, 3], pa.array([1, 1, None], pa.int8()), 2, "null, expected a finite"),
        ([[1], [], [2, 3, 4]], [[0.5], [], [1.0, None, math.nan]], 2, "null, expected a finite"),
        ([[1], [None], [2, 3]], [[0.5], [math.nan], [1.0, -math.inf]], 2, "-inf, expected a finite"),
        ([[], [1, None, 2], []], [[], [1.0, None, None], []], 1, "null, expected a finite"),
        ([[1], [], [2, 3]], [[0.5], [], [1.0]], 2, "a list of 1, expected a list of 2"),
        ([[1], [], [2, 3]], [[0.5], None, None], 2, "null, expected a list of 2"),
        ([[1], None, []], [[0.5], [], [1.0]], 2, "a list of 1, expected a list of 0"),
        ([[1], None], [[0.5], [1.0]], 1, "a list of 1, expected a list of 0"),
        ([[1], [None]], [[0.5], []], 1, "a list of 0, expected a list of 1"),
        # As many in all: the weights of one row could be taken for those of the next.
        ([[1], [2, 3], [4]], [[0.5], [1.0], [1.0, 1.0]], 1, "a list of 1, expected a list of 2"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_used_are_refused(values: Any, weights: Any, row: int, shown: str) -> None:
    message = refusal_of(with_weights(values, weights), first_row=70_000, slot=WEIGHTED)
    assert message.startswith(f"{WHERE}: column 'w', row {70_000 + row}: found {shown}")
    assert "slot 'u'" in message
    assert "clean the data" in message


def test_all_rows_with_bad_weights_are_counted() -> None:
    many = [[1.0, math.nan, math.inf], [2.0], [None, 1.0], [math.nan]]
    message = refusal_of(with_weights([[1, 2, 3], [4], [5, 6], [None]], many), slot=WEIGHTED)
    assert "row 0: found nan" in message
    assert "(2 such rows in this partition)" in message
    message = refusal_of(with_weights([[1, 2], [4], [5, 6]], [[1.0], [1.0], []]), slot=WEIGHTED)
    assert "row 0: found a list of 1" in message
    assert "(2 such rows in this partition)" in message


# --- cutting  ---------------------------------------------------------------------------------------------------------


def test_batches_are_whole_and_in_order() -> None:
    table = pa.table({"label": [0, 1] * 5, "x": np.arange(10.0), "u": [[i] * (i % 3) for i in range(10)]})
    order = np.array([9, 0, 8, 1, 7, 2, 6, 3, 5, 4])
    found = batches_of(table, schema_of(table), PLAIN, list(order), [0, 3, 6, 10])
    assert [batch.size for batch in found] == [3, 3, 4]
    np.testing.assert_array_equal(np.concatenate([batch.dense[:, 0] for batch in found]), order)


def test_shares_go_with_their_signs_into_any_order_and_batch() -> None:
    lists = [[10 * i + k for k in range(i % 3)] for i in range(10)]
    table = pa.table({"label": [0] * 10, "u": lists, "w": [[x / 4 for x in row] for row in lists], "v": range(10)})
    order = [9, 0, 8, 1, 7, 2, 6, 3, 5, 4]
    found = batches_of(table, schema_of(table, WEIGHTED), PLAIN, order, [0, 3, 6, 10])
    expected = [x / 4 for i in order for x in lists[i]]
    assert [x for batch in found for x in batch.shares[: batch.offsets[batch.size]].tolist()] == expected
    assert all((batch.shares[batch.offsets[batch.size] :] == 1).all() for batch in found)
    assert all(len(batch.shares) == len(batch.signs) for batch in found)


def test_more_signs_than_offsets_can_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowps.batch._MAX_SIGNS", 5)
    table = pa.table({"label": [0, 1, 0], "u": [[1, 2], [3, 4], [5, 6]]})
    columns = decode(table, schema_of(table), PLAIN, WHERE)
    assert [len(batch.signs) for batch in cut(columns, None, [0, 2, 3])] == [4, 2]
    with pytest.raises(DataError, match=r"3 samples has 6 signs.*lower data\.batch_size"):
        cut(columns, None, [0, 3])


def test_sequences_are_cut_to_their_length():
    """With pooling none the first max_len values of each row stay, with their weights; nulls do not count."""
    table = pa.table(
        {
            "label": [0, 1, 0],
            "seen": pa.array([["a", None, "b", "c"], [], ["d"]]),
            "strength": pa.array([[1.0, 9.0, 2.0, 3.0], [], [4.0]]),
        }
    )
    slots = tuple(Slot(name="seen", pooling=pooling, max_len=2, weights="strength") for pooling in ("none", "sum"))
    cut, whole = (
        decode(table, Schema("label", (), (slot,), {n: table.schema.field(n).type for n in table.column_names}, {}), Dense(), "x")
        .slots[0]
        for slot in slots
    )  # fmt: skip
    assert whole.starts.tolist() == [0, 3, 3, 4]
    assert cut.starts.tolist() == [0, 2, 2, 3]
    assert cut.signs.tolist() == whole.signs[[0, 1, 3]].tolist()
    assert cut.shares.tolist() == [1, 2, 4]


# --- several labels, weights of samples -------------------------------------------------------------------------------


def shown_clicked(**more: Any) -> pa.Table:
    """Ten samples with three labels of different types and a weight."""
    return pa.table(
        {
            "label": pa.array([0, 1] * 5, pa.int8()),
            "buy": pa.array([i % 3 == 0 for i in range(10)]),
            "call": [float(i % 5 == 0) for i in range(10)],
            "w": [i / 4 for i in range(10)],
            "u": range(10),
            **more,
        }
    )


def test_several_labels_are_columns_in_the_order_of_the_schema() -> None:
    table = shown_clicked()
    schema = schema_of(table, extra_labels=("call", "buy"))
    labels = decode(table, schema, PLAIN, WHERE).labels
    assert (labels.dtype, labels.shape) == (np.float32, (10, 3))
    wanted = [table.column(name).to_pylist() for name in ("label", "call", "buy")]
    np.testing.assert_array_equal(labels, np.array(wanted, np.float32).T)
    assert decode(table, schema_of(table), PLAIN, WHERE).labels.shape == (10,), "of one label they have one dimension"


def test_labels_and_weights_go_with_their_sample_into_any_order_and_batch() -> None:
    table, order = shown_clicked(), [9, 0, 8, 1, 7, 2, 6, 3, 5, 4]
    found = batches_of(table, schema_of(table, extra_labels=("buy",), sample_weight="w"), PLAIN, order, [0, 3, 3, 10])
    assert [batch.size for batch in found] == [3, 0, 7], "a batch may be left without samples"
    assert [batch.labels.shape for batch in found] == [(3, 2), (0, 2), (7, 2)]
    assert np.concatenate([batch.labels for batch in found]).tolist() == [[i % 2, i % 3 == 0] for i in order]
    assert np.concatenate([batch.weights for batch in found]).tolist() == [i / 4 for i in order]
    assert all(batch.weights.dtype == np.float32 for batch in found)
    (whole,) = batches_of(table, schema_of(table), PLAIN, None, [0, 10])
    assert whole.weights is None


@pytest.mark.parametrize(
    "weights",
    [pa.array([0, 1, 7], pa.uint8()), pa.array([0.0, 1.0, 7.0]), pa.chunked_array([pa.array([0, 1], pa.int64()), pa.array([7])])],
    ids=["bytes", "doubles", "chunks"],
)  # fmt: skip
def test_weights_of_samples_of_any_number_type(weights: Any) -> None:
    table = pa.table({"label": [0, 1, 1], "u": [1, 2, 3], "w": weights})
    found = decode(table, schema_of(table, sample_weight="w"), PLAIN, WHERE).weights
    assert found is not None
    assert (found.dtype, found.tolist()) == (np.float32, [0.0, 1.0, 7.0])


@pytest.mark.parametrize(
    ("weight", "shown"),
    [(None, "null"), (math.nan, "nan"), (math.inf, "inf"), (-0.25, "-0.25"), (1e300, "1e+300"), (-math.inf, "-inf")],
)
def test_weights_of_samples_that_cannot_be_used_are_refused(weight: float | None, shown: str) -> None:
    table = pa.table({"label": [0, 1] * 2, "u": range(4), "w": [1.0, 0.0, weight, weight]})
    message = refusal_of(table, first_row=100, sample_weight="w")
    assert message.startswith(
        f"{WHERE}: column 'w', row 102: found {shown}, expected the weight of a sample, a finite number from 0 "
    )
    assert "(2 such rows in this partition); clean the data" in message


def test_each_label_is_checked_under_its_own_name() -> None:
    message = refusal_of(pa.table({"label": [0, 1], "buy": [0, 2], "u": [1, 2]}), extra_labels=("buy",))
    assert message.startswith(f"{WHERE}: column 'buy', row 1: found 2, expected a label of 0 or 1")


@pytest.mark.parametrize("dropped", [["label", "buy", "w"], []])
def test_without_labels_they_need_not_be_there_and_are_not_looked_at(dropped: list[str]) -> None:
    """Features are the same; the labels are zeros, the weights none, whatever stands there."""
    table = shown_clicked()
    schema = schema_of(table, extra_labels=("buy",), sample_weight="w", exclude=("call",))
    bad = table.set_column(0, "label", pa.array([None] * 10, pa.int8())).set_column(3, "w", pa.array([math.nan] * 10))
    found = decode(bad.drop_columns(dropped), schema, PLAIN, WHERE, labelled=False)
    assert (found.labels.tolist(), found.weights) == ([0.0] * 10, None)
    assert found.labels.dtype == np.float32
    whole = decode(table, schema, PLAIN, WHERE)
    assert found.slots[0].signs.tobytes() == whole.slots[0].signs.tobytes()
    (batch,) = cut(found, None, [0, 10])
    assert (batch.size, batch.weights, batch.labels.shape) == (10, None, (10,))

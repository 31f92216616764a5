"""What each column becomes, and every refusal on the way."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from flowps.config import Config, Data, Slot, SlotDefault
from flowps.errors import SchemaError
from flowps.hub.schema import Schema, check_same, infer, is_slot_type
from tests.hub import naive

INTS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
SLOT_TYPES = [
    *INTS,
    pa.bool_(),
    pa.string(),
    pa.large_string(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.uint32(), pa.large_string()),
    pa.dictionary(pa.int64(), pa.int64()),
    pa.list_(pa.int64()),
    pa.list_(pa.bool_()),
    pa.list_(pa.string()),
    pa.large_list(pa.uint64()),
    pa.large_list(pa.large_string()),
    pa.list_(pa.int32(), 3),
    pa.list_(pa.dictionary(pa.int32(), pa.string())),
    pa.list_(pa.null()),
]
LEFT_OUT = [
    (pa.null(), "null in every row"),
    (pa.timestamp("us"), "a time is no feature"),
    (pa.timestamp("ns", "UTC"), "a time is no feature"),
    (pa.date32(), "a time is no feature"),
    (pa.date64(), "a time is no feature"),
    (pa.time64("us"), "a time is no feature"),
    (pa.duration("s"), "a time is no feature"),
    (pa.list_(pa.float32()), "a vector of numbers"),
    (pa.list_(pa.float16()), "a vector of numbers"),
    (pa.large_list(pa.float64()), "a vector of numbers"),
    (pa.list_(pa.float32(), 8), "a vector of numbers"),
]
REFUSED = [
    pa.struct([("a", pa.int64())]),
    pa.map_(pa.string(), pa.int64()),
    pa.binary(),
    pa.large_binary(),
    pa.binary(16),
    pa.decimal128(10, 2),
    pa.list_(pa.list_(pa.int64())),
    pa.list_(pa.large_list(pa.string())),
    pa.list_(pa.binary()),
    pa.list_(pa.struct([("a", pa.int64())])),
    pa.list_(pa.timestamp("us")),
    pa.dictionary(pa.int8(), pa.float64()),
    pa.dictionary(pa.int8(), pa.binary()),
]


def infer_with(columns: dict[str, pa.DataType], *, slot: tuple[Slot, ...] = (), **data: Any) -> Schema:
    return infer(columns, Config(data=Data(**data), slot=slot))


def slot_names(schema: Schema) -> list[str]:
    return [slot.name for slot in schema.slots]


# --- inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", SLOT_TYPES, ids=str)
def test_becomes_a_slot(found: pa.DataType) -> None:
    schema = infer_with({"label": pa.int8(), "x": found})
    assert (slot_names(schema), schema.dense, schema.left_out) == (["x"], (), {})
    assert is_slot_type(found)


@pytest.mark.parametrize("found", FLOATS, ids=str)
def test_becomes_dense(found: pa.DataType) -> None:
    schema = infer_with({"label": pa.int8(), "x": found})
    assert (slot_names(schema), schema.dense, schema.left_out) == ([], ("x",), {})


@pytest.mark.parametrize(("found", "reason"), LEFT_OUT, ids=lambda v: str(v))
def test_is_left_out_with_the_reason(found: pa.DataType, reason: str) -> None:
    schema = infer_with({"label": pa.int8(), "x": found, "u": pa.int64()})
    assert (slot_names(schema), schema.dense) == (["u"], ())
    assert list(schema.left_out) == ["x"]
    assert reason in schema.left_out["x"]


@pytest.mark.parametrize("found", REFUSED, ids=str)
def test_is_refused_with_the_way_out(found: pa.DataType) -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with({"label": pa.int8(), "x": found, "u": pa.int64()})
    message = str(refusal.value)
    assert "'x'" in message
    assert str(found) in message
    assert "--data.exclude" in message
    schema = infer_with({"label": pa.int8(), "x": found, "u": pa.int64()}, exclude=("x",))
    assert (slot_names(schema), dict(schema.left_out)) == (["u"], {"x": "data.exclude"})


def test_a_dictionary_of_lists_is_refused() -> None:
    """Slots are integers, booleans, strings, dictionaries and lists of those: a list is no dictionary's value."""
    found = pa.dictionary(pa.int8(), pa.list_(pa.int64()))
    with pytest.raises(SchemaError, match="'x' is dictionary"):
        infer_with({"label": pa.int8(), "x": found})


def test_all_refused_columns_are_named_at_once() -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with({"label": pa.int8(), "blob": pa.binary(), "price": pa.decimal128(5, 2), "u": pa.int64()})
    message = str(refusal.value)
    assert "'blob' is binary" in message
    assert "'price' is decimal128(5, 2)" in message
    assert message.endswith("--data.exclude 'blob' 'price'")


def test_a_refused_column_is_excluded_by_its_whole_name() -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with({"label": pa.int8(), "what is it": pa.binary(), "u": pa.int64()})
    assert str(refusal.value).endswith("--data.exclude 'what is it'")


def test_columns_keep_the_order_of_the_files() -> None:
    columns = {"b": pa.int64(), "y": pa.float32(), "label": pa.int8(), "a": pa.string(), "x": pa.float64()}
    schema = infer_with(columns)
    assert (slot_names(schema), schema.dense) == (["b", "a"], ("y", "x"))
    assert schema.columns == ["label", "y", "x", "b", "a"]
    assert dict(schema.types) == columns


def test_slots_take_their_settings_from_their_entry_or_the_defaults() -> None:
    config = Config(slot_default=SlotDefault(dim=8), slot=(Slot(name="u", dim=32, pooling="mean"),))
    schema = infer({"label": pa.int8(), "u": pa.int64(), "v": pa.string()}, config)
    assert schema.slots == (Slot(name="u", dim=32, pooling="mean"), Slot(name="v", dim=8))


def test_schema_json_says_what_decides_the_rows() -> None:
    schema = infer_with({"label": pa.int8(), "x": pa.float64(), "城市": pa.string(), "t": pa.date32()})
    written = json.loads(json.dumps(schema.to_json()))
    assert (written["label"], written["dense"], written["hash"]) == ("label", ["x"], "xxh64")
    (slot,) = written["slots"]
    assert (slot["name"], slot["type"], slot["dim"]) == ("城市", "string", 16)
    assert slot["seed"] == f"{naive.seed('城市'):016x}"
    assert "a time is no feature" in written["left_out"]["t"]


# --- the label --------------------------------------------------------------------------------------------------------


def test_the_label_may_have_any_name() -> None:
    schema = infer_with({"click": pa.bool_(), "u": pa.int64()}, label="click")
    assert (schema.label, slot_names(schema), schema.columns) == ("click", ["u"], ["click", "u"])


@pytest.mark.parametrize("found", [*INTS, *FLOATS, pa.bool_()], ids=str)
def test_numbers_can_be_labels(found: pa.DataType) -> None:
    assert infer_with({"label": found, "u": pa.int64()}).columns == ["label", "u"]


@pytest.mark.parametrize(
    "found", [pa.string(), pa.dictionary(pa.int8(), pa.int64()), pa.list_(pa.int8()), pa.null(), pa.date32()], ids=str
)
def test_a_label_that_is_no_number_is_refused(found: pa.DataType) -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with({"label": found, "u": pa.int64()})
    message = str(refusal.value)
    assert "column 'label'" in message
    assert str(found) in message
    assert "cast it" in message
    assert "--data.label" in message


def test_a_missing_label_is_refused_with_what_is_near() -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with({"labels": pa.int8(), "user": pa.int64()})
    message = str(refusal.value)
    assert "no column 'label'" in message
    assert "did you mean labels?" in message
    assert "--data.label" in message


def test_a_missing_label_with_nothing_near_lists_the_columns() -> None:
    with pytest.raises(SchemaError, match=r"no column 'label'.*columns: click, user.*--data\.label"):
        infer_with({"click": pa.int8(), "user": pa.int64()})


def test_a_long_list_of_columns_is_cut() -> None:
    with pytest.raises(SchemaError, match=r"c0, c1, .*c19, …\)"):
        infer_with({f"c{i}": pa.int8() for i in range(30)})


# --- data.dense and data.exclude --------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [*INTS, *FLOATS, pa.bool_()], ids=str)
def test_numbers_become_dense_when_asked(found: pa.DataType) -> None:
    schema = infer_with({"label": pa.int8(), "x": found, "u": pa.int64()}, dense=("x",))
    assert (schema.dense, slot_names(schema)) == (("x",), ["u"])


@pytest.mark.parametrize(
    "found",
    [pa.string(), pa.dictionary(pa.int8(), pa.int64()), pa.list_(pa.float32()), pa.timestamp("us"), pa.null()],
    ids=str,
)
def test_what_is_no_number_cannot_be_dense(found: pa.DataType) -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with({"label": pa.int8(), "x": found}, dense=("x",))
    message = str(refusal.value)
    assert "column 'x'" in message
    assert str(found) in message
    assert "leave it out of data.dense" in message


def test_globs_of_dense_and_exclude() -> None:
    columns = {"label": pa.int8(), **{f"I{i}": pa.int32() for i in range(1, 4)}, "C1": pa.string(), "C2": pa.string()}
    schema = infer_with(columns, dense=("I[12]", "I3"), exclude=("*2",))
    assert schema.dense == ("I1", "I3")
    assert slot_names(schema) == ["C1"]
    assert dict(schema.left_out) == {"I2": "data.exclude", "C2": "data.exclude"}


def test_globs_mind_case() -> None:
    schema = infer_with({"label": pa.int8(), "i1": pa.int32(), "I1": pa.int32()}, dense=("I*",))
    assert (schema.dense, slot_names(schema)) == (("I1",), ["i1"])


def test_a_name_with_the_characters_of_a_glob_names_itself() -> None:
    schema = infer_with({"label": pa.int8(), "tag[0]": pa.int32(), "tag[1]": pa.int32()}, exclude=("tag[0]",))
    assert (slot_names(schema), list(schema.left_out)) == (["tag[1]"], ["tag[0]"])


@pytest.mark.parametrize("knob", ["dense", "exclude"])
@pytest.mark.parametrize(("pattern", "near"), [("prise", "did you mean price?"), ("zz*", "columns: label, price, user")])
def test_a_glob_that_matches_nothing_is_refused(knob: str, pattern: str, near: str) -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with({"label": pa.int8(), "price": pa.float32(), "user": pa.int64()}, **{knob: (pattern,)})
    message = str(refusal.value)
    assert message.startswith(f"data.{knob}: '{pattern}' matches no column")
    assert near in message


# --- [[slot]] ---------------------------------------------------------------------------------------------------------


def test_an_unknown_slot_is_refused_with_what_is_near() -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with({"label": pa.int8(), "user_id": pa.int64()}, slot=(Slot(name="userid"),))
    message = str(refusal.value)
    assert "[[slot]] 'userid'" in message
    assert "did you mean user_id?" in message


@pytest.mark.parametrize(
    ("name", "data"),
    [("label", {}), ("u", {"dense": ("u",)}), ("u", {"exclude": ("u",)}), ("u", {"exclude": ("?",)})],
)
def test_a_slot_entry_that_contradicts_another_knob_is_refused(name: str, data: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with({"label": pa.int8(), "u": pa.int64(), "value": pa.int64()}, slot=(Slot(name=name),), **data)
    message = str(refusal.value)
    assert f"column {name!r}" in message
    assert "[[slot]]" in message
    assert "keep one" in message


@pytest.mark.parametrize(
    "found",
    [pa.float32(), pa.null(), pa.timestamp("us"), pa.list_(pa.float32()), pa.struct([("a", pa.int64())])],
    ids=str,
)
def test_a_slot_entry_does_not_make_a_slot_of_what_cannot_be_one(found: pa.DataType) -> None:
    """Without the entry such columns are dense or left out; who asks for a slot is told that it cannot be."""
    with pytest.raises(SchemaError) as refusal:
        infer_with({"label": pa.int8(), "x": found, "u": pa.int64()}, slot=(Slot(name="x"),))
    message = str(refusal.value)
    assert "cannot be a slot: 'x' is" in message
    assert str(found) in message
    assert "cast the column" in message


# --- weights ----------------------------------------------------------------------------------------------------------

WITH_WEIGHTS = {
    "label": pa.int8(),
    "tags": pa.list_(pa.string()),
    "tag_w": pa.list_(pa.float32()),
    "u": pa.int64(),
    "w": pa.float64(),
}


def weighing(*pairs: tuple[str, str]) -> tuple[Slot, ...]:
    """Entries of slots with weights."""
    return tuple(Slot(name=name, weights=weights) for name, weights in pairs)


def test_weights_are_read_and_are_nothing_else() -> None:
    schema = infer_with({**WITH_WEIGHTS, "x": pa.float32()}, slot=weighing(("tags", "tag_w"), ("u", "w")))
    assert (slot_names(schema), schema.dense, dict(schema.left_out)) == (["tags", "u"], ("x",), {})
    assert schema.weights == {"tag_w": ["tags"], "w": ["u"]}
    assert schema.columns == ["label", "x", "tags", "u", "tag_w", "w"]
    written = json.loads(json.dumps(schema.to_json()))
    assert [slot["weights"] for slot in written["slots"]] == ["tag_w", "w"]
    assert (written["dense"], written["left_out"]) == (["x"], {})


def test_without_weights_columns_are_what_their_type_says() -> None:
    schema = infer_with(WITH_WEIGHTS)
    assert (slot_names(schema), schema.dense, schema.weights) == (["tags", "u"], ("w",), {})
    assert "a vector of numbers" in schema.left_out["tag_w"]


def test_slots_may_share_a_column_of_weights() -> None:
    schema = infer_with({**WITH_WEIGHTS, "v": pa.string()}, slot=weighing(("u", "w"), ("v", "w")))
    assert schema.weights == {"w": ["u", "v"]}
    assert schema.columns.count("w") == 1


@pytest.mark.parametrize("number", [*INTS, *FLOATS], ids=str)
@pytest.mark.parametrize(
    "of_slot", [pa.int64(), pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.string()), pa.list_(pa.int8(), 2)]
)
def test_weights_are_numbers_of_any_type_nested_as_their_slot(number: pa.DataType, of_slot: pa.DataType) -> None:
    lists = [pa.list_(number), pa.large_list(number), pa.list_(number, 2)] if hasattr(of_slot, "value_field") else [number]
    for found in lists:
        schema = infer_with({"label": pa.int8(), "u": of_slot, "w": found}, slot=weighing(("u", "w")))
        assert (slot_names(schema), schema.dense, schema.weights) == (["u"], (), {"w": ["u"]})


@pytest.mark.parametrize(
    ("of_slot", "found", "expected"),
    [
        (pa.int64(), pa.list_(pa.float32()), "floats or integers"),
        (pa.int64(), pa.string(), "floats or integers"),
        (pa.int64(), pa.bool_(), "floats or integers"),
        (pa.int64(), pa.timestamp("us"), "floats or integers"),
        (pa.int64(), pa.decimal128(5, 2), "floats or integers"),
        (pa.int64(), pa.null(), "floats or integers"),
        (pa.int64(), pa.dictionary(pa.int8(), pa.float32()), "floats or integers"),
        (pa.list_(pa.string()), pa.float32(), "a list of floats or integers"),
        (pa.list_(pa.string()), pa.list_(pa.string()), "a list of floats or integers"),
        (pa.list_(pa.string()), pa.list_(pa.null()), "a list of floats or integers"),
        (pa.list_(pa.string()), pa.list_(pa.list_(pa.float32())), "a list of floats or integers"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_their_slot_are_refused(of_slot: pa.DataType, found: pa.DataType, expected: str) -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with({"label": pa.int8(), "u": of_slot, "w": found}, slot=weighing(("u", "w")))
    message = str(refusal.value)
    assert message.startswith(f"[[slot]] 'u': weights: column 'w' is {found}, expected {expected}, for 'u' is {of_slot}")
    assert "cast the column" in message


def test_unknown_weights_are_refused_with_what_is_near() -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with(WITH_WEIGHTS, slot=weighing(("tags", "tags_w")))
    assert str(refusal.value).startswith("[[slot]] 'tags': weights: no column 'tags_w' in the files; did you mean tag_w")


@pytest.mark.parametrize(
    ("weights", "data", "also"),
    [
        ("label", {}, "the label"),
        ("w", {"dense": ("w",)}, "in data.dense"),
        ("w", {"dense": ("w*",)}, "in data.dense"),
        ("w", {"exclude": ("w",)}, "in data.exclude"),
        ("w", {"exclude": ("w*",)}, "in data.exclude"),
        ("v", {}, "a [[slot]] of its own"),
        ("user", {}, "a [[slot]] of its own"),
    ],
)
def test_weights_that_are_also_something_else_are_refused(weights: str, data: dict[str, tuple[str, ...]], also: str) -> None:
    columns = {"label": pa.int8(), "user": pa.int64(), "w": pa.float32(), "v": pa.int64()}
    with pytest.raises(SchemaError) as refusal:
        infer_with(columns, slot=(*weighing(("user", weights)), Slot(name="v")), **data)
    assert str(refusal.value) == f"column {weights!r} has the weights of [[slot]] 'user' and is also {also}; keep one"


# --- nothing left -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "exclude"),
    [
        ({"label": pa.int8()}, ()),
        ({"label": pa.int8(), "t": pa.timestamp("us")}, ()),
        ({"label": pa.int8(), "u": pa.int64(), "x": pa.float32()}, ("u", "x")),
        ({"label": pa.int8(), "u": pa.int64(), "x": pa.float32()}, ("*",)),
    ],
)
def test_nothing_left_to_train_on(columns: dict[str, pa.DataType], exclude: tuple[str, ...]) -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with(columns, exclude=exclude)
    message = str(refusal.value)
    assert "no column is left to train on besides the label 'label'" in message
    assert ", ".join(columns) in message


# --- check_same -------------------------------------------------------------------------------------------------------

REFERENCE = {"label": pa.int8(), "u": pa.int64()}


def test_same_columns_pass_in_any_order() -> None:
    check_same(REFERENCE, dict(reversed(REFERENCE.items())), REFERENCE, "b.parquet", "a.parquet")


def test_columns_that_are_not_asked_about_may_differ() -> None:
    check_same(REFERENCE, {**REFERENCE, "new": pa.string()}, ["label", "u"], "b.parquet", "a.parquet")
    with pytest.raises(SchemaError):
        check_same(REFERENCE, {**REFERENCE, "new": pa.string()}, ["new"], "b.parquet", "a.parquet")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"label": pa.int8()}, r"b\.parquet: no column 'u', which a\.parquet has; .*same columns"),
        ({**REFERENCE, "v": pa.int8()}, r"b\.parquet: column 'v' is not in a\.parquet; .*same columns"),
        ({**REFERENCE, "u": pa.string()}, r"b\.parquet: column 'u' is string, but int64 in a\.parquet; .*one type"),
        ({**REFERENCE, "u": pa.int32()}, r"b\.parquet: column 'u' is int32, but int64 in a\.parquet; .*one type"),
    ],
)
def test_different_columns_are_refused(found: dict[str, pa.DataType], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        check_same(REFERENCE, found, {**REFERENCE, **found}, "b.parquet", "a.parquet")


# --- several labels, weights of samples, fewer negatives --------------------------------------------------------------

CONVERSIONS = {"click": pa.int8(), "buy": pa.bool_(), "call": pa.float32(), "w": pa.float64(), "x": pa.float32(), "u": pa.int64()}
TWO = {"label": "click", "extra_labels": ("buy",)}


def test_several_labels_are_read_in_the_order_of_the_knobs_and_are_no_features() -> None:
    schema = infer_with(CONVERSIONS, label="click", extra_labels=("call", "buy"), sample_weight="w")
    assert schema.labels == ("click", "call", "buy")
    assert schema.columns == ["click", "call", "buy", "w", "x", "u"]
    assert schema.features == ["x", "u"]
    assert (schema.dense, slot_names(schema), schema.left_out) == (("x",), ["u"], {})


def test_without_the_knobs_the_same_columns_are_features() -> None:
    schema = infer_with(CONVERSIONS, label="click")
    assert (schema.labels, schema.sample_weight) == (("click",), "")
    assert (schema.dense, slot_names(schema)) == (("call", "w", "x"), ["buy", "u"])
    assert schema.columns == ["click", *schema.features] == ["click", "call", "w", "x", "buy", "u"]


def test_features_have_the_weights_of_values_and_a_prediction_needs_no_label() -> None:
    columns = {**CONVERSIONS, "uw": pa.float32()}
    schema = infer_with(columns, slot=(Slot(name="u", weights="uw"),), **TWO, sample_weight="w", exclude=("call",))
    assert schema.features == ["x", "u", "uw"]
    assert schema.columns == ["click", "buy", "w", "x", "u", "uw"]


def test_globs_of_dense_and_exclude_leave_the_labels_and_the_weights_of_samples_what_they_are() -> None:
    schema = infer_with(CONVERSIONS, **TWO, sample_weight="w", dense=("x", "u"), exclude=("c*", "b*", "w"))
    assert (schema.labels, schema.sample_weight, schema.dense) == (("click", "buy"), "w", ("x", "u"))


def test_schema_json_says_which_labels_and_weights() -> None:
    written = infer_with(CONVERSIONS, **TWO, sample_weight="w").to_json()
    assert (written["label"], written["labels"], written["sample_weight"]) == ("click", ["click", "buy"], "w")
    written = infer_with(CONVERSIONS, label="click").to_json()
    assert (written["labels"], written["sample_weight"]) == (["click"], "")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"extra_labels": ("bye",)}, "data.extra_labels: no column 'bye' in the files; did you mean buy?; set --data"),
        ({"extra_labels": ("u", "buyy")}, "set --data.extra_labels to a column of numbers 0 and 1"),
        ({"extra_labels": ("s",)}, "data.extra_labels: column 's' is string, expected numbers 0 and 1; cast it, or set --data"),
        ({"extra_labels": ("click",)}, "column 'click' is the label and also in data.extra_labels; keep one"),
        ({"extra_labels": ("buy", "buy")}, "column 'buy' is a label and also in data.extra_labels; keep one"),
        ({"sample_weight": "weight"}, "data.sample_weight: no column 'weight' in the files"),
        ({"sample_weight": "weight"}, "set --data.sample_weight to a column of numbers from 0"),
        ({"sample_weight": "s"}, "data.sample_weight: column 's' is string, expected numbers from 0; cast it, or set --data"),
        ({"sample_weight": "click"}, "column 'click' is the label and also in data.sample_weight; keep one"),
        ({"sample_weight": "buy", "extra_labels": ("buy",)}, "column 'buy' is a label and also in data.sample_weight; keep one"),
        ({"extra_labels": ("buy",), "negative_rate": 0.5}, "leave out data.extra_labels, or set data.negative_rate = 1"),
    ],
)  # fmt: skip
def test_labels_and_weights_of_samples_that_cannot_be_are_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemaError) as refusal:
        infer_with({**CONVERSIONS, "s": pa.string()}, label="click", **data)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "also"), [("buy", "a label"), ("w", "the weight of a sample"), ("click", "the label")]
)  # fmt: skip
def test_a_label_or_weight_of_samples_that_is_also_used_by_a_slot_is_refused(name: str, also: str) -> None:
    for slot in (Slot(name=name), Slot(name="u", weights=name)):
        with pytest.raises(SchemaError) as refusal:
            infer_with(CONVERSIONS, slot=(slot,), **TWO, sample_weight="w")
        assert repr(name) in str(refusal.value)
        assert f"and is also {also}" in str(refusal.value)
        assert "; keep one" in str(refusal.value)


def test_fewer_negatives_of_one_label_are_fine() -> None:
    assert infer_with(CONVERSIONS, label="click", negative_rate=0.1, sample_weight="w").sample_weight == "w"
    assert infer_with(CONVERSIONS, **TWO, negative_rate=1.0).labels == ("click", "buy")

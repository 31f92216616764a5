"""The schema of an earlier run held against other files: what may differ there, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from flowps.config import Config, Data, Slot
from flowps.errors import SchemaError
from flowps.hub.saved import kind_of, schema_for
from flowps.hub.schema import infer

WHERE = "/data/new.parquet"
STRINGS = [
    pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.uint32(), pa.large_string()),
    pa.dictionary(pa.int32(), pa.string(), ordered=True),
]  # fmt: skip
INTEGERS = [
    pa.int8(), pa.int64(), pa.uint8(), pa.uint64(), pa.bool_(), pa.dictionary(pa.int8(), pa.int64()),
    pa.dictionary(pa.int16(), pa.uint8()), pa.dictionary(pa.int8(), pa.bool_()),
]  # fmt: skip
LISTS = [pa.list_, pa.large_list, lambda found: pa.list_(found, 3)]


@pytest.mark.parametrize("kind", ["string", "integer", "null"])
@pytest.mark.parametrize("wrap", [None, *LISTS], ids=["plain", "list", "large_list", "fixed_size_list"])
def test_the_kind_of_a_type_is_read_from_arrows_own_words(kind: str, wrap: Any) -> None:
    """As schema.json has them: str() of the type."""
    for found in {"string": STRINGS, "integer": INTEGERS, "null": [pa.null()]}[kind]:
        whole = found if wrap is None else wrap(found)
        assert kind_of(str(whole)) == (wrap is not None, kind), str(whole)


def test_a_list_whose_items_have_another_name_is_a_list() -> None:
    assert kind_of(str(pa.list_(pa.field("element", pa.string())))) == (True, "string")
    assert kind_of(str(pa.list_(pa.field("string: x", pa.int64())))) == (True, "integer")
    assert kind_of(str(pa.list_(pa.field("item", pa.int32(), nullable=False)))) == (True, "integer")


# --- the schema for other files ---------------------------------------------------------------------------------------

COLUMNS = {
    "click": pa.int8(), "buy": pa.int8(), "w": pa.float64(), "x": pa.float32(), "user": pa.int64(), "tags": pa.list_(pa.string()),
    "tw": pa.list_(pa.float32()),
}  # fmt: skip
SLOTS = (Slot(name="tags", weights="tw", dim=8, pooling="mean"), Slot(name="user", dim=4, optimizer="adam"))


def saved(columns: dict[str, pa.DataType] = COLUMNS, slots: tuple[Slot, ...] = SLOTS, **data: Any) -> dict[str, Any]:
    """schema.json of a run on such files, as it is read."""
    knobs = {"label": "click", "extra_labels": ("buy",), "sample_weight": "w", **data}
    schema = infer(columns, Config(slot=slots, data=Data(**knobs)))
    found: dict[str, Any] = json.loads(json.dumps(schema.to_json()))
    return found


def test_the_same_files_give_the_same_schema_but_for_the_weights_of_samples() -> None:
    """Those are about training."""
    found = schema_for(saved(), COLUMNS, WHERE, labelled=True)
    whole = infer(COLUMNS, Config(slot=SLOTS, data=Data(label="click", extra_labels=("buy",), sample_weight="w")))
    assert (found.labels, found.dense, found.slots) == (whole.labels, whole.dense, whole.slots)
    assert found.columns == ["click", "buy", "x", "user", "tags", "tw"]
    assert found.features == whole.features


def test_columns_in_another_order_and_more_of_them_do_not_matter() -> None:
    columns = {"new": pa.date32(), **dict(reversed(COLUMNS.items())), "more": pa.string()}
    found = schema_for(saved(), columns, WHERE, labelled=True)
    assert found.columns == ["click", "buy", "x", "user", "tags", "tw"]
    assert found.types == columns


@pytest.mark.parametrize("labelled", [False, True])
def test_labels_are_needed_only_where_they_are_wanted(labelled: bool) -> None:
    without = {name: found for name, found in COLUMNS.items() if name not in ("buy", "w")}
    if not labelled:
        assert schema_for(saved(), without, WHERE, labelled=False).features == ["x", "user", "tags", "tw"]
        return
    with pytest.raises(SchemaError) as refusal:
        schema_for(saved(), without, WHERE, labelled=True)
    assert str(refusal.value) == (
        f"{WHERE}: no column 'buy', which the run was trained on; the file has click, x, user, tags, tw"
    )  # fmt: skip


@pytest.mark.parametrize("found", [pa.int8(), pa.uint64(), pa.dictionary(pa.int8(), pa.int64()), pa.bool_()], ids=str)
def test_integers_of_any_width_have_the_same_signs(found: pa.DataType) -> None:
    assert schema_for(saved(), {**COLUMNS, "user": found}, WHERE, labelled=True).types["user"] == found


@pytest.mark.parametrize(
    "found",
    [pa.large_list(pa.string()), pa.list_(pa.dictionary(pa.int8(), pa.string())), pa.list_(pa.large_string(), 2), pa.string(),
     pa.list_(pa.null())],
    ids=str,
)  # fmt: skip
def test_strings_of_any_arrow_type_have_the_same_signs(found: pa.DataType) -> None:
    assert schema_for(saved(), {**COLUMNS, "tags": found}, WHERE, labelled=False).types["tags"] == found


def test_a_column_of_nulls_may_become_anything() -> None:
    """A run on a list without values in every row knows nothing of what they are."""
    columns = {**COLUMNS, "tags": pa.list_(pa.null())}
    for found in (pa.list_(pa.string()), pa.list_(pa.int64())):
        assert schema_for(saved(columns), {**COLUMNS, "tags": found}, WHERE, labelled=False)


@pytest.mark.parametrize(
    ("name", "found", "said"),
    [
        ("user", pa.string(), "column 'user' is string, but the run was trained on int64, whose values have other signs: cast"),
        ("user", pa.float64(), "column 'user' is double, but the run was trained on int64"),
        ("user", pa.dictionary(pa.int64(), pa.string()), "but the run was trained on int64, whose values have other signs"),
        ("tags", pa.list_(pa.int64()), "but the run was trained on list<"),
        ("tags", pa.list_(pa.float32()), "but the run was trained on list<"),
        ("x", pa.string(), "column 'x' is string, expected numbers, as in the run; cast it"),
        ("click", pa.string(), "column 'click' is string, expected numbers, as in the run; cast it"),
        ("buy", pa.null(), "column 'buy' is null, expected numbers, as in the run; cast it"),
    ],
)
def test_values_of_another_kind_are_refused(name: str, found: pa.DataType, said: str) -> None:
    with pytest.raises(SchemaError) as refusal:
        schema_for(saved(), {**COLUMNS, name: found}, WHERE, labelled=True)
    assert str(refusal.value).startswith(f"{WHERE}: ")
    assert said in str(refusal.value)


def test_many_missing_columns_are_counted_and_a_wide_file_is_not_listed_whole() -> None:
    columns = {"label": pa.int8(), **{f"c{i}": pa.int64() for i in range(9)}}
    of_run = saved(columns, (), label="label", extra_labels=(), sample_weight="")
    with pytest.raises(SchemaError) as refusal:
        schema_for(of_run, {"c0": pa.int64(), **{f"other{i}": pa.int64() for i in range(30)}}, WHERE, labelled=False)
    assert "no column 'c1', 'c2', 'c3', 'c4', 'c5' and 3 more, which the run was trained on" in str(refusal.value)
    assert str(refusal.value).endswith("other17, other18, …")


def test_weights_of_values_are_needed_too() -> None:
    with pytest.raises(SchemaError, match="no column 'tw', which the run was trained on"):
        schema_for(saved(), {name: of for name, of in COLUMNS.items() if name != "tw"}, WHERE, labelled=False)


@pytest.mark.parametrize("change", ["seed", "hash"])
def test_signs_that_were_made_in_another_way_are_refused(change: str) -> None:
    of_run = saved()
    if change == "seed":
        of_run["slots"][0]["seed"] = "0" * 16
    else:
        of_run["hash"] = "xxh32"
    with pytest.raises(SchemaError, match=r"made the signs of (user|its slots) in another way .* use the version that trained it"):
        schema_for(of_run, COLUMNS, WHERE, labelled=False)


def test_a_run_from_before_there_were_several_labels_has_one() -> None:
    of_run = saved(extra_labels=(), sample_weight="", exclude=("buy", "w"))
    del of_run["labels"], of_run["sample_weight"]
    assert schema_for(of_run, COLUMNS, WHERE, labelled=True).labels == ("click",)

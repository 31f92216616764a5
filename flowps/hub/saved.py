"""The schema of a run that has been, for other files: what `schema.json` says, held against the columns that are there.

Covers what a slot's type means for its signs: integers of any width give the same sign, and so do strings of any Arrow type, plain,
as dictionary or in a list; the integer 5 and the string "5" do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec
import pyarrow as pa

from flowps.config import Slot
from flowps.errors import SchemaError
from flowps.hub.hashing import slot_seed
from flowps.hub.schema import Schema, is_number, is_slot_type

Values = Literal["integer", "string", "null"]


def kind_of(arrow_type: str) -> tuple[bool, Values]:
    """Whether a slot's type, in Arrow's words as in schema.json, is a list; and what its values are."""
    is_list = re.match(r"(large_|fixed_size_)?list(_view)?<", arrow_type) is not None
    inner = arrow_type.rpartition(": ")[2] if is_list else arrow_type
    found = re.match(r"dictionary<values=(\w+)", inner) or re.match(r"(\w+)", inner)
    name = found[1] if found else ""
    return is_list, "string" if "string" in name else "null" if name == "null" else "integer"


def schema_for(saved: Mapping[str, Any], columns: Mapping[str, pa.DataType], where: str, labelled: bool) -> Schema:
    """The schema of the run with this schema.json, for files with these `columns`; `where`: the file that has them.

    labelled   whether the files need the labels

    Raises SchemaError for a column that is missing or whose values are of another kind, and where signs were made in another way.
    """
    slots = [msgspec.convert({k: v for k, v in slot.items() if k not in ("type", "seed")}, Slot) for slot in saved["slots"]]
    other = [slot["name"] for slot in saved["slots"] if slot["seed"] != f"{int(slot_seed(slot['name'])):016x}"]
    if other or saved["hash"] != "xxh64":
        raise SchemaError(
            f"the run made the signs of {', '.join(other[:3]) or 'its slots'} in another way than this version of flowps does: "
            "use the version that trained it"
        )
    labels = tuple(saved.get("labels", [saved["label"]]))
    schema = Schema(labels[0], tuple(saved["dense"]), tuple(slots), dict(columns), {}, labels[1:])
    _check_there([*(labels if labelled else ()), *schema.features], columns, where)
    for name in [*(labels if labelled else ()), *schema.dense]:
        if not is_number(columns[name]):
            raise SchemaError(f"{where}: column {name!r} is {columns[name]}, expected numbers, as in the run; cast it")
    for slot in saved["slots"]:
        name, found = slot["name"], columns[slot["name"]]
        kinds = {kind_of(str(found))[1], kind_of(slot["type"])[1]} - {"null"}
        if not is_slot_type(found) or len(kinds) > 1:
            raise SchemaError(
                f"{where}: column {name!r} is {found}, but the run was trained on {slot['type']}, whose values have other signs: "
                "cast the column"
            )
    return schema


def _check_there(names: Iterable[str], columns: Mapping[str, pa.DataType], where: str) -> None:
    missing = [name for name in names if name not in columns]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise SchemaError(
            f"{where}: no column {', '.join(map(repr, missing[:5]))}{more}, which the run was trained on; the file has "
            f"{', '.join(list(columns)[:20])}{', …' if len(columns) > 20 else ''}"
        )

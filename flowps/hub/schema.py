"""What each column of the sample files is: the label, a dense number, a slot, the weights of one, or left out.

Covers inference from Arrow types, the corrections of the config, and what is kept in `schema.json`. Does not read rows.
Called by the command when a run is planned, and by `decode`, which trusts it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import msgspec
import pyarrow as pa

from flowps.config import Config, Slot
from flowps.errors import SchemaError
from flowps.hub.hashing import slot_seed

HIVE_TYPE = pa.string()  # hive keys are strings: `hour=07` stays "07"


@dataclass(frozen=True)
class Schema:
    """The columns of a run. `dense` and `slots` are in the order of the batch's dense columns and slots.

    types          column → Arrow type as found in the files
    left_out       column → why it is not used
    extra_labels   label columns beside `label`
    sample_weight  the column with the weights of samples; "": there is none
    """

    label: str
    dense: tuple[str, ...]
    slots: tuple[Slot, ...]
    types: Mapping[str, pa.DataType]
    left_out: Mapping[str, str]
    extra_labels: tuple[str, ...] = ()
    sample_weight: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """All label columns, in the order of the model's logits."""
        return (self.label, *self.extra_labels)

    @property
    def features(self) -> list[str]:
        """Names of the columns that a prediction needs."""
        return [*self.dense, *(slot.name for slot in self.slots), *self.weights]

    @property
    def columns(self) -> list[str]:
        """Names of the columns that are read."""
        return [*self.labels, *([self.sample_weight] if self.sample_weight else []), *self.features]

    @property
    def weights(self) -> dict[str, list[str]]:
        """Columns that weigh the values of slots → the names of those slots."""
        found: dict[str, list[str]] = {}
        for slot in self.slots:
            if slot.weights:
                found.setdefault(slot.weights, []).append(slot.name)
        return found

    def to_json(self) -> dict[str, Any]:
        """The content of `schema.json`: everything that decides whether two runs train the same rows."""
        return {
            "label": self.label,
            "labels": list(self.labels),
            "sample_weight": self.sample_weight,
            "dense": list(self.dense),
            "hash": "xxh64",
            "slots": [
                {**msgspec.to_builtins(slot), "type": str(self.types[slot.name]), "seed": f"{int(slot_seed(slot.name)):016x}"}
                for slot in self.slots
            ],
            "left_out": dict(self.left_out),
        }


def infer(columns: Mapping[str, pa.DataType], config: Config) -> Schema:
    """The schema of files with these `columns` (hive keys included), corrected by `config.data` and its `[[slot]]` entries.

    Float columns are dense; integer, boolean, string, dictionary and list columns are slots. Times and vectors of floats are
    no features as they stand and are left out; the weights of a slot are nothing else. Raises SchemaError for a missing label, a
    name that is no column, weights that do not fit their slot, and a column whose type has no use, unless excluded.
    """
    data = config.data
    labels = _check_labels(columns, config)
    excluded = _matching(data.exclude, columns, "data.exclude")
    wanted_dense = _matching(data.dense, columns, "data.dense")
    wanted_slots = {slot.name for slot in config.slot}
    for name in wanted_slots - set(columns):
        raise SchemaError(f"[[slot]] {name!r}: no such column in the files{_closest(name, columns)}")
    for name in wanted_slots & (wanted_dense | excluded | {*labels}):
        raise SchemaError(
            f"column {name!r} has a [[slot]] entry and is also {labels.get(name) or 'in data.dense or in data.exclude'}; keep one"
        )
    taken = labels | dict.fromkeys(wanted_dense, "in data.dense") | dict.fromkeys(excluded, "in data.exclude")
    taken |= dict.fromkeys(wanted_slots, "a [[slot]] of its own")
    weights = {slot.weights for slot in config.slot if slot.weights}
    for slot in config.slot:
        if slot.weights:
            _check_weights(slot, columns, taken)

    dense, slots, left_out, refused = [], [], {}, []
    for name, found in columns.items():
        if name in labels or name in weights:
            continue
        if name in excluded:
            left_out[name] = "data.exclude"
        elif name in wanted_dense:
            if not is_number(found):
                raise SchemaError(f"data.dense: column {name!r} is {found}, not a number; leave it out of data.dense")
            dense.append(name)
        elif name not in wanted_slots and pa.types.is_floating(found):
            dense.append(name)
        elif name not in wanted_slots and (reason := _no_feature(found)):
            left_out[name] = reason
        elif is_slot_type(found):
            slots.append(config.slot_named(name))
        else:
            refused.append((name, found))
    if refused:
        raise SchemaError(
            f"cannot be a slot: {', '.join(f'{name!r} is {found}' for name, found in refused)}; "
            "slots are integers, booleans, strings, dictionaries and lists of those: "
            f"cast the column, or leave it out with --data.exclude {' '.join(repr(name) for name, _ in refused)}"
        )
    if not dense and not slots:
        raise SchemaError(f"no column is left to train on besides the label {data.label!r}; the files have: {', '.join(columns)}")
    return Schema(data.label, tuple(dense), tuple(slots), dict(columns), left_out, data.extra_labels, data.sample_weight)


def _check_labels(columns: Mapping[str, pa.DataType], config: Config) -> dict[str, str]:
    """The columns that say what is to be learned → what they are. Raises SchemaError for one that is missing or no number."""
    data = config.data
    found: dict[str, str] = {}
    for name, knob, what in [
        (data.label, "data.label", "the label"), *((name, "data.extra_labels", "a label") for name in data.extra_labels),
        *([(data.sample_weight, "data.sample_weight", "the weight of a sample")] if data.sample_weight else []),
    ]:  # fmt: skip
        expected = "numbers from 0" if knob == "data.sample_weight" else "numbers 0 and 1"
        if name not in columns:
            raise SchemaError(
                f"{knob}: no column {name!r} in the files{_closest(name, columns)}; set --{knob} to a column of {expected}"
            )
        if not is_number(columns[name]):
            raise SchemaError(f"{knob}: column {name!r} is {columns[name]}, expected {expected}; cast it, or set --{knob}")
        if name in found:
            raise SchemaError(f"column {name!r} is {found[name]} and also in {knob}; keep one")
        found[name] = what
    if data.negative_rate < 1 and data.extra_labels:
        raise SchemaError(
            "data.negative_rate: with several labels a sample that is negative for one may be positive for another, and no "
            "prediction could be corrected; leave out data.extra_labels, or set data.negative_rate = 1"
        )
    return found


def is_slot_type(found: pa.DataType) -> bool:
    """Whether a column of this type can be hashed into signs."""
    if _is_list(found):
        return pa.types.is_null(found.value_type) or (not _is_list(found.value_type) and is_slot_type(found.value_type))
    if pa.types.is_dictionary(found):
        return not _is_list(found.value_type) and is_slot_type(found.value_type)
    return bool(
        pa.types.is_integer(found) or pa.types.is_boolean(found) or pa.types.is_string(found) or pa.types.is_large_string(found)
    )


def check_same(
    reference: Mapping[str, pa.DataType], found: Mapping[str, pa.DataType], names: Iterable[str], where: str, other: str
) -> None:
    """Raise SchemaError unless the columns `names` have the same types in the files `where` (found) and `other` (reference)."""
    for name in names:
        if name not in found:
            raise SchemaError(f"{where}: no column {name!r}, which {other} has; files of one data set must have the same columns")
        if name not in reference:
            raise SchemaError(f"{where}: column {name!r} is not in {other}; files of one data set must have the same columns")
        if found[name] != reference[name]:
            raise SchemaError(
                f"{where}: column {name!r} is {found[name]}, but {reference[name]} in {other}; write both files with one type"
            )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a column's name is one of the patterns or matches one as a glob."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _is_list(found: pa.DataType) -> bool:
    return bool(pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found))


def is_number(found: pa.DataType) -> bool:
    """Whether a column of this type can be dense, or a label."""
    return bool(pa.types.is_floating(found) or pa.types.is_integer(found) or pa.types.is_boolean(found))


def _no_feature(found: pa.DataType) -> str | None:
    """Why a column of this type is left out when nobody asked for it, or None."""
    if pa.types.is_null(found):
        return "null in every row"
    if pa.types.is_temporal(found):
        return f"{found}: a time is no feature as it stands"
    if _is_list(found) and pa.types.is_floating(found.value_type):
        return f"{found}: a vector of numbers is neither dense nor a slot"
    return None


def _check_weights(slot: Slot, columns: Mapping[str, pa.DataType], taken: Mapping[str, str]) -> None:
    """Raise SchemaError unless the slot's weights are a column of numbers as nested as its own, and not `taken` for another use."""
    name = slot.weights
    if name not in columns:
        raise SchemaError(f"[[slot]] {slot.name!r}: weights: no column {name!r} in the files{_closest(name, columns)}")
    if name in taken:
        raise SchemaError(f"column {name!r} has the weights of [[slot]] {slot.name!r} and is also {taken[name]}; keep one")
    found, of_slot = columns[name], columns[slot.name]
    number = found.value_type if _is_list(found) else found
    if _is_list(found) != _is_list(of_slot) or not (pa.types.is_floating(number) or pa.types.is_integer(number)):
        expected = "a list of floats or integers" if _is_list(of_slot) else "floats or integers"
        raise SchemaError(
            f"[[slot]] {slot.name!r}: weights: column {name!r} is {found}, expected {expected}, for {slot.name!r} is {of_slot}; "
            "cast the column, or set weights to another"
        )


def _matching(patterns: Iterable[str], columns: Iterable[str], knob: str) -> set[str]:
    """Columns that match any of the globs; a glob that matches none is refused."""
    names = list(columns)
    found = set()
    for pattern in patterns:
        hits = {name for name in names if matches(name, [pattern])}
        if not hits:
            raise SchemaError(f"{knob}: {pattern!r} matches no column{_closest(pattern, names)}")
        found |= hits
    return found


def _closest(name: str, columns: Iterable[str]) -> str:
    names = list(columns)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return (
        f"; did you mean {' or '.join(near)}?" if near else f" (columns: {', '.join(names[:20])}{', …' if len(names) > 20 else ''})"
    )

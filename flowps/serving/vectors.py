"""The hash's test vectors of a bundle: values and the signs that they had when it was made.

They are made and checked by the code that scores, so that rows are never looked up by another hash than they were trained with;
other languages check theirs with the same file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from flowps.batch import Uint64
from flowps.config import Slot
from flowps.errors import BundleError
from flowps.hub.decode import Dense, decode
from flowps.hub.hashing import slot_seed
from flowps.hub.schema import Schema
from flowps.serving import manifest as files

RULE = "xxh64"
_TEXT = ("", "5", "a", "The quick brown fox jumps over the lazy dog", "東京")
_WHOLE = (0, 5, -1, 123456789012)  # none beyond 2**53, which JSON readers round


class SlotVectors(msgspec.Struct, frozen=True):
    """Of one slot: its seed, how it folds, and [value, sign] pairs; seed and signs as 16 hexadecimal digits."""

    slot: str
    seed: str
    hash_size: int
    signs: tuple[tuple[str | int, str], ...]


class Vectors(msgspec.Struct, frozen=True):
    """The content of hash.json. `rule`: docs/hashing.md explains it."""

    rule: str
    slots: tuple[SlotVectors, ...]


def signs_of(values: Sequence[Any] | pa.Array, slot: str, hash_size: int = 0) -> Uint64:
    """The uint64 signs of `values` of a slot, in order: strings, or integers and booleans; nulls have none and are left out."""
    array = values if isinstance(values, pa.Array) else pa.array(values)
    if pa.types.is_null(array.type):
        array = array.cast(pa.int64())
    schema = Schema("", (), (Slot(name=slot, hash_size=hash_size),), {}, {})
    return decode(pa.table({slot: array}), schema, Dense(), "values", labelled=False).slots[0].signs


def check_seed(slot: str, seed: str) -> bool:
    """Whether a slot's seed is this one, 16 hexadecimal digits as in schema.json."""
    return seed == _seed(slot)


def vectors_of(slots: Sequence[Slot]) -> Vectors:
    """As flowps hashes now."""
    return Vectors(RULE, tuple(_vectors(slot) for slot in slots))


def write_vectors(folder: Path, slots: Sequence[Slot]) -> None:
    """Write hash.json. Raises OSError."""
    (folder / files.HASH).write_bytes(msgspec.json.format(msgspec.json.encode(vectors_of(slots)), indent=1) + b"\n")


def check_vectors(folder: Path, slots: Sequence[Slot]) -> None:
    """Raise BundleError unless flowps hashes as it did when the bundle was made."""
    path = folder / files.HASH
    found: Vectors = files.decode(path, files.read_bytes(path), Vectors)
    if found.rule != RULE or [of.slot for of in found.slots] != [slot.name for slot in slots]:
        raise BundleError(f"{path}: has rule {found.rule!r} and {len(found.slots)} slots, expected {RULE!r} and {len(slots)}")
    for there, slot in zip(found.slots, slots, strict=True):
        what = _difference(there, slot)
        if what:
            raise BundleError(
                f"{path}: slot {there.slot!r} was hashed in another way when the bundle was made ({what} differs), so its rows "
                "would not be found; install the flowps that made the bundle, or export the run again"
            )


def _difference(there: SlotVectors, slot: Slot) -> str:
    """What is not as flowps hashes now; "" if nothing is."""
    if (there.seed, there.hash_size) != (_seed(slot.name), slot.hash_size):
        return "its seed or hash_size"
    for kind in (str, int):
        pairs = [(value, sign) for value, sign in there.signs if isinstance(value, kind)]
        now = signs_of([value for value, _ in pairs], slot.name, slot.hash_size)
        for (value, sign), found in zip(pairs, now, strict=True):
            if sign != f"{int(found):016x}":
                return f"the sign of {value!r}"
    return ""


def _vectors(slot: Slot) -> SlotVectors:
    values: tuple[str | int, ...] = (*_TEXT, *_WHOLE)
    signs = [*signs_of(_TEXT, slot.name, slot.hash_size), *signs_of(_WHOLE, slot.name, slot.hash_size)]
    pairs = tuple((value, f"{int(sign):016x}") for value, sign in zip(values, signs, strict=True))
    return SlotVectors(slot.name, _seed(slot.name), slot.hash_size, pairs)


def _seed(slot: str) -> str:
    return f"{int(slot_seed(slot)):016x}"

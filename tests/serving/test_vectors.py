"""The test vectors of the hash: as the documented rule says, by another implementation."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from flowps.config import Slot
from flowps.serving import signs_of
from flowps.serving.vectors import check_seed, check_vectors, vectors_of, write_vectors
from tests.serving.samples import sign

SLOTS = [Slot(name="user"), Slot(name="城市", hash_size=10), Slot(name="C1")]


def test_they_are_those_of_the_rule(tmp_path):
    write_vectors(tmp_path, SLOTS)
    check_vectors(tmp_path, SLOTS)
    content = json.loads((tmp_path / "hash.json").read_text())
    assert content["rule"] == "xxh64"
    assert [of["slot"] for of in content["slots"]] == ["user", "城市", "C1"]
    for slot, of in zip(SLOTS, content["slots"], strict=True):
        assert check_seed(slot.name, of["seed"])
        assert not check_seed(slot.name + "x", of["seed"])
        values = [value for value, _ in of["signs"]]
        assert {"", "5", 5, -1, 0} < set(values)
        assert any(isinstance(value, str) and not value.isascii() for value in values)
        for value, found in of["signs"]:
            assert int(found, 16) == sign(value, slot.name, slot.hash_size)


def test_every_slot_has_its_own():
    first, second, third = (dict(of.signs) for of in vectors_of(SLOTS).slots)
    assert not set(first.values()) & (set(second.values()) | set(third.values()))


@pytest.mark.parametrize(
    "values",
    [["a", "", "東京"], [5, -1, 2**63 - 1], [True, False], np.array([1, 2], np.int8), pa.array([2**64 - 1], pa.uint64()), []],
)
def test_signs_of_values(values):
    found = signs_of(values, "user", 7)
    assert found.dtype == np.uint64
    plain = values.to_pylist() if isinstance(values, pa.Array) else values
    assert found.tolist() == [sign(value if isinstance(value, str) else int(value), "user", 7) for value in plain]


def test_nulls_have_no_sign():
    assert signs_of(["a", None], "user").tolist() == [sign("a", "user")]
    assert signs_of([None], "user").tolist() == []

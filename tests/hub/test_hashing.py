"""The published hash: XXH64 against the xxhash package, the rule against a plain-Python twin, and the docs' table."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flowps.hub import hashing
from flowps.hub.hashing import (
    bag_lengths,
    hash_strings,
    hash_words,
    place_bags,
    place_singles,
    slot_seed,
    xxh64_bytes,
    xxh64_word,
)
from tests.hub import naive

Uint64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "hashing.md"

# slot, seed. Published in docs/hashing.md; never to change. XXH64 of "a" is also in other implementations' tests.
SEEDS = [
    ("a", 0xD24EC4F1A98C6E5B),
    ("user_id", 0xEA39110CED01931A),
    ("item_id", 0x1FDFB7804E2BFC23),
    ("C1", 0x1B1AA2E0DF451F4D),
    ("城市", 0x4BEC2A922E3701CA),
]

# value, slot, hash_size, sign. Published in docs/hashing.md; never to change.
VECTORS: list[tuple[str | int | bool, str, int, int]] = [
    ("", "user_id", 0, 0xA3066E61A728C381),
    ("a", "user_id", 0, 0x45E77D24252F409E),
    ("5", "user_id", 0, 0xD44B1FC0A1022F85),
    (5, "user_id", 0, 0xB9925E50922A147F),
    (5, "item_id", 0, 0x1EB6728B337BF7FF),
    (0, "user_id", 0, 0xC64C53BD582063DE),
    (-1, "user_id", 0, 0xF36ED9533DD602AB),
    (9223372036854775807, "user_id", 0, 0xAAB7CF6228CBEF93),
    (-9223372036854775808, "user_id", 0, 0xEDEAAA00DA68FB4F),
    (9223372036854775808, "user_id", 0, 0xEDEAAA00DA68FB4F),
    (18446744073709551615, "user_id", 0, 0xF36ED9533DD602AB),
    (False, "user_id", 0, 0xC64C53BD582063DE),
    (True, "user_id", 0, 0x2602DA9B46D16D98),
    ("abcd", "user_id", 0, 0x2B9CFE0CC7677981),
    ("68fd1e64", "C1", 0, 0x5B9D2CCA195FB7D7),
    ("0123456789abcdef0123456789abcde", "user_id", 0, 0x34808D3DF75C4CB9),
    ("0123456789abcdef0123456789abcdef", "user_id", 0, 0x60AC8FC3C994B059),
    ("The quick brown fox jumps over the lazy dog", "user_id", 0, 0xE7600F516854AD1F),
    ("東京", "城市", 0, 0xAC7019D1EFBF2D26),
    ("naïve café", "user_id", 0, 0x91A58FBA298EA22E),
    ("5", "user_id", 1000, 0x1392547B7E906805),
    (5, "user_id", 1000, 0x95F8D96FC84470CA),
    (5, "user_id", 1, 0xC64C53BD582063DE),
    (18446744073709551615, "城市", 4611686018427387904, 0xFCDFEE372D46604E),
]

EDGES = [0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1]
UINT64 = st.integers(0, 2**64 - 1) | st.sampled_from(EDGES)
HASH_SIZES = st.just(0) | st.integers(1, 2**62) | st.sampled_from([1, 2, 1000, 2**62])
quick = settings(max_examples=100, deadline=None)


def xxh64(data: bytes, start: int, stop: int, seed: int) -> int:
    return int(xxh64_bytes(np.frombuffer(data, np.uint8), start, stop, np.uint64(seed)))


# --- XXH64 ------------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(word=UINT64, seed=UINT64)
def test_word(word: int, seed: int) -> None:
    expected = xxhash.xxh64_intdigest(word.to_bytes(8, "little"), seed=seed)
    assert int(xxh64_word(np.uint64(word), np.uint64(seed))) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_bytes_of_every_length(seed: int) -> None:
    """Lengths 0 … 300 go through every branch: no stripe, stripes, words, half word, single bytes."""
    data = np.random.default_rng(7).bytes(300)
    for length in range(301):
        assert xxh64(data, 0, length, seed) == xxhash.xxh64_intdigest(data[:length], seed=seed), length


@quick
@given(data=st.binary(max_size=300), seed=UINT64)
def test_bytes(data: bytes, seed: int) -> None:
    assert xxh64(data, 0, len(data), seed) == xxhash.xxh64_intdigest(data, seed=seed)


@quick
@given(before=st.binary(max_size=9), data=st.binary(max_size=80), after=st.binary(max_size=9), seed=UINT64)
def test_bytes_of_an_unaligned_slice(before: bytes, data: bytes, after: bytes, seed: int) -> None:
    whole = before + data + after
    assert xxh64(whole, len(before), len(before) + len(data), seed) == xxhash.xxh64_intdigest(data, seed=seed)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", 0xEF46DB3751D8E999), (b"a", 0xD24EC4F1A98C6E5B), (b"abc", 0x44BC2CF5AD770999)],
)
def test_known_digests_of_xxh64(data: bytes, expected: int) -> None:
    """Against numbers rather than a package: both could not be wrong in the same way."""
    assert xxh64(data, 0, len(data), 0) == expected


# --- the rule ---------------------------------------------------------------------------------------------------------


@quick
@given(st.text(max_size=60))
@example("")
@example("user_id")
@example("城市")
@example("naïve café 🍰")
@example("x" * 33)
def test_slot_seed(name: str) -> None:
    found = slot_seed(name)
    assert isinstance(found, np.uint64)
    assert int(found) == naive.seed(name)


def test_a_name_in_another_unicode_form_is_another_slot() -> None:
    assert slot_seed("caf\u00e9") != slot_seed("cafe\u0301")


@quick
@given(words=st.lists(UINT64, max_size=20), slot=st.sampled_from(["", "user_id", "城市"]), hash_size=HASH_SIZES)
@example(words=EDGES, slot="user_id", hash_size=0)
@example(words=EDGES, slot="user_id", hash_size=3)
@example(words=[], slot="user_id", hash_size=0)
def test_hash_words(words: list[int], slot: str, hash_size: int) -> None:
    signs = np.zeros(len(words), np.uint64)
    hash_words(np.array(words, np.uint64), slot_seed(slot), np.uint64(hash_size), signs)
    assert signs.tolist() == [naive.sign(word, slot, hash_size) for word in words]


@quick
@given(
    texts=st.lists(st.text(max_size=50), max_size=10),
    before=st.binary(max_size=9),
    slot=st.sampled_from(["", "user_id", "城市"]),
    hash_size=HASH_SIZES,
)
@example(texts=[], before=b"", slot="user_id", hash_size=0)
@example(texts=["", "", ""], before=b"", slot="user_id", hash_size=0)
def test_hash_strings(texts: list[str], before: bytes, slot: str, hash_size: int) -> None:
    encoded = [text.encode() for text in texts]
    starts = len(before) + np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    signs = np.zeros(len(texts), np.uint64)
    data = np.frombuffer(before + b"".join(encoded), np.uint8)
    hash_strings(data, starts, slot_seed(slot), np.uint64(hash_size), signs)
    assert signs.tolist() == [naive.sign(text, slot, hash_size) for text in texts]


@pytest.mark.parametrize("hash_size", [1, 2, 7, 100])
def test_folding_leaves_at_most_hash_size_signs_spread_over_64_bits(hash_size: int) -> None:
    signs = np.zeros(2_000, np.uint64)
    hash_words(np.arange(2_000, dtype=np.uint64), slot_seed("s"), np.uint64(hash_size), signs)
    distinct = np.unique(signs)
    assert len(distinct) == hash_size
    assert int(distinct.max()) > 2**32


# --- placing ----------------------------------------------------------------------------------------------------------


@st.composite
def batches_of_bags(draw: st.DrawFn) -> tuple[Uint64, Int64, Int64, Int64, Int64]:
    """`signs` and `starts` of some bags, `rows` of them in any order, `bounds` of batches, and a gap before each."""
    lengths = st.integers(0, 4) | st.integers(0, 25)  # they are copied in eights
    bags = draw(st.lists(lengths.flatmap(lambda n: st.lists(UINT64, min_size=n, max_size=n)), min_size=1, max_size=8))
    rows = draw(st.lists(st.integers(0, len(bags) - 1), max_size=12))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    gaps = draw(st.lists(st.integers(0, 3), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    return (
        np.array([sign for bag in bags for sign in bag], np.uint64),
        np.cumsum([0, *map(len, bags)], dtype=np.int64),
        np.array(rows, np.int64),
        np.array([0, *cuts, len(rows)], np.int64),
        np.array(gaps, np.int64),
    )


def placed(bags: list[NDArray[Any]], rows: Int64, bounds: Int64, gaps: Int64) -> tuple[Int64, NDArray[Any]]:
    """Where each batch begins, and the output: a gap of zeros, then the bags of the batch, and so on."""
    nothing = bags[0][:0]
    parts, bases, n = [nothing], [], 0
    for lo, hi, gap in zip(bounds[:-1], bounds[1:], gaps, strict=True):
        batch = np.concatenate([nothing, *(bags[r] for r in rows[lo:hi])])
        bases.append(n + gap)
        parts += [np.zeros(gap, nothing.dtype), batch]
        n += gap + len(batch)
    return np.array(bases, np.int64), np.concatenate(parts)


@pytest.mark.parametrize("dtype", [np.uint64, np.float32], ids=["signs", "shares"])
@quick
@given(batches_of_bags())
def test_place_bags(dtype: type[np.generic], given_bags: tuple[Uint64, Int64, Int64, Int64, Int64]) -> None:
    signs, starts, rows, bounds, gaps = given_bags
    values = signs.astype(dtype)
    bases, expected = placed(np.split(values, starts[1:-1]), rows, bounds, gaps)
    ends = bases + np.array([sum(np.diff(starts)[rows[lo:hi]]) for lo, hi in pairwise(bounds)], np.int64)
    out = np.zeros(len(expected), dtype)
    place_bags(values, starts, rows, bounds, bases, ends, out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", [np.uint64, np.float32], ids=["signs", "shares"])
@quick
@given(batches_of_bags(), st.lists(UINT64, min_size=8, max_size=8))
def test_place_singles(dtype: type[np.generic], given_bags: tuple[Uint64, Int64, Int64, Int64, Int64], values: list[int]) -> None:
    _, _, rows, bounds, gaps = given_bags
    found = np.array(values, np.uint64).astype(dtype)
    bases, expected = placed(np.split(found, len(found)), rows, bounds, gaps)
    out = np.zeros(len(expected), dtype)
    place_singles(found, rows, bounds, bases, out)
    np.testing.assert_array_equal(out, expected)


@quick
@given(batches_of_bags())
def test_bag_lengths(given_bags: tuple[Uint64, Int64, Int64, Int64, Int64]) -> None:
    _, starts, rows, _, _ = given_bags
    lengths = np.full(len(rows), -1, np.int32)
    bag_lengths(starts, rows, lengths)
    np.testing.assert_array_equal(lengths, np.diff(starts)[rows])


# --- what is published ------------------------------------------------------------------------------------------------


def of_kernels(value: str | int | bool, slot: str, hash_size: int) -> int:
    """The sign by the kernels that `decode` calls."""
    out = np.zeros(1, np.uint64)
    if isinstance(value, str):
        data = np.frombuffer(value.encode(), np.uint8)
        hash_strings(data, np.array([0, len(data)], np.int64), slot_seed(slot), np.uint64(hash_size), out)
    else:
        hash_words(np.array([int(value) % 2**64], np.uint64), slot_seed(slot), np.uint64(hash_size), out)
    return int(out[0])


def of_docs(value: str | int | bool, slot: str, hash_size: int) -> int:
    """The sign by the function that docs/hashing.md gives to its readers."""
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(compile(ast.parse(code[1]), str(DOCS), "exec"), names)
    return int(names["sign"](value, slot, hash_size))


def tables_of_docs() -> list[list[list[str]]]:
    """The cells, without back-quotes, of each Markdown table in docs/hashing.md, heads and rules left out."""
    text = DOCS.read_text(encoding="utf-8")
    tables = re.findall(r"^\|[^\n]*\|\n\|(?:-+\|)+\n((?:\|[^\n]*\|\n)+)", text, re.MULTILINE)
    return [[[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in tables]


def test_vectors_are_distinct() -> None:
    assert len({(type(value), value, slot, hash_size) for value, slot, hash_size, _ in VECTORS}) == len(VECTORS) >= 20


@pytest.mark.parametrize("hash_of", [of_kernels, naive.sign, of_docs], ids=["kernels", "naive", "docs"])
@pytest.mark.parametrize(("value", "slot", "hash_size", "expected"), VECTORS)
def test_vectors(
    hash_of: Callable[[Any, str, int], int], value: str | int | bool, slot: str, hash_size: int, expected: int
) -> None:
    assert f"{hash_of(value, slot, hash_size):016X}" == f"{expected:016X}"


@pytest.mark.parametrize(("slot", "expected"), SEEDS)
def test_seed_vectors(slot: str, expected: int) -> None:
    assert f"{int(slot_seed(slot)):016X}" == f"{expected:016X}"


def test_docs_have_the_same_tables() -> None:
    seeds, vectors = tables_of_docs()
    assert [(json.loads(slot), int(seed, 16)) for slot, seed in seeds] == SEEDS
    found = [(json.loads(value), json.loads(slot), int(size), int(sign, 16)) for value, slot, size, sign in vectors]
    # By type too: JSON's `true` is not 1.
    assert [(type(row[0]), *row) for row in found] == [(type(row[0]), *row) for row in VECTORS]


def test_docs_and_module_state_the_same_rule() -> None:
    page = " ".join(DOCS.read_text(encoding="utf-8").split())
    assert hashing.__doc__ is not None
    for line in re.findall(r"^    ((?:seed|sign)\(.*)$", hashing.__doc__, re.MULTILINE):
        assert " ".join(line.split()) in page

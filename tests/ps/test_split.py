"""A slot's bags cut by sign range, and vectors moved between lines: as their twins, and nothing outside their outputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.ps.kernels import pool
from flowps.ps.kernels import split as kernels
from tests.ps import drawn, naive
from tests.ps.test_kernels import assert_guards, guarded

POOLINGS = {"sum": pool.SUM, "mean": pool.MEAN, "sqrtn": pool.SQRTN}
# Signs at which a range begins, and those before: 2^64 / parts, and where the upper half says so.
BORDERS = tuple((part * 2**64 // parts + off) & naive.WORD for parts in (2, 3, 5, 7) for part in range(parts) for off in (-1, 0))
signs = st.one_of(drawn.signs, st.sampled_from(BORDERS))
parts_of_a_slot = st.one_of(st.integers(1, 8), st.sampled_from((64, 1000, 1024)))
Shares = list[list[np.float32]]


@drawn.bounded(max_examples=300)
@given(sign=signs, parts=parts_of_a_slot)
def test_part_of(sign: int, parts: int) -> None:
    """As the twin; and the sign is within 2^32 of the range that 2^64 / parts gives."""
    found = kernels.part_of(np.uint64(sign), np.uint64(parts))
    assert found == naive.part_of(sign, parts)
    assert 0 <= found < parts
    assert found * 2**64 <= sign * parts < (found + 1) * 2**64 + parts * 2**32


@drawn.bounded(max_examples=200)
@given(two=st.lists(signs, min_size=2, max_size=2), parts=parts_of_a_slot)
def test_ranges_ascend(two: list[int], parts: int) -> None:
    """A larger sign is in no earlier range; the first sign is in the first range, the last in the last."""
    low, high = sorted(two)
    assert kernels.part_of(np.uint64(low), np.uint64(parts)) <= kernels.part_of(np.uint64(high), np.uint64(parts))
    assert kernels.part_of(np.uint64(0), np.uint64(parts)) == 0
    assert kernels.part_of(np.uint64(2**64 - 1), np.uint64(parts)) == parts - 1


@pytest.mark.parametrize("parts", [2, 4, 1024])
def test_ranges_of_a_power_of_two_are_exact(parts: int) -> None:
    """Each begins at its multiple of 2^64 / parts."""
    for part in range(1, parts):
        border = part * 2**64 // parts
        assert kernels.part_of(np.uint64(border - 1), np.uint64(parts)) == part - 1
        assert kernels.part_of(np.uint64(border), np.uint64(parts)) == part


def test_ranges_get_about_the_same_of_hashed_signs() -> None:
    """Signs are hashes: five standard deviations around the mean."""
    hashed = [naive.mix(value) for value in range(4000)]
    for parts in (2, 3, 7):
        counts = np.bincount([int(kernels.part_of(np.uint64(sign), np.uint64(parts))) for sign in hashed], minlength=parts)
        mean = len(hashed) / parts
        assert (abs(counts - mean) < 5 * np.sqrt(mean)).all()


def check_split(bags: drawn.Bags, slot: int, parts: int, pooling: str, shares: list[Shares] | None) -> None:
    """Slot number `slot` of a batch with these bags, and shares as they are, against the twin."""
    flat, offsets = drawn.arrays(bags)
    size = len(bags[slot])
    given_shares = np.array([share for of_slot in shares or [] for bag in of_slot for share in bag], np.float32)
    count = sum(map(len, bags[slot]))
    starts, whole_starts = guarded(parts + 1, -7, np.int64)
    lengths, whole_lengths = guarded(parts * size, -7, np.int32)
    split_signs, whole_signs = guarded(count, 7, np.uint64)
    # Without shares a sum has weights of one: none are asked for then.
    split_shares, whole_shares = guarded(count if shares is not None or pooling != "sum" else 0, np.nan)
    kernels.split(
        flat, given_shares, offsets, slot * size, size, np.uint64(parts), POOLINGS[pooling], starts, lengths, split_signs,
        split_shares,
    )  # fmt: skip
    expected = naive.split(bags[slot], parts, pooling, None if shares is None else shares[slot])
    pairs = [pair for part in expected for bag in part for pair in bag]
    np.testing.assert_array_equal(split_signs, np.array([sign for sign, _ in pairs], np.uint64))
    np.testing.assert_array_equal(lengths, [len(bag) for part in expected for bag in part])
    np.testing.assert_array_equal(starts, np.cumsum([0, *(sum(map(len, part)) for part in expected)]))
    if len(split_shares):
        np.testing.assert_array_equal(split_shares, np.array([weight for _, weight in pairs], np.float32))
    assert_guards(starts, whole_starts, -7)
    assert_guards(lengths, whole_lengths, -7)
    assert_guards(split_signs, whole_signs, 7)
    assert_guards(split_shares, whole_shares, np.nan)


@drawn.bounded(max_examples=300)
@given(data=st.data(), size=st.integers(1, 6), parts=parts_of_a_slot, pooling=st.sampled_from(sorted(POOLINGS)))
def test_split(data: st.DataObject, size: int, parts: int, pooling: str) -> None:
    """Bags of any signs, twice the same and empty ones among them, weighted or not: signs, lengths and weights, bit by bit."""
    bags = data.draw(drawn.bags(3, size, signs))
    shares: list[Shares] | None = None
    if data.draw(st.booleans(), "weighted"):
        random = data.draw(drawn.generators)
        shares = [[list(random.uniform(-1, 2, len(bag)).astype(np.float32)) for bag in samples] for samples in bags]
    check_split(bags, data.draw(st.integers(0, 2), "slot"), parts, pooling, shares)


@pytest.mark.parametrize("pooling", sorted(POOLINGS))
@pytest.mark.parametrize("bag", [[], [0], [2**63], [2**64 - 1], [0] * 5, [2**64 - 1, 0, 2**63, 0, 2**63 - 1, 2**64 - 1]])
def test_split_of_few_signs(bag: list[int], pooling: str) -> None:
    """The ends and the middle of all signs, alone, repeated and together; no signs at all."""
    shares = [[[np.float32(i + 1) for i in range(len(bag))], []]]
    for parts in (1, 2, 3, 8):
        check_split([[bag, []]], 0, parts, pooling, None)
        check_split([[bag, []]], 0, parts, pooling, shares)


@pytest.mark.parametrize("pooling", ["mean", "sqrtn"])
def test_weights_that_add_up_to_nothing(pooling: str) -> None:
    """A bag whose divisor is 0 is zeros, as in `pool`: no infinities."""
    zeros = [[[np.float32(0)] * 3, [np.float32(1), np.float32(-1)]]]
    bags: drawn.Bags = [[[1, 2**63, 5], [2**64 - 1, 7]]]
    check_split(bags, 0, 2, pooling, zeros)
    weights = [weight for part in naive.split(bags[0], 2, pooling, zeros[0]) for bag in part for _, weight in bag]
    assert np.isfinite(weights).all()


def test_a_batch_without_samples() -> None:
    """Nothing is written but the starts."""
    check_split([[]], 0, 3, "mean", None)


@pytest.mark.parametrize("pooling", sorted(POOLINGS))
def test_long_bags(pooling: str) -> None:
    """Hundreds of signs in a bag, in every range."""
    random = np.random.default_rng(0)
    bags = [[random.integers(0, 2**64, n, np.uint64).tolist() for n in (300, 0, 500)]]
    shares = [[list(random.uniform(0, 2, len(bag)).astype(np.float32)) for bag in bags[0]]]
    check_split(bags, 0, 5, pooling, None)
    check_split(bags, 0, 5, pooling, shares)


@drawn.bounded(max_examples=200)
@given(random=drawn.generators, widths=st.lists(st.integers(1, 40), max_size=5), size=st.integers(0, 6))
def test_move(random: np.random.Generator, widths: list[int], size: int) -> None:
    """Runs of any width from and to any column: those floats, bit by bit, NaN too, and no others."""
    order = random.permutation(len(widths))

    def columns(gaps: np.ndarray) -> tuple[np.ndarray, int]:
        """Where the runs begin when they stand in a drawn order with gaps between; and the width of all."""
        at, begins = int(gaps[0]), np.zeros(len(widths), np.int64)
        for k, gap in zip(order, gaps[1:], strict=True):
            begins[k] = at
            at += widths[k] + int(gap)
        return begins, at

    source_columns, source_width = columns(random.integers(0, 4, len(widths) + 1))
    random.shuffle(order)
    target_columns, target_width = columns(random.integers(0, 4, len(widths) + 1))
    source = random.integers(0, 2**32, (size, source_width), np.uint32).view(np.float32)
    target, whole = guarded(size * target_width, 3)
    expected = np.full((size, target_width), 3, np.float32)
    for at, to, width in zip(source_columns, target_columns, widths, strict=True):
        expected[:, to : to + width] = source[:, at : at + width]
    kernels.move(
        source.reshape(-1), source_width, source_columns, target, target_width, target_columns, np.array(widths, np.int64), size
    )
    np.testing.assert_array_equal(target.view(np.uint32), expected.reshape(-1).view(np.uint32))
    assert_guards(target, whole, 3)

"""Weights in 16 bits: how numbers are rounded into them, and what training makes of it."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.ps.kernels.vector import fill, lane, lanes8, lanes16, load_as, store_as, store_rounded
from flowps.ps.memory import row_bytes
from tests.ps import drawn, naive, twins

NARROW = ("bfloat16", "float16")
STORAGES = ("float32", *NARROW)
ELEMENT = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.int16}  # an array's type tells the kernels its storage
ODD_DIMS = (1, 3, 7, 17)
LARGEST = {"bfloat16": 3.3895313892515355e38, "float16": 65504.0}
SIGNS = [0, 2**64 - 1, 2**63, *(naive.mix(k) for k in range(1, 5))]


# --- the intrinsics, alone --------------------------------------------------------------------------------------------


@numba.njit
def _copy_all(source, to):
    """What is loaded from one storage, stored in another: lanes of all three widths, until nothing is left."""
    d = 0
    while d + 16 <= len(source):
        store_as(to, d, load_as(lanes16(), source, d))
        d += 16
    while d + 8 <= len(source):
        store_as(to, d, load_as(lanes8(), source, d))
        d += 8
    while d < len(source):
        store_as(to, d, load_as(lane(), source, d))
        d += 1


@numba.njit
def _round_often(value, keys, counter, out):
    """The same value once for each key, 16 at a time, then 8, then one, each with the counters from `counter` on."""
    for k in range(len(keys)):
        store_rounded(out, k * 25, fill(lanes16(), value), keys[k], counter)
        store_rounded(out, k * 25 + 16, fill(lanes8(), value), keys[k], counter + np.uint64(16))
        store_rounded(out, k * 25 + 24, fill(lane(), value), keys[k], counter + np.uint64(24))


def to_nearest(storage: str, values: Any) -> np.ndarray:
    """What `store_as` keeps of the values, float32."""
    wide = np.array(values, np.float32)
    out = np.zeros(len(wide), ELEMENT[storage])
    _copy_all(wide, out)
    return out if storage == "float32" else twins.bits_as_float32(storage, out.view(np.uint16))


def at_random(storage: str, value: float, keys: Any = None) -> np.ndarray:
    """What `store_rounded` keeps of the value, float32 [keys, 25]."""
    keys = np.arange(400, dtype=np.uint64) if keys is None else keys
    out = np.zeros(len(keys) * 25, ELEMENT[storage])
    _round_often(np.float32(value), keys, np.uint64(0), out)
    found = out if storage == "float32" else twins.bits_as_float32(storage, out.view(np.uint16))
    return found.reshape(-1, 25)


def inside(storage: str) -> st.SearchStrategy[float]:
    """float32 of any size that the storage has room for, most of them near where it is finest or coarsest."""
    largest = LARGEST[storage]
    return st.one_of(st.floats(-largest, largest, width=32), st.floats(-1, 1, width=32), st.floats(-(2.0**-14), 2.0**-14, width=32))


@pytest.mark.parametrize("storage", NARROW)
def test_all_stored_numbers_widen_to_what_they_stand_for(storage: str) -> None:
    """All 65,536 patterns, infinities and those that are not numbers among them."""
    bits = np.arange(1 << 16).astype(np.uint16)
    out = np.zeros(len(bits), np.float32)
    _copy_all(bits.view(ELEMENT[storage]), out)
    np.testing.assert_array_equal(out, twins.bits_as_float32(storage, bits))


@pytest.mark.parametrize("storage", NARROW)
def test_stored_numbers_come_back_bit_for_bit(storage: str) -> None:
    """Read and written again, nothing changes: not the sign of 0, not the subnormal numbers."""
    bits = np.arange(1 << 16).astype(np.uint16)
    finite = bits[np.isfinite(twins.bits_as_float32(storage, bits))]
    again = to_nearest(storage, twins.bits_as_float32(storage, finite))
    np.testing.assert_array_equal(again.view(np.uint32), twins.bits_as_float32(storage, finite).view(np.uint32))


@pytest.mark.parametrize("storage", NARROW)
@drawn.bounded(max_examples=200)
@given(data=st.data())
def test_to_the_nearest_and_half_to_even(storage: str, data: st.DataObject) -> None:
    """As the twin does, for any numbers and any number of lanes."""
    values = np.array(data.draw(st.lists(inside(storage), min_size=1, max_size=40)), np.float32)
    np.testing.assert_array_equal(to_nearest(storage, values).view(np.uint32), twins.nearest(storage, values).view(np.uint32))


@pytest.mark.parametrize("storage", NARROW)
def test_ties_between_any_two_neighbours(storage: str) -> None:
    """Exactly half-way the last bit becomes 0; a hair to either side the nearer one wins. Every pair of neighbours there is."""
    stored = twins.bits_as_float32(storage, np.arange(0x7C00 if storage == "float16" else 0x7F80))
    half = ((stored[:-1].astype(np.float64) + stored[1:]) / 2).astype(np.float32)
    keeps_half = half.astype(np.float64) * 2 == stored[:-1].astype(np.float64) + stored[1:]
    assert keeps_half.mean() > 0.99
    even = np.where(np.arange(len(half)) % 2 == 0, stored[:-1], stored[1:])[keeps_half]
    np.testing.assert_array_equal(to_nearest(storage, half[keeps_half]), even)
    np.testing.assert_array_equal(to_nearest(storage, -half[keeps_half]), -even)
    below, above = (np.nextafter(half, np.float32(towards)) for towards in (-np.inf, np.inf))
    finer = below > stored[:-1]  # the smallest bfloat16 are as fine as float32
    np.testing.assert_array_equal(to_nearest(storage, below[finer]), stored[:-1][finer])
    np.testing.assert_array_equal(to_nearest(storage, above[finer]), stored[1:][finer])


def test_float16_is_numpys(random: np.random.Generator) -> None:
    """Over all magnitudes that it has, and the subnormal ones."""
    values = (random.uniform(-2, 2, 200_000) * 2.0 ** random.integers(-26, 15, 200_000)).astype(np.float32)
    np.testing.assert_array_equal(to_nearest("float16", values), values.astype(np.float16).astype(np.float32))


def test_bfloat16_is_the_upper_half_of_float32(random: np.random.Generator) -> None:
    """Half a unit in the last place added to the bits, less one where they are even, and the lower half cut off."""
    bits = random.integers(0, 0x7F7F0000, 200_000).astype(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    np.testing.assert_array_equal(to_nearest("bfloat16", bits.view(np.float32)), twins.bits_as_float32("bfloat16", rounded))


def test_float32_is_kept_as_it_is(random: np.random.Generator) -> None:
    """Rounded either way, bit for bit."""
    values = random.normal(size=41).astype(np.float32)
    np.testing.assert_array_equal(to_nearest("float32", values), values)
    assert (at_random("float32", float(values[0])) == values[0]).all()


def test_float16_saturates() -> None:
    """Beyond the largest number is the largest number, rounded either way: there is no infinity in a row."""
    for value in (65504.0, 65510.0, 65519.0, 65520.0, 7e4, 1e30, float(np.finfo(np.float32).max)):
        assert to_nearest("float16", [value, -value]).tolist() == [65504.0, -65504.0]
        for sign in (1, -1):
            assert (at_random("float16", sign * value) == sign * 65504.0).all()


@pytest.fixture
def random() -> np.random.Generator:
    """The same numbers for each test."""
    return np.random.default_rng(0)


# --- stochastic rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", NARROW)
@drawn.bounded(max_examples=200)
@given(data=st.data(), first=drawn.signs)
def test_to_one_of_two_neighbours(storage: str, data: st.DataObject, first: int) -> None:
    """Never further, whatever the key; a number that can be stored stays."""
    value = np.float32(data.draw(inside(storage)))
    lower, upper = twins.neighbours(storage, [value])
    found = at_random(storage, float(value), np.arange(40, dtype=np.uint64) + np.uint64(first % 2**63))
    assert set(np.unique(found)) <= {lower[0], upper[0]}


@pytest.mark.parametrize("storage", NARROW)
def test_a_number_that_can_be_stored_stays(storage: str) -> None:
    """Powers of two, next to which the numbers below are closer; odd ones; subnormal ones; 0 and the largest."""
    powers = [2.0**k for k in range(-24, 16)]
    odd = [1 + 2.0**-7, 3 * 2.0**-24, 0.4990234375 if storage == "float16" else 0.498046875]
    for value in (0.0, *powers, *odd, LARGEST[storage]):
        for sign in (1, -1):
            assert (at_random(storage, sign * value) == sign * value).all(), sign * value


@pytest.mark.parametrize("storage", NARROW)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("at", [1.0, 0.9, -1.0, -0.3, 2.0**-14, 1.5 * 2.0**-20, -(2.0**-24), 100.0, 0.015625])
def test_the_mean_is_kept(storage: str, share: float, at: float) -> None:
    """A share of the way from a stored number to the next: so often the next one. 50,000 keys, five standard errors."""
    lower = twins.nearest(storage, [at])
    upper = np.abs(twins.bits_as_float32(storage, twins_bits(storage, np.abs(lower)) + 1)) * np.sign(lower)
    value = np.float32(lower[0] + share * (upper[0] - np.float64(lower[0])))
    exact = (float(value) - float(lower[0])) / (float(upper[0]) - float(lower[0]))
    found = at_random(storage, float(value), np.arange(2000, dtype=np.uint64))
    steps = (found.astype(np.float64) - float(lower[0])) / (float(upper[0]) - float(lower[0]))
    n = steps.size
    # Noise of 13 bits or more: a share is right to 2^-13.
    assert abs(steps.mean() - exact) < 5 * np.sqrt(exact * (1 - exact) / n) + 2.0**-13


def twins_bits(storage: str, values: Any) -> np.ndarray:
    """The bits of numbers that are stored exactly."""
    wide = np.array(values, np.float32)
    out = np.zeros(len(wide), ELEMENT[storage])
    _copy_all(wide, out)
    return out.view(np.uint16)


@pytest.mark.parametrize("storage", NARROW)
def test_lanes_and_keys_are_rounded_independently(storage: str) -> None:
    """Half-way between two numbers: no lane goes with its neighbour, no key with the next, whatever the width."""
    lower, upper = twins.neighbours(storage, [0.3])
    value = (lower[0] + upper[0]) / 2
    up = at_random(storage, float(value), np.arange(4000, dtype=np.uint64)) == upper[0]
    np.testing.assert_allclose(up.mean(axis=0), 0.5, atol=5 * 0.5 / np.sqrt(4000))
    for one, other in ((up[:, :-1], up[:, 1:]), (up[:-1], up[1:])):
        assert abs((one == other).mean() - 0.5) < 5 * 0.5 / np.sqrt(one.size)


@pytest.mark.parametrize("storage", NARROW)
def test_a_lane_is_rounded_as_it_would_be_alone(storage: str) -> None:
    """By key and counter only: so a row does not depend on how many lanes the processor has."""
    lower, upper = twins.neighbours(storage, [0.3])
    keys = np.arange(100, dtype=np.uint64)
    together = at_random(storage, float(lower[0] + upper[0]) / 2, keys)
    for counter in (3, 15, 20):
        out = np.zeros(len(keys) * 25, ELEMENT[storage])
        _round_often(np.float32((lower[0] + upper[0]) / 2), keys, np.uint64(counter), out)
        alone = twins.bits_as_float32(storage, out.view(np.uint16)).reshape(-1, 25)[:, 0]
        np.testing.assert_array_equal(alone, together[:, counter])


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dim", [*ODD_DIMS, 16, 32])
def test_rows_are_read_as_float32_and_state_stays_float32(storage: str, dim: int) -> None:
    """A sum of squares far too fine for 16 bits is there to the last bit, whatever the dim before it."""
    table = twins.table_of(drawn.slot("s", dim=dim, storage=storage, initial_accumulator=1 / 3))
    twins.begin(table, SIGNS)
    grads = np.random.default_rng(0).normal(size=(len(SIGNS), dim)).astype(np.float32)
    twins.push(table, SIGNS, grads)
    weights, state = twins.rows_of(table, SIGNS)
    assert (weights.dtype, state.dtype) == (np.float32, np.float32)
    assert (weights.shape, state.shape) == ((len(SIGNS), dim), (len(SIGNS), dim))
    np.testing.assert_allclose(state, np.float32(1 / 3) + grads * grads, rtol=2e-7)
    if storage != "float32":
        np.testing.assert_array_equal(weights, twins.nearest(storage, weights))


@pytest.mark.parametrize(
    ("storage", "name"),
    [
        ("bfloat16", "sgd"), ("bfloat16", "rowwise_adagrad"), ("bfloat16", "lamb"),
        ("float16", "sgd"), ("float16", "adam"), ("float16", "group_ftrl"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dim", [*ODD_DIMS, 24])
def test_a_step_lands_next_to_where_the_twin_goes(storage: str, name: str, dim: int) -> None:
    """From the stored weights, in float32, and only then rounded: to one of the two neighbours, in any row next to any other."""
    slot = drawn.slot("s", optimizer=name, dim=dim, storage=storage, initial_accumulator=0.1, init_scale=0.5)
    table = twins.table_of(slot)
    twins.begin(table, SIGNS)
    random = np.random.default_rng(dim)
    for push in range(1, 6):
        before = twins.rows_of(table, SIGNS)
        grads = random.normal(size=(len(SIGNS), dim)).astype(np.float32)
        twins.push(table, SIGNS, grads)
        weights, state = twins.rows_of(table, SIGNS)
        for n, grad in enumerate(grads):
            goal, goal_state = twins.step_row(slot, before[0][n], before[1][n], grad, push)
            np.testing.assert_allclose(state[n], goal_state, rtol=2e-4, atol=1e-4)
            lower, upper = twins.neighbours(storage, goal)
            near = np.abs(goal) * 1e-5 + 1e-7  # the twin's own distance
            assert (np.abs(weights[n]) >= np.abs(lower) - near).all()
            assert (np.abs(weights[n]) <= np.abs(upper) + near).all()


@pytest.mark.parametrize("storage", NARROW)
@pytest.mark.parametrize("dim", [1, 3, 16])
def test_steps_far_below_the_last_place_add_up(storage: str, dim: int) -> None:
    """The mean of many rows moves as in float32; rounded to nearest, no weight would ever move."""
    rows, pushes = 3000, 60
    unit = 2.0**-9 if storage == "bfloat16" else 2.0**-12  # between stored numbers from 0.25 to 0.5 and above
    step = unit / 40
    slot = drawn.slot("s", optimizer="sgd", dim=dim, storage=storage, learning_rate=1.0, init_scale=0.1, initializer="normal")
    table = twins.table_of(slot, capacity_rows=rows)
    signs = np.array([naive.mix(k) for k in range(rows)], np.uint64)
    # First to weights around 0.375, which none of the small steps takes out of [0.25, 0.5).
    twins.begin(table, signs)
    for _ in range(2):
        twins.push(table, signs, twins.rows_of(table, signs)[0] - np.random.default_rng(0).uniform(0.3, 0.45, (rows, dim)))
    first, _ = twins.rows_of(table, signs)
    assert ((first > 0.25 + unit) & (first < 0.5 - unit)).all()
    np.testing.assert_array_equal(twins.nearest(storage, first + np.float32(step)), first)
    for _ in range(pushes):
        twins.push(table, signs, np.full((rows, dim), -step))
    moved = (twins.rows_of(table, signs)[0] - first).astype(np.float64)
    # A push moves a weight by a unit once in 40 times. Rows with the same first weight go together, hence ten standard errors.
    error = np.sqrt(pushes * step * unit / moved.size)
    np.testing.assert_allclose(moved.mean(), pushes * step, atol=10 * error)
    assert 10 * error < 0.2 * pushes * step


@pytest.mark.parametrize("storage", NARROW)
def test_a_gradient_of_zero_moves_no_weight(storage: str) -> None:
    """However often: powers of two too, next to which the numbers below are closer."""
    dim = 17
    for scale in (1.0, 0.5, 2.0**-7, 0.3):
        table = twins.table_of(drawn.slot("s", optimizer="sgd", dim=dim, storage=storage, initializer="constant", init_scale=scale))
        first = twins.begin(table, SIGNS)
        for _ in range(10):
            twins.push(table, SIGNS, np.zeros((len(SIGNS), dim)))
        np.testing.assert_array_equal(twins.rows_of(table, SIGNS)[0], first)


@pytest.mark.parametrize("storage", NARROW)
def test_rounding_does_not_depend_on_the_order_of_arrival(storage: str) -> None:
    """The same rows, bit for bit, whichever came first and in whatever order they are in a batch."""
    slot = drawn.slot("s", optimizer="adagrad", dim=19, storage=storage)
    tables = [twins.table_of(slot), twins.table_of(slot)]
    orders = (np.arange(len(SIGNS)), np.arange(len(SIGNS))[::-1])
    random = np.random.default_rng(0)
    for _ in range(5):
        grads = random.normal(size=(len(SIGNS), 19))
        for table, order in zip(tables, orders, strict=True):
            twins.push(table, [SIGNS[k] for k in order], grads[order])
    for ours, others in zip(*(twins.rows_of(table, SIGNS) for table in tables), strict=True):
        np.testing.assert_array_equal(ours, others)


@pytest.mark.parametrize("storage", NARROW)
def test_training_reaches_the_goal(storage: str) -> None:
    """Rows pulled towards targets end next to them."""
    slot = drawn.slot("s", optimizer="adagrad", dim=7, storage=storage, learning_rate=0.2, initial_accumulator=0.1)
    table = twins.table_of(slot)
    target = np.random.default_rng(0).uniform(-1, 1, (len(SIGNS), 7))
    twins.begin(table, SIGNS)
    for _ in range(300):
        twins.push(table, SIGNS, twins.rows_of(table, SIGNS)[0] - target)
    np.testing.assert_allclose(twins.rows_of(table, SIGNS)[0], target, atol=0.02)


@pytest.mark.parametrize("storage", NARROW)
@pytest.mark.parametrize("dim", ODD_DIMS)
def test_an_unsound_gradient_leaves_a_narrow_row_bit_for_bit(storage: str, dim: int) -> None:
    """Nor does it touch the rows on either side of it in memory."""
    table = twins.table_of(drawn.slot("s", optimizer="sgd", dim=dim, storage=storage))
    twins.begin(table, SIGNS)
    before, _ = twins.rows_of(table, SIGNS)
    grads = np.zeros((3, dim))
    grads[1, dim - 1] = np.nan
    assert twins.push(table, [SIGNS[0], SIGNS[3], SIGNS[0]], grads) == 1
    np.testing.assert_array_equal(twins.rows_of(table, SIGNS[1:])[0], before[1:])
    assert table.stats().last_unsound == ("s", SIGNS[3])


def test_a_float16_weight_does_not_run_away() -> None:
    """It stops at the largest number, from where it comes back."""
    slot = drawn.slot("s", optimizer="sgd", dim=3, storage="float16", learning_rate=1.0, initializer="zeros")
    table = twins.table_of(slot)
    twins.push(table, [7], [[-1e6, 1e6, 1e12]])
    np.testing.assert_array_equal(twins.rows_of(table, [7])[0], [[65504, -65504, -65504]])
    twins.push(table, [7], [[65504, -65504, -65504]])
    np.testing.assert_array_equal(twins.rows_of(table, [7])[0], [[0, 0, 0]])


@pytest.mark.parametrize("storage", NARROW)
def test_row_bytes_halves_the_weights_only(storage: str) -> None:
    """Two to a float, an odd one in a float of its own; the state is as it was."""
    for dim, floats in ((16, 8), (17, 9), (1, 1)):
        for name, state in (("sgd", 0), ("adam", 2 * dim)):
            narrow = row_bytes(drawn.slot("s", optimizer=name, dim=dim, storage=storage))
            wide = row_bytes(drawn.slot("s", optimizer=name, dim=dim))
            assert wide - narrow == 4 * (dim - floats)
            assert narrow > 4 * (floats + state)

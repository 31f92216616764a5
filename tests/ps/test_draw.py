"""First weights of rows: the twin's to the bit or nearly, whatever the order; and, in number, the distribution they claim.

Seeds are fixed, so a test that passes once passes always; the bounds are such that a right generator with another seed would miss
one of them in less than a millionth of all cases.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flowps.config import Slot
from flowps.ps.table import Bags, Table
from tests.ps import drawn, naive, twins

EXACT = ("zeros", "constant", "uniform")
NORMALS = ("normal", "truncated_normal")
RANDOM = ("uniform", *NORMALS)
SCALE = 0.25
FALSE_ALARM = 1e-6
SIGMAS = 5.0  # a normal number is further out in 6e-7 of all cases


def first(slot: Slot, signs: Any, seed: int = 0) -> np.ndarray:
    """First weights of the signs' rows in a new table, float32 [n, dim]."""
    return twins.begin(Table([slot], [0], max(1, len(signs)), seed), signs)


# --- the twin ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initializer", [*EXACT, *NORMALS])
@drawn.bounded(max_examples=60)
@given(
    dim=drawn.dims, signs=st.lists(drawn.signs, min_size=1, max_size=5, unique=True), seed=drawn.seeds,
    scale=st.one_of(st.just(0.0), st.floats(1e-6, 100)), by_dim=st.booleans(),
)  # fmt: skip
def test_first_weights_are_the_twins(initializer: str, dim: int, signs: list[int], seed: int, scale: float, by_dim: bool) -> None:
    """To the bit; normal ones, which logarithm and cosine go into, to float32's rounding."""
    slot = drawn.slot("s", dim=dim, initializer=initializer, init_scale=scale, init_by_dim=by_dim)
    expected = np.array([twins.first_weights(slot, sign, seed) for sign in signs])
    found = first(slot, signs, seed)
    if initializer in EXACT:
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-12 * scale)


@pytest.mark.parametrize("initializer", RANDOM)
@drawn.bounded(max_examples=30)
@given(data=st.data(), dim=drawn.dims, seed=drawn.seeds)
def test_first_weights_do_not_depend_on_the_order_of_arrival(initializer: str, data: st.DataObject, dim: int, seed: int) -> None:
    """Nor on what else there is, in which slot of the table it came, or in how many lookups."""
    slot = drawn.slot("s", dim=dim, initializer=initializer)
    signs = data.draw(st.lists(drawn.signs, min_size=1, max_size=8, unique=True))
    expected = first(slot, signs, seed)
    shuffled = data.draw(st.permutations(signs))
    table = Table([slot], [0], 100, seed)
    cut = data.draw(st.integers(0, len(signs)))
    for some in (shuffled[:cut], [3], shuffled[cut:]):
        twins.begin(table, some)
    np.testing.assert_array_equal(twins.rows_of(table, signs)[0], expected)


@pytest.mark.parametrize("initializer", RANDOM)
def test_a_weight_does_not_depend_on_the_lanes_it_was_drawn_in(initializer: str) -> None:
    """Weight d of a row is the same whatever the dim, but for those of a truncated normal that were drawn again."""
    rows = {dim: first(drawn.slot("s", dim=dim, initializer=initializer), range(200)) for dim in (1, 7, 8, 15, 16, 31, 40)}
    for dim, found in rows.items():
        same = found == rows[40][:, :dim]
        assert same.mean() > 0.9 if initializer == "truncated_normal" else same.all()


def test_each_slot_of_a_table_has_its_own_initializer() -> None:
    """Slots share a table however their rows begin."""
    slots = [drawn.slot(name, initializer=name, init_scale=0.25 * (k + 1)) for k, name in enumerate((*EXACT, *NORMALS))]
    table = twins.table_of(*slots)
    signs = np.arange(10, 10 + len(slots), dtype=np.uint64)
    places = np.arange(len(slots))
    bags = Bags(signs, np.arange(len(slots) + 1, dtype=np.int32), 1, places, places * 8)
    out = np.empty((1, len(slots) * 8), np.float32)
    table.pool(table.find(bags), out)
    expected = [twins.first_weights(slot, int(sign), 0) for slot, sign in zip(slots, signs, strict=True)]
    np.testing.assert_allclose(out.reshape(-1, 8), expected, rtol=3e-7, atol=1e-12)


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
@pytest.mark.parametrize("initializer", ["constant", *RANDOM])
@pytest.mark.parametrize("dim", [1, 7, 16, 27])
def test_narrow_rows_begin_with_the_nearest_numbers(storage: str, initializer: str, dim: int) -> None:
    """What float32 rows begin with, rounded to nearest, half to even."""
    signs = range(50)
    wide = first(drawn.slot("s", dim=dim, initializer=initializer, init_scale=0.3), signs)
    narrow = first(drawn.slot("s", dim=dim, initializer=initializer, init_scale=0.3, storage=storage), signs)
    np.testing.assert_array_equal(narrow, twins.nearest(storage, wide))


@pytest.mark.parametrize("initializer", ["constant", *RANDOM])
def test_by_dim_divides_the_scale_by_the_root_of_dim(initializer: str) -> None:
    """A dim of 16 makes a quarter of every weight."""
    whole, divided = (
        first(drawn.slot("s", dim=16, initializer=initializer, init_scale=0.5, init_by_dim=by_dim), range(20))
        for by_dim in (False, True)
    )
    np.testing.assert_array_equal(divided, whole / 4)


# --- the distribution -------------------------------------------------------------------------------------------------

DIM = 32
CONSECUTIVE = np.arange(8000, dtype=np.uint64)
HASHED = np.array([naive.mix(k) for k in range(8000)], np.uint64)

DISTRIBUTIONS = {
    "uniform": stats.uniform(-SCALE, 2 * SCALE),
    "normal": stats.norm(0, SCALE),
    "truncated_normal": stats.truncnorm(-2, 2, 0, SCALE),
}


@pytest.fixture(scope="module", params=RANDOM)
def initializer(request: pytest.FixtureRequest) -> str:
    """The random ones."""
    return request.param


@pytest.fixture(scope="module", params=["consecutive", "hashed"])
def rows(request: pytest.FixtureRequest, initializer: str) -> np.ndarray:
    """First weights of 8000 signs: the worst ones there are, one after the other, and those that slots have."""
    signs = CONSECUTIVE if request.param == "consecutive" else HASHED
    return first(drawn.slot("s", dim=DIM, initializer=initializer, init_scale=SCALE), signs, seed=7).astype(np.float64)


def test_mean_and_variance(initializer: str, rows: np.ndarray) -> None:
    """Within five of their standard errors."""
    of = DISTRIBUTIONS[initializer]
    n = rows.size
    assert abs(rows.mean() - of.mean()) < SIGMAS * of.std() / math.sqrt(n)
    kurtosis = float(of.stats("k")) + 3
    assert abs(rows.var() - of.var()) < SIGMAS * of.var() * math.sqrt((kurtosis - 1) / n)


def test_range(initializer: str, rows: np.ndarray) -> None:
    """No weight is outside, and the ends are reached as nearly as so many numbers do."""
    if initializer == "normal":
        # Of n numbers the largest magnitude is 4.7 to 5.1 deviations in most cases, 3.7 to 7 in all but a millionth.
        assert 3.7 * SCALE < np.abs(rows).max() < 7 * SCALE
        return
    low, high = DISTRIBUTIONS[initializer].support()
    assert low <= rows.min()
    assert rows.max() <= high
    if initializer == "uniform":
        assert rows.max() < high
    near = DISTRIBUTIONS[initializer].ppf([20 / rows.size, 1 - 20 / rows.size])
    assert rows.min() < near[0]
    assert rows.max() > near[1]


def test_kolmogorov_and_smirnov_find_nothing(initializer: str, rows: np.ndarray) -> None:
    """All weights together, and the first and the last column of rows alone."""
    of = DISTRIBUTIONS[initializer]
    for sample in (rows.reshape(-1), rows[:, 0], rows[:, -1]):
        assert stats.kstest(sample, of.cdf).pvalue > FALSE_ALARM


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's, in its standard errors under independence."""
    return float(np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1]) * math.sqrt(one.size)


def test_neighbouring_dims_are_independent(rows: np.ndarray) -> None:
    """At any distance up to 16, of the numbers and of their magnitudes (what a word's halves would share)."""
    for distance in range(1, 17):
        one, other = rows[:, :-distance], rows[:, distance:]
        assert abs(correlation(one, other)) < SIGMAS
        assert abs(correlation(np.abs(one), np.abs(other))) < SIGMAS


def test_neighbouring_signs_are_independent(rows: np.ndarray) -> None:
    """Rows of signs one apart, and two, and 64."""
    for distance in (1, 2, 64):
        one, other = rows[:-distance], rows[distance:]
        assert abs(correlation(one, other)) < SIGMAS
        assert abs(correlation(np.abs(one), np.abs(other))) < SIGMAS
        assert abs(correlation(one[:, :-1], other[:, 1:])) < SIGMAS


def test_pairs_fill_the_square(initializer: str, rows: np.ndarray) -> None:
    """Neighbours in a row and in a column, each pair put into one of 16 × 16 cells of the same probability: chi squared."""
    cells = np.clip((DISTRIBUTIONS[initializer].cdf(rows) * 16).astype(int), 0, 15)
    for one, other in ((cells[:, ::2], cells[:, 1::2]), (cells[::2], cells[1::2])):
        counts = np.bincount((one * 16 + other).reshape(-1), minlength=256)
        assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_no_row_comes_twice(rows: np.ndarray) -> None:
    """8000 signs, 8000 rows."""
    assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize("seeds", [(0, 1), (1, 2), (0, 2**63 - 1), (2**62, 2**62 + 1)])
def test_seeds_make_other_rows(initializer: str, seeds: tuple[int, int]) -> None:
    """Nothing of one seed's rows is left in another's, not even at another sign or dim."""
    slot = drawn.slot("s", dim=DIM, initializer=initializer, init_scale=SCALE)
    one, other = (first(slot, HASHED[:2000], seed).astype(np.float64) for seed in seeds)
    assert (one == other).mean() < 1e-4
    assert abs(correlation(one, other)) < SIGMAS
    assert abs(correlation(np.abs(one), np.abs(other))) < SIGMAS


@pytest.mark.parametrize("other", [1, 2**32, 2**63])
def test_one_bit_of_a_sign_makes_another_row(initializer: str, other: int) -> None:
    """Wherever the bit is."""
    slot = drawn.slot("s", dim=DIM, initializer=initializer, init_scale=SCALE)
    signs = np.unique(HASHED[:2000] & ~np.uint64(other))
    one, flipped = (first(slot, of).astype(np.float64) for of in (signs, signs | np.uint64(other)))
    assert abs(correlation(one, flipped)) < SIGMAS
    assert abs(correlation(np.abs(one), np.abs(flipped))) < SIGMAS

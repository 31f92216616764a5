"""Each kernel against its slow twin, over all of uint64; and what the compiler made of them."""

from __future__ import annotations

import functools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.ps.kernels import index, pool, update
from tests.ps import drawn, naive

GUARD = 64  # elements before and after every array that a kernel writes; they must stay as they were
KINDS = {"sgd": update.SGD, "adagrad": update.ADAGRAD}


def guarded(size: int, dtype: Any, fill: float) -> tuple[np.ndarray, np.ndarray]:
    """An array of `size` elements, and the larger one it lies in; all hold `fill`."""
    whole = np.full(size + 2 * GUARD, fill, dtype)
    return whole[GUARD : GUARD + size], whole


def frozen(array: np.ndarray) -> np.ndarray:
    """The array, read-only, as gradients are: a writable one would compile the kernel a second time."""
    array.flags.writeable = False
    return array


def assert_guards(whole: np.ndarray, fill: float) -> None:
    """Nothing was written outside the array."""
    np.testing.assert_array_equal(whole[:GUARD], fill)
    np.testing.assert_array_equal(whole[len(whole) - GUARD :], fill)


# --- index ------------------------------------------------------------------------------------------------------------


Ranges = list[tuple[int, int]]


@st.composite
def ranges_of_signs(draw: st.DrawFn, of: st.SearchStrategy[int], most: int = 12) -> tuple[list[int], Ranges]:
    """Signs, and ascending ranges of them with gaps between: the slots of one table in a batch of several tables."""
    pieces = draw(st.lists(st.tuples(st.lists(of, max_size=most), st.booleans()), min_size=1, max_size=6))
    signs: list[int] = []
    ranges = []
    for piece, is_range in pieces:
        if is_range:
            ranges.append((len(signs), len(signs) + len(piece)))
        signs += piece
    return signs, ranges or [(0, 0)]


def call_find(signs: list[int], ranges: Ranges, words: np.ndarray) -> list[int]:
    """`index.find`, lists in and out."""
    starts, stops = np.array(ranges, np.int64).reshape(-1, 2).T.copy()
    rows, whole = guarded(int((stops - starts).sum()), np.int32, -7)
    index.find(np.array(signs, np.uint64), starts, stops, words, naive.shift_of(len(words) // 2), rows)
    assert_guards(whole, -7)
    return rows.tolist()


@drawn.bounded(max_examples=150)
@given(data=st.data(), size_bits=st.integers(1, 7))
def test_find(data: st.DataObject, size_bits: int) -> None:
    """Known signs give their rows and unknown ones -1, up to an index with a single free entry."""
    size = 1 << size_bits
    known_signs = data.draw(st.lists(drawn.signs, max_size=size - 1, unique=True))
    rows = data.draw(st.permutations(range(len(known_signs))))
    known = {sign: (row, row % 3) for sign, row in zip(known_signs, rows, strict=True)}
    of = st.one_of(drawn.signs, st.sampled_from(known_signs)) if known else drawn.signs
    signs, ranges = data.draw(ranges_of_signs(of, most=40))
    assert call_find(signs, ranges, naive.encode(known, size)) == naive.find(signs, ranges, known)


def test_find_wraps_around_the_end_of_the_index() -> None:
    """Six signs want the last entry of sixteen: five of them stand at the beginning, and a seventh is not there."""
    *signs, absent = drawn.LAST_HOME[:7]
    assert {naive.home(sign, 16) for sign in (*signs, absent)} == {15}
    words = naive.encode({sign: (row, 0) for row, sign in enumerate(signs)}, 16)
    assert np.flatnonzero(words[1::2]).tolist() == [0, 1, 2, 3, 4, 15]
    assert call_find([*signs, absent], [(0, 7)], words) == [0, 1, 2, 3, 4, 5, -1]


def test_find_reads_no_sign_past_the_array() -> None:
    """The signs to prefetch end with the array, whatever its length modulo the distance."""
    known = {sign: (row, 0) for row, sign in enumerate(drawn.EDGES)}
    words = naive.encode(known, 16)
    for length in (1, index.AHEAD - 1, index.AHEAD, index.AHEAD + 1, 2 * index.AHEAD + 3):
        signs = [drawn.EDGES[i % len(drawn.EDGES)] for i in range(length)]
        assert call_find(signs, [(0, length)], words) == [i % len(drawn.EDGES) for i in range(length)]


@drawn.bounded(max_examples=120)
@given(data=st.data(), dim=drawn.dims, state_width=st.integers(0, 20), seed=drawn.seeds, first_bits=st.integers(1, 5))
def test_find_or_create(data: st.DataObject, dim: int, state_width: int, seed: int, first_bits: int) -> None:
    """Rows, first values, and where it stops and goes on when the index has to grow, equal the twin's."""
    signs, ranges = data.draw(ranges_of_signs(drawn.signs))
    slots = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(ranges), max_size=len(ranges)))
    scale = data.draw(st.lists(st.floats(0, 100, width=32), min_size=len(ranges), max_size=len(ranges)))
    state = data.draw(st.sampled_from((0.0, 0.1)))
    stride, capacity = dim + state_width, len(signs)
    known: naive.Known = {}
    values: list[np.ndarray] = []
    twin = (signs, ranges, slots, known, values)

    starts, stops = np.array(ranges, np.int64).reshape(-1, 2).T.copy()
    rows, all_rows = guarded(int((stops - starts).sum()), np.int32, -7)
    arena, all_arena = guarded(capacity * stride, np.float32, np.nan)
    progress = np.zeros(3, np.int64)
    words = np.zeros(2 << first_bits, np.uint64)
    max_rows = 0
    while True:
        done = index.find_or_create(
            np.array(signs, np.uint64), starts, stops, np.array(slots, np.uint64), words,
            naive.shift_of(len(words) // 2), rows, progress, max_rows, arena, dim, stride, np.float32(state),
            np.array(scale, np.float32), np.uint64(seed),
        )  # fmt: skip
        # The twin starts over each time: the signs it knows by then give the same rows again.
        twin_done, twin_rows, twin_progress = naive.find_or_create(*twin, max_rows, dim, stride, state, scale, seed)
        assert done == twin_done
        assert rows[: len(twin_rows)].tolist() == twin_rows
        assert (rows[len(twin_rows) :] == -7).all()
        assert progress.tolist() == twin_progress
        assert naive.decode(words) == known
        if done:
            break
        max_rows += 1 + max_rows // 2
        if max_rows >= len(words) // 2:
            larger = np.zeros(2 * len(words), np.uint64)
            index.rebuild(words, larger, naive.shift_of(len(words)))
            words = larger
    assert_guards(all_rows, -7)
    assert_guards(all_arena, np.nan)
    np.testing.assert_array_equal(arena[: len(values) * stride], np.array(values, np.float32).reshape(-1))
    assert np.isnan(arena[len(values) * stride :]).all()
    assert call_find(signs, ranges, words) == rows.tolist()


def created(signs: np.ndarray, dim: int, seed: int, scale: float) -> np.ndarray:
    """First weights of distinct signs, float32 [n, dim]."""
    n = len(signs)
    words = np.zeros(4 << n.bit_length(), np.uint64)
    rows, arena = np.empty(n, np.int32), np.empty(n * dim, np.float32)
    assert index.find_or_create(
        signs, np.array([0]), np.array([n]), np.array([0], np.uint64), words, naive.shift_of(len(words) // 2), rows,
        np.zeros(3, np.int64), n, arena, dim, dim, np.float32(0), np.array([scale], np.float32), np.uint64(seed),
    )  # fmt: skip
    return arena.reshape(n, dim)


def test_first_weights_are_splitmix64() -> None:
    """The published output of SplitMix64 from the state 1234567, its upper 24 bits spread over [-1, 1)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    weights = created(np.array([1234567], np.uint64), 4, seed=0, scale=1)
    assert weights[0].tolist() == [(word >> 40) / 2**23 - 1 for word in published]


def test_first_weights_are_uniform() -> None:
    """Of sequential signs, the worst that can come: mean, variance and range of a uniform, and no correlation."""
    n, dim, scale = 20_000, 4, 0.01
    weights = created(np.arange(n, dtype=np.uint64), dim, seed=7, scale=scale).astype(np.float64) / scale
    assert weights.min() >= -1
    assert weights.max() < 1
    deviation = 1 / np.sqrt(3 * n)
    assert np.abs(weights.mean(axis=0)).max() < 5 * deviation
    np.testing.assert_allclose((weights**2).mean(axis=0), 1 / 3, atol=5 * deviation)
    assert np.abs(np.corrcoef(weights.T) - np.eye(dim)).max() < 5 / np.sqrt(n)
    assert np.abs(np.corrcoef(weights[:-1, 0], weights[1:, 0])[0, 1]) < 5 / np.sqrt(n)
    other_seed = created(np.arange(n, dtype=np.uint64), dim, seed=8, scale=scale).astype(np.float64) / scale
    assert np.abs(np.corrcoef(weights[:, 0], other_seed[:, 0])[0, 1]) < 5 / np.sqrt(n)


@drawn.bounded(max_examples=100)
@given(data=st.data(), size_bits=st.integers(1, 6), growth_bits=st.integers(1, 3))
def test_rebuild_and_entries(data: st.DataObject, size_bits: int, growth_bits: int) -> None:
    """A larger index holds exactly what the old one did, every sign is found in it, the list names each row once."""
    size, larger_size = 1 << size_bits, 1 << (size_bits + growth_bits)
    signs = data.draw(st.lists(drawn.signs, max_size=size - 1, unique=True))
    slots = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(signs), max_size=len(signs)))
    known = {sign: (row, slot) for row, (sign, slot) in enumerate(zip(signs, slots, strict=True))}
    larger, whole = guarded(2 * larger_size, np.uint64, 0)
    index.rebuild(naive.encode(known, size), larger, naive.shift_of(larger_size))
    assert_guards(whole, 0)
    assert naive.decode(larger) == known
    assert call_find(signs, [(0, len(signs))], larger) == list(range(len(signs)))

    listed, all_listed = guarded(len(signs), np.uint64, 3)
    listed_slots, all_slots = guarded(len(signs), np.int32, -7)
    index.entries(larger, listed, listed_slots)
    assert_guards(all_listed, 3)
    assert_guards(all_slots, -7)
    assert listed.tolist() == signs
    assert listed_slots.tolist() == slots


# --- pool and update --------------------------------------------------------------------------------------------------


class Pooled:
    """A drawn call of `pool` or `push`: some slots of a batch, out of order, at scattered columns with gaps between."""

    def __init__(self, random: np.random.Generator, dim: int, state_width: int, unknown: bool) -> None:
        self.dim, self.stride = dim, dim + state_width
        self.size = int(random.integers(1, 9))
        num_slots = int(random.integers(1, 6))
        self.positions = random.permutation(num_slots)[: random.integers(1, num_slots + 1)].astype(np.int64)
        self.pooling = random.integers(0, 2, len(self.positions)).astype(np.int32)
        # Mostly short bags, some empty, now and then one that is longer than the prefetch distance.
        lengths = random.choice([0, 1, 1, 2, 3, 5, 40], num_slots * self.size)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self.capacity = int(random.integers(1, 60))
        num_signs = int(lengths.reshape(num_slots, -1)[self.positions].sum())
        self.rows = random.integers(-1 if unknown else 0, self.capacity, num_signs).astype(np.int32)
        gaps = random.integers(0, 4, len(self.positions) + 1)
        columns = gaps[0] + np.concatenate([[0], np.cumsum(dim + gaps[1:])])
        self.width = int(columns[-1])
        self.columns = random.permutation(columns[:-1]).astype(np.int64)
        self.arena, self.whole_arena = guarded(self.capacity * self.stride, np.float32, np.nan)
        self.arena[:] = random.uniform(-1, 1, len(self.arena))

    @property
    def bags(self) -> list[list[np.ndarray]]:
        """[slot][sample] → rows."""
        return naive.bags_of(self.rows, self.offsets, self.positions, self.size)


def check_pool(random: np.random.Generator, dim: int, state_width: int, unknown: bool = True) -> None:
    """One drawn call of `pool` against the twin."""
    call = Pooled(random, dim, state_width, unknown)
    out, whole = guarded(call.size * call.width, np.float32, np.nan)
    pool.pool(
        call.rows, not unknown, call.offsets, call.positions, call.size, call.pooling, call.arena, dim, call.stride, out,
        call.width, call.columns,
    )  # fmt: skip
    rows = call.arena.reshape(call.capacity, call.stride)
    expected = np.full((call.size, call.width), np.nan, np.float32)  # the gaps between the columns are not the table's
    for samples, mean, column in zip(call.bags, call.pooling == pool.MEAN, call.columns, strict=True):
        for b, bag in enumerate(samples):
            expected[b, column : column + dim] = naive.pool_bag(bag, rows, dim, mean)
    assert_guards(whole, np.nan)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, rtol=1e-6, atol=1e-6)


@drawn.bounded(max_examples=100)
@given(random=drawn.generators, dim=st.one_of(st.just(16), drawn.dims), state_width=st.integers(0, 40), unknown=st.booleans())
def test_pool(random: np.random.Generator, dim: int, state_width: int, unknown: bool) -> None:
    """Sums and means, unknown rows, empty bags; nothing outside the table's columns is written."""
    check_pool(random, dim, state_width, unknown)


@pytest.mark.parametrize("unknown", [True, False])
@pytest.mark.parametrize("dim", range(1, 41))
def test_pool_at_every_dim(dim: int, unknown: bool) -> None:
    """Every mixture of 16-wide, 8-wide and scalar pieces, and the way of its own that the dim 16 has."""
    check_pool(np.random.default_rng(dim), dim, dim % 3, unknown)


def check_push(random: np.random.Generator, dim: int, optimizer: str, rate: float, epsilon: float, first: float) -> None:
    """One drawn call of `push` against the twin, with one rate per slot."""
    call = Pooled(random, dim, dim if optimizer == "adagrad" else 0, unknown=False)
    rows = call.arena.reshape(call.capacity, call.stride)
    rows[:, dim:] = first
    expected = rows.copy()
    grads = frozen(random.uniform(-1, 1, (call.size, call.width)).astype(np.float32))
    params = np.array([[rate * (k + 1), epsilon] for k in range(len(call.positions))], np.float32)
    most = max(sum(map(len, samples)) for samples in call.bags)
    seen, all_seen = guarded(call.capacity, np.int32, 0)
    distinct, all_distinct = guarded(most, np.int32, -7)
    sums, all_sums = guarded(most * dim, np.float32, np.nan)

    found = update.push(
        call.rows, call.offsets, call.positions, call.size, call.pooling, grads.reshape(-1), call.width, call.columns,
        seen, distinct, sums, call.arena, dim, call.stride, KINDS[optimizer], params,
    )  # fmt: skip

    twin_found = 0
    for k, (samples, column) in enumerate(zip(call.bags, call.columns, strict=True)):
        totals = naive.sum_gradients(samples, grads[:, column : column + dim], call.pooling[k] == pool.MEAN)
        for row, total in totals.items():
            naive.STEPS[optimizer](expected[row], total, *params[k])
        twin_found += len(totals)
    assert found == twin_found
    assert not all_seen.any()  # guards too
    assert_guards(all_distinct, -7)
    assert_guards(all_sums, np.nan)
    assert_guards(call.whole_arena, np.nan)
    # A sum that nearly cancels leaves its rounding in Adagrad's direction; small against a step of `rate`.
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5 * (1 + rate * len(call.positions)))


@drawn.bounded(max_examples=120)
@given(
    random=drawn.generators, dim=drawn.dims, optimizer=st.sampled_from(sorted(KINDS)), rate=st.floats(1e-3, 1),
    epsilon=st.sampled_from((1e-7, 1e-3)), first=st.sampled_from((1e-2, 0.1, 1.0)),
)  # fmt: skip
def test_push(random: np.random.Generator, dim: int, optimizer: str, rate: float, epsilon: float, first: float) -> None:
    """One step per distinct row of a slot, with the sum of its gradients; scratch as clean as before."""
    check_push(random, dim, optimizer, rate, epsilon, first)


@pytest.mark.parametrize("optimizer", sorted(KINDS))
@pytest.mark.parametrize("dim", range(1, 41))
def test_push_at_every_dim(dim: int, optimizer: str) -> None:
    """Every mixture of 16-wide, 8-wide and scalar pieces."""
    check_push(np.random.default_rng(dim), dim, optimizer, rate=0.05, epsilon=1e-7, first=0.1)


def test_a_gradient_of_zero_changes_nothing() -> None:
    """Adagrad at the smallest accumulator that the defaults know: no 0 / 0."""
    arena = np.array([0.5, -0.5, 1e-8, 1e-8], np.float32)
    before = arena.copy()
    update.push(
        np.zeros(3, np.int32), np.array([0, 3], np.int32), np.array([0]), 1, np.array([pool.SUM], np.int32),
        frozen(np.zeros(2, np.float32)), 2, np.array([0]), np.zeros(1, np.int32), np.empty(3, np.int32),
        np.empty(6, np.float32), arena, 2, 4, update.ADAGRAD, np.array([[0.05, 1e-7]], np.float32),
    )  # fmt: skip
    np.testing.assert_array_equal(arena, before)


@pytest.mark.parametrize("optimizer", sorted(KINDS))
def test_rows_beyond_two_billion_floats(optimizer: str) -> None:
    """Places in the arena are 64-bit: a row past float 2**31 is created, read and stepped there."""
    dim, stride = 25, 50  # 16, 8 and 1, and as much state
    row = 2**31 // stride + 1
    try:
        arena = np.zeros((row + 1) * stride, np.float32)  # address space: only the pages of one row are touched
        seen = np.zeros(row + 1, np.int32)
    except MemoryError:
        pytest.skip("the operating system gives no 8.6 GB of address space")
    words, rows, one = np.zeros(16, np.uint64), np.empty(1, np.int32), np.array([1], np.int32)
    ranges = np.array([0]), np.array([1])
    assert index.find_or_create(
        np.array([2**63], np.uint64), *ranges, np.array([0], np.uint64), words, naive.shift_of(8), rows,
        np.array([0, 0, row]), row + 1, arena, dim, stride, np.float32(0.1), np.ones(1, np.float32), np.uint64(3),
    )  # fmt: skip
    assert rows.tolist() == [row]
    assert call_find([2**63], [(0, 1)], words) == [row]
    expected = naive.new_row(2**63, 3, dim, dim, 1.0, 0.1)
    np.testing.assert_array_equal(arena[row * stride :], expected)

    bag = rows, np.array([0, 1], np.int32), np.array([0]), 1, np.array([pool.SUM], np.int32)
    out = np.empty(dim, np.float32)
    pool.pool(bag[0], True, *bag[1:], arena, dim, stride, out, dim, np.array([0]))
    np.testing.assert_array_equal(out, expected[:dim])
    update.push(
        *bag, frozen(np.ones(dim, np.float32)), dim, np.array([0]), seen, one, np.empty(dim, np.float32), arena, dim, stride,
        KINDS[optimizer], np.array([[0.25, 0]], np.float32),
    )  # fmt: skip
    naive.STEPS[optimizer](expected if optimizer == "adagrad" else expected[:dim], np.ones(dim, np.float32), 0.25, 0)
    np.testing.assert_allclose(arena[row * stride :], expected, rtol=1e-6)
    assert not arena[:stride].any()


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hurried_switching")
def test_every_kernel_in_several_threads_at_once() -> None:
    """Kernels keep nothing of their own: what a thread gets does not depend on what the others do."""
    num_threads = 4
    start = threading.Barrier(num_threads)

    def work(seed: int, wait: bool) -> list[np.ndarray]:
        random = np.random.default_rng(seed)
        n, dim = 3000, 19
        signs = random.integers(0, 2**64, n, np.uint64)[random.integers(0, n // 2, n)]
        arena, rows = np.zeros(n * 2 * dim, np.float32), np.empty(n, np.int32)
        words, progress = np.zeros(2 * 2048, np.uint64), np.zeros(3, np.int64)
        ranges = np.array([0]), np.array([n])
        bag = np.arange(0, n + 1, 3, dtype=np.int32), np.array([0]), n // 3, np.array([pool.MEAN], np.int32)
        columns, out = np.array([0]), np.empty(n // 3 * dim, np.float32)
        listed, slots = np.empty(n, np.uint64), np.empty(n, np.int32)
        scratch = np.zeros(n, np.int32), np.empty(n, np.int32), np.empty(n * dim, np.float32)
        if wait:
            start.wait()
        for _ in range(5):
            assert index.find_or_create(
                signs, *ranges, np.array([seed], np.uint64), words, naive.shift_of(2048), rows, progress, 2000, arena,
                dim, 2 * dim, np.float32(0.1), np.ones(1, np.float32), np.uint64(seed),
            )  # fmt: skip
            larger = np.zeros(2 * len(words), np.uint64)
            index.rebuild(words, larger, naive.shift_of(4096))
            found = np.empty(n, np.int32)
            index.find(signs, *ranges, larger, naive.shift_of(4096), found)
            index.entries(larger, listed, slots)
            pool.pool(rows, True, *bag, arena, dim, 2 * dim, out, dim, columns)
            params = np.array([[0.1, 1e-7]], np.float32)
            update.push(rows, *bag, frozen(out.copy()), dim, columns, *scratch, arena, dim, 2 * dim, update.ADAGRAD, params)
            progress[:2] = 0
        num_rows = int(progress[index.ROWS])
        return [rows, found, listed[:num_rows], slots[:num_rows], out, arena]

    with ThreadPoolExecutor(num_threads) as threads:
        together = list(threads.map(lambda seed: work(seed, wait=True), range(num_threads)))
    for seed, results in enumerate(together):
        for ours, alone in zip(results, work(seed, wait=False), strict=True):
            np.testing.assert_array_equal(ours, alone)


# --- what the compiler made of them -----------------------------------------------------------------------------------

HOT = [index.find, index.find_or_create, pool.pool, update.push]


@functools.cache
def compiled(kernel: Any, **options: Any) -> str:
    """LLVM and assembly of a kernel for the types it is called with, compiled anew: cached code cannot be inspected."""
    if not kernel.signatures:
        check_push(np.random.default_rng(0), 16, "sgd", 0.1, 0, 0)
        check_pool(np.random.default_rng(0), 16, 0)
        created(np.zeros(1, np.uint64), 1, 0, 1)
        call_find([0], [(0, 1)], np.zeros(4, np.uint64))
    (types,) = kernel.signatures  # one: a second would mean that a caller passes other dtypes than the docstrings name
    fresh = type(kernel)(kernel.py_func, targetoptions=kernel.targetoptions | options)
    fresh.compile(types)
    return fresh.inspect_llvm(types) + fresh.inspect_asm(types)


def reference_counts(code: str) -> list[str]:
    """Where code counts references."""
    return re.findall(r"NRT_(?:inc|dec)ref", code)


@pytest.mark.parametrize("kernel", HOT, ids=lambda kernel: kernel.py_func.__name__)
def test_no_references_are_counted(kernel: Any) -> None:
    """The private option `_nrt=False` still does what it is for; with it on, this test would see the difference."""
    assert not reference_counts(compiled(kernel))
    assert reference_counts(compiled(kernel, _nrt=True))


@pytest.mark.parametrize("kernel", HOT, ids=lambda kernel: kernel.py_func.__name__)
def test_kernels_run_without_the_gil(kernel: Any) -> None:
    """The wrapper gives the lock back around the call."""
    assert "PyEval_SaveThread" in compiled(kernel)
    assert "PyEval_SaveThread" not in compiled(kernel, nogil=False)


def test_sums_stay_in_vectors() -> None:
    """A bag is added up 16 floats at a time in LLVM, whatever the processor makes of them, and so are gradients."""
    assert re.search(r"= fadd <16 x float>", compiled(pool.pool))
    assert re.search(r"= fadd <16 x float>", compiled(update.push))
    assert re.search(r"@llvm\.sqrt\.v16f32", compiled(update.push))


@pytest.mark.parametrize("kernel", HOT, ids=lambda kernel: kernel.py_func.__name__)
def test_kernels_prefetch(kernel: Any) -> None:
    """The instruction survives the optimizer."""
    assert "@llvm.prefetch" in compiled(kernel)

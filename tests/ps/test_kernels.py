"""Kernels called bare, with guards around what they write; and what the compiler made of them."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.config import Slot
from flowps.ps import optimizer
from flowps.ps.kernels import index, layout, pool, step, update
from tests.ps import drawn, naive
from tests.ps.tables import look_up, one_bag, read, table_of

GUARD = 64  # elements before and after every array that a kernel writes; they must stay as they were
POOLINGS = ("sum", "mean", "sqrtn", "none")
CODES = {name: getattr(pool, name.upper()) for name in POOLINGS}


def guarded(size: int, fill: float, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """An array of `size` elements that starts on a cache line, and the larger one it lies in; all hold `fill`."""
    whole = np.full(size + 3 * GUARD, fill, dtype)
    first = GUARD + (-whole.ctypes.data % 64) // whole.itemsize
    return whole[first : first + size], whole


def assert_guards(array: np.ndarray, whole: np.ndarray, fill: float) -> None:
    """Nothing was written outside the array."""
    first = (array.ctypes.data - whole.ctypes.data) // whole.itemsize
    np.testing.assert_array_equal(whole[:first], fill)
    np.testing.assert_array_equal(whole[first + len(array) :], fill)


class Call:
    """A drawn call of `pool` or `push`: some slots of a batch, out of order, at scattered columns with gaps between."""

    def __init__(self, random: np.random.Generator, dim: int, state_width: int, poolings: tuple[str, ...], weighted: bool) -> None:
        self.dim, self.stride = dim, dim + state_width
        self.size = int(random.integers(1, 9))
        num_slots = int(random.integers(1, 6))
        self.positions = random.permutation(num_slots)[: random.integers(1, num_slots + 1)].astype(np.int64)
        self.slots = [
            Slot(name="s", dim=dim, pooling=str(random.choice(poolings)), max_len=int(random.integers(1, 5)), optimizer="sgd")
            for _ in self.positions
        ]
        # Mostly short bags, some empty, now and then one that is longer than the prefetch distance.
        lengths = random.choice([0, 1, 1, 2, 3, 5, 80], num_slots * self.size)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self.capacity = int(random.integers(1, 60))
        of_slots = lengths.reshape(num_slots, -1)[self.positions].sum(axis=1)
        self.places = np.concatenate([[0], np.cumsum(of_slots)]).astype(np.int64)
        self.rows = random.integers(0, self.capacity + 1, self.places[-1]).astype(np.int32)  # the last stands for none
        self.shares = random.uniform(-1, 2, self.offsets[-1] if weighted else 0).astype(np.float32)
        gaps = random.integers(0, 4, len(self.slots) + 1)
        columns = gaps[0] + np.cumsum([0, *(slot.width + gap for slot, gap in zip(self.slots, gaps[1:], strict=True))])
        self.width, self.columns = int(columns[-1]), columns[:-1].astype(np.int64)
        self.arena, self.whole_arena = guarded((self.capacity + 1) * self.stride, np.nan)
        self.arena[:] = random.uniform(-1, 1, len(self.arena))
        self.arena[self.capacity * self.stride :] = 0
        self.codes = np.array([CODES[slot.pooling] for slot in self.slots], np.int32)
        self.lengths = np.array([slot.max_len for slot in self.slots], np.int64)

    def bags(self, k: int) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """Slot k's rows and shares by sample."""
        first = self.positions[k] * self.size
        bounds = self.offsets[first : first + self.size + 1]
        cuts = bounds[1:-1] - bounds[0]
        rows = np.split(self.rows[self.places[k] : self.places[k + 1]], cuts)
        return rows, np.split(self.shares[bounds[0] : bounds[-1]], cuts) if len(self.shares) else None


def check_pool(call: Call, streaming: bool = False) -> None:
    """A drawn call of `pool`, cut into samples as threads cut it, against the twin."""
    out, whole = guarded(call.size * call.width, np.nan)
    middle = call.size // 2
    for begin, end in ((0, middle), (middle, call.size)):
        pool.pool(
            call.rows, call.places, call.shares, call.offsets, call.positions, call.size, begin, end, call.codes, call.lengths,
            call.arena, call.dim, call.stride, 1, out, call.width, call.columns, streaming,
        )  # fmt: skip
    weights = call.arena.reshape(-1, call.stride)[:, : call.dim]
    expected = np.full((call.size, call.width), np.nan, np.float32)  # the gaps between the columns are not the table's
    for k, (slot, column) in enumerate(zip(call.slots, call.columns, strict=True)):
        rows, shares = call.bags(k)
        for b, bag in enumerate(rows):
            of_bag = None if shares is None else shares[b].tolist()
            expected[b, column : column + slot.width] = naive.pool_bag([weights[row] for row in bag], slot, of_bag)
    assert_guards(out, whole, np.nan)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, rtol=1e-3, atol=1e-3)


@drawn.bounded(max_examples=100)
@given(random=drawn.generators, dim=st.one_of(st.just(16), drawn.dims), state_width=st.integers(0, 40), weighted=st.booleans())
def test_pool(random: np.random.Generator, dim: int, state_width: int, weighted: bool) -> None:
    """Every pooling, signs without rows, empty bags, weighted or not; nothing outside the table's columns is written."""
    check_pool(Call(random, dim, state_width, POOLINGS, weighted))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dim", range(1, 41))
def test_pool_at_every_dim(dim: int, weighted: bool) -> None:
    """Every mixture of 16-wide, 8-wide and scalar pieces, and the way of its own that the dim 16 has."""
    check_pool(Call(np.random.default_rng(dim), dim, dim % 3, POOLINGS, weighted))


def test_pool_past_the_caches() -> None:
    """Lines that start on cache lines are streamed, with the same result."""
    for seed in range(20):
        call = Call(np.random.default_rng(seed), 16, 16, ("sum",), False)
        call.columns, call.width = np.arange(len(call.slots)) * 16, 16 * len(call.slots)
        check_pool(call, streaming=True)


def check_sums(call: Call, parts: int) -> None:
    """Gradients summed per distinct row of each slot, for a row's steps by SGD: as the twin sums them."""
    random = np.random.default_rng(call.size)
    grads = random.uniform(-1, 1, call.size * call.width).astype(np.float32)
    grads.flags.writeable = False
    expected = call.arena.reshape(-1, call.stride).copy()
    params = optimizer.Params(call.slots).at(0, 1.0)
    stepped = 0
    for k, (slot, column) in enumerate(zip(call.slots, call.columns, strict=True)):
        rows, shares = call.bags(k)
        part = grads.reshape(call.size, -1)[:, column : column + slot.width]
        sums = naive.sum_gradients(
            [bag.tolist() for bag in rows], slot, part, None if shares is None else [s.tolist() for s in shares]
        )
        for row, total in sums.items():
            if row != call.capacity:
                expected[row, : call.dim] -= np.float32(slot.learning_rate) * total
                stepped += 1
    found = 0
    for part_number in range(parts):
        ordinals, distinct, bounds = number(call, part_number, parts)
        most = max(1, int((bounds[1::2] - bounds[0::2]).max(initial=0)))
        sums_array, whole = guarded(most * call.dim, np.nan)
        counts = np.zeros(update.COUNTS, np.int64)
        update.push(
            step.Sgd(), ordinals, distinct, bounds, call.places, call.shares, call.offsets, call.positions, call.size, call.codes,
            call.lengths, grads, call.width, call.columns, part_number, parts, sums_array, np.empty(2 * update.LIST, np.int64),
            np.empty(update.LIST, np.float32), call.arena, call.arena, call.dim, call.stride, 1, call.stride - call.dim,
            np.int32(call.capacity), params, 0, counts,
        )  # fmt: skip
        assert_guards(sums_array, whole, np.nan)
        found += counts[update.STEPPED]
    assert found == stepped
    assert_guards(call.arena, call.whole_arena, np.nan)
    np.testing.assert_allclose(call.arena.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def number(call: Call, part: int, parts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ordinals as a lookup of several parts gives them; a row belongs to the part that its number says."""
    ordinals = np.empty(len(call.rows), np.int32)
    distinct = np.full(parts * (len(call.rows) + 2), -1, np.int32)
    bounds = np.zeros((parts, 2 * len(call.slots)), np.int64)
    nexts = [p + parts for p in range(parts)]
    for k in range(len(call.slots)):
        seen: dict[int, int] = {}
        bounds[:, 2 * k] = nexts
        for i in range(call.places[k], call.places[k + 1]):
            row = int(call.rows[i])
            if row == call.capacity:
                ordinals[i] = row % parts
                continue
            if row not in seen:
                seen[row] = nexts[row % parts]
                distinct[seen[row]] = row
                nexts[row % parts] += parts
            ordinals[i] = seen[row]
        bounds[:, 2 * k + 1] = nexts
    return ordinals, distinct, bounds[part]


@drawn.bounded(max_examples=100)
@given(random=drawn.generators, dim=drawn.dims, weighted=st.booleans(), parts=st.sampled_from((1, 2, 4)))
def test_push_sums_per_distinct_row(random: np.random.Generator, dim: int, weighted: bool, parts: int) -> None:
    """Every pooling, signs without rows, weighted or not, in one part or in several."""
    check_sums(Call(random, dim, dim % 5, POOLINGS, weighted), parts)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dim", range(1, 41))
def test_push_at_every_dim(dim: int, parts: int) -> None:
    """Every mixture of 16-wide, 8-wide and scalar pieces, and the way of its own that the dim 16 has."""
    check_sums(Call(np.random.default_rng(dim), dim, 0, ("sum", "mean"), False), parts)


def test_search_reads_no_sign_past_the_array() -> None:
    """The signs to prefetch end with the array, whatever its length modulo the distance and the block."""
    with table_of([drawn.slot("s", dim=1)], 10_000) as table:
        for length in (1, index.AHEAD - 1, index.AHEAD, index.AHEAD + 1, index.BLOCK - 1, index.BLOCK, 2 * index.BLOCK + 3):
            signs = [naive.mix(i) for i in range(length)]
            touched, out = look_up(table, one_bag(signs))
            assert table.push(touched, np.zeros_like(out)) == length
            np.testing.assert_array_equal(read(table, one_bag(signs)), out)
        assert table.num_rows == 2 * index.BLOCK + 3


def test_rows_beyond_two_billion_floats() -> None:
    """Places in the arena are 64-bit: a row past float 2**31 is created, read and stepped there."""
    slot = drawn.slot("s", dim=25, initial_accumulator=0.1)
    row = 2**31 // 50 + 1
    with table_of([slot], row + 10) as table:  # address space: only the pages of a few rows are touched
        stripe = int(layout.stripe_of(np.uint64(2**63), np.uint64(table.memory.bits)))
        table.memory.meta[stripe, [layout.FRESH, layout.FRESH_END]] = row, row + 1
        touched, out = look_up(table, one_bag([2**63]))
        assert touched.buffers.rows[0] == row
        expected = naive.new_row(slot, 2**63, 0)
        np.testing.assert_array_equal(out[0], expected[:25])
        table.push(touched, np.ones((1, 25), np.float32))
        naive.step(expected, np.ones(25, np.float32), slot)
        np.testing.assert_allclose(table.memory.arena[row * 50 :][:50], expected, rtol=1e-6)
        assert not table.memory.arena[:50].any()


# --- what the compiler made of them -----------------------------------------------------------------------------------

HOT = [index.find, index.find_or_create, pool.pool, update.push]


@functools.cache
def compiled(kernel: Any, **options: Any) -> str:
    """LLVM and assembly of a kernel for the types it is called with, compiled anew: cached code cannot be inspected."""
    fresh = type(kernel)(kernel.py_func, targetoptions=kernel.targetoptions | options)
    types = signature(kernel)
    fresh.compile(types)
    return fresh.inspect_llvm(types) + fresh.inspect_asm(types)


def signature(kernel: Any) -> Any:
    """The types a table of float32 rows and SGD calls a kernel with."""
    with table_of([drawn.slot("s", dim=16, optimizer="sgd")], 50) as table:
        for first in range(0, 300, 30):
            touched, out = look_up(table, one_bag(range(first, first + 30)))
            table.push(touched, out)
        read(table, one_bag([1]))
    return next(types for types in kernel.signatures if variant(kernel, types) in ((), ("float32",), ("Sgd", "float32")))


def variant(kernel: Any, types: Any) -> tuple[str, ...]:
    """What a kernel is compiled anew for: the optimizer and the storage, of those it takes."""
    names = kernel.py_func.__code__.co_varnames
    found = dict(zip(names, types, strict=False))
    weights = found.get("weights", found.get("arena"))
    tag = (found["tag"].instance_class.__name__,) if "tag" in found else ()
    return (*tag, *((str(weights.dtype),) if weights is not None else ()))


@pytest.mark.parametrize("kernel", HOT, ids=lambda kernel: kernel.py_func.__name__)
def test_one_compilation_per_storage_and_optimizer(kernel: Any) -> None:
    """Callers pass the types that docstrings name: another would be a second compilation of the same variant."""
    signature(kernel)
    variants = [variant(kernel, types) for types in kernel.signatures]
    assert len(variants) == len(set(variants))


def reference_counts(code: str) -> list[str]:
    """Where code counts references."""
    return re.findall(r"NRT_(?:inc|dec)ref", code)


@pytest.mark.parametrize("kernel", HOT, ids=lambda kernel: kernel.py_func.__name__)
def test_no_references_are_counted(kernel: Any) -> None:
    """The private option `_nrt=False` still does what it is for."""
    assert not reference_counts(compiled(kernel))


def test_references_would_be_seen() -> None:
    """With the option on, the test above would find them."""
    assert reference_counts(compiled(index.find, _nrt=True))


@pytest.mark.parametrize("kernel", HOT, ids=lambda kernel: kernel.py_func.__name__)
def test_kernels_run_without_the_gil(kernel: Any) -> None:
    """The wrapper gives the lock back around the call."""
    assert "PyEval_SaveThread" in compiled(kernel)


def test_sums_stay_in_vectors() -> None:
    """A bag is added up 16 floats at a time in LLVM, whatever the processor makes of them; large outputs go past the caches."""
    assert re.search(r"= fadd <16 x float>", compiled(pool.pool))
    assert re.search(r"store <16 x float> .*!nontemporal", compiled(pool.pool))
    assert re.search(r"= fadd <16 x float>", compiled(update.push))


@pytest.mark.parametrize("kernel", HOT, ids=lambda kernel: kernel.py_func.__name__)
def test_kernels_prefetch(kernel: Any) -> None:
    """The instruction survives the optimizer."""
    assert "@llvm.prefetch" in compiled(kernel)

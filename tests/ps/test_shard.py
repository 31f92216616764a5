"""`Shard`: several tables behind one interface, what it remembers between lookup and push, and threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from flowps.config import Slot
from flowps.errors import CapacityError, DataError, UnknownBatchError
from flowps.ps.shard import Shard
from flowps.ps.table import Table
from tests.ps import drawn, naive

MIXED = [
    drawn.slot("a", dim=8, optimizer="sgd", learning_rate=0.5),
    drawn.slot("b", dim=16, initial_accumulator=0.1),
    drawn.slot("c", dim=8, optimizer="sgd", pooling="mean"),
    drawn.slot("d", dim=8, initial_accumulator=0.1, pooling="mean"),
    drawn.slot("e", dim=16, initial_accumulator=0.2),
    drawn.slot("f", dim=8, initial_accumulator=0.1, learning_rate=0.5),
    drawn.slot("g", dim=3, optimizer="sgd"),
]
TABLES = [[0, 2], [1], [3, 5], [4], [6]]  # of MIXED: those that agree in dim and optimizer


class Caller:
    """A shard, and bags in and out of it: all slots of the batch live there, side by side in a line."""

    def __init__(self, slots: Sequence[Slot], capacity_rows: int = 1000, seed: int = 0, max_in_flight: int = 4) -> None:
        self.slots = slots
        self.shard = Shard(slots, [capacity_rows] * len(slots), seed, max_in_flight)
        self.bounds = np.cumsum([0, *(slot.dim for slot in slots)])

    def lookup(self, batch_id: int, bags: drawn.Bags, training: bool = True) -> np.ndarray:
        """The pooled buffer."""
        size = len(bags[0])
        out = np.full((size, self.bounds[-1]), np.nan, np.float32)
        positions = np.arange(len(self.slots))
        self.shard.lookup(batch_id, *drawn.arrays(bags), size, positions, self.bounds[:-1], out, training)
        return out

    def find(self, batch_id: int, bags: drawn.Bags) -> None:
        """The first half of a lookup."""
        self.shard.find(batch_id, *drawn.arrays(bags), len(bags[0]), np.arange(len(self.slots)), self.bounds[:-1])

    def pool(self, batch_id: int, size: int) -> np.ndarray:
        """The pooled buffer: the second half."""
        out = np.full((size, self.bounds[-1]), np.nan, np.float32)
        self.shard.pool(batch_id, out)
        return out

    def part(self, lines: np.ndarray, s: int) -> np.ndarray:
        """What belongs to slot s in a pooled buffer or its gradient."""
        return lines[:, self.bounds[s] : self.bounds[s + 1]]

    def rows(self) -> dict[str, dict[int, tuple[bytes, bytes]]]:
        """{slot: {sign: weights and state}}."""
        return {
            rows.slot.name: {
                int(sign): (weights.tobytes(), state.tobytes())
                for sign, weights, state in zip(rows.signs, rows.weights, rows.state, strict=True)
            }
            for rows in self.shard.rows()
        }


def in_slots(num_slots: int, sign: int) -> drawn.Bags:
    """One sample with one sign a slot, another one in each."""
    return [[[sign + 1000 * s]] for s in range(num_slots)]


@drawn.bounded(max_examples=25)
@given(random=drawn.generators)
def test_several_tables_as_their_twins(random: np.random.Generator) -> None:
    """Mixed dims, optimizers and poolings: pooled vectors, distinct rows and all rows equal those of dicts."""
    caller = Caller(MIXED, seed=9)
    twins = [naive.NaiveTable([MIXED[s] for s in of], seed=9) for of in TABLES]
    for batch_id in range(4):
        bags = drawn.random_bags(random, len(MIXED), size=5, values=12)
        out = caller.lookup(batch_id, bags)
        grads = random.uniform(-1, 1, out.shape).astype(np.float32)
        distinct = 0
        for of, twin in zip(TABLES, twins, strict=True):
            of_table = [bags[s] for s in of]
            twin.create(of_table)
            for s, vectors in zip(of, twin.pooled(of_table), strict=True):
                np.testing.assert_allclose(caller.part(out, s), vectors, rtol=1e-4, atol=1e-4)
            distinct += twin.push(of_table, [caller.part(grads, s) for s in of])
        assert caller.shard.push(batch_id, grads) == distinct
    assert caller.shard.num_rows == sum(len(twin.rows) for twin in twins)
    by_slot = {rows.slot.name: rows for rows in caller.shard.rows()}
    assert [rows.slot for rows in by_slot.values()] == [MIXED[s] for of in TABLES for s in of]
    for of, twin in zip(TABLES, twins, strict=True):
        found: dict[int, np.ndarray] = {}
        for s in of:
            rows = by_slot[MIXED[s].name]
            assert set(rows.signs.tolist()) == {sign for sign in twin.rows if sign in signs_of_slot(s, 12)}
            found |= dict(zip(rows.signs.tolist(), np.concatenate([rows.weights, rows.state], axis=1), strict=True))
        naive.same(found, twin.rows)


def signs_of_slot(s: int, values: int) -> set[int]:
    """What `drawn.random_bags` draws a slot's signs from."""
    return {naive.mix((s << 32) + value) for value in range(values)}


def test_evaluation_creates_and_remembers_nothing() -> None:
    """Unseen signs read zeros, rows stay as they are, a push finds no batch, and `max_in_flight` does not count it."""
    caller = Caller(MIXED, max_in_flight=1)
    seen = in_slots(len(MIXED), 1)
    trained = caller.lookup(0, seen)
    before = caller.rows()
    for batch_id in range(5):  # 0 is in flight: an evaluation under its number does not disturb it
        np.testing.assert_array_equal(caller.lookup(batch_id, seen, training=False), trained)
        assert not caller.lookup(batch_id, in_slots(len(MIXED), 2), training=False).any()
    assert caller.rows() == before
    with pytest.raises(UnknownBatchError, match="batch 3:"):
        caller.shard.push(3, trained)
    assert caller.shard.push(0, trained) == len(MIXED)


def test_a_push_needs_its_lookup() -> None:
    """Never looked up, or pushed before: the error names the batch, and no row is stepped."""
    caller = Caller([drawn.slot("s", dim=4)])
    grads = np.ones((1, 4), np.float32)
    with pytest.raises(UnknownBatchError, match=r"batch 17: .*remembers no lookup"):
        caller.shard.push(17, grads)
    caller.lookup(17, [[[1]]])
    caller.shard.push(17, grads)
    stepped = caller.rows()
    with pytest.raises(UnknownBatchError, match=r"batch 17: .*pushed before"):
        caller.shard.push(17, grads)
    assert caller.rows() == stepped


def test_no_more_batches_than_max_in_flight() -> None:
    """The bound is refused with what to do; a push makes room again."""
    caller = Caller([drawn.slot("s", dim=4)], max_in_flight=2)
    grads = np.ones((1, 4), np.float32)
    caller.lookup(0, [[[1]]])
    caller.lookup(1, [[[2]]])
    with pytest.raises(CapacityError, match=r"batch 2: 2 batches .* push before the next lookup"):
        caller.lookup(2, [[[3]]])
    assert caller.shard.num_rows == 2
    caller.shard.push(1, grads)
    caller.lookup(2, [[[3]]])
    assert caller.shard.num_rows == 3


def test_the_bound_counts_lookups_that_have_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the one batch that may be in flight is still being looked up, a second is refused."""
    caller = Caller([drawn.slot("s", dim=4)], max_in_flight=1)
    inside, may_end = threading.Event(), threading.Event()
    find = Table.find

    def slow_find(table: Table, *args: Any, **kwargs: Any) -> Any:
        if not inside.is_set():
            inside.set()
            assert may_end.wait(60)
        return find(table, *args, **kwargs)

    monkeypatch.setattr(Table, "find", slow_find)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(caller.lookup, 0, [[[1]]])
        try:
            assert inside.wait(60)
            with pytest.raises(CapacityError, match="batch 1: 1 batches"):
                caller.lookup(1, [[[2]]])
        finally:
            may_end.set()
        first.result()
    assert caller.shard.push(0, np.ones((1, 4), np.float32)) == 1


def test_a_batch_in_flight_is_not_replaced() -> None:
    """A second lookup under its number would step rows that the gradient is not for: an error that names the batch."""
    caller = Caller([drawn.slot("s", dim=4, optimizer="sgd", learning_rate=1.0)])
    before = caller.lookup(5, [[[1], [2]]])
    with pytest.raises(Exception, match="batch 5"):  # which kind of error is the shard's to choose
        caller.lookup(5, [[[3], [4]]])
    caller.shard.push(5, np.ones((2, 4), np.float32))
    np.testing.assert_array_equal(caller.lookup(6, [[[1], [2]]], training=False), before - 1)


def test_a_full_table_forgets_the_batch() -> None:
    """A lookup that fails in the second table is not in flight, and known signs can be looked up under its number."""
    slots = [drawn.slot("wide", dim=8), drawn.slot("narrow", dim=4)]
    caller = Caller(slots, capacity_rows=3, max_in_flight=1)
    caller.lookup(0, [[[1]], [[101]]])
    caller.shard.push(0, np.ones((1, 12), np.float32))
    with pytest.raises(CapacityError, match="narrow"):
        caller.lookup(1, [[[1]], [[102, 103, 104, 105]]])
    with pytest.raises(UnknownBatchError, match="batch 1"):
        caller.shard.push(1, np.ones((1, 12), np.float32))
    caller.lookup(1, [[[1]], [[101, 102]]])  # and what the failed lookup has touched may go
    assert caller.shard.push(1, np.ones((1, 12), np.float32)) == 3


def test_pushes_in_any_order() -> None:
    """Under SGD the sum of the steps does not depend on the order, and each goes to the rows of its own batch."""
    slots = [drawn.slot("s", dim=4, optimizer="sgd", learning_rate=0.25), drawn.slot("t", dim=4, optimizer="sgd")]
    random = np.random.default_rng(0)
    batches = [drawn.random_bags(random, 2, size=6, values=8) for _ in range(5)]
    grads = [random.integers(-8, 9, (6, 8)).astype(np.float32) / 8 for _ in batches]
    weights = []
    for order in (range(5), [3, 1, 4, 0, 2], reversed(range(5))):
        caller = Caller(slots, max_in_flight=5)
        for batch_id, bags in enumerate(batches):
            caller.lookup(batch_id, bags)
        for batch_id in order:
            caller.shard.push(batch_id, grads[batch_id])
        weights.append(np.concatenate([rows.weights for rows in caller.shard.rows()]))
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights[2], weights[0], rtol=1e-5, atol=1e-6)


def test_the_capacity_of_a_table_is_the_sum_of_its_slots() -> None:
    """One slot may use what another leaves."""
    slots = [drawn.slot("s"), drawn.slot("t")]
    shard = Shard(slots, [2, 5], 0, 1)

    def lookup(batch_id: int, count: int) -> None:
        signs, offsets = drawn.arrays([[list(range(count))], [[]]])
        out = np.empty((1, 16), np.float32)
        shard.lookup(batch_id, signs, offsets, 1, np.array([0, 1]), np.array([0, 8]), out, training=True)

    lookup(0, 7)
    shard.push(0, np.zeros((1, 16), np.float32))
    assert shard.num_rows == 7
    with pytest.raises(CapacityError, match="slots s, t can hold: 7 rows"):
        lookup(1, 8)


def test_erasing_and_statistics_by_slot() -> None:
    """A slot's rows go from the table it lives in; the counts of all tables are given; a slot that is not here is a KeyError."""
    caller = Caller(MIXED)
    caller.shard.push(0, caller.lookup(0, in_slots(len(MIXED), 1)))
    assert caller.shard.erase("c", np.array([2001, 5], np.uint64)) == 1
    assert caller.rows()["c"] == {}
    first = caller.shard.stats()[0]
    assert (first.slots, first.rows, first.erased) == (("a", "c"), 1, 1)
    assert sum(stats.rows for stats in caller.shard.stats()) == len(MIXED) - 1
    with pytest.raises(KeyError, match="nowhere"):
        caller.shard.erase("nowhere", np.array([1], np.uint64))


def test_rows_come_in_chunks_that_survive_eviction() -> None:
    """Rows that go while the listing is read are left out; the others come, each once, as they are."""
    caller = Caller([drawn.slot("s", dim=4)], capacity_rows=1000)
    caller.lookup(0, [[list(range(1000))]])
    caller.shard.forget(0)
    chunks = caller.shard.rows(chunk_rows=300)
    first = next(chunks)
    assert len(first.signs) == 300
    assert caller.shard.erase("s", np.arange(0, 1000, 2, dtype=np.uint64)) == 500
    rest = list(chunks)
    assert all(len(chunk.signs) <= 300 for chunk in rest)
    later = np.concatenate([chunk.signs for chunk in rest])
    assert (later % 2 == 1).all()
    assert set(later.tolist()) | set(first.signs.tolist()) >= set(range(1, 1000, 2))
    assert len(set(later.tolist()) & set(first.signs.tolist())) == 0


def test_arrays_that_do_not_fit_are_refused() -> None:
    """Kernels do not look where they read: a lookup or a push with other types or shapes is an error, and changes nothing."""
    caller = Caller([drawn.slot("s", dim=4)], max_in_flight=1)
    signs, offsets, one = np.array([1, 2], np.uint64), np.array([0, 1, 2], np.int32), np.array([0])
    out = np.zeros((2, 4), np.float32)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("signs", {"signs": signs.astype(np.int64)}),
        ("signs", {"signs": np.array([1, 0, 2, 0], np.uint64)[::2]}),
        ("offsets", {"offsets": offsets.astype(np.int64)}),
        ("offsets", {"offsets": offsets[:2]}),
        ("offsets", {"offsets": np.array([0, 1, 3], np.int32)}),
        ("out", {"out": out.astype(np.float64)}),
        ("out", {"out": out[:1]}),
        ("out", {"out": out[:, :3].copy()}),
        ("out", {"out": np.zeros((2, 8), np.float32)[:, ::2]}),
        ("shares", {"shares": np.ones(1, np.float32)}),
        ("shares", {"shares": np.ones(2)}),
    ]
    for name, wrong in bad:
        given = {"signs": signs, "offsets": offsets, "out": out, "shares": None, **wrong}
        with pytest.raises(DataError, match=f"batch 0: {name} of a lookup of 2 samples"):
            caller.shard.lookup(0, given["signs"], given["offsets"], 2, one, one, given["out"], True, given["shares"])
    assert caller.shard.num_rows == 0
    caller.shard.lookup(0, signs, offsets, 2, one, one, out, training=True)
    for grads in (out.astype(np.float64), out[:1], np.zeros((2, 5), np.float32)):
        with pytest.raises(DataError, match=r"batch 0: a push has a gradient of .*expected float32 \(2, 4\)"):
            caller.shard.push(0, grads)
    assert caller.shard.push(0, out) == 2


def test_a_batch_that_is_given_up_while_it_is_looked_up_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it pin its rows."""
    caller = Caller([drawn.slot("s", dim=4)], max_in_flight=1)
    find: Callable[..., Any] = Table.find

    def given_up(table: Table, *args: Any, **kwargs: Any) -> Any:
        found = find(table, *args, **kwargs)
        caller.shard.forget(0)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Table, "find", given_up)
        caller.lookup(0, [[[1]]])
    with pytest.raises(UnknownBatchError):
        caller.shard.push(0, np.zeros((1, 4), np.float32))
    assert not caller.shard._tables[0][1].recency.in_flight


def test_a_lookup_that_fails_while_it_pools_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends it: its rows may go, and its number is free."""
    caller = Caller([drawn.slot("s", dim=4)], max_in_flight=1)

    def broken(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Table, "_pool", broken)
        with pytest.raises(MemoryError):
            caller.lookup(0, [[[1]]])
    assert not caller.shard._tables[0][1].recency.in_flight
    caller.shard.push(0, caller.lookup(0, [[[1]]]))


def test_forgetting_lets_rows_go() -> None:
    """A batch that is given up does not pin its rows for ever."""
    caller = Caller([drawn.slot("s", dim=4)], capacity_rows=10, max_in_flight=1)
    for batch_id in range(20):
        caller.lookup(batch_id, [[list(range(10 * batch_id, 10 * batch_id + 8))]])
        caller.shard.forget(batch_id)
    assert caller.shard.num_rows <= 10


# --- a lookup in two halves -------------------------------------------------------------------------------------------


@drawn.bounded(max_examples=25)
@given(random=drawn.generators)
def test_rows_found_ahead_are_pooled_as_they_are_then(random: np.random.Generator) -> None:
    """Bit by bit what whole lookups give, each after the push before it, though every batch is found before that push."""
    whole, halves = Caller(MIXED, seed=9), Caller(MIXED, seed=9, max_in_flight=2)
    batches = [drawn.random_bags(random, len(MIXED), size=5, values=12) for _ in range(5)]
    halves.find(0, batches[0])
    for batch_id, bags in enumerate(batches):
        out = halves.pool(batch_id, 5)
        np.testing.assert_array_equal(out, whole.lookup(batch_id, bags))
        if batch_id + 1 < len(batches):
            halves.find(batch_id + 1, batches[batch_id + 1])
        grads = random.uniform(-1, 1, out.shape).astype(np.float32)
        assert halves.shard.push(batch_id, grads) == whole.shard.push(batch_id, grads)
        ahead = halves.rows()
        assert all(ahead[name].items() >= rows.items() for name, rows in whole.rows().items()), "the next batch's rows are there"
    assert halves.rows() == whole.rows()
    assert halves.shard.traffic().staleness == {0: 5}
    assert halves.shard.traffic().signs == whole.shard.traffic().signs


def test_what_was_found_is_in_flight() -> None:
    """It counts, its number is taken, and its rows stay whatever needs room."""
    caller = Caller([drawn.slot("s", dim=4)], capacity_rows=8, max_in_flight=2)
    caller.lookup(9, [[[5, 6, 7, 8]]])
    caller.shard.forget(9)
    caller.find(0, [[[1, 2, 3, 4]]])
    with pytest.raises(UnknownBatchError, match="looked up again before its push"):
        caller.find(0, [[[1]]])
    caller.lookup(1, [[[11, 12]]])
    with pytest.raises(CapacityError, match="batch 2: 2 batches"):
        caller.find(2, [[[1]]])
    caller.shard.forget(1)
    caller.lookup(3, [[[13, 14]]])
    caller.shard.forget(3)
    with pytest.raises(CapacityError, match="in flight need more rows"):
        caller.find(4, [[[21]]])
    assert caller.shard.traffic().in_flight == 1
    assert caller.shard.push(0, np.zeros_like(caller.pool(0, 1))) == 4


def test_halves_come_once_and_in_order() -> None:
    """Each wrong call is refused, and leaves the batch as it was."""
    caller = Caller([drawn.slot("s", dim=4)])
    out = np.zeros((1, 4), np.float32)

    def refuses(what: type[Exception], message: str, call: Callable[..., object], *given: object) -> None:
        with pytest.raises(what, match=message):
            call(*given)

    refuses(UnknownBatchError, "batch 0: its rows are to be pooled, but", caller.shard.pool, 0, out)
    caller.find(0, [[[1]]])
    refuses(UnknownBatchError, "before its rows were pooled", caller.shard.push, 0, out)
    for wrong in (out[:, :3].copy(), np.zeros((2, 4), np.float32), out.astype(np.float64), np.zeros((1, 8), np.float32)[:, ::2]):
        refuses(DataError, "1 samples, at least 4 floats wide", caller.shard.pool, 0, wrong)
    caller.shard.pool(0, out)
    refuses(UnknownBatchError, "its rows are to be pooled, but", caller.shard.pool, 0, out)
    assert caller.shard.push(0, out) == 1
    refuses(UnknownBatchError, "remembers no lookup", caller.shard.push, 0, out)
    refuses(UnknownBatchError, "its rows are to be pooled, but", caller.shard.pool, 0, out)
    caller.lookup(1, [[[1]]])
    refuses(UnknownBatchError, "its rows are to be pooled, but", caller.shard.pool, 1, out)
    refuses(
        DataError,
        "signs of a lookup",
        caller.shard.find,
        2,
        np.zeros(1, np.int64),
        np.array([0, 1], np.int32),
        1,
        *[np.zeros(1, int)] * 2,
    )
    assert caller.shard.traffic().in_flight == 1


def test_what_was_found_and_given_up_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the halves, or while it is pooled: then its buffers are nobody else's until that ends."""
    caller = Caller([drawn.slot("s", dim=4)])
    table = caller.shard._tables[0][1]
    caller.find(0, [[[1]]])
    caller.shard.forget(0)
    assert not table.recency.in_flight
    with pytest.raises(UnknownBatchError):
        caller.pool(0, 1)
    caller.find(1, [[[1]]])
    pool: Callable[..., Any] = Table.pool

    def given_up(table: Table, *args: Any) -> None:
        caller.shard.forget(1)
        assert table.recency.in_flight, "its rows are still being read"
        pool(table, *args)

    monkeypatch.setattr(Table, "pool", given_up)
    caller.pool(1, 1)
    assert not table.recency.in_flight
    assert caller.shard.traffic().in_flight == 0


def test_a_second_half_that_fails_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller([drawn.slot("s", dim=4)])
    caller.find(0, [[[1]]])

    def broken(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Table, "pool", broken)
        with pytest.raises(MemoryError):
            caller.pool(0, 1)
    assert caller.shard.push(0, caller.pool(0, 1)) == 1


@pytest.mark.usefixtures("hurried_switching")
def test_halves_of_many_batches_at_once() -> None:
    """Found, pooled, pushed and given up on many threads: each gets the vectors of its own signs, and nothing is left over."""
    slots = [drawn.slot("s", dim=4, optimizer="sgd", learning_rate=0.0), drawn.slot("t", dim=8, optimizer="sgd", learning_rate=0.0)]
    caller = Caller(slots, capacity_rows=4096, max_in_flight=8)
    for n in range(64):
        caller.lookup(n, [[[n, n + 1]], [[n, n + 2]]])
        caller.shard.forget(n)
    expected = {n: caller.lookup(0, [[[n, n + 1]], [[n, n + 2]]], training=False) for n in range(64)}

    def turn(batch_id: int) -> None:
        n = batch_id % 64
        caller.find(batch_id, [[[n, n + 1]], [[n, n + 2]]])
        if batch_id % 5 == 0:
            caller.shard.forget(batch_id)
            return
        out = caller.pool(batch_id, 1)
        np.testing.assert_array_equal(out, expected[n])
        if batch_id % 7 == 0:
            caller.shard.forget(batch_id)
        else:
            assert caller.shard.push(batch_id, np.ones_like(out)) == 4

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(turn, batch_id) for batch_id in range(2000)]:
            done.result()
    assert caller.shard.traffic().in_flight == 0
    assert not any(table.recency.in_flight for _, table in caller.shard._tables)


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hurried_switching")
def test_one_batch_is_pushed_once_however_many_try() -> None:
    """Eight threads push the same batch: one steps its rows, the others are told that it is gone."""
    caller = Caller([drawn.slot("s", dim=4, optimizer="sgd", learning_rate=1.0)])
    before = caller.lookup(0, [[[1]]])
    start = threading.Barrier(8)

    def push() -> bool:
        start.wait()
        try:
            caller.shard.push(0, np.ones((1, 4), np.float32))
        except UnknownBatchError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        pushed = [done.result() for done in [threads.submit(push) for _ in range(8)]]
    assert pushed.count(True) == 1
    np.testing.assert_allclose(caller.lookup(1, [[[1]]], training=False), before - 1, rtol=1e-6)


def test_the_lock_of_the_batches_is_not_held_while_a_table_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup that waits inside its table does not stop the push of another batch."""
    caller = Caller([drawn.slot("s", dim=4)], max_in_flight=2)
    caller.lookup(0, [[[1]]])
    inside, may_end = threading.Event(), threading.Event()
    find: Callable[..., Any] = Table.find

    def slow_find(table: Table, *args: Any, **kwargs: Any) -> Any:
        inside.set()
        assert may_end.wait(60)
        return find(table, *args, **kwargs)

    monkeypatch.setattr(Table, "find", slow_find)
    with ThreadPoolExecutor(1) as thread:
        second = thread.submit(caller.lookup, 1, [[[2]]])
        try:
            assert inside.wait(60)
            assert caller.shard.push(0, np.ones((1, 4), np.float32)) == 1
        finally:
            may_end.set()
        second.result()
    assert caller.shard.push(1, np.ones((1, 4), np.float32)) == 1


# --- what it measures of itself ---------------------------------------------------------------------------------------


def test_every_operation_of_every_table_is_timed() -> None:
    caller = Caller(MIXED)
    for batch_id in range(3):
        out = caller.lookup(batch_id, in_slots(len(MIXED), batch_id))
        caller.shard.push(batch_id, out)
    found = caller.shard.status.summaries()
    assert {name: stage.count for name, stage in found.items()} == {
        "Lookup": 3, "Push": 3, **dict.fromkeys(("Find", "Pool", "PushSum", "PushStep"), 3 * len(TABLES)),
    }  # fmt: skip
    assert found["Find"].total_us + found["Pool"].total_us < found["Lookup"].total_us
    assert 0 < found["PushSum"].total_us + found["PushStep"].total_us < found["Push"].total_us


def test_a_lookup_in_halves_is_one_lookup() -> None:
    """Of its stage's times, which are those of both halves and of nothing between."""
    caller = Caller(MIXED)
    for batch_id in range(3):
        caller.find(batch_id, in_slots(len(MIXED), batch_id))
        time.sleep(0.05)
        caller.shard.push(batch_id, caller.pool(batch_id, 1))
    found = caller.shard.status.summaries()
    assert {name: stage.count for name, stage in found.items()} == {
        "Lookup": 3, "Push": 3, **dict.fromkeys(("Find", "Pool", "PushSum", "PushStep"), 3 * len(TABLES)),
    }  # fmt: skip
    assert found["Find"].total_us + found["Pool"].total_us < found["Lookup"].total_us
    assert found["Lookup"].total_us / 1e6 <= caller.shard.work().busy_s
    slept_us = 3 * 50_000
    assert found["Lookup"].total_us < found["Find"].total_us + found["Pool"].total_us + slept_us


def test_an_evaluation_is_no_traffic() -> None:
    caller = Caller(MIXED)
    caller.lookup(1, in_slots(len(MIXED), 1), training=False)
    assert caller.shard.status.summaries() == {}
    assert sum(caller.shard.traffic().signs.values()) == 0


def test_traffic_counts_signs_by_slot_and_batches_in_flight() -> None:
    caller = Caller(MIXED[:2])
    caller.lookup(1, [[[1, 2, 3]], [[4]]])
    caller.lookup(2, [[[1]], [[]]])
    caller.shard.push(1, np.zeros((1, 24), np.float32))
    traffic = caller.shard.traffic(hottest=1)
    assert traffic.signs == {"a": 4, "b": 1}
    assert traffic.in_flight == 1
    assert traffic.hot == [("a", 1, 0.25)], "from the first lookup, which is sampled whole"


def test_staleness_is_the_pushes_of_others_between_a_lookup_and_its_push() -> None:
    caller = Caller(MIXED[:2])
    grads = np.zeros((1, 24), np.float32)
    for batch_id in range(3):
        caller.lookup(batch_id, in_slots(2, batch_id))
    for batch_id in (0, 1, 2):
        caller.shard.push(batch_id, grads)
    caller.lookup(3, in_slots(2, 3))
    caller.shard.push(3, grads)
    assert caller.shard.traffic().staleness == {0: 2, 1: 1, 2: 1}

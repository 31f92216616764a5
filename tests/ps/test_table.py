"""`Table` against a dict, through growth and to its bound; and its promises about memory, order and threads."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flowps.config import Slot
from flowps.errors import CapacityError
from flowps.ps import table as table_module
from flowps.ps.table import Bags, Table, row_bytes
from tests.ps import drawn, naive


def at(of: drawn.Bags, positions: list[int] | None = None, columns: list[int] | None = None, dim: int = 8) -> Bags:
    """The bags of a table whose slots stand at `positions` of a batch, with slots of other tables between."""
    positions = list(range(len(of))) if positions is None else positions
    columns = [k * dim for k in range(len(of))] if columns is None else columns
    size = len(of[0])
    batch = [[[1234567 + position] * (b % 3) for b in range(size)] for position in range(max(positions) + 2)]
    for position, samples in zip(positions, of, strict=True):
        batch[position] = samples
    return Bags(*drawn.arrays(batch), size, np.array(positions, np.int64), np.array(columns, np.int64))


def one_bag(signs: Any) -> drawn.Bags:
    """One slot, one sample."""
    return [[[int(sign) for sign in signs]]]


def look_up(table: Table, of: drawn.Bags, create: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Rows and pooled buffer, float32 [size, slots * dim]."""
    out = np.full((len(of[0]), len(of) * table.dim), np.nan, np.float32)
    return table.lookup(at(of, dim=table.dim), out, create), out


# --- against a dict ---------------------------------------------------------------------------------------------------

UNIVERSE = (*drawn.EDGES, *drawn.LAST_HOME, *(naive.mix(i) for i in range(1, 40)))


class TableMachine(RuleBasedStateMachine):
    """Lookups and pushes in any order, on a table that begins with an index of two entries and has room for 30 rows."""

    @initialize(data=st.data(), dim=drawn.dims, optimizer=st.sampled_from(("sgd", "adagrad")), seed=drawn.seeds)
    def begin(self, data: st.DataObject, dim: int, optimizer: str, seed: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(table_module, "_FIRST_INDEX_SIZE", 2)
        poolings = data.draw(st.lists(st.sampled_from(("sum", "mean")), min_size=1, max_size=3))
        slots = [
            drawn.slot(f"s{k}", dim=dim, optimizer=optimizer, pooling=pooling, learning_rate=0.1 * (k + 1),
                       initial_accumulator=0.1, init_scale=0.5 + k)
            for k, pooling in enumerate(poolings)
        ]  # fmt: skip
        slot_ids = data.draw(st.lists(st.integers(0, 2**20), min_size=len(slots), max_size=len(slots), unique=True))
        self.positions = data.draw(st.permutations(range(len(slots) + 1)))[: len(slots)]
        self.columns = data.draw(st.permutations([k * (dim + 1) for k in range(len(slots))]))
        self.width = len(slots) * (dim + 1)
        self.table = Table(slots, slot_ids, 30, seed)
        self.naive = naive.NaiveTable(slots, slot_ids, 30, seed)
        self.in_flight: list[tuple[Bags, np.ndarray, naive.Bags]] = []

    @rule(data=st.data(), size=st.integers(1, 3), create=st.sampled_from((True, True, False)))
    def lookup(self, data: st.DataObject, size: int, create: bool) -> None:
        of = data.draw(drawn.bags(len(self.naive.slots), size, st.sampled_from(UNIVERSE), most=3))
        bags = at(of, self.positions, self.columns)
        out = np.full((size, self.width), np.nan, np.float32)
        try:
            twin_rows, twin_pooled = self.naive.lookup(of, create)
        except CapacityError:
            with pytest.raises(CapacityError, match=r"full: 30 rows; raise their capacity_rows"):
                self.table.lookup(bags, out, create)
            assert np.isnan(out).all()
            return
        rows = self.table.lookup(bags, out, create)
        assert rows.tolist() == [row for samples in twin_rows for bag in samples for row in bag]
        expected = np.full_like(out, np.nan)
        for column, pooled in zip(self.columns, twin_pooled, strict=True):
            expected[:, column : column + self.table.dim] = pooled
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
        if create:
            self.in_flight.append((bags, rows, twin_rows))

    @precondition(lambda self: getattr(self, "in_flight", None))
    @rule(data=st.data(), random=drawn.generators)
    def push(self, data: st.DataObject, random: np.random.Generator) -> None:
        bags, rows, twin_rows = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        grads = random.uniform(-1, 1, (bags.size, self.width)).astype(np.float32)
        distinct = self.table.push(bags, rows, grads)
        assert distinct == self.naive.push(twin_rows, [grads[:, c : c + self.table.dim] for c in self.columns])

    @rule()
    def rows(self) -> None:
        signs, slot_ids, values = self.table.rows()
        assert signs.tolist() == list(self.naive.known)
        assert slot_ids.tolist() == [slot_id for _, slot_id in self.naive.known.values()]
        expected = np.array(self.naive.values, np.float32).reshape(len(signs), self.table.stride)
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
        values[:] = np.nan  # a copy: the lookups that follow would notice

    @invariant()
    def counts_its_rows(self) -> None:
        if hasattr(self, "table"):
            assert self.table.num_rows == len(self.naive.known) <= 30

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()


TestAgainstDict = TableMachine.TestCase
TestAgainstDict.settings = drawn.bounded(max_examples=120, stateful_step_count=25)


# --- growth and bounds ------------------------------------------------------------------------------------------------


def test_growth_keeps_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve doublings in one lookup, and one more in a second: the same rows, found again, none moved."""
    monkeypatch.setattr(table_module, "_FIRST_INDEX_SIZE", 2)
    table = Table([drawn.slot("s")], [0], 10_000, seed=1)
    signs = np.random.default_rng(0).permutation(np.array([naive.mix(i) for i in range(1, 5001)], np.uint64))
    rows, _ = look_up(table, one_bag(signs))
    assert rows.tolist() == list(range(5000))
    held, _, values = table.rows()
    np.testing.assert_array_equal(held, signs)
    more, _ = look_up(table, one_bag([*signs[::-1], *range(2000)]))
    assert more[:5000].tolist() == list(range(5000))[::-1]
    assert table.num_rows == 7000
    np.testing.assert_array_equal(table.rows()[2][:5000], values)
    entries = len(table._index) // 2
    assert 0.35 < table.num_rows / entries <= 0.7  # doubled when it had to, not before


def test_a_full_table_says_what_to_do() -> None:
    """The error names the slots, the bound found and both knobs."""
    slots = [drawn.slot(f"slot_{k}") for k in range(7)]
    table = Table(slots, range(7), 2, seed=0)
    with pytest.raises(CapacityError) as refusal:
        look_up(table, [[[k]] for k in range(7)])
    message = str(refusal.value)
    assert "slot_0, slot_1, slot_2, slot_3, slot_4 and 2 more" in message
    assert "2 rows" in message
    assert re.search("capacity_rows.*hash_size", message)


@pytest.mark.parametrize("first_index_size", [2, 1 << 16])
def test_a_full_table_stays_whole(monkeypatch: pytest.MonkeyPatch, first_index_size: int) -> None:
    """Rows found before are still found, unchanged and trainable; a retry with known signs works, new ones fail."""
    monkeypatch.setattr(table_module, "_FIRST_INDEX_SIZE", first_index_size)
    table = Table([drawn.slot("s", optimizer="sgd", learning_rate=1.0)], [0], 10, seed=0)
    before, pooled = look_up(table, one_bag(drawn.EDGES))
    for _ in range(2):
        with pytest.raises(CapacityError):
            look_up(table, one_bag([*drawn.EDGES, *range(100, 110)]))
    assert table.num_rows == 10
    again, pooled_again = look_up(table, one_bag(drawn.EDGES))
    assert again.tolist() == before.tolist()
    np.testing.assert_array_equal(pooled_again, pooled)
    created, _ = look_up(table, one_bag([100, 101, 102, 103]), create=False)
    assert created.tolist() == [7, 8, 9, -1]
    assert table.push(at(one_bag(drawn.EDGES)), again, np.ones((1, 8), np.float32)) == len(drawn.EDGES)
    _, stepped = look_up(table, one_bag(drawn.EDGES))
    np.testing.assert_allclose(stepped, pooled - len(drawn.EDGES), rtol=1e-5)
    assert table.rows()[0].tolist() == [*drawn.EDGES, 100, 101, 102]


def test_a_table_without_room_refuses_the_first_sign() -> None:
    """`capacity_rows` 0 is a table that can only be read."""
    table = Table([drawn.slot("s")], [0], 0, seed=0)
    assert look_up(table, one_bag([5]), create=False)[1].tolist() == [[0.0] * 8]
    with pytest.raises(CapacityError, match="slots s is full: 0 rows"):
        look_up(table, one_bag([5]))


def test_memory_that_cannot_be_had_names_slots_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """2**31 - 2 rows of 64 bytes: the bound of a table is refused with its size, as an error of capacity."""

    def starved(floats: int) -> None:
        assert floats == table_module.MAX_ROWS * 16
        raise MemoryError

    monkeypatch.setattr(table_module, "_aligned_zeros", starved)
    with pytest.raises(CapacityError, match=r"2,147,483,646 rows of 64 bytes \(128.0 GiB\).*lower capacity_rows.*: s$"):
        Table([drawn.slot("s")], [0], 1 << 40, seed=0)


class StarvedNumpy:
    """numpy, but zeros of more than `most` elements cannot be had."""

    def __init__(self, most: int) -> None:
        self.most = most

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def zeros(self, size: int, dtype: Any) -> np.ndarray:
        if size > self.most:
            raise MemoryError
        return np.zeros(size, dtype)


def test_an_index_that_cannot_grow_is_an_error_of_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for the doubled index: the slots are named, and what is held can still be read and trained."""
    monkeypatch.setattr(table_module, "_FIRST_INDEX_SIZE", 16)
    table = Table([drawn.slot("user_id")], [0], 1000, seed=0)
    rows, pooled = look_up(table, one_bag(range(5)))
    with monkeypatch.context() as starving:
        starving.setattr(table_module, "np", StarvedNumpy(most=32))
        with pytest.raises(CapacityError, match="user_id"):
            look_up(table, one_bag(range(100)))
        again, pooled_again = look_up(table, one_bag(range(5)))
    assert again.tolist() == rows.tolist()
    np.testing.assert_array_equal(pooled_again, pooled)
    look_up(table, one_bag(range(100)))  # memory is back
    assert table.rows()[0].tolist() == list(range(100))


def test_row_bytes_is_what_a_row_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, at the index's emptiest: just doubled."""
    monkeypatch.setattr(table_module, "_FIRST_INDEX_SIZE", 1 << 10)
    for slot in (drawn.slot("a", dim=16), drawn.slot("b", dim=5, optimizer="sgd")):
        num_rows = int((1 << 10) * 0.7) + 1
        table = Table([slot], [0], num_rows, seed=0)
        look_up(table, one_bag(range(num_rows)))
        taken = (table._arena.nbytes + table._seen.nbytes + table._index.nbytes) / num_rows
        assert row_bytes(slot) == pytest.approx(taken, abs=1)


# --- what a row does not depend on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_rows_do_not_depend_on_arrival_or_index_size(monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """The same signs in another order, in other pieces, from a smaller index: the same first values, bit by bit."""
    random = np.random.default_rng(0)
    signs = [*drawn.EDGES, *drawn.LAST_HOME, *(naive.mix(i) for i in range(1, 301))]
    seen = []
    for first_index_size, num_pieces in ((2, 1), (1 << 16, 7), (64, 300)):
        monkeypatch.setattr(table_module, "_FIRST_INDEX_SIZE", first_index_size)
        table = Table([drawn.slot("s", optimizer=optimizer, dim=19)], [0], 1000, seed=5)
        for piece in np.array_split(random.permutation(np.array(signs, np.uint64)), num_pieces):
            look_up(table, one_bag(piece))
        held, _, values = table.rows()
        seen.append({int(sign): row.tobytes() for sign, row in zip(held, values, strict=True)})
    assert len(seen[0]) == len(signs)
    assert seen[0] == seen[1] == seen[2]


def test_rows_depend_on_the_seed() -> None:
    """Another seed is another model."""
    values = [look_up(Table([drawn.slot("s")], [0], 10, seed), one_bag([2**63]))[1] for seed in (0, 1, 2**63 - 1)]
    assert len({value.tobytes() for value in values}) == 3


@pytest.mark.parametrize("dim", [1, 8, 16, 19])
def test_the_arena_starts_on_a_cache_line(dim: int) -> None:
    """64 bytes; so every row does when its stride is a multiple of them."""
    for capacity_rows in (1, 7, 1000, 100_000):
        table = Table([drawn.slot("s", dim=dim)], [0], capacity_rows, seed=0)
        assert table._arena.ctypes.data % 64 == 0
        assert len(table._arena) == capacity_rows * 2 * dim


def test_reading_changes_nothing() -> None:
    """Without `create`, unknown signs read zeros and count in a mean's number of signs, and no row appears."""
    table = Table([drawn.slot("s", pooling="mean")], [0], 10, seed=0)
    _, pooled = look_up(table, one_bag([7]))
    before = table.rows()
    rows, out = look_up(table, [[[7, 8], [8], [], [7]]], create=False)
    assert rows.tolist() == [0, -1, -1, 0]
    np.testing.assert_allclose(out, [pooled[0] / 2, np.zeros(8), np.zeros(8), pooled[0]], rtol=1e-6)
    for ours, then in zip(table.rows(), before, strict=True):
        np.testing.assert_array_equal(ours, then)


def test_pushes_step_each_slot_by_its_own_rate() -> None:
    """Slots share a table when dim and optimizer agree; learning rate and pooling stay theirs."""
    slots = [drawn.slot(f"s{k}", optimizer="sgd", learning_rate=rate) for k, rate in enumerate((0.5, 2.0))]
    table = Table(slots, [0, 1], 10, seed=0)
    bags: drawn.Bags = [[[1], [1]], [[2], []]]
    rows, before = look_up(table, bags)
    grads = np.ones((2, 16), np.float32)
    assert table.push(at(bags), rows, grads) == 2
    _, after = look_up(table, bags)
    np.testing.assert_allclose((before - after)[0, [0, 8]], [2 * 0.5, 2.0], rtol=1e-6)


# --- threads ----------------------------------------------------------------------------------------------------------


def together(*works: Callable[[], None]) -> None:
    """Run all at once and raise what any of them raises."""
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        start.wait()
        work()

    with ThreadPoolExecutor(len(works)) as threads:
        for done in [threads.submit(run, work) for work in works]:
            done.result()


@pytest.mark.usefixtures("hurried_switching")
def test_threads_create_each_sign_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads look the same new signs up in different orders while the index grows, and a fifth lists the rows."""
    monkeypatch.setattr(table_module, "_FIRST_INDEX_SIZE", 2)
    table = Table([drawn.slot("s")], [0], 3000, seed=0)
    signs = np.array([naive.mix(i) for i in range(3000)], np.uint64)
    found: dict[int, dict[int, int]] = {}

    def look(seed: int) -> Callable[[], None]:
        def work() -> None:
            mine: dict[int, int] = {}
            for piece in np.array_split(np.random.default_rng(seed).permutation(signs), 20):
                rows, _ = look_up(table, one_bag(piece))
                mine.update(zip(piece.tolist(), rows.tolist(), strict=True))
            found[seed] = mine

        return work

    def list_rows() -> None:
        for _ in range(20):
            held, slot_ids, values = table.rows()
            assert len(np.unique(held)) == len(held) == len(slot_ids) == len(values)
            expected = [naive.draw(int(sign), 0, 8, 0.5) for sign in held[:5]]
            np.testing.assert_array_equal(values[:5, :8], np.array(expected, np.float32).reshape(-1, 8))

    together(*map(look, range(4)), list_rows)
    assert sorted(found[0].values()) == list(range(3000))
    assert found[0] == found[1] == found[2] == found[3]


def test_row_bytes_counts_state() -> None:
    """Adagrad doubles the floats of a row."""
    adagrad = Slot(name="s", dim=16)
    assert row_bytes(adagrad) - row_bytes(Slot(name="s", dim=16, optimizer="sgd")) == 16 * 4

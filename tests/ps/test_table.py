"""`Table` against a dict, with tiny capacities, so that growth, eviction, erasing and reuse happen all the time."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flowps.config import Slot
from flowps.errors import CapacityError
from flowps.ps import memory as memory_module
from flowps.ps import recency as recency_module
from flowps.ps.memory import row_bytes
from flowps.ps.table import Bags, Table, Touched
from flowps.ps.team import Team
from tests.ps import drawn, naive
from tests.ps.tables import bags_at, check, look_up, one_bag, read, rows_of, see, small_stripes, table_of

DEEP = int(os.environ.get("FLOWPS_DEEP", "1"))  # `make test-deep` raises it: that many times the examples
UNIVERSE = (*drawn.EDGES, *drawn.LAST_HOME, *(naive.mix(i) for i in range(1, 40)))


# --- against a dict ---------------------------------------------------------------------------------------------------


class TableMachine(RuleBasedStateMachine):
    """Lookups, pushes, erasing and reading in any order, on a table with room for a few rows."""

    @initialize(
        data=st.data(), dim=drawn.dims, optimizer=st.sampled_from(("sgd", "adagrad")), seed=drawn.seeds,
        capacity=st.integers(6, 60), stripe_rows=st.sampled_from((4, 1000)), threads=st.sampled_from((1, 2, 4)),
        allocate=st.booleans(),
    )  # fmt: skip
    def begin(
        self, data: st.DataObject, dim: int, optimizer: str, seed: int, capacity: int, stripe_rows: int, threads: int,
        allocate: bool,
    ) -> None:  # fmt: skip
        self.small = small_stripes(stripe_rows)
        self.small.__enter__()
        poolings = data.draw(st.lists(st.sampled_from(("sum", "mean", "sqrtn", "none")), min_size=1, max_size=3))
        slots = [
            drawn.slot(f"s{k}", dim=dim, optimizer=optimizer, pooling=pooling, max_len=2, learning_rate=0.1 * (k + 1),
                       initial_accumulator=0.1, init_scale=0.5 + k)
            for k, pooling in enumerate(poolings)
        ]  # fmt: skip
        self.positions = data.draw(st.permutations(range(len(slots) + 1)))[: len(slots)]
        self.team = Team(threads, "test")
        self.table = Table(slots, range(len(slots)), capacity, seed, self.team, allocate)
        self.twin = naive.NaiveTable(slots, seed)
        self.in_flight: list[tuple[Touched, naive.Bags]] = []
        self.width = sum(slot.width for slot in slots)
        # Signs looked up since the oldest batch in flight may not go; those of a lookup that failed may or may not have come.
        self.recent: list[set[int]] = []
        self.failed: list[set[int]] = []

    def bags(self, data: st.DataObject, size: int) -> naive.Bags:
        """Bags whose slots share no sign, as seeds of slots see to."""
        drawn_bags = data.draw(drawn.bags(len(self.twin.slots), size, st.sampled_from(UNIVERSE), most=3))
        return [[[sign ^ (k << 61) for sign in bag] for bag in samples] for k, samples in enumerate(drawn_bags)]

    def expect(self, out: np.ndarray, of: naive.Bags) -> None:
        """The buffer is what the twin pools."""
        expected = np.concatenate([np.array(slot).reshape(len(of[0]), -1) for slot in self.twin.pooled(of)], axis=1)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)

    @rule(data=st.data(), size=st.integers(1, 3))
    def look_up(self, data: st.DataObject, size: int) -> None:
        of = self.bags(data, size)
        bags, out = bags_at(of, self.twin.slots, self.positions), np.full((size, self.width), np.nan, np.float32)
        signs = {sign for samples in of for bag in samples for sign in bag}
        pinned = set().union(*self.recent, *self.failed) | signs
        before = self.table.stats()
        try:
            touched = self.table.find(bags)
            self.table.pool(touched, out)
        except CapacityError:
            # Only where what is in flight fills a stripe; the bound of a stripe is not below that of its share of the rows.
            assert len(pinned) > self.table.memory.capacity_rows // (2 * self.table.memory.num_stripes)
            self.adopt(signs, self.table.stats().evicted - before.evicted)
            if self.recent:
                self.failed[-1] |= signs
            return
        self.adopt(signs, self.table.stats().evicted - before.evicted)
        assert signs <= self.twin.rows.keys()
        self.expect(out, of)
        self.in_flight.append((touched, of))
        self.recent.append(signs)
        self.failed.append(set())

    def adopt(self, signs: set[int], evicted: int) -> None:
        """Take over what a lookup has created and evicted, having checked that it was allowed to."""
        slot_of = {sign: self.twin.slots[slot] for sign, slot in zip(*self.table.entries()[:2], strict=True)}
        held = rows_of(self.table)
        gone = self.twin.rows.keys() - held.keys()
        assert not gone & set().union(*self.recent), "a row in flight was evicted"
        assert evicted or not gone
        for sign in gone:
            del self.twin.rows[sign]
        for sign, row in held.items():
            fresh = self.twin.new(slot_of[sign], sign)
            # Known before, unless it went and came back within the lookup; else as its sign says.
            is_fresh = sign not in self.twin.rows or (evicted and sign in signs and np.array_equal(row, fresh))
            if is_fresh:
                assert sign in signs
                np.testing.assert_array_equal(row, fresh)
                self.twin.rows[sign] = fresh

    @rule(data=st.data(), size=st.integers(1, 3))
    def evaluate(self, data: st.DataObject, size: int) -> None:
        of = self.bags(data, size)
        out, stamps = np.full((size, self.width), np.nan, np.float32), self.table.entries()[2]
        self.table.read(bags_at(of, self.twin.slots, self.positions), out)
        self.expect(out, of)
        np.testing.assert_array_equal(self.table.entries()[2], stamps)

    @precondition(lambda self: getattr(self, "in_flight", None))
    @rule(data=st.data(), random=drawn.generators, forget=st.booleans())
    def push(self, data: st.DataObject, random: np.random.Generator, forget: bool) -> None:
        place = data.draw(st.integers(0, len(self.in_flight) - 1))
        touched, of = self.in_flight.pop(place)
        # A batch that lands is pinned until all before it have landed.
        for signs in (self.recent, self.failed):
            landed = signs.pop(place)
            if place:
                signs[place - 1] |= landed
        if forget and random.random() < 0.3:
            self.table.forget(touched)
            return
        grads = random.uniform(-1, 1, (len(of[0]), self.width)).astype(np.float32)
        ends = np.cumsum([slot.width for slot in self.twin.slots])[:-1]
        assert self.table.push(touched, grads) == self.twin.push(of, np.split(grads, ends, axis=1))

    @rule(signs=st.lists(st.sampled_from(UNIVERSE), max_size=4, unique=True))
    def erase(self, signs: list[int]) -> None:
        before = self.twin.rows.keys() & set(signs)
        erased = self.table.erase(np.array(signs, np.uint64))
        gone = before - rows_of(self.table).keys()
        assert erased == len(gone)
        assert not gone & set().union(*self.recent)
        for sign in gone:
            del self.twin.rows[sign]

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "table"):
            check(self.table)
            naive.same(rows_of(self.table), self.twin.rows)

    def teardown(self) -> None:
        if hasattr(self, "team"):
            self.team.close()
        if hasattr(self, "small"):  # also where a draw has ended `begin`: small stripes must not be those of later tests
            self.small.__exit__(None, None, None)


TestAgainstDict = TableMachine.TestCase
TestAgainstDict.settings = drawn.bounded(max_examples=60 * DEEP, stateful_step_count=25)


# --- growth and bounds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stripe_rows", [16, 100_000])
def test_growth_keeps_every_row(stripe_rows: int) -> None:
    """From two entries to thousands within one lookup: the same rows, found again."""
    with small_stripes(stripe_rows), table_of([drawn.slot("s")], 10_000, seed=1) as table:
        signs = np.random.default_rng(0).permutation(np.array([naive.mix(i) for i in range(1, 5001)], np.uint64))
        see(table, one_bag(signs))
        before = rows_of(table)
        assert before.keys() == set(signs.tolist())
        see(table, one_bag([*signs[::-1], *range(2000)]))
        after = rows_of(table)
        assert table.num_rows == 7000
        assert all(np.array_equal(after[sign], row) for sign, row in before.items())
        check(table)


def test_capacity_is_a_hard_bound_that_is_used() -> None:
    """Of ten times as many signs as fit, the table holds its bound; the arena never grows."""
    with table_of([drawn.slot("s")], 40_000, allocate=True) as table:
        arena = table.memory.arena.nbytes
        for first in range(0, 400_000, 10_000):
            see(table, one_bag(range(first, first + 10_000)))
            assert table.num_rows <= 40_000
        assert table.num_rows > 0.8 * 40_000  # an eighth of a segment goes at a time
        assert table.memory.arena.nbytes == arena
        check(table)


def test_as_many_rows_as_asked_for_fit() -> None:
    """Exactly so in one stripe; in several the first that is full makes room by an eighth of a segment."""
    for capacity, least in ((1000, 1000), (100_000, 95_000)):
        with table_of([drawn.slot("s", dim=2)], capacity) as table:
            for first in range(0, capacity, 1000):
                see(table, one_bag(range(first, first + 1000)))
            assert least <= table.num_rows <= capacity


@pytest.mark.parametrize("stripe_rows", [16, 100_000])
def test_rows_in_flight_are_never_evicted(stripe_rows: int) -> None:
    """Full of older rows, the table gives up those, and keeps what was looked up since the oldest batch in flight."""
    with small_stripes(stripe_rows), table_of([drawn.slot("s")], 200) as table:
        for first in range(0, 2000, 20):
            see(table, one_bag(range(first, first + 20)))
            if first % 200 == 100:
                touched, _ = look_up(table, one_bag(range(5000 + first, 5020 + first)))
                for turn in range(5):
                    see(table, one_bag(range(10_000 + 20 * turn + first, 10_020 + 20 * turn + first)))
                kept = {*range(5000 + first, 5020 + first), *range(10_000 + first, 10_100 + first)}
                assert kept <= rows_of(table).keys()
                assert table.push(touched, np.ones((1, 8), np.float32)) == 20
        assert table.stats().evicted > 1000
        assert not set(range(5000, 6000)) & rows_of(table).keys()  # once landed, they went
        check(table)


def test_the_last_rows_go_where_they_are_needed() -> None:
    """A batch of exactly as many signs as fit is looked up whole, though no stripe holds just its share; one more is refused."""
    with small_stripes(16), table_of([drawn.slot("s", dim=2)], 1000) as table:
        touched, _ = look_up(table, one_bag(naive.mix(i) for i in range(990)))
        assert table.num_rows == 990
        table.forget(touched)
        with pytest.raises(CapacityError):
            look_up(table, one_bag(naive.mix(i) for i in range(5000, 6001)))
        check(table)


def test_more_in_flight_than_fits_says_what_to_do() -> None:
    """The error names the slots, the bound, the batches and the knobs; the table goes on, and what was in flight is untouched."""
    slots = [drawn.slot(f"slot_{k}") for k in range(7)]
    with table_of(slots, 10) as table:
        first, _ = look_up(table, [[[k]] for k in range(7)])
        with pytest.raises(CapacityError) as refusal:
            look_up(table, [[[10 + k]] for k in range(7)])
        message = str(refusal.value)
        assert "slot_0, slot_1, slot_2, slot_3, slot_4 and 2 more" in message
        assert "10 rows, 2 batches in flight" in message
        assert re.search(r"raise capacity_rows.*or lower trainer.in_flight or data.batch_size", message)
        assert table.push(first, np.ones((1, 56), np.float32)) == 7
        see(table, [[[10 + k]] for k in range(7)])  # now there is room
        check(table)


def test_a_table_without_room_refuses_the_first_sign() -> None:
    """`capacity_rows` 0 is a table that can only be read."""
    with table_of([drawn.slot("s")], 0) as table:
        assert read(table, one_bag([5])).tolist() == [[0.0] * 8]
        with pytest.raises(CapacityError, match="slots s can hold: 0 rows"):
            look_up(table, one_bag([5]))


def test_the_least_recently_used_go() -> None:
    """On a zipf trace the hit rate is within one per cent of an exact LRU of the same size."""
    capacity, random = 20_000, np.random.default_rng(0)
    ranks = random.zipf(1.1, 1_500_000)
    signs = ranks[ranks < 10_000_000].astype(np.uint64)[:1_000_000].reshape(-1, 2000)
    exact: dict[int, None] = {}
    hits = seen = 0
    with table_of([drawn.slot("s", dim=1, optimizer="sgd")], capacity) as table:
        for batch in signs:
            for sign in batch.tolist():
                seen += 1
                if sign in exact:
                    hits += 1
                    del exact[sign]
                elif len(exact) == capacity:
                    del exact[next(iter(exact))]
                exact[sign] = None
            see(table, one_bag(batch))
        ours = 1 - table.stats().inserted / seen
        assert table.stats().evicted > capacity
    assert hits / seen - ours < 0.01


def test_memory_that_cannot_be_had_names_slots_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """2**31 - 2 rows of 64 bytes: the bound of a table is refused with its size, as an error of capacity."""

    def starved(count: int, kind: Any, touch: bool) -> None:
        assert count == (memory_module.MAX_ROWS + 1) * 16
        raise MemoryError

    monkeypatch.setattr(memory_module, "_aligned_zeros", starved)
    with pytest.raises(CapacityError, match=r"2,147,483,646 rows of 64 bytes \(128.0 GiB.*lower capacity_rows.*: s$"):
        Table([drawn.slot("s")], [0], 1 << 40, seed=0)


def test_an_index_that_cannot_grow_is_an_error_of_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for the larger index: the slots are named, and what is held can still be read and trained."""
    with small_stripes(1000, first_size=16), table_of([drawn.slot("user_id")], 1000) as table:
        touched, pooled = look_up(table, one_bag(range(5)))
        with monkeypatch.context() as starving:

            def starved(size: int, touch: bool) -> None:
                raise MemoryError

            starving.setattr(table.memory, "_new_index", starved)
            with pytest.raises(CapacityError, match="user_id"):
                look_up(table, one_bag(range(100)))
            np.testing.assert_array_equal(read(table, one_bag(range(5))), pooled)
            assert table.push(touched, np.zeros((1, 8), np.float32)) == 5
        see(table, one_bag(range(100)))  # memory is back
        assert rows_of(table).keys() == set(range(100))
        check(table)


@pytest.mark.parametrize(
    "settings", [{"dim": 16}, {"dim": 5, "optimizer": "sgd"}, {"dim": 8, "storage": "float16"}, {"dim": 16, "admit_after": 2}]
)
def test_row_bytes_is_what_a_row_takes(settings: dict[str, Any]) -> None:
    """Within the slack that stripes and pads need."""
    slot = drawn.slot("s", **settings)
    with table_of([slot], 1_000_000, allocate=True) as table:
        assert row_bytes(slot) == pytest.approx(table.stats().bytes / 1_000_000, rel=0.05)
        assert table.stats().bytes / 1_000_000 <= row_bytes(slot) * 1.05


def test_a_row_costs_at_most_three_tenths_more_than_its_floats() -> None:
    """Of 16 weights and Adagrad's state, at the index's load."""
    with table_of([drawn.slot("s", dim=16)], 2_000_000) as table:
        size = table.memory.num_stripes * (table.memory.max_size + 1024) * 16
        rest = table.memory.arena.nbytes + table.memory.row_slots.nbytes + table.memory.free.nbytes
        assert (size + rest) / 2_000_000 <= 1.3 * 128


# --- time to live, admission, erasing ---------------------------------------------------------------------------------


def test_a_row_beyond_its_time_starts_anew() -> None:
    """After three steps without it the row keeps, after four its weights and state are those of its sign again."""
    slots = [drawn.slot("mortal", ttl_steps=3), drawn.slot("immortal")]
    with table_of(slots, 100, seed=5) as table:
        touched, fresh = look_up(table, [[[7]], [[8]]])
        table.push(touched, np.ones((1, 16), np.float32))
        for passed, is_alive in ((3, True), (4, False)):
            for _ in range(passed - 1):
                see(table, [[[100]], [[200]]])
            found = see(table, [[[7, 7]], [[8]]])
            assert np.allclose(found[:, :8], 2 * fresh[:, :8]) != is_alive
            assert not np.allclose(found[:, 8:], fresh[:, 8:])  # trained once, for ever
            assert table.stats().expired == (0 if is_alive else 1)
        check(table)


def test_a_row_in_flight_does_not_expire() -> None:
    """Its push meets the weights it was looked up with."""
    with table_of([drawn.slot("s", ttl_steps=1, optimizer="sgd", learning_rate=1.0)], 100) as table:
        touched, fresh = look_up(table, one_bag([7]))
        for _ in range(5):
            see(table, one_bag([100]))
        table.push(touched, np.ones((1, 8), np.float32))
        np.testing.assert_allclose(read(table, one_bag([7])), fresh - 1)
        look_up(table, one_bag([7]))
        assert table.stats().expired == 1


def test_a_long_time_is_measured_with_few_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row never expires early, and at most a mark's distance late."""
    monkeypatch.setattr(recency_module, "_TTL_MARKS", 10)
    with table_of([drawn.slot("s", ttl_steps=100)], 1000) as table:
        for life in (100, 111):
            see(table, one_bag([7]))
            for _ in range(life - 1):
                see(table, one_bag([8]))
            before = table.stats().expired
            see(table, one_bag([7]))
            assert table.stats().expired - before == (life == 111)
        assert len(table.recency._marks[100]) <= 13


def test_each_time_to_live_is_exact_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short one beside a long one in the same table."""
    monkeypatch.setattr(recency_module, "_TTL_MARKS", 10)
    with table_of([drawn.slot("short", ttl_steps=5), drawn.slot("long", ttl_steps=100_000)], 100) as table:
        for passed, expired in ((5, 0), (6, 1)):
            see(table, [[[7]], [[8]]])
            for _ in range(passed - 1):
                see(table, [[[1]], [[2]]])
            see(table, [[[7]], [[8]]])
            assert table.stats().expired == expired


def test_signs_are_admitted_after_some_sights() -> None:
    """Before, they read zeros, have no row, and their gradients are counted, not applied."""
    slots = [drawn.slot("strict", admit_after=3, optimizer="sgd"), drawn.slot("open", optimizer="sgd")]
    with table_of(slots, 100) as table:
        for sight in (1, 2):
            touched, out = look_up(table, [[[7]], [[8]]])
            assert not out[:, :8].any()
            assert out[:, 8:].all()
            assert table.push(touched, np.ones((1, 16), np.float32)) == 1
            stats = table.stats()
            assert (stats.rows, stats.refused, stats.dropped) == (1, sight, sight)
        touched, out = look_up(table, [[[7]], [[8]]])
        np.testing.assert_array_equal(out[0, :8], naive.draw(7, 0, 8, 0.5))
        assert table.push(touched, np.ones((1, 16), np.float32)) == 2
        assert table.stats().refused == 2
        check(table)


def test_sights_within_a_batch_count() -> None:
    """The third of a batch's five occurrences is admitted, and those after it read the row."""
    with table_of([drawn.slot("s", admit_after=3)], 100) as table:
        np.testing.assert_allclose(see(table, one_bag([7] * 5))[0], 3 * naive.draw(7, 0, 8, 0.5), rtol=1e-6)
        assert table.stats().refused == 2


def test_admission_makes_no_room_for_signs_it_refuses() -> None:
    """A full table keeps its rows however many new signs are seen once."""
    with table_of([drawn.slot("s", admit_after=2)], 1000) as table:
        for _ in range(2):
            see(table, one_bag(range(1000)))
        for first in range(10_000, 14_000, 500):
            see(table, one_bag(range(first, first + 500)))
        stats = table.stats()
        # The sketch counts too much now and then; what it lets in makes room an eighth of a segment at a time.
        assert stats.evicted < stats.inserted - 800 < 400
        assert stats.rows >= 800


def test_rare_signs_are_mostly_kept_out() -> None:
    """The sketch overestimates few: of signs seen once per thousand others, under one in twenty gets in at two sights."""
    with table_of([drawn.slot("s", admit_after=2)], 50_000) as table:
        see(table, one_bag(range(100_000)))
        assert table.num_rows < 5000


def test_signs_are_admitted_by_chance() -> None:
    """A quarter of them at the first sight, and another chance at each later one."""
    with table_of([drawn.slot("s", admit_probability=0.25)], 50_000) as table:
        signs = [naive.mix(i) for i in range(20_000)]
        see(table, one_bag(signs))
        first = table.num_rows
        assert abs(first / 20_000 - 0.25) < 0.02
        see(table, one_bag(signs))
        assert abs(table.num_rows / 20_000 - (1 - 0.75**2)) < 0.02


def test_an_erased_row_leaves_no_ghost() -> None:
    """Its sign reads zeros; the row that takes its place begins as its own sign says, and so does the sign when it comes again."""
    with table_of([drawn.slot("s")], 3, seed=9) as table:
        touched, fresh = look_up(table, one_bag([1]))
        assert table.erase(np.array([1], np.uint64)) == 0  # in flight
        table.push(touched, np.full((1, 8), 3, np.float32))
        assert table.erase(np.array([1, 2], np.uint64)) == 1
        assert not read(table, one_bag([1])).any()
        for sign in (5, 6, 1):
            np.testing.assert_array_equal(see(table, one_bag([sign]))[0], naive.draw(sign, 9, 8, 0.5))
        state = {sign: row[8:] for sign, row in rows_of(table).items()}
        assert all((row == np.float32(1e-8)).all() for row in state.values())
        np.testing.assert_array_equal(fresh[0], naive.draw(1, 9, 8, 0.5))
        check(table)


# --- what a row does not depend on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_rows_do_not_depend_on_arrival_or_index_size(optimizer: str) -> None:
    """The same signs in another order, in other pieces, from a smaller index: the same first values, bit by bit."""
    random = np.random.default_rng(0)
    signs = [*drawn.EDGES, *drawn.LAST_HOME, *(naive.mix(i) for i in range(1, 301))]
    seen = []
    for stripe_rows, first_size, num_pieces in ((16, 2, 1), (1000, 1 << 16, 7), (64, 64, 300)):
        with small_stripes(stripe_rows, first_size), table_of([drawn.slot("s", optimizer=optimizer, dim=19)], 1000, 5) as table:
            for piece in np.array_split(random.permutation(np.array(signs, np.uint64)), num_pieces):
                see(table, one_bag(piece))
            seen.append({sign: row.tobytes() for sign, row in rows_of(table).items()})
    assert len(seen[0]) == len(signs)
    assert seen[0] == seen[1] == seen[2]


def test_rows_depend_on_the_seed() -> None:
    """Another seed is another model."""
    values = []
    for seed in (0, 1, 2**63 - 1):
        with table_of([drawn.slot("s")], 10, seed) as table:
            values.append(see(table, one_bag([2**63])).tobytes())
    assert len(set(values)) == 3


@pytest.mark.parametrize("dim", [8, 16, 19])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_any_number_of_threads_gives_the_same_bits(dim: int, storage: str) -> None:
    """Lookups, pushes, weighted and plain, over many batches: rows and answers are equal to the bit for 1 to 8 threads."""
    slots = [
        drawn.slot("a", dim=dim, storage=storage),
        drawn.slot("b", dim=dim, storage=storage, pooling="mean"),
        drawn.slot("c", dim=dim, storage=storage, pooling="none", max_len=3),
    ]
    seen = []
    for threads in (1, 2, 3, 4, 8):
        random = np.random.default_rng(1)
        with small_stripes(16), table_of(slots, 5000, 3, threads) as table:
            outs = []
            for turn in range(12):
                bags = bags_at(drawn.random_bags(random, 3, size=40, values=300, most=12), slots)
                if turn % 2:
                    bags = Bags(
                        bags.signs, bags.offsets, bags.size, bags.positions, bags.columns,
                        random.uniform(0, 2, len(bags.signs)).astype(np.float32),
                    )  # fmt: skip
                out = np.zeros((40, 5 * dim), np.float32)
                touched = table.find(bags)
                table.pool(touched, out)
                outs.append(out.tobytes())
                table.push(touched, random.uniform(-1, 1, out.shape).astype(np.float32))
            check(table)
            seen.append((outs, {sign: row.tobytes() for sign, row in rows_of(table).items()}))
    assert all(other == seen[0] for other in seen[1:])


@pytest.mark.parametrize("dim", [1, 8, 16, 19])
def test_the_arena_starts_on_a_cache_line(dim: int) -> None:
    """64 bytes; so every row does when its stride is a multiple of them."""
    for capacity_rows in (1, 7, 1000, 100_000):
        with table_of([drawn.slot("s", dim=dim)], capacity_rows) as table:
            assert table.memory.arena.ctypes.data % 64 == 0
            assert len(table.memory.arena) == (capacity_rows + 1) * 2 * dim


def test_reading_changes_nothing() -> None:
    """In an evaluation unknown signs read zeros and count in a mean's number of signs, and no row appears or becomes younger."""
    with table_of([drawn.slot("s", pooling="mean")], 10) as table:
        pooled = see(table, one_bag([7]))
        before, stamps = rows_of(table), table.entries()[2]
        out = read(table, [[[7, 8], [8], [], [7]]])
        np.testing.assert_allclose(out, [pooled[0] / 2, np.zeros(8), np.zeros(8), pooled[0]], rtol=1e-6)
        assert rows_of(table).keys() == before.keys() == {7}
        np.testing.assert_array_equal(table.entries()[2], stamps)


def test_pushes_step_each_slot_by_its_own_rate() -> None:
    """Slots share a table when dim and optimizer agree; learning rate and pooling stay theirs."""
    slots = [drawn.slot(f"s{k}", optimizer="sgd", learning_rate=rate) for k, rate in enumerate((0.5, 2.0))]
    with table_of(slots, 10) as table:
        bags: drawn.Bags = [[[1], [1]], [[2], []]]
        touched, before = look_up(table, bags)
        assert table.push(touched, np.ones((2, 16), np.float32)) == 2
        after = read(table, bags)
        np.testing.assert_allclose((before - after)[0, [0, 8]], [2 * 0.5, 2.0], rtol=1e-6)


def test_a_sign_of_two_slots_is_one_row_stepped_by_each() -> None:
    """A collision of 64-bit hashes: one row, one step per slot."""
    slots = [drawn.slot(f"s{k}", optimizer="sgd", learning_rate=1.0) for k in range(2)]
    with table_of(slots, 10) as table:
        touched, before = look_up(table, [[[7]], [[7]]])
        assert table.push(touched, np.ones((1, 16), np.float32)) == 2
        np.testing.assert_allclose(read(table, [[[7]], [[7]]]), before - 2, rtol=1e-6)
        assert table.num_rows == 1


def test_stamps_start_again_before_they_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recency, batches in flight and times to live survive the numbers of lookups being lowered."""
    monkeypatch.setattr(recency_module, "_MAX_STAMP", 300)
    with table_of([drawn.slot("s", ttl_steps=50, optimizer="sgd", learning_rate=1.0)], 40) as table:
        kept, fresh = look_up(table, one_bag([7]))
        for turn in range(40):
            see(table, one_bag([1000 + turn % 30, 5]))
        table.push(kept, np.ones((1, 8), np.float32))
        np.testing.assert_allclose(see(table, one_bag([7])), fresh - 1)
        for turn in range(200):
            see(table, one_bag([2000 + turn, 5]))
        assert 5 in rows_of(table)
        assert 7 not in rows_of(table)
        assert table.recency.next_stamp < 300
        check(table)


def test_a_batch_in_flight_for_ever_ends_the_numbering(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it pins cannot be made older: a lookup that has no numbers left is refused, and goes on once the batch has landed."""
    monkeypatch.setattr(recency_module, "_MAX_STAMP", 100)
    with table_of([drawn.slot("user_id")], 40) as table:
        kept, _ = look_up(table, one_bag([7]))
        for _ in range(30):  # each lookup of one sign takes three numbers
            see(table, one_bag([5]))
        with pytest.raises(CapacityError, match="table of slots user_id has been in flight for so long"):
            see(table, one_bag(range(100, 120)))
        table.forget(kept)
        for _ in range(200):
            see(table, one_bag([5]))
        check(table)


def test_the_statistics_add_up() -> None:
    """Rows = inserted - evicted - erased, and the other counts are those of what was done."""
    with table_of([drawn.slot("s", optimizer="sgd"), drawn.slot("t", optimizer="sgd")], 50) as table:
        for first in range(0, 200, 20):
            touched, _ = look_up(table, [[[*range(first, first + 10)]], [[*range(1000 + first, 1010 + first)]]])
            table.push(touched, np.ones((1, 16), np.float32))
        table.erase(np.arange(180, 190, dtype=np.uint64))
        stats = table.stats()
        assert stats.slots == ("s", "t")
        assert (stats.lookups, stats.pushes, stats.inserted, stats.erased) == (10, 10, 200, 10)
        assert stats.rows == 200 - stats.evicted - 10 == table.num_rows
        assert 0 < stats.index_load < 1
        assert (stats.expired, stats.refused, stats.dropped, stats.unsound, stats.last_unsound) == (0, 0, 0, 0, None)


def test_row_bytes_counts_state_and_storage() -> None:
    """Adagrad doubles the floats of a row, half precision halves its weights."""
    adagrad = Slot(name="s", dim=16)
    assert row_bytes(adagrad) - row_bytes(Slot(name="s", dim=16, optimizer="sgd")) == 16 * 4
    assert row_bytes(adagrad) - row_bytes(Slot(name="s", dim=16, storage="bfloat16")) == 16 * 2
    assert row_bytes(Slot(name="s", dim=16, optimizer="rowwise_adagrad")) - row_bytes(Slot(name="s", optimizer="sgd")) == 4

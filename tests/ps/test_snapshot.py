"""Snapshots and what is restored from them: in place to the last byte, anew with every row; and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.config import Slot
from flowps.errors import CapacityError, CheckpointError
from flowps.ps import recency as recency_module
from flowps.ps import restore as restore_module
from flowps.ps import shard as shard_module
from flowps.ps import snapshot as snapshot_module
from flowps.ps import source as source_module
from flowps.ps.kernels import layout, split
from flowps.ps.placement import Piece
from flowps.ps.shard import Shard
from flowps.ps.snapshot import Chunk, Columns, Part, TableState
from flowps.ps.table import Table
from flowps.ps.team import Team
from tests.ps import drawn, naive
from tests.ps.tables import check, one_bag, small_stripes

DEEP = int(os.environ.get("FLOWPS_DEEP", "1"))

Outcome = bytes | str
SETTINGS: tuple[dict[str, Any], ...] = (
    {"optimizer": "sgd"},
    {"optimizer": "adagrad"},
    {"optimizer": "adam", "storage": "bfloat16"},
    {"optimizer": "adagrad", "storage": "float16"},
    {"optimizer": "rowwise_adagrad"},
    {"optimizer": "adagrad", "ttl_steps": 4},
    {"optimizer": "adagrad", "admit_after": 2, "ttl_steps": 9},
    {"optimizer": "adam", "storage": "bfloat16", "admit_probability": 0.5},
)


@contextmanager
def small_pieces(chunk_bytes: int = 200, rows: int = 8, copiers: int = 2) -> Iterator[None]:
    """Tiny stripes, and chunks of a few rows."""
    with small_stripes(rows), pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_module, "copiers", lambda least: Team(copiers, "test"))
        patch.setattr(snapshot_module, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(restore_module, "_GROUP", 7)
        yield


class Trainee:
    """A shard, and steps of it whose batches and gradients follow from a seed."""

    def __init__(self, slots: Sequence[Slot], capacity_rows: int) -> None:
        self.slots = slots
        self.shard = Shard(slots, [capacity_rows] * len(slots), 3, 4)
        self.columns = np.cumsum([0, *(slot.width for slot in slots)])[:-1].astype(np.int64)
        self.width = sum(slot.width for slot in slots)

    def __enter__(self) -> Trainee:
        return self

    def __exit__(self, *_: object) -> None:
        self.shard.close()

    @property
    def tables(self) -> list[Table]:
        return [table for _, table in self.shard._tables]

    def step(self, seed: int, size: int = 4, values: int = 40, bags: drawn.Bags | None = None) -> Outcome:
        """A lookup, its push, and now and then an erasing; what was pooled, or why nothing was."""
        random = np.random.default_rng(seed)
        bags = drawn.random_bags(random, len(self.slots), size, values) if bags is None else bags
        out = np.zeros((len(bags[0]), self.width), np.float32)
        try:
            self.shard.lookup(0, *drawn.arrays(bags), len(out), np.arange(len(self.slots)), self.columns, out, training=True)
        except CapacityError as error:
            return str(error)
        self.shard.push(0, random.uniform(-1, 1, out.shape).astype(np.float32))
        if random.random() < 0.2:
            slot = int(random.integers(len(self.slots)))
            self.shard.erase(
                self.slots[slot].name, np.array([naive.mix((slot << 32) + v) for v in range(0, min(values, 200), 7)], np.uint64)
            )
        return out.tobytes()

    def rows(self) -> dict[str, dict[int, tuple[bytes, bytes]]]:
        """{slot: {sign: weights and state}}."""
        return {
            rows.slot.name: {
                int(sign): (weights.tobytes(), state.tobytes())
                for sign, weights, state in zip(rows.signs, rows.weights, rows.state, strict=True)
            }
            for rows in self.shard.rows()
        }


def reader(chunks: Sequence[Chunk]) -> Callable[[int, str], Iterator[Columns]]:
    """Of a snapshot in memory."""
    return lambda table, section: (chunk.columns for chunk in chunks if (chunk.table, chunk.section) == (table, section))


def part(states: Sequence[TableState], *chain: Sequence[Chunk]) -> Part:
    """What a shard has left; the states by way of JSON."""
    through = msgspec.json.decode(msgspec.json.encode(states), type=list[TableState])
    return Part(through, [reader(chunks) for chunks in chain])


def saved(trainee: Trainee) -> Part:
    """A whole snapshot."""
    return part(trainee.shard.states(), list(trainee.shard.snapshot(0, None)))


def all_of(slot: str, signs: np.ndarray) -> np.ndarray:
    """Every sign belongs here."""
    return np.ones(len(signs), bool)


def held(table: Table) -> dict[str, Any]:
    """All that a table's future depends on, and what it says of its past."""
    m = table.memory
    words = m.index[1::2]
    rows = (words[words != 0] & layout.ROW).astype(np.int64) - 1
    return {
        "places": np.flatnonzero(words).tobytes(),  # an empty entry may still have the sign of what stood there
        "signs": m.index[0::2][words != 0].tobytes(),
        "words": words[words != 0].tobytes(),
        "rows": m.arena.reshape(-1, m.stride)[rows].tobytes(),
        "slots": m.row_slots[rows].tolist(),
        "free": [m.free[line[layout.FREE_AT] :][: line[layout.FREE]].tolist() for line in m.meta],
        "meta": m.meta.tolist(),
        "next_row": m.next_row,
        "sketch": m.sketch.tobytes(),
        "moments": table.recency.moments(),
        "recency": (table.recency.lookups, table.recency.next_stamp),
        "stats": table.stats(),
    }


def assert_same(ours: Trainee, theirs: Trainee) -> None:
    """To the last byte."""
    for one, other in zip(ours.tables, theirs.tables, strict=True):
        check(one)
        found, expected = held(one), held(other)
        assert [name for name in expected if found[name] != expected[name]] == []


def drawn_slots(random: np.random.Generator, most: int = 4) -> list[Slot]:
    return [
        drawn.slot(f"s{k}", dim=int(random.choice([1, 3, 16])), learning_rate=0.5, **SETTINGS[random.integers(len(SETTINGS))])
        for k in range(random.integers(1, most + 1))
    ]


# --- in place ---------------------------------------------------------------------------------------------------------


@drawn.bounded(max_examples=40 * DEEP)
@given(
    random=drawn.generators, capacity=st.sampled_from((6, 40, 200)), stripe_rows=st.sampled_from((4, 8, 1000)),
    max_stamp=st.sampled_from((400, 1500, recency_module._MAX_STAMP)), deltas=st.integers(0, 3),
    chunk_bytes=st.sampled_from((100, 1 << 26)), copiers=st.sampled_from((1, 2, 4)),
)  # fmt: skip
def test_training_goes_on_as_if_it_had_never_stopped(
    random: np.random.Generator, capacity: int, stripe_rows: int, max_stamp: int, deltas: int, chunk_bytes: int, copiers: int
) -> None:
    """With evictions, times to live, admission, growth, all storages, and stamps that start again; whole and with deltas: after a
    restore every byte is as it was, and so it is after more steps of both."""
    slots = drawn_slots(random)
    with small_pieces(chunk_bytes, stripe_rows, copiers), pytest.MonkeyPatch.context() as patch:
        patch.setattr(recency_module, "_MAX_STAMP", max_stamp)
        with Trainee(slots, capacity) as trainee, Trainee(slots, capacity) as restored:
            seed, chain = 0, []
            for name in range(deltas + 1):
                for _ in range(int(random.choice([0, 1, 6]))):
                    trainee.step(seed := seed + 1)
                chain.append(list(trainee.shard.snapshot(name, name - 1 if name else None)))
            restored.shard.restore([part(trainee.shard.states(), *chain)], all_of)
            assert_same(restored, trainee)
            for _ in range(8):
                seed += 1
                assert restored.step(seed) == trainee.step(seed)
                assert_same(restored, trainee)


def test_a_large_table_and_its_delta() -> None:
    """Several stripes of thousands of rows, several slots, an index that has grown, in chunks as large as they are."""
    slots = [drawn.slot(f"s{k}", dim=16) for k in range(3)]
    with Trainee(slots, 70_000) as trainee, Trainee(slots, 70_000) as restored:
        assert trainee.tables[0].memory.num_stripes == 8
        trainee.step(1, size=20_000, values=10**9)
        whole = list(trainee.shard.snapshot(1, None))
        trainee.step(2, size=200, values=10**9)
        delta = list(trainee.shard.snapshot(2, 1))
        assert sum(len(chunk.columns["sign"]) for chunk in delta if chunk.section == "entries") < 2000
        restored.shard.restore([part(trainee.shard.states(), whole, delta)], all_of)
        assert_same(restored, trainee)
        assert restored.step(3, size=2000, values=10**9) == trainee.step(3, size=2000, values=10**9)
        assert_same(restored, trainee)


def test_an_index_that_was_taken_at_once_is_restored_smaller() -> None:
    """The size is the saved one's, whatever the fresh one began with; and the other way round."""
    slots = [drawn.slot("s")]
    for allocate in ((False, True), (True, False)):
        with small_stripes(16):
            before, after = (Shard(slots, [200], 0, 1, allocate=[wanted]) for wanted in allocate)
            trainee, restored = Trainee(slots, 200), Trainee(slots, 200)
            trainee.shard, restored.shard = before, after
            with trainee, restored:
                trainee.step(1)
                restored.shard.restore([saved(trainee)], all_of)
                assert_same(restored, trainee)


def test_an_index_that_cannot_be_had_is_an_error_of_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for an index of the saved size: the slots are named."""
    with small_stripes(16), Trainee([drawn.slot("user_id")], 200) as trainee, Trainee([drawn.slot("user_id")], 200) as restored:
        trainee.step(1)

        def starved(size: int, touch: bool) -> None:
            raise MemoryError

        monkeypatch.setattr(restored.tables[0].memory, "_new_index", starved)
        with pytest.raises(CapacityError, match="index of slots user_id cannot grow"):
            restored.shard.restore([saved(trainee)], all_of)


def test_each_section_comes_once_even_of_an_empty_shard() -> None:
    """With the columns that `snapshot` names; and an empty shard is restored empty."""
    slots = [drawn.slot("s"), drawn.slot("t", dim=4, admit_after=2)]
    with Trainee(slots, 50) as trainee, Trainee(slots, 50) as restored:
        whole = list(trainee.shard.snapshot(1, None))
        sections = [(chunk.table, chunk.section) for chunk in whole]
        assert sections == [(0, "entries"), (0, "rows"), (0, "free"), (1, "entries"), (1, "rows"), (1, "free"), (1, "sketch")]
        delta = list(trainee.shard.snapshot(2, 1))
        assert [chunk.section for chunk in delta if chunk.table == 0] == ["entries", "rows", "order", "free"]
        for chunk in (*whole, *delta):
            expected = source_module.SECTIONS[chunk.section]
            assert {name: (array.dtype, array.ndim) for name, array in chunk.columns.items()} == expected
        restored.shard.restore([part(trainee.shard.states(), whole, delta)], all_of)
        assert_same(restored, trainee)


def test_a_snapshot_is_a_copy() -> None:
    """What is received stays as it is when training goes on."""
    slots = [*drawn_slots(np.random.default_rng(0)), drawn.slot("last", admit_after=3)]
    with small_pieces(), Trainee(slots, 60) as trainee:
        for seed in range(5):
            trainee.step(seed)
        received = list(trainee.shard.snapshot(1, None))
        trainee.step(5)
        received += trainee.shard.snapshot(2, 1)
        before = [{name: array.copy() for name, array in chunk.columns.items()} for chunk in received]
        for seed in range(6, 20):
            trainee.step(seed)
        for chunk, columns in zip(received, before, strict=True):
            for name, array in columns.items():
                np.testing.assert_array_equal(chunk.columns[name], array)


# --- deltas -----------------------------------------------------------------------------------------------------------


def joined(chunks: Sequence[Chunk], section: str, column: str) -> np.ndarray:
    return np.concatenate([chunk.columns[column] for chunk in chunks if chunk.section == section])


def test_a_delta_has_what_was_touched_and_no_more() -> None:
    """Looked up since, whether new or known; of the rest only that it is still there."""
    with small_pieces(), Trainee([drawn.slot("s")], 100) as trainee:
        trainee.step(0, bags=one_bag(range(1, 31)))
        list(trainee.shard.snapshot(1, None))
        trainee.step(1, bags=one_bag([3, 5, 77]))
        trainee.shard.erase("s", np.array([4, 6], np.uint64))
        delta = list(trainee.shard.snapshot(2, 1))
        assert set(joined(delta, "entries", "sign").tolist()) == {3, 5, 77}
        assert len(joined(delta, "rows", "number")) == 3
        assert len(joined(delta, "order", "number")) == trainee.shard.num_rows == 29
        later = list(trainee.shard.snapshot(3, 2))
        assert len(joined(later, "entries", "sign")) == 0
        since_first = list(trainee.shard.snapshot(4, 1))
        assert set(joined(since_first, "entries", "sign").tolist()) == {3, 5, 77}


def test_after_stamps_start_again_a_delta_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was touched cannot be told apart any more; since the next cut it can."""
    monkeypatch.setattr(recency_module, "_MAX_STAMP", 100)
    with Trainee([drawn.slot("s")], 100) as trainee:
        trainee.step(0, bags=one_bag(range(1, 31)))
        list(trainee.shard.snapshot(1, None))
        for seed in range(1, 30):
            trainee.step(seed, bags=one_bag([3, 5]))
        assert len(joined(list(trainee.shard.snapshot(2, 1)), "entries", "sign")) == trainee.shard.num_rows
        trainee.step(30, bags=one_bag([3, 5]))
        assert len(joined(list(trainee.shard.snapshot(3, 2)), "entries", "sign")) == 2


def test_an_unknown_cut_is_a_key_error() -> None:
    """Never made, forgotten, or too long ago; at the call, before anything is asked for."""
    with Trainee([drawn.slot("s"), drawn.slot("t", dim=4)], 10) as trainee:
        with pytest.raises(KeyError):
            trainee.shard.snapshot(1, 0)
        for name in range(70):
            trainee.shard.snapshot(name, None)
        trainee.shard.forget_cut(69)
        trainee.shard.forget_cut(69)
        for name in (5, 69):
            with pytest.raises(KeyError):
                trainee.shard.snapshot(100, name)
        list(trainee.shard.snapshot(100, 68))
        list(trainee.shard.snapshot(68, 68))  # a name may be used again
        assert 5 not in trainee.tables[0].recency._cuts


def test_a_batch_in_flight_is_a_mistake() -> None:
    """Its push would change rows that have been copied."""
    with Trainee([drawn.slot("s")], 10) as trainee:
        out = np.zeros((1, 8), np.float32)
        trainee.shard.lookup(7, *drawn.arrays([[[1]]]), 1, np.array([0]), np.array([0]), out, training=True)
        with pytest.raises(AssertionError, match="no batch is in flight"):
            list(trainee.shard.snapshot(1, None))
        trainee.shard.forget(7)
        chunks = trainee.shard.snapshot(1, None)
        next(chunks)
        trainee.step(1)
        with pytest.raises(AssertionError, match="used while it was copied"):
            list(chunks)
        with pytest.raises(AssertionError, match="only a fresh shard"):
            trainee.shard.restore([], all_of)


# --- anew -------------------------------------------------------------------------------------------------------------


def keeper(pieces: Sequence[Piece], slots: Sequence[Slot]) -> Callable[[str, np.ndarray], np.ndarray]:
    """Whether signs belong to a shard of these pieces."""
    of = {slots[piece.slot].name: piece for piece in pieces}

    def keep(slot: str, signs: np.ndarray) -> np.ndarray:
        piece = of[slot]
        return np.array([split.part_of(sign, np.uint64(piece.parts)) == piece.part for sign in signs], bool)

    return keep


@drawn.bounded(max_examples=40 * DEEP)
@given(random=drawn.generators, before=st.integers(1, 3), after=st.integers(1, 4), with_delta=st.booleans())
def test_any_number_of_shards_to_any_other(random: np.random.Generator, before: int, after: int, with_delta: bool) -> None:
    """Slots and parts of slots anywhere, then anywhere else: the same rows, in the same order of their last use."""
    slots = drawn_slots(random)
    with small_pieces():
        parts, ages = [], []
        expected: dict[str, dict[int, tuple[bytes, bytes]]] = {slot.name: {} for slot in slots}
        for pieces in drawn.any_placement(random, slots, before).shards:
            if not pieces:
                continue
            with Trainee([slots[piece.slot] for piece in pieces], 30) as trainee:
                chain = []
                for name in range(1 + with_delta):
                    for seed in range(int(random.integers(1, 9))):
                        trainee.step(seed, bags=bags_of(random, pieces))
                    chain.append(list(trainee.shard.snapshot(name, name - 1 if name else None)))
                parts.append(part(trainee.shard.states(), *chain))
                for slot, rows in trainee.rows().items():
                    assert not expected[slot].keys() & rows.keys()
                    expected[slot] |= rows
                ages += [by_age(table) for table in trainee.tables]
        found: dict[str, dict[int, tuple[bytes, bytes]]] = {slot.name: {} for slot in slots}
        for pieces in drawn.any_placement(random, slots, after).shards:
            if not pieces:
                continue
            with Trainee([slots[piece.slot] for piece in pieces], 400) as restored:
                restored.shard.restore(parts, keeper(pieces, slots))
                for slot, rows in restored.rows().items():
                    assert not found[slot].keys() & rows.keys()
                    found[slot] |= rows
                for table in restored.tables:
                    check(table)
                    order = by_age(table)
                    for earlier in ages:
                        here = set(earlier) & set(order)
                        assert [sign for sign in order if sign in here] == [sign for sign in earlier if sign in here]
                for seed in range(5):
                    trained = restored.step(seed, bags=bags_of(random, pieces))
                    assert isinstance(trained, bytes)
                for table in restored.tables:
                    check(table)
        assert found == expected


def bags_of(random: np.random.Generator, pieces: Sequence[Piece]) -> drawn.Bags:
    """Three samples of signs that belong to the pieces; no two slots share any."""
    bags = drawn.random_bags(random, max(piece.slot for piece in pieces) + 1, 3, 20)
    return [
        [[sign for sign in bag if split.part_of(np.uint64(sign), np.uint64(piece.parts)) == piece.part] for bag in bags[piece.slot]]
        for piece in pieces
    ]


def by_age(table: Table) -> list[int]:
    """Signs, the one that was used longest ago first."""
    signs, _, stamps = table.entries()
    return signs[np.argsort(stamps)].tolist()


def test_rows_that_live_elsewhere_now_are_left_out_of_a_table_that_is_alike() -> None:
    """The same slots and capacity, but half of the signs: what stays is where it was, and there is room for others."""
    slots = [drawn.slot("s"), drawn.slot("t")]
    with small_pieces(), Trainee(slots, 100) as trainee, Trainee(slots, 100) as restored:
        for seed in range(10):
            trainee.step(seed)
        pieces = [Piece(0, 1, 2), Piece(1)]
        restored.shard.restore([saved(trainee)], keeper(pieces, slots))
        keep = keeper(pieces, slots)
        assert restored.rows() == {
            slot: {sign: row for sign, row in rows.items() if keep(slot, np.array([sign], np.uint64))[0]}
            for slot, rows in trainee.rows().items()
        }
        assert restored.tables[0].stats().erased > trainee.tables[0].stats().erased
        assert restored.tables[0].recency.next_stamp == trainee.tables[0].recency.next_stamp
        check(restored.tables[0])


@pytest.mark.parametrize("capacity", [30, 1000])
def test_another_capacity(capacity: int) -> None:
    """Larger, or as large as needed: every row, and clocks that go on."""
    slots = [drawn.slot("s", ttl_steps=10, optimizer="adam")]
    with small_pieces(), Trainee(slots, 100) as trainee, Trainee(slots, capacity) as restored:
        for seed in range(6):
            trainee.step(seed, values=30)
        restored.shard.restore([saved(trainee)], all_of)
        assert restored.rows() == trainee.rows()
        check(restored.tables[0])
        ours, theirs = restored.tables[0], trainee.tables[0]
        assert (ours.recency.lookups, ours.recency.next_stamp) == (theirs.recency.lookups, theirs.recency.next_stamp)
        assert ours.recency.moments() == theirs.recency.moments()
        assert (ours.stats().pushes, ours.stats().inserted) == (theirs.stats().pushes, theirs.num_rows)
        # Adam goes by the number of pushes; and what expires, does so at the same step.
        for seed in range(100, 120):
            few = one_bag(range(seed % 7 + 1))
            assert restored.step(seed, bags=few) == trainee.step(seed, bags=few)


def test_rows_that_do_not_fit_are_refused_with_numbers() -> None:
    """How many there are, how many fit, of which slots, and what to do."""
    slots = [drawn.slot("user_id"), drawn.slot("item_id")]
    with small_pieces(), Trainee(slots, 200) as trainee, Trainee(slots, 10) as restored:
        for seed in range(10):
            trainee.step(seed, values=100)
        rows = trainee.shard.num_rows
        with pytest.raises(CapacityError) as refusal:
            restored.shard.restore([saved(trainee)], all_of)
        assert f"{rows:,} rows of the table of slots user_id, item_id, of which 20 fit: 20 rows; raise capacity_rows" in str(
            refusal.value
        )


def test_times_to_live_go_on_after_tables_are_joined() -> None:
    """Two shards with clocks of different rates: in the joint table no row expires early, and each does in the end."""
    slots = [drawn.slot("busy", ttl_steps=6), drawn.slot("idle", ttl_steps=6)]
    parts = []
    for slot, width in zip(slots, (50, 1), strict=True):
        with Trainee([slot], 200) as trainee:
            for turn in range(10):
                trainee.step(turn, bags=one_bag([(1 << 40) + turn % 2, *range(width * turn, width * (turn + 1))]))
            parts.append(saved(trainee))
    for passed, expired in ((4, 0), (5, 1), (6, 2), (8, 2)):
        # Signs 2^40 and 2^40 + 1 were last used in lookups 9 and 10, by both.
        with Trainee(slots, 300) as restored:
            restored.shard.restore([rename(parts[0], 0), rename(parts[1], 1 << 50)], all_of)
            assert restored.tables[0].recency.lookups == 10
            for seed in range(passed):
                restored.step(seed, bags=[[[99_999]], [[99_998]]])
            both = [1 << 40, (1 << 40) + 1]
            restored.step(99, bags=[[both], [[sign ^ 1 << 50 for sign in both]]])
            assert restored.tables[0].stats().expired == 2 * expired


def rename(of: Part, mask: int) -> Part:
    """The same with other signs."""

    def read(table: int, section: str) -> Iterator[Columns]:
        for columns in of.chain[0](table, section):
            yield {**columns, "sign": columns["sign"] ^ np.uint64(mask)} if "sign" in columns else columns

    return Part(of.states, [read])


def test_slots_in_other_tables() -> None:
    """Another first accumulator: what was one table is two, or the other way round; the sums of squares stay."""
    alike = [drawn.slot("s", initial_accumulator=0.1), drawn.slot("t", initial_accumulator=0.1)]
    apart = [drawn.slot("s", initial_accumulator=0.1), drawn.slot("t", initial_accumulator=0.2)]
    for before, after in ((alike, apart), (apart, alike)):
        with small_pieces(), Trainee(before, 100) as trainee, Trainee(after, 100) as restored:
            for seed in range(5):
                trainee.step(seed)
            restored.shard.restore([saved(trainee)], all_of)
            assert len(restored.tables) != len(trainee.tables)
            assert restored.rows() == trainee.rows()


def test_slots_that_come_and_go() -> None:
    """One that is new begins empty, one that is gone is passed over."""
    with (
        Trainee([drawn.slot("s"), drawn.slot("gone")], 100) as trainee,
        Trainee([drawn.slot("new"), drawn.slot("s")], 100) as restored,
    ):
        trainee.step(1)
        restored.shard.restore([saved(trainee)], all_of)
        assert restored.rows() == {"new": {}, "s": trainee.rows()["s"]}
    with Trainee([drawn.slot("s")], 100) as restored:
        restored.shard.restore([], all_of)
        assert restored.shard.num_rows == 0


def test_a_sign_of_two_slots_of_different_shards_is_one_row() -> None:
    """A collision of 64-bit hashes, when their tables are joined."""
    slots = [drawn.slot("s"), drawn.slot("t")]
    parts = []
    for slot in slots:
        with Trainee([slot], 100) as trainee:
            trainee.step(1, bags=one_bag([7, 8 if slot.name == "s" else 9]))
            parts.append(saved(trainee))
    with Trainee(slots, 100) as restored:
        restored.shard.restore(parts, all_of)
        assert {slot: set(rows) for slot, rows in restored.rows().items()} == {"s": {7, 8}, "t": {9}}
    with Trainee(slots[:1], 100) as restored, pytest.raises(CheckpointError, match="slots s is damaged: a sign is there twice"):
        restored.shard.restore([parts[0], parts[0]], all_of)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 4}, "slot 's': dim 4 in the config, 8 in the checkpoint; start a new run directory or set back the slot's dim"),
        ({"optimizer": "sgd"}, "slot 's': optimizer Sgd in the config, Adagrad in the checkpoint"),
        ({"storage": "float16"}, "slot 's': storage float16 in the config, float32 in the checkpoint"),
    ],
)
def test_rows_of_another_kind_are_refused(settings: dict[str, Any], message: str) -> None:
    """The slot, what it is, what it was, and what to do."""
    with Trainee([drawn.slot("s")], 100) as trainee, Trainee([drawn.slot("s", **settings)], 100) as restored:
        trainee.step(1)
        with pytest.raises(CheckpointError, match=message):
            restored.shard.restore([saved(trainee)], all_of)


Damage = Callable[[dict[str, Any]], None]


def edit(section: str, column: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    """Another array for a column, in every chunk of a section."""

    def apply(at: dict[str, Any]) -> None:
        for chunk in at["chain"][-1]:
            if chunk.section == section:
                chunk.columns[column] = change(chunk.columns[column])

    return apply


def drop(section: str) -> Damage:
    """A section without its chunks."""

    def apply(at: dict[str, Any]) -> None:
        at["chain"][-1] = [chunk for chunk in at["chain"][-1] if chunk.section != section]

    return apply


def twice(section: str) -> Damage:
    """A section that comes two times."""

    def apply(at: dict[str, Any]) -> None:
        at["chain"][-1] = [chunk for chunk in at["chain"][-1] for _ in range(1 + (chunk.section == section))]

    return apply


def state(**changes: Any) -> Damage:
    """Other numbers in the state; a function of the one that is there, or a number."""

    def apply(at: dict[str, Any]) -> None:
        found = {name: change(getattr(at["state"], name)) if callable(change) else change for name, change in changes.items()}
        at["state"] = msgspec.structs.replace(at["state"], **found)

    return apply


def count(name: int, by: int, stripe: int = 0) -> Damage:
    """One count of a stripe changed."""

    def change(meta: list[list[int]]) -> list[list[int]]:
        meta = [line.copy() for line in meta]
        meta[stripe][name] += by
        return meta

    return state(meta=change)


def first(to: int) -> Callable[[np.ndarray], np.ndarray]:
    """The first number of an array changed."""

    def change(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed[:1] = to
        return changed

    return change


def second_is_first(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed[1:2] = changed[:1]
    return changed


# What is wrong, what the message says, and whether a table that is filled anew needs it too.
DAMAGES: list[tuple[Damage, str, bool]] = [
    (edit("entries", "word", first(0)), "out of range", True),
    (edit("entries", "word", first(2**31 - 1)), "out of range", True),
    (edit("entries", "word", lambda words: words | np.uint64(2**64 - 2**40)), "out of range", True),
    (edit("entries", "word", second_is_first), "missing, or is there twice", True),
    (edit("entries", "sign", second_is_first), "twice|as many as its count", True),
    (edit("entries", "sign", lambda signs: ~signs), "as many as its count says", False),
    (edit("entries", "sign", lambda signs: signs[1:]), "no column 'word'", True),
    (edit("entries", "sign", lambda signs: signs.astype(np.int64)), "section 'entries' has no column 'sign'", True),
    (edit("rows", "number", first(-1)), "out of range", True),
    (edit("rows", "number", first(2**31 - 1)), "out of range", True),
    (edit("rows", "number", second_is_first), "missing, or is there twice", True),
    (edit("rows", "slot", first(1)), "out of range", True),
    (edit("rows", "slot", first(-1)), "out of range", True),
    (edit("rows", "row", lambda rows: rows[:, :-1]), "15 floats, not 16", True),
    (edit("rows", "row", lambda rows: rows.astype(np.float64)), "no column 'row'", True),
    (edit("rows", "row", lambda rows: rows.reshape(-1)), "no column 'row'", True),
    (edit("free", "row", first(-1)), "out of range", False),
    (edit("free", "row", first(10**6)), "out of range", False),
    (edit("free", "row", second_is_first), "neither in use nor given back", False),
    (edit("free", "row", lambda rows: rows[1:]), "section 'free' has length", False),
    (edit("sketch", "sight", lambda sights: sights[1:]), "section 'sketch' has length", False),
    (drop("entries"), "it has 0 rows, not the", True),
    (drop("rows"), "missing", True),
    (drop("free"), "section 'free' has length 0", False),
    (drop("sketch"), "section 'sketch' has length 0", False),
    (twice("entries"), "more rows than", True),
    (twice("free"), "section 'free' is longer", False),
    (twice("sketch"), "section 'sketch' is longer", False),
    (state(rows=lambda rows: rows + 1), "do not add up|rows, not the", True),
    (state(rows=-1), r"fit together \(rows\)", True),
    (state(next_row=0), r"fit together \(rows\)", True),
    (state(next_row=2**40), r"fit together \(capacity_rows\)", True),
    (state(capacity_rows=2**40, next_row=2**40), r"fit together \(capacity_rows\)", True),
    (state(next_stamp=-5), r"fit together \(next_stamp\)", True),
    (state(next_stamp=0), r"fit together \(next_stamp\)", True),
    (state(next_stamp=2**40), r"fit together \(next_stamp\)", True),
    (state(next_stamp=2), "out of range|fit together", True),
    (state(lookups=-1), r"fit together \(lookups\)", True),
    (state(ttl={5: [(3, 1), (2, 2)]}), r"fit together \(ttl\)", True),
    (state(ttl={5: [(0, 5), (1, 2)]}), r"fit together \(ttl\)", True),
    (state(slots=["s", "s"]), r"fit together \(slots\)", True),
    (state(meta=lambda meta: meta[1:]), "number of stripes", False),
    (state(meta=lambda meta: [line[1:] for line in meta]), "number of stripes", False),
    (count(layout.SIGHTS, 2**70), "count of a stripe is out of range", False),
    (count(layout.SIGHTS, -(2**40)), "do not add up", False),
    (count(layout.LIVE, 1), "do not add up", False),
    (count(layout.FREE, 1), "do not add up", False),
    (count(layout.FREE, 10**9), "do not add up", False),
    (count(layout.FRESH, 10**6), "do not add up", False),
    (count(layout.FRESH_END, 10**6), "do not add up", False),
    (count(layout.HAND, 10**6), "do not add up", False),
    (count(layout.LIVE, 10**6), "do not add up", False),
]


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize(("damage", "message", "always"), DAMAGES)
def test_damage_is_seen(damage: Damage, message: str, always: bool, anew: bool) -> None:
    """Whatever is wrong with a file: an error that says what; no kernel reads or writes where it must not."""
    slots = [drawn.slot("s", admit_after=2, dim=8)]
    with small_pieces(1 << 20, 32), Trainee(slots, 100) as trainee, Trainee(slots, 101 if anew else 100) as restored:
        for seed in range(12):
            trainee.step(seed, values=60)
        trainee.shard.erase("s", np.array(sorted(trainee.rows()["s"])[:9], np.uint64))
        at = {"state": trainee.shard.states()[0], "chain": [list(trainee.shard.snapshot(1, None))]}
        assert at["state"].rows > 10
        damage(at)
        parts = [Part([at["state"]], [reader(chunks) for chunks in at["chain"]])]
        if anew and not always:
            restored.shard.restore(parts, all_of)
            check(restored.tables[0])
            return
        with pytest.raises(CheckpointError, match=f"slots s is damaged: .*(?:{message}).*; restore another one"):
            restored.shard.restore(parts, all_of)


DELTA_DAMAGES: list[tuple[Damage, str]] = [
    (edit("order", "number", first(-1)), "out of range"),
    (edit("order", "number", first(10**6)), "out of range"),
    (edit("order", "number", second_is_first), "missing, or is there twice"),
    (edit("order", "number", lambda numbers: numbers[1:]), "rows, not the"),
    (edit("order", "number", lambda numbers: numbers.astype(np.int64)), "no column 'number'"),
    (twice("order"), "more rows than"),
    (drop("order"), "it has 0 rows"),
    (drop("entries"), "missing|twice|as many"),
    (drop("rows"), "missing"),
]


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize(("damage", "message"), DELTA_DAMAGES)
def test_damage_of_a_delta_is_seen(damage: Damage, message: str, anew: bool) -> None:
    """Its order names rows; an entry and its floats come together."""
    slots = [drawn.slot("s", dim=8)]
    with small_pieces(1 << 20, 32), Trainee(slots, 100) as trainee, Trainee(slots, 101 if anew else 100) as restored:
        for seed in range(12):
            trainee.step(seed, values=60)
        chain = [list(trainee.shard.snapshot(1, None))]
        trainee.step(12, bags=one_bag(range(10)))
        chain.append(list(trainee.shard.snapshot(2, 1)))
        at = {"state": trainee.shard.states()[0], "chain": chain}
        damage(at)
        with pytest.raises(CheckpointError, match=f"slots s is damaged: .*(?:{message})"):
            restored.shard.restore([Part([at["state"]], [reader(chunks) for chunks in chain])], all_of)


def test_a_chain_that_is_empty_or_lacks_a_snapshot() -> None:
    """No snapshot at all; or a delta without the whole one before it."""
    with Trainee([drawn.slot("s")], 100) as trainee:
        trainee.step(1)
        list(trainee.shard.snapshot(1, None))
        trainee.step(2, bags=one_bag([1]))
        delta = list(trainee.shard.snapshot(2, 1))
        for chain, message in (([], r"fit together \(chain\)"), ([delta], "rows, not the")):
            with Trainee([drawn.slot("s")], 100) as restored, pytest.raises(CheckpointError, match=message):
                restored.shard.restore([part(trainee.shard.states(), *chain)], all_of)

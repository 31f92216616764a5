"""`PsClient`: the same model for any placement, errors that reach the caller, buffers nobody writes late, what is counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.batch import Batch
from flowps.config import Slot
from flowps.errors import CapacityError, UnknownBatchError, WireError
from flowps.ps.client import PsClient
from flowps.ps.endpoint import Endpoint, LocalEndpoint
from flowps.ps.load import SlotLoad, measure
from flowps.ps.parcel import Lines, Parcel
from flowps.ps.placement import Piece, Placement, place, predict
from flowps.ps.shard import Shard
from flowps.status.run_status import RunStatus
from tests.ps import drawn, naive

SLOTS = [
    drawn.slot("a", dim=8, optimizer="sgd", learning_rate=0.5),
    drawn.slot("b", dim=16),
    drawn.slot("c", dim=8, optimizer="sgd", pooling="mean"),
    drawn.slot("d", dim=8, pooling="mean"),
    drawn.slot("e", dim=16, initial_accumulator=0.2),
    drawn.slot("f", dim=8, learning_rate=0.5),
    drawn.slot("g", dim=3, optimizer="sgd"),
    drawn.slot("h", dim=24),
    drawn.slot("i", dim=16, init_scale=2.0),
]


@contextmanager
def serving(
    slots: Sequence[Slot], placed: int | Placement, capacity_rows: Sequence[int] | None = None, max_in_flight: int = 4,
    packed: bool = False, status: RunStatus | None = None,
) -> Iterator[tuple[PsClient, list[Shard]]]:  # fmt: skip
    """A client of so many shards, or of those of a placement; `packed`: each reached by an endpoint. Closed at the end."""
    capacities = [1000] * len(slots) if capacity_rows is None else capacity_rows
    placement = place(slots, placed) if isinstance(placed, int) else placed
    own = [drawn.piece_slots(pieces, slots) for pieces in placement.shards]
    shards = [Shard(of, [capacities[p.slot] for p in on], 7, max_in_flight) for of, on in zip(own, placement.shards, strict=True)]
    ways: list[Shard | Endpoint] = list(shards)
    if packed:
        ways = [LocalEndpoint(shard, [slot.width for slot in of]) for shard, of in zip(shards, own, strict=True)]
    client = PsClient(ways, placement, slots, status)
    try:
        yield client, shards
    finally:
        client.close()
        for shard in shards:
            shard.close()


def contents(shards: Sequence[Shard]) -> dict[str, dict[int, tuple[bytes, bytes]]]:
    """{slot: {sign: weights and state}}, wherever they live."""
    found: dict[str, dict[int, tuple[bytes, bytes]]] = {}
    for shard in shards:
        for rows in shard.rows():
            assert rows.slot.name not in found
            pairs = zip(rows.weights, rows.state, strict=True)
            of_slot = {int(sign): (w.tobytes(), a.tobytes()) for sign, (w, a) in zip(rows.signs, pairs, strict=True)}
            assert len(of_slot) == len(rows.signs)
            if of_slot:  # a slot without rows comes once, empty
                found[rows.slot.name] = of_slot
    return found


def test_the_same_on_any_number_of_shards() -> None:
    """Bit by bit: embeddings of training and evaluation, weights and state; with more shards than slots too."""
    seen = []
    for num_shards in (1, 2, 5, 12):
        random = np.random.default_rng(0)
        with serving(SLOTS, num_shards, max_in_flight=2) as (client, shards):
            outs = []
            for step in range(0, 12, 2):
                batches = [drawn.batch(drawn.random_bags(random, len(SLOTS), size=7, values=15)) for _ in range(2)]
                looked_up = [client.lookup(step + i, batch, training=True) for i, batch in enumerate(batches)]
                for i in (1, 0):  # pushes need not come in the order of lookups
                    client.push(step + i, random.uniform(-1, 1, looked_up[i].shape).astype(np.float32))
                outs += [*looked_up, client.lookup(99, batches[0], training=False)]
            unseen = drawn.batch(drawn.random_bags(random, len(SLOTS), size=3, values=1000))
            outs.append(client.lookup(99, unseen, training=False))
            assert sum(shard.num_rows for shard in shards) == sum(map(len, contents(shards).values()))
            seen.append(([out.tobytes() for out in outs], contents(shards)))
            assert outs[0].shape == (7, sum(slot.dim for slot in SLOTS))
            assert all(out.dtype == np.float32 and np.isfinite(out).all() for out in outs)
    for others in seen[1:]:
        assert others == seen[0]


@pytest.mark.parametrize("packed", [False, True])
def test_rows_found_ahead_wherever_they_live(packed: bool) -> None:
    """Bit by bit what whole lookups give, each after the push before it; with parts of slots, and shards behind endpoints."""
    parts = Placement(((Piece(0, 0, 2), Piece(1), Piece(2)), (Piece(0, 1, 2), Piece(3)), ()), (0, 8, 24, 32), 40)
    for placed in (1, 3, parts):
        slots = SLOTS[:4] if placed is parts else SLOTS
        random = np.random.default_rng(0)
        batches = [drawn.batch(drawn.random_bags(random, len(slots), size=7, values=15)) for _ in range(6)]
        with serving(slots, placed, packed=packed) as (whole, theirs), serving(slots, placed, packed=packed) as (client, ours):
            read = client.find(0, batches[0])
            for step, batch in enumerate(batches):
                out = read()
                np.testing.assert_array_equal(out, whole.lookup(step, batch, training=True))
                if step + 1 < len(batches):
                    read = client.find(step + 1, batches[step + 1])
                grads = random.uniform(-1, 1, out.shape).astype(np.float32)
                for trained in (whole, client):
                    trained.push(step, grads)
            assert [sorted(shard.traffic().staleness.items()) for shard in ours] == [
                sorted(shard.traffic().staleness.items()) for shard in theirs
            ]
            assert [shard.num_rows for shard in ours] == [shard.num_rows for shard in theirs]
            assert client.meter.loads([0] * len(slots)) == whole.meter.loads([0] * len(slots))


@pytest.mark.parametrize("half", ["find", "pool"])
def test_when_one_half_fails_no_shard_remembers_the_batch(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(SLOTS, 3, max_in_flight=1) as (client, shards):
        batch = drawn.batch([[[s]] for s in range(len(SLOTS))])

        def broken(*_: Any) -> None:
            raise MemoryError

        def look_up() -> None:
            client.find(0, batch)()

        with monkeypatch.context() as patch:
            patch.setattr(shards[1], half, broken)
            with pytest.raises(MemoryError):
                look_up()
        assert [shard.traffic().in_flight for shard in shards] == [0, 0, 0]
        client.push(1, client.find(1, batch)())


def test_every_slot_in_its_column() -> None:
    """A sample's line is its slots' vectors in the order of the run, wherever they live."""
    with serving(SLOTS, 3) as (client, _):
        bags: drawn.Bags = [[[naive.mix(s)], []] for s in range(len(SLOTS))]
        out = client.lookup(0, drawn.batch(bags), training=True)
    expected = [naive.draw(naive.mix(s), 7, slot.dim, slot.init_scale) for s, slot in enumerate(SLOTS)]
    np.testing.assert_array_equal(out[0], np.concatenate(expected))
    assert not out[1].any()


def test_evaluation_leaves_no_trace() -> None:
    """On no shard: no rows, nothing to push."""
    with serving(SLOTS, 3, max_in_flight=1) as (client, shards):
        batch = drawn.batch(drawn.random_bags(np.random.default_rng(0), len(SLOTS), size=4, values=9))
        for _ in range(3):
            assert not client.lookup(0, batch, training=False).any()
        assert contents(shards) == {}
        with pytest.raises(UnknownBatchError, match="batch 0"):
            client.push(0, np.zeros((4, sum(slot.dim for slot in SLOTS)), np.float32))


def test_a_run_without_slots() -> None:
    """Lines of width 0, and pushes of nothing."""
    with serving([], 2) as (client, _):
        batch = drawn.batch([[[], []]])
        out = client.lookup(0, batch, training=True)
        assert out.shape == (2, 0)
        client.push(0, out)


def test_an_unknown_batch_reaches_the_caller() -> None:
    """From the caller's own shard or from another; pushed twice is unknown the second time."""
    with serving(SLOTS, 4) as (client, shards):
        out = client.lookup(3, drawn.batch([[[s]] for s in range(len(SLOTS))]), training=True)
        client.push(3, out)
        stepped = contents(shards)
        for batch_id in (3, 4):
            with pytest.raises(UnknownBatchError, match=f"batch {batch_id}:"):
                client.push(batch_id, out)
        assert contents(shards) == stepped


@pytest.mark.parametrize("full", range(4))
def test_a_full_table_reaches_the_caller(full: int) -> None:
    """Whichever shard it is on."""
    slots = [drawn.slot(f"slot_{s}", dim=4) for s in range(4)]
    capacity_rows = [1 if s == full else 10 for s in range(4)]
    with serving(slots, 4, capacity_rows) as (client, _):
        client.lookup(0, drawn.batch([[[s]] for s in range(4)]), training=True)
        with pytest.raises(CapacityError, match=f"slot_{full} can hold: 1 rows"):
            client.lookup(1, drawn.batch([[[s, 10 + s]] for s in range(4)]), training=True)


@pytest.mark.parametrize("full", [0, 3])
def test_a_failed_lookup_is_not_in_flight(full: int) -> None:
    """When one shard is full no other goes on remembering the batch: known signs can be looked up under its number."""
    slots = [drawn.slot(f"slot_{s}", dim=4) for s in range(4)]
    capacity_rows = [1 if s == full else 10 for s in range(4)]
    with serving(slots, 4, capacity_rows, max_in_flight=1) as (client, _):
        out = client.lookup(0, drawn.batch([[[s]] for s in range(4)]), training=True)
        client.push(0, out)
        with pytest.raises(CapacityError, match="need more rows"):
            client.lookup(1, drawn.batch([[[s, 10 + s]] for s in range(4)]), training=True)
        known = client.lookup(1, drawn.batch([[[s]] for s in range(4)]), training=True)
        client.push(1, known)


class FakeShard(Shard):
    """Answers with `written` in its columns, after `wait`; or raises `error`."""

    def __init__(self, written: float = 0.0, wait: Any = None, error: Exception | None = None) -> None:
        self.written, self.wait, self.error = written, wait, error

    def lookup(
        self, batch_id: Any, signs: Any, offsets: Any, size: int, positions: Any, columns: Any, out: Any, training: Any, shares: Any
    ) -> None:
        self._serve()
        out[:, columns] = self.written

    def push(self, batch_id: int, grads: Any, rate_scale: float) -> None:
        self._serve()

    def forget(self, batch_id: int) -> None:
        pass

    def _serve(self) -> None:
        if self.wait is not None:
            self.wait()
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("call", ["lookup", "push"])
@pytest.mark.parametrize("failing", [0, 1])
def test_nobody_leaves_while_a_shard_still_writes(failing: int, call: str) -> None:
    """One shard fails at once, the other is still busy: the caller gets the error, but only after both have ended."""
    raised, returned = threading.Event(), threading.Event()
    left_early: list[bool] = []

    def fail() -> None:
        raised.set()

    def finish_late() -> None:
        assert raised.wait(60)
        left_early.append(returned.wait(0.2))  # the time that a caller in a hurry gets to leave

    shards: list[Any] = [None, None]
    shards[failing] = FakeShard(wait=fail, error=CapacityError("full"))
    shards[1 - failing] = FakeShard(wait=finish_late)
    slots = [drawn.slot("a", dim=1), drawn.slot("b", dim=1)]
    client = PsClient(shards, place(slots, 2), slots)

    def ask() -> None:
        try:
            if call == "lookup":
                client.lookup(0, drawn.batch([[[1]], [[2]]]), training=True)
            else:
                client.push(0, np.zeros((1, 2), np.float32))
        finally:
            returned.set()

    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask)
        with pytest.raises(CapacityError, match="full"):
            asked.result()
    client.close()
    assert left_early == [False]


def test_all_shards_are_asked_at_once() -> None:
    """Each waits for all the others: asked one after the other, they would wait for ever."""
    meet = threading.Barrier(5)
    shards: list[Any] = [FakeShard(written=k + 1, wait=lambda: meet.wait(60)) for k in range(5)]
    slots = [drawn.slot(f"s{k}", dim=1) for k in range(5)]
    client = PsClient(shards, place(slots, 5), slots)
    out = client.lookup(0, drawn.batch([[[k]] for k in range(5)]), training=True)
    client.push(0, out)
    client.close()
    assert out.tolist() == [[1, 2, 3, 4, 5]]


@pytest.mark.usefixtures("hurried_switching")
def test_several_threads_share_a_client() -> None:
    """Feeds look up while others push: every thread gets its own batch's answer."""
    with serving(SLOTS, 3, max_in_flight=8) as (client, shards):

        def train(k: int) -> None:
            random = np.random.default_rng(k)
            for step in range(10):
                batch = drawn.batch(drawn.random_bags(random, len(SLOTS), size=4, values=30))
                out = client.lookup(k * 100 + step, batch, training=True)
                assert (out != 0).any()
                client.push(k * 100 + step, np.zeros_like(out))

        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(train, k) for k in range(4)]:
                done.result()
        for slot in SLOTS:  # gradients of zero: the rows are still what their signs say
            for sign, (weights, _) in contents(shards)[slot.name].items():
                assert weights == naive.draw(sign, 7, slot.dim, slot.init_scale).tobytes()


def test_close_ends_its_threads() -> None:
    """And may be called again."""
    before = set(threading.enumerate())
    with serving(SLOTS, 3) as (client, _):
        client.lookup(0, drawn.batch([[[s]] for s in range(len(SLOTS))]), training=True)
        started = set(threading.enumerate()) - before
        assert {thread.name.split("_")[0] for thread in started} == {"flowps-ps-client"}
    assert not any(thread.is_alive() for thread in started)
    client.close()


def test_embeddings_start_on_a_cache_line_and_are_weighted() -> None:
    """The buffer is aligned, so that it can be written past the caches; a batch's shares reach the shards."""
    with serving([drawn.slot("a"), drawn.slot("b", pooling="mean")], 2) as (client, _):
        signs, offsets = drawn.arrays([[[1, 2]], [[3, 4]]])
        plain = Batch(np.zeros(1, np.float32), np.empty((1, 0), np.float32), signs, offsets)
        weighted = Batch(plain.labels, plain.dense, signs, offsets, np.array([2, 0, 0, 5], np.float32))
        client.push(0, client.lookup(0, plain, training=True) * 0)
        out = client.lookup(1, weighted, training=False)
        assert out.ctypes.data % 64 == 0
        np.testing.assert_allclose(out[0, :8], 2 * naive.draw(1, 7, 8, 0.5), rtol=1e-6)
        np.testing.assert_allclose(out[0, 8:], naive.draw(4, 7, 8, 0.5), rtol=1e-6)


# --- the same model for any placement ---------------------------------------------------------------------------------

POOLED = [
    drawn.slot("sum", dim=16),
    drawn.slot("mean", dim=8, optimizer="sgd", learning_rate=0.5, pooling="mean"),
    drawn.slot("sqrtn", dim=5, initial_accumulator=0.1, pooling="sqrtn"),
    drawn.slot("rows", dim=3, pooling="none", max_len=2),
    drawn.slot("hot", dim=16, pooling="mean", initial_accumulator=0.1),
    drawn.slot("adam", dim=17, optimizer="adam", pooling="sqrtn"),
]


def all_rows(shards: Sequence[Shard], placement: Placement, slots: Sequence[Slot]) -> dict[str, dict[int, np.ndarray]]:
    """{slot: {sign: weights and state}} of all shards; each sign is on the shard whose part it is in."""
    found: dict[str, dict[int, np.ndarray]] = {slot.name: {} for slot in slots}
    for shard, pieces in zip(shards, placement.shards, strict=True):
        own = {slots[piece.slot].name: piece for piece in pieces}
        for rows in shard.rows():
            piece, of_slot = own[rows.slot.name], found[rows.slot.name]
            for sign, row in zip(rows.signs.tolist(), np.concatenate([rows.weights, rows.state], axis=1), strict=True):
                assert naive.part_of(sign, piece.parts) == piece.part
                assert sign not in of_slot
                of_slot[sign] = row
    return found


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Assert that they differ by rounding only: sums are made in another order."""
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def check_same_model(random: np.random.Generator, placement: Placement, packed: bool, weighted: bool) -> None:
    """Train on one shard and on those of `placement`: embeddings of training and evaluation and rows are the same."""
    steps = 4
    with (
        serving(POOLED, 1, max_in_flight=2) as (alone, one),
        serving(POOLED, placement, max_in_flight=2, packed=packed) as (client, shards),
    ):
        for first in range(0, 2 * steps, 2):
            bags = [drawn.random_bags(random, len(POOLED), size=6, values=12) for _ in range(2)]
            batches = [drawn.weighted(of, random) if weighted else drawn.batch(of) for of in bags]
            for i, batch in enumerate(batches):
                close(client.lookup(first + i, batch, training=True), alone.lookup(first + i, batch, training=True))
            for i in (1, 0):
                grads = random.uniform(-1, 1, (6, placement.width)).astype(np.float32)
                for trained in (client, alone):
                    trained.push(first + i, grads, 0.5 + i)
            unseen = drawn.batch(drawn.random_bags(random, len(POOLED), size=3, values=1000))
            for batch in (batches[0], unseen):
                close(client.lookup(99, batch, training=False), alone.lookup(99, batch, training=False))
        ours, theirs = all_rows(shards, placement, POOLED), all_rows(one, place(POOLED, 1), POOLED)
        assert {name: rows.keys() for name, rows in ours.items()} == {name: rows.keys() for name, rows in theirs.items()}
        for name, rows in ours.items():
            for sign, row in rows.items():
                close(row, theirs[name][sign])


@drawn.bounded(max_examples=25)
@given(random=drawn.generators, num_shards=st.sampled_from((1, 2, 5)), packed=st.booleans(), weighted=st.booleans())
def test_the_same_model_wherever_slots_and_their_parts_are(
    random: np.random.Generator, num_shards: int, packed: bool, weighted: bool
) -> None:
    """Every pooling, whole or in parts, weighted or not, reached by an endpoint or directly."""
    check_same_model(random, drawn.any_placement(random, POOLED, num_shards), packed, weighted)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_the_same_model_as_it_is_placed(num_shards: int, weighted: bool) -> None:
    """With what a run measures: one slot has nearly all signs and is in parts, all others are whole."""
    loads = [SlotLoad(100.0 if slot.name == "hot" else 1.0, 1.0, 1000) for slot in POOLED]
    placement = place(POOLED, num_shards, loads)
    parts = {POOLED[piece.slot].name for pieces in placement.shards for piece in pieces if piece.parts > 1}
    assert parts == ({"hot"} if num_shards > 1 else set())
    check_same_model(np.random.default_rng(num_shards), placement, packed=False, weighted=weighted)


def test_an_endpoint_does_what_a_shard_does() -> None:
    """Bit by bit, where no slot is in parts: the way to a shard changes nothing."""
    seen = []
    for packed in (False, True):
        random = np.random.default_rng(0)
        with serving(SLOTS, 3, packed=packed) as (client, shards):
            outs = []
            for step in range(5):
                batch = drawn.weighted(drawn.random_bags(random, len(SLOTS), size=5, values=15), random)
                outs.append(client.lookup(step, batch, training=True))
                client.push(step, random.uniform(-1, 1, outs[-1].shape).astype(np.float32))
                outs.append(client.lookup(99, batch, training=False))
            seen.append(([out.tobytes() for out in outs], contents(shards)))
    assert seen[0] == seen[1]


def test_the_ends_of_all_signs_in_parts() -> None:
    """Signs at the edges of ranges, twice in a bag, and bags of one part only: each row is on its shard, and counts once."""
    slots = [drawn.slot("a", dim=8, optimizer="sgd", learning_rate=1.0), drawn.slot("b", dim=8)]
    placement = Placement(((Piece(0, 0, 3),), (Piece(0, 1, 3), Piece(1)), (Piece(0, 2, 3),)), (0, 8), 16)
    bags: drawn.Bags = [[list(drawn.EDGES), [0, 0], [2**64 - 1], [], [2**63, 2**63, 0]], [[5]] * 5]
    with serving(slots, placement) as (client, shards):
        out = client.lookup(0, drawn.batch(bags), training=True)
        rows = {sign: naive.draw(sign, 7, 8, 0.5) for sign in drawn.EDGES}
        close(out[:, :8], np.array([sum((rows[sign] for sign in bag), np.zeros(8)) for bag in bags[0]]))
        client.push(0, np.ones_like(out))
        found = all_rows(shards, placement, slots)["a"]
        times = {sign: sum(bag.count(sign) for bag in bags[0]) for sign in drawn.EDGES}
        assert found.keys() == times.keys()
        for sign, row in found.items():
            close(row, rows[sign] - times[sign])


def test_weights_that_add_up_to_nothing_in_parts() -> None:
    """Zeros, as on one shard, and a gradient of zero; no infinities."""
    slots = [drawn.slot("mean", pooling="mean"), drawn.slot("sqrtn", pooling="sqrtn")]
    placement = Placement(((Piece(0, 0, 2), Piece(1, 1, 2)), (Piece(0, 1, 2), Piece(1, 0, 2))), (0, 8), 16)
    signs, offsets = drawn.arrays([[[1, 2**63]], [[2, 2**63 + 1]]])
    batch = Batch(np.zeros(1, np.float32), np.empty((1, 0), np.float32), signs, offsets, np.array([1, -1, 0, 0], np.float32))
    with serving(slots, placement) as (client, shards):
        out = client.lookup(0, batch, training=True)
        assert not out.any()
        before = all_rows(shards, placement, slots)
        client.push(0, np.ones_like(out))
        for name, rows in all_rows(shards, placement, slots).items():
            for sign, row in rows.items():
                np.testing.assert_array_equal(row, before[name][sign])


def test_a_gradient_that_nobody_may_write_to() -> None:
    """As TensorFlow's are, on all ways; and it is as it was after the push."""
    placement = Placement(((Piece(0, 0, 2), Piece(1)), (Piece(0, 1, 2),)), (0, 8), 16)
    slots = [drawn.slot("a"), drawn.slot("b")]
    for placed, packed in ((placement, False), (1, True), (2, True), (2, False)):
        with serving(slots, placed, packed=packed) as (client, _):
            out = client.lookup(0, drawn.batch([[[1]], [[2]]]), training=True)
            grads = np.ones_like(out)
            grads.flags.writeable = False
            client.push(0, grads)
            assert (grads == 1).all()


@pytest.mark.usefixtures("hurried_switching")
def test_several_threads_share_a_client_of_parts() -> None:
    """As with whole slots: every thread gets its own batch's answer, put together from all parts."""
    placement = drawn.any_placement(np.random.default_rng(3), POOLED, 3)
    with serving(POOLED, placement, max_in_flight=8) as (client, _):

        def train(k: int) -> None:
            random = np.random.default_rng(k)
            for step in range(8):
                bags = drawn.random_bags(random, len(POOLED), size=4, values=30)
                out = client.lookup(k * 100 + step, drawn.batch(bags), training=True)
                rows = [[[naive.draw(sign, 7, slot.dim, slot.init_scale) for sign in bag] for bag in bags[s]]
                        for s, slot in enumerate(POOLED)]  # fmt: skip
                expected = [[naive.pool_bag(bag, slot) for bag in of] for slot, of in zip(POOLED, rows, strict=True)]
                close(out, np.concatenate(expected, axis=1))
                client.push(k * 100 + step, np.zeros_like(out))

        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(train, k) for k in range(4)]:
                done.result(60)


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


class FakeEndpoint(Endpoint):
    """Answers with `written`; raises `error` in lookups and pushes, and `forget_error` when told to forget."""

    def __init__(self, width: int, written: float = 0.0, error: Any = None, forget_error: Any = None) -> None:
        self._width, self._written, self._error, self._forget_error = width, written, error, forget_error
        self.forgot: list[int] = []

    def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Any = None) -> Any:
        """A full answer."""
        if self._error is not None:
            raise self._error
        return np.full((parcel.size, self._width), self._written, np.float32)

    def push(self, batch_id: int, gradient: Lines, rate_scale: float) -> int:
        """Nothing."""
        if self._error is not None:
            raise self._error
        return 0

    def forget(self, batch_id: int) -> None:
        """Be remembered."""
        self.forgot.append(batch_id)
        if self._forget_error is not None:
            raise self._forget_error


@contextmanager
def asking(shards: Sequence[FakeEndpoint], placement: Placement, slots: Sequence[Slot]) -> Iterator[PsClient]:
    """A client of these, closed at the end."""
    client = PsClient(shards, placement, slots)
    try:
        yield client
    finally:
        client.close()


TWO = [drawn.slot("a", dim=1), drawn.slot("b", dim=1)]
ONE_SAMPLE = drawn.batch([[[1]], [[2]]])


def test_answers_are_put_together() -> None:
    """Whole slots in their columns, parts added up."""
    placement = Placement(((Piece(0, 0, 2),), (Piece(0, 1, 2), Piece(1))), (0, 1), 2)
    with asking([FakeEndpoint(1, 3), FakeEndpoint(2, 5)], placement, TWO) as client:
        assert client.lookup(0, ONE_SAMPLE, training=True).tolist() == [[8, 5]]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("training", [False, True])
def test_when_an_endpoint_fails_the_other_forgets(failing: int, training: bool) -> None:
    """The caller gets the error; an evaluation has left nothing to forget."""
    shards = [FakeEndpoint(1, error=WireError("gone") if k == failing else None) for k in range(2)]
    with asking(shards, place(TWO, 2), TWO) as client:
        with pytest.raises(WireError, match="gone"):
            client.lookup(7, ONE_SAMPLE, training)
        assert [shard.forgot for shard in shards] == [[7] if training and k != failing else [] for k in range(2)]
        with pytest.raises(WireError, match="gone"):
            client.push(7, np.zeros((1, 2), np.float32))


def test_forget_tells_every_shard() -> None:
    """Those reached directly too: the batch is not in flight, and its number may be used again."""
    shards = [FakeEndpoint(1), FakeEndpoint(1)]
    with asking(shards, place(TWO, 2), TWO) as client:
        client.forget(3)
        assert [shard.forgot for shard in shards] == [[3], [3]]
    for packed in (False, True):
        with serving(TWO, 2, max_in_flight=1, packed=packed) as (client, _):
            client.lookup(0, ONE_SAMPLE, training=True)
            client.forget(0)
            with pytest.raises(UnknownBatchError, match="batch 0:"):
                client.push(0, np.zeros((1, 2), np.float32))
            client.push(0, client.lookup(0, ONE_SAMPLE, training=True))


def test_a_shard_that_cannot_be_told_to_forget() -> None:
    """Does not keep the others from being told: trainers may wait there for steps that will not come."""
    shards = [FakeEndpoint(1, forget_error=WireError("gone")), FakeEndpoint(1)]
    with asking(shards, place(TWO, 2), TWO) as client:
        with pytest.raises(WireError, match="gone"):
            client.forget(3)
        assert [shard.forgot for shard in shards] == [[3], [3]]


def test_the_error_of_a_lookup_is_the_one_that_counts() -> None:
    """Also where a shard that has answered cannot be told to forget any more."""
    shards = [FakeEndpoint(1, forget_error=WireError("gone")), FakeEndpoint(1, error=CapacityError("full"))]
    with asking(shards, place(TWO, 2), TWO) as client, pytest.raises(CapacityError, match="full"):
        client.lookup(3, ONE_SAMPLE, training=True)


@pytest.mark.parametrize("full", range(2))
def test_a_full_part_reaches_the_caller(full: int) -> None:
    """Of a slot in parts one may be full before the other; neither goes on remembering the batch."""
    placement = Placement(((Piece(0, 0, 2),), (Piece(0, 1, 2),)), (0,), 8)
    slots, border = [drawn.slot("hot")], 2**63
    with serving(slots, placement, [2], max_in_flight=1) as (client, shards):
        signs = [full * border + n for n in range(5)]
        with pytest.raises(CapacityError, match="hot can hold: 2 rows"):
            client.lookup(0, drawn.batch([[[*signs, border - full]]]), training=True)
        out = client.lookup(0, drawn.batch([[[0, border]]]), training=True)
        client.push(0, out)
        assert all(shard.num_rows <= 2 for shard in shards)


def test_attending_where_nobody_waits() -> None:
    """A trainer alone has run out: no shard in this process hears of it."""
    with serving(SLOTS, 3, max_in_flight=1) as (client, shards):
        for number in range(3):
            client.attend(number)
        client.push(3, client.lookup(3, drawn.batch([[[s]] for s in range(len(SLOTS))]), training=True))
        assert {stats.lookups for shard in shards for stats in shard.stats()} == {1}


def test_attending_asks_every_endpoint_for_no_samples() -> None:
    """One without slots is not asked."""
    asked: list[tuple[int, int, bool]] = []

    class Attended(FakeEndpoint):
        def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Any = None) -> Any:
            asked.append((batch_id, parcel.size, training))
            return super().lookup(batch_id, parcel, training, out)

    with asking([Attended(1) for _ in range(3)], place(TWO, 3), TWO) as client:
        client.attend(5)
        assert asked == [(5, 0, True)] * 2


# --- what is counted --------------------------------------------------------------------------------------------------


def test_the_meter_counts_training_lookups() -> None:
    """Those that succeed; not evaluations."""
    batches = [drawn.batch([[[1, 1, 2], [n]], [[5], []]]) for n in range(3)]
    with serving(TWO, 2, [4, 4], max_in_flight=4) as (client, _):
        for n, batch in enumerate(batches):
            client.lookup(n, batch, training=True)
            client.lookup(99, batch, training=False)
        with pytest.raises(CapacityError, match="need more rows"):
            client.lookup(3, drawn.batch([[list(range(20))], [[]]]), training=True)
        assert client.meter.loads([3, 1]) == measure(batches)


def test_what_is_predicted_is_what_the_shards_do() -> None:
    """Exactly for whole slots; parts of a slot have about equal shares of hashed signs."""
    random, slots = np.random.default_rng(0), [drawn.slot(name, dim=16) for name in ("hot", "b", "c")]
    few = drawn.random_bags(random, 2, size=50, values=20)
    batches = [drawn.batch([[[naive.mix(sign) for sign in range(30 * b, 30 * b + 40)] for b in range(50)], *few])]
    loads = measure(batches)
    for placement in (place(slots, 2), place(slots, 2, loads)):
        predicted = predict(placement, slots, loads)
        is_split = any(piece.parts > 1 for pieces in placement.shards for piece in pieces)
        with serving(slots, placement, [4000] * 3) as (client, shards):
            client.lookup(0, batches[0], training=True)
            work = [shard.work() for shard in shards]
        for of, amounts in (
            ("lookups", [w.signs for w in work]),
            ("rows", [w.rows for w in work]),
            ("bytes", [w.bytes for w in work]),
        ):
            expected = [getattr(shard, of) for shard in predicted]
            np.testing.assert_allclose(np.array(amounts) / sum(amounts), expected, atol=0.03 if is_split else 1e-12)


def test_each_shards_calls_are_timed() -> None:
    """Where there are several: with one, the call is what the trainer times anyway."""
    for num_shards, packed in ((1, False), (2, False), (2, True), (5, False)):
        status = RunStatus()
        with serving(TWO, num_shards, packed=packed, status=status) as (client, _):
            for n in range(3):
                client.push(n, client.lookup(n, ONE_SAMPLE, training=True))
        counts = {name: summary.count for name, summary in status.summaries().items()}
        timed = {f"{call}Shard{k}": 3 for call in ("Lookup", "Push") for k in range(2)}  # of two slots on shards of their own
        assert counts == (timed if num_shards > 1 else {})
    # A lookup in two halves is one call, of both.
    status = RunStatus()
    with serving(TWO, 2, status=status) as (client, shards):
        for n in range(3):
            client.push(n, client.find(n, ONE_SAMPLE)())
        summaries = status.summaries()
        assert {name: summary.count for name, summary in summaries.items()} == timed
        for k, shard in enumerate(shards):
            assert summaries[f"LookupShard{k}"].total_us >= shard.status.summaries()["Lookup"].total_us

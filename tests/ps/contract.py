"""What every `Endpoint` keeps. A test module of an implementation says how a shard is reached, and gets these tests:

    class TestLocalEndpoint(EndpointContract):
        @contextmanager
        def reach(self, shard, slots):
            yield LocalEndpoint(shard, [slot.width for slot in slots])

`StepContract` is what every endpoint keeps, `EndpointContract` what those keep besides that have one trainer's batches come and go:
of trainers that step together an error, or a batch that is given up, is the end.

Covers what is the same on all ways to a shard. A batch's number is used again only where no push of it has been: what becomes of
calls that come twice is each implementation's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise

import numpy as np
import pytest

from flowps.batch import Batch, Float32
from flowps.config import Slot
from flowps.errors import CapacityError, DataError, UnknownBatchError
from flowps.ps.endpoint import Endpoint
from flowps.ps.parcel import Columns, Lines, Parcel
from flowps.ps.shard import Shard
from tests.ps import drawn, naive

SLOTS = [
    drawn.slot("a", dim=8, optimizer="sgd", learning_rate=0.5, pooling="mean"),
    drawn.slot("b", dim=16),
    drawn.slot("c", dim=3, optimizer="sgd", pooling="none", max_len=2),
    drawn.slot("d", dim=5, initial_accumulator=0.1, pooling="sqrtn"),
]
WIDTH = sum(slot.width for slot in SLOTS)
_SEED = 7


def parcel_of(batch: Batch, in_pieces: bool = False) -> Parcel:
    """A batch of which the shard has all slots; in a piece for each slot, or one for all."""
    if not in_pieces:
        shares = None if batch.shares is None else [batch.shares]
        return Parcel(batch.size, [batch.signs], [np.diff(batch.offsets)], shares)
    slices = [slice(start, stop) for start, stop in pairwise(batch.offsets[:: batch.size])]
    lengths = np.split(np.diff(batch.offsets), batch.num_slots)
    shares = None if batch.shares is None else [batch.shares[of_slot] for of_slot in slices]
    return Parcel(batch.size, [batch.signs[of_slot] for of_slot in slices], lengths, shares)


def empty_parcel() -> Parcel:
    """Of no samples."""
    return Parcel(0, [], [])


def ask(shard: Shard, slots: Sequence[Slot], batch_id: int, batch: Batch, training: bool = True) -> Float32:
    """A lookup at the shard itself."""
    columns = np.cumsum([0, *(slot.width for slot in slots)], dtype=np.int64)
    out = np.full((batch.size, int(columns[-1])), np.nan, np.float32)
    positions = np.arange(len(slots), dtype=np.int64)
    shard.lookup(batch_id, batch.signs, batch.offsets, batch.size, positions, columns[:-1], out, training, batch.shares)
    return out


def rows_of(shard: Shard) -> dict[str, dict[int, Float32]]:
    """{slot: {sign: weights and state}}."""
    return {
        rows.slot.name: dict(zip(rows.signs.tolist(), np.concatenate([rows.weights, rows.state], axis=1), strict=True))
        for rows in shard.rows()
    }


def ones(size: int) -> Lines:
    """A gradient of ones."""
    return Lines(np.ones((size, WIDTH), np.float32))


class StepContract:
    """Tests of lookups, pushes and evaluations.

    tolerance   how far embeddings and rows may be from the shard's own; 0: bit by bit
    """

    tolerance = 0.0

    def reach(self, shard: Shard, slots: Sequence[Slot]) -> AbstractContextManager[Endpoint]:
        """The way to `shard`, which has all of `slots`, for the only trainer there is (number 0)."""
        raise NotImplementedError

    @contextmanager
    def reached(self, capacity_rows: int = 1000, max_in_flight: int = 4) -> Iterator[tuple[Endpoint, Shard]]:
        """A new shard and the way to it."""
        shard = Shard(SLOTS, [capacity_rows] * len(SLOTS), _SEED, max_in_flight)
        try:
            with self.reach(shard, SLOTS) as endpoint:
                yield endpoint, shard
        finally:
            shard.close()

    def same(self, ours: Float32, theirs: Float32) -> None:
        """Assert that two arrays differ by no more than what the way changes."""
        np.testing.assert_allclose(ours, theirs, rtol=self.tolerance, atol=self.tolerance)

    def same_rows(self, ours: Shard, theirs: Shard) -> None:
        """Assert that two shards hold the same."""
        found, expected = rows_of(ours), rows_of(theirs)
        assert {name: rows.keys() for name, rows in found.items()} == {name: rows.keys() for name, rows in expected.items()}
        for name, rows in found.items():
            for sign, row in rows.items():
                self.same(row, expected[name][sign])

    @pytest.mark.parametrize("in_pieces", [False, True])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_it_does_what_the_shard_does(self, weighted: bool, in_pieces: bool) -> None:
        """Answers, rows and their number over some steps, evaluations between; a gradient's columns may lie apart."""
        random = np.random.default_rng(0)
        alone = Shard(SLOTS, [1000] * len(SLOTS), _SEED, 4)
        with self.reached() as (endpoint, shard):
            for first in range(0, 6, 2):
                bags = [drawn.random_bags(random, len(SLOTS), size=5, values=12) for _ in range(2)]
                batches = [drawn.weighted(of, random) if weighted else drawn.batch(of) for of in bags]
                for i, batch in enumerate(batches):
                    answer = endpoint.lookup(first + i, parcel_of(batch, in_pieces), True)
                    assert (answer.shape, answer.dtype, answer.flags.c_contiguous) == ((5, WIDTH), np.float32, True)
                    self.same(answer, ask(alone, SLOTS, first + i, batch))
                for i in (1, 0):  # pushes need not come in the order of lookups
                    grads = random.uniform(-1, 1, (5, WIDTH + 3)).astype(np.float32)
                    lines = Lines(grads, Columns([(0, 2, 10), (10, 13, WIDTH - 10)]), WIDTH)
                    scale = 0.5 + i
                    assert endpoint.push(first + i, lines, scale) == alone.push(first + i, lines.array(), scale)
                self.same(endpoint.lookup(99, parcel_of(batches[0], in_pieces), False), ask(alone, SLOTS, 99, batches[0], False))
            self.same_rows(shard, alone)
        alone.close()

    def test_the_answer_goes_where_it_is_wanted(self) -> None:
        """Into the array that is given, in training and in evaluation."""
        batch = drawn.batch(drawn.random_bags(np.random.default_rng(0), len(SLOTS), size=4, values=9))
        with self.reached() as (endpoint, shard):
            for training in (True, False):
                out = np.full((4, WIDTH), np.nan, np.float32)
                answer = endpoint.lookup(0, parcel_of(batch), training, out)
                assert np.shares_memory(answer, out)
                self.same(out, ask(shard, SLOTS, 1, batch, training=False))
                np.testing.assert_array_equal(answer, out)

    def test_evaluation_leaves_no_trace(self) -> None:
        """No rows, nothing in flight; signs that nobody has seen read zeros."""
        batch = drawn.batch(drawn.random_bags(np.random.default_rng(0), len(SLOTS), size=4, values=9))
        with self.reached(max_in_flight=1) as (endpoint, shard):
            for _ in range(3):
                assert not endpoint.lookup(5, parcel_of(batch), False).any()
            assert shard.num_rows == 0
            with pytest.raises(UnknownBatchError, match="batch 5:"):
                endpoint.push(5, ones(4), 1.0)

    def test_samples_without_signs(self) -> None:
        """Zeros, and no rows to step."""
        with self.reached() as (endpoint, shard):
            batch = drawn.batch([[[], []]] * len(SLOTS))
            assert not endpoint.lookup(0, parcel_of(batch, in_pieces=True), True).any()
            assert endpoint.push(0, ones(2), 1.0) == 0
            assert shard.num_rows == 0

    def test_a_push_of_a_batch_that_nobody_looked_up(self) -> None:
        """Is refused, and says which."""
        with self.reached() as (endpoint, _), pytest.raises(UnknownBatchError, match="batch 3: a push came"):
            endpoint.push(3, ones(1), 1.0)

    @pytest.mark.usefixtures("hurried_switching")
    def test_many_threads_share_it(self) -> None:
        """Each gets its own batch's answer: with gradients of zero the rows are still what their signs say."""
        with self.reached(max_in_flight=16) as (endpoint, _):

            def train(k: int) -> None:
                random = np.random.default_rng(k)
                for step in range(8):
                    bags = drawn.random_bags(random, len(SLOTS), size=3, values=30)
                    answer = endpoint.lookup(k * 100 + step, parcel_of(drawn.batch(bags), in_pieces=bool(step % 2)), True)
                    rows = [[[naive.draw(sign, _SEED, slot.dim, slot.init_scale) for sign in bag] for bag in bags[s]]
                            for s, slot in enumerate(SLOTS)]  # fmt: skip
                    expected = [[naive.pool_bag(bag, slot) for bag in of] for slot, of in zip(SLOTS, rows, strict=True)]
                    np.testing.assert_allclose(answer, np.concatenate(expected, axis=1), rtol=1e-3, atol=1e-3)
                    endpoint.push(k * 100 + step, Lines(np.zeros((3, WIDTH), np.float32)), 1.0)

            with ThreadPoolExecutor(4) as threads:
                for done in [threads.submit(train, k) for k in range(4)]:
                    done.result(60)


class EndpointContract(StepContract):
    """What becomes of a batch that is refused, fails or is given up."""

    def test_no_samples(self) -> None:
        """An answer of no lines; nothing stays in flight once it is given up."""
        with self.reached(max_in_flight=1) as (endpoint, _):
            for training in (True, False):
                assert endpoint.lookup(0, empty_parcel(), training).shape == (0, WIDTH)
            endpoint.forget(0)
            batch = drawn.batch([[[1]]] * len(SLOTS))
            endpoint.lookup(1, parcel_of(batch), True)
            assert endpoint.push(1, ones(1), 1.0) == len(SLOTS)

    def test_rows_found_ahead_are_read_as_they_are_then(self) -> None:
        """Found before the push of the batch before, pooled after it: what a whole lookup gives there."""
        random = np.random.default_rng(0)
        batches = [drawn.batch(drawn.random_bags(random, len(SLOTS), size=5, values=12)) for _ in range(6)]
        alone = Shard(SLOTS, [1000] * len(SLOTS), _SEED, 4)
        with self.reached(max_in_flight=2) as (endpoint, shard):
            endpoint.find(0, parcel_of(batches[0]))
            for step, batch in enumerate(batches):
                out = None if step % 2 else np.full((5, WIDTH), np.nan, np.float32)
                answer = endpoint.pool(step, 5, out)
                assert (answer.shape, answer.dtype, answer.flags.c_contiguous) == ((5, WIDTH), np.float32, True)
                assert out is None or np.shares_memory(answer, out)
                self.same(answer, ask(alone, SLOTS, step, batch))
                if step + 1 < len(batches):
                    endpoint.find(step + 1, parcel_of(batches[step + 1], in_pieces=bool(step % 2)))
                grads = random.uniform(-1, 1, (5, WIDTH)).astype(np.float32)
                assert endpoint.push(step, Lines(grads), 1.0) == alone.push(step, grads)
            self.same_rows(shard, alone)
        alone.close()

    def test_halves_in_the_wrong_order(self) -> None:
        """Are refused: pooling what nobody has found, and a push before rows were pooled; the right one may still come."""
        batch = drawn.batch([[[1]]] * len(SLOTS))
        with self.reached() as (endpoint, shard):
            with pytest.raises(UnknownBatchError, match="batch 4: its rows are to be pooled, but the shard remembers none"):
                endpoint.pool(4, 1)
            endpoint.find(0, parcel_of(batch))
            with pytest.raises(UnknownBatchError, match="batch 0: a push came before its rows were pooled"):
                endpoint.push(0, ones(1), 1.0)
            with pytest.raises(DataError, match="batch 0: rows are to be pooled into"):
                endpoint.pool(0, 2)
            assert shard.traffic().in_flight == 1
            assert endpoint.pool(0, 1).shape == (1, WIDTH)
            assert endpoint.push(0, ones(1), 1.0) == len(SLOTS)

    def test_a_batch_that_was_found_and_given_up(self) -> None:
        """Leaves room for another, and its number may be used again."""
        batch = drawn.batch([[[1]]] * len(SLOTS))
        with self.reached(max_in_flight=1) as (endpoint, _):
            for _ in range(2):
                endpoint.find(0, parcel_of(batch))
                endpoint.forget(0)
                with pytest.raises(UnknownBatchError, match="batch 0:"):
                    endpoint.pool(0, 1)
            endpoint.find(0, parcel_of(batch))
            endpoint.pool(0, 1)
            assert endpoint.push(0, ones(1), 1.0) == len(SLOTS)

    def test_a_batch_that_was_given_up(self) -> None:
        """Is no longer in flight, cannot be pushed, and its number may be used again; so may one that nobody has looked up."""
        batch = drawn.batch([[[1]]] * len(SLOTS))
        with self.reached(max_in_flight=1) as (endpoint, shard):
            endpoint.forget(8)
            endpoint.lookup(0, parcel_of(batch), True)
            endpoint.forget(0)
            before = rows_of(shard)
            with pytest.raises(UnknownBatchError, match="batch 0:"):
                endpoint.push(0, ones(1), 1.0)
            np.testing.assert_equal(rows_of(shard), before)
            for batch_id in (8, 1):
                endpoint.lookup(batch_id, parcel_of(batch), True)
                assert endpoint.push(batch_id, ones(1), 1.0) == len(SLOTS)

    def test_too_many_batches_in_flight(self) -> None:
        """Are refused; what was looked up stays, and the refused one can be looked up once there is room."""
        batch = drawn.batch([[[1]]] * len(SLOTS))
        with self.reached(max_in_flight=2) as (endpoint, _):
            for batch_id in (0, 1):
                endpoint.lookup(batch_id, parcel_of(batch), True)
            with pytest.raises(CapacityError, match=r"batch 2: 2 batches are looked up .*; push before the next"):
                endpoint.lookup(2, parcel_of(batch), True)
            assert endpoint.push(0, ones(1), 1.0) == len(SLOTS)
            endpoint.lookup(2, parcel_of(batch), True)
            for batch_id in (1, 2):
                assert endpoint.push(batch_id, ones(1), 1.0) == len(SLOTS)

    def test_a_full_table(self) -> None:
        """Says so; the batch is not in flight, and a smaller one can be looked up under its number."""
        with self.reached(capacity_rows=2, max_in_flight=1) as (endpoint, _):
            large = drawn.batch([[[naive.mix(100 * s + i) for i in range(5)]] for s in range(len(SLOTS))])
            with pytest.raises(CapacityError, match=r"need more rows than the table .* can hold: 2 rows"):
                endpoint.lookup(0, parcel_of(large), True)
            endpoint.lookup(0, parcel_of(drawn.batch([[[1]]] * len(SLOTS))), True)
            assert endpoint.push(0, ones(1), 1.0) == len(SLOTS)

    @pytest.mark.parametrize("shape", [(2, WIDTH), (1, WIDTH + 1), (1, WIDTH - 1), (0, WIDTH)])
    def test_a_gradient_of_another_shape(self, shape: tuple[int, int]) -> None:
        """Is refused, with the shape that was expected; no row has changed, and the right one may still come."""
        batch = drawn.batch([[[1]]] * len(SLOTS))
        with self.reached(max_in_flight=1) as (endpoint, shard):
            endpoint.lookup(0, parcel_of(batch), True)
            before = rows_of(shard)
            with pytest.raises(DataError, match=rf"gradient.*expected.*{WIDTH}"):
                endpoint.push(0, Lines(np.ones(shape, np.float32)), 1.0)
            np.testing.assert_equal(rows_of(shard), before)
            assert endpoint.push(0, ones(1), 1.0) == len(SLOTS)

    @pytest.mark.parametrize("wrong", ["a slot's lengths are missing", "a sign is missing"])
    def test_a_parcel_that_does_not_fit_together(self, wrong: str) -> None:
        """Is refused before a kernel reads past an array; the batch is not in flight."""
        batch = drawn.batch([[[1, 2]]] * len(SLOTS))
        whole = parcel_of(batch)
        signs, lengths = whole.signs[0], whole.lengths[0]
        if "lengths" in wrong:
            lengths = lengths[:-1]
        else:
            signs = signs[:-1]
        with self.reached(max_in_flight=1) as (endpoint, shard):
            for training in (True, False):
                with pytest.raises(DataError, match="offsets|lengths" if "lengths" in wrong else "signs"):
                    endpoint.lookup(0, Parcel(1, [signs], [lengths]), training)
            assert shard.num_rows == 0
            endpoint.lookup(0, whole, True)
            assert endpoint.push(0, ones(1), 1.0) == 2 * len(SLOTS)

    @pytest.mark.usefixtures("hurried_switching")
    def test_many_threads_give_batches_up(self) -> None:
        """Beside others that push: each batch has its room in flight for as long as it is wanted."""
        with self.reached(max_in_flight=4) as (endpoint, shard):

            def train(k: int) -> None:
                for step in range(8):
                    endpoint.lookup(k * 100 + step, parcel_of(drawn.batch([[[k + 1]]] * len(SLOTS))), True)
                    if step % 2:
                        assert endpoint.push(k * 100 + step, ones(1), 1.0) == len(SLOTS)
                    else:
                        endpoint.forget(k * 100 + step)

            with ThreadPoolExecutor(4) as threads:
                for done in [threads.submit(train, k) for k in range(4)]:
                    done.result(60)
            assert {stats.pushes for stats in shard.stats()} == {16}

"""`PsClient`: the same answers on any number of shards, errors that reach the caller, buffers nobody writes late."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from flowps.batch import Batch
from flowps.config import Slot
from flowps.errors import CapacityError, UnknownBatchError
from flowps.ps.client import PsClient
from flowps.ps.placement import place
from flowps.ps.shard import Shard
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
    slots: Sequence[Slot], num_shards: int, capacity_rows: Sequence[int] | None = None, max_in_flight: int = 4
) -> Iterator[tuple[PsClient, list[Shard]]]:
    """A client of `num_shards` shards, closed at the end."""
    capacities = [1000] * len(slots) if capacity_rows is None else capacity_rows
    placement = place(slots, num_shards)
    shards = [Shard([slots[p.slot] for p in on], [capacities[p.slot] for p in on], 7, max_in_flight) for on in placement.shards]
    client = PsClient(shards, placement, slots)
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

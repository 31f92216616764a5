"""Everything at once: lookups, pushes, evictions, erasing, snapshots and evaluations, on 1 to 8 threads; what must hold after.

`table` says which interleavings there are; here they are run, under the fastest switching of threads there is, and the table's
invariants and a sequential account of what was done are checked.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from flowps.config import Slot
from flowps.errors import CapacityError
from flowps.ps.shard import Shard
from tests.ps import drawn, naive
from tests.ps.tables import check, small_stripes

DEEP = int(os.environ.get("FLOWPS_DEEP", "1"))
RATE = 2.0**-6  # sums of steps of it are exact
pytestmark = pytest.mark.usefixtures("hurried_switching")


def together(*works: Callable[[], None]) -> None:
    """Run all at once and raise what any of them raises."""
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        start.wait()
        work()

    with ThreadPoolExecutor(len(works)) as threads:
        for done in [threads.submit(run, work) for work in works]:
            done.result()


class World:
    """A shard of three tables, and threads' ways of using it."""

    def __init__(self, threads: int, capacity: int, max_in_flight: int) -> None:
        self.slots = [
            drawn.slot("plain", dim=16, optimizer="sgd", learning_rate=RATE, init_scale=0.0, initializer="zeros"),
            drawn.slot("pooled", dim=5, optimizer="sgd", learning_rate=RATE, initializer="zeros"),
            drawn.slot("adagrad", dim=8, initial_accumulator=0.5),
        ]
        self.shard = Shard(self.slots, [capacity] * 3, 0, max_in_flight, threads)
        self.width = sum(slot.width for slot in self.slots)
        self.columns = np.cumsum([0, *(slot.width for slot in self.slots)])[:-1]

    def lookup(self, batch_id: int, bags: drawn.Bags, training: bool = True) -> np.ndarray:
        out = np.full((len(bags[0]), self.width), np.nan, np.float32)
        self.shard.lookup(batch_id, *drawn.arrays(bags), len(bags[0]), np.arange(3), self.columns, out, training)
        assert np.isfinite(out).all()
        return out

    def insist(self, batch_id: int, bags: drawn.Bags) -> None:
        """Look up while no other batch of the thread is in flight, as soon as those of the others leave room."""
        while True:
            try:
                self.lookup(batch_id, bags)
                return
            except CapacityError:
                time.sleep(1e-3)

    def rows(self) -> dict[str, dict[int, np.ndarray]]:
        return {
            rows.slot.name: dict(zip(rows.signs.tolist(), np.concatenate([rows.weights, rows.state], axis=1), strict=True))
            for rows in self.shard.rows()
        }

    def check(self) -> None:
        for _, table in self.shard._tables:
            check(table)


def signs_of(bags: drawn.Bags, slot: int) -> list[int]:
    return [sign for bag in bags[slot] for sign in bag]


@pytest.mark.parametrize("team", [1, 2, 3, 8])
@pytest.mark.parametrize("callers", [2, 4])
def test_without_eviction_nothing_is_lost(team: int, callers: int) -> None:
    """Weights are the sum of all steps, exactly, and the state the sum of all squares; each sign has one row."""
    num_batches, size = 24 * DEEP, 12
    random = np.random.default_rng(team)
    with small_stripes(16):
        world = World(team, 3000, 2 * callers)
        batches = [drawn.random_bags(random, 3, size, values=20 if k % 2 else 300) for k in range(callers * num_batches)]
        grads = [random.integers(-4, 5, (size, world.width)).astype(np.float32) for _ in batches]

        def train(mine: Sequence[int]) -> Callable[[], None]:
            def work() -> None:
                for first, second in zip(mine[::2], mine[1::2], strict=True):
                    world.lookup(first, batches[first])
                    world.lookup(second, batches[second])
                    world.shard.push(second, grads[second])
                    world.lookup(-1, batches[first], training=False)
                    world.shard.push(first, grads[first])

            return work

        def snapshot() -> None:
            for _ in range(6):
                found = world.rows()
                for name in ("plain", "pooled"):  # whole rows, between two pushes
                    for row in found[name].values():
                        assert (row / RATE == np.round(row / RATE)).all()

        together(*(train(range(k, len(batches), callers)) for k in range(callers)), snapshot)
        found = world.rows()
        for s, slot in enumerate(world.slots):
            part = slice(world.columns[s], world.columns[s] + slot.width)
            expected: dict[int, np.ndarray] = {}
            for bags, grad in zip(batches, grads, strict=True):
                for sign, total in naive.sum_gradients(bags[s], slot, grad[:, part]).items():
                    step = total**2 if slot.optimizer == "adagrad" else -RATE * total
                    expected[sign] = expected.get(sign, 0.0) + step
            assert found[slot.name].keys() == expected.keys()
            for sign, row in found[slot.name].items():
                if slot.optimizer == "adagrad":
                    np.testing.assert_allclose(row[slot.dim :], 0.5 + expected[sign], rtol=1e-5)
                else:
                    np.testing.assert_array_equal(row, expected[sign])
        world.check()
        world.shard.close()


@pytest.mark.parametrize("team", [1, 2, 4, 8])
def test_with_everything_at_once_the_table_stays_sound(team: int) -> None:
    """A table far too small for the signs: rows come and go under pushes, erasing, evaluations and snapshots.

    Every push adds one step of the same size to each distinct row of its batch, and a row that comes again begins at zero: so every
    weight is a whole number of steps, at most as many as batches had the sign; no push fails, and a lookup only for want of room.
    """
    callers, num_batches, size = 4, 40 * DEEP, 10
    random = np.random.default_rng(team)
    with small_stripes(32):
        world = World(team, 800, 2 * callers)
        batches = [drawn.random_bags(random, 3, size, values=3000, most=8) for _ in range(callers * num_batches)]
        seen: dict[int, int] = {}
        for bags in batches:
            for sign in set(signs_of(bags, 0)):
                seen[sign] = seen.get(sign, 0) + 1

        def gradient(bags: drawn.Bags) -> np.ndarray:
            """One for the first sample that has a sign, and only where that is its bag's only sign."""
            grads = np.zeros((size, world.width), np.float32)
            done: set[int] = set()
            for b, bag in enumerate(bags[0]):
                if len(bag) == 1 and bag[0] not in done:
                    grads[b, :16] = 1
                    done.add(bag[0])
            return grads

        def train(mine: Sequence[int]) -> Callable[[], None]:
            def work() -> None:
                for first, second in zip(mine[::2], mine[1::2], strict=True):
                    world.insist(first, batches[first])
                    try:
                        world.lookup(second, batches[second])
                    except CapacityError:  # another thread has slept so long that what came after its batch fills the table
                        world.shard.push(first, gradient(batches[first]))
                        world.insist(second, batches[second])
                    else:
                        world.shard.push(first, gradient(batches[first]))
                    if second % 7:
                        world.shard.push(second, gradient(batches[second]))
                    else:
                        world.shard.forget(second)

            return work

        def evaluate() -> None:
            for k in range(len(batches)):
                world.lookup(-1, batches[k], training=False)

        def disturb() -> None:
            erased = 0
            while not erased:  # on a busy machine all of it may come before the first row, and once more after the last
                for bags in batches[::3]:
                    erased += world.shard.erase("plain", np.array(signs_of(bags, 0), np.uint64))
                    world.shard.stats()

        def snapshot() -> None:
            for _ in range(8):
                for sign, row in world.rows()["plain"].items():
                    steps = -row / RATE
                    assert (steps == np.round(steps[0])).all()
                    assert 0 <= steps[0] <= seen[sign]

        together(*(train(range(k, len(batches), callers)) for k in range(callers)), evaluate, disturb, snapshot)
        snapshot()
        world.check()
        assert sum(stats.evicted for stats in world.shard.stats()) > 0
        assert sum(stats.erased for stats in world.shard.stats()) > 0
        world.shard.close()


def test_lookups_that_fail_leave_the_others_alone() -> None:
    """Some batches are too large for the table and are refused; those in flight beside them are pushed as if nothing had been.

    A small one may be refused too, while what the large one has touched is younger than a batch in flight.
    """
    with small_stripes(1000):
        slot = [Slot(name="s", dim=4, optimizer="sgd", learning_rate=RATE, initializer="zeros")]
        shard = Shard(slot, [200], 0, 16, 2)
        refused = threading.Event()

        def lookup(batch_id: int, signs: Sequence[int]) -> None:
            out = np.empty((1, 4), np.float32)
            shard.lookup(batch_id, *drawn.arrays([[list(signs)]]), 1, np.array([0]), np.array([0]), out, training=True)

        def good(k: int) -> Callable[[], None]:
            def work() -> None:
                for turn in range(50):
                    while True:
                        try:
                            lookup(1000 * k + turn, [k, k + 10])
                            break
                        except CapacityError:
                            time.sleep(1e-3)
                    assert shard.push(1000 * k + turn, np.ones((1, 4), np.float32)) == 2

            return work

        def bad() -> None:
            for turn in range(50):
                with pytest.raises(CapacityError):
                    lookup(9000 + turn, range(100, 400))
                refused.set()

        together(*(good(k) for k in range(3)), bad)
        assert refused.is_set()
        check(shard._tables[0][1])
        shard.close()

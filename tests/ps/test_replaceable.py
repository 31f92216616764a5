"""A shard that is lost and comes back: who waits, what is left out, and that nothing is counted twice or not at all."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import numpy as np
import pytest

from flowps.batch import Float32
from flowps.config import Slot
from flowps.errors import StoppedError, UnreachableError
from flowps.ps.endpoint import Endpoint, LocalEndpoint
from flowps.ps.parcel import Lines, Parcel
from flowps.ps.replaceable import Closable, Replaceable
from flowps.ps.shard import Shard
from tests.ps.contract import EndpointContract

SAMPLES = 4
PARCEL = Parcel(SAMPLES, [], [])

ANSWER = np.zeros((SAMPLES, 1), np.float32)
GRADIENT = Lines(ANSWER)


class Counting(Closable):
    """A shard that counts the samples it has learned, and knows what it was asked. Lost, it answers nobody."""

    def __init__(self, learned: int = 0) -> None:
        self.learned, self.found, self.asked, self.forgotten = learned, set[int](), set[int](), set[int]()
        self.is_unreachable, self.is_closed = False, threading.Event()
        self._lock = threading.Lock()

    def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Float32 | None = None) -> Float32:
        """Remember the batch."""
        self._answer()
        with self._lock:
            assert batch_id not in self.asked, "looked up twice"
            self.asked.add(batch_id)
        return ANSWER

    def find(self, batch_id: int, parcel: Parcel) -> None:
        """Remember the batch as one to be pooled."""
        self._answer()
        with self._lock:
            self.found.add(batch_id)

    def pool(self, batch_id: int, size: int, out: Float32 | None = None) -> Float32:
        """Remember it as one that was looked up."""
        self._answer()
        with self._lock:
            self.found.remove(batch_id)  # KeyError: it was never found here
            self.asked.add(batch_id)
        return ANSWER

    def push(self, batch_id: int, gradient: Lines, rate_scale: float) -> int:
        """Learn the samples."""
        self._answer()
        with self._lock:
            self.asked.remove(batch_id)  # KeyError: the push of a batch that it was never asked
            self.learned += gradient.size
        self._answer()  # the answer may get lost when the rows have learned
        return 1

    def forget(self, batch_id: int) -> None:
        """Remember that too."""
        self._answer()
        (self.found if batch_id in self.found else self.asked).remove(batch_id)
        self.forgotten.add(batch_id)

    def close(self) -> None:
        """No answers from now on."""
        self.is_closed.set()

    def _answer(self) -> None:
        if self.is_closed.is_set():
            raise StoppedError("closed")
        if self.is_unreachable:
            raise UnreachableError("no answer")


class _Here(LocalEndpoint, Closable):
    """A shard of this process, which has no connection to close."""

    def close(self) -> None:
        """Nothing."""


class TestReplaceable(EndpointContract):
    """As long as nothing is lost it is a shard like any other."""

    @contextmanager
    def reach(self, shard: Shard, slots: Sequence[Slot]) -> Iterator[Endpoint]:
        """See StepContract."""
        with closing(Replaceable(_Here(shard, [slot.width for slot in slots]), notice_s=60)) as replaceable:
            yield replaceable


class TestReplaced(EndpointContract):
    """Nor once it has come back."""

    @contextmanager
    def reach(self, shard: Shard, slots: Sequence[Slot]) -> Iterator[Endpoint]:
        """See StepContract."""
        with closing(Replaceable(Counting(), notice_s=60)) as replaceable:
            replaceable.lose()
            replaceable.replace(_Here(shard, [slot.width for slot in slots]), step=0)
            yield replaceable


def test_a_lookup_waits_for_the_shard_that_comes() -> None:
    lost, new = Counting(), Counting()
    shard = Replaceable(lost, notice_s=60)
    lost.is_unreachable = True
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(shard.lookup, 1, PARCEL, True)
        shard.lose()
        time.sleep(0.05)
        assert not asked.done()
        assert shard.replace(new, step=0) == 0
        assert asked.result(60) is ANSWER
    assert new.asked == {1}
    assert shard.push(1, GRADIENT, 1.0) == 1
    assert new.learned == SAMPLES


def test_what_was_pushed_since_the_cut_and_what_is_in_flight_is_unlearned() -> None:
    lost, new = Counting(), Counting()
    shard = Replaceable(lost, notice_s=60)
    for batch in range(5):
        shard.lookup(batch, PARCEL, training=True)
        shard.push(batch, GRADIENT, 1.0)
        if batch == 2:
            shard.cut(30)
    shard.lookup(7, PARCEL, training=True)
    shard.lookup(8, PARCEL, training=False)  # an evaluation learns nothing
    shard.lose()
    assert shard.replace(new, step=30) == 2 * SAMPLES + SAMPLES
    assert shard.push(7, GRADIENT, 1.0) == 0
    shard.lookup(9, PARCEL, training=True)
    assert shard.push(9, GRADIENT, 1.0) == 1
    assert new.learned == SAMPLES
    shard.lose()
    assert shard.replace(Counting(), step=30) == SAMPLES, "what was lost before is not counted again"
    shard.lose()
    assert shard.replace(Counting(), step=0) == 3 * SAMPLES, "and further back, what was learned until the cut"


def test_a_batch_of_a_lost_shard_is_forgotten_without_asking() -> None:
    lost, new = Counting(), Counting()
    shard = Replaceable(lost, notice_s=60)
    shard.lookup(1, PARCEL, training=True)
    shard.lose()
    shard.replace(new, step=0)
    shard.forget(1)
    assert not new.forgotten
    shard.lookup(1, PARCEL, training=True)
    shard.forget(1)
    assert new.forgotten == {1}


def test_what_was_found_before_a_loss_is_looked_up_anew() -> None:
    """Whether it was lost before rows were pooled, or instead of an answer; and nothing of it is unlearned."""
    lost, new = Counting(), Counting()
    shard = Replaceable(lost, notice_s=60)
    for batch in (1, 2, 3):
        shard.find(batch, PARCEL)
    assert shard.pool(1, SAMPLES) is ANSWER
    lost.is_unreachable = True
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(shard.pool, 2, SAMPLES)
        shard.lose()
        assert shard.replace(new, step=0) == SAMPLES, "of batch 1, which was in flight"
        assert asked.result(60) is ANSWER
    assert shard.pool(3, SAMPLES) is ANSWER
    assert new.asked == {2, 3}
    assert [shard.push(batch, GRADIENT, 1.0) for batch in (1, 2, 3)] == [0, 1, 1]
    assert new.learned == 2 * SAMPLES


def test_a_batch_that_was_found_at_a_lost_shard_is_forgotten_without_asking() -> None:
    lost, new = Counting(), Counting()
    shard = Replaceable(lost, notice_s=60)
    shard.find(1, PARCEL)
    shard.lose()
    shard.replace(new, step=0)
    shard.forget(1)
    assert not new.forgotten
    shard.find(1, PARCEL)
    shard.forget(1)
    assert (new.found, new.forgotten) == (set(), {1})


def test_a_shard_that_nobody_says_is_lost_fails() -> None:
    lost = Counting()
    lost.is_unreachable = True
    with pytest.raises(UnreachableError, match="no answer"):
        Replaceable(lost, notice_s=0.05).lookup(1, PARCEL, training=True)


def test_closing_ends_the_waiting_and_what_comes_after() -> None:
    lost, late = Counting(), Counting()
    shard = Replaceable(lost, notice_s=60)
    shard.lose()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(shard.lookup, 1, PARCEL, True), pool.submit(shard.forget, 2)]
        time.sleep(0.05)
        shard.close()
        for one in asked:
            with pytest.raises(StoppedError):
                one.result(60)
    with pytest.raises(StoppedError, match="nobody waited"):
        shard.replace(late, step=0)
    assert late.is_closed.is_set()


@pytest.mark.parametrize("seed", range(3))
def test_losses_at_any_moment_leave_no_sample_uncounted(hurried_switching: None, seed: int) -> None:
    """Four threads look up and push while the shard is lost again and again: learned and unlearned are all that was pushed."""
    chance, threads, batches = random.Random(seed), 4, itertools.count()
    current, at_cut, trained, unlearned = Counting(), 0, 0, 0
    shard = Replaceable(current, notice_s=60)
    for step in range(5):  # cuts: between them nothing is in flight
        calm = threading.Event()

        def train(calm: threading.Event = calm) -> int:
            """Batches in flight two at a time, as by a trainer; returns their number."""
            done = after = 0
            while after < 20:
                pair = next(batches), next(batches)
                for batch in pair:
                    if batch % 3:
                        shard.lookup(batch, PARCEL, training=True)
                    else:
                        shard.find(batch, PARCEL)
                for batch in pair:
                    if not batch % 3:
                        shard.pool(batch, SAMPLES)
                for batch in pair:
                    shard.push(batch, GRADIENT, 1.0)
                done += len(pair)
                after += calm.is_set()
            return done

        with ThreadPoolExecutor(threads) as pool:
            running = [pool.submit(train) for _ in range(threads)]
            for _ in range(10):
                time.sleep(chance.uniform(0, 0.002))
                current.is_unreachable = chance.random() < 0.5
                shard.lose()
                current = Counting(at_cut)
                unlearned += shard.replace(current, step)
            calm.set()
            trained += SAMPLES * sum(one.result() for one in running)
        shard.cut(step + 1)
        at_cut = current.learned
        assert not current.asked
        assert current.learned + unlearned == trained
    assert 0 < unlearned < trained

"""`Once`: calls that come twice, late, at once, or fail; and what it remembers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from flowps.errors import CapacityError, UnknownBatchError
from flowps.ps.wire.once import Once


class Work:
    """Counts its calls; answers with `answer`, or raises it, after `wait`."""

    def __init__(self, answer: Any, wait: Callable[[], object] = lambda: None) -> None:
        self.calls, self._answer, self._wait = 0, answer, wait

    def __call__(self) -> Any:
        self.calls += 1
        self._wait()
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer


def test_a_lookup_that_comes_again_gets_the_same_answer() -> None:
    """Until its push; every batch has its own."""
    once, work = Once(10), Work(b"answer")
    assert [once.lookup(1, work) for _ in range(3)] == [b"answer"] * 3
    assert once.lookup(2, Work(b"other")) == b"other"
    assert work.calls == 1


def test_a_push_that_comes_again_is_not_made_again() -> None:
    """And is told what the first was told."""
    once, work = Once(10), Work(7)
    assert [once.push(1, work) for _ in range(3)] == [7] * 3
    assert work.calls == 1


def test_a_lookup_after_its_push_is_refused() -> None:
    """It was held up on its way: an answer would put a batch in flight that nobody pushes."""
    once, late = Once(10), Work(b"late")
    once.lookup(1, Work(b"answer"))
    once.push(1, Work(7))
    with pytest.raises(UnknownBatchError, match="batch 1: a lookup came after its push"):
        once.lookup(1, late)
    assert not late.calls


def test_what_was_found_is_not_found_again() -> None:
    """Until the batch's push, after which it is refused, or until it is given up."""
    once, found = Once(10), Work(None)
    for _ in range(3):
        once.find(1, found)
    assert found.calls == 1
    assert [once.lookup(1, Work(b"answer")) for _ in range(2)] == [b"answer"] * 2
    once.push(1, Work(7))
    with pytest.raises(UnknownBatchError, match="batch 1: a lookup came after its push"):
        once.find(1, found)
    once.find(2, found)
    once.forget(2)
    once.find(2, found)
    assert found.calls == 3


def test_a_lookup_during_its_push_is_refused() -> None:
    """As soon as the push has begun."""
    once, begun, may_end = Once(10), threading.Event(), threading.Event()
    once.lookup(1, Work(b"answer"))

    def wait() -> None:
        begun.set()
        assert may_end.wait(60)

    with ThreadPoolExecutor(1) as thread:
        pushed = thread.submit(once.push, 1, Work(7, wait))
        try:
            assert begun.wait(60)
            with pytest.raises(UnknownBatchError):
                once.lookup(1, Work(b"late"))
        finally:
            may_end.set()
        assert pushed.result() == 7


@pytest.mark.parametrize("name", ["find", "lookup", "push"])
@pytest.mark.usefixtures("hurried_switching")
def test_at_once_from_many_threads(name: str) -> None:
    """One makes the call, the others wait for it and get what it got."""
    once, start = Once(10), threading.Barrier(8)
    work = Work(b"answer" if name == "lookup" else 7)

    def call(_: int) -> Any:
        start.wait()
        return getattr(once, name)(1, work)

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(call, range(8)))) == 1
    assert work.calls == 1


@pytest.mark.parametrize("name", ["lookup", "push"])
def test_whoever_waits_gets_the_error_too(name: str) -> None:
    """Of the call that was made; the next call is made anew."""
    once, begun, joined = Once(10), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert joined.wait(60)

    failing = Work(CapacityError("full"), wait)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(getattr(once, name), 1, failing)
        assert begun.wait(60)
        second = threads.submit(getattr(once, name), 1, failing)
        joined.set()
        for call in (first, second):  # the second may have come too late to wait, and has then called on its own
            with pytest.raises(CapacityError, match="full"):
                call.result()
    again = Work(b"answer" if name == "lookup" else 7)
    assert getattr(once, name)(1, again) in (b"answer", 7)
    assert again.calls == 1


@pytest.mark.parametrize("name", ["lookup", "push"])
def test_an_interrupt_reaches_the_caller(name: str) -> None:
    """Nobody goes on waiting for a call that was broken off."""
    once = Once(10)
    with pytest.raises(KeyboardInterrupt):
        getattr(once, name)(1, Work(KeyboardInterrupt()))
    assert getattr(once, name)(1, Work(b"answer")) == b"answer"


def test_a_push_that_failed_leaves_the_lookup_there() -> None:
    """The batch is still in flight: its lookup may still come again, and so may the push."""
    once, looked_up = Once(10), Work(b"answer")
    once.lookup(1, looked_up)
    with pytest.raises(CapacityError):
        once.push(1, Work(CapacityError("no")))
    assert once.lookup(1, looked_up) == b"answer"
    assert looked_up.calls == 1
    assert once.push(1, Work(7)) == 7


def test_a_batch_that_is_given_up_may_come_anew() -> None:
    """Its answer is not kept; forgetting what is not there is no error."""
    once = Once(10)
    once.lookup(1, Work(b"answer"))
    once.forget(1)
    once.forget(1)
    assert once.lookup(1, Work(b"another")) == b"another"


def test_given_up_while_it_is_looked_up() -> None:
    """Whoever waits gets the answer; whoever comes later is not given it."""
    once = Once(10)
    assert once.lookup(1, Work(b"answer", lambda: once.forget(1))) == b"answer"
    assert once.lookup(1, Work(b"another")) == b"another"


def test_a_lookup_that_fails_after_it_was_given_up_does_not_undo_the_next() -> None:
    """It forgets itself only."""
    once, kept = Once(10), Work(b"another")

    def replaced() -> None:
        once.forget(1)
        once.lookup(1, kept)

    with pytest.raises(CapacityError):
        once.lookup(1, Work(CapacityError("full"), replaced))
    once.lookup(1, kept)
    assert kept.calls == 1


def test_what_is_remembered_is_bounded() -> None:
    """Answers of batches in flight, and the numbers of the last pushes."""
    once = Once(kept_pushes=3)
    for batch_id in range(100):
        once.lookup(batch_id, Work(b"answer"))
        once.push(batch_id, Work(batch_id))
        assert not once._lookups
        assert list(once._pushes) == list(range(max(0, batch_id - 2), batch_id + 1))
    unused = Work(0)
    assert [once.push(batch_id, unused) for batch_id in (97, 98, 99)] == [97, 98, 99]
    assert not unused.calls


def test_pushes_that_fail_do_not_drive_out_the_others() -> None:
    """A client that pushes what was never looked up makes no room for a push to come twice: at most one goes."""
    once = Once(kept_pushes=3)
    for batch_id in range(3):
        once.push(batch_id, Work(batch_id))
    for batch_id in range(10, 30):
        with pytest.raises(UnknownBatchError):
            once.push(batch_id, Work(UnknownBatchError("?")))
    assert list(once._pushes) == [1, 2]


def test_answers_of_no_samples_are_bounded_too() -> None:
    """They have no push that would end them; the last ones may still come again, and larger ones stay until their push."""
    once, large = Once(kept_pushes=3), Work(bytes(1000))
    once.lookup(1000, large)
    for batch_id in range(100):
        once.lookup(batch_id, Work(b""))
        assert len(once._lookups) <= 1 + 3
    unused = Work(b"")
    for batch_id in (97, 98, 99):
        once.lookup(batch_id, unused)
    once.lookup(1000, large)
    assert (unused.calls, large.calls) == (0, 1)


def test_nothing_is_locked_while_a_call_is_made() -> None:
    """Calls of other batches, and of the same one, go on inside it."""
    once = Once(10)

    def inside() -> None:
        once.lookup(2, Work(b"other"))
        once.push(3, Work(1))
        once.forget(4)

    assert once.lookup(1, Work(b"answer", inside)) == b"answer"
    assert once.push(1, Work(7, inside)) == 7


@pytest.mark.usefixtures("hurried_switching")
def test_lookups_pushes_and_repetitions_from_many_threads() -> None:
    """Each batch is looked up once and pushed once, whatever comes twice; nothing is left."""
    once, looked_up, pushed = Once(1000), [0] * 200, [0] * 200
    found: list[int] = []

    def train(thread: int) -> None:
        for batch_id in range(thread % 4, 200, 4):  # two threads do the same

            def look_up(batch_id: int = batch_id) -> bytes:
                looked_up[batch_id] += 1
                return b"%d" % batch_id

            def push(batch_id: int = batch_id) -> int:
                pushed[batch_id] += 1
                return batch_id

            with suppress(UnknownBatchError):  # the other pushes it already
                once.find(batch_id, partial(found.append, batch_id))
                assert once.lookup(batch_id, look_up) == b"%d" % batch_id
            assert once.push(batch_id, push) == batch_id

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(train, range(8)))
    assert looked_up == pushed == [1] * 200
    assert sorted(found) == list(range(200))
    assert not once._lookups
    assert not once._finds

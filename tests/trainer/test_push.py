"""The push queue: everything put is pushed, in order, or the run hears of it."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from flowps.batch import Float32
from flowps.status.run_status import RunStatus
from flowps.trainer.push import PushQueue
from tests.trainer.conftest import flowps_threads

WAIT_S = 30.0


def gradient(value: float = 0.0) -> Any:
    return tf.fill([2, 3], np.float32(value))


@dataclass
class Record:
    """What a queue did, in order; fails at the ticket `broken`."""

    broken: int | None = None
    happened: list[str] = field(default_factory=list)
    gradients: dict[int, Float32] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)
    failed: threading.Event = field(default_factory=threading.Event)
    status: RunStatus = field(default_factory=RunStatus)

    def push(self, ticket: int, grads: Float32, rate_scale: float) -> None:
        if ticket == self.broken:
            raise ConnectionError(f"shard lost at {ticket}")
        self.happened.append(f"push {ticket}")
        self.gradients[ticket] = grads.copy()

    def on_error(self, error: BaseException) -> None:
        self.errors.append(error)
        self.failed.set()

    def queue(self) -> PushQueue:
        return PushQueue(self.push, self.on_error, self.status)

    def put(self, pushes: PushQueue, ticket: int) -> None:
        pushes.put(ticket, gradient(ticket), 1.0, lambda: self.happened.append(f"pushed {ticket}"))


def test_a_gradient_is_not_copied():
    """5 MB per batch of 1024 × 76 slots: half a millisecond of the push."""
    tensor, seen = gradient(3), []
    with closing(PushQueue(lambda ticket, grads, rate_scale: seen.append(grads), lambda error: None, RunStatus())) as pushes:
        pushes.put(0, tensor, 1.0, lambda: None)
        pushes.drain()
    assert np.shares_memory(seen[0], np.asarray(tensor))
    assert seen[0].flags.c_contiguous


def test_gradients_are_pushed_in_order_each_followed_by_its_callback():
    record = Record()
    with closing(record.queue()) as pushes:
        for ticket in range(50):
            record.put(pushes, ticket)
        pushes.drain()
        assert record.happened == [f"{what} {ticket}" for ticket in range(50) for what in ("push", "pushed")]
    for ticket, grads in record.gradients.items():
        assert grads.dtype == np.float32
        assert grads.shape == (2, 3)
        assert (grads == ticket).all()
    assert record.status.summaries()["PushGrad"].count == 50
    assert record.errors == []


def test_pushing_is_beside_the_trainer():
    """`put` returns while a push still runs."""
    began, go_on = threading.Event(), threading.Event()

    def push(ticket: int, grads: Float32, rate_scale: float) -> None:
        began.set()
        assert go_on.wait(WAIT_S)

    with closing(PushQueue(push, lambda error: None, RunStatus())) as pushes:
        pushed = threading.Event()
        pushes.put(0, gradient(), 1.0, pushed.set)
        assert began.wait(WAIT_S)
        pushes.put(1, gradient(), 1.0, lambda: None)
        assert not pushed.is_set()
        go_on.set()
        pushes.drain()
        assert pushed.is_set()


def test_drain_with_nothing_put_returns():
    with closing(Record().queue()) as pushes:
        pushes.drain()


def test_drain_waits_for_the_callback_of_the_last_push():
    released = []
    with closing(PushQueue(lambda ticket, grads, rate_scale: None, lambda error: None, RunStatus())) as pushes:
        for ticket in range(20):
            pushes.put(ticket, gradient(), 1.0, lambda ticket=ticket: released.append(ticket))
            pushes.drain()
            assert released == list(range(ticket + 1))


def test_a_failing_push_is_handed_over_and_ends_the_pushing():
    record = Record(broken=2)
    with closing(record.queue()) as pushes:
        for ticket in range(5):
            record.put(pushes, ticket)
        pushes.drain()
        assert record.failed.wait(WAIT_S)
        assert record.happened == ["push 0", "pushed 0", "push 1", "pushed 1"], "no permit comes back for what was not pushed"
        (error,) = record.errors
        assert isinstance(error, ConnectionError)
        assert str(error) == "shard lost at 2"
        assert record.status.summaries()["PushGrad"].count == 2
        # The trainer may not have heard of it yet.
        record.put(pushes, 5)
        pushes.drain()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_whatever_a_push_raises_is_handed_over(error: BaseException):
    heard: list[BaseException] = []

    def push(ticket: int, grads: Float32, rate_scale: float) -> None:
        raise error

    with closing(PushQueue(push, heard.append, RunStatus())) as pushes:
        pushes.put(0, gradient(), 1.0, lambda: None)
        pushes.drain()
    assert heard == [error]


def test_a_gradient_that_cannot_be_read_is_handed_over():
    """An operation that failed on a GPU shows when its result is read."""

    class Broken:
        def __array__(self, *args: Any, **kwargs: Any) -> Float32:
            raise tf.errors.InternalError(None, None, "device lost")

    record = Record()
    with closing(record.queue()) as pushes:
        pushes.put(0, Broken(), 1.0, lambda: None)
        pushes.drain()
    assert [type(error) for error in record.errors] == [tf.errors.InternalError]


def test_when_drain_returns_after_a_failure_the_error_has_been_handed_over():
    """Otherwise the trainer, which looks for an error after draining, misses that of its last push."""
    drained, handed_over = threading.Event(), threading.Event()

    def push(ticket: int, grads: Float32, rate_scale: float) -> None:
        raise ConnectionError

    def on_error(error: BaseException) -> None:
        # Long enough for a `drain` that does not wait for this to return first.
        drained.wait(0.3)
        handed_over.set()

    with closing(PushQueue(push, on_error, RunStatus())) as pushes:
        pushes.put(0, gradient(), 1.0, lambda: None)
        pushes.drain()
        was_handed_over = handed_over.is_set()
        drained.set()
    assert was_handed_over


@pytest.mark.parametrize("broken", [None, 0, 19])
def test_close_pushes_what_was_put_and_leaves_no_thread(broken: int | None):
    record = Record(broken=broken)
    pushes = record.queue()
    assert flowps_threads() == ["flowps-push"]
    for ticket in range(20):
        record.put(pushes, ticket)
    pushes.close()
    assert flowps_threads() == []
    assert len(record.gradients) == (20 if broken is None else broken)
    assert len(record.errors) == (broken is not None)
    pushes.close()

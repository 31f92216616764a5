"""The feed queue: order, permits, staleness, ends and errors, whatever the threads do."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flowps.batch import Batch, Float32
from flowps.errors import CapacityError, DataError, StoppedError
from flowps.status.run_status import RunStatus
from flowps.status.verdict import WAITS
from flowps.trainer import feed as feed_module
from flowps.trainer.feed import Feed, FeedQueue
from tests.trainer.conftest import flowps_threads
from tests.trainer.samples import make_batch

WAIT_S = 30.0  # how long a test waits for what must happen; never reached unless it fails
WIDTH = 2


def embeddings_of(ticket: int, batch: Batch) -> Float32:
    return np.full((batch.size, WIDTH), ticket, np.float32)


def make_queue(batches: Iterator[Batch], lookup: Callable[[int, Batch], Any] = embeddings_of, **changes: Any) -> FeedQueue:
    """A queue of two threads and four permits, unless `changes` says otherwise."""
    given = {"width": WIDTH, "dense_width": 1, "permits": 4, "threads": 2, "first_ticket": 0}
    return FeedQueue(batches, lookup, **{**given, "stop": threading.Event(), "status": RunStatus(), **changes})


def numbered(count: int) -> Iterator[Batch]:
    """Batches whose dense value is their number."""
    return (make_batch(value=number) for number in range(count))


def drain(feeds: FeedQueue) -> list[Feed]:
    """Take and release everything."""
    found = []
    while (feed := feeds.get()) is not None:
        found.append(feed)
        feeds.release()
    return found


class Blocked(Iterator[Batch]):
    """Some batches, and then a `next` that waits until `go_on`; then the end."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.waiting, self.go_on = threading.Event(), threading.Event()

    def __next__(self) -> Batch:
        if self.batches:
            return self.batches.pop(0)
        self.waiting.set()
        assert self.go_on.wait(WAIT_S)
        raise StopIteration


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run `call` on a thread; its result, or what it raised, lands in the list."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("threads", "permits"), [(2, 2), (4, 4), (4, 9), (8, 8)])
def test_feeds_come_in_ticket_order_whatever_order_the_lookups_end_in(threads: int, permits: int, seed: int):
    rng, groups = np.random.default_rng(seed), 5
    # The lookups of `threads` tickets in a row all begin, and then end in a random order.
    barriers = [threading.Barrier(threads) for _ in range(groups)]
    order = [rng.permutation(threads).tolist() for _ in range(groups)]
    done = [[threading.Event() for _ in range(threads)] for _ in range(groups)]
    ended: list[int] = []

    def lookup(ticket: int, batch: Batch) -> Float32:
        group, member = divmod(ticket, threads)
        barriers[group].wait(WAIT_S)
        place = order[group].index(member)
        if place:
            assert done[group][order[group][place - 1]].wait(WAIT_S)
        ended.append(ticket)
        done[group][member].set()
        return embeddings_of(ticket, batch)

    with closing(make_queue(numbered(groups * threads), lookup, permits=permits, threads=threads)) as feeds:
        found = drain(feeds)
    assert ended == [group * threads + member for group in range(groups) for member in order[group]]
    assert [feed.ticket for feed in found] == list(range(groups * threads))
    for feed in found:
        assert (feed.batch.dense == feed.ticket).all(), "the n-th batch has the n-th ticket"
        assert (feed.embeddings == feed.ticket).all(), "and its own embeddings"


def test_tickets_go_on_from_the_first():
    with closing(make_queue(numbered(3), first_ticket=70)) as feeds:
        assert [feed.ticket for feed in drain(feeds)] == [70, 71, 72]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_end_is_none_and_stays_none(count: int):
    with closing(make_queue(numbered(count), threads=4)) as feeds:
        assert len(drain(feeds)) == count
        assert feeds.get() is None
        assert feeds.get() is None


def test_depth_is_what_is_ready():
    third = threading.Event()

    class Watched(RunStatus):
        def span(self, name: str, began: float, ended: float, batch: int = -1) -> None:
            super().span(name, began, ended, batch)
            # The thread that waits for a fourth permit has put three feeds.
            if name == "CheckFeed" and self.stage("CheckFeed").summary().count == 3:
                third.set()

    with closing(make_queue(numbered(9), permits=3, threads=1, status=Watched())) as feeds:
        assert third.wait(WAIT_S)
        feeds.get()
        assert feeds.depth in (1, 2)  # the third may be about to be put
        feeds.get()
        feeds.get()
        assert feeds.depth == 0


# --- permits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("permits", [1, 2, 5])
def test_no_more_lookups_than_permits_without_release(permits: int):
    looked_up: list[int] = []

    def lookup(ticket: int, batch: Batch) -> Float32:
        looked_up.append(ticket)
        return embeddings_of(ticket, batch)

    with closing(make_queue(numbered(50), lookup, permits=permits, threads=8)) as feeds:
        for _ in range(permits):
            assert feeds.get() is not None
    assert sorted(looked_up) == list(range(permits))


def test_one_permit_is_strictly_alternating():
    happened: list[str] = []

    def lookup(ticket: int, batch: Batch) -> Float32:
        happened.append(f"lookup {ticket}")
        return embeddings_of(ticket, batch)

    with closing(make_queue(numbered(40), lookup, permits=1, threads=4)) as feeds:
        while (feed := feeds.get()) is not None:
            happened.append(f"push {feed.ticket}")
            feeds.release()
    assert happened == [f"{what} {ticket}" for ticket in range(40) for what in ("lookup", "push")]


@pytest.mark.usefixtures("hurried_switching")
@pytest.mark.parametrize("permits", [1, 2, 3, 8, 32])
def test_under_stress_order_permits_and_staleness_hold(permits: int):
    count, lock = 2_000, threading.Lock()
    in_flight = most_in_flight = pushed = 0
    pushed_at_lookup: dict[int, int] = {}
    staleness: list[int] = []
    to_push: queue.SimpleQueue[Feed | None] = queue.SimpleQueue()
    batch = make_batch()

    def lookup(ticket: int, batch: Batch) -> Float32:
        nonlocal in_flight, most_in_flight
        with lock:
            in_flight += 1
            most_in_flight = max(most_in_flight, in_flight)
            pushed_at_lookup[ticket] = pushed
        return embeddings_of(ticket, batch)

    def push() -> None:
        nonlocal in_flight, pushed
        while (feed := to_push.get()) is not None:
            with lock:
                staleness.append(pushed - pushed_at_lookup[feed.ticket])
                pushed += 1
                in_flight -= 1
            feeds.release()

    tickets = []
    with closing(make_queue((batch for _ in range(count)), lookup, permits=permits, threads=8)) as feeds:
        pusher, _ = in_thread(push)
        while (feed := feeds.get()) is not None:
            tickets.append(feed.ticket)
            to_push.put(feed)
        to_push.put(None)
        pusher.join(WAIT_S)
    assert tickets == list(range(count))
    assert len(staleness) == count
    assert most_in_flight <= permits
    assert max(staleness) <= permits - 1
    assert in_flight == 0


# --- lookups in two halves --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hurried_switching")
@pytest.mark.parametrize("has_halves", [False, True])
@pytest.mark.parametrize(
    ("permits", "threads", "most"), [(2, 1, 0), (2, 3, 0), (4, 2, 0), (4, 4, 1), (8, 8, 3), (8, 1, 2), (3, 3, 9)]
)
def test_under_stress_no_more_pushes_are_missing_than_allowed(permits: int, threads: int, most: int, has_halves: bool):
    count, lock = 1_000, threading.Lock()
    pushed, missing = 0, dict[int, int]()
    to_push: queue.SimpleQueue[Feed | None] = queue.SimpleQueue()
    batch = make_batch()

    def lookup(ticket: int, batch: Batch) -> Float32:
        with lock:
            missing[ticket] = ticket - 70 - pushed
        return embeddings_of(ticket, batch)

    def find(ticket: int, batch: Batch) -> Callable[[], Float32]:
        with lock:
            assert ticket - 70 - pushed < permits
        return lambda: lookup(ticket, batch)

    def push() -> None:
        nonlocal pushed
        while to_push.get() is not None:
            with lock:
                pushed += 1
            feeds.release()

    changes = {"permits": permits, "threads": threads, "first_ticket": 70, "max_staleness": most}
    batches = (batch for _ in range(count))
    with closing(make_queue(batches, lookup, find=find if has_halves else None, **changes)) as feeds:
        pusher, _ = in_thread(push)
        found = []
        while (feed := feeds.get()) is not None:
            found.append(feed)
            to_push.put(feed)
        to_push.put(None)
        pusher.join(WAIT_S)
    assert [feed.ticket for feed in found] == list(range(70, 70 + count))
    assert all((feed.embeddings == feed.ticket).all() for feed in found)
    assert len(missing) == count
    assert max(missing.values()) <= min(most, permits - 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_next_batch_is_found_while_the_one_before_is_stepped(threads: int):
    found: queue.SimpleQueue[int] = queue.SimpleQueue()
    read: list[int] = []

    def find(ticket: int, batch: Batch) -> Callable[[], Float32]:
        found.put(ticket)

        def embeddings() -> Float32:
            read.append(ticket)
            return embeddings_of(ticket, batch)

        return embeddings

    status = RunStatus()
    changes = {"permits": 2, "threads": threads, "max_staleness": 0, "status": status}
    with closing(make_queue(numbered(5), unexpected, find=find, **changes)) as feeds:
        for ticket in range(5):
            feed = feeds.get()
            assert feed is not None
            assert feed.ticket == ticket
            if ticket < 4:
                while found.get(timeout=WAIT_S) != ticket + 1:
                    pass
            assert read == list(range(ticket + 1)), "nothing is read before the push"
            feeds.release()
        assert feeds.get() is None
    counts = {name: summary.count for name, summary in status.summaries().items()}
    assert [counts[stage] for stage in ("EmbeddingFind", "PushWait", "EmbeddingRead", "EmbeddingLookup")] == [5, 5, 5, 5]


def unexpected(ticket: int, batch: Batch) -> Float32:
    raise AssertionError("a lookup that has halves was made as a whole")


def test_one_batch_in_flight_needs_no_halves():
    with closing(make_queue(numbered(5), find=lambda ticket, batch: unexpected, permits=1, max_staleness=0)) as feeds:
        assert [feed.ticket for feed in drain(feeds)] == list(range(5))


@pytest.mark.parametrize("threads", [1, 3])
def test_who_waits_for_a_push_goes_when_the_queue_is_closed(threads: int):
    found = threading.Event()

    def find(ticket: int, batch: Batch) -> Callable[[], Float32]:
        if ticket == 1:
            found.set()
        return lambda: embeddings_of(ticket, batch)

    feeds = make_queue(numbered(9), unexpected, find=find, permits=2, threads=threads, max_staleness=0)
    assert feeds.get() is not None
    assert found.wait(WAIT_S)
    feeds.close()
    assert feeds.untaken == range(1, 2), "what was found is to be given up"
    assert not flowps_threads()


@pytest.mark.parametrize("half", ["find", "read"])
def test_an_exception_of_either_half_reaches_get(half: str):
    def broken(*_: Any) -> Any:
        raise CapacityError("full")

    def find(ticket: int, batch: Batch) -> Callable[[], Float32]:
        if ticket == 2:
            return broken() if half == "find" else broken
        return lambda: embeddings_of(ticket, batch)

    with (
        closing(make_queue(numbered(9), unexpected, find=find, max_staleness=0)) as feeds,
        pytest.raises(CapacityError, match="full"),
    ):
        drain(feeds)


def test_who_waits_for_a_push_goes_when_it_has_failed():
    with closing(make_queue(numbered(9), permits=2, threads=2, max_staleness=0)) as feeds:
        assert feeds.get() is not None
        feeds.fail(DataError("a push has failed"))
        for thread in feeds._threads:
            thread.join(WAIT_S)
        assert not flowps_threads()
        with pytest.raises(DataError, match="a push has failed"):
            feeds.get()


@pytest.mark.usefixtures("hurried_switching")
def test_rows_are_found_in_ticket_order_by_any_number_of_threads():
    found: list[int] = []

    def find(ticket: int, batch: Batch) -> Callable[[], Float32]:
        found.append(ticket)
        return lambda: embeddings_of(ticket, batch)

    with closing(make_queue(numbered(400), unexpected, find=find, permits=8, threads=8, max_staleness=5)) as feeds:
        drain(feeds)
    assert found == list(range(400))


# --- errors -----------------------------------------------------------------------------------------------------------


def broken_after(count: int, error: BaseException) -> Iterator[Batch]:
    yield from numbered(count)
    raise error


@pytest.mark.parametrize("error", [DataError("bad file"), KeyError("bug"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_of_the_batches_reaches_get(error: BaseException):
    with closing(make_queue(broken_after(2, error), threads=4)) as feeds, pytest.raises(type(error)) as caught:
        drain(feeds)
    assert caught.value is error


@pytest.mark.usefixtures("hurried_switching")
@pytest.mark.parametrize("threads", [2, 4])
def test_nobody_reads_on_behind_an_error(threads: int):
    """The stream fails once and then ends: whoever reads next must not take the end for the end of the data."""

    class FailsOnce(Iterator[Batch]):
        failed = False

        def __next__(self) -> Batch:
            if self.failed:
                raise StopIteration
            self.failed = True
            raise DataError("bad file")

    for _ in range(300):
        with closing(make_queue(FailsOnce(), threads=threads)) as feeds, pytest.raises(DataError, match="bad file"):
            feeds.get()


def test_waits_that_hold_no_training_up_are_not_counted_as_such():
    status = RunStatus()
    with closing(make_queue(numbered(5), status=status, starving=False)) as feeds:
        drain(feeds)
    assert status.summaries()["FeedQueueWait"].count == 5
    assert not {"TrainerWait", "FirstFeedWait", *WAITS} & status.summaries().keys()
    assert status.counters() == {}


def test_an_exception_of_a_lookup_reaches_get_at_once_though_an_earlier_one_still_runs():
    error, failed = CapacityError("full"), threading.Event()

    def lookup(ticket: int, batch: Batch) -> Float32:
        if ticket == 1:
            raise error
        assert failed.wait(WAIT_S)
        return embeddings_of(ticket, batch)

    with closing(make_queue(numbered(9), lookup)) as feeds:
        try:
            with pytest.raises(CapacityError) as caught:
                feeds.get()
        finally:
            failed.set()
    assert caught.value is error


def test_an_exception_reaches_get_though_feeds_are_ready():
    read = threading.Event()

    def batches() -> Iterator[Batch]:
        yield from numbered(2)
        read.set()
        raise DataError("bad file")

    with closing(make_queue(batches(), threads=1)) as feeds:
        assert read.wait(WAIT_S)
        with pytest.raises(DataError, match="bad file"):
            drain(feeds)


def test_fail_reaches_a_get_that_waits_and_check():
    blocked, error = Blocked([]), ValueError("the push failed")
    with closing(make_queue(blocked)) as feeds:
        feeds.check()
        getter, outcome = in_thread(feeds.get)
        assert blocked.waiting.wait(WAIT_S)
        feeds.fail(error)
        getter.join(WAIT_S)
        assert outcome == [error]
        with pytest.raises(ValueError, match="the push failed"):
            feeds.check()
        with pytest.raises(ValueError, match="the push failed"):
            feeds.get()
        blocked.go_on.set()


def test_the_first_error_is_the_one_that_is_raised():
    with closing(make_queue(numbered(0))) as feeds:
        feeds.fail(ValueError("first"))
        feeds.fail(ValueError("second"))
        with pytest.raises(ValueError, match="first"):
            feeds.check()


def test_after_an_error_no_more_is_read():
    read: list[int] = []

    def batches() -> Iterator[Batch]:
        for number in range(1_000):
            read.append(number)
            yield make_batch(value=number)

    def lookup(ticket: int, batch: Batch) -> Float32:
        raise ValueError("no")

    with (
        closing(make_queue(batches(), lookup, permits=1000, threads=4)) as feeds,
        pytest.raises(ValueError, match="no"),
    ):
        feeds.get()
    assert len(read) <= 4, "one batch for each thread"


GOOD = make_batch(size=3)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (replace(GOOD, dense=np.zeros((3, 2), np.float32)), r"dense \(3, 2\), expected \(3, 1\)"),
        (replace(GOOD, dense=np.zeros((2, 1), np.float32)), r"dense \(2, 1\), expected \(3, 1\)"),
        (replace(GOOD, signs=GOOD.signs[:-1]), "3 samples has 2 signs and 4 offsets"),
        (replace(GOOD, offsets=np.arange(5, dtype=np.int32), signs=np.zeros(4, np.uint64)), "4 signs and 5 offsets"),
        (make_batch(size=0, num_slots=0), "0 samples"),
    ],
    ids=["dense width", "dense rows", "signs", "offsets", "empty"],
)
def test_a_batch_of_the_wrong_shape_is_refused(batch: Batch, found: str):
    with closing(make_queue(iter([batch]))) as feeds, pytest.raises(DataError, match=found):
        feeds.get()


@pytest.mark.parametrize(
    ("embeddings", "found"),
    [
        (np.zeros((3, 3), np.float32), r"float32 \(3, 3\), expected float32 \(3, 2\)"),
        (np.zeros((2, 2), np.float32), r"float32 \(2, 2\), expected float32 \(3, 2\)"),
        (np.zeros((3, 2), np.float64), r"float64 \(3, 2\), expected float32 \(3, 2\)"),
        (np.zeros(6, np.float32), r"float32 \(6,\), expected"),
    ],
)
def test_embeddings_of_the_wrong_shape_or_type_are_refused_by_ticket(embeddings: Any, found: str):
    with (
        closing(make_queue(iter([GOOD]), lambda ticket, batch: embeddings, first_ticket=8)) as feeds,
        pytest.raises(DataError, match=f"batch 8: the lookup gave {found}"),
    ):
        feeds.get()


# --- stop and close ---------------------------------------------------------------------------------------------------


def test_stop_set_while_get_waits_ends_the_wait():
    assert feed_module._STOP_POLL_S < 1, "within a second"
    blocked, stop = Blocked([]), threading.Event()
    with closing(make_queue(blocked, stop=stop)) as feeds:
        getter, outcome = in_thread(feeds.get)
        assert blocked.waiting.wait(WAIT_S)
        stop.set()
        getter.join(WAIT_S)
        blocked.go_on.set()
    assert [type(found) for found in outcome] == [StoppedError]
    assert "asked to stop" in str(outcome[0])


def test_close_ends_a_get_that_waits_for_a_permit_of_its_own():
    with closing(make_queue(numbered(9), permits=1)) as feeds:
        assert feeds.get() is not None
        getter, outcome = in_thread(feeds.get)
        feeds.close()
        getter.join(WAIT_S)
    assert [type(found) for found in outcome] == [StoppedError]


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_close_leaves_no_thread(taken: int):
    feeds = make_queue(numbered(1_000), permits=5, threads=8)
    assert len([name for name in flowps_threads() if name.startswith("flowps-feed-")]) == 8
    for _ in range(taken):
        assert feeds.get() is not None
    feeds.close()
    assert flowps_threads() == []
    feeds.close()


def test_close_waits_for_a_lookup_that_runs():
    began, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def lookup(ticket: int, batch: Batch) -> Float32:
        began.set()
        assert go_on.wait(WAIT_S)
        ended.set()
        return embeddings_of(ticket, batch)

    feeds = make_queue(numbered(9), lookup, threads=1)
    assert began.wait(WAIT_S)
    closer, _ = in_thread(feeds.close)
    go_on.set()
    closer.join(WAIT_S)
    assert ended.is_set()
    assert flowps_threads() == []


# --- stage: what is done ahead of a step --------------------------------------------------------------------------------


def test_feeds_are_staged_by_feed_threads_after_their_checks():
    staged: list[tuple[str, float, float]] = []

    def stage(batch: Batch, embeddings: Float32) -> str:
        staged.append((threading.current_thread().name, batch.dense[0, 0], embeddings[0, 0]))
        return f"inputs of {batch.dense[0, 0]:g}"

    with closing(make_queue(numbered(6), stage=stage)) as feeds:
        found = drain(feeds)
    assert [feed.inputs for feed in found] == [f"inputs of {number}" for number in range(6)]
    assert {name.rpartition("-")[0] for name, _, _ in staged} == {"flowps-feed"}
    assert sorted((dense, looked_up) for _, dense, looked_up in staged) == [(number, number) for number in range(6)]


def test_without_a_stage_there_are_no_inputs():
    with closing(make_queue(numbered(2))) as feeds:
        assert [feed.inputs for feed in drain(feeds)] == [None, None]


def test_nothing_is_staged_that_does_not_fit():
    staged: list[Batch] = []

    def stage(batch: Batch, embeddings: Float32) -> None:
        staged.append(batch)

    for batches, shape in (([GOOD], (3, 3)), ([make_batch(size=3, dense_width=2)], (3, 2))):
        feeds = make_queue(iter(batches), lambda ticket, batch, shape=shape: np.zeros(shape, np.float32), stage=stage)
        with closing(feeds), pytest.raises(DataError):
            feeds.get()
    assert staged == []


@pytest.mark.parametrize("error", [ValueError("no memory on the GPU"), KeyboardInterrupt()])
def test_an_exception_of_the_stage_reaches_get(error: BaseException):
    def stage(batch: Batch, embeddings: Float32) -> None:
        raise error

    with closing(make_queue(numbered(3), stage=stage)) as feeds, pytest.raises(type(error)) as caught:
        feeds.get()
    assert caught.value is error


# --- run status -------------------------------------------------------------------------------------------------------


def test_every_stage_is_timed_for_every_batch():
    status = RunStatus()
    with closing(make_queue(numbered(6), status=status)) as feeds:
        drain(feeds)
    counts = {name: summary.count for name, summary in status.summaries().items()}
    for stage in ("CheckBatch", "EmbeddingLookup", "CheckFeed", "StageFeed", "FeedQueueWait"):
        assert counts[stage] == 6
    assert (counts["FirstFeedWait"], counts["TrainerWait"]) == (1, 5)
    assert counts["ReadSample"] >= 7, "the end was read, too"
    assert counts["PermitWait"] >= 7


class Starving(RunStatus):
    """Says when `get` found the queue empty."""

    def __init__(self) -> None:
        super().__init__()
        self.empty: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.found: queue.SimpleQueue[int] = queue.SimpleQueue()

    def span(self, name: str, began: float, ended: float, batch: int = -1) -> None:
        super().span(name, began, ended, batch)
        if name == "EmbeddingFind":
            self.found.put(batch)

    def count(self, name: str, by: int = 1) -> None:
        super().count(name, by)
        if name == "feed_queue_empty":
            self.empty.put(name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes only when a test says so."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(feed_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.mark.parametrize("bound", [wait for wait in WAITS if wait != "TrainerWaitForPush"])
def test_a_wait_of_the_trainer_is_put_down_to_what_the_feed_was_doing(bound: str, clock: SimpleNamespace):
    status = Starving()

    def starve(stage: str, ticket: int) -> None:
        """The feed `ticket` takes 7 s in the stage under test, while the trainer waits for it."""
        if stage == bound and ticket == 1:
            assert status.empty.get(timeout=WAIT_S)
            clock.now += 7.0

    def batches() -> Iterator[Batch]:
        for number in range(3):
            starve("TrainerWaitForRead", number)
            yield make_batch(value=number)

    def lookup(ticket: int, batch: Batch) -> Float32:
        starve("TrainerWaitForLookup", ticket)
        return embeddings_of(ticket, batch)

    def stage(batch: Batch, embeddings: Float32) -> None:
        starve("TrainerWaitForStage", next(staged))

    staged = itertools.count()

    def release() -> None:
        starve("TrainerWaitForPermit", 1)
        feeds.release()

    # Feed 1 is read only after feed 0 was taken: feed 0 holds the permit until then.
    with closing(make_queue(batches(), lookup, permits=1, threads=1, status=status, stage=stage)) as feeds:
        assert feeds.get() is not None
        while not status.empty.empty():
            status.empty.get()
        releaser, _ = in_thread(release)
        assert feeds.get() is not None
        releaser.join(WAIT_S)
    found = status.summaries()
    assert found["TrainerWait"].total_us == pytest.approx(7e6)
    for wait in WAITS:
        assert found[wait].total_us == pytest.approx(7e6 if wait == bound else 0.0)


@pytest.mark.parametrize(
    ("where", "bound"),
    [("find", "TrainerWaitForLookup"), ("push", "TrainerWaitForPush"), ("read", "TrainerWaitForLookup")],
)
def test_so_it_is_where_lookups_have_halves(where: str, bound: str, clock: SimpleNamespace):
    status = Starving()

    def starve(what: str, ticket: int) -> None:
        if what == where and ticket == 1:
            assert status.empty.get(timeout=WAIT_S)
            clock.now += 7.0

    def find(ticket: int, batch: Batch) -> Callable[[], Float32]:
        starve("find", ticket)

        def read() -> Float32:
            starve("read", ticket)
            return embeddings_of(ticket, batch)

        return read

    def release() -> None:
        if where == "push":
            assert [status.found.get(timeout=WAIT_S) for _ in range(2)] == [0, 1]
        starve("push", 1)
        feeds.release()

    # What the first `get` has found empty is of no interest.
    ready = threading.Event()
    batches = (batch for batch in numbered(2) if batch.dense[0, 0] == 0 or ready.wait(WAIT_S))
    changes = {"permits": 2, "threads": 1, "max_staleness": 0, "status": status}
    with closing(make_queue(batches, unexpected, find=find, **changes)) as feeds:
        assert feeds.get() is not None
        while not status.empty.empty():
            status.empty.get()
        ready.set()
        releaser, _ = in_thread(release)
        assert feeds.get() is not None
        releaser.join(WAIT_S)
    found = status.summaries()
    assert found["TrainerWait"].total_us == pytest.approx(7e6)
    assert [found[wait].count for wait in WAITS] == [1] * len(WAITS), "one wait, however many parts of it are alike"
    assert {wait: found[wait].total_us for wait in WAITS} == {wait: pytest.approx(7e6 if wait == bound else 0.0) for wait in WAITS}


# --- holding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "permits"), [(1, 1), (2, 4), (4, 9)])
def test_from_a_ticket_on_nothing_is_looked_up_until_it_is_allowed(threads: int, permits: int):
    looked_up: list[int] = []

    def lookup(ticket: int, batch: Batch) -> Float32:
        looked_up.append(ticket)
        return embeddings_of(ticket, batch)

    with closing(make_queue(numbered(20), lookup, permits=permits, threads=threads)) as feeds:
        found: list[Feed] = []
        for first in (permits + 3, permits + 4, permits + 9):
            feeds.hold_from(first)
            while len(found) < first:
                feed = feeds.get()
                assert feed is not None
                found.append(feed)
                feeds.release()
            # Whoever would take the next ticket has had every chance to.
            assert sorted(looked_up) == list(range(first))
            assert feeds.samples == sum(feed.batch.size for feed in found)
        feeds.hold_from(np.inf)
        found += drain(feeds)
    assert [feed.ticket for feed in found] == list(range(20))
    assert [int(feed.batch.dense[0, 0]) for feed in found] == list(range(20)), "a batch that was set aside keeps its place"


def test_hold_says_which_ticket_is_the_first_that_was_not_given():
    with closing(make_queue(numbered(20), permits=3)) as feeds:
        first = feeds.hold()
        assert 0 <= first <= 3
        for _ in range(first):
            assert feeds.get() is not None
            feeds.release()
        assert feeds.depth == 0
        feeds.hold_from(np.inf)
        assert len(drain(feeds)) == 20 - first


class Late(Iterator[Batch]):
    """One batch that comes when it is let, and then the end."""

    def __init__(self) -> None:
        self.waiting, self.come = threading.Event(), threading.Event()
        self.given = 0

    def __next__(self) -> Batch:
        if self.given:
            raise StopIteration
        self.waiting.set()
        assert self.come.wait(WAIT_S)
        self.given += 1
        return make_batch(value=7)


def test_a_batch_that_comes_while_tickets_are_held_is_set_aside_for_later():
    late, looked_up = Late(), threading.Event()

    def lookup(ticket: int, batch: Batch) -> Float32:
        looked_up.set()
        return embeddings_of(ticket, batch)

    class Watched(RunStatus):
        """Notes when a second permit is waited for: the batch that has come is then set aside."""

        def __init__(self) -> None:
            super().__init__()
            self.permits, self.again = 0, threading.Event()

        def span(self, name: str, began: float, ended: float, batch: int = -1) -> None:
            super().span(name, began, ended, batch)
            if name == "ReadSample":
                self.again.set()

    status = Watched()
    with closing(make_queue(late, lookup, threads=1, status=status)) as feeds:
        assert late.waiting.wait(WAIT_S)  # the thread has a permit, and reads
        assert feeds.hold() == 0
        late.come.set()
        assert status.again.wait(WAIT_S)  # it has been read
        assert not looked_up.wait(0.05)
        assert feeds.samples == 0
        feeds.hold_from(np.inf)
        feed = feeds.get()
        assert feed is not None
        assert (feed.ticket, int(feed.batch.dense[0, 0])) == (0, 7)
        feeds.release()
        assert feeds.get() is None


def test_close_ends_threads_that_are_held():
    feeds = make_queue(numbered(20), threads=3)
    feeds.hold()
    feeds.close()
    assert flowps_threads() == []


# --- batches whose samples were all left out ----------------------------------------------------------------------------


def sampled(*counts: tuple[int, int]) -> Iterator[Batch]:
    """Batches of so many samples, with so many left out; their dense value is their number."""
    return (replace(make_batch(size=size, value=number), left_out=left) for number, (size, left) in enumerate(counts))


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_without_samples_are_passed_over_and_counted_with_the_next(threads: int):
    """They get no ticket and no lookup; who goes on after a feed has gone by all that was read until there."""
    looked_up: list[int] = []

    def lookup(ticket: int, batch: Batch) -> Float32:
        looked_up.append(ticket)
        return embeddings_of(ticket, batch)

    counts = [(0, 5), (3, 2), (0, 4), (0, 1), (2, 0), (5, 0), (1, 9), (0, 7), (0, 3)]
    with closing(make_queue(sampled(*counts), lookup, threads=threads)) as feeds:
        found = drain(feeds)
        assert [(feed.ticket, feed.batch.dense[0, 0], feed.batch.left_out) for feed in found] == [
            (0, 1, 7), (1, 4, 5), (2, 5, 0), (3, 6, 9)
        ]  # fmt: skip
        assert [feed.read for feed in found] == [10, 7, 5, 10]
        assert feeds.trailing == 10
        assert feeds.samples == sum(size + left for size, left in counts) == 42
        assert feeds.get() is None
    assert sorted(looked_up) == [0, 1, 2, 3]


@pytest.mark.parametrize("counts", [[], [(0, 3)], [(0, 3), (0, 4)]])
def test_an_epoch_of_which_everything_was_left_out_has_only_an_end(counts: list[tuple[int, int]]):
    with closing(make_queue(sampled(*counts))) as feeds:
        assert feeds.get() is None
        assert feeds.trailing == feeds.samples == sum(left for _, left in counts)


def test_what_is_left_out_after_the_last_batch_is_known_at_the_end_only():
    """Until then it may belong to a batch that is still to come."""
    stream = Blocked([*sampled((2, 1), (0, 4))])
    with closing(make_queue(stream, threads=1)) as feeds:
        assert feeds.get() is not None
        assert stream.waiting.wait(WAIT_S)
        assert (feeds.trailing, feeds.samples) == (0, 3)
        stream.go_on.set()
        feeds.release()
        assert feeds.get() is None
        assert (feeds.trailing, feeds.samples) == (4, 7)


def test_what_is_left_out_at_the_end_does_not_come_before_feeds_that_nobody_has_taken():
    """As at a stop of several trainers: in the order of the samples it comes after them, and is read again with them."""
    ended = threading.Event()

    def batches() -> Iterator[Batch]:
        yield from sampled((2, 1), (3, 0), (0, 4))
        ended.set()

    with closing(make_queue(batches(), threads=1)) as feeds:
        assert feeds.get() is not None
        assert ended.wait(WAIT_S)
        feeds.release()
        with feeds._changed:  # until the thread that has come to the end has said so
            assert feeds._changed.wait_for(lambda: feeds.samples == 10, WAIT_S)
        assert feeds.untaken == range(1, 2)
        assert feeds.trailing == 0
        assert feeds.get() is not None
        assert feeds.trailing == 4


def test_a_batch_that_is_held_keeps_what_was_left_out_before_it():
    """At a cut it has no ticket yet: neither it nor what was left out before it has been read, as far as the cut knows."""
    reading, go_on = threading.Event(), threading.Event()

    def batches() -> Iterator[Batch]:
        first, nothing, second = sampled((2, 0), (0, 6), (3, 1))
        yield first
        yield nothing
        reading.set()
        assert go_on.wait(WAIT_S)
        yield second

    with closing(make_queue(batches(), threads=1)) as feeds:
        assert feeds.get() is not None
        assert reading.wait(WAIT_S)
        assert feeds.hold() == 1
        go_on.set()
        feeds.release()
        assert feeds.samples == 2
        feeds.hold_from(float("inf"))
        feed = feeds.get()
        assert feed is not None
        assert (feed.ticket, feed.batch.dense[0, 0], feed.read, feeds.samples) == (1, 2, 10, 12)


def test_a_batch_without_samples_of_which_none_was_left_out_is_refused():
    """Nobody has said why it is empty."""
    refusal = pytest.raises(DataError, match=r"a batch of 0 samples has 0 signs and 1 offsets that do not fit")
    with closing(make_queue(sampled((2, 0), (0, 0)))) as feeds, refusal:
        drain(feeds)

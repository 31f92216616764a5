"""`FeedQueue`: batches → feeds (batches with their embeddings), by several threads, delivered in ticket order.

A feed thread takes a permit, then a ticket together with the next batch, checks the batch, looks it up, checks the answer and puts
the feed where `get` finds it. A permit is returned by `release`, after the feed's push. So at most `permits` batches are in
flight, the queue needs no other bound, and the staleness of a feed is at most `permits` - 1.

Where it is to be less, a lookup is cut in two: its rows are found at once, in ticket order, and read when no more than
`max_staleness` pushes of earlier batches are missing. A thread that waits for those finds nothing meanwhile: no more batches are
ahead than there are threads.

Why no deadlock: the permit is taken before the ticket, so the holder of the lowest undelivered ticket always has its permit and
never waits for the holder of a higher one; pushes that it waits for are those of lower ones, whose feeds are delivered.

For a cut nothing may be in flight: `hold_from` keeps batches from being looked up, from a ticket on, until it is called again. One
that was read meanwhile is set aside for the next thread that takes a ticket.

Threads: `get` is called by one thread (the trainer); `release`, `hold_from`, `hold`, `fail` and `close` by any. A thread's
exception is handed to `get`, at once, whatever was delivered before; the end of the batches is None from `get`.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from flowps.batch import Batch, Float32
from flowps.errors import DataError, StoppedError
from flowps.status.run_status import RunStatus
from flowps.status.verdict import FEED_WAITS

_STOP_POLL_S = 0.25  # the stop flag may be set from a signal handler or another process, which cannot notify

Lookup = Callable[[int, Batch], Float32]
Find = Callable[[int, Batch], Callable[[], Float32]]
Stage = Callable[[Batch, Float32], Any]


def default_feed_threads(in_flight: int) -> int:
    """One per two of the cores that this process may use, as far as there are permits.

    On two cores a second one brought nothing (`python -m bench.feed`); for more cores the rule is an extrapolation.
    """
    return max(1, min(in_flight, len(os.sched_getaffinity(0)) // 2))


@dataclass(frozen=True, slots=True)
class Feed:
    """A batch with its looked-up embeddings, float32 [size, width]. `ticket` is also the batch's id for its push.

    batch  what was left out on purpose between it and the one before counts as left out of it
    inputs what `stage` made of them
    times  when its thread began to wait for a permit, had it, had the batch, had found its rows, did not wait for pushes any more,
           had read them, and had the feed ready (time.perf_counter)
    """

    ticket: int
    batch: Batch
    embeddings: Float32
    inputs: Any
    times: tuple[float, ...]

    @property
    def read(self) -> int:
        """Samples that were read for it, those left out on purpose among them."""
        return self.batch.read


class FeedQueue:
    """Feeds of `batches`, in order.

    Parameters
    ----------
    batches : read by one feed thread at a time.
    lookup : (batch id, batch) → embeddings; called by several threads at once.
    width, dense_width : what every feed must have.
    permits : batches in flight.
    threads : feed threads, started at once.
    first_ticket : ticket of the first batch.
    stop : set by anyone to end the run: `get` then raises StoppedError instead of waiting.
    status : gets the stages PermitWait, ReadSample, CheckBatch, EmbeddingLookup (where it has halves also EmbeddingFind and
        EmbeddingRead, and between them, not counted, PushWait), CheckFeed, StageFeed, FeedQueueWait, FirstFeedWait (until the
        first feed) and TrainerWait (for every later one), the latter also split by what the awaited feed was doing
        (`verdict.FEED_WAITS`), and the counter `feed_queue_empty`.
    stage : (batch, embeddings) → what a step takes, already where it runs; called by several threads at once, ahead of the step.
    starving : whether a `get` that waits holds training up, and is counted and timed as such.
    held_from : as if `hold_from` had been called with it before the first batch.
    max_staleness : pushes of earlier batches that may be missing when a batch's rows are read. More than `permits` - 1 never are.
    find : (batch id, batch) → what gives the embeddings, of rows that are found already; None: the whole lookup waits for pushes.
    """

    def __init__(
        self, batches: Iterator[Batch], lookup: Lookup, *, width: int, dense_width: int, permits: int, threads: int,
        first_ticket: int, stop: threading.Event, status: RunStatus, stage: Stage = lambda batch, embeddings: None,
        starving: bool = True, held_from: float = math.inf, max_staleness: float = math.inf, find: Find | None = None,
    ) -> None:  # fmt: skip
        self._aside: Batch | None = None  # read, but without a ticket; guarded by the read lock
        self._batches, self._lookup, self._stage, self._stop, self._status = batches, lookup, stage, stop, status
        self._width, self._dense_width, self._starving = width, dense_width, starving
        self._read_lock = threading.Lock()  # held while a batch is read: order of tickets = order of batches
        self._changed = threading.Condition()  # guards everything below
        self._permits = permits
        self._max_staleness = None if max_staleness >= permits - 1 else max_staleness  # None: permits are all that is waited for
        self._find = find or (lambda ticket, batch: partial(lookup, ticket, batch))
        self._first, self._released, self._next_find = first_ticket, 0, first_ticket
        self._next_ticket = self._deliver = first_ticket
        self.samples = 0
        """Samples read for all batches that have a ticket, and at the end of the data of all batches."""
        self._left_over = 0  # samples read and left out on purpose since the last batch with a ticket; guarded by the read lock
        self._held_from = held_from  # no ticket from this one on is given
        self._end: int | None = None  # the ticket that will not come
        self._ready: dict[int, Feed] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"flowps-feed-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def get(self, stoppable: bool = True) -> Feed | None:
        """The next feed, waiting for it; None after the last. Raises what a feed thread, or `fail`, raised.

        stoppable   whether a stop ends the wait, with StoppedError; otherwise only the end of the batches does
        """
        start = time.perf_counter()
        with self._changed:
            if self._starving and not self._decided():
                self._status.count("feed_queue_empty")
            while not self._changed.wait_for(self._decided, _STOP_POLL_S):
                if stoppable and self._stop.is_set():
                    break
            if self._error is not None:
                raise self._error
            if self._closed or (stoppable and self._stop.is_set()):
                raise StoppedError("taking a feed: the run was asked to stop")
            if self._deliver == self._end:
                return None
            feed = self._ready.pop(self._deliver)
            self._deliver += 1
        self._account(feed, start, time.perf_counter())
        return feed

    def release(self) -> None:
        """Return a permit: a feed has been pushed, or needs no push."""
        with self._changed:
            self._permits += 1
            self._released += 1
            self._changed.notify_all()

    @property
    def untaken(self) -> range:
        """The tickets that were given and whose feeds nobody has taken; once closed: all that was looked up in vain."""
        return range(self._deliver, self._next_ticket)

    def hold_from(self, ticket: float) -> None:
        """Give no ticket from this one on, until told otherwise (infinity: give all). Tickets that were given stay given."""
        with self._changed:
            self._held_from = ticket
            self._changed.notify_all()

    def hold(self) -> int:
        """Give no more tickets; returns the first that was not given. Its feed will not come before `hold_from`."""
        with self._changed:
            self._held_from = self._next_ticket
            return self._next_ticket

    def fail(self, error: BaseException) -> None:
        """Make `get` raise `error`."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    @property
    def trailing(self) -> int:
        """Samples that were read and left out on purpose after the last batch; 0 until all feeds have been taken."""
        return self._left_over if self._deliver == self._end else 0

    @property
    def depth(self) -> int:
        """Feeds that are ready now."""
        return len(self._ready)

    def check(self) -> None:
        """Raise what a feed thread, or `fail`, raised, if anything."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop the threads and wait for them. Whoever owns `batches` must end a `next` that waits. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _account(self, feed: Feed, start: float, now: float) -> None:
        """Time the wait of `get`, and say what the feed was doing meanwhile."""
        self._status.observe("FeedQueueWait", now - feed.times[-1])
        if not self._starving:
            return
        if feed.ticket == 0:
            self._status.observe("FirstFeedWait", now - start)
            return
        self._status.span("TrainerWait", start, now, feed.ticket)
        if feed.times[-1] > start:
            waited = dict.fromkeys(FEED_WAITS, 0.0)  # a lookup has two halves
            for stage, (began, ended) in zip(FEED_WAITS, pairwise(feed.times), strict=True):
                waited[stage] += max(0.0, min(ended, now) - max(began, start))
            for stage, seconds in waited.items():
                self._status.observe(stage, seconds)

    def _run(self) -> None:
        try:
            while (taken := self._take()) is not None:
                ticket, batch, times = taken
                with self._status.timed("CheckBatch", ticket):
                    self._check_batch(batch)
                looked_up = self._look_up(ticket, batch)
                if looked_up is None:
                    return
                embeddings, lookup_times = looked_up
                with self._status.timed("CheckFeed", ticket):
                    self._check_embeddings(ticket, embeddings, batch)
                with self._status.timed("StageFeed", ticket):
                    inputs = self._stage(batch, embeddings)
                with self._changed:
                    all_times = (*times, *lookup_times, time.perf_counter())
                    self._ready[ticket] = Feed(ticket, batch, embeddings, inputs, all_times)
                    self._changed.notify_all()
        except BaseException as error:  # handed over whole: whoever calls `get` raises it
            self.fail(error)

    def _look_up(self, ticket: int, batch: Batch) -> tuple[Float32, tuple[float, float, float]] | None:
        """The embeddings, and when rows were found, pushes waited for, and rows read; None when the queue is over meanwhile."""
        if self._max_staleness is None:
            with self._status.timed("EmbeddingLookup", ticket):
                embeddings = self._lookup(ticket, batch)
            return embeddings, (time.perf_counter(),) * 3
        if not self._wait_until(lambda: self._next_find == ticket):
            return None
        began = time.perf_counter()
        read = self._find(ticket, batch)
        found = time.perf_counter()
        self._status.span("EmbeddingFind", began, found, ticket)
        with self._changed:
            self._next_find += 1
            self._changed.notify_all()
        pushed = ticket - self._first - self._max_staleness
        if not self._wait_until(lambda: self._released >= pushed):
            return None
        fresh = time.perf_counter()
        self._status.span("PushWait", found, fresh, ticket)
        embeddings = read()
        ended = time.perf_counter()
        self._status.span("EmbeddingRead", fresh, ended, ticket)
        self._status.observe("EmbeddingLookup", found - began + ended - fresh)
        return embeddings, (found, fresh, ended)

    def _wait_until(self, is_so: Callable[[], bool]) -> bool:
        """Whether it has become so before the queue was over."""
        with self._changed:
            self._changed.wait_for(lambda: is_so() or self._closed or self._error is not None)
            return is_so()

    def _decided(self) -> bool:
        """Whether `get` has something to answer."""
        return self._deliver in self._ready or self._error is not None or self._closed or self._deliver == self._end

    def _take(self) -> tuple[int, Batch, tuple[float, float, float]] | None:
        """A permit, then a ticket and its batch, with the first three of the feed's times; None when there are no more."""
        began = time.perf_counter()
        while True:
            with self._status.timed("PermitWait"), self._changed:
                self._changed.wait_for(lambda: (self._permits > 0 and not self._is_held()) or self._is_over())
                if self._is_over():
                    return None
                self._permits -= 1
            permitted = time.perf_counter()
            with self._read_lock:
                if self._is_over():
                    return None
                batch, self._aside = self._aside, None
                try:
                    if batch is None:
                        with self._status.timed("ReadSample"):
                            batch = self._next_batch()
                except BaseException as error:
                    # Before the lock is free: no other thread may read on and take the end, or a batch behind the gap, for its own.
                    self.fail(error)
                    return None
                with self._changed:
                    ticket = self._next_ticket
                    if batch is None:
                        self._end = ticket
                        self.samples += self._left_over
                        self._changed.notify_all()
                        return None
                    if not self._is_held():
                        self._next_ticket += 1
                        if self._left_over:
                            batch, self._left_over = replace(batch, left_out=batch.left_out + self._left_over), 0
                        self.samples += batch.read
                        return ticket, batch, (began, permitted, time.perf_counter())
                    # Held since it had its permit: another thread, or this one, gives the batch its ticket later.
                    self._aside = batch
                    self._permits += 1

    def _next_batch(self) -> Batch | None:
        """The next batch with samples. Of others, all samples were left out."""
        while (batch := next(self._batches, None)) is not None and not batch.size and batch.left_out:
            self._left_over += batch.left_out
        return batch

    def _is_held(self) -> bool:
        return self._next_ticket >= self._held_from

    def _is_over(self) -> bool:
        return self._closed or self._error is not None or self._end is not None

    def _check_batch(self, batch: Batch) -> None:
        """A batch that is not what the model was built for is refused here, not deep inside a kernel."""
        if batch.dense.shape != (batch.size, self._dense_width):
            raise DataError(f"a batch has dense {batch.dense.shape}, expected {(batch.size, self._dense_width)}")
        if not batch.size or int(batch.offsets[-1]) != len(batch.signs) or (len(batch.offsets) - 1) % batch.size:
            raise DataError(
                f"a batch of {batch.size} samples has {len(batch.signs)} signs and {len(batch.offsets)} offsets that do not fit"
            )

    def _check_embeddings(self, ticket: int, embeddings: Float32, batch: Batch) -> None:
        if embeddings.shape != (batch.size, self._width) or embeddings.dtype != np.float32:
            raise DataError(
                f"batch {ticket}: the lookup gave {embeddings.dtype} {embeddings.shape}, "
                f"expected float32 {(batch.size, self._width)}"
            )

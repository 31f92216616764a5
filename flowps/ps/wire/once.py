"""`Once`: calls that may come again, made once. A lookup's answer is kept until its push; a push is applied at most once.

A lookup in two halves is a call to find, which has no answer to keep, and one to pool, whose answer is a lookup's. State without
I/O: `service` calls it. Memory: the answers of the batches in flight, and the numbers of the last pushes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from flowps.errors import UnknownBatchError

T = TypeVar("T")
_SMALL_BYTES = 256  # an answer without samples is shorter


class Once:
    """Lookups and pushes by batch number. Any thread may call any method.

    A call that comes again while the first still runs waits for it; one that comes later gets the same answer. A call that failed
    is forgotten: it may be made anew.

    kept_pushes   how many pushes are remembered; more than any client has in flight
    """

    def __init__(self, kept_pushes: int) -> None:
        self._kept_pushes = kept_pushes
        self._lock = threading.Lock()  # guards all below, never held while a call runs
        self._finds: dict[int, Future[None]] = {}
        self._lookups: dict[int, Future[bytes]] = {}
        self._pushes: OrderedDict[int, Future[int]] = OrderedDict()
        self._small: deque[int] = deque()

    def find(self, batch_id: int, work: Callable[[], None]) -> None:
        """Call `work`. Raises as `lookup`."""
        self._before_push(self._finds, batch_id, work)

    def lookup(self, batch_id: int, work: Callable[[], bytes]) -> bytes:
        """What `work` gives. Raises UnknownBatchError for a batch that was pushed: the lookup is late, and of no use to anyone."""
        answer, first = self._before_push(self._lookups, batch_id, work)
        if first and len(answer) < _SMALL_BYTES:
            self._drop_small(batch_id)
        return answer

    def push(self, batch_id: int, work: Callable[[], int]) -> int:
        """What `work` gave when it was called for this batch."""
        with self._lock:
            future = self._pushes.get(batch_id)
            first = future is None
            if future is None:
                future = self._pushes[batch_id] = Future()
                while len(self._pushes) > self._kept_pushes:
                    self._pushes.popitem(last=False)
        rows = self._result(self._pushes, batch_id, future, work if first else None)
        if first:
            self.forget(batch_id)
        return rows

    def forget(self, batch_id: int) -> None:
        """There will be no push; the number may be used again."""
        with self._lock:
            self._finds.pop(batch_id, None)
            self._lookups.pop(batch_id, None)

    def _drop_small(self, batch_id: int) -> None:
        """Keep the newest small answers only: a lookup of no samples has no push that would end it."""
        with self._lock:
            self._small.append(batch_id)
            if len(self._small) > self._kept_pushes:
                self._lookups.pop(self._small.popleft(), None)

    def _before_push(self, of: dict[int, Future[T]], batch_id: int, work: Callable[[], T]) -> tuple[T, bool]:
        """What `work` gave when it was called for this batch, and whether that was now."""
        with self._lock:
            if batch_id in self._pushes:
                raise UnknownBatchError(f"batch {batch_id}: a lookup came after its push")
            future = of.get(batch_id)
            first = future is None
            if future is None:
                future = of[batch_id] = Future()
        return self._result(of, batch_id, future, work if first else None), first

    def _result(
        self, of: dict[int, Future[T]], batch_id: int, future: Future[T], work: Callable[[], T] | None
    ) -> T:  # fmt: skip
        if work is not None:
            try:
                future.set_result(work())
            except BaseException as error:  # handed over whole to everyone who waits
                with self._lock:
                    if of.get(batch_id) is future:
                        del of[batch_id]
                future.set_exception(error)
        return future.result()

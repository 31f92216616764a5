"""`PushQueue`: gradients → pushes, beside the next step, in ticket order.

One thread sends them, so the shards see pushes in the order of the steps. It needs no bound of its own: every gradient here still
holds its batch's permit. Threads: `put` and `drain` are called by the trainer; a failing push is handed to `on_error` and ends it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from flowps.batch import Float32
from flowps.status.run_status import RunStatus

Push = Callable[[int, Float32, float], None]


class PushQueue:
    """Calls `push(ticket, gradient, rate_scale)` for everything put, then `on_pushed()`. Gets PushGrad times into `status`."""

    def __init__(self, push: Push, on_error: Callable[[BaseException], None], status: RunStatus) -> None:
        self._push, self._on_error, self._status = push, on_error, status
        self._work: queue.SimpleQueue[tuple[int, Any, float, Callable[[], None]] | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._pending = 0
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="flowps-push", daemon=True)
        self._thread.start()

    def put(self, ticket: int, gradient: Any, rate_scale: float, on_pushed: Callable[[], None]) -> None:
        """Push `gradient` (a TensorFlow tensor, float32 [size, width]) for `ticket` and then call `on_pushed`; returns at once.

        rate_scale   what the slots' learning rates are multiplied by
        """
        with self._idle:
            self._pending += 1
        self._work.put((ticket, gradient, rate_scale, on_pushed))

    def drain(self) -> None:
        """Wait until everything put has been pushed, or a push has failed."""
        with self._idle:
            self._idle.wait_for(lambda: not self._pending or self._failed)

    def close(self) -> None:
        """End the thread after what was put. Idempotent."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            ticket, gradient, rate_scale, on_pushed = item
            try:
                # On a CPU this is a view of the tensor's memory (`numpy()` copies); from a GPU it waits for the step and copies.
                with self._status.timed("PushGrad", ticket):
                    self._push(ticket, np.asarray(gradient), rate_scale)
            except BaseException as error:  # handed over whole to whoever takes the next feed
                # Before `drain` may return: the trainer then looks for an error.
                self._on_error(error)
                with self._idle:
                    self._failed = True
                    self._idle.notify_all()
                return
            on_pushed()
            with self._idle:
                self._pending -= 1
                self._idle.notify_all()

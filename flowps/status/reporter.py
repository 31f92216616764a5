"""`Reporter`: emits what a trainer measures of itself every so often, when its training is over, and at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from flowps.status.event import Emit, Phase, TrainerStatus
from flowps.status.run_status import RunStatus


class Reporter:
    """A thread of its own, so that a trainer that waits is still reported on. An error of `emit` ends it and is raised by `close`.

    Parameters
    ----------
    status, emit : what is reported, and to whom.
    interval_s : seconds between reports.
    step : called for the step that training is at.
    trainer : its number.
    """

    def __init__(self, status: RunStatus, emit: Emit, interval_s: float, step: Callable[[], int], trainer: int = 0) -> None:
        self._status, self._emit, self._interval_s, self._step, self._trainer = status, emit, interval_s, step, trainer
        self._started = time.perf_counter()
        self._trained = self._is_warm = False
        self._lock = threading.Lock()  # one report after the other
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flowps-status", daemon=True)
        self._thread.start()

    def warm(self) -> None:
        """The first steps are over, in which code is compiled and memory taken; said once."""
        if not self._is_warm:
            self._is_warm = True
            self._report("warm")

    def trained(self) -> None:
        """Training is over; an evaluation may follow."""
        self._report("trained")

    def close(self) -> None:
        """End the thread and emit the last report. Idempotent. Raises what `emit` raised before."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._report("ended")

    def _run(self) -> None:
        try:
            while not self._ended.wait(self._interval_s):
                if not self._trained:
                    self._report("going")
        except BaseException as error:  # handed over whole to `close`
            self._error = error

    def _report(self, phase: Phase) -> None:
        with self._lock:
            if phase == "going" and self._trained:
                return
            self._trained = self._trained or phase == "trained"
            seconds = time.perf_counter() - self._started
            self._emit(
                TrainerStatus(self._trainer, seconds, self._step(), phase, self._status.summaries(), dict(self._status.counters()))
            )

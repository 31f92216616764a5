"""`Reporter`: emits a StatusReport every so often and at the end, with the bottleneck since the one before."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from flowps.status.bottleneck import find_bottleneck
from flowps.status.event import Emit, StatusReport
from flowps.status.run_status import RunStatus, StageSummary


class Reporter:
    """A thread of its own, so that a trainer that waits is still reported on. An error of `emit` ends it and is raised by `close`.

    Parameters
    ----------
    status, emit : what is reported, and to whom.
    interval_s : seconds between reports.
    step : called for the step that training is at.
    """

    def __init__(self, status: RunStatus, emit: Emit, interval_s: float, step: Callable[[], int]) -> None:
        self._status, self._emit, self._interval_s, self._step = status, emit, interval_s, step
        self._before: Mapping[str, StageSummary] = {}
        self._reported_at = self._started = time.perf_counter()
        self._verdict: tuple[str | None] | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flowps-status", daemon=True)
        self._thread.start()

    def judge(self) -> None:
        """Training is over: the last report judges the time until now, whatever comes before it."""
        self._verdict = (find_bottleneck({}, self._status.summaries(), time.perf_counter() - self._started),)

    def close(self) -> None:
        """End the thread and emit the last report, which judges the whole run. Idempotent. Raises what `emit` raised before."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._before, self._reported_at = {}, self._started
        self._report()

    def _run(self) -> None:
        try:
            while not self._ended.wait(self._interval_s):
                self._report()
        except BaseException as error:  # handed over whole to `close`
            self._error = error

    def _report(self) -> None:
        now = time.perf_counter()
        stages = self._status.summaries()
        if self._verdict is not None:
            (bottleneck,) = self._verdict
        else:
            bottleneck = find_bottleneck(self._before, stages, now - self._reported_at)
        self._emit(StatusReport(now - self._started, self._step(), stages, dict(self._status.counters()), bottleneck))
        self._before, self._reported_at = stages, now

"""`Retrainer`: what the scheduler's jobs do: run a retraining as a command, wait for it, plan a retry, and end it in good order.

A module of its own, for jobs are kept as the names of functions: `python -m workflows.schedule` would be another module than
`workflows.schedule`.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial

from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.date import DateTrigger

from flowps.status.progress import PlainConsole
from workflows.notify import tell
from workflows.pipeline import Read

_RETRY = "retry"  # name of the job
_STOP_S = 300.0  # for a retraining to save what it has
_POLL_S = 0.2
_IN_USE = 3  # exit status of a retraining that found another one at work
_BAD_PIPELINE = 2


class Retrainer:
    """Runs retrainings for a scheduler, one at a time. `run` is called by its one thread, `stop` by any."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # guards what a stop and a start both look at: the two below
        self._stopped = False
        self._signals = itertools.count()
        self._console = PlainConsole()
        self.scheduler: BackgroundScheduler | None = None

    def run(self, retry: int) -> None:
        """One retraining; after a failure the next is planned. retry: how many failures came before."""
        knobs = self._read.pipeline.schedule
        with self._lock:
            if self._stopped:
                return
            # A group of its own: Ctrl-C at the terminal is passed on by `stop` alone.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "workflows.retrain", str(self._read.path)], start_new_session=True, stdin=subprocess.DEVNULL
            )
        status = self._wait(self._process, knobs.max_runtime_s)
        if self._stopped or status == 0:
            return
        if status == _IN_USE:
            self.say("another retraining is at work: this start is left out")
            if retry:
                self._plan(retry, knobs.backoff_s)
        elif status == _BAD_PIPELINE or retry >= knobs.retries:
            self._failed(f"the retraining ended with status {status}, after {retry} retries; the next start is by the clock")
        else:
            delay_s = knobs.backoff_s * 2.0**retry
            self.say(f"the retraining ended with status {status}; retry {retry + 1} of {knobs.retries} in {delay_s:,.0f} s")
            self._plan(retry + 1, delay_s)

    def _plan(self, retry: int, delay_s: float) -> None:
        assert self.scheduler is not None
        at = DateTrigger(datetime.now(UTC) + timedelta(seconds=delay_s))
        self.scheduler.add_job(run_job, at, (str(self._read.path), retry), id=_RETRY, replace_existing=True)

    def _wait(self, process: subprocess.Popen[bytes], most_s: float) -> int:
        deadline = time.monotonic() + most_s
        while True:
            try:
                return process.wait(max(0.0, min(_POLL_S, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                if time.monotonic() >= deadline:
                    break
        self._end(process)
        self._failed(
            f"the retraining took longer than schedule.max_runtime_s, {most_s:,.0f} s; it is stopped and goes on next time"
        )
        return 0

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Ask a retraining to save what it has; the group is ended if it does not come to it."""
        with_group = partial(os.killpg, process.pid)
        try:
            with_group(signal.SIGINT)
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            with_group(signal.SIGKILL)
            process.wait()
        except ProcessLookupError:
            process.wait()

    def stop(self) -> None:
        """Let the retraining that is going on save what it has; the second call ends it."""
        with self._lock:
            self._stopped = True
            process = self._process
        if process is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT if next(self._signals) == 0 else signal.SIGKILL)

    def _failed(self, why: str) -> None:
        self.say(why)
        tell(self._read.pipeline.notify, self.say, "failed", {"why": why})

    def say(self, text: str) -> None:
        """A line for people."""
        self._console.print(f"{datetime.now(self._read.zone):%Y-%m-%d %H:%M:%S} {text}", soft_wrap=True)


retrainers: dict[str, Retrainer] = {}
"""Path of a pipeline → who runs it here."""


def run_job(path: str, retry: int = 0) -> None:
    """What a job of the scheduler does."""
    retrainers[path].run(retry)

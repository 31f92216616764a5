"""What happens after a step beside the training itself: interval metrics, progress, and the steady-state clock."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from flowps.batch import Float32
from flowps.status.event import Emit, Interval, Progress
from flowps.status.run_status import RunStatus
from flowps.trainer.metrics import LabelMetrics
from flowps.trainer.state import Arrays, named, only

_PROGRESS_S = 0.5
_WARM_STEPS = 20  # steps before the steady state: compiling, first pages of the tables


class StepReporter:
    """Emits Progress twice a second and Interval every `print_interval` steps. Called by the trainer's thread."""

    def __init__(self, emit: Emit, print_interval: int, labels: Sequence[str] = ("label",)) -> None:
        self._emit, self._print_interval, self._labels = emit, print_interval, labels
        self._epoch = 0
        self._interval, self._of_epoch = LabelMetrics(labels), LabelMetrics(labels)
        self._interval_start = self._progress_at = time.perf_counter()
        self._interval_steps = self._interval_examples = self._progress_examples = 0
        self._auc: float | None = None

    def begin_epoch(self, epoch: int) -> None:
        """Later steps belong to `epoch`, counted from 1."""
        self._epoch, self._of_epoch = epoch, LabelMetrics(self._labels)
        self._begin_interval()

    def after_step(self, step: int, examples: int, loss: float, labels: Float32, logits: Float32, queue_depth: int) -> None:
        """Count a step: `step` and `examples` since the start, this one included."""
        self._interval.update(labels, logits)
        self._interval_steps += 1
        self._interval_examples += len(labels)
        self._progress_examples += len(labels)
        now = time.perf_counter()
        if step % self._print_interval == 0:
            self.end_interval(step)
        if (since := now - self._progress_at) >= _PROGRESS_S:
            rate = self._progress_examples / since
            self._emit(Progress(self._epoch, step, examples, rate, loss, self._auc, queue_depth))
            self._progress_at, self._progress_examples = now, 0

    def end_interval(self, step: int) -> None:
        """Emit the metrics since the last interval, if there was a step."""
        if not self._interval_steps:
            return
        seconds = time.perf_counter() - self._interval_start
        metrics, more = self._interval.result()
        self._of_epoch.merge(self._interval)
        self._auc = metrics.auc
        rates = self._interval_steps / seconds, self._interval_examples / seconds
        self._emit(Interval(self._epoch, step, *rates, metrics, self._of_epoch.result()[0], more))
        self._begin_interval()

    def state(self) -> Arrays:
        """What the metrics have seen so far, of the interval and of the epoch's intervals before it."""
        steps = np.array([self._interval_steps, self._interval_examples])
        return {"steps": steps, **named("interval/", self._interval.arrays()), **named("epoch/", self._of_epoch.arrays())}

    def restore(self, arrays: Arrays) -> None:
        """Go on with what `state` gave, if anything. The interval's rates count from now."""
        if not arrays:
            return
        self._interval_steps, self._interval_examples = (int(n) for n in arrays["steps"])
        self._interval = LabelMetrics.of_arrays(self._labels, only(arrays, "interval/"))
        self._of_epoch = LabelMetrics.of_arrays(self._labels, only(arrays, "epoch/"))

    def _begin_interval(self) -> None:
        self._interval = LabelMetrics(self._labels)
        self._interval_start = time.perf_counter()
        self._interval_steps = self._interval_examples = 0


class SteadyClock:
    """Rates of the steady state: after the first steps, evaluation not counted. Called by the trainer's thread."""

    def __init__(self, status: RunStatus) -> None:
        self._status = status
        self._steps = self._examples = 0
        self._wall = self._cpu = self._wait_us = 0.0
        self._mark: tuple[float, float, float] | None = None

    def after_step(self, size: int) -> None:
        """Count a step of `size` samples."""
        self._steps += 1
        if self._mark is not None:
            self._examples += size
        elif self._steps >= _WARM_STEPS:
            self._mark = self._now()

    def pause(self) -> None:
        """Steps stop for a while; `resume` goes on."""
        if self._mark is not None:
            now = self._now()
            self._wall += now[0] - self._mark[0]
            self._cpu += now[1] - self._mark[1]
            self._wait_us += now[2] - self._mark[2]
            self._mark = None

    def resume(self) -> None:
        """Steps go on."""
        if self._steps >= _WARM_STEPS:
            self._mark = self._now()

    @property
    def is_warm(self) -> bool:
        """Whether the first steps are over."""
        return self._steps >= _WARM_STEPS

    @property
    def examples_per_s(self) -> float:
        """0 for a run that ended before its steady state."""
        return self._examples / self._wall if self._examples else 0.0

    @property
    def cpu_s_per_million(self) -> float:
        """CPU seconds of the whole process per million examples; 0 as above."""
        return self._cpu / self._examples * 1e6 if self._examples else 0.0

    @property
    def trainer_wait_share(self) -> float:
        """Share of the time the trainer waited for a feed; 0 as above."""
        return self._wait_us / 1e6 / self._wall if self._examples else 0.0

    def _now(self) -> tuple[float, float, float]:
        wait = self._status.summaries().get("TrainerWait")
        return time.perf_counter(), time.process_time(), wait.total_us if wait else 0.0

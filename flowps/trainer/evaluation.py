"""`Evaluations`: those of a trainer, or of its group: on the validation data between steps and epochs, on the test data at the end.

They create no rows and change nothing. Called by the trainer's thread, with nothing in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import numpy as np

from flowps.config import Config
from flowps.status.event import Evaluated, Metrics
from flowps.trainer.best import BestSoFar
from flowps.trainer.cut import CutClock
from flowps.trainer.feed import FeedQueue
from flowps.trainer.group_step import METRICS_KEY
from flowps.trainer.metrics import LabelMetrics
from flowps.trainer.score import scored
from flowps.trainer.step import Step
from flowps.trainer.surroundings import BatchStream, Surroundings
from flowps.trainer.tensorboard import Board


class Evaluations:
    """By `step`, on the batches of `around`.

    feeds   of a stream of batches that are only scored
    board   hears of every evaluation
    """

    def __init__(
        self, around: Surroundings, config: Config, step: Step, labels: tuple[str, ...], board: Board,
        feeds: Callable[[BatchStream], FeedQueue],
    ) -> None:  # fmt: skip
        knobs = config.trainer
        self._around, self._step, self._labels, self._board, self._feeds = around, step, labels, board, feeds
        self._patience = knobs.patience
        self.clock = CutClock(knobs.evaluate_steps if around.valid is not None else 0, 0, knobs.in_flight)
        """When the next one on the validation data is."""
        self.best = BestSoFar(knobs.monitor, knobs.patience)
        """Of those on the validation data."""

    def resume(self, best: dict[str, float], steps: int, ticket: int) -> None:
        """Go on where a run was saved, with the state of its `best`, after `steps`, before `ticket`."""
        self.best.restore(best)
        self.clock.recall(steps, ticket, self.best.seen)

    def goes_back_to(self, steps: int) -> int:
        """The step of the best evaluation, if the run that has come to `steps` is to end with what it was then; else 0."""
        return self.best.step if self._patience and self.best.step != steps else 0

    def validate(self, epochs: int, steps: int) -> bool:
        """Evaluate on the validation data, if there are any that were not at this step; whether that is the best so far."""
        self.clock.done()
        if self._around.valid is None or self.best.seen == steps:
            return False
        self._evaluate("valid", epochs, steps)
        return self.best.step == steps

    def test(self, epochs: int, steps: int) -> Metrics | None:
        """Evaluate on the test data. None if there are none, or at a stop."""
        return self._evaluate("test", epochs, steps)

    def _evaluate(self, data: Literal["test", "valid"], epochs: int, steps: int) -> Metrics | None:
        source = {"test": self._around.test, "valid": self._around.valid}[data]
        if source is None:
            return None
        start, group, stop = time.perf_counter(), self._around.group, self._around.stop
        metrics, stream = LabelMetrics(self._labels), source()
        for batch, logits in scored(self._feeds(stream), stream, self._step, self._around.status):
            metrics.update(batch.labels, logits)
        if group is not None:
            # Of all trainers; also of one that was stopped, so that none waits for it in vain.
            *summed, stopped = group.add(np.append(metrics.state(), float(stop.is_set())), METRICS_KEY)
            metrics = LabelMetrics.of_state(self._labels, np.array(summed))
            if stopped:
                stop.set()
        if stop.is_set():
            return None
        result, more = metrics.result()
        is_best = data == "valid" and self.best.see(steps, result)
        evaluated = Evaluated(epochs, steps, time.perf_counter() - start, result, more, data, is_best)
        self._board.evaluated(evaluated, metrics.of_each[0])
        self._around.emit(evaluated)
        return result

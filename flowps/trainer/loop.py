"""The run of one trainer: epochs of feeds, steps and pushes, then the evaluation.

Reads like the travel of a sample from feed to push. Does not know where batches come from or where rows live: it is given streams
and callables. Called once per run, on a thread of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import tensorflow as tf

from flowps.batch import Batch, Float32
from flowps.config import Config
from flowps.errors import ConfigError, StoppedError
from flowps.status.event import Emit, Evaluated, Finished, Metrics
from flowps.status.reporter import Reporter
from flowps.status.run_status import RunStatus
from flowps.trainer.feed import FeedQueue
from flowps.trainer.hook import SteadyClock, StepReporter
from flowps.trainer.metrics import StreamingMetrics
from flowps.trainer.models import ModelSpec, build
from flowps.trainer.push import PushQueue
from flowps.trainer.schedule import Schedule
from flowps.trainer.step import Step


class BatchStream(Iterator[Batch], Protocol):
    """Batches in order."""

    def close(self) -> None:
        """May come from any thread; ends a `next` that waits."""


@dataclass(frozen=True)
class Surroundings:
    """What a trainer is given.

    train    epoch (from 0) → its batches
    test     the batches to evaluate on, or None
    lookup   (batch id, batch, training) → embeddings float32 [size, width]; thread-safe
    push     (batch id, gradient float32 [size, width], what learning rates are multiplied by); thread-safe
    stop     set by anyone to end the run after the current step
    """

    train: Callable[[int], BatchStream]
    test: Callable[[], BatchStream] | None
    lookup: Callable[[int, Batch, bool], Float32]
    push: Callable[[int, Float32, float], None]
    emit: Emit
    status: RunStatus
    stop: threading.Event


@dataclass(frozen=True)
class Trained:
    """What a trainer leaves: the dense model, the account of the run, and the test metrics if it was evaluated."""

    model: keras.Model
    finished: Finished
    test: Metrics | None


def default_feed_threads(in_flight: int) -> int:
    """One per two of the cores that this process may use, as far as there are permits.

    On two cores a second one brought nothing (`python -m bench.feed`); for more cores the rule is an extrapolation.
    """
    return max(1, min(in_flight, len(os.sched_getaffinity(0)) // 2))


def prepare_tensorflow(config: Config) -> None:
    """Seeds, threads and determinism, before the first operation. Threads stay as they are if TensorFlow has started already."""
    keras.utils.set_random_seed(config.seed % (1 << 32))
    if config.trainer.tensorflow_threads:
        # One process, one pool: a second run in the same process keeps the first one's threads.
        with suppress(RuntimeError):
            tf.config.threading.set_intra_op_parallelism_threads(config.trainer.tensorflow_threads)
    if config.trainer.in_flight == 1 and not config.trainer.jit_compile:
        tf.config.experimental.enable_op_determinism()


class Trainer:
    """One run over `around`, for the model of `spec` and the knobs of `config`."""

    def __init__(self, spec: ModelSpec, config: Config, around: Surroundings) -> None:
        knobs = config.trainer
        if knobs.optimizer.lower() == "ftrl" and knobs.decay != "none" and not knobs.decay_to:
            raise ConfigError(
                "trainer.optimizer ftrl divides by the learning rate, which trainer.decay takes to 0; set trainer.decay_to"
            )
        prepare_tensorflow(config)
        self._spec, self._config, self._around = spec, config, around
        self._step = Step(
            build(config.model, spec), spec, config.trainer.optimizer, config.trainer.learning_rate, config.trainer.jit_compile
        )
        self.feed_threads = config.trainer.feed_threads or default_feed_threads(config.trainer.in_flight)
        self._schedule = Schedule.of(config.trainer)
        self._steps = self._examples = 0
        self._epochs = 0
        self._first_step_at = 0.0
        self._hook = StepReporter(around.emit, config.status.print_interval)
        self._clock = SteadyClock(around.status)

    @property
    def model(self) -> keras.Model:
        """The dense model as trained so far."""
        return self._step.model

    @property
    def is_worth_saving(self) -> bool:
        """Whether something was trained, and its dense weights are sound."""
        return self._steps > 0 and not self._step.spoiled

    @property
    def devices(self) -> list[str]:
        """What TensorFlow computes on: its GPUs, or the CPU."""
        return [device.name.removeprefix("/physical_device:") for device in tf.config.list_physical_devices("GPU")] or ["CPU"]

    def run(self) -> Trained:
        """Train every epoch and evaluate; on `stop`, end early and leave out the evaluation. Raises what any thread raised."""
        start = time.perf_counter()
        reporter = Reporter(self._around.status, self._around.emit, self._config.status.interval_s, lambda: self._steps)
        test = None
        try:
            for epoch in range(self._config.epochs):
                self._train_epoch(epoch)
                if self._around.stop.is_set():
                    break
                self._epochs += 1
            reporter.judge()
            if not self._around.stop.is_set():
                test = self._evaluate()
        except BaseException:
            with suppress(Exception):  # the error that ends the run is the one to show
                reporter.close()
            raise
        reporter.close()
        clock = self._clock
        finished = Finished(
            self._epochs, self._steps, self._examples, time.perf_counter() - start, self._first_step_at,
            clock.examples_per_s, clock.cpu_s_per_million, clock.trainer_wait_share, self._around.stop.is_set(),
        )  # fmt: skip
        self._around.emit(finished)
        return Trained(self.model, finished, test)

    def _train_epoch(self, epoch: int) -> None:
        self._hook.begin_epoch(epoch + 1)
        stream = self._around.train(epoch)
        # Closed in reverse order: the stream first, so that no feed thread still waits for it.
        with (
            closing(self._feeds(stream, training=True)) as feeds,
            closing(PushQueue(self._around.push, feeds.fail, self._around.status)) as pushes,
            closing(stream),
        ):
            self._clock.resume()
            while self._train_step(feeds, pushes):
                pass
            pushes.drain()
            feeds.check()
            self._clock.pause()
        self._hook.end_interval(self._steps)

    def _train_step(self, feeds: FeedQueue, pushes: PushQueue) -> bool:
        """Whether there may be another step."""
        try:
            feed = feeds.get()
        except StoppedError:
            return False
        if feed is None:
            return False
        with self._around.status.timed("TrainStep"):
            rate_scale = self._schedule.at(self._steps)
            loss, logits, gradient = self._step.train(feed.batch, feed.embeddings, rate_scale)
        pushes.put(feed.ticket, gradient, rate_scale, feeds.release)
        self._steps += 1
        self._examples += feed.batch.size
        self._first_step_at = self._first_step_at or time.time()
        self._hook.after_step(self._steps, self._examples, loss, feed.batch.labels, logits, feeds.depth)
        self._clock.after_step(feed.batch.size)
        return not self._around.stop.is_set()

    def _evaluate(self) -> Metrics | None:
        """Score the test batches; creates no rows and changes nothing."""
        if self._around.test is None:
            return None
        start = time.perf_counter()
        metrics = StreamingMetrics()
        stream = self._around.test()
        with closing(self._feeds(stream, training=False)) as feeds, closing(stream):
            while True:
                try:
                    feed = feeds.get()
                except StoppedError:
                    feeds.check()
                    return None
                if feed is None:
                    break
                with self._around.status.timed("PredictStep"):
                    logits = self._step.predict(feed.batch, feed.embeddings)
                metrics.update(feed.batch.labels, logits)
                feeds.release()
            feeds.check()
        result = metrics.result()
        self._around.emit(Evaluated(self._epochs, self._steps, time.perf_counter() - start, result))
        return result

    def _feeds(self, stream: BatchStream, training: bool) -> FeedQueue:
        def lookup(ticket: int, batch: Batch) -> Any:
            return self._around.lookup(ticket, batch, training)

        return FeedQueue(
            stream, lookup, width=self._spec.width, dense_width=self._spec.dense_width,
            permits=self._config.trainer.in_flight, threads=self.feed_threads, first_ticket=self._steps,
            stop=self._around.stop, status=self._around.status, starving=training,
        )  # fmt: skip

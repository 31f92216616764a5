"""The run of one trainer: epochs of feeds, steps and pushes, then the evaluation.

Reads like the travel of a sample from feed to push. Does not know where batches come from or where rows live: it is given streams
and callables. Called once per run, on a thread of its own.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from flowps.batch import Batch, Float32
from flowps.config import Config
from flowps.errors import ConfigError, StoppedError
from flowps.status.event import Finished, Metrics, Remark
from flowps.status.reporter import Reporter
from flowps.trainer.cut import CutClock
from flowps.trainer.evaluation import Evaluations
from flowps.trainer.feed import Feed, FeedQueue
from flowps.trainer.group_step import GroupStep
from flowps.trainer.hook import SteadyClock, StepReporter
from flowps.trainer.models import ModelSpec, build
from flowps.trainer.push import PushQueue
from flowps.trainer.schedule import Schedule
from flowps.trainer.state import Cut, State, named, only
from flowps.trainer.step import Step
from flowps.trainer.surroundings import BatchStream, Ending, Surroundings
from flowps.trainer.tensorboard import Board

_STEP, _METRICS = "step/", "metrics/"  # beginnings of the names of a state's arrays


@dataclass(frozen=True)
class _Stepped:
    """What came of a step. `labels` and `logits` of all trainers; `gradient` of this one's embeddings; `asks_cut`: anyone."""

    loss: float
    labels: Float32
    logits: Float32
    gradient: Any
    rate_scale: float
    asks_cut: bool


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
        self._spec, self._config, self._around = spec, config, around
        self._step = self._make_step()
        self.feed_threads = config.trainer.feed_threads or default_feed_threads(config.trainer.in_flight)
        self._schedule = Schedule.of(config.trainer)
        self._steps = self._examples = 0  # of all trainers
        self._epochs = self._left_out = 0
        self._ends = 0  # epochs' ends that all trainers have met at, each a lookup of its own
        self._all_stop = False  # whether all trainers have agreed, in a step, to stop after it
        self._first_step_at = 0.0
        self._board = Board(config.tensorboard, self._schedule.at)
        self._hook = StepReporter(self._board.told(around.emit), config.status.print_interval, spec.labels)
        self._clock = SteadyClock(around.status)
        self._epoch = self._epoch_samples = 0  # the one being trained, and how many of its samples are trained or left out here
        self._read = 0  # samples that have come, of epochs before this one
        self._negatives = 0  # of all samples trained or left out here, those left out on purpose
        self._training: FeedQueue | None = None  # feeds of this one
        self._in_epoch = False
        self._until: int | None = None  # the ticket before which a trainer that is alone stops
        self._reporter: Reporter | None = None
        self._cuts = CutClock(config.checkpoint.every_steps, config.checkpoint.every_s, knobs.in_flight)
        self._evaluations = Evaluations(
            around, config, self._step, spec.labels, self._board, lambda stream: self._feeds(stream, training=False)
        )
        if around.resume is not None:
            self._restore(around.resume)
        elif around.warm_start is not None:
            around.emit(Remark(f"warm start: {self._step.adopt(only(around.warm_start, _STEP))}"))

    def _make_step(self) -> Step:
        """The step, in a TensorFlow that is set up for this run."""
        knobs, group = self._config.trainer, self._around.group
        if group is not None:
            group.begin()
        prepare_tensorflow(self._config)
        if group is not None:
            group.join()
        model = build(self._config.model, self._spec, knobs.precision, self._config.seed, self._around.build)
        scaling = knobs.precision == "mixed_float16"
        clips = {"clipnorm": knobs.clip_norm, "global_clipnorm": knobs.clip_global_norm, "clipvalue": knobs.clip_value}
        how = (
            model, self._spec, knobs.optimizer, knobs.learning_rate, knobs.jit_compile, scaling,
            {name: bound for name, bound in clips.items() if bound}, self._config.data.negative_rate,
        )  # fmt: skip
        return Step(*how) if group is None else GroupStep(*how, group=group, batch_size=self._config.data.batch_size)

    @property
    def _ticket(self) -> int:
        """Of the next batch; with several trainers the same for all that step together."""
        return self._steps + self._ends

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
        number = 0 if self._around.group is None else self._around.group.number
        with self._board.opened(number, self._steps):
            return self._run(number)

    def _run(self, number: int) -> Trained:
        start = time.perf_counter()
        around, interval_s = self._around, self._config.status.interval_s
        reporter = self._reporter = Reporter(around.status, around.emit, interval_s, lambda: self._steps, number)
        test = None
        try:
            if isinstance(self._step, GroupStep):
                self._step.share_weights()
            if around.trains:
                self._train()
            reporter.trained()
            goes_back_to = self._evaluations.goes_back_to(self._steps)
            if not self._is_stopped and not goes_back_to:
                test = self._evaluations.test(self._epochs, self._steps)
        except BaseException:
            with suppress(Exception):  # the error that ends the run is the one to show
                reporter.close()
            raise
        reporter.close()
        clock = self._clock
        finished = Finished(
            self._epochs, self._steps, self._examples, time.perf_counter() - start, self._first_step_at,
            clock.examples_per_s, clock.cpu_s_per_million, clock.trainer_wait_share, self._around.stop.is_set(),
            0 if self._is_stopped else goes_back_to,
        )  # fmt: skip
        self._around.emit(finished)
        return Trained(self.model, finished, test)

    @property
    def _is_stopped(self) -> bool:
        """Whether the run ends here. Several trainers go by what all of them know: a request comes to each at its own time."""
        return self._all_stop if isinstance(self._step, GroupStep) else self._around.stop.is_set()

    def _train(self) -> None:
        """Every epoch that is left, until a stop or until no evaluation has become better for too long."""
        for epoch in range(self._epoch, self._config.epochs):
            if self._is_stopped or self._is_over or not self._train_epoch(epoch):
                break
            self._epochs += 1
            self._epoch, self._epoch_samples, self._in_epoch = epoch + 1, 0, False
        if not self._is_stopped:
            self._cut(last=True)

    def _train_epoch(self, epoch: int) -> bool:
        """Whether it was trained to its end."""
        self._hook.begin_epoch(epoch + 1)
        self._in_epoch = True
        if self._around.resume is not None and epoch == self._around.resume.epoch:
            self._hook.restore(only(self._around.resume.arrays, _METRICS))
        is_whole, stream = True, Ending(self._around.train(epoch), self._around.stop)
        # Closed in reverse order: the stream first, so that no feed thread still waits for it.
        with (
            closing(self._feeds(stream, training=True)) as feeds,
            closing(PushQueue(self._around.push, feeds.fail, self._around.status)) as pushes,
            closing(stream),
        ):
            self._training = feeds
            self._clock.resume()
            try:
                while self._train_step(feeds, pushes, stream):
                    if self._ticket in (self._cuts.at, self._evaluations.clock.at):
                        pushes.drain()
                        feeds.check()
                        self._stand_still()
                        if self._is_over:
                            is_whole = False
                            break
                        feeds.hold_from(self._held_from)
                else:
                    self._epoch_samples += feeds.trailing
                    self._negatives += feeds.trailing
            except BaseException:
                with suppress(Exception):  # the error that ends the run is the one to show
                    self._around.give_up(self._ticket)
                raise
            if self._is_stopped:
                self._around.give_up(self._ticket)
            pushes.drain()
            try:
                feeds.check()
            except StoppedError:  # of a lookup for a step that will not come, given up by the first trainer that has got here
                if not self._all_stop:
                    raise
            self._clock.pause()
        self._read, self._training = self._read + feeds.samples, None
        if self._all_stop:
            for ticket in feeds.untaken:
                self._around.forget(ticket)
        if isinstance(self._step, GroupStep):
            self._step.share_state()
        is_best = is_whole and not self._is_stopped and self._validate()
        if self._is_stopped or is_best or self._cuts.at is not None:
            self._cut(last=self._is_stopped, is_best=is_best)
        self._hook.end_interval(self._steps)
        return is_whole and not self._is_stopped

    def _stand_still(self) -> None:
        """With nothing in flight after a step: evaluate, or let the run be saved, or both, as it was decided."""
        is_best = False
        if self._ticket == self._evaluations.clock.at:
            self._clock.pause()
            if isinstance(self._step, GroupStep):
                self._step.share_state()
            is_best = self._validate()
            self._clock.resume()
        if is_best or self._ticket == self._cuts.at:
            self._cut(is_best=is_best)

    def _validate(self) -> bool:
        return self._evaluations.validate(self._epochs, self._steps)

    @property
    def _is_over(self) -> bool:
        """Whether no evaluation has become better for too long."""
        return self._evaluations.best.is_over

    @property
    def _held_from(self) -> float:
        """The ticket before which the trainer is to stand still."""
        return min((at for at in (self._cuts.at, self._evaluations.clock.at) if at is not None), default=math.inf)

    def _train_step(self, feeds: FeedQueue, pushes: PushQueue, stream: BatchStream) -> bool:
        """Whether there may be another step."""
        feed = self._next_feed(feeds, stream)
        if isinstance(self._step, GroupStep):
            stepped = self._step_together(self._step, feed)
        else:
            stepped = None if feed is None else self._step_alone(feed)
        if stepped is None:
            return False
        self._steps += 1
        self._examples += len(stepped.labels)
        decided = self._cuts.decide(self._steps, self._ticket, stepped.asks_cut)
        if self._evaluations.clock.decide(self._steps, self._ticket, asked=False) is not None or decided is not None:
            feeds.hold_from(self._held_from)
        if feed is not None:
            pushes.put(feed.ticket, stepped.gradient, stepped.rate_scale, feeds.release)
            self._epoch_samples += feed.read
            self._negatives += feed.batch.left_out
        self._first_step_at = self._first_step_at or time.time()
        self._hook.after_step(self._steps, self._examples, stepped.loss, stepped.labels, stepped.logits, feeds.depth)
        self._clock.after_step(len(stepped.labels))
        if self._reporter is not None and self._clock.is_warm:
            self._reporter.warm()
        if self._step.left_out > self._left_out:
            self._left_out = self._step.left_out
            self._around.status.count("steps_left_out_by_loss_scaling")
        return not self._all_stop

    def _next_feed(self, feeds: FeedQueue, stream: BatchStream) -> Feed | None:
        """None at the end of the data, or at a stop."""
        alone = not isinstance(self._step, GroupStep)
        if not (alone and self._around.stop.is_set()):
            try:
                return feeds.get()
            except StoppedError:
                if not self._around.stop.is_set():
                    raise
        if alone:
            # What is in flight is trained: nothing that was looked up is left without its push.
            self._until = feeds.hold() if self._until is None else self._until
            return feeds.get(stoppable=False) if self._ticket < self._until else None
        # The others count on this one for a step more, with the batch if it was looked up: their lookups may have waited for it.
        stream.close()
        return feeds.get(stoppable=False)

    # --- cuts ---------------------------------------------------------------------------------------------------------

    def _cut(self, last: bool = False, is_best: bool = False) -> None:
        """Let the run be saved as it is now, with nothing in flight."""
        if isinstance(self._step, GroupStep) and not last:
            self._step.share_state()
        with self._around.status.timed("CheckpointPause"):
            group = self._around.group
            state = self._state() if group is None or group.number == 0 else None
            read = self._read + (self._training.samples if self._training is not None else 0)
            self._around.cut(
                Cut(self._steps, self._epoch, self._examples, self._epoch_samples, read, last, state, self._negatives, is_best)
            )
        self._cuts.done()

    def _state(self) -> State:
        arrays = named(_STEP, self._step.state())
        if self._in_epoch:
            arrays |= named(_METRICS, self._hook.state())
        return State(self._steps, self._examples, self._epoch, self._ends, arrays, self._evaluations.best.state())

    def _restore(self, state: State) -> None:
        self._steps, self._examples, self._epoch, self._ends = state.steps, state.examples, state.epoch, state.ends
        self._epochs = state.epoch
        self._evaluations.best.restore(state.best)
        self._step.restore(only(state.arrays, _STEP))

    # --- steps --------------------------------------------------------------------------------------------------------

    def _step_alone(self, feed: Feed) -> _Stepped:
        with self._around.status.timed("TrainStep", feed.ticket):
            rate_scale = self._schedule.at(self._steps)
            loss, logits, gradient = self._step.train(feed.batch, feed.embeddings, rate_scale, feed.inputs)
        return _Stepped(loss, feed.batch.labels, logits, gradient, rate_scale, self._cuts.is_time)

    def _step_together(self, step: GroupStep, feed: Feed | None) -> _Stepped | None:
        """A step of all trainers, with or without a batch of this one; None when nobody has one."""
        if feed is None:
            self._around.attend(self._ticket)
        with self._around.status.timed("TrainStep", self._ticket):
            rate_scale = self._schedule.at(self._steps)
            batch, inputs = (None, None) if feed is None else (feed.batch, feed.inputs)
            joint = step.train_together(batch, inputs, rate_scale, self._around.stop.is_set(), self._cuts.is_time)
        if joint.stop:
            self._all_stop = True
            self._around.stop.set()
        if not len(joint.labels):
            self._ends += 1
            return None
        return _Stepped(joint.loss, joint.labels, joint.logits, joint.gradient, rate_scale, joint.cut)

    def _feeds(self, stream: BatchStream, training: bool) -> FeedQueue:
        def lookup(ticket: int, batch: Batch) -> Any:
            return self._around.lookup(ticket, batch, training)

        return FeedQueue(
            stream, lookup, width=self._spec.width, dense_width=self._spec.dense_width,
            permits=self._config.trainer.in_flight, threads=self.feed_threads, first_ticket=self._ticket,
            stop=self._around.stop, status=self._around.status, stage=self._step.stage, starving=training,
        )  # fmt: skip

"""The run of one trainer: epochs of feeds, steps and pushes, then the evaluation.

Reads like the travel of a sample from feed to push. Does not know where batches come from or where rows live: it is given streams
and callables. Called once per run, on a thread of its own.
"""

from __future__ import annotations

import math
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import keras

from flowps.batch import Batch
from flowps.config import Config
from flowps.errors import StoppedError
from flowps.status.event import Finished, Metrics, Remark
from flowps.status.reporter import Reporter
from flowps.trainer.cut import CutClock
from flowps.trainer.evaluation import Evaluations
from flowps.trainer.feed import FeedQueue, default_feed_threads
from flowps.trainer.hook import SteadyClock, StepReporter
from flowps.trainer.models import ModelSpec
from flowps.trainer.push import PushQueue
from flowps.trainer.schedule import Schedule
from flowps.trainer.state import Cut, State, named, only
from flowps.trainer.stepping import stepping_of
from flowps.trainer.surroundings import BatchStream, Ending, Surroundings
from flowps.trainer.tensorboard import Board

_STEP, _METRICS = "step/", "metrics/"  # beginnings of the names of a state's arrays


@dataclass(frozen=True)
class Trained:
    """What a trainer leaves: the dense model, the account of the run, and the test metrics if it was evaluated."""

    model: keras.Model
    finished: Finished
    test: Metrics | None


class Trainer:
    """One run over `around`, for the model of `spec` and the knobs of `config`."""

    def __init__(self, spec: ModelSpec, config: Config, around: Surroundings) -> None:
        self._spec, self._config, self._around = spec, config, around
        schedule = Schedule.of(config.trainer)
        self._stepping = stepping_of(spec, config, schedule, around)
        self._step = self._stepping.step
        self.feed_threads = config.trainer.feed_threads or default_feed_threads(config.trainer.in_flight)
        self._steps = self._examples = 0  # of all trainers
        self._epochs = self._left_out = 0
        self._first_step_at = 0.0
        self._board = Board(config.tensorboard, schedule.at)
        self._hook = StepReporter(self._board.told(around.emit), config.status.print_interval, spec.labels)
        self._clock = SteadyClock(around.status)
        self._epoch = self._epoch_samples = 0  # the one being trained, and how many of its samples are trained or left out here
        self._read = 0  # samples that have come, of epochs before this one
        self._negatives = 0  # of all samples trained or left out here, those left out on purpose
        self._training: FeedQueue | None = None  # feeds of this one
        self._in_epoch = False
        self._reporter: Reporter | None = None
        self._cuts = CutClock(config.checkpoint.every_steps, config.checkpoint.every_s, config.trainer.in_flight)
        self._evaluations = Evaluations(
            around, config, self._step, spec.labels, self._board, lambda stream: self._feeds(stream, training=False)
        )
        if around.resume is not None:
            self._restore(around.resume)
        elif around.warm_start is not None:
            around.emit(Remark(f"warm start: {self._step.adopt(only(around.warm_start, _STEP))}"))

    @property
    def _ticket(self) -> int:
        """Of the next batch; with several trainers the same for all that step together."""
        return self._steps + self._stepping.ends

    @property
    def model(self) -> keras.Model:
        """The dense model as trained so far."""
        return self._step.model

    @property
    def is_worth_saving(self) -> bool:
        """Whether something was trained, and its dense weights are sound."""
        return self._steps > 0 and not self._step.spoiled

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
            self._stepping.share_weights()
            if around.trains:
                self._train()
            reporter.trained()
            goes_back_to = self._evaluations.goes_back_to(self._steps)
            if not self._stepping.is_stopped and not goes_back_to:
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
            0 if self._stepping.is_stopped else goes_back_to,
        )  # fmt: skip
        self._around.emit(finished)
        return Trained(self.model, finished, test)

    def _train(self) -> None:
        """Every epoch that is left, until a stop or until no evaluation has become better for too long."""
        for epoch in range(self._epoch, self._config.epochs):
            if self._stepping.is_stopped or self._is_over or not self._train_epoch(epoch):
                break
            self._epochs += 1
            self._epoch, self._epoch_samples, self._in_epoch = epoch + 1, 0, False
        if not self._stepping.is_stopped:
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
            if self._stepping.is_stopped:
                self._around.give_up(self._ticket)
            pushes.drain()
            try:
                feeds.check()
            except StoppedError:  # of a lookup for a step that will not come, given up by the first trainer that has got here
                if not self._stepping.all_stop:
                    raise
            self._clock.pause()
        self._read, self._training = self._read + feeds.samples, None
        if self._stepping.all_stop:
            for ticket in feeds.untaken:
                self._around.forget(ticket)
        self._stepping.share_state()
        is_best = is_whole and not self._stepping.is_stopped and self._validate()
        if self._stepping.is_stopped or is_best or self._cuts.at is not None:
            self._cut(last=self._stepping.is_stopped, is_best=is_best)
        self._hook.end_interval(self._steps)
        return is_whole and not self._stepping.is_stopped

    def _stand_still(self) -> None:
        """With nothing in flight after a step: evaluate, or let the run be saved, or both, as it was decided."""
        is_best = False
        if self._ticket == self._evaluations.clock.at:
            self._clock.pause()
            self._stepping.share_state()
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
        feed = self._stepping.next_feed(feeds, stream, self._ticket)
        stepped = self._stepping.take(feed, self._steps, self._cuts.is_time)
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
        return not self._stepping.all_stop

    # --- cuts ---------------------------------------------------------------------------------------------------------

    def _cut(self, last: bool = False, is_best: bool = False) -> None:
        """Let the run be saved as it is now, with nothing in flight."""
        if not last:
            self._stepping.share_state()
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
        return State(self._steps, self._examples, self._epoch, self._stepping.ends, arrays, self._evaluations.best.state())

    def _restore(self, state: State) -> None:
        self._steps, self._examples, self._epoch, self._stepping.ends = state.steps, state.examples, state.epoch, state.ends
        self._epochs = state.epoch
        self._evaluations.resume(state.best, state.steps, self._ticket)
        self._step.restore(only(state.arrays, _STEP))

    def _feeds(self, stream: BatchStream, training: bool) -> FeedQueue:
        def lookup(ticket: int, batch: Batch) -> Any:
            return self._around.lookup(ticket, batch, training)

        return FeedQueue(
            stream, lookup, width=self._spec.width, dense_width=self._spec.dense_width,
            permits=self._config.trainer.in_flight, threads=self.feed_threads, first_ticket=self._ticket,
            stop=self._around.stop, status=self._around.status, stage=self._step.stage, starving=training,
            held_from=self._held_from if training else math.inf,
            max_staleness=self._config.trainer.max_staleness if training else math.inf,
            find=self._around.find if training else None,
        )  # fmt: skip

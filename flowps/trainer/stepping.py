"""How a trainer comes by its steps: `Alone`, or `Together` with the others of its group, where all take every step at once.

Covers taking a feed, the step with it, and what a stop does to both. Does not push, count or save (`loop`). Called by the trainer's
thread only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from flowps.batch import Float32
from flowps.config import Config
from flowps.errors import StoppedError
from flowps.trainer.feed import Feed, FeedQueue
from flowps.trainer.group_step import GroupStep
from flowps.trainer.models import ModelSpec, build
from flowps.trainer.schedule import Schedule
from flowps.trainer.setup import prepare_tensorflow
from flowps.trainer.step import Step
from flowps.trainer.surroundings import BatchStream, Surroundings


@dataclass(frozen=True)
class Stepped:
    """What came of a step.

    labels, logits  of all trainers
    gradient        of this one's embeddings, a tensor; None if it had no batch
    asks_cut        whether anyone asks for a cut
    """

    loss: float
    labels: Float32
    logits: Float32
    gradient: Any
    rate_scale: float
    asks_cut: bool


class Stepping(ABC):
    """The steps of one trainer, with the rates of `schedule`."""

    step: Step
    ends = 0
    """Epochs' ends that all trainers have met at, each with a ticket, as a step has; of one that is alone: none."""
    all_stop = False
    """Whether all trainers have agreed, in a step, to stop after it."""

    def __init__(self, schedule: Schedule, around: Surroundings) -> None:
        self._schedule, self._around, self._stop = schedule, around, around.stop

    @property
    @abstractmethod
    def is_stopped(self) -> bool:
        """Whether the run ends here."""

    @abstractmethod
    def share_weights(self) -> None:
        """Begin with the same weights everywhere."""

    @abstractmethod
    def share_state(self) -> None:
        """Agree on what layers have learned beside weights."""

    @abstractmethod
    def next_feed(self, feeds: FeedQueue, stream: BatchStream, ticket: int) -> Feed | None:
        """The feed of the step `ticket`, waiting for it; None at the end of the data, or at a stop.

        stream   what `feeds` reads
        """

    @abstractmethod
    def take(self, feed: Feed | None, steps: int, asks_cut: bool) -> Stepped | None:
        """The step after `steps` steps; None where there is nothing to step with any more.

        asks_cut   whether this trainer does
        """


class Alone(Stepping):
    """Of the only trainer there is."""

    def __init__(self, step: Step, schedule: Schedule, around: Surroundings) -> None:
        super().__init__(schedule, around)
        self.step = step
        self._until: int | None = None  # the ticket before which it stops

    @property
    def is_stopped(self) -> bool:
        """See Stepping."""
        return self._stop.is_set()

    def share_weights(self) -> None:
        """There is nobody to share them with."""

    def share_state(self) -> None:
        """There is nobody to share it with."""

    def next_feed(self, feeds: FeedQueue, stream: BatchStream, ticket: int) -> Feed | None:
        """See Stepping. At a stop, what is in flight is trained: nothing that was looked up is left without its push."""
        if not self._stop.is_set():
            try:
                return feeds.get()
            except StoppedError:
                if not self._stop.is_set():
                    raise
        self._until = feeds.hold() if self._until is None else self._until
        return feeds.get(stoppable=False) if ticket < self._until else None

    def take(self, feed: Feed | None, steps: int, asks_cut: bool) -> Stepped | None:
        """See Stepping."""
        if feed is None:
            return None
        with self._around.status.timed("TrainStep", feed.ticket):
            rate_scale = self._schedule.at(steps)
            loss, logits, gradient = self.step.train(feed.batch, feed.embeddings, rate_scale, feed.inputs)
        return Stepped(loss, feed.batch.labels, logits, gradient, rate_scale, asks_cut)


class Together(Stepping):
    """Of one of several trainers. They go by what all of them know: a request to stop comes to each at its own time."""

    step: GroupStep

    def __init__(self, step: GroupStep, schedule: Schedule, around: Surroundings) -> None:
        super().__init__(schedule, around)
        self.step = step

    @property
    def is_stopped(self) -> bool:
        """See Stepping."""
        return self.all_stop

    def share_weights(self) -> None:
        """See GroupStep."""
        self.step.share_weights()

    def share_state(self) -> None:
        """See GroupStep."""
        self.step.share_state()

    def next_feed(self, feeds: FeedQueue, stream: BatchStream, ticket: int) -> Feed | None:
        """See Stepping. At a stop the others count on this one for a step more.

        With the batch if it was looked up: their lookups may have waited for it.
        """
        try:
            return feeds.get()
        except StoppedError:
            if not self._stop.is_set():
                raise
        stream.close()
        return feeds.get(stoppable=False)

    def take(self, feed: Feed | None, steps: int, asks_cut: bool) -> Stepped | None:
        """See Stepping. With or without a batch of this one; None when nobody has one."""
        ticket = steps + self.ends
        if feed is None:
            self._around.attend(ticket)
        with self._around.status.timed("TrainStep", ticket):
            rate_scale = self._schedule.at(steps)
            batch, inputs = (None, None) if feed is None else (feed.batch, feed.inputs)
            joint = self.step.train_together(batch, inputs, rate_scale, self._stop.is_set(), asks_cut)
        if joint.stop:
            self.all_stop = True
            self._stop.set()
        if not len(joint.labels):
            self.ends += 1
            return None
        return Stepped(joint.loss, joint.labels, joint.logits, joint.gradient, rate_scale, joint.cut)


def stepping_of(spec: ModelSpec, config: Config, schedule: Schedule, around: Surroundings) -> Stepping:
    """The steps of a trainer of `around`, in a TensorFlow that is set up for them."""
    knobs, group = config.trainer, around.group
    if group is not None:
        group.begin()
    prepare_tensorflow(config)
    if group is not None:
        group.join()
    model = build(config.model, spec, knobs.precision, config.seed, around.build)
    scaling = knobs.precision == "mixed_float16"
    clips = {"clipnorm": knobs.clip_norm, "global_clipnorm": knobs.clip_global_norm, "clipvalue": knobs.clip_value}
    how = (
        model, spec, knobs.optimizer, knobs.learning_rate, knobs.jit_compile, scaling,
        {name: bound for name, bound in clips.items() if bound}, config.data.negative_rate,
    )  # fmt: skip
    if group is None:
        return Alone(Step(*how), schedule, around)
    return Together(GroupStep(*how, group=group, batch_size=config.data.batch_size), schedule, around)

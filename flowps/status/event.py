"""What happens in a run, as small records. Roles emit them; lines, progress display and files subscribe.

Plain data, so that an event crosses processes as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from flowps.status.figures import ShardFigures, Usage
from flowps.status.stage import StageSummary
from flowps.status.verdict import Verdict

Phase = Literal["warm", "going", "trained", "ended"]


class _Event(msgspec.Struct, frozen=True, tag=True):
    """Base of all events."""


class Metrics(msgspec.Struct, frozen=True):
    """Quality over some examples. `auc` is None while only one class was seen."""

    examples: int
    auc: float | None
    logloss: float
    prob_mean: float
    real_mean: float


class Started(_Event, frozen=True):
    """The trainer is ready: what was chosen where the config leaves the choice, and the devices TensorFlow sees.

    multiplies_bfloat16   whether they multiply matrices of bfloat16 several times as fast as those of float32
    """

    feed_threads: int
    in_flight: int
    hub_threads: int
    tasks_in_flight: int
    devices: list[str]
    multiplies_bfloat16: bool = False


class Progress(_Event, frozen=True):
    """Twice a second: where the run is."""

    epoch: int
    step: int
    examples: int
    examples_per_s: float
    loss: float
    auc: float | None
    queue_depth: int


class Interval(_Event, frozen=True):
    """Every `status.print_interval` steps: the metrics of those steps alone, and of the epoch so far.

    more   of those steps, of every label but the first, by its name
    """

    epoch: int
    step: int
    steps_per_s: float
    examples_per_s: float
    metrics: Metrics
    epoch_metrics: Metrics
    more: dict[str, Metrics] = {}


class AtCut(_Event, frozen=True):
    """Trainer `trainer` has nothing in flight after `step`, and waits until it is told to go on. Every trainer says so.

    examples   trained so far, by all trainers
    read       samples that have come to this trainer since it began
    left_out   of these, left out on purpose
    taken      of each partition of the epoch that this trainer reads: url, first row, rows, and how many of them are trained
    last       whether the run ends with this cut
    is_best    whether the evaluation on `data.valid` here was the best so far
    """

    trainer: int
    step: int
    epoch: int
    examples: int
    read: int
    taken: list[tuple[str, int, int, int]]
    last: bool
    left_out: int = 0
    is_best: bool = False


class TrainerWritten(_Event, frozen=True):
    """The files of the dense part of the cut after `step` are written; `error`: or why they are not."""

    step: int
    files: list[dict[str, Any]]
    error: str = ""


class Saved(_Event, frozen=True):
    """A checkpoint exists. `pause_s`: how long training waited for it; `seconds`: until it was written; `kind`: full or delta."""

    name: str
    step: int
    kind: str
    rows: int
    bytes: int
    pause_s: float
    seconds: float


class Remark(_Event, frozen=True):
    """Something happened that people should know, and that the run goes on with or waits for."""

    text: str


class Evaluated(_Event, frozen=True):
    """An evaluation has ended.

    more   of every label but the first, by its name
    data   what was evaluated on
    is_best   whether no evaluation on `valid` before was better
    """

    epoch: int
    step: int
    seconds: float
    metrics: Metrics
    more: dict[str, Metrics] = {}
    data: Literal["test", "valid"] = "test"
    is_best: bool = False


class Scored(_Event, frozen=True):
    """Scorer `scorer` has predicted so many samples since it began."""

    scorer: int
    samples: int


class TrainerStatus(_Event, frozen=True):
    """What a trainer measures of itself: every `status.interval_s` seconds, when training is over, and at the end.

    Every trainer says so. `phase`: warm (once, when the first steps are over), going, trained (no step will follow, an evaluation
    may), ended. Times and counts are since it began.
    """

    trainer: int
    seconds: float
    step: int
    phase: Phase
    stages: dict[str, StageSummary]
    counters: dict[str, int]


class StatusReport(_Event, frozen=True):
    """What is measured of the whole run, whenever the first trainer has said what it measures of itself.

    stages, counters   of the first trainer; `others`: what each other one has said last
    usage              of all processes, the first trainer's first
    verdict            what bounded the run since the report before, in the last report the whole; None: nothing was trained
    is_news            whether the verdict names something else than the one before, or is the last
    """

    seconds: float
    step: int
    stages: dict[str, StageSummary]
    counters: dict[str, int]
    shards: list[ShardFigures] = []
    usage: list[Usage] = []
    others: list[TrainerStatus] = []
    verdict: Verdict | None = None
    is_news: bool = False


class Finished(_Event, frozen=True):
    """The trainer has stopped, at the end of its data or because it was asked to.

    `goes_back_to`: the step of the best evaluation, whose rows and weights the run is to end with; 0: those it has now.
    `first_step_at` is the Unix time at which the first step was done. The steady-state figures leave out the first steps and
    evaluation; they are 0 for a run too short to have a steady state.
    """

    epochs: int
    steps: int
    examples: int
    seconds: float
    first_step_at: float
    steady_examples_per_s: float
    steady_cpu_s_per_million: float
    steady_trainer_wait_share: float
    stopped: bool
    goes_back_to: int = 0


Event = (
    Started | Progress | Interval | AtCut | TrainerWritten | Saved | Remark | Evaluated | Scored | TrainerStatus | StatusReport
    | Finished
)  # fmt: skip
Emit = Callable[[Event], None]


def to_wire(event: Event) -> dict[str, Any]:
    """Builtins only."""
    return msgspec.to_builtins(event)


def from_wire(message: dict[str, Any]) -> Event:
    """The event that `to_wire` made into `message`."""
    return msgspec.convert(message, Event)

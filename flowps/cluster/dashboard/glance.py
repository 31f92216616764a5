"""`Glance`: all that the page says of a run at one moment, but for the lines of its plots. Plain data that crosses processes.

Kept by a `follower`, read by the page. Times are seconds since the command began to show the run, unless a name says otherwise.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from flowps.status.verdict import Verdict

Phase = Literal["starting", "warming up", "training", "evaluating", "saving", "trained", "stopped", "failed"]
"""The last three are ends."""

ENDS = ("trained", "stopped", "failed")


class StageLine(msgspec.Struct, frozen=True):
    """A stage of the first trainer: quantiles since it began, and its share of the time between the last two reports.

    A stage that several threads pass at once may have more than all of the time.
    """

    name: str
    count: int
    p50_us: float
    p95_us: float
    share: float


class ShardLine(msgspec.Struct, frozen=True):
    """A shard. `busy`: share of the time between the last two reports in which it worked; more than 1 where calls overlap."""

    shard: int
    worker: str
    busy: float
    rows: int
    capacity_rows: int
    bytes: int
    in_flight: int
    hit_rate: float | None


class Glance(msgspec.Struct, frozen=True):
    """A run.

    name, path           of its directory
    setup                devices and threads, in words
    error                what has ended it, if anything has
    began_at             Unix time
    seconds              the moment of this glance
    progress_s           when the trainer last said where it is
    epochs, examples_all what there is to train
    permits              batches that may be in flight
    usual_per_s          examples per second, smoothed over half a minute
    rate_of, loss_of, auc_of   what time or data examples_per_s, loss and auc are of, in words
    report_every_s, reported_s, window_s   of the status reports, that give all from `stages` on: how often they come, when the last
                         one did, and what time its shares are of
    shards               the busiest ones; num_shards, rows, rows_bytes: of all
    budget               where the time of the trainer's own thread went: what → share
    cores_busy, cores, rss_bytes, processes   of all processes; cores_busy is None before the second report
    is_whole             whether the verdict is of the whole run
    account              the ledger, in words
    notes                what has happened: when, and the words
    """

    name: str
    path: str
    began_at: float
    epochs: int
    examples_all: int
    permits: int
    report_every_s: float
    phase: Phase = "starting"
    setup: str = ""
    error: str = ""
    seconds: float = 0.0
    progress_s: float = 0.0
    epoch: int = 0
    step: int = 0
    examples: int = 0
    examples_per_s: float = 0.0
    usual_per_s: float = 0.0
    rate_of: str = "now"
    loss: float | None = None
    loss_of: str = "last step"
    auc: float | None = None
    auc_of: str = "last interval"
    queue_depth: int = 0
    reported_s: float | None = None
    window_s: float = 0.0
    stages: list[StageLine] = []
    budget: list[tuple[str, float]] = []
    shards: list[ShardLine] = []
    num_shards: int = 0
    rows: int = 0
    rows_bytes: int = 0
    in_flight: int = 0
    cores_busy: float | None = None
    cores: int = 0
    rss_bytes: int = 0
    processes: int = 0
    verdict: Verdict | None = None
    is_whole: bool = False
    account: str = ""
    notes: list[tuple[float, str]] = []

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come of the run."""
        return self.phase in ENDS


class Point(msgspec.Struct, frozen=True, array_like=True):
    """One moment of the plots. What is not known at it is None: steps give rate and loss, intervals give the others."""

    seconds: float
    examples_per_s: float | None = None
    loss: float | None = None
    logloss: float | None = None
    auc: float | None = None

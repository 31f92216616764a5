"""`Follower`: follows the events of a run and keeps a glance of it. Pure: nothing is read or sent here.

Called by the thread that watches the run.
"""

from __future__ import annotations

import math

from msgspec.structs import replace

from flowps.checkpoint.ledger import Ledger
from flowps.cluster.dashboard.glance import Glance, Point, ShardLine, StageLine
from flowps.status.event import (
    AtCut,
    Evaluated,
    Event,
    Finished,
    Interval,
    Progress,
    Remark,
    Saved,
    Started,
    StatusReport,
    TrainerStatus,
)
from flowps.status.figures import Moment
from flowps.status.lines import lines
from flowps.status.verdict import WAITS
from flowps.status.window import Window

_NOTES = 40
_SMOOTHED = 60  # values, of which there are two a second
_SHOWN_SHARDS = 32  # the busiest
_WAITS_FOR = ("waits for a permit", "waits for data", "waits for lookups", "waits for pushes", "waits for staging")
_BUDGET = {"TrainStep": "steps", **dict(zip(WAITS, _WAITS_FOR, strict=True)), "CheckpointPause": "checkpoints"}


class Follower:
    """Of one run, begun with `glance` and `ledger`. `trainers`: how many there are."""

    def __init__(self, glance: Glance, trainers: int, ledger: Ledger) -> None:
        self.glance = glance
        self._trainers, self._ledger = trainers, ledger
        self._attempts = 0
        self._cuts: dict[int, AtCut] = {}
        self._first: StatusReport | None = None
        self._before: StatusReport | None = None
        self._is_over = False

    def see(self, event: Event, seconds: float) -> Point | None:
        """Bring the glance up to date; what the event adds to the plots, if anything."""
        changes: dict[str, object] = {"seconds": seconds}
        point = None
        if isinstance(event, Started):
            changes |= self._start(event)
        elif isinstance(event, Progress):
            changes |= {
                "phase": "training", "progress_s": seconds, "epoch": event.epoch, "step": event.step, "examples": event.examples,
                "examples_per_s": event.examples_per_s, "usual_per_s": self._smooth(event.examples_per_s),
                "rate_of": "now", "loss": _finite(event.loss), "loss_of": "last step", "queue_depth": event.queue_depth,
            }  # fmt: skip
            point = Point(seconds, examples_per_s=event.examples_per_s, loss=_finite(event.loss))
        elif isinstance(event, Interval):
            changes |= {"auc": event.metrics.auc, "auc_of": "last interval"}
            point = Point(seconds, logloss=_finite(event.metrics.logloss), auc=event.metrics.auc)
        elif isinstance(event, AtCut):
            self._cuts[event.trainer] = event
            if len(self._cuts) == self._trainers:
                changes["account"] = self._account()
        elif isinstance(event, TrainerStatus):
            if event.trainer == 0 and event.phase == "trained":
                changes |= {"phase": "evaluating", "step": event.step, "queue_depth": 0}
            self._is_over = self._is_over or (event.trainer == 0 and event.phase == "ended")  # its report is of all the run
        elif isinstance(event, StatusReport):
            self._first = self._first or event
            before = None if self._is_over else self._before
            changes |= _report(before, self._first, event) | {"reported_s": seconds, "is_whole": self._is_over}
            self._before = event
        elif isinstance(event, Finished):
            changes |= _finish(event)
        if isinstance(event, Evaluated):
            found = event.metrics
            changes |= {"auc": found.auc, "auc_of": "test", "loss": _finite(found.logloss), "loss_of": "test"}
        if isinstance(event, Saved | Remark | Evaluated):
            changes["notes"] = [*self.glance.notes, *((seconds, line) for line in lines(event))][-_NOTES:]
        self.glance = replace(self.glance, **changes)
        return point

    def conclude(self, account: str) -> None:
        """The run has come to an end by itself, with this ledger."""
        self.glance = replace(self.glance, account=account.removeprefix("ledger: "))

    def end(self, seconds: float, stopped: bool, error: str) -> None:
        """Nothing more will come. `error`: what has ended the run; "": nothing has."""
        phase = "stopped" if stopped else "failed" if error else "trained"
        self.glance = replace(self.glance, phase=phase, seconds=seconds, error=error)

    def _start(self, event: Started) -> dict[str, object]:
        """The roles are there, for the first time or after a loss."""
        self._attempts += 1
        self._cuts, self._first, self._before = {}, None, None
        setup = (
            f"on {', '.join(event.devices)} · {_counted(event.feed_threads, 'feed thread')} · "
            f"{_counted(event.hub_threads, 'hub thread')}, {_counted(event.tasks_in_flight, 'task')} in flight"
        )
        return {"phase": "warming up", "setup": setup}

    def _smooth(self, rate: float) -> float:
        usual = self.glance.usual_per_s
        return usual + (rate - usual) / _SMOOTHED if usual else rate

    def _account(self) -> str:
        """At a cut of all trainers, as far as events tell: what was read before a loss is for the ledger of the command to say."""
        cuts, self._cuts = self._cuts, {}
        first = cuts[0] if 0 in cuts else next(iter(cuts.values()))
        if self._attempts > 1:
            return f"{first.examples:,} trained at step {first.step:,}; what was replayed is counted at the end"
        read, before = self._ledger.read + sum(cut.read for cut in cuts.values()), self._ledger
        dropped, replayed = sum(before.dropped.values()), before.replayed
        # Several trainers that stop have read more than they train.
        sign = "=" if read == first.examples + dropped + replayed else "of which"
        return (
            f"{read:,} read {sign} {first.examples:,} trained + {dropped:,} dropped + {replayed:,} replayed, at step {first.step:,}"
        )


def _finish(event: Finished) -> dict[str, object]:
    """The trainer has stopped. Its rate is what people compare, so the first steps do not count where there are enough."""
    rate, of = event.steady_examples_per_s, "in steady state"
    if not rate and event.seconds:
        rate, of = event.examples / event.seconds, "on average"
    return {
        "phase": "saving", "step": event.steps, "examples": event.examples, "queue_depth": 0, "examples_per_s": rate, "rate_of": of,
    }  # fmt: skip


def _report(before: StatusReport | None, first: StatusReport | None, now: StatusReport) -> dict[str, object]:
    """What a report says, and how it differs from `before`, or from nothing; processes from the `first`."""
    earlier, since_when = (None if of is None else _moment(of) for of in (before, before or first))
    window, since = Window(earlier, _moment(now)), Window(since_when, _moment(now))
    shards = [
        ShardLine(of.shard, of.worker, there.busy, of.rows, of.capacity_rows, of.bytes, of.in_flight, of.hit_rate)
        for of, there in zip(now.shards, window.shards, strict=True)
    ]
    busiest = sorted(shards, key=lambda line: -line.busy)[:_SHOWN_SHARDS]
    return {
        "window_s": window.seconds,
        "stages": [StageLine(name, of.count, of.p50_us, of.p95_us, window.share(name)) for name, of in now.stages.items()],
        "budget": [(what, window.share(name)) for name, what in _BUDGET.items() if window.share(name)],
        "shards": sorted(busiest, key=lambda line: line.shard),
        "num_shards": len(shards),
        "rows": sum(line.rows for line in shards),
        "rows_bytes": sum(line.bytes for line in shards),
        "in_flight": max((line.in_flight for line in shards), default=0),
        "cores_busy": since.cores_busy(),
        "cores": sum({of.host: of.cores for of in now.usage}.values()),
        "rss_bytes": sum(of.rss_bytes for of in now.usage),
        "processes": len(now.usage),
        "verdict": now.verdict,
    }  # fmt: skip


def _moment(report: StatusReport) -> Moment:
    return Moment(report.seconds, report.stages, report.shards, report.usage)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

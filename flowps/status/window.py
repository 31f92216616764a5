"""`Window`: what has happened between two moments of a run, or since its begin. Pure arithmetic on `figures`."""

from __future__ import annotations

from collections.abc import Mapping

from flowps.status.figures import Moment, ShardFigures
from flowps.status.stage import StageSummary

_WORK = ("Lookup", "Push", "Reply")  # the stages of a shard in which it works


class Window:
    """Differences of two moments."""

    def __init__(self, before: Moment | None, now: Moment) -> None:
        self._before, self._now = before, now
        self.seconds = now.seconds - (before.seconds if before is not None else 0.0)
        earlier = {shard.shard: shard for shard in before.shards} if before is not None else {}
        self.shards = [ShardWindow(earlier.get(shard.shard), shard, self.seconds) for shard in now.shards]

    def spent(self, name: str) -> float:
        """Seconds in a stage of the trainer."""
        return _difference(self._before.stages if self._before is not None else {}, self._now.stages, name)

    def share(self, name: str) -> float:
        """Of the window."""
        return self.spent(name) / self.seconds if self.seconds > 0 else 0.0

    def count(self, name: str) -> int:
        """How often a stage was passed."""
        there = self._now.stages.get(name)
        earlier = self._before.stages.get(name) if self._before is not None else None
        return 0 if there is None else there.count - (earlier.count if earlier is not None else 0)

    def figures(self, name: str) -> str:
        """P50 and P99, in words."""
        there = self._now.stages.get(name)
        return "" if there is None else f" (P50 {_time(there.p50_us)}, P99 {_time(there.p99_us)})"

    def cpu(self) -> tuple[float, int] | None:
        """How busy the cores of the trainer's host were with this run, and how many they are; its process is the first."""
        if not self._now.usage:
            return None
        host = self._now.usage[0].host
        used, cores = self.cores_busy(host), max(of.cores for of in self._now.usage if of.host == host)
        return None if used is None else (used / cores, cores)

    def cores_busy(self, host: str = "") -> float | None:
        """How many cores were busy with this run, on a host or on all; None where it was not measured before."""
        if self._before is None or not self._before.usage or self.seconds <= 0:
            return None
        earlier = {of.process: of.cpu_s for of in self._before.usage}
        # A process that is new may be older than the window: it does not count yet.
        known = [of for of in self._now.usage if of.process in earlier and of.host == (host or of.host)]
        return sum(max(0.0, of.cpu_s - earlier[of.process]) for of in known) / self.seconds


class ShardWindow:
    """Of one shard."""

    def __init__(self, before: ShardFigures | None, now: ShardFigures, seconds: float) -> None:
        if before is not None and before.process != now.process:
            before = None  # it is a new one, after a loss
        self._before, self._now, self._seconds = before, now, seconds
        self.number = now.shard

    def spent(self, *names: str) -> float:
        """Seconds in stages of the shard."""
        stages: Mapping[str, StageSummary] = self._before.stages if self._before is not None else {}
        return sum(_difference(stages, self._now.stages, name) for name in names)

    @property
    def busy(self) -> float:
        """Share of the time in which it worked; more than 1 where lookups and pushes overlap."""
        return self.spent(*_WORK) / self._seconds if self._seconds > 0 else 0.0

    def heaviest(self) -> tuple[str, float] | None:
        """The slot with most signs, and its share of them."""
        earlier = self._before.signs if self._before is not None else {}
        signs = {slot: count - earlier.get(slot, 0) for slot, count in self._now.signs.items()}
        total = sum(signs.values())
        if len(signs) < 2 or total <= 0:
            return None
        slot = max(signs, key=lambda name: signs[name])
        return slot, signs[slot] / total


def _difference(before: Mapping[str, StageSummary], now: Mapping[str, StageSummary], name: str) -> float:
    there, earlier = now.get(name), before.get(name)
    return 0.0 if there is None else max(0.0, there.total_us - (earlier.total_us if earlier is not None else 0.0)) / 1e6


def _time(us: float) -> str:
    return f"{us:.0f} µs" if us < 1000 else f"{us / 1000:.1f} ms"

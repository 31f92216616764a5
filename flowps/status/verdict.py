"""Which stage bounds a run, with the evidence and what to change: from run status alone.

The trainer's own time decides: it steps, waits for a feed, or waits for a checkpoint. Every wait for a feed is split by what that
feed was doing meanwhile (`WAITS`), and from there the figures of hub and shards lead to the one that is slow.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flowps.status.figures import Moment, Setup, ShardFigures
from flowps.status.window import ShardWindow, Window

FEED_WAITS = (
    "TrainerWaitForPermit", "TrainerWaitForRead", "TrainerWaitForLookup", "TrainerWaitForPush", "TrainerWaitForLookup",
    "TrainerWaitForStage",
)  # fmt: skip
"""Stages into which the feed queue splits TrainerWait, in the order a feed passes them: pushes are waited for inside a lookup."""

WAITS = tuple(dict.fromkeys(FEED_WAITS))

STARVED_SHARE = 0.05  # a trainer that waits less than this is bound by itself
_BUSY_CPU = 0.9  # of all cores: whatever else is slow is slow for want of them
_BUSY = 0.7  # of a thread or shard: more of them would help
_UNEVEN = 0.6  # the other shards' mean over the busiest
_HEAVY_SLOT = 0.3  # of a shard's signs
_MUCH = 0.25  # of all stages' time
_NARROWER = (
    "trainer.precision = mixed_bfloat16, which this processor multiplies several times as fast (compare the test AUC); else "
)

DECODE, TRANSFER, LOOKUP, WIRE, FEED, QUEUE, STEP, PUSH, CHECKPOINT, CPU = (
    "DecodePartition", "HubTransfer", "EmbeddingLookup", "Wire", "FeedThreads", "FeedQueue", "TrainStep", "PushGrad", "Checkpoint",
    "CPU",
)  # fmt: skip


class Verdict(msgspec.Struct, frozen=True):
    """What bounds the run.

    bound_by   one of the names above; shard: which, where it is a shard
    evidence   the figures that say so; advice: what to change
    """

    bound_by: str
    evidence: str
    advice: str
    shard: int | None = None

    def __str__(self) -> str:
        of = "" if self.shard is None else f" on shard {self.shard}"
        return f"bound by {self.bound_by}{of}: {self.evidence} → {self.advice}"


def judge(before: Moment | None, now: Moment, setup: Setup) -> Verdict | None:
    """What bounded the run between two moments, or since its begin; None if nothing was trained."""
    window = Window(before, now)
    if window.seconds <= 0 or not window.count("TrainStep"):
        return None
    cut, waited = window.share("CheckpointPause"), window.share("TrainerWait")
    if cut >= STARVED_SHARE and cut > waited:
        return Verdict(
            CHECKPOINT,
            f"training waited for {window.count('CheckpointPause')} checkpoints {cut:.0%} of {window.seconds:.0f} s",
            "save less often (checkpoint.every_s, checkpoint.every_steps), or give the copy more memory (checkpoint.copy_mib)",
        )
    cpu = window.cpu()
    if cpu is not None and cpu[0] >= _BUSY_CPU:
        return _by_cpu(window, setup, *cpu)
    if waited < STARVED_SHARE:
        return Verdict(
            STEP,
            f"it took {window.share('TrainStep'):.0%} of the time{window.figures('TrainStep')}, the trainer waited {waited:.0%}",
            _NARROWER * setup.narrower
            + "a larger data.batch_size, a smaller net, trainer.jit_compile, trainer.precision, a GPU, or more trainers",
        )
    parts = {wait: window.spent(wait) for wait in WAITS}
    worst = max(parts, key=lambda wait: parts[wait])
    if not parts[worst]:
        return None
    said = f"trainer waited {waited:.0%} of the time"
    if worst == "TrainerWaitForPermit":
        return _by_permits(window, setup, said)
    if worst == "TrainerWaitForPush":
        return _by_pushes(window, setup, said, "let rows be read before that (trainer.max_staleness; compare the test AUC), ")
    if worst == "TrainerWaitForRead":
        return _by_hub(window, setup, said)
    if worst == "TrainerWaitForLookup":
        return _by_lookup(window, setup, said)
    return Verdict(
        FEED,
        f"{said}; the {setup.feed_threads} feed thread(s) staged feeds {window.share('StageFeed') / setup.feed_threads:.0%} of it"
        f"{window.figures('StageFeed')}",
        "raise trainer.feed_threads",
    )


def _by_cpu(window: Window, setup: Setup, busy: float, cores: int) -> Verdict:
    stages = {name: window.spent(name) for name in (STEP, LOOKUP, PUSH, DECODE)}
    total = sum(stages.values()) or 1.0
    parts = ", ".join(f"{name} {spent / total:.0%}" for name, spent in sorted(stages.items(), key=lambda item: -item[1]) if spent)
    return Verdict(
        CPU,
        f"{cores} cores were {busy:.0%} busy, and no stage waits for anything else; of the stages' time {parts}; the trainer "
        f"waited {window.share('TrainerWait'):.0%}",
        _NARROWER
        * (setup.narrower and stages[STEP] >= _MUCH * total)
        + "more or faster cores, or hub and shards on other machines (cluster.scheduler); what takes most of the time is where "
        "less work helps",
    )


def _by_permits(window: Window, setup: Setup, said: str) -> Verdict:
    pushing = window.share("PushGrad")
    if pushing >= _BUSY and setup.in_flight > 1:
        return _by_pushes(window, setup, said)
    return Verdict(
        QUEUE,
        f"{said}, with all {setup.in_flight} batches that may be in flight on their way; pushing took {pushing:.0%} of the time",
        "raise trainer.in_flight" + (" (1 makes every step wait for the push before it)" if setup.in_flight == 1 else "")
        + ("" if _is_bounded(window) else "; it makes embeddings staler: compare the test AUC"),
    )  # fmt: skip


def _by_pushes(window: Window, setup: Setup, said: str, first: str = "") -> Verdict:
    slowest = _slowest(window, "Push")
    if slowest is not None and setup.remote and _on_the_way(window, slowest, "Push", "Push") > 0.5:
        return _wire(window, slowest, "Push", "Push", said)
    parts = ""
    if slowest is not None:
        spent = slowest.spent("PushSum", "PushStep") or 1.0
        parts = f", of its time {slowest.spent('PushSum') / spent:.0%} adding gradients up and the rest stepping rows"
    return Verdict(
        PUSH,
        f"{said}, for a push to end; pushing took {window.share('PushGrad'):.0%}{window.figures('PushGrad')}{parts}",
        f"{first}add shards (ps.num_shards) or threads (ps.threads), fewer or shorter rows, or a cheaper slot optimizer",
        None if slowest is None or setup.num_shards == 1 else slowest.number,
    )


def _by_hub(window: Window, setup: Setup, said: str) -> Verdict:
    if window.spent("HubTransfer") > window.spent("HubWait"):
        return Verdict(
            TRANSFER,
            f"{said}; bringing batches from the hub took {window.share('HubTransfer'):.0%}{window.figures('HubTransfer')}, "
            f"waiting for them to be decoded {window.share('HubWait'):.0%}",
            "a faster network between hub and trainer, hub workers nearer to it, or fewer columns (data.exclude_columns)",
        )
    busy = window.share("DecodePartition") / setup.hub_threads
    advice = (
        "add hub threads (cluster.threads) or workers that offer HUB"
        if busy >= _BUSY
        else "let more tasks run ahead (data.tasks_in_flight), and cut the files into more row groups if there are fewer"
    )
    return Verdict(
        DECODE,
        f"{said}, for batches to be read; the hub's {setup.hub_threads} thread(s) were busy {busy:.0%}, with at most "
        f"{setup.tasks_in_flight} task(s) in flight{window.figures('DecodePartition')}",
        advice,
    )


def _by_lookup(window: Window, setup: Setup, said: str) -> Verdict:
    slowest = _slowest(window, "Lookup")
    if slowest is None:
        return Verdict(
            LOOKUP, f"{said}, for lookups{window.figures('EmbeddingLookup')}", "add shards (ps.num_shards) or threads (ps.threads)"
        )
    if setup.remote and _on_the_way(window, slowest, "Lookup", "Lookup", "Reply") > 0.5:
        return _wire(window, slowest, "Lookup", "Lookup", said, "Reply")
    others = [shard.busy for shard in window.shards if shard is not slowest]
    busy = f"shard {slowest.number} busy {min(1.0, slowest.busy):.0%}"
    if others:
        busy += f", {'others' if len(others) > 1 else 'the other'} {min(1.0, sum(others) / len(others)):.0%}"
    heaviest = slowest.heaviest()
    heavy = (
        f"; slot {heaviest[0]} has {heaviest[1]:.0%} of its signs" if heaviest is not None and heaviest[1] >= _HEAVY_SLOT else ""
    )
    looking = window.share("EmbeddingLookup") / setup.feed_threads
    if slowest.busy < _BUSY and looking >= _BUSY and setup.in_flight > setup.feed_threads:
        return Verdict(
            FEED,
            f"{said}, for lookups; the {setup.feed_threads} feed thread(s) looked up {looking:.0%} of the time, batch after "
            f"batch; {busy}",
            "raise trainer.feed_threads",
        )
    if others and sum(others) / len(others) < _UNEVEN * slowest.busy:
        advice = (
            "place the slots by measured load: give --ps.load_from this run's directory to the next one"
            + (f", which splits {heaviest[0]}" if heavy and heaviest is not None else "")
            + ", or add PS workers (ps.num_shards)"
        )
    else:
        ahead = "let rows be read before pushes are in (trainer.max_staleness)" if _is_bounded(window) else (
            "look up further ahead (trainer.in_flight, trainer.feed_threads)"
        )  # fmt: skip
        advice = (
            f"add shards (ps.num_shards) or threads (ps.threads), or {ahead}, which makes embeddings staler: compare the test AUC"
        )
    return Verdict(
        LOOKUP, f"{said}, for lookups{window.figures('EmbeddingLookup')}; {busy}{heavy}", advice,
        None if setup.num_shards == 1 else slowest.number,
    )  # fmt: skip


def _wire(window: Window, shard: ShardWindow, call: str, work: str, said: str, *more: str) -> Verdict:
    name = f"{call}Shard{shard.number}"
    what = "lookups" if call == "Lookup" else "pushes"
    way = _on_the_way(window, shard, call, work, *more)
    return Verdict(
        WIRE,
        f"{said}, for {what}; of the time of {name}{window.figures(name)} {way:.0%} passed on the way, not in shard {shard.number}",
        "a faster network (cluster.interface), half the bytes (cluster.wire = float16), shards nearer to the trainer, or all in "
        "one process while it has room",
        shard.number,
    )


def _is_bounded(window: Window) -> bool:
    """Whether rows are read only when pushes are in (trainer.max_staleness)."""
    return window.count("PushWait") > 0


def _slowest(window: Window, call: str) -> ShardWindow | None:
    """The shard whose calls took longest: by the trainer's clock, or by its own where it shares the trainer's process."""
    if not window.shards:
        return None
    return max(window.shards, key=lambda shard: (window.spent(f"{call}Shard{shard.number}"), shard.spent(call)))


def _on_the_way(window: Window, shard: ShardWindow, call: str, *work: str) -> float:
    """Share of the calls' time that the shard did not work, nor had them wait for a thread."""
    called = window.spent(f"{call}Shard{shard.number}")
    return max(0.0, called - shard.spent(*work, "QueueWait")) / called if called else 0.0


def worst_slots(shards: Sequence[ShardFigures], count: int) -> list[tuple[str, float]]:
    """The slots with most signs of all shards, and their shares."""
    signs: dict[str, int] = {}
    for shard in shards:
        for slot, of in shard.signs.items():
            signs[slot] = signs.get(slot, 0) + of
    total = sum(signs.values()) or 1
    return [(slot, of / total) for slot, of in sorted(signs.items(), key=lambda item: -item[1])[:count]]

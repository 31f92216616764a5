"""Which stage bounds the trainer, from run status alone.

The trainer waits when the feed queue is empty. Every such wait is split by what the awaited feed was doing at the time: waiting
for a permit, being read, or being looked up. The largest part names the stage.
"""

from __future__ import annotations

from collections.abc import Mapping

from flowps.status.run_status import StageSummary

WAITS = ("TrainerWaitForPermit", "TrainerWaitForRead", "TrainerWaitForLookup")
"""Stages into which the feed queue splits TrainerWait, in the order a feed passes them."""

_STARVED_SHARE = 0.05  # a trainer that waits less than this is not worth a warning

_CAUSES = {
    "TrainerWaitForPermit": (
        "PushGrad",
        "all batches that may be in flight were waiting for their push: add shards (ps.num_shards), or raise trainer.in_flight "
        "(1 makes every step wait for its push), which makes embeddings staler: compare the test AUC",
    ),
    "TrainerWaitForRead": (
        "ReadSample",
        "the hub decodes too slowly: add hub threads (cluster.threads) or let more tasks run ahead (data.tasks_in_flight)",
    ),
    "TrainerWaitForLookup": (
        "EmbeddingLookup",
        "lookups come too late: add shards (ps.num_shards), or look up further ahead (trainer.in_flight, trainer.feed_threads), "
        "which makes embeddings staler: compare the test AUC",
    ),
}


def find_bottleneck(before: Mapping[str, StageSummary], now: Mapping[str, StageSummary], seconds: float) -> str | None:
    """A warning naming the stage that starved the trainer in the last `seconds`, with its numbers, or None if nothing did.

    `before` and `now` are the stages' summaries at both ends of that time.
    """

    def spent_s(name: str) -> float:
        return ((now[name].total_us if name in now else 0.0) - (before[name].total_us if name in before else 0.0)) / 1e6

    waited_s = spent_s("TrainerWait")
    if seconds <= 0 or waited_s / seconds < _STARVED_SHARE:
        return None
    worst = max(WAITS, key=spent_s)
    if spent_s(worst) <= 0:
        return None
    stage, advice = _CAUSES[worst]
    figures = f" (P50 {now[stage].p50_us:.1f} µs, P99 {now[stage].p99_us:.1f} µs)" if stage in now else ""
    return (
        f"the feed queue ran empty: the trainer waited {waited_s / seconds:.0%} of the last {seconds:.0f} s, "
        f"{spent_s(worst) / waited_s:.0%} of that bound by {stage}{figures}: {advice}"
    )

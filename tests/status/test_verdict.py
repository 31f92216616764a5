"""Which stage is named as the one that bounds a run, from figures alone. `tests/cluster/long_verdicts.py` has runs."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest

from flowps.status.figures import Moment, Setup, ShardFigures, Usage
from flowps.status.stage import StageSummary
from flowps.status.verdict import CHECKPOINT, CPU, DECODE, FEED, LOOKUP, PUSH, QUEUE, STEP, TRANSFER, WAITS, WIRE, Verdict, judge

ALONE = Setup(hub_threads=2, tasks_in_flight=3, feed_threads=1, in_flight=2, num_shards=1, remote=False)
SPREAD = Setup(hub_threads=4, tasks_in_flight=6, feed_threads=2, in_flight=8, num_shards=3, remote=True)


def stages(**total_s: float) -> dict[str, StageSummary]:
    """Stages that took so many seconds in all."""
    return {name: StageSummary(10, s * 1e6, 27_600.0, 50_000.0, 262_000.0, 300_000.0) for name, s in total_s.items()}


def shard(
    number: int = 0, signs: Mapping[str, int] = {"user": 1, "item": 1}, process: str = "a:1", **total_s: float
) -> ShardFigures:
    return ShardFigures(
        number, f"ps-{number}", process, stages(**total_s), 10, 20, 640, 0.5, 10, 0, 0, 0, 0, {}, dict(signs), []
    )  # fmt: skip


def waiting(wait: str, seconds: float = 6.0, **more_s: float) -> dict[str, StageSummary]:
    """Ten seconds of which the trainer waited, for most of it because of one thing."""
    parts = {name: seconds - 0.5 if name == wait else 0.1 for name in WAITS}
    return stages(**{"TrainStep": 10 - seconds, "TrainerWait": seconds, **parts, **more_s})


def judged(found: dict[str, StageSummary], setup: Setup = ALONE, *shards: ShardFigures) -> Verdict:
    verdict = judge(None, Moment(10.0, found, list(shards)), setup)
    assert verdict is not None
    return verdict


def test_a_trainer_that_hardly_waits_is_bound_by_its_step() -> None:
    verdict = judged(stages(TrainStep=9.4, TrainerWait=0.4, TrainerWaitForRead=0.4))
    assert verdict.bound_by == STEP
    assert "it took 94% of the time (P50 27.6 ms, P99 262.0 ms), the trainer waited 4%" in verdict.evidence
    assert "data.batch_size" in verdict.advice


@pytest.mark.parametrize(("narrower", "step_s", "advised"), [(True, 6.0, True), (False, 6.0, False), (True, 1.0, False)])
def test_a_processor_that_multiplies_bfloat16_is_named_where_the_step_takes_much(
    narrower: bool, step_s: float, advised: bool
) -> None:
    setup = msgspec.structs.replace(ALONE, narrower=narrower)
    now = Moment(10.0, stages(TrainStep=step_s, EmbeddingLookup=4.0, PushGrad=2.0), [], [usage(19.5)])
    verdict = judge(Moment(0.0, {}, [], [usage(0.0)]), now, setup)
    assert verdict is not None
    assert verdict.bound_by == CPU
    assert verdict.advice.startswith("trainer.precision = mixed_bfloat16") == advised
    assert "more or faster cores" in verdict.advice
    alone = judged(stages(TrainStep=9.4, TrainerWait=0.4, TrainerWaitForRead=0.4), setup)
    assert alone.advice.startswith("trainer.precision = mixed_bfloat16") == narrower


def test_checkpoints_that_take_more_than_waiting() -> None:
    verdict = judged(stages(TrainStep=6.0, TrainerWait=1.0, CheckpointPause=3.0))
    assert verdict.bound_by == CHECKPOINT
    assert verdict.evidence == "training waited for 10 checkpoints 30% of 10 s"
    assert "checkpoint.every_s" in verdict.advice


@pytest.mark.parametrize(("busy_s", "advice"), [(18.0, "add hub threads (cluster.threads)"), (4.0, "data.tasks_in_flight")])
def test_a_slow_hub(busy_s: float, advice: str) -> None:
    verdict = judged(waiting("TrainerWaitForRead", DecodePartition=busy_s, HubWait=6.0, HubTransfer=0.1))
    assert verdict.bound_by == DECODE
    assert f"2 thread(s) were busy {busy_s / 20:.0%}, with at most 3 task(s) in flight" in verdict.evidence
    assert advice in verdict.advice


def test_a_slow_way_from_the_hub() -> None:
    verdict = judged(waiting("TrainerWaitForRead", DecodePartition=2.0, HubWait=0.5, HubTransfer=5.0))
    assert verdict.bound_by == TRANSFER
    assert "bringing batches from the hub took 50%" in verdict.evidence


def test_a_shard_that_is_busier_than_the_others_is_named_with_its_heaviest_slot() -> None:
    shards = [
        shard(0, {"hist_attrs": 48, "user": 52}, Lookup=8.7, Push=1.0), shard(1, Lookup=1.0), shard(2, Lookup=1.4)
    ]  # fmt: skip
    client = {"LookupShard0": 9.0, "LookupShard1": 1.1, "LookupShard2": 1.5, "EmbeddingLookup": 9.1}
    verdict = judged(waiting("TrainerWaitForLookup", **client), SPREAD, *shards)
    assert (verdict.bound_by, verdict.shard) == (LOOKUP, 0)
    assert "trainer waited 60% of the time, for lookups" in verdict.evidence
    assert "shard 0 busy 97%, others 12%; slot user has 52% of its signs" in verdict.evidence
    assert "ps.load_from" in verdict.advice
    assert "splits user" in verdict.advice
    assert str(verdict).startswith("bound by EmbeddingLookup on shard 0: trainer waited 60% of the time")


def test_shards_that_are_all_busy_ask_for_more_of_them() -> None:
    shards = [shard(number, Lookup=8.0, Push=1.0) for number in range(3)]
    client = {f"LookupShard{number}": 9.0 for number in range(3)}
    verdict = judged(waiting("TrainerWaitForLookup", EmbeddingLookup=12.0, **client), SPREAD, *shards)
    assert verdict.bound_by == LOOKUP
    assert "add shards (ps.num_shards)" in verdict.advice


def test_the_only_shard_needs_no_number() -> None:
    verdict = judged(waiting("TrainerWaitForLookup", EmbeddingLookup=9.0), ALONE, shard(0, Lookup=9.0))
    assert (verdict.bound_by, verdict.shard) == (LOOKUP, None)
    assert "shard 0 busy 90%" in verdict.evidence


def test_lookups_that_pass_most_of_their_time_on_the_way() -> None:
    shards = [shard(0, Lookup=1.0, Reply=0.5, QueueWait=0.2), shard(1, Lookup=1.0), shard(2, Lookup=1.0)]
    client = {"LookupShard0": 9.0, "LookupShard1": 3.0, "LookupShard2": 3.0}
    verdict = judged(waiting("TrainerWaitForLookup", EmbeddingLookup=9.1, **client), SPREAD, *shards)
    assert (verdict.bound_by, verdict.shard) == (WIRE, 0)
    assert "of the time of LookupShard0 (P50 27.6 ms, P99 262.0 ms) 81% passed on the way" in verdict.evidence
    assert "cluster.wire = float16" in verdict.advice


def test_lookups_one_after_the_other_at_idle_shards_ask_for_feed_threads() -> None:
    verdict = judged(waiting("TrainerWaitForLookup", EmbeddingLookup=9.5), ALONE, shard(0, Lookup=4.0))
    assert verdict.bound_by == FEED
    assert verdict.advice == "raise trainer.feed_threads"


def test_feed_threads_that_stage() -> None:
    verdict = judged(waiting("TrainerWaitForStage", StageFeed=9.0))
    assert verdict.bound_by == FEED
    assert "staged feeds 90% of it" in verdict.evidence


def test_pushes_that_take_all_of_their_thread() -> None:
    verdict = judged(waiting("TrainerWaitForPermit", PushGrad=9.0), ALONE, shard(0, Push=8.9, PushSum=2.0, PushStep=6.0))
    assert verdict.bound_by == PUSH
    assert "pushing took 90% (P50 27.6 ms, P99 262.0 ms), of its time 25% adding gradients up" in verdict.evidence


def test_lookups_that_are_bounded_in_staleness_are_told_of_it() -> None:
    found = waiting("TrainerWaitForLookup", EmbeddingLookup=6.0)
    assert "look up further ahead" in judged(found, ALONE, shard(0, Lookup=5.0)).advice
    advice = judged({**found, **stages(PushWait=1.0)}, ALONE, shard(0, Lookup=5.0)).advice
    assert "or let rows be read before pushes are in (trainer.max_staleness), which makes embeddings staler" in advice


def test_rows_that_are_read_only_after_a_push() -> None:
    verdict = judged(waiting("TrainerWaitForPush", PushGrad=3.0), ALONE, shard(0, Push=2.9, PushSum=2.0, PushStep=0.5))
    assert verdict.bound_by == PUSH
    assert "pushing took 30% (P50 27.6 ms, P99 262.0 ms), of its time 80% adding gradients up" in verdict.evidence
    assert verdict.advice.startswith("let rows be read before that (trainer.max_staleness; compare the test AUC), add shards")


def test_pushes_that_pass_their_time_on_the_way() -> None:
    shards = [shard(number, Push=1.0) for number in range(3)]
    client = {f"PushShard{number}": 9.0 - number for number in range(3)}
    verdict = judged(waiting("TrainerWaitForPermit", PushGrad=9.0, **client), SPREAD, *shards)
    assert (verdict.bound_by, verdict.shard) == (WIRE, 0)
    assert "for pushes" in verdict.evidence


@pytest.mark.parametrize("in_flight", [1, 2])
def test_too_few_batches_in_flight(in_flight: int) -> None:
    verdict = judged(waiting("TrainerWaitForPermit", PushGrad=3.0), msgspec.structs.replace(ALONE, in_flight=in_flight))
    assert verdict.bound_by == QUEUE
    assert f"all {in_flight} batches" in verdict.evidence
    assert ("1 makes every step wait" in verdict.advice) is (in_flight == 1)


def usage(cpu_s: float, process: str = "a:1", host: str = "a") -> Usage:
    return Usage(process, host, cpu_s, 1 << 30, 2)


def test_where_all_cores_are_busy_no_stage_is_to_blame() -> None:
    before = Moment(5.0, {}, usage=[usage(3.0), usage(1.0, "a:2"), usage(0.0, "b:1", "b")])
    found = stages(TrainStep=6.0, PushGrad=2.0, EmbeddingLookup=2.0, TrainerWait=4.0, TrainerWaitForLookup=4.0)
    now = Moment(15.0, found, usage=[usage(15.0), usage(7.4, "a:2"), usage(50.0, "b:1", "b"), usage(99.0, "a:3")])
    verdict = judge(before, now, ALONE)
    assert verdict is not None
    assert verdict.bound_by == CPU
    assert "2 cores were 92% busy" in verdict.evidence
    assert "TrainStep 60%, " in verdict.evidence


def test_cores_that_are_not_all_busy_are_not_to_blame() -> None:
    before = Moment(5.0, {}, usage=[usage(3.0)])
    verdict = judge(before, Moment(15.0, stages(TrainStep=9.9), usage=[usage(20.9)]), ALONE)
    assert verdict is not None
    assert verdict.bound_by == STEP


def test_only_what_happened_since_counts() -> None:
    before = Moment(100.0, stages(TrainStep=20.0, TrainerWait=80.0, TrainerWaitForRead=80.0, HubWait=80.0), [shard(0, Lookup=70.0)])
    later = stages(TrainStep=25.0, TrainerWait=85.0, TrainerWaitForRead=80.2, TrainerWaitForLookup=4.8, HubWait=80.2)
    counts = {name: StageSummary(20, of.total_us, 1.0, 2.0, 3.0, 4.0) for name, of in later.items()}
    verdict = judge(before, Moment(110.0, counts, [shard(0, Lookup=78.0)]), ALONE)
    assert verdict is not None
    assert verdict.bound_by == LOOKUP
    assert "waited 50% of the time" in verdict.evidence
    assert "shard 0 busy 80%" in verdict.evidence


def test_a_shard_that_was_started_anew_begins_at_nothing() -> None:
    before = Moment(100.0, stages(TrainStep=1.0), [shard(0, {"user": 900, "item": 100}, Lookup=90.0)])
    found = {**waiting("TrainerWaitForLookup", EmbeddingLookup=6.0)}
    now = Moment(110.0, {name: StageSummary(20, of.total_us + 1e6, 1.0, 2.0, 3.0, 4.0) for name, of in found.items()},
                 [shard(0, {"user": 10, "item": 90}, "a:9", Lookup=8.0)])  # fmt: skip
    verdict = judge(before, now, ALONE)
    assert verdict is not None
    assert "shard 0 busy 80%; slot item has 90% of its signs" in verdict.evidence


@pytest.mark.parametrize("now", [Moment(10.0, {}), Moment(0.0, stages(TrainStep=1.0)), Moment(10.0, stages(ReadSample=5.0))])
def test_nothing_trained_or_no_time_is_no_verdict(now: Moment) -> None:
    assert judge(None, now, ALONE) is None


def test_a_wait_that_nothing_explains_blames_nothing() -> None:
    assert judge(None, Moment(10.0, stages(TrainStep=5.0, TrainerWait=5.0)), ALONE) is None

"""Which stage bounds the trainer."""

from __future__ import annotations

import pytest

from flowps.status.bottleneck import WAITS, find_bottleneck
from flowps.status.run_status import StageSummary


def stages(**total_s: float) -> dict[str, StageSummary]:
    """Stages that took so many seconds in all."""
    return {name: StageSummary(10, s * 1e6, 27_600.0, 50_000.0, 262_000.0, 300_000.0) for name, s in total_s.items()}


CASES = [
    ("TrainerWaitForPermit", "PushGrad", "trainer.in_flight"),
    ("TrainerWaitForRead", "ReadSample", "cluster.threads"),
    ("TrainerWaitForLookup", "EmbeddingLookup", "trainer.feed_threads"),
]


def test_every_wait_has_a_case_here():
    assert [wait for wait, _, _ in CASES] == list(WAITS)


@pytest.mark.parametrize(("wait", "stage", "advice"), CASES)
def test_the_stage_that_most_of_the_wait_was_for_is_named_with_its_numbers_and_advice(wait: str, stage: str, advice: str):
    parts = {name: 6.0 if name == wait else 1.0 for name in WAITS}
    found = find_bottleneck({}, stages(TrainerWait=8.0, **parts, **{stage: 20.0}), 10.0)
    assert found is not None
    assert found.startswith("the feed queue ran empty: the trainer waited 80% of the last 10 s, 75% of that bound by ")
    assert f"bound by {stage} (P50 27600.0 µs, P99 262000.0 µs): " in found
    assert advice in found
    assert not any(other in found for _, other, _ in CASES if other != stage)


def test_only_what_happened_since_counts():
    before = stages(TrainerWait=100.0, TrainerWaitForRead=100.0, ReadSample=100.0)
    now = stages(TrainerWait=105.0, TrainerWaitForRead=100.5, TrainerWaitForLookup=4.5, ReadSample=130.0, EmbeddingLookup=9.0)
    found = find_bottleneck(before, now, 10.0)
    assert found is not None
    assert "waited 50% of the last 10 s, 90% of that bound by EmbeddingLookup" in found


@pytest.mark.parametrize(("waited_s", "warns"), [(0.0, False), (0.49, False), (0.51, True), (10.0, True)])
def test_a_trainer_that_waits_less_than_a_twentieth_of_the_time_is_not_worth_a_warning(waited_s: float, warns: bool):
    now = stages(TrainerWait=waited_s, TrainerWaitForRead=waited_s, ReadSample=9.0)
    assert (find_bottleneck({}, now, 10.0) is not None) is warns


def test_nothing_observed_yet_is_no_bottleneck():
    assert find_bottleneck({}, {}, 10.0) is None
    assert find_bottleneck({}, stages(ReadSample=5.0), 10.0) is None


def test_no_time_has_passed_is_no_bottleneck():
    assert find_bottleneck({}, stages(TrainerWait=1.0, TrainerWaitForRead=1.0), 0.0) is None


def test_a_stage_that_was_never_finished_is_named_without_numbers():
    """The first push may still be running when the trainer has waited for its permit."""
    found = find_bottleneck({}, stages(TrainerWait=5.0, TrainerWaitForPermit=5.0), 10.0)
    assert found is not None
    assert "100% of that bound by PushGrad: all batches" in found


def test_a_wait_that_nothing_explains_blames_no_stage():
    """No stage is named on the strength of zero seconds."""
    found = find_bottleneck({}, stages(TrainerWait=5.0, ReadSample=1.0), 10.0)
    assert found is None or not any(stage in found for _, stage, _ in CASES)

"""The log lines, in exactly the form that people grep for."""

from __future__ import annotations

import re

import msgspec
import pytest

from flowps.status.event import Evaluated, Interval
from flowps.status.lines import auc, lines, quality
from flowps.status.stage import StageSummary
from tests.status.samples import (
    EVALUATED,
    FINISHED,
    INTERVAL,
    METRICS,
    NOTHING,
    ONE_CLASS,
    PROGRESS,
    REMARK,
    REPORT,
    SAVED,
    SHARD,
    STARTED,
)


def test_the_start_says_devices_and_what_was_chosen():
    assert list(lines(STARTED)) == [
        "trainer: on GPU:0, GPU:1, 2 batches in flight, 1 feed thread(s); hub: 4 threads, 5 tasks in flight"
    ]


def test_an_interval_is_four_lines():
    assert list(lines(INTERVAL)) == [
        "step 1300, auc = 0.6715 (37.5 it/sec; 38399.8 examples/sec)",
        "step 1300, xentropy_mean = 0.4032 (37.5 it/sec; 38399.8 examples/sec)",
        "step 1300, prob_mean = 0.1235 (37.5 it/sec; 38399.8 examples/sec)",
        "step 1300, real_mean = 0.1200 (37.5 it/sec; 38399.8 examples/sec)",
    ]


def test_an_interval_says_its_own_metrics_not_the_epochs():
    event = Interval(1, 10, 1.0, 1.0, METRICS, ONE_CLASS)
    assert next(lines(event)).startswith("step 10, auc = 0.6715 ")


def test_a_checkpoint_says_what_it_has_and_how_long_training_waited():
    assert list(lines(SAVED)) == [
        "checkpoint step-000000100-3fa9c2 (full): 1,234,567 rows, 187.7 MB in 0.41 s; training paused 0.062 s"
    ]


def test_a_remark_is_what_it_says():
    assert list(lines(REMARK)) == ["worker ps-1 was lost"]


def test_an_interval_of_one_class_has_no_auc():
    event = Interval(1, 10, 1.0, 1.0, ONE_CLASS, ONE_CLASS)
    assert next(lines(event)) == "step 10, auc = n/a (1.0 it/sec; 1.0 examples/sec)"


def test_interval_lines_can_be_read_back():
    """What a script would use."""
    pattern = re.compile(
        r"^step (\d+), (auc|xentropy_mean|prob_mean|real_mean) = (\S+) \((\d+\.\d) it/sec; (\d+\.\d) examples/sec\)$"
    )
    found = [pattern.match(line) for line in lines(INTERVAL)]
    assert [m and m[2] for m in found] == ["auc", "xentropy_mean", "prob_mean", "real_mean"]


def test_a_status_report_is_a_line_for_each_stage_by_name_then_counters_shards_and_the_verdict():
    step = StageSummary(3, 6.0, 1.0, 2.0, 2.0, 3.0)
    event = msgspec.structs.replace(
        REPORT, stages={"TrainStep": step, **REPORT.stages}, counters={"feed_queue_empty": 7, "empty_reads": 0}
    )
    assert list(lines(event)) == [
        "[RunStatus]: OpsEmbeddingLookup statistics => count: 1440  P50: 209488.6  P95: 262144.0  P99: 300000.0  Max: 6000000.2",
        "[RunStatus]: OpsTrainStep statistics => count: 3  P50: 1.0  P95: 2.0  P99: 2.0  Max: 3.0",
        "[RunStatus]: counters => empty_reads: 0  feed_queue_empty: 7",
        "[RunStatus]: Shard1 => rows: 1234567  index load: 0.61  hits: 95.7%  evicted: 65433  in flight: 2  "
        "Find P50: 209488.6 P95: 262144.0",
        "[RunStatus]: bound by EmbeddingLookup on shard 1: trainer waited 61% of the time, for lookups; shard 1 busy 97% → "
        "add shards",
    ]


def test_a_verdict_that_says_nothing_new_is_not_repeated():
    assert not [line for line in lines(msgspec.structs.replace(REPORT, is_news=False)) if "bound by" in line]


def test_a_status_report_without_counters_shards_and_verdict_says_none():
    event = msgspec.structs.replace(REPORT, counters={}, shards=[], verdict=None)
    assert [line.split(" =>")[0] for line in lines(event)] == ["[RunStatus]: OpsEmbeddingLookup statistics"]


def test_the_shards_of_a_large_cluster_are_in_the_file_only():
    event = msgspec.structs.replace(REPORT, shards=[SHARD] * 9)
    assert not [line for line in lines(event) if "Shard" in line]


def test_an_evaluation_is_one_line():
    assert list(lines(EVALUATED)) == [
        "evaluated 102400 examples in 12.3 s: auc = 0.6715, logloss = 0.40321, "
        "calibration = 1.029 (mean prediction 0.12345, mean label 0.12000)"
    ]


def test_an_evaluation_without_positives_has_neither_auc_nor_calibration():
    (line,) = lines(Evaluated(1, 1, 0.0, ONE_CLASS))
    assert "auc = n/a" in line
    assert "calibration = n/a" in line


def test_the_quality_of_nothing_can_be_said():
    assert quality(NOTHING).startswith("auc = n/a, logloss = nan, ")


@pytest.mark.parametrize(("value", "said"), [(None, "n/a"), (0.5, "0.5000"), (1.0, "1.0000"), (0.67149, "0.6715")])
def test_an_auc_has_four_digits_or_is_not_there(value: float | None, said: str):
    assert auc(value) == said


def test_the_end_is_one_line():
    assert list(lines(FINISHED)) == [
        "trained: 2662400 examples, 2600 steps, 2 epoch(s) in 71.0 s (38399.8 examples/sec in steady state)"
    ]


def test_the_end_of_a_stopped_run_too_short_for_a_steady_state():
    event = msgspec.structs.replace(FINISHED, stopped=True, steady_examples_per_s=0.0)
    assert list(lines(event)) == ["stopped: 2662400 examples, 2600 steps, 2 epoch(s) in 71.0 s"]


def test_a_progress_update_is_no_line():
    assert list(lines(PROGRESS)) == []

"""One event of each kind, with the figures of the engineering log that flowps answers."""

from __future__ import annotations

from flowps.status.event import (
    AtCut,
    Evaluated,
    Finished,
    Interval,
    Metrics,
    Progress,
    Remark,
    Saved,
    Started,
    StatusReport,
    TrainerStatus,
    TrainerWritten,
)
from flowps.status.figures import ShardFigures, Usage
from flowps.status.stage import StageSummary
from flowps.status.verdict import Verdict

METRICS = Metrics(examples=102_400, auc=0.67149, logloss=0.40321, prob_mean=0.12345, real_mean=0.12)
ONE_CLASS = Metrics(examples=10, auc=None, logloss=0.1, prob_mean=0.1, real_mean=0.0)
NOTHING = Metrics(examples=0, auc=None, logloss=float("nan"), prob_mean=float("nan"), real_mean=float("nan"))
LOOKUP = StageSummary(1440, 3.1e8, 209_488.64, 262_144.0, 300_000.04, 6_000_000.25)

STARTED = Started(feed_threads=1, in_flight=2, hub_threads=4, tasks_in_flight=5, devices=["GPU:0", "GPU:1"])
PROGRESS = Progress(epoch=1, step=1300, examples=1_331_200, examples_per_s=38_399.8, loss=0.45123, auc=0.67149, queue_depth=3)
INTERVAL = Interval(1, 1300, 37.49999, 38_399.84, METRICS, METRICS)
AT_CUT = AtCut(1, 100, 0, 6400, 3200, [("data.parquet", 0, 5000, 3200)], False)
WRITTEN = TrainerWritten(100, [{"path": "step/trainer/state.npz", "size_bytes": 1, "checksum": "0"}])
SAVED = Saved("step-000000100-3fa9c2", 100, "full", 1_234_567, 187_654_321, 0.0624, 0.4123)
REMARK = Remark("worker ps-1 was lost")
EVALUATED = Evaluated(2, 2600, 12.34, METRICS)
TRAINER = TrainerStatus(1, 30.0, 1300, "going", {"EmbeddingLookup": LOOKUP}, {"feed_queue_empty": 7})
SHARD = ShardFigures(
    1, "ps-1", "host:17", {"Find": LOOKUP}, 1_234_567, 2_000_000, 187_654_321, 0.61, 1_300_000, 65_433, 7, 0, 2, {0: 900, 1: 539},
    {"user": 9_000_000, "item": 21_000_000}, [("item", 2**63 + 1, 0.034)],
)  # fmt: skip
VERDICT = Verdict("EmbeddingLookup", "trainer waited 61% of the time, for lookups; shard 1 busy 97%", "add shards", 1)
REPORT = StatusReport(
    30.0, 1300, {"EmbeddingLookup": LOOKUP}, {"feed_queue_empty": 7}, [SHARD],
    [Usage("host:16", "host", 31.5, 2 << 30, 2)], [TRAINER], VERDICT, True,
)  # fmt: skip
FINISHED = Finished(2, 2600, 2_662_400, 71.04, 1.7e9, 38_399.84, 25.5, 0.031, False)

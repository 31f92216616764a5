"""Runs in which one stage is slow: it is the one that the verdict names, in the report, the last line and what `report` prints."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps.cluster.shard_report import PlacementReport
from flowps.ps.load import SlotLoad
from flowps.report import main as report_on
from flowps.status.event import StatusReport
from flowps.status.verdict import CHECKPOINT, DECODE, FEED, LOOKUP, PUSH, QUEUE, STEP, TRANSFER, WIRE, Verdict
from flowps.train import main
from tests.cluster import delays
from tests.cluster.conftest import train_command

ROWS, BATCH = 1600, 16
KNOBS = [
    "--data.batch_size", BATCH, "--data.partition_rows", 80, "--epochs", 2, "--model", "lr", "--status.progress", "plain",
    "--status.print_interval", 1000, "--checkpoint.every_s", 0, "--slot_default.capacity_rows", 10_000, "--cluster.dashboard", "",
]  # fmt: skip
DELAY_S = 0.02


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1600 samples in 20 row groups, with one slot that has most of the signs."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("verdicts") / "data.parquet"
    columns = {
        "label": rng.integers(0, 2, ROWS).astype(np.int8), "user": rng.integers(0, 50, ROWS),
        "history": [rng.integers(0, 90, 20).tolist() for _ in range(ROWS)],
    }  # fmt: skip
    pq.write_table(pa.table(columns), path, row_group_size=80)
    return path


def report_of(run_dir: Path) -> StatusReport:
    """The last one."""
    return msgspec.json.decode((run_dir / "status.jsonl").read_bytes().splitlines()[-1], type=StatusReport)


def verdict_of(run_dir: Path) -> Verdict:
    """That of the last report."""
    found = report_of(run_dir)
    assert found.is_news
    assert found.verdict is not None
    return found.verdict


CASES = {
    "decode": (DECODE, 2 * DELAY_S * 5, ("--data.tasks_in_flight", 1), "at most 1 task(s) in flight"),
    "transfer": (TRANSFER, 2 * DELAY_S * 5, (), "bringing batches from the hub took"),
    "lookup": (LOOKUP, DELAY_S, ("--trainer.feed_threads", 1, "--trainer.in_flight", 1), "shard 0 busy"),
    "stage": (FEED, DELAY_S, ("--trainer.feed_threads", 1), "staged feeds"),
    "step": (STEP, DELAY_S, (), "it took"),
    "push": (PUSH, DELAY_S, ("--trainer.in_flight", 3), "pushing took"),
    "checkpoint": (CHECKPOINT, 10 * DELAY_S, ("--checkpoint.every_steps", 10), "checkpoints"),
}


@pytest.mark.parametrize("stage", CASES)
def test_the_slowed_stage_is_named(
    stage: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bound_by, seconds, knobs, evidence = CASES[stage]
    delays.slow(stage, seconds, monkeypatch.setattr)
    run_dir = tmp_path / "run"
    assert main([*map(str, ("--data.train", data, *KNOBS, "--run_dir", run_dir, *knobs))]) == 0
    verdict = verdict_of(run_dir)
    assert verdict.bound_by == bound_by, str(verdict)
    assert evidence in verdict.evidence
    assert f"[RunStatus]: {verdict}" in capsys.readouterr().out.splitlines()
    assert report_on([str(run_dir)]) == 0
    assert str(verdict) in capsys.readouterr().out.replace("\n", "")


def test_steps_that_wait_for_their_pushes_ask_for_more_in_flight(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push and a lookup take their time, one after the other: neither is to blame."""
    delays.slow("push", DELAY_S, monkeypatch.setattr)
    run_dir = tmp_path / "run"
    assert main([*map(str, ("--data.train", data, *KNOBS, "--run_dir", run_dir, "--trainer.in_flight", 1))]) == 0
    verdict = verdict_of(run_dir)
    assert verdict.bound_by == QUEUE
    assert "1 makes every step wait" in verdict.advice


PROCESSES = ("--cluster.mode", "processes", "--ps.num_shards", 2)


def test_a_slow_way_to_the_shards_is_named(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    environment = {"DASK_DISTRIBUTED__WORKER__PRELOAD": delays.__file__, "FLOWPS_DELAY": "wire", "FLOWPS_DELAY_S": DELAY_S}
    command = train_command(data.parent, run_dir, *KNOBS, "--data.train", data, "--data.test", *PROCESSES, environment=environment)
    with closing(command):
        command.succeed()
    verdict = verdict_of(run_dir)
    assert verdict.bound_by == WIRE, str(verdict)
    assert "passed on the way, not in shard" in verdict.evidence


def test_one_shard_with_too_much_is_named_with_its_slot(data: Path, tmp_path: Path) -> None:
    """Shard 0 takes longer with each lookup; the other one has next to nothing to do."""
    run_dir = tmp_path / "run"
    environment = {
        "DASK_DISTRIBUTED__WORKER__PRELOAD": delays.__file__, "FLOWPS_DELAY": "lookup", "FLOWPS_DELAY_S": DELAY_S,
        "FLOWPS_DELAY_ON": "ps-0",
    }  # fmt: skip
    command = train_command(data.parent, run_dir, *KNOBS, "--data.train", data, "--data.test", *PROCESSES, environment=environment)
    with closing(command):
        command.succeed()
    verdict = verdict_of(run_dir)
    assert (verdict.bound_by, verdict.shard) == (LOOKUP, 0), str(verdict)
    assert "the other " in verdict.evidence


# --- two real ones ------------------------------------------------------------------------------------------------------


def test_an_overloaded_shard_without_any_delay(tmp_path: Path) -> None:
    """What an earlier run says of the slots is wrong: one shard has nearly all of the work, of long rows that are pooled."""
    rng = np.random.default_rng(1)
    rows, path, earlier = 6_400, tmp_path / "heavy.parquet", tmp_path / "earlier"
    columns = {
        "label": rng.integers(0, 2, rows).astype(np.int8), "user": rng.integers(0, 50, rows),
        "history": pa.ListArray.from_arrays(
            np.arange(0, 200 * rows + 1, 200, dtype=np.int32), pa.array(rng.integers(0, 10_000, 200 * rows))
        ),
    }  # fmt: skip
    pq.write_table(pa.table(columns), path, row_group_size=1600)
    loads = dict.fromkeys(("user", "history"), SlotLoad(1.0, 1.0, 1000))
    earlier.mkdir()
    (earlier / "placement.json").write_bytes(msgspec.json.encode(PlacementReport("an earlier run", [], loads)))
    knobs = (
        "--data.batch_size", 256, "--data.partition_rows", 1600, "--slot_default.dim", 512, "--ps.load_from", earlier,
        "--slot_default.capacity_rows", 15_000, "--trainer.in_flight", 4, "--trainer.feed_threads", 2, "--status.interval_s", 1000,
    )  # fmt: skip
    command = train_command(
        path.parent, tmp_path / "run", *KNOBS, "--data.train", path, "--data.test", *PROCESSES, *knobs,
        environment={"DASK_DISTRIBUTED__WORKER__PRELOAD": delays.__file__, "FLOWPS_OWN_HOSTS": 1},
    )  # fmt: skip
    with closing(command):
        command.succeed()
    verdict, report = verdict_of(tmp_path / "run"), report_of(tmp_path / "run")
    overloaded = next(shard.shard for shard in report.shards if "history" in shard.signs)
    busy = {shard.shard: shard.stages["Lookup"].p50_us + shard.stages["Push"].p50_us for shard in report.shards}
    assert busy[overloaded] > 5 * busy[1 - overloaded], "the situation is what it should be"
    assert verdict.bound_by in (LOOKUP, PUSH), str(verdict)
    assert verdict.shard == overloaded


def test_too_few_hub_tasks_without_any_delay(tmp_path: Path) -> None:
    """One task at a time, of many strings to hash, for a model that is nothing."""
    rng = np.random.default_rng(1)
    rows, path = 40_000, tmp_path / "strings.parquet"
    columns = {f"s{k}": [f"value-{k}-{value:x}" for value in rng.integers(0, 1 << 60, rows)] for k in range(8)}
    pq.write_table(pa.table({"label": rng.integers(0, 2, rows).astype(np.int8), **columns}), path, row_group_size=2000)
    knobs = (
        "--data.batch_size", 500, "--data.partition_rows", 2000, "--data.tasks_in_flight", 1, "--slot_default.dim", 1,
        "--slot_default.hash_size", 100, "--status.interval_s", 1000,
    )  # fmt: skip
    assert main([*map(str, (*KNOBS, "--data.train", path, "--run_dir", tmp_path / "run", *knobs))]) == 0
    verdict = verdict_of(tmp_path / "run")
    assert verdict.bound_by == DECODE, str(verdict)
    assert "at most 1 task(s) in flight" in verdict.evidence
    assert "data.tasks_in_flight" in verdict.advice

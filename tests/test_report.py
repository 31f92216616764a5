"""The command that says what a run has left, as a person runs it. `tests/test_report_page.py` has its page."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowps.checkpoint.ledger import Ledger
from flowps.cluster.shard_report import PlacementReport, ShardReport
from flowps.ps.load import SlotLoad
from flowps.ps.placement import ShardLoad
from flowps.report import main
from flowps.run_record import read_run
from flowps.status.event import Evaluated, Event, Finished, Interval, Metrics, Remark, Saved, Started, StatusReport, TrainerStatus
from flowps.status.figures import ShardFigures, Usage
from flowps.status.stage import StageSummary
from flowps.status.verdict import Verdict

PREDICTED = [ShardLoad(0.4, 0.5, 0.5, 0.45), ShardLoad(0.6, 0.5, 0.5, 0.55)]
MEASURED = [ShardLoad(0.41, 0.5, 0.52, 0.55), ShardLoad(0.59, 0.5, 0.48, 0.45)]
SLOTS = [["user", "item (1/2)"], ["item (2/2)"]]
LOADS = {"user": SlotLoad(1.0, 0.5, 10), "item": SlotLoad(2.0, 1.25, 1234)}
VERDICT = Verdict("EmbeddingLookup", "trainer waited 40% of the time, for lookups", "add shards (ps.num_shards)", 1)
METRICS = Metrics(960, 0.75, 0.5, 0.24, 0.25)
LEDGER = Ledger(1, 1000, 960, {"label is null": 10}, 30, {"shard 1": 5}, 970)
CONFIG = {
    "model": "dnn",
    "run_dir": "there",
    "data": {"batch_size": 32, "train": ["a.parquet"]},
    "slot": [{"name": "user", "dim": 32}],
    "slot_default": {"dim": 16},
    "ps": {"num_shards": 2},
    "status": {"print_interval": 10},
}


def times(*p50_ms: float, count: int = 30) -> list[StageSummary]:
    """Stages of that P50; P95 is twice, P99 three times, the longest four times as long."""
    return [StageSummary(count, count * ms * 1e3, ms * 1e3, 2e3 * ms, 3e3 * ms, 4e3 * ms) for ms in p50_ms]


def stages_of(**p50_ms: float) -> dict[str, StageSummary]:
    return dict(zip(p50_ms, times(*p50_ms.values()), strict=True))


STAGES = stages_of(PermitWait=0.5, ReadSample=0.007, EmbeddingLookup=27.6, TrainStep=25.0, PushGrad=3.0)


def shard(number: int) -> ShardFigures:
    signs = {"user": 300, "item": 200} if number == 0 else {"item": 500}
    return ShardFigures(
        number, f"ps-{number}", f"host:{number}", stages_of(Lookup=20.0 + number, Push=2.0), 622, 1000, 64_000_000, 0.4, 25, 3, 2,
        25, 0, {0: 10, 1: 30}, signs, [("user", 2**63 + 1, 0.125), ("item", 7, 0.0625)],
    )  # fmt: skip


def usage(cpu_s: float) -> list[Usage]:
    return [Usage("host:7", "host", cpu_s, 2_000_000, 8), Usage("host:8", "host", cpu_s / 2, 1_000_000, 8)]


def interval(step: int, rate: float = 3200.0, metrics: Metrics = METRICS) -> Interval:
    return Interval(1, step, rate / 32, rate, metrics, metrics)


EVENTS: list[Event] = [
    Started(2, 4, 2, 3, ["GPU:0"]), interval(10, 320.0), interval(20), interval(30, 1600.0), Remark("worker ps-1 was lost"),
    Saved("step-30", 30, "full", 20, 1000, 0.1, 0.2), Evaluated(1, 30, 0.5, METRICS),
]  # fmt: skip


def run_of(
    folder: Path,
    *,
    finished: bool = True,
    stages: Mapping[str, StageSummary] = STAGES,
    rate: float = 4000.0,
    config: Mapping[str, Any] = CONFIG,
    events: Sequence[Event] = EVENTS,
    shards: int = 2,
    verdict: Verdict | None = VERDICT,
) -> Path:
    """The files of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_bytes(msgspec.toml.encode(config))
    placed = [ShardReport(f"ps-{k}", SLOTS[k], PREDICTED[k], MEASURED[k]) for k in range(shards)]
    (folder / "placement.json").write_bytes(msgspec.json.encode(PlacementReport("measured on 100 examples", placed, LOADS)))
    found = [shard(number) for number in range(shards)]
    slow, other = stages_of(**dict.fromkeys(stages, 1.0)), TrainerStatus(1, 3.0, 29, "going", dict(stages), {})
    reports = [
        StatusReport(1.0, 10, slow, {}, found, usage(5.0), [], Verdict("FeedQueue", "evidence", "advice"), True),
        StatusReport(2.0, 20, dict(stages), {}, found, usage(6.0), [], verdict, True),
        StatusReport(4.0, 30, dict(stages), {"feed_queue_empty": 3}, found, usage(7.0), [other], verdict, True),
    ]
    written(folder / "status.jsonl", reports)
    written(folder / "metrics.jsonl", events)
    if finished:
        end = Finished(2, 30, 960, 4.0, 1.8e9, rate, 25.5, 0.031, False)
        test = Metrics(100, 0.75, 0.5, 0.25, 0.25)
        summary = {"finished": end, "test": test, "rows": 1244, "best_auc": 0.8, "ledger": LEDGER, "another": []}
        (folder / "summary.json").write_bytes(msgspec.json.encode(summary))
    return folder


def written(path: Path, events: Sequence[Event]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))


def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main([str(run_of(tmp_path))]) == 0
    said = capsys.readouterr().out
    assert "trained: 960 examples, 30 steps, 2 epoch(s) in 4.0 s" in said
    assert "test: auc = 0.7500" in said
    assert "shards: predicted → measured share in %" in said
    line = next(line for line in said.splitlines() if "│ 0 │ ps-0" in line)
    assert "2: user, item (1/2)" in line
    assert "40.0→41.0" in line
    assert "busiest shard: 1.10× the mean predicted, 1.10× the mean measured (load measured on 100 examples)" in said


def test_it_says_what_bounded_the_run_and_what_each_shard_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_of(tmp_path))]) == 0
    said = capsys.readouterr().out.splitlines()
    assert str(VERDICT) in said
    at = next(k for k, line in enumerate(said) if line.startswith("shard 0 (worker ps-0): "))
    assert said[at : at + 4] == [
        "shard 0 (worker ps-0): 622 of at most 1,000 rows (64.0 MB, index load 0.40), 55.0% of the load, 90.00% of the signs had a "
        "row; 3 evicted, 2 expired, 25 refused",
        "  heaviest slots: user 60.0%, item 40.0%",
        f"  hottest signs: user {2**63 + 1} 12.5%, item 7 6.2%",
        "  staleness: 0: 25.0%, 1: 75.0%",
    ]
    assert said[at + 4].startswith("shard 1 (worker ps-1): ")
    assert said[-1] == (
        "ledger: 1,000 read = 960 trained + 10 dropped (10 label is null) + 30 replayed; rows of shard 1 have not learned 5 of "
        "those trained"
    )


def test_a_run_that_has_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_of(tmp_path, finished=False))]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}: the run has not finished, or failed" in said
    assert "bound by EmbeddingLookup on shard 1" in said
    assert "ledger" not in said


def test_a_run_that_failed_before_it_placed_slots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(tmp_path, finished=False)
    (tmp_path / "placement.json").unlink()
    for name in ("status.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_bytes(b"")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: the run has not finished, or failed\n"


def test_a_directory_that_is_no_runs(tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, "-m", "flowps.report", str(tmp_path)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == (
        f"error: {tmp_path}/config.toml: cannot be read: No such file or directory; is this the directory of a run?\n"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("placement.json", '{"shards": 3}'),
        ("summary.json", '{"finished": {"type": "Finished"}}'),
        ("status.jsonl", '{"type": "StatusReport", "seconds": 1.0, "step": 3, "bottleneck": "the hub"}\n'),
        ("status.jsonl", "not JSON\n"),
        ("config.toml", "not TOML"),
    ],
)
def test_a_file_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str) -> None:
    (run_of(tmp_path) / name).write_text(content)
    assert main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/{name}: is no file of this version of flowps: ")
    assert said.count("\n") == 1


def test_of_many_shards_the_busiest_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(tmp_path)
    written(tmp_path / "status.jsonl", [StatusReport(1.0, 30, STAGES, {}, [shard(k) for k in range(11)])])
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.startswith("shard ")] == [str(k) for k in range(3, 11)]
    assert "… and 3 shards less busy" in said


def test_a_line_that_is_being_written_does_not_count(tmp_path: Path) -> None:
    run_of(tmp_path, finished=False)
    long = msgspec.json.encode(StatusReport(9.0, 99, dict.fromkeys(map(str, range(3000)), STAGES["TrainStep"]), {}))
    assert len(long) > 1 << 17
    with (tmp_path / "status.jsonl").open("ab") as file:
        file.write(long[:-9])
    assert read_run(tmp_path).steps == 30
    assert len(list(read_run(tmp_path).reports())) == 3
    with (tmp_path / "status.jsonl").open("ab") as file:
        file.write(long[-9:] + b"\n{")
    assert read_run(tmp_path).steps == 99
    assert len(list(read_run(tmp_path).reports())) == 4


def test_numbers_that_were_none_are_read_back(tmp_path: Path) -> None:
    """JSON has no NaN: it is written as null."""
    run_of(tmp_path, events=[interval(10, metrics=Metrics(0, None, float("nan"), float("nan"), float("nan")))])
    (found,) = read_run(tmp_path).events()
    assert isinstance(found, Interval)
    assert found.metrics.auc is None
    assert found.metrics.logloss != found.metrics.logloss


def test_time_goes_on_when_a_run_begins_again(tmp_path: Path) -> None:
    run_of(tmp_path)
    written(tmp_path / "status.jsonl", [StatusReport(seconds, 1, {}, {}) for seconds in (3.0, 6.0, 3.0, 4.0, 1.0)])
    assert [seconds for seconds, _ in read_run(tmp_path).reports()] == [3.0, 6.0, 9.0, 10.0, 11.0]

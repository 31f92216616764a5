"""Retraining: ranges, late and changed files, what blocks nobody, what goes and what stays. Minutes: `make test-long`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flowps.errors import CapacityError, ConfigError, DataError, RunDirError
from tests.scored import columns_of, write
from tests.workflows.pipelines import ROWS, Days, Killed, go, ledger_of, quiet, said, trained_rows
from workflows.pipeline import read_pipeline
from workflows.retrain import Wanted, main, retrain, show_plan

pytestmark = pytest.mark.timeout(240)


def test_a_file_that_was_written_anew_is_shown_and_not_trained_by_itself(three_days: Callable[[], Days]) -> None:
    days = three_days()
    days.day(2, columns=columns_of(ROWS + 10, seed=200))
    assert go(days) == []
    console = quiet()
    show_plan(days.read(), Wanted(), console)
    assert "published as model 2, 1 file(s) changed since" in said(console)
    assert go(days, first=days.slot(2), last=days.slot(2), again=True) == [("2024-09-02", "again", "published")]
    assert days.registry.record(4).examples == ROWS + 10


def test_the_same_file_twice_in_a_slot_is_trained_once(tmp_path: Path) -> None:
    days = Days(tmp_path)
    path = days.day(1)
    (path.parent / "copy.parquet").write_bytes(path.read_bytes())
    days.day(1, part=1)
    assert go(days) == [("2024-09-01", "new", "published")]
    assert trained_rows(days, "2024-09-01-1") == 2 * ROWS


def test_a_range_is_filled_in_and_trained_anew_when_asked(tmp_path: Path) -> None:
    days = Days(tmp_path, partitions={"first": "2024-09-03"})
    for number in (1, 2, 3):
        days.day(number)
    assert go(days) == [("2024-09-03", "new", "published")]
    wanted = {"first": days.slot(2), "last": days.slot(3)}
    assert go(days, **wanted) == [("2024-09-02", "late", "published")]
    assert go(days, **wanted) == []
    assert go(days, **wanted, again=True) == [("2024-09-02", "again", "published"), ("2024-09-03", "again", "published")]
    assert days.registry.live() == 4
    assert go(days) == [], "the request is done"


def test_slots_that_are_too_late_are_left_to_a_backfill(tmp_path: Path) -> None:
    days = Days(tmp_path, partitions={"late_s": 2 * 86_400.0})
    days.day(9)
    assert go(days) == [("2024-09-09", "new", "published")]
    days.day(6)
    days.day(7)
    assert go(days) == [("2024-09-07", "late", "published")]
    assert go(days, first=days.slot(1), last=days.slot(30)) == [("2024-09-06", "late", "published")]


def test_an_interrupted_request_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    days = Days(tmp_path)
    for number in (1, 2):
        days.day(number)
    go(days)

    def kill(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("workflows.retrain.prune", kill)  # after the first of them
        with pytest.raises(Killed):
            go(days, first=days.slot(1), last=days.slot(2), again=True)
    assert go(days) == [("2024-09-02", "again", "published")]
    with closing(ledger_of(days)) as ledger:
        assert [of.slot for of in ledger.attempts() if of.kind == "again"] == ["2024-09-01", "2024-09-02"]
        assert ledger.requested() is None


def test_a_column_more_is_no_harm(three_days: Callable[[], Days]) -> None:
    days = three_days()
    days.day(4, columns={**columns_of(ROWS, seed=400), "price2": np.ones(ROWS, np.float32)})
    console = quiet()
    (ended,) = retrain(days.read(), Wanted(), console)
    assert ended.status == "published"
    assert "left out, for the live model does not know them: columns price2" in said(console)
    days.day(5)
    assert go(days) == [("2024-09-05", "new", "published")]


def test_a_store_that_does_not_answer_once_is_no_fault_of_the_slot(
    three_days: Callable[[], Days], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt stays where it was; what is the same at the next start rejects the slot."""
    days = three_days()
    days.day(4)

    def silent(*arguments: Any) -> Any:
        raise DataError("part-0.parquet: row groups [0] cannot be read: timed out") from OSError("timed out")

    with monkeypatch.context() as patch:
        patch.setattr("workflows.check.read_table", silent)
        with pytest.raises(DataError, match="timed out"):
            go(days)
    with closing(ledger_of(days)) as ledger:
        assert (running := ledger.running()) is not None
        assert running.slot == "2024-09-04"
    assert go(days) == [("2024-09-04", "new", "published")]
    days.day(5)
    with monkeypatch.context() as patch:
        patch.setattr("workflows.check.read_table", silent)
        with pytest.raises(DataError):
            go(days)
        assert go(days) == [("2024-09-05", "new", "rejected")]


def test_what_a_killed_run_left_of_a_checkpoint_is_none(three_days: Callable[[], Days]) -> None:
    days = three_days()
    days.day(4)
    left = days.folder / "state" / "runs" / "2024-09-04-4" / "checkpoints" / "step-000000002-aaaaaa"
    left.mkdir(parents=True)
    (left / "shard-0").write_bytes(b"half")
    (left.parents[1] / "config.toml").write_text("")
    (left.parents[1] / "schema.json").write_bytes((days.folder / "state/runs/2024-09-03-3/schema.json").read_bytes())
    assert go(days) == [("2024-09-04", "new", "published")]
    assert trained_rows(days, "2024-09-04-4") == ROWS


def test_a_fixed_set_that_does_not_fit_is_no_fault_of_a_slot(
    three_days: Callable[[], Days], capsys: pytest.CaptureFixture[str]
) -> None:
    days = three_days()
    days.day(4)
    whole = (days.folder / "fixed.parquet").read_bytes()
    write(days.folder / "fixed.parquet", pa.table(columns_of(50)).drop(["city"]))
    with pytest.raises(ConfigError, match=r"^gate\.fixed: .*no column 'city'"):
        go(days)
    (days.folder / "fixed.parquet").write_bytes(whole)
    assert go(days) == [("2024-09-04", "new", "published")]


def test_a_slot_in_the_future_does_not_stop_the_others(tmp_path: Path) -> None:
    days = Days(tmp_path)
    for name in ("2204-01-01", "9999-12-31"):
        write(tmp_path / "days" / f"date={name}" / "part.parquet", columns_of(5)).with_name("_SUCCESS").touch()
    days.day(1)
    assert go(days) == [("2024-09-01", "new", "published")]
    console = quiet()
    show_plan(days.read(), Wanted(), console)
    assert said(console).count("waits for its time: it is in the future") == 2


def test_a_pipeline_may_be_spelled_in_many_ways(tmp_path: Path) -> None:
    days = Days(tmp_path, partitions={"root": "../pipe/days/../days"} if tmp_path.name == "pipe" else {"root": "./days/../days"})
    days.day(1)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    read = read_pipeline(tmp_path / "link" / ".." / tmp_path.name / "pipeline.toml")
    assert [of.status for of in retrain(read, Wanted(), quiet())] == ["published"]
    assert go(days) == []


def test_an_attempt_that_fails_at_every_start_can_be_given_up(
    three_days: Callable[[], Days], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    days = three_days()
    days.day(4)

    def full(*arguments: Any) -> Any:
        raise CapacityError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("workflows.attempt.train", full)
        for _ in range(2):
            with pytest.raises(CapacityError):
                go(days)
    assert main([str(days.path), "--give-up"]) == 0
    assert "2024-09-04: given up; --backfill 2024-09-04 2024-09-04 --again trains it anew" in capsys.readouterr().out
    assert go(days) == []


def test_a_base_that_was_rolled_back_does_not_block(three_days: Callable[[], Days], monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that was begun from a model whose run has gone, and then another model is made live."""
    days = three_days()
    days.registry.promote(1, "promoted")
    days.day(4)
    gone = days.folder / "state" / "runs" / "2024-09-01-1"
    gone.rename(gone.with_name("away"))
    with pytest.raises(RunDirError):
        go(days)
    days.registry.promote(3, "promoted")
    assert go(days) == [("2024-09-04", "new", "superseded"), ("2024-09-04", "new", "published")]


def test_a_registry_that_has_gone_is_not_begun_anew(three_days: Callable[[], Days]) -> None:
    days = three_days()
    days.day(4)
    (days.folder / "registry" / "models" / "current").unlink()
    with pytest.raises(RunDirError, match="has no live model, but the ledger says that models were published"):
        go(days)


def test_old_runs_go_and_those_that_are_needed_stay(tmp_path: Path) -> None:
    days = Days(tmp_path, keep_runs=2, publish={"keep": 2})
    for number in range(1, 6):
        days.day(number)
    go(days)
    assert sorted(path.name for path in (tmp_path / "state" / "runs").iterdir()) == ["2024-09-04-4", "2024-09-05-5"]
    assert days.registry.kept() == [4, 5]
    days.registry.promote(4, "rolled back")
    days.day(6)
    assert go(days) == [("2024-09-06", "new", "published")]
    assert {path.name for path in (tmp_path / "state" / "runs").iterdir()} == {"2024-09-04-4", "2024-09-05-5", "2024-09-06-6"}
    assert days.registry.record(6).parent == 4


def test_a_live_model_whose_run_has_gone_is_said(tmp_path: Path) -> None:
    days = Days(tmp_path)
    days.day(1)
    go(days)
    shutil.rmtree(tmp_path / "state" / "runs" / "2024-09-01-1")
    days.day(2)
    with pytest.raises(
        RunDirError, match=r"model 1 was trained in .*2024-09-01-1, which is not here; .* bring it back, or roll back"
    ):
        go(days)

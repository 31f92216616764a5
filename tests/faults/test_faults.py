"""A run loses a process, goes back to the last cut, and comes to what it would have come to. `long_faults` does so very often."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import ROWS, assert_same, train_command
from tests.faults.harness import EPOCHS, MANY, PROCESSES, RECOVERY_S, assert_adds_up, events, summary, victim

pytestmark = pytest.mark.timeout(400)


def test_a_shard_and_then_a_trainer_are_killed(samples: Path, unharmed: Path, tmp_path: Path) -> None:
    with victim(samples, tmp_path / "run", *MANY) as run:
        for role in ("ps-1", "trainer-0"):
            run.wait_for_checkpoint()
            run.hurt(role)
            run.command.wait_for(rf"worker {role} at tcp://\S+ was lost, .*; all roles go back to step \d+", RECOVERY_S)
        run.command.succeed(timeout_s=2 * RECOVERY_S)
    assert_adds_up(tmp_path / "run", EPOCHS * ROWS)
    assert_same(tmp_path / "run", unharmed)


def test_only_the_shard_that_is_lost_goes_back(samples: Path, tmp_path: Path) -> None:
    """Everybody else goes on: nothing is read again, and what the shard has not learned is counted and said."""
    run_dir, said = tmp_path / "run", []
    with victim(samples, run_dir, *MANY, "--checkpoint.recovery", "partial") as run:
        for role, how in (("ps-1", signal.SIGKILL), ("ps-0", signal.SIGSTOP)):
            run.wait_for_checkpoint()
            pid = run.hurt(role, how)
            run.command.wait_for(rf"worker {role} at .*; shard {role[-1]} goes back to step \d+ alone$", RECOVERY_S)
            said.append(run.command.wait_for(rf"^shard {role[-1]} is back; its rows have not learned ([\d,]+) of", RECOVERY_S)[1])
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGCONT)
        saved = run.wait_for_checkpoint()
        out = run.command.succeed(timeout_s=2 * RECOVERY_S)
    ledger = assert_adds_up(run_dir, EPOCHS * ROWS)
    assert ledger["replayed"] == 0
    unlearned = dict(zip(("shard 1", "shard 0"), (int(count.replace(",", "")) for count in said), strict=True))
    assert ledger["unlearned"] == unlearned
    assert any(unlearned.values())
    for shard, count in unlearned.items():
        assert f"rows of {shard} have not learned {count:,} of those trained" in out
    assert next(event for event in events(run_dir, "Saved") if event["step"] == saved)["kind"] == "full"
    assert summary(run_dir)["test"]["auc"] > 0.8


def test_the_command_is_killed_and_started_again(samples: Path, unharmed: Path, tmp_path: Path) -> None:
    with victim(samples, tmp_path / "run", *MANY) as run:
        step = run.wait_for_checkpoint()
        processes = run.command.processes()
        run.command.signal(signal.SIGKILL)
        assert run.command.end(RECOVERY_S) == -signal.SIGKILL
    _, alive = psutil.wait_procs(processes, timeout=RECOVERY_S)
    assert not alive, "a process outlives the command"
    with closing(train_command(samples, tmp_path / "run", *PROCESSES, *MANY, "--resume")) as command:
        said = command.succeed(timeout_s=RECOVERY_S)
    assert "going on from" in said
    assert summary(tmp_path / "run")["ledger"]["trained"] == EPOCHS * ROWS
    assert events(tmp_path / "run", "Saved")[0]["step"] >= step - 25
    assert_same(tmp_path / "run", unharmed)

"""A process of a run hangs instead of dying: it is taken from the run once it has given no sign of life for long enough.

And a shard that is lost, or hangs, goes back alone where the run asks for that.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import ROWS, assert_same
from tests.faults.harness import EPOCHS, MANY, RECOVERY_S, assert_adds_up, events, summary, victim

pytestmark = pytest.mark.timeout(400)


def test_a_shard_that_hangs_is_lost_and_nobody_listens_when_it_wakes(samples: Path, unharmed: Path, tmp_path: Path) -> None:
    with victim(samples, tmp_path / "run", *MANY) as run:
        run.wait_for_checkpoint()
        pid = run.hurt("ps-0", signal.SIGSTOP)
        run.command.wait_for(r"worker ps-0 at \S+ has given no sign of life for \d+ s, and shard 0 is lost with it", RECOVERY_S)
        run.wait_for_checkpoint()
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGCONT)
        run.command.succeed(timeout_s=2 * RECOVERY_S)
    assert_adds_up(tmp_path / "run", EPOCHS * ROWS)
    assert_same(tmp_path / "run", unharmed)


def test_a_hub_that_hangs_is_read_around(samples: Path, unharmed: Path, tmp_path: Path) -> None:
    """Dask itself would wait five minutes. Nobody goes back, and no sample is read twice."""
    with victim(samples, tmp_path / "run", *MANY) as run:
        run.wait_for_checkpoint()
        pid = run.hurt("hub", signal.SIGSTOP)
        run.command.wait_for(r"^worker hub at \S+ has given no sign of life for \d+ s: what it had to read", RECOVERY_S)
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGCONT)
        run.command.succeed(timeout_s=2 * RECOVERY_S)
    assert assert_adds_up(tmp_path / "run", EPOCHS * ROWS)["replayed"] == 0
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


def test_a_shard_and_then_a_trainer_are_killed(samples: Path, unharmed: Path, tmp_path: Path) -> None:
    with victim(samples, tmp_path / "run", *MANY) as run:
        for role in ("ps-1", "trainer-0"):
            run.wait_for_checkpoint()
            run.hurt(role)
            run.command.wait_for(rf"worker {role} at tcp://\S+ was lost, .*; all roles go back to step \d+", RECOVERY_S)
        run.command.succeed(timeout_s=2 * RECOVERY_S)
    assert_adds_up(tmp_path / "run", EPOCHS * ROWS)
    assert_same(tmp_path / "run", unharmed)

"""A run loses a process, goes back to the last cut, and comes to what it would have come to. `long_faults` does so very often."""

from __future__ import annotations

import signal
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import ROWS, assert_same, train_command
from tests.faults.harness import EPOCHS, MANY, PROCESSES, RECOVERY_S, events, summary, victim

pytestmark = pytest.mark.timeout(400)


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

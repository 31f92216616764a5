"""A process of a run hangs instead of dying: it is taken from the run once it has given no sign of life for long enough."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import ROWS, assert_same
from tests.faults.harness import EPOCHS, MANY, RECOVERY_S, assert_adds_up, victim

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

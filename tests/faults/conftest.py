"""The samples of the cluster's tests, and what a run comes to that loses nothing."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from tests.cluster.conftest import samples, train_command
from tests.faults.harness import MANY

__all__ = ["samples", "unharmed"]


@pytest.fixture(scope="module")
def unharmed(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What such a run comes to in one process, without losses and checkpoints."""
    run_dir = tmp_path_factory.mktemp("unharmed") / "run"
    knobs = ("--cluster.dashboard", "", "--status.print_interval", 25, "--checkpoint.every_s", 0)
    with closing(train_command(samples, run_dir, *MANY, *knobs)) as command:
        command.succeed()
    return run_dir

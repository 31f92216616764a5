"""`--cluster.mode processes`: the roles in processes of this machine, and what becomes of them when the command is told to stop."""

from __future__ import annotations

import random
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
import pytest

from flowps.train import main
from tests.cluster.conftest import KNOBS, Command, assert_same, losses, rows_of, train_command

PROCESSES = ("--cluster.mode", "processes", "--cluster.dashboard", "")


class Start(Protocol):
    def __call__(self, run_dir: Path, *knobs: object, environment: Mapping[str, object] | None = None) -> Command: ...


@pytest.fixture
def start(samples: Path) -> Iterator[Start]:
    """Start a run in processes; nothing of it is left at the end of the test."""
    with ExitStack() as opened:

        def start(run_dir: Path, *knobs: object, environment: Mapping[str, object] | None = None) -> Command:
            command = train_command(samples, run_dir, *PROCESSES, *knobs, environment=environment)
            opened.callback(command.close)
            return command

        yield start


def test_two_shards_train_what_one_process_trains(start: Start, embedded: Path, tmp_path: Path) -> None:
    """That with one batch in flight, these with two whose rows are found ahead and read after the push before."""
    said = start(tmp_path / "run", "--ps.num_shards", 2, "--trainer.in_flight", 2, "--trainer.max_staleness", 0).succeed()
    assert_same(tmp_path / "run", embedded)
    # Who has what is said before, and what it came to after.
    assert re.search(
        r"shards: predicted share.*ps-0 .*ps-1 .*step 5, .*shards: predicted → measured share.*ps-0 .*ps-1 ", said, re.S
    )
    assert re.search(
        r"busiest shard: \d\.\d\d× the mean predicted, \d\.\d\d× the mean measured \(load measured on the first 100", said
    )


def has_tensorflow(process: psutil.Process) -> bool:
    """Whether it has loaded TensorFlow, whose import cannot be hidden from the kernel."""
    return any("tensorflow" in mapped.path for mapped in process.memory_maps())


@pytest.mark.long
def test_ctrl_c_stops_after_the_step_and_leaves_nothing_but_what_was_trained(start: Start, embedded: Path, tmp_path: Path) -> None:
    """On the way: one shard's losses are those of one process, and only the trainer has loaded TensorFlow."""
    command = start(tmp_path / "run", "--epochs", 1_000_000)
    command.wait_for("^step 25, real_mean")
    running = command.processes()
    workers = [process for process in running[1:] if "spawn_main" in " ".join(process.cmdline())]
    assert len(workers) == 3, "a hub, a shard, a trainer"
    assert [has_tensorflow(process) for process in [running[0], *workers]].count(True) == 1

    command.signal(signal.SIGINT, group=True)
    said = command.refuse(status=130)
    assert re.search(r"stopped by a signal after [\d,]+ examples; what was trained is in .*/run$", said)
    _, left = psutil.wait_procs(running, timeout=10)
    assert left == []
    of_one = losses(embedded)
    np.testing.assert_allclose(losses(tmp_path / "run")[: len(of_one)], of_one, rtol=1e-5)
    assert {slot: rows.keys() for slot, rows in rows_of(tmp_path / "run").items()} == {
        slot: rows.keys() for slot, rows in rows_of(embedded).items()
    }
    assert (tmp_path / "run" / "model.keras").exists()


@pytest.fixture
def drawing() -> Iterator[None]:
    """Python's own random numbers are drawn by another thread all the time, as Dask's do now and then."""
    stop = threading.Event()

    def draw() -> None:
        while not stop.wait(1e-4):
            random.random()

    thread = threading.Thread(target=draw)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.usefixtures("drawing")
def test_the_synchronous_mode_is_reproducible_whatever_else_draws_random_numbers(samples: Path, tmp_path: Path) -> None:
    for name in "ab":
        knobs = ("--data.train", samples / "train.parquet", *KNOBS, "--cluster.dashboard", "", "--model", "dnn")
        assert main([*map(str, knobs), "--run_dir", str(tmp_path / name)]) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")

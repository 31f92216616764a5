"""Scoring in processes that are killed, and commands that are stopped. For `make test-long`."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.cluster.conftest import PYTHON, Command
from tests.scored import columns_of, train_run, write

ROWS, FILES = 4000, 12
RECOVERY_S = 120.0
PROCESSES = (
    *("--cluster.mode", "processes", "--cluster.dashboard", "", "--trainer.count", 2, "--ps.num_shards", 2),
    *("--data.batch_size", 16, "--cluster.lost_after_s", 4),
)
# Lets the processes say who they are, and how far.
PRELOAD = """
import os
from flowps.cluster import score_role
from flowps.cluster.prediction_folder import PredictionFolder

if not hasattr(score_role, "told"):  # Dask loads a preload twice
    score_role.told = score_role._forward, PredictionFolder.put


def telling_forward(*arguments):
    found = score_role.told[0](*arguments)
    print("a scorer begins", flush=True)
    return found


def telling_put(folder, local, name):
    score_role.told[1](folder, local, name)
    print(f"written {name}", flush=True)


def dask_setup(worker):
    print(f"{worker.name} is {os.getpid()}", flush=True)


score_role._forward, PredictionFolder.put = telling_forward, telling_put
"""
AGAIN = "what was not finished is scored again"
Start = Callable[..., Command]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run, many samples to score for a while, and `reference`, their predictions by one process."""
    folder = tmp_path_factory.mktemp("long-scoring")
    train_run(folder)
    for k in range(FILES):
        write(folder / "data" / f"part-{k:02}.parquet", columns_of(ROWS, seed=k), row_group_size=1000)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    """What one process writes."""
    from flowps.predict import main

    assert main([str(folder / "run"), str(folder / "data"), str(folder / "reference"), "--data.batch_size", "16"]) == 0
    return folder / "reference"


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Start a command in processes; nothing of it is left at the end of the test."""
    (folder / "telling.py").write_text(PRELOAD)
    environment = {"DASK_DISTRIBUTED__WORKER__PRELOAD": [str(folder / "telling.py")]}
    with ExitStack() as opened:

        def start(command: str, *words: object) -> Command:
            words = (*PYTHON, f"flowps.{command}", folder / "run", folder / "data", *words, *PROCESSES)
            started = Command(*words, cwd=folder, environment=environment)
            opened.callback(started.close)
            return started

        yield start


def names(out: Path) -> set[str]:
    return {path.name for path in out.glob("part-*.parquet")}


def pid_of(command: Command, role: str) -> int:
    """Of the process that has a role, as it was started last."""
    return int(dict(re.findall(r"^(\S+) is (\d+)$", command.said, re.MULTILINE))[role])


def assert_same(out: Path, reference: Path) -> None:
    assert names(out) == names(reference)
    assert len(names(out)) == FILES
    for name in names(out):
        assert pq.read_table(out / name).equals(pq.read_table(reference / name)), name
    assert (out / "_SUCCESS").exists()


def test_a_scorer_that_is_killed_is_made_up_for(start: Start, reference: Path, tmp_path: Path) -> None:
    """Files that were whole are not written again."""
    out = tmp_path / "out"
    command = start("predict", out)
    whole = command.wait_for(r"^written (\S+)$", RECOVERY_S)[1]
    before = (out / whole).stat().st_mtime_ns
    os.kill(pid_of(command, "trainer-1"), signal.SIGKILL)
    command.wait_for(rf"^worker trainer-1 at .* was lost, and trainer 1 with it: .*; {AGAIN}$", RECOVERY_S)
    said = command.succeed(RECOVERY_S)
    assert f"predictions of {ROWS * FILES:,} samples are in {out}" in said
    assert "Traceback" not in said
    assert_same(out, reference)
    assert (out / whole).stat().st_mtime_ns == before
    written = re.findall(r"^written (\S+)$", said, re.MULTILINE)
    assert sorted(written) == sorted(names(reference)), "each once"


def test_a_shard_that_is_killed_is_made_up_for_in_an_evaluation(start: Start, folder: Path, tmp_path: Path) -> None:
    """Nothing is counted twice."""
    from flowps.evaluate import main

    assert main([str(folder / "run"), str(folder / "data"), "--json", str(tmp_path / "one.json"), "--data.batch_size", "16"]) == 0
    command = start("evaluate", "--json", tmp_path / "several.json")
    command.wait_for("^a scorer begins$", RECOVERY_S)
    os.kill(pid_of(command, "ps-1"), signal.SIGKILL)
    command.wait_for(rf"^worker ps-1 at .* was lost, and shard 1 with it: .*; {AGAIN}$", RECOVERY_S)
    command.succeed(RECOVERY_S)
    assert (tmp_path / "several.json").read_bytes() == (tmp_path / "one.json").read_bytes()


def test_ctrl_c_stops_and_leaves_whole_files_alone(start: Start, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = start("predict", out)
    command.wait_for(r"^written ", RECOVERY_S)
    running = command.processes()
    command.signal(signal.SIGINT, group=True)
    assert "asked to stop" in command.refuse(status=130)
    assert re.search("stopping; whole files stay; Ctrl-C again stops at once", command.said)
    _, left = psutil.wait_procs(running, timeout=10)
    assert left == []
    assert not (out / "_SUCCESS").exists()
    assert 0 < len(names(out)) < FILES
    assert {path.name for path in out.iterdir()} == names(out), "nothing unfinished"
    before = {name: (out / name).stat().st_mtime_ns for name in names(out)}

    again = start("predict", out)
    said = again.succeed(RECOVERY_S)
    assert f"{len(before)} file(s) are there already" in said
    assert_same(out, reference)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_a_command_that_is_killed_leaves_no_process(start: Start, reference: Path, tmp_path: Path) -> None:
    """And can be begun again."""
    out = tmp_path / "out"
    command = start("predict", out)
    command.wait_for(r"^written ", RECOVERY_S)
    running = command.processes()
    command.signal(signal.SIGKILL)
    assert command.end(RECOVERY_S) == -signal.SIGKILL
    _, alive = psutil.wait_procs(running, timeout=RECOVERY_S)
    assert not alive
    start("predict", out).succeed(RECOVERY_S)
    assert_same(out, reference)

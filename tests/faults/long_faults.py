"""Every role is killed at random moments, over and over, while a run trains on real data; and its checkpoints' disk fills up. For
`make faults`.

Each run suffers some kills, comes to its end by itself or is started again where the command was killed, and must have trained
every sample of every epoch once. Where all roles go back, the model is to the bit that of a run which lost nothing. FLOWPS_KILLS
(100) and FLOWPS_SEED (0) say how often and when; with FLOWPS_RESULT what came of them is written there, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from bench import faults, machine
from flowps.checkpoint.manifest import check, found
from flowps.checkpoint.store import Store
from tests.checkpoint.conftest import disk_of
from tests.cluster.conftest import ROWS, Command, rows_of, train_command
from tests.faults.harness import PROCESSES, RECOVERY_S, Victim, assert_adds_up, events, summary, victim

KILLS, SEED = int(os.environ.get("FLOWPS_KILLS", "100")), int(os.environ.get("FLOWPS_SEED", "0"))
A_RUN = 10  # kills
ROLES = ("hub", "ps-0", "ps-1", "trainer-0", "command", "ps-0 stopped")
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "ml100k"
TRAIN_S = 600.0  # for a few thousand steps
_LONGEST_S = 8.0  # between two kills, from a checkpoint on


@pytest.mark.skipif(not DATA.exists(), reason="needs the data set ml100k beside the checkout")
def test_a_run_survives_whatever_is_killed(tmp_path: Path) -> None:
    chance, kills = random.Random(SEED), list[faults.Kill]()
    try:
        for number in range(-(-KILLS // A_RUN)):
            recovery = ("rollback", "partial")[number % 2]
            run_dir = tmp_path / f"run-{number}"
            for kill in _run_and_kill(run_dir, recovery, min(A_RUN, KILLS - number * A_RUN), chance):
                kills.append(kill)
                print(f"\nrun {number}, {recovery}: {kill}", end="", flush=True)
            epochs = _end(run_dir, recovery)
            if recovery == "rollback":
                with closing(_start(tmp_path / f"unharmed-{number}", recovery, "--epochs", epochs)) as command:
                    command.succeed(TRAIN_S)
                _assert_equal_to_the_bit(run_dir, tmp_path / f"unharmed-{number}")
    finally:
        result = {"seed": SEED, "kills": [kill.to_json() for kill in kills], "machine": machine.describe()}
        print(f"\n{faults.markdown(result)}")
        if path := os.environ.get("FLOWPS_RESULT"):
            Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    assert len(kills) == KILLS


def _run_and_kill(run_dir: Path, recovery: str, count: int, chance: random.Random) -> Iterator[faults.Kill]:
    """Start a run, kill something as often, and stop it."""
    command = _start(run_dir, recovery)
    try:
        run = Victim(command)
        run.wait_for_checkpoint()
        for _ in range(count):
            role, while_saving = chance.choice(ROLES), chance.random() < 0.5
            time.sleep(chance.uniform(0, _LONGEST_S))
            pid = command.pid if role == "command" else run.pid_of(role.partition(" ")[0])
            while_saving = while_saving and _wait_until_one_is_written(run_dir / "checkpoints")
            began = time.monotonic()
            if role == "command":
                processes = command.processes()
                command.signal(signal.SIGKILL)
                command.end(RECOVERY_S)
                command.close()
                assert not psutil.wait_procs(processes, timeout=RECOVERY_S)[1], "a process outlives the command"
                command = _start(run_dir, recovery, "--resume")
                run = Victim(command)
            else:
                name, _, how = role.partition(" ")
                os.kill(pid, signal.SIGSTOP if how else signal.SIGKILL)
                if name != "hub":
                    command.wait_for(rf"worker {name} at .*; (all roles go|shard \d goes) back to ", RECOVERY_S)
            command.wait_for(r"^step \d+, auc", RECOVERY_S)
            seconds = None if role == "hub" else time.monotonic() - began
            yield faults.Kill(recovery, role, while_saving, run.wait_for_checkpoint(), seconds)
        command.signal(signal.SIGTERM)  # enough: it saves itself
        assert command.end(RECOVERY_S) == 130, command.said
    finally:
        command.close()


def _wait_until_one_is_written(checkpoints: Path) -> bool:
    """Whether a checkpoint has come that has files and no manifest."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        newest = max(checkpoints.iterdir(), default=None)
        if newest is not None and not (newest / "manifest.json").exists() and any(newest.iterdir()):
            return True
        time.sleep(0.001)
    return False


def _end(run_dir: Path, recovery: str) -> int:
    """Train on to the end of the epoch, with nothing left behind; returns the number of epochs."""
    epochs = summary(run_dir)["ledger"]["epoch"] + 1
    with closing(_start(run_dir, recovery, "--resume", "--epochs", epochs)) as last:
        last.succeed(TRAIN_S)
    assert not [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE], "a process is left"
    ledger = assert_adds_up(run_dir, epochs * summary(run_dir)["examples_per_epoch"])
    assert not ledger["unlearned"] or recovery == "partial"
    return int(epochs)


def _start(run_dir: Path, recovery: str, *knobs: object) -> Command:
    epochs = () if "--epochs" in knobs else ("--epochs", 100_000)
    return train_command(
        DATA, run_dir, *PROCESSES, "--data.batch_size", 512, "--data.partition_rows", 16_384, "--checkpoint.every_steps", 100,
        "--checkpoint.recovery", recovery, *epochs, *knobs,
    )  # fmt: skip


def _assert_equal_to_the_bit(run_dir: Path, reference: Path) -> None:
    there, here = rows_of(run_dir), rows_of(reference)
    assert there.keys() == here.keys()
    for slot, rows in here.items():
        assert there[slot].keys() == rows.keys(), slot
        for sign, floats in rows.items():
            np.testing.assert_array_equal(there[slot][sign], floats, slot)
    assert summary(run_dir)["test"] == summary(reference)["test"]


def test_two_trainers_go_on_when_a_shard_is_lost(samples: Path, tmp_path: Path) -> None:
    """Both wait for it, what each has pushed since the cut is counted, and nothing is read again."""
    run_dir, epochs = tmp_path / "run", 24
    trainers = ("--trainer.count", 2, "--trainer.in_flight", 2, "--trainer.max_staleness", 0)
    # Two that import TensorFlow on two slow cores give no sign of life for longer than the harness's 4 s.
    trainers = (*trainers, "--cluster.lost_after_s", 10)
    knobs = ("--epochs", epochs, *trainers, "--checkpoint.recovery", "partial")
    with victim(samples, run_dir, *knobs) as run:
        for _ in range(2):
            run.wait_for_checkpoint()
            run.hurt("ps-1")
            run.command.wait_for(r"^shard 1 is back; its rows have not learned ([\d,]+) of", RECOVERY_S)
        run.command.succeed(timeout_s=2 * RECOVERY_S)
    ledger = assert_adds_up(run_dir, epochs * ROWS)
    assert ledger["replayed"] == 0
    assert ledger["unlearned"]["shard 1"] > 0


# --- a disk that is full ------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for a few checkpoints of `samples`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with disk_of("300k", folder):
        yield folder


def test_on_a_full_disk_a_run_trains_on_and_goes_back_to_what_was_saved(samples: Path, disk: Path, tmp_path: Path) -> None:
    """A shard is killed after the disk was full."""
    run_dir, epochs = tmp_path / "run", 24
    knobs = ("--epochs", epochs, "--checkpoint.url", disk, "--checkpoint.on_error", "warn", "--checkpoint.keep", 1_000)
    with victim(samples, run_dir, *knobs) as run:
        run.wait_for_checkpoint()
        run.command.wait_for(r"^no checkpoint: .*No space left on device", RECOVERY_S)
        run.hurt("ps-1")
        run.command.wait_for(r"worker ps-1 at .*; all roles go back to step \d+$", RECOVERY_S)
        run.command.succeed(timeout_s=2 * RECOVERY_S)
    assert_adds_up(run_dir, epochs * ROWS)
    whole = {folder.name for folder in disk.iterdir() if (folder / "manifest.json").exists()}
    assert whole == {event["name"] for event in events(run_dir, "Saved")}
    for manifest in found(Store(str(disk))):
        if manifest.manifest is not None:
            check(Store(str(disk)), manifest.manifest)


def test_on_a_full_disk_a_run_stops_where_it_is_told_to(samples: Path, disk: Path, tmp_path: Path) -> None:
    knobs = ("--epochs", 1_000, "--checkpoint.url", disk, "--checkpoint.keep", 1_000)
    with victim(samples, tmp_path / "run", *knobs) as run:
        said = run.command.refuse(timeout_s=2 * RECOVERY_S)
    assert "No space left on device" in said
    assert "what was trained before" in said

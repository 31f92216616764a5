"""Every role is killed at random moments, over and over, while a run trains on real data. For `make faults`.

Each run suffers some kills, comes to its end by itself or is started again where the command was killed, and must have trained
every sample of every epoch once. FLOWPS_KILLS (100) and FLOWPS_SEED (0) say how often and when.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import ROWS, Command, train_command
from tests.faults.harness import PROCESSES, RECOVERY_S, Victim, assert_adds_up, victim

KILLS, SEED = int(os.environ.get("FLOWPS_KILLS", "100")), int(os.environ.get("FLOWPS_SEED", "0"))
A_RUN = 10  # kills
ROLES = ("hub", "ps-0", "ps-1", "trainer-0", "command", "ps-0 stopped")
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "ml100k"
_LONGEST_S = 8.0  # between two kills, from a checkpoint on: so some come while one is written


@pytest.mark.skipif(not DATA.exists(), reason="needs the data set ml100k beside the checkout")
def test_a_run_survives_whatever_is_killed(tmp_path: Path) -> None:
    chance, done = random.Random(SEED), Counter[str]()
    print(f"\n{'run':>4} {'role':<14} {'lost at step':>12} {'seconds until the next checkpoint':>34}")
    for number in range(-(-KILLS // A_RUN)):
        run_dir = tmp_path / f"run-{number}"
        kills = min(A_RUN, KILLS - number * A_RUN)
        command = _start(run_dir)
        try:
            victim = Victim(command)
            victim.wait_for_checkpoint()
            for _ in range(kills):
                role = chance.choice(ROLES)
                time.sleep(chance.uniform(0, _LONGEST_S))
                began = time.monotonic()
                if role == "command":
                    processes = command.processes()
                    command.signal(signal.SIGKILL)
                    command.end(RECOVERY_S)
                    command.close()
                    assert not psutil.wait_procs(processes, timeout=RECOVERY_S)[1], "a process outlives the command"
                    command = _start(run_dir, "--resume")
                    victim = Victim(command)
                else:
                    name, _, how = role.partition(" ")
                    victim.hurt(name, signal.SIGSTOP if how else signal.SIGKILL)
                    if name != "hub":
                        command.wait_for(rf"worker {name} at .*; all roles go back to ", RECOVERY_S)
                step = victim.wait_for_checkpoint()
                done[role] += 1
                print(f"{number:>4} {role:<14} {step:>12} {time.monotonic() - began:>34.1f}", flush=True)
            command.signal(signal.SIGTERM)  # enough: it saves itself
            assert command.end(RECOVERY_S) == 130, command.said
        finally:
            command.close()
        with closing(_start(run_dir, "--resume", "--epochs", 1)) as last:  # its epochs are over: it evaluates and ends
            last.succeed(RECOVERY_S)
        assert not [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    print(", ".join(f"{count} × {role}" for role, count in done.items()))
    assert sum(done.values()) == KILLS


def _start(run_dir: Path, *knobs: object) -> Command:
    epochs = () if "--epochs" in knobs else ("--epochs", 100_000)
    return train_command(
        DATA, run_dir, *PROCESSES, "--data.batch_size", 512, "--data.partition_rows", 16_384, "--checkpoint.every_steps", 100,
        *epochs, *knobs,
    )  # fmt: skip


def test_two_trainers_go_on_when_a_shard_is_lost(samples: Path, tmp_path: Path) -> None:
    """Both wait for it, what each has pushed since the cut is counted, and nothing is read again."""
    run_dir, epochs = tmp_path / "run", 24
    knobs = ("--epochs", epochs, "--trainer.count", 2, "--trainer.in_flight", 2, "--checkpoint.recovery", "partial")
    with victim(samples, run_dir, *knobs) as run:
        for _ in range(2):
            run.wait_for_checkpoint()
            run.hurt("ps-1")
            run.command.wait_for(r"^shard 1 is back; its rows have not learned ([\d,]+) of", RECOVERY_S)
        run.command.succeed(timeout_s=2 * RECOVERY_S)
    ledger = assert_adds_up(run_dir, epochs * ROWS)
    assert ledger["replayed"] == 0
    assert ledger["unlearned"]["shard 1"] > 0

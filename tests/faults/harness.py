"""A run in local processes whose roles can be found and hurt, and what must hold of it afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from tests.cluster.conftest import Command, train_command

RECOVERY_S = 120.0  # for a role to be lost, started anew and trained on; never reached unless a test fails
EPOCHS = 24
MANY = ("--epochs", EPOCHS)
PROCESSES = (
    *("--cluster.mode", "processes", "--cluster.dashboard", "127.0.0.1:0", "--ps.num_shards", "2"),
    *("--checkpoint.every_steps", "25", "--status.print_interval", "25", "--cluster.lost_after_s", "4"),
    *("--status.interval_s", "1"),  # so that roles are asked all the time
)


class Victim:
    """A run whose roles are known by name: hub, ps-0, ps-1, trainer-0."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self._dashboard = command.wait_for(r"^dashboard: (http://\S+)/status")[1]

    def pid_of(self, role: str) -> int:
        """The process of a role as it is now; waits for one that is being started anew."""
        deadline = time.monotonic() + RECOVERY_S
        while time.monotonic() < deadline:
            with urlopen(f"{self._dashboard}/info/main/workers.html", timeout=10) as answer:
                page = answer.read().decode()
            workers = dict(re.findall(r">tcp://127\.0\.0\.1:(\d+)</a></td>\s*<td>\s*(\S+)\s*</td>", page))
            port = next((int(port) for port, name in workers.items() if name == role), None)
            for process in psutil.Process(self.command.pid).children(recursive=True) if port else ():
                try:
                    if any(c.status == "LISTEN" and c.laddr.port == port for c in process.net_connections()):
                        return process.pid
                except psutil.Error:
                    continue
            time.sleep(0.1)
        raise AssertionError(f"{role} did not come back within {RECOVERY_S} s")

    def hurt(self, role: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to a role; returns its process."""
        pid = self.pid_of(role)
        os.kill(pid, number)
        return pid

    def wait_for_checkpoint(self) -> int:
        """The step after which the next one that is printed was taken."""
        return int(self.command.wait_for(r"^checkpoint step-(\d+)-", RECOVERY_S)[1])


@contextmanager
def victim(samples: Path, run_dir: Path, *knobs: object) -> Iterator[Victim]:
    """A run on `samples`; when the block is left, none of its processes is."""
    with closing(train_command(samples, run_dir, *PROCESSES, *knobs)) as command:
        found = Victim(command)
        yield found
        everyone = command.processes() if psutil.pid_exists(command.pid) else []
        assert not everyone or everyone[0].status() == psutil.STATUS_ZOMBIE or not everyone[1:], "a process is left"


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """All of a kind that were recorded."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == kind]


def summary(run_dir: Path) -> dict[str, Any]:
    """How the run ended."""
    found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return found


def assert_adds_up(run_dir: Path, samples: int) -> dict[str, Any]:
    """Every sample of every epoch is trained once in the model as it is; returns the ledger."""
    ledger: dict[str, Any] = summary(run_dir)["ledger"]
    assert ledger["trained"] == samples
    assert ledger["read"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["replayed"]
    return ledger

"""Processes of this machine: workers that are lost again and again, Ctrl-C at the start, traces, a cluster of one's own.

For `make test-long`.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import distributed
import psutil

from flowps.cluster.launch import launch
from flowps.cluster.offer import workers_now
from flowps.config import Config
from tests.checkpoint.conftest import disk_of
from tests.cluster.conftest import Command, DaskCluster, joined, train_command
from tests.cluster.test_dashboard import get
from tests.cluster.test_processes import Start, start
from tests.cluster.test_scheduler import EXAMPLES
from tests.cluster.test_tracing import check_every_batch, finished, tracing_to

__all__ = ["start"]  # a fixture


def test_a_worker_that_is_lost_again_and_again_comes_back(make_config: Callable[..., Config]) -> None:
    """Dask looks 15 s after a loss whether the worker is there, and gives it up for good if it is just then away again."""
    with launch(make_config(("cluster.mode", "processes"))) as (client, _):
        address = next(at for at, worker in workers_now(client).items() if worker["name"] == "ps-0")
        others = {child.pid for child in psutil.Process().children(recursive=True)}
        others -= set(client.run(os.getpid, workers=[address]).values())
        began = time.monotonic()
        while time.monotonic() < began + 17:  # it does not live long enough to be known
            for child in psutil.Process().children(recursive=True):
                if child.pid not in others:
                    child.kill()
            time.sleep(0.2)
        deadline = time.monotonic() + 60
        while {"ps-0"} - {worker["name"] for worker in workers_now(client).values()}:
            assert time.monotonic() < deadline, "it did not come back"
            time.sleep(0.1)


def test_ctrl_c_while_the_processes_start_is_no_error_of_theirs(start: Start, tmp_path: Path) -> None:
    (tmp_path / "preload.py").write_text("print('a worker starts', flush=True)")
    command = start(tmp_path / "run", environment={"DASK_DISTRIBUTED__WORKER__PRELOAD": [str(tmp_path / "preload.py")]})
    command.wait_for("a worker starts")
    command.signal(signal.SIGINT, group=True)
    said = command.refuse(status=130)
    assert "stopped by a signal" in said


def test_every_batch_passes_every_process_in_order(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "traces" / "out.json"
    with closing(train_command(samples, tmp_path / "run", *tracing_to(path), "--cluster.mode", "processes")) as command:
        finished(command, path)
    check_every_batch("processes", path)


def test_a_disk_that_is_full_in_the_end_costs_only_the_trace(samples: Path, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    with disk_of("16k", folder):
        knobs = ("--trace", folder / "out.json", "--cluster.dashboard", "")
        with closing(train_command(samples, tmp_path / "run", *knobs)) as command:
            said = command.succeed()
    assert f"trace: {folder / 'out.json'} cannot be written: No space left on device" in said
    assert (tmp_path / "run" / "summary.json").exists()


class WithDashboard(DaskCluster):
    """Its scheduler serves one."""

    def _start(self, role: str, *options: object, netns: str) -> Command:
        kept = [option for option in options if role != "scheduler" or option != "--no-dashboard"]
        return super()._start(role, *kept, netns=netns)


def test_a_cluster_shows_its_last_run_until_the_next_one_begins(samples: Path, tmp_path: Path) -> None:
    with closing(WithDashboard(tmp_path)) as dask:
        joined(dask.add("all", "HUB=2 PS=1 TRAINER=1"))
        for name in ("first", "second"):
            with closing(train_command(samples, tmp_path / name, "--cluster.scheduler", dask.address)) as command:
                base = command.wait_for(r"^dashboard: (http://\S+:\d+)/status$")[1]
                url = command.wait_for(r"^this run: (http://\S+:\d+/flowps)$")[1]
                command.succeed()
        assert url == f"{base}/flowps"
        assert 'href="flowps"' in get(url)
        with distributed.Client(dask.address) as client:
            runs = client.run_on_scheduler(
                lambda dask_scheduler: [
                    (run.glance.name, run.glance.phase, run.glance.step, run.glance.account)
                    for run in dask_scheduler.extensions["flowps"].choices()
                ]
            )
        assert runs == [("second", "trained", 19, "600 read = 600 trained + 0 dropped + 0 replayed")]


def test_the_script_trains_on_what_it_has_started_and_leaves_nothing_of_it(tmp_path: Path):
    settings = {
        "PYTHON": sys.executable, "DATA": tmp_path / "data", "ROWS": 1000,
        "RUN_DIR": tmp_path / "run", "TMPDIR": tmp_path / "tmp",
    }  # fmt: skip
    (tmp_path / "tmp").mkdir()
    knobs = ("--data.batch_size", 128, "--model", "lr")
    with closing(Command(EXAMPLES / "local.sh", *knobs, cwd=tmp_path, environment=settings)) as command:
        said = command.succeed()
    assert re.search(r"^test: auc = 0\.\d+, .* \(best reachable auc = 0\.\d+\)$", said, re.M)
    for name in ("ps-0", "ps-1"):
        assert re.search(rf"^│ \d +│ {name} ", said, re.M)
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert [words for words in running if str(tmp_path) in " ".join(words)] == []
    assert list((tmp_path / "tmp").glob("tmp.*")) == []

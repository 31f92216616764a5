"""`--cluster.mode processes`: workers that are lost again and again, Ctrl-C at the start, and a trace. For `make test-long`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from flowps.cluster.launch import launch
from flowps.cluster.offer import workers_now
from flowps.config import Config
from tests.cluster.test_processes import Start, start
from tests.cluster.test_tracing import check_every_batch

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
    check_every_batch("processes", samples, tmp_path)

"""A small data set, its plan, and an embedded cluster to run it on."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import distributed
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps.cluster.assign import assign
from flowps.cluster.launch import gather_workers, launch
from flowps.cluster.offer import Offer
from flowps.cluster.plan import Plan, plan
from flowps.config import Config
from flowps.knob import load

ROWS, USERS, ITEMS = 600, 20, 30
Started = Callable[..., tuple[distributed.Client, Plan]]


def write_data(path: Path) -> Path:
    """Six row groups; the label depends on the user."""
    rng = np.random.default_rng(0)
    users = rng.integers(0, USERS, ROWS)
    columns = {"label": (users % 2).astype(np.int8), "x": rng.random(ROWS, np.float32), "user": users}
    pq.write_table(pa.table(columns), path, row_group_size=100)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of samples."""
    return write_data(tmp_path / "data.parquet")


@pytest.fixture
def make_config(data: Path) -> Callable[..., Config]:
    """A run over the data, with more knobs: `make_config(("trainer.in_flight", 1))`."""

    def make(*knobs: tuple[str, object]) -> Config:
        return config_of(data, *knobs)

    return make


def config_of(data: Path, *knobs: tuple[str, object]) -> Config:
    """A run over the data."""
    given = [
        ("data.train", str(data)), ("data.batch_size", 32), ("data.partition_rows", 100), ("cluster.dashboard", ""), *knobs,
    ]  # fmt: skip
    return load(None, [(path, [str(value)]) for path, value in given])


def one_machine(threads: int = 2, available: int = 8 << 30) -> Offer:
    """A worker that may do everything, as the embedded mode has it."""
    return Offer("all", "inproc://here", "127.0.0.1", threads, available, "machine:1")


@pytest.fixture
def make_plan(make_config: Callable[..., Config]) -> Callable[..., Plan]:
    """The plan of such a run on one machine, or on the workers given."""

    def make(*knobs: tuple[str, object], offers: Sequence[Offer] = ()) -> Plan:
        config = make_config(*knobs)
        return plan(config, assign(offers or [one_machine()], config.ps.num_shards, config.trainer.count))

    return make


@pytest.fixture
def started(make_config: Callable[..., Config]) -> Iterator[Started]:
    """Start what a config asks for, and plan on it; gone at the end of the test."""
    with ExitStack() as opened:

        def start(*knobs: tuple[str, object]) -> tuple[distributed.Client, Plan]:
            config = make_config(*knobs)
            client, _ = opened.enter_context(launch(config))
            return client, plan(config, gather_workers(client, config, print, lambda: False))

        yield start


# --- commands and clusters, as people start them ----------------------------------------------------------------------

DEADLINE_S = 60.0  # for anything that a command is waited for
KNOBS = (
    *("--data.batch_size", "32", "--data.partition_rows", "100", "--status.print_interval", "5", "--status.progress", "plain"),
    # The synchronous mode, and a net whose dense weights start at 0: the same numbers wherever the roles are.
    *("--trainer.in_flight", "1", "--model", "lr"),
)


PYTHON = (sys.executable, "-m")


class Command:
    """A command that runs, in a process group of its own, and on another host if `netns` names its network namespace."""

    def __init__(self, *words: object, cwd: Path, netns: str = "", environment: Mapping[str, object] | None = None) -> None:
        within = ("ip", "netns", "exec", netns) if netns else ()
        more = {name: str(value) for name, value in (environment or {}).items()}
        self._process = subprocess.Popen(
            [str(word) for word in (*within, *words)], cwd=cwd, env=os.environ | more, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.pid = self._process.pid
        self._asked_to_end = False
        self._said: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def said(self) -> str:
        """What it has printed and was waited for, both streams."""
        return "".join(self._said)

    def wait_for(self, pattern: str, timeout_s: float = DEADLINE_S) -> re.Match[str]:
        """Read on to the line that matches."""
        deadline = time.monotonic() + timeout_s
        while (line := self._next(deadline)) is not None:
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line matches {pattern!r} in:\n{self.said}")

    def end(self, timeout_s: float = DEADLINE_S) -> int:
        """Read on to the end, when all processes that it started have closed its output, and return its exit status."""
        deadline = time.monotonic() + timeout_s
        while self._next(deadline) is not None:
            pass
        return self._process.wait(max(0.0, deadline - time.monotonic()))

    def succeed(self, timeout_s: float = DEADLINE_S) -> str:
        """What it has printed, once it has ended well."""
        assert self.end(timeout_s) == 0, self.said
        return self.said

    def refuse(self, status: int = 1, timeout_s: float = DEADLINE_S) -> str:
        """Its last line, an error for people, with which it has ended."""
        assert self.end(timeout_s) == status, self.said
        assert "Traceback" not in self.said, self.said
        last = self.said.splitlines()[-1]
        assert last.startswith("error: "), self.said
        return last

    def signal(self, number: int, group: bool = False) -> None:
        """To its process, or to all of its group, as a terminal does."""
        if self._process.poll() is None:
            (os.killpg if group else os.kill)(self.pid, number)

    def processes(self) -> list[psutil.Process]:
        """It and all that it has started."""
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]

    def ask_to_end(self) -> None:
        """For who has to end several."""
        if not self._asked_to_end:
            self._asked_to_end = True
            self.signal(signal.SIGTERM, group=True)

    def close(self) -> None:
        """End it with all it has started, politely where it listens."""
        self.ask_to_end()
        try:
            self.end(timeout_s=5)
        except (TimeoutError, subprocess.TimeoutExpired):
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.end()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _next(self, deadline: float) -> str | None:
        """The next line; None at the end, however often it is asked for."""
        if self._said and self._said[-1] == "":
            return None
        try:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError(f"nothing more was printed in time, after:\n{self.said}") from None
        self._said.append(line or "")
        return line


class DaskCluster:
    """`dask scheduler` and `dask worker` as commands."""

    def __init__(self, folder: Path, host: Sequence[str] = ("--host", "127.0.0.1"), netns: str = "") -> None:
        self._folder, self._host = folder, host
        self._commands: list[Command] = []
        self.file = folder / "scheduler.json"
        self.scheduler = self._start(
            "scheduler", "--port", 0, "--dashboard-address", "127.0.0.1:0", "--no-dashboard",
            "--scheduler-file", self.file, netns=netns,
        )  # fmt: skip
        try:
            self.address = self.scheduler.wait_for(r"Scheduler at:\s+(\S+)")[1]
            self.dashboard = self.scheduler.wait_for(r"dashboard at:\s+http://(\S+)/status")[1]
        except BaseException:
            self.close()
            raise

    def add(self, name: str, resources: str, *options: object, netns: str = "") -> Command:
        """Start a worker; `joined` waits for it."""
        declared = ("--resources", resources) if resources else ()
        return self._start(
            "worker", self.address, "--no-nanny", "--no-dashboard", "--nthreads", 2, "--name", name, *declared,
            "--local-directory", self._folder / "scratch", *options, netns=netns,
        )  # fmt: skip

    def close(self) -> None:
        """End the workers, all at once, and then the scheduler: Dask hangs now and then when both are told at the same time."""
        workers = [command for command in self._commands if command is not self.scheduler]
        for worker in workers:
            worker.ask_to_end()
        for command in (*workers, self.scheduler):
            command.close()

    def _start(self, role: str, *options: object, netns: str) -> Command:
        command = Command(*PYTHON, "dask", role, *self._host, *options, cwd=self._folder, netns=netns)
        self._commands.append(command)
        return command


def joined(*workers: Command) -> None:
    """Wait until the scheduler knows them."""
    for worker in workers:
        worker.wait_for("Registered to:")


def train_command(
    samples: Path, run_dir: Path, *knobs: object, netns: str = "", environment: Mapping[str, object] | None = None
) -> Command:
    """`python -m flowps.train` on `samples`, started."""
    words = (*PYTHON, "flowps.train", *train_words(samples, run_dir, *knobs))
    return Command(*words, cwd=run_dir.parent, netns=netns, environment=environment)


def train_words(samples: Path, run_dir: Path, *knobs: object) -> tuple[object, ...]:
    """Of the command line, after `flowps.train`."""
    files = ("--data.train", samples / "train.parquet", "--data.test", samples / "test.parquet")
    return (*files, *KNOBS, "--run_dir", run_dir, *knobs)


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.parquet`, 600 samples in six row groups, and `test.parquet`; the label depends on the user."""
    folder = tmp_path_factory.mktemp("samples")
    rng = np.random.default_rng(0)
    for name, rows in (("train", ROWS), ("test", 200)):
        users = rng.integers(0, USERS, rows)
        columns = {
            "label": ((users % 2 == 0) ^ (rng.random(rows) < 0.1)).astype(np.int8), "x": rng.random(rows, np.float32),
            "user": users, "items": [rng.integers(0, ITEMS, rng.integers(0, 4)).tolist() for _ in range(rows)],
        }  # fmt: skip
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=100)
    return folder


@pytest.fixture(scope="session")
def embedded(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves of such a run: the reference for all others."""
    run_dir = tmp_path_factory.mktemp("embedded") / "run"
    with closing(train_command(samples, run_dir, "--cluster.dashboard", "")) as command:
        command.succeed()
    return run_dir


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    """Step, loss and AUC of every interval; of one that was trained again after a loss, the last."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    of_step = {line["step"]: line["metrics"] for line in lines if line["type"] == "Interval"}
    return [(step, metrics["logloss"], metrics["auc"]) for step, metrics in sorted(of_step.items())]


def rows_of(run_dir: Path) -> dict[str, dict[int, np.ndarray]]:
    """Weights and state of every row, by slot and sign, whatever shard they were on."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for path in (run_dir / "embeddings").iterdir():
        table = pq.read_table(path)
        floats = np.hstack([np.stack(table[name].to_numpy()) for name in table.column_names if name != "sign"])
        of_slot = found.setdefault(path.name.split(".")[0], {})
        signs = table["sign"].to_pylist()
        assert not of_slot.keys() & set(signs), "a row on two shards"
        of_slot |= dict(zip(signs, floats, strict=True))
    return found


def assert_same(run_dir: Path, reference: Path) -> None:
    """The same losses on the way, rows, dense weights and test metrics, but for the order of sums."""
    import keras

    np.testing.assert_allclose(losses(run_dir), losses(reference), rtol=1e-5)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run_dir, reference)]
    for key in ("examples", "auc", "logloss"):
        assert summaries[0]["test"][key] == pytest.approx(summaries[1]["test"][key], rel=1e-5), key
    assert summaries[0]["rows"] == summaries[1]["rows"]
    there, here = rows_of(run_dir), rows_of(reference)
    assert there.keys() == here.keys()
    for slot, rows in here.items():
        assert there[slot].keys() == rows.keys(), slot
        np.testing.assert_allclose([there[slot][sign] for sign in rows], list(rows.values()), rtol=1e-5, atol=1e-7)
    models = [keras.models.load_model(path / "model.keras") for path in (run_dir, reference)]
    for found, wanted in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)

"""Several trainers in a run, as a person starts it: what each reads, what becomes of bad data, and a stop."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps.cluster.launch import gather_workers, launch
from flowps.cluster.plan import Plan, plan
from flowps.cluster.run import Result, run
from flowps.cluster.run_dir import RunDir
from flowps.cluster.trainer_role import Handout, TrainerTask, _own_partitions
from flowps.config import Config
from flowps.errors import CapacityError, DataError
from flowps.hub.partition import Partition, epoch_order
from flowps.knob import load
from flowps.status.event import Event, Interval
from flowps.train import main
from tests.cluster.conftest import ROWS, Command, rows_of, train_command

TRAINERS = ("--cluster.mode", "processes", "--cluster.dashboard", "", "--trainer.count", 2)
# Three partitions for two trainers, and a rest in each one's last batch: 400 = 12 · 32 + 16, 200 = 6 · 32 + 8.
ODD = ("--data.partition_rows", 200)


def with_a_bad_label(samples: Path, folder: Path, row: int) -> Path:
    """A copy of the training file, one label of which is none."""
    table = pq.read_table(samples / "train.parquet")
    labels = table["label"].to_numpy().copy()
    labels[row] = 7
    pq.write_table(table.set_column(0, "label", pa.array(labels)), folder / "bad.parquet", row_group_size=100)
    return folder / "bad.parquet"


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(samples: Path) -> Iterator[Callable[..., Command]]:
    """Start a run of two trainers; nothing of it is left at the end of the test."""
    started: list[Command] = []

    def start(run_dir: Path, *knobs: object) -> Command:
        started.append(train_command(samples, run_dir, *TRAINERS, *knobs))
        return started[-1]

    yield start
    for command in started:
        command.close()


def test_the_command_trains_every_sample_once_an_epoch(start: Callable[..., Command], tmp_path: Path) -> None:
    said = start(tmp_path / "run", *ODD, "--epochs", 2, "--model", "dnn", "--trainer.precision", "mixed_bfloat16").succeed()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"]["examples"] == 2 * ROWS
    assert summary["finished"]["epochs"] == 2
    assert summary["test"]["examples"] == 200
    assert "600 examples in 3 partitions" in said
    kinds = [json.loads(line)["type"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("Finished") == kinds.count("Evaluated") == kinds.count("Started") == 1, "one trainer speaks for all"
    assert sum(map(len, rows_of(tmp_path / "run").values())) == summary["rows"]
    model = keras.models.load_model(tmp_path / "run" / "model.keras")
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_bad_data_of_one_trainer_end_the_command_soon(start: Callable[..., Command], samples: Path, tmp_path: Path) -> None:
    """With that error, long before anyone's deadline, and what was learned is there."""
    bad = with_a_bad_label(samples, tmp_path, 550)
    command = start(tmp_path / "run", "--data.train", bad, "--data.shuffle", "false", "--epochs", 2, "--trainer.in_flight", 2)
    error = command.refuse(timeout_s=45)
    assert f"{bad}: column 'label', row 550: found 7, expected a label of 0 or 1" in error
    assert f"what was trained before, 50 rows and the dense model, is in {tmp_path / 'run'}" in error
    assert "WARNING: All log messages before absl" not in command.said, "only trainers load TensorFlow, also to read an error"
    assert sum(map(len, rows_of(tmp_path / "run").values())) == 50
    assert (tmp_path / "run" / "model.keras").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_two_trainers_in_one_process_are_refused(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data.train", samples / "train.parquet", "--run_dir", tmp_path / "run", "--trainer.count", 2]
    assert main([*map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "trainer.count = 2 in one process: each trainer needs a process of its own" in said
    assert "give --cluster.mode processes, or a cluster (--cluster.scheduler)" in said
    assert not (tmp_path / "run").exists()


# --- many runs on one cluster -------------------------------------------------------------------------------------------


def config_of(data: Path, *knobs: tuple[str, object]) -> Config:
    given = [
        ("data.train", data), ("data.batch_size", 32), ("data.partition_rows", 100), ("cluster.dashboard", ""),
        ("cluster.mode", "processes"), ("trainer.count", 2), ("slot_default.capacity_rows", 1000), ("status.print_interval", 3),
        *knobs,
    ]  # fmt: skip
    return load(None, [(path, [str(value)]) for path, value in given])


@pytest.fixture(scope="module")
def client(samples: Path) -> Iterator[distributed.Client]:
    """Processes for two trainers: most groups here are not the first of their process."""
    with launch(config_of(samples / "train.parquet")) as (client, _):
        yield client


Run = Callable[..., Result]


@pytest.fixture
def run_here(client: distributed.Client, samples: Path, tmp_path: Path) -> Run:
    """Train on these processes; `stop_at`: a step from which on the run is asked to stop."""

    def run_here(*knobs: tuple[str, object], name: str = "run", stop_at: int = 1 << 30) -> Result:
        config = config_of(samples / "train.parquet", *knobs)
        planned, asked = plan(config, gather_workers(client, config, print, lambda: False)), threading.Event()

        def see(event: Event) -> None:
            if isinstance(event, Interval) and event.step >= stop_at:
                asked.set()

        with closing(RunDir(tmp_path / name)) as run_dir:
            run_dir.prepare(config, planned.schema)
            return run(client, planned, run_dir, [run_dir.record, see], asked.is_set)

    return run_here


def test_odd_partitions_and_a_rest_in_the_asynchronous_mode(run_here: Run, samples: Path) -> None:
    """Whoever gets two partitions goes on alone when the other has no more."""
    found = run_here(("trainer.in_flight", 2), ("epochs", 3), ("data.partition_rows", 200), ("data.test", samples / "test.parquet"))
    assert (found.finished.examples, found.finished.epochs, found.finished.stopped) == (3 * ROWS, 3, False)
    assert found.test is not None
    assert found.test.examples == 200
    assert found.rows == 50


def test_more_trainers_than_partitions(run_here: Run) -> None:
    """One of them never has a batch."""
    found = run_here(("trainer.in_flight", 1), ("epochs", 2), ("data.partition_rows", 600))
    assert (found.finished.examples, found.finished.steps) == (2 * ROWS, 2 * -(-ROWS // 32))


def test_a_table_that_is_full_is_the_error_that_is_raised(run_here: Run) -> None:
    """Also though it comes from another process, by way of gRPC and Dask."""
    with pytest.raises(CapacityError, match=r"need more rows than the table .* raise capacity_rows"):
        run_here(("trainer.in_flight", 1), ("slot_default.capacity_rows", 5))


@pytest.mark.parametrize(("in_flight", "row"), [(1, 50), (2, 550)])
def test_bad_data_are_the_error_that_is_raised(run_here: Run, samples: Path, tmp_path: Path, in_flight: int, row: int) -> None:
    """Whoever had them, and whatever becomes of the other trainer then."""
    bad = with_a_bad_label(samples, tmp_path, row)
    with pytest.raises(DataError, match=f"row {row}: found 7"):
        run_here(("data.train", bad), ("trainer.in_flight", in_flight), ("data.shuffle", "false"))


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_stop_ends_all_trainers_after_the_same_step(run_here: Run, in_flight: int) -> None:
    """Wherever it meets them; each time the model and the rows are saved."""
    short = (("cluster.collective_timeout_s", 20), ("cluster.rpc_timeout_s", 20))
    for stop_at in (3, 9):
        knobs = (("trainer.in_flight", in_flight), ("epochs", 1_000_000), *short)
        found = run_here(*knobs, name=f"run-{in_flight}-{stop_at}", stop_at=stop_at)
        assert found.finished.stopped
        assert found.finished.steps >= stop_at
        assert found.rows > 0
        assert found.test is None


# --- who reads what -----------------------------------------------------------------------------------------------------


def test_each_place_is_given_out_once_an_epoch() -> None:
    handout = Handout()
    assert [handout.take(0) for _ in range(4)] == [0, 1, 2, 3]
    assert [handout.take(1) for _ in range(3)] == [0, 1, 2]


def test_a_place_is_not_given_out_again_when_others_have_gone_on() -> None:
    handout = Handout()
    assert [handout.take(epoch) for epoch in (0, 0, 1, 1)] == [0, 1, 0, 1]
    assert handout.take(0) >= 2
    assert handout.take(1) == 2


def test_epochs_that_are_over_are_forgotten() -> None:
    handout = Handout()
    for epoch in range(1000):
        handout.take(epoch)
    assert len(handout._next) < 4


class Asked:
    """A handout as the trainers see it: every answer comes later."""

    def __init__(self) -> None:
        self._handout = Handout()

    def take(self, epoch: int) -> Any:
        return SimpleNamespace(result=lambda: self._handout.take(epoch))


def readers(made: Plan, epoch: int, handout: Any) -> list[Iterator[Partition]]:
    tasks = [TrainerTask("run", number, [], "token", "model.keras", ["a:1", "b:2"], handout) for number in range(2)]
    return [_own_partitions(task, made, epoch) for task in tasks]


@pytest.mark.parametrize("shuffle", ["true", "false"])
def test_a_slow_trainer_reads_fewer_partitions(make_plan: Callable[..., Plan], shuffle: str) -> None:
    """Whoever asks next gets the next one; together they read the order of the epoch."""
    made, handout = make_plan(("data.shuffle", shuffle)), Asked()
    for epoch in range(3):
        order = epoch_order(made.train, made.config.seed, epoch, made.config.data.shuffle)
        assert len(order) == 6
        quick, slow = readers(made, epoch, handout)
        taken = [next(of) for of in (quick, slow, quick, quick, quick, slow)]
        assert taken == list(order)
        assert (next(quick, None), next(slow, None)) == (None, None)


def test_a_trainer_alone_reads_all_in_order(make_plan: Callable[..., Plan]) -> None:
    made = make_plan()
    task = TrainerTask("run", 0, [""], "token", "model.keras")
    assert list(_own_partitions(task, made, 0)) == list(epoch_order(made.train, made.config.seed, 0, made.config.data.shuffle))
    assert task == replace(task, peers=[], handout=None)

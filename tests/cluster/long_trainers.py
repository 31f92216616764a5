"""Several trainers in a run: what becomes of bad data, of a stop, and many runs on one cluster. For `make test-long`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import distributed
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps.cluster.launch import gather_workers, launch
from flowps.cluster.plan import plan
from flowps.cluster.resume import find
from flowps.cluster.run import Result, Start, run
from flowps.cluster.run_dir import RunDir
from flowps.config import Config
from flowps.errors import CapacityError, DataError
from flowps.knob import load
from flowps.status.event import Event, Interval
from tests.cluster.conftest import ROWS, Command, rows_of
from tests.cluster.test_trainers import start

__all__ = ["start"]


def with_a_bad_label(samples: Path, folder: Path, row: int) -> Path:
    """A copy of the training file, one label of which is none."""
    table = pq.read_table(samples / "train.parquet")
    labels = table["label"].to_numpy().copy()
    labels[row] = 7
    pq.write_table(table.set_column(0, "label", pa.array(labels)), folder / "bad.parquet", row_group_size=100)
    return folder / "bad.parquet"


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
        resume = find(config, print)
        planned, asked = plan(config, gather_workers(client, config, print, lambda: False), resume), threading.Event()

        def see(event: Event) -> None:
            if isinstance(event, Interval) and event.step >= stop_at:
                asked.set()

        with closing(RunDir(tmp_path / name)) as run_dir:
            run_dir.prepare(config, planned.schema)
            run_dir.checkpoints.mkdir()
            start = Start(str(run_dir.checkpoints), resume)
            return run(client, planned, run_dir, [run_dir.record, see], asked.is_set, start)

    return run_here


def test_odd_partitions_and_a_rest_in_the_asynchronous_mode(run_here: Run, samples: Path) -> None:
    """Whoever gets two partitions goes on alone when the other has no more."""
    found = run_here(("trainer.in_flight", 2), ("epochs", 3), ("data.partition_rows", 200), ("data.test", samples / "test.parquet"))
    assert (found.finished.examples, found.finished.epochs, found.finished.stopped) == (3 * ROWS, 3, False)
    assert found.test is not None
    assert found.test.examples == 200
    assert found.rows == 50


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_other_trainers_go_on_with_what_is_left(run_here: Run, tmp_path: Path, in_flight: int, before: int, after: int) -> None:
    """Partitions that were begun by any are ended by any: every sample of the epoch is trained once."""
    knobs = (("trainer.in_flight", in_flight), ("epochs", 2), ("checkpoint.every_steps", 4))
    name = f"run-{before}-{in_flight}"
    stopped = run_here(*knobs, ("trainer.count", before), name=name, stop_at=6)
    assert stopped.finished.stopped
    found = run_here(
        *knobs, ("trainer.count", after), ("resume_from", tmp_path / name / "checkpoints"), name=f"{name}-again"
    )  # fmt: skip
    assert found.ledger.adds_up
    assert (found.ledger.trained, found.finished.examples, found.finished.epochs) == (2 * ROWS, 2 * ROWS, 2)


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
def test_a_stop_ends_all_trainers_after_the_same_step(run_here: Run, tmp_path: Path, in_flight: int) -> None:
    """Wherever it meets them; each time the model and the rows are saved."""
    short = (("cluster.collective_timeout_s", 20), ("cluster.rpc_timeout_s", 20))
    for stop_at in (3, 9):
        knobs = (("trainer.in_flight", in_flight), ("epochs", 1_000_000), *short)
        found = run_here(*knobs, name=f"run-{in_flight}-{stop_at}", stop_at=stop_at)
        assert found.finished.stopped
        assert found.finished.steps >= stop_at
        assert found.rows > 0
        assert found.test is None
        assert found.ledger.adds_up
        assert len(list((tmp_path / f"run-{in_flight}-{stop_at}" / "checkpoints").glob("*/manifest.json"))) == 1

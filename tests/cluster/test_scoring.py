"""Scoring on several processes: the same figures and predictions as in one; who scores what; and what becomes of a loss.

`long_scoring` has workers that are killed and commands that are stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps import evaluate, predict
from flowps.cluster import scoring
from flowps.cluster.launch import launch
from flowps.cluster.prediction_folder import PredictionFolder
from flowps.cluster.scoring import Scoring, run_scoring
from flowps.cluster.tally_sink import Wanted
from flowps.errors import DataError, FlowpsError, LostRoleError, StoppedError
from flowps.hub.partition import Partition, SampleFile
from flowps.knob import from_mapping
from tests.scored import TEST_ROWS, main_words, train_run, write

SEVERAL = {"mode": "processes", "dashboard": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `run`, and its test samples in three files below `data`."""
    folder = tmp_path_factory.mktemp("scoring")
    train_run(folder)
    table = pq.read_table(folder / "test.parquet")
    for k, (at, rows) in enumerate(((0, 150), (150, 50), (200, 100))):
        write(folder / "data" / f"day={k}" / "part.parquet", table.slice(at, rows), row_group_size=50)
    return folder


# --- several processes ------------------------------------------------------------------------------------------------


def words_of(folder: Path, *words: object, scheduler: str = "") -> list[str]:
    knobs = ("--cluster.scheduler", scheduler, "--trainer.count", 2, "--ps.num_shards", 2) if scheduler else ()
    return main_words(folder / "run", folder / "data", *words, *knobs, "--data.partition_rows", 50)


def scored(folder: Path, out: Path, scheduler: str = "") -> tuple[bytes, list[pa.Table]]:
    """What both commands write."""
    words = ("--group", "user", "--slice", "city", "day", "--json", out / "figures.json")
    out.mkdir()
    assert evaluate.main(words_of(folder, *words, scheduler=scheduler)) == 0
    assert predict.main(words_of(folder, out / "predictions", "--columns", "request", scheduler=scheduler)) == 0
    assert (out / "predictions" / "_SUCCESS").exists()
    tables = [pq.ParquetFile(out / "predictions" / f"day={k}" / "part.parquet").read() for k in range(3)]
    return (out / "figures.json").read_bytes(), tables


@pytest.fixture(scope="class")
def of_one(folder: Path) -> tuple[bytes, list[pa.Table]]:
    """What one process writes."""
    return scored(folder, folder / "one")


@pytest.fixture(scope="class")
def scheduler(of_one: tuple[bytes, list[pa.Table]]) -> Iterator[str]:
    """Of processes for two shards, two scorers and a hub, which all commands here share."""
    config = from_mapping({"cluster": SEVERAL, "ps": {"num_shards": 2}, "trainer": {"count": 2}})
    with launch(config) as (client, _):
        yield client.scheduler.address


class TestSeveralProcesses:
    def test_they_give_the_same_figures_and_predictions_to_the_bit(
        self, folder: Path, of_one: tuple[bytes, list[pa.Table]], scheduler: str
    ) -> None:
        """Whoever scores which file, or partition."""
        found = scored(folder, folder / "several", scheduler)
        assert found == of_one
        assert json.loads(found[0])["label"]["samples"] == TEST_ROWS
        assert [table.num_rows for table in found[1]] == [150, 50, 100]

    def test_an_error_of_one_scorer_ends_the_command(
        self, folder: Path, tmp_path: Path, scheduler: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With that error, though the other has nothing wrong."""
        table = pq.read_table(folder / "test.parquet")
        prices = table["price"].to_numpy().copy()
        prices[7] = np.inf
        write(tmp_path / "data" / "bad.parquet", table.set_column(1, "price", pa.array(prices)))
        words = main_words(folder / "run", tmp_path / "data", "--cluster.scheduler", scheduler, "--trainer.count", 2)
        assert evaluate.main(words) == 1
        err = capsys.readouterr().err
        assert "bad.parquet: column 'price', row 7" in err
        assert "Traceback" not in err


# --- who scores what --------------------------------------------------------------------------------------------------


def sample_file(name: str, *row_groups: int) -> SampleFile:
    return SampleFile(f"/data/{name}", {}, {"user": pa.int64()}, row_groups)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_files_are_given_out_whole_and_evenly(count: int) -> None:
    files = [sample_file(f"{k}.parquet", *[10] * k) for k in range(6)]
    shares = PredictionFolder("/out", "step-1", ("label",), (), 20).shares(count, files)
    assert len(shares) == count
    urls = [[part.url for part in share.partitions] for share in shares]
    given = [sorted(set(of)) for of in urls]
    assert sorted(chain(*given)) == [f"/data/{k}.parquet" for k in range(1, 6)], "one without samples has no partition"
    for share in shares:
        order = [(part.url, part.first_row) for part in share.partitions]
        assert all(a[0] != b[0] or a[1] < b[1] for a, b in pairwise(order)), "in the order of the file"
        assert order == sorted(order, key=lambda at: [url for url, _ in order].index(at[0])), "one file after the other"
    rows = [sum(part.num_rows for part in share.partitions) for share in shares]
    assert sum(rows) == 150
    assert max(rows) <= max(50, 150 / count + 30)


def test_of_every_label_its_own_samples_are_added_up() -> None:
    wanted = Wanted(("click", "buy"), ("city",), "user")
    assert wanted.columns == ("city", "user")
    assert Wanted(("click",), ("user",), "user").columns == ("user",)
    columns = pa.table({"user": [1, 1, 2], "city": ["a", "b", "a"]})
    labels = np.array([[0, 1], [1, 1], [1, 0]], np.float32)
    logits = np.array([[-1, 2], [3, -1], [2, -2]], np.float32)
    with wanted.sink() as sink:
        sink.take(Partition("/x", (0,), 0, 3), columns, labels, logits)
        found = {label: tally.result() for label, tally in sink.result().items()}
    assert {label: (of.samples, of.positives, of.auc) for label, of in found.items()} == {"click": (3, 2, 1.0), "buy": (3, 2, 1.0)}
    for k, label in enumerate(found):
        assert found[label].mean_prediction == pytest.approx((1 / (1 + np.exp(-logits[:, k]))).mean(), rel=1e-6)
        assert [row.samples for row in found[label].slices[0].rows] == [2, 1]
    with wanted.sink() as sink, pytest.raises(DataError, match=r"^/x: slice column 'city' is double"):
        sink.take(Partition("/x", (0,), 0, 3), columns.set_column(1, "city", pa.array([0.5, 1, 2])), labels, logits)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Any], list[str], list[int]]]:
    """Score with attempts that end so, one after the other; what came of it, what was said, and the plan of each."""

    def run(*ends: Any, mode: str = "processes", interrupted: bool = False) -> tuple[list[Any], list[str], list[int]]:
        left, said, plans, made = list(ends), list[str](), list[int](), iter(range(100))

        def attempt(client: Any, planned: Any, *rest: Any) -> list[Any]:
            plans.append(planned.number)
            end = left.pop(0)
            if isinstance(end, Exception):
                raise end
            return [end]

        monkeypatch.setattr(scoring, "_attempt", attempt)
        config = from_mapping({"cluster": {"mode": mode}})
        described: Any = SimpleNamespace(plan=lambda: SimpleNamespace(config=config, number=next(made)))
        task: Scoring = described
        try:
            return run_scoring(None, task, said.append, lambda: interrupted), said, plans
        except FlowpsError as error:
            return [error], said, plans

    return run


def test_after_a_loss_it_is_planned_and_begun_again(attempts: Callable[..., tuple[list[Any], list[str], list[int]]]) -> None:
    lost, said = LostRoleError("worker a was lost"), "worker a was lost; what was not finished is scored again"
    assert attempts(lost, lost, "done") == (["done"], [said] * 2, [0, 1, 2])
    assert attempts(lost, lost, lost, lost, "never") == ([lost], [said] * 3, [0, 1, 2, 3])


def test_what_another_attempt_would_not_mend_is_raised(attempts: Callable[..., tuple[list[Any], list[str], list[int]]]) -> None:
    lost, bad, stopped = LostRoleError("lost"), DataError("bad"), StoppedError("stopped")
    assert attempts(lost, "never", mode="embedded") == ([lost], [], [0])
    assert attempts(lost, "never", interrupted=True) == ([lost], [], [0])
    assert attempts(bad, "never") == ([bad], [], [0])
    assert attempts(stopped, "never") == ([stopped], [], [0])


def leaves(spec: Any) -> Any:
    """A model that would end the process."""
    import sys

    if getattr(sys, "leaves", False):
        sys.exit(3)
    inputs = spec.inputs()
    import keras

    return keras.Model(inputs, keras.layers.Dense(1)(spec.concatenated(inputs)))


def test_a_model_that_ends_the_process_ends_the_command_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_run(tmp_path, model=f"{__name__}:leaves")
    monkeypatch.setattr("sys.leaves", True, raising=False)
    capsys.readouterr()
    assert evaluate.main(main_words(run, tmp_path / "test.parquet")) == 1
    assert "leaves raised SystemExit: 3" in capsys.readouterr().err

"""Scoring on several processes: the same figures and predictions as in one. For `make test-long`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps import evaluate, predict
from flowps.cluster.launch import launch
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

"""Several trainers in a run, as a person starts it: what each reads. `long_trainers` has bad data, stops, and more."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest

from flowps.cluster.plan import Plan
from flowps.cluster.trainer_role import Handout, TrainerTask, _own_partitions
from flowps.hub.partition import Partition, epoch_order
from flowps.train import main
from tests.cluster.conftest import ROWS, Command, rows_of, train_command

TRAINERS = ("--cluster.mode", "processes", "--cluster.dashboard", "", "--trainer.count", 2)
# Three partitions for two trainers, and a rest in each one's last batch: 400 = 12 · 32 + 16, 200 = 6 · 32 + 8.
ODD = ("--data.partition_rows", 200)


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
    knobs = ("--epochs", 2, "--model", "dnn", "--trainer.precision", "mixed_bfloat16", "--checkpoint.every_steps", 7)
    said = start(tmp_path / "run", *ODD, *knobs).succeed()
    assert "checkpoint step-000000007-" in said, "all trainers have met at a cut"
    assert f"ledger: {2 * ROWS:,} read = {2 * ROWS:,} trained + 0 dropped + 0 replayed" in said
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


def test_two_trainers_in_one_process_are_refused(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data.train", samples / "train.parquet", "--run_dir", tmp_path / "run", "--trainer.count", 2]
    assert main([*map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "trainer.count = 2 in one process: each trainer needs a process of its own" in said
    assert "give --cluster.mode processes, or a cluster (--cluster.scheduler)" in said
    assert not (tmp_path / "run").exists()


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

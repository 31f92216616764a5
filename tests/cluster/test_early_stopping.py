"""Whole runs, as the command makes them: early stopping, fewer negatives, several labels, weights of samples."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps.checkpoint.manifest import best, found, load
from flowps.checkpoint.store import Store
from flowps.cluster.run import WORSE, Result
from flowps.cluster.trained_run import open_run
from flowps.errors import CheckpointError
from flowps.evaluate import evaluate
from flowps.knob import load as load_config
from flowps.status.progress import PlainConsole
from flowps.train import train
from tests.cluster.conftest import rows_of

ROWS, BATCH, USERS = 600, 60, 30
STEPS = ROWS // BATCH  # of an epoch


def write(path: Path, rows: int, seed: int, rate: float = 0.5) -> Path:
    """Clicks follow the user; `item` says nothing of them, and can only be learned by heart; `buy` follows x."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, USERS, rows)
    logit = np.where(users % 2 == 0, 1.0, -1.0) + math.log(rate / (1 - rate))
    x = rng.normal(size=rows).astype(np.float32)
    table = {
        "label": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8),
        "x": x,
        "user": users,
        "item": rng.integers(0, 300, rows),
        "buy": (x + 0.3 * rng.normal(size=rows) > 0.5).astype(np.int8),
    }
    pq.write_table(pa.table(table), path, row_group_size=150)
    return path


@dataclass(frozen=True)
class Ran:
    """A run that has ended."""

    folder: Path
    result: Result
    said: str

    @property
    def weights(self) -> list[np.ndarray]:
        return list(keras.models.load_model(self.folder / "model.keras").get_weights())

    @property
    def store(self) -> Store:
        return Store(str(self.folder / "checkpoints"))

    def told(self, kind: str) -> list[dict[str, Any]]:
        """Events of a kind, from metrics.jsonl."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["type"] == kind]

    @property
    def evaluated(self) -> dict[int, float]:
        """Step → logloss on the validation data."""
        return {e["step"]: e["metrics"]["logloss"] for e in self.told("Evaluated") if e["data"] == "valid"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With train, valid and test data."""
    folder = tmp_path_factory.mktemp("early")
    for name, rows, seed in (("train", ROWS, 0), ("valid", 400, 1), ("test", 400, 2)):
        write(folder / f"{name}.parquet", rows, seed)
    return folder


Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Train as the command does, in a folder of its own or the one given."""
    numbers = count()

    def run(*knobs: tuple[str, object], into: Path | None = None) -> Ran:
        target = into or folder / f"run-{next(numbers)}"
        given = {
            "data.train": folder / "train.parquet", "data.test": folder / "test.parquet", "data.exclude": "buy",
            "data.batch_size": BATCH, "data.partition_rows": 150, "cluster.dashboard": "", "run_dir": target, "epochs": 8,
            "trainer.in_flight": 1, "status.print_interval": 5, "status.progress": "plain", "slot_default.dim": 4,
            "net.hidden": "8", "trainer.learning_rate": 0.02, "slot_default.learning_rate": 0.2, **dict(knobs),
        }  # fmt: skip
        config = load_config(None, [(path, str(value).split("|")) for path, value in given.items() if value is not None])
        told = StringIO()
        result = train(config, PlainConsole(file=told, width=300))
        return Ran(target, result, told.getvalue())

    return run


def stopping(folder: Path) -> tuple[tuple[str, object], ...]:
    """A cut is due with the last step of every epoch, right before the evaluation."""
    return (
        ("data.valid", folder / "valid.parquet"), ("trainer.patience", 2), ("trainer.monitor", "logloss"),
        ("checkpoint.every_steps", STEPS), ("checkpoint.keep", 1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def stopped(run: Run, folder: Path) -> Ran:
    return run(*stopping(folder))


def assert_same_rows(ran: Ran, other: Ran) -> None:
    """Rows with their state and dense weights, to the bit."""
    there, here = rows_of(ran.folder), rows_of(other.folder)
    assert {slot: rows.keys() for slot, rows in there.items()} == {slot: rows.keys() for slot, rows in here.items()}
    for slot, rows in here.items():
        assert all(there[slot][sign].tobytes() == row.tobytes() for sign, row in rows.items()), slot
    assert [w.tobytes() for w in ran.weights] == [w.tobytes() for w in other.weights]


# --- early stopping ---------------------------------------------------------------------------------------------------


def test_a_run_ends_with_the_rows_weights_and_test_of_its_best_evaluation(run: Run, stopped: Ran, folder: Path) -> None:
    """They are those of a run that trains so many epochs and no more, to the bit."""
    finished, steps = stopped.result.finished, list(stopped.evaluated)
    best_step = min(stopped.evaluated, key=lambda step: stopped.evaluated[step])
    assert finished.goes_back_to == best_step
    assert STEPS <= best_step < finished.steps < 8 * STEPS
    assert steps[steps.index(best_step) :] == [best_step, best_step + STEPS, best_step + 2 * STEPS] == [*steps[-3:]]
    reference = run(("epochs", best_step // STEPS))
    assert reference.result.finished.steps == best_step
    assert_same_rows(stopped, reference)
    assert stopped.result.test == reference.result.test
    assert stopped.result.rows == reference.result.rows == sum(map(len, rows_of(stopped.folder).values()))
    (test,) = (e for e in stopped.told("Evaluated") if e["data"] == "test")
    assert (test["step"], test["metrics"]["auc"]) == (best_step, reference.result.test.auc)
    assert f"the best evaluation was at step {best_step}: the run ends with its rows and weights" in stopped.said
    assert len(stopped.told("Finished")) == 1


def test_its_test_is_what_an_evaluation_of_it_says(stopped: Ran, folder: Path) -> None:
    """That reads the checkpoint which the run names as its own."""
    trained = open_run(stopped.folder, [("cluster.dashboard", [""])], "", print)
    assert trained.resume.last.step == stopped.result.finished.goes_back_to
    quality = evaluate(trained, [str(folder / "test.parquet")], console=PlainConsole(file=StringIO()))
    test = stopped.result.test
    assert test is not None
    assert quality["label"].auc == pytest.approx(test.auc, abs=1e-4)
    assert quality["label"].logloss == pytest.approx(test.logloss, rel=1e-5)


def test_its_ledger_adds_up_and_says_what_was_trained_in_vain(stopped: Ran) -> None:
    ledger, finished = stopped.result.ledger, stopped.result.finished
    assert ledger.adds_up
    assert ledger.read == finished.steps * BATCH
    assert ledger.trained == finished.goes_back_to * BATCH
    assert ledger.dropped == {WORSE: 2 * ROWS}
    assert f"1,200 dropped (1,200 {WORSE})" in stopped.said
    summary = json.loads((stopped.folder / "summary.json").read_text())
    assert summary["checkpoint"] == stopped.result.checkpoint
    assert summary["ledger"]["dropped"] == {WORSE: 2 * ROWS}


def test_the_checkpoint_of_the_best_evaluation_is_kept_beside_the_newest(stopped: Ran) -> None:
    finished = stopped.result.finished
    manifests = [of.manifest for of in found(stopped.store) if of.manifest]
    assert [(of.step, of.is_best) for of in manifests] == [(finished.steps, False), (finished.goes_back_to, True)]
    assert stopped.result.checkpoint == manifests[1].name == best(stopped.store, finished.goes_back_to).name


def test_a_run_that_has_stopped_ends_again_where_it_ended(run: Run, stopped: Ran, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped.folder, tmp_path / "again")
    again = run(*stopping(folder), ("resume", "true"), into=tmp_path / "again")
    assert (again.result.test, again.result.ledger) == (stopped.result.test, stopped.result.ledger)
    assert (again.result.finished.goes_back_to, again.result.finished.steps) == (
        stopped.result.finished.goes_back_to, stopped.result.finished.steps
    )  # fmt: skip
    assert again.result.checkpoint == stopped.result.checkpoint
    assert_same_rows(again, stopped)


def test_with_more_patience_it_trains_on_and_is_as_if_it_had_had_it_from_the_beginning(
    run: Run, stopped: Ran, folder: Path, tmp_path: Path
) -> None:
    """To the end of all epochs, back to the same evaluation."""
    shutil.copytree(stopped.folder, tmp_path / "again")
    knobs = (*stopping(folder), ("trainer.patience", 100), ("epochs", stopped.result.finished.epochs + 1))
    again = run(*knobs, ("resume", "true"), into=tmp_path / "again")
    finished = again.result.finished
    assert (finished.steps, finished.goes_back_to) == (stopped.result.finished.steps + STEPS, stopped.result.finished.goes_back_to)
    ledger = again.result.ledger
    assert ledger.adds_up
    assert ledger.dropped == {WORSE: 3 * ROWS}
    assert_same_rows(again, stopped)


def test_it_goes_on_in_another_directory_and_ends_with_the_checkpoint_where_it_is(run: Run, stopped: Ran, folder: Path) -> None:
    """The best evaluation was before: its checkpoint is where the run began."""
    newest = found(stopped.store)[0].name
    again = run(*stopping(folder), ("resume_from", stopped.folder / "checkpoints" / newest))
    assert (again.result.test, again.result.ledger) == (stopped.result.test, stopped.result.ledger)
    assert_same_rows(again, stopped)


def test_evaluations_in_the_middle_of_an_epoch(run: Run, folder: Path) -> None:
    """Deltas too; and the way there from any checkpoint leads to the same end."""
    knobs = (*stopping(folder), ("trainer.evaluate_steps", 4), ("checkpoint.every_steps", 3), ("checkpoint.full_every", 3))
    whole = run(*knobs, ("checkpoint.keep", 100), ("trainer.patience", 3))
    step = whole.result.finished.goes_back_to
    assert step == min(whole.evaluated, key=lambda at: whole.evaluated[at])
    assert step % STEPS, "or this test would show nothing"
    assert whole.result.ledger.adds_up
    assert whole.result.ledger.trained == step * BATCH
    manifest = best(whole.store, step)
    assert manifest is not None
    weights = next(file for file in manifest.trainer if file.path.endswith(".h5"))
    model = keras.models.load_model(whole.folder / "model.keras")
    before = [w.tobytes() for w in model.get_weights()]
    model.load_weights(whole.folder / "checkpoints" / weights.path)
    assert [w.tobytes() for w in model.get_weights()] == before
    earlier = [
        of.name for of in found(whole.store) if of.manifest and of.manifest.step < step and of.manifest.epoch == step // STEPS
    ]
    again = run(*knobs, ("trainer.patience", 3), ("resume_from", whole.folder / "checkpoints" / earlier[0]))
    assert {at: loss for at, loss in whole.evaluated.items() if at > load(whole.store, earlier[0]).step} == again.evaluated
    assert (again.result.test, again.result.ledger) == (whole.result.test, whole.result.ledger)
    assert_same_rows(again, whole)


def test_a_best_checkpoint_that_has_gone_is_said(run: Run, stopped: Ran, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped.folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / stopped.result.checkpoint)
    step = stopped.result.finished.goes_back_to
    said = rf"the best evaluation was at step {step}, but there is no checkpoint of it; the run directory has the dense"
    with pytest.raises(CheckpointError, match=said):
        run(*stopping(folder), ("resume", "true"), into=tmp_path / "again")


# --- fewer negatives ----------------------------------------------------------------------------------------------------

RARE, KEPT = 0.08, 0.2


@pytest.fixture(scope="module")
def rare(folder: Path) -> tuple[tuple[str, object], ...]:
    """One sample in about ten is positive; of the others a fifth is trained."""
    train, test = (write(folder / f"rare-{seed}.parquet", rows, seed, RARE) for seed, rows in ((3, 4000), (4, 4000)))
    return (
        ("data.train", train), ("data.test", test), ("data.negative_rate", KEPT), ("epochs", 3), ("data.batch_size", 100),
        ("checkpoint.every_steps", 10), ("checkpoint.keep", 100), ("data.exclude", "buy|item"),
        ("slot_default.learning_rate", 0.05), ("trainer.learning_rate", 0.01),
    )  # fmt: skip


@pytest.fixture(scope="module")
def fewer(run: Run, rare: tuple[tuple[str, object], ...]) -> Ran:
    return run(*rare)


def test_with_fewer_negatives_predictions_are_calibrated_all_the_same(fewer: Ran) -> None:
    """The model itself gives what it has seen: four in ten samples positive."""
    test = fewer.result.test
    assert test is not None
    assert test.examples == 4000, "all of the test data"
    assert 0.05 < test.real_mean < 0.15
    assert test.prob_mean == pytest.approx(test.real_mean, rel=0.25)
    seen = fewer.told("Interval")[-1]["epoch_metrics"]
    assert seen["real_mean"] > 3 * test.real_mean
    assert seen["prob_mean"] == pytest.approx(seen["real_mean"], abs=0.05)
    odds = seen["prob_mean"] / (1 - seen["prob_mean"])
    assert test.prob_mean == pytest.approx(odds * KEPT / (1 + odds * KEPT), abs=0.03)
    assert test.auc is not None
    assert test.auc > 0.68


def test_with_fewer_negatives_the_ledger_says_how_many_were_left_out(fewer: Ran) -> None:
    ledger, finished = fewer.result.ledger, fewer.result.finished
    assert ledger.adds_up
    assert ledger.read == 3 * 4000
    assert ledger.trained == finished.examples
    assert ledger.dropped == {"negatives": 12_000 - finished.examples}
    labels = pq.read_table(fewer.folder.parent / "rare-3.parquet")["label"].to_numpy()
    assert ledger.trained == pytest.approx(3 * (labels.sum() + KEPT * (1 - labels).sum()), rel=0.05)
    assert f"({12_000 - finished.examples:,} negatives)" in fewer.said


def test_with_fewer_negatives_a_run_goes_on_in_the_middle_of_an_epoch_to_the_bit(
    run: Run, fewer: Ran, rare: tuple[tuple[str, object], ...]
) -> None:
    name = next(of.name for of in found(fewer.store) if of.manifest and of.manifest.epoch == 1 and of.manifest.step % 40)
    assert load(fewer.store, name).ledger["done"], "in the middle of an epoch"
    again = run(*rare, ("resume_from", fewer.folder / "checkpoints" / name))
    assert (again.result.ledger, again.result.test) == (fewer.result.ledger, fewer.result.test)
    assert_same_rows(again, fewer)


@pytest.mark.parametrize("in_flight", [pytest.param(1, marks=pytest.mark.long), 3])
def test_steps_without_a_sample_left_are_passed_over_and_accounted_for(
    run: Run, rare: tuple[tuple[str, object], ...], in_flight: int
) -> None:
    """Batches of four, of which nearly all negatives are left out: most have nothing left."""
    knobs = (*rare, ("data.negative_rate", 0.001), ("data.batch_size", 4), ("epochs", 1), ("trainer.in_flight", in_flight))
    ran = run(*knobs, ("checkpoint.every_steps", 60))
    ledger = ran.result.ledger
    assert ledger.adds_up
    assert (ledger.read, ledger.trained) == (4000, ran.result.finished.examples)
    assert ran.result.finished.steps < 600, "of 1000"
    inside = [load(ran.store, of.name) for of in found(ran.store) if of.manifest]
    assert len(inside) >= 3
    for manifest in inside:
        of = manifest.ledger
        assert of["read"] == of["trained"] + of["dropped"]["negatives"] == of["ended"] + sum(part["rows"] for part in of["done"])


def test_early_stopping_with_fewer_negatives_drops_for_two_reasons(run: Run, folder: Path) -> None:
    knobs = (*stopping(folder), ("data.negative_rate", 0.5), ("trainer.patience", 1), ("checkpoint.every_steps", 7))
    ran = run(*knobs)
    ledger, finished = ran.result.ledger, ran.result.finished
    assert 0 < finished.goes_back_to < finished.steps
    assert ledger.adds_up
    assert ledger.read == finished.epochs * ROWS
    assert ledger.trained + ledger.dropped[WORSE] == finished.examples
    assert ledger.dropped["negatives"] == ledger.read - finished.examples
    assert ran.result.test is not None
    again = run(("data.negative_rate", 0.5), ("epochs", finished.goes_back_to // STEPS))
    assert_same_rows(ran, again)
    assert ran.result.test == again.result.test


# --- several labels, weights of samples ---------------------------------------------------------------------------------


def test_two_labels_with_mmoe_each_learn_their_own(run: Run) -> None:
    ran = run(
        ("data.extra_labels", "buy"), ("data.exclude", "item"), ("model", "mmoe"), ("epochs", 6), ("net.experts", 2),
        ("slot_default.learning_rate", 0.1),
    )  # fmt: skip
    (test,) = ran.told("Evaluated")
    of_click, of_buy = test["metrics"], test["more"]["buy"]
    assert ran.result.test is not None
    assert of_click["auc"] == ran.result.test.auc
    table = pq.read_table(ran.folder.parent / "test.parquet")
    assert of_click["real_mean"] == pytest.approx(table["label"].to_numpy().mean())
    assert of_buy["real_mean"] == pytest.approx(table["buy"].to_numpy().mean())
    assert of_click["auc"] > 0.68, "best reachable is about 0.73"
    assert of_buy["auc"] > 0.9
    assert ran.told("Interval")[-1]["more"].keys() == {"buy"}
    assert json.loads((ran.folder / "schema.json").read_text())["labels"] == ["label", "buy"]
    assert ran.result.ledger.adds_up


def test_samples_of_weight_0_are_as_if_they_were_not_there_but_for_the_divisor(run: Run, folder: Path) -> None:
    """Of twice the samples, each second one weighs 2 and the others nothing: the mean is that of the ones that count."""
    table = pq.read_table(folder / "train.parquet").slice(0, 300)
    noise = table.set_column(0, "label", pa.array(1 - table["label"].to_numpy()))
    mixed = pa.concat_tables([part for k in range(0, 300) for part in (table.slice(k, 1), noise.slice(k, 1))])
    weights = np.tile(np.array([2.0, 0.0]), 300)
    pq.write_table(mixed.append_column("w", pa.array(weights)), folder / "mixed.parquet", row_group_size=150)
    pq.write_table(mixed.slice(0, 40).append_column("w", pa.array(np.ones(40))), folder / "mixed-test.parquet")
    pq.write_table(table, folder / "alone.parquet", row_group_size=75)
    knobs = (("data.shuffle", "false"), ("epochs", 2))
    weighted = run(
        *knobs, ("data.train", folder / "mixed.parquet"), ("data.sample_weight", "w"), ("data.test", folder / "mixed-test.parquet")
    )  # fmt: skip
    alone = run(*knobs, ("data.train", folder / "alone.parquet"), ("data.batch_size", BATCH // 2))
    assert weighted.result.finished.examples == 2 * alone.result.finished.examples
    there, here = rows_of(weighted.folder), rows_of(alone.folder)
    for slot, rows in here.items():
        assert there[slot].keys() == rows.keys()
        np.testing.assert_allclose([there[slot][sign] for sign in rows], list(rows.values()), rtol=1e-3, atol=1e-5)
    for weight, wanted in zip(weighted.weights, alone.weights, strict=True):
        np.testing.assert_allclose(weight, wanted, rtol=1e-3, atol=1e-5)

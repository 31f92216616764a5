"""Runs that are saved, and go on from what was saved: as if nothing had happened, or refused with what differs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps.checkpoint.ledger import Ledger
from flowps.checkpoint.manifest import chain, found
from flowps.checkpoint.store import Store
from flowps.cluster.assign import assign
from flowps.cluster.launch import gather_workers, launch
from flowps.cluster.plan import plan
from flowps.cluster.resume import Resume, choose, find, prepare
from flowps.cluster.run import Result, Start, run
from flowps.cluster.run_dir import RunDir
from flowps.cluster.saver import Saver
from flowps.cluster.shard_role import SaveTask
from flowps.errors import CheckpointError, ConfigError
from flowps.status.event import AtCut, Event, Interval, Remark, Saved
from tests.cluster.conftest import ROWS, config_of, one_machine, rows_of, write_data

EPOCHS, BATCH = 2, 32
STEPS = EPOCHS * -(-ROWS // BATCH)


@dataclass
class Ran:
    """A run that has ended, and what it has said."""

    folder: Path
    events: list[Event] = field(default_factory=list)
    result: Result = field(init=False)

    def of_kind(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def intervals(self) -> dict[int, tuple[Any, Any]]:
        return {event.step: (event.metrics, event.epoch_metrics) for event in self.of_kind(Interval)}

    @property
    def weights(self) -> list[np.ndarray]:
        return list(keras.models.load_model(self.folder / "model.keras").get_weights())


Train = Callable[..., Ran]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With data.parquet."""
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder / "data.parquet")
    return folder


@pytest.fixture(scope="module")
def train(folder: Path) -> Train:
    """Train in a folder of its own. `see(event)` may return True to stop the run."""
    numbers = count()

    def train(*knobs: tuple[str, object], see: Callable[[Event], object] = lambda event: None) -> Ran:
        given = [("epochs", EPOCHS), ("trainer.in_flight", 1), ("status.print_interval", 5), ("checkpoint.every_steps", 8)]
        config = config_of(folder / "data.parquet", *given, ("checkpoint.keep", 100), *knobs)
        ran, stopped = Ran(folder / f"run-{next(numbers)}"), list[Event]()

        def watch(event: Event) -> None:
            ran.events.append(event)
            if see(event):
                stopped.append(event)

        with launch(config) as (client, _), closing(RunDir(ran.folder)) as run_dir:
            resume = find(config, lambda text: ran.events.append(Remark(text)))
            made = plan(config, gather_workers(client, config, print, lambda: False), resume)
            resume = resume and choose(resume, made.schema, lambda text: ran.events.append(Remark(text)))
            run_dir.prepare(config, made.schema)
            store = Store(str(ran.folder / "checkpoints"))
            store.prepare()
            ran.result = run(client, made, run_dir, [watch], lambda: bool(stopped), Start(store.url, resume))
        return ran

    return train


@pytest.fixture(scope="module")
def whole(train: Train) -> Ran:
    """The run that all others are compared with."""
    return train()


def checkpoint(ran: Ran, step: int) -> tuple[str, object]:
    """The knob to go on from the checkpoint after a step."""
    (path,) = (ran.folder / "checkpoints").glob(f"step-{step:09d}-*")
    return "resume_from", str(path)


def assert_bit_equal(ran: Ran, whole: Ran, after: int) -> None:
    """Rows with their state, dense weights, and all that was printed after a step."""
    there, here = rows_of(ran.folder), rows_of(whole.folder)
    assert {slot: rows.keys() for slot, rows in there.items()} == {slot: rows.keys() for slot, rows in here.items()}
    for slot, rows in here.items():
        assert all(there[slot][sign].tobytes() == row.tobytes() for sign, row in rows.items()), slot
    assert [w.tobytes() for w in ran.weights] == [w.tobytes() for w in whole.weights]
    assert ran.intervals == {step: metrics for step, metrics in whole.intervals.items() if step > after}
    assert ran.result.test == whole.result.test


def test_a_run_is_saved_when_it_is_due_and_at_its_end_and_old_ones_go(train: Train) -> None:
    ran = train(("checkpoint.keep", 3))
    saved = ran.of_kind(Saved)
    due = [8, 16, 24, 32]
    assert {event.step for event in saved} <= {*due, STEPS}
    assert saved[-1].step == STEPS  # waited for; one of the others may have been left out, which is then said
    assert len(saved) + len(ran.of_kind(Remark)) == len(due) + 1
    assert all(event.kind == "full" and event.rows == 20 and event.pause_s > 0 for event in saved[1:])
    kept = found(Store(str(ran.folder / "checkpoints")))
    assert [folder.manifest.step for folder in kept if folder.manifest] == [event.step for event in saved[:-4:-1]]
    ledger = ran.result.ledger
    assert ledger.adds_up
    assert (ledger.read, ledger.trained, ledger.replayed, ledger.epoch) == (EPOCHS * ROWS, EPOCHS * ROWS, 0, EPOCHS)


def test_in_flight_1_goes_on_to_the_bit(train: Train, whole: Ran) -> None:
    for step in (event.step for event in whole.of_kind(Saved) if event.step < STEPS):
        again = train(checkpoint(whole, step))
        assert_bit_equal(again, whole, step)
        assert again.result.finished.examples == EPOCHS * ROWS
        assert again.result.ledger == whole.result.ledger


def test_a_delta_goes_on_to_the_bit_too(train: Train, whole: Ran) -> None:
    ran = train(("checkpoint.full_every", 3))
    kinds = {event.step: event.kind for event in ran.of_kind(Saved)}
    assert [*kinds.values()][:4] == ["full", "delta", "delta", "full"]
    step = [step for step, kind in kinds.items() if kind == "delta"][1]
    assert_bit_equal(train(checkpoint(ran, step)), whole, step)


def test_a_stop_is_saved_and_goes_on_to_the_bit(train: Train, whole: Ran) -> None:
    stopped = train(see=lambda event: isinstance(event, Interval) and event.step >= 15)
    assert stopped.result.finished.stopped
    step = stopped.result.finished.steps
    assert stopped.of_kind(Saved)[-1].step == step < STEPS
    assert_bit_equal(train(("resume_from", str(stopped.folder / "checkpoints"))), whole, step)


@pytest.mark.parametrize(("before", "after", "in_flight"), [(1, 2, 1), (2, 1, 3), (2, 3, 1)])
def test_other_shards_train_the_same_samples(train: Train, whole: Ran, before: int, after: int, in_flight: int) -> None:
    knobs = (("trainer.in_flight", in_flight),)
    first = whole if (before, in_flight) == (1, 1) else train(*knobs, ("ps.num_shards", before))
    again = train(*knobs, ("ps.num_shards", after), checkpoint(first, first.of_kind(Saved)[1].step))
    assert again.result.ledger == first.result.ledger
    assert again.result.ledger.adds_up
    assert (again.result.finished.steps, again.result.finished.examples) == (STEPS, EPOCHS * ROWS)
    there, here = rows_of(again.folder), rows_of(whole.folder)
    assert {slot: rows.keys() for slot, rows in there.items()} == {slot: rows.keys() for slot, rows in here.items()}
    if in_flight == 1:
        for slot, rows in here.items():
            np.testing.assert_allclose([there[slot][sign] for sign in rows], list(rows.values()), rtol=1e-5, atol=1e-7)


def test_another_capacity_is_no_other_model(train: Train, whole: Ran) -> None:
    again = train(("slot_default.capacity_rows", 4000), checkpoint(whole, 16))
    assert_bit_equal(again, whole, 16)


@pytest.mark.parametrize(
    ("knob", "value", "said"),
    [
        ("slot_default.dim", 8, r"slot 'user': dim 16 there, 8 now"),
        ("slot_default.optimizer", "adam", r"slot 'user': optimizer 'adagrad' there, 'adam' now"),
        ("slot_default.hash_size", 7, r"slot 'user': hash_size 0 there, 7 now"),
        ("data.exclude", "x", r"dense: \['x'\] there, \[\] now"),
        ("seed", 5, r"seed = 0 there, 5 now; set seed = 0"),
        ("data.partition_rows", 200, r"data.partition_rows = 100 there, 200 now"),
        ("model", "deepfm", r"the dense model or its optimizer is another one: variable model/"),
        ("trainer.optimizer", "sgd", r"the dense model or its optimizer is another one: variable optimizer/"),
    ],
)
def test_another_model_is_refused_with_what_differs(train: Train, whole: Ran, knob: str, value: object, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        train(checkpoint(whole, 16), (knob, value))


def test_a_file_that_has_changed_in_the_middle_of_an_epoch_is_refused(train: Train, whole: Ran, tmp_path: Path) -> None:
    own = shutil.copy(whole.folder.parent / "data.parquet", tmp_path / "data.parquet")
    ran = train(("epochs", 1), ("data.train", own))
    table = pq.read_table(own)
    pq.write_table(pa.concat_tables([table.slice(0, 90), table]), own, row_group_size=90)
    with pytest.raises(CheckpointError, match=r"data\.parquet: of rows .* are trained in epoch 0, but now the partition has rows"):
        train(("epochs", 1), ("data.train", own), checkpoint(ran, 8))


def test_a_damaged_checkpoint_is_passed_over_by_name(train: Train, whole: Ran, tmp_path: Path) -> None:
    store = tmp_path / "checkpoints"
    shutil.copytree(whole.folder / "checkpoints", store)
    before, newest = sorted(store.iterdir())[-3:-1]
    shutil.rmtree(sorted(store.iterdir())[-1])
    damaged = newest / "shard-0" / "table-0.rows.arrow"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    again = train(("resume_from", str(store)))
    (remark,) = again.of_kind(Remark)[:1]
    assert f"checkpoint {newest.name} is passed over: " in remark.text
    assert "table-0.rows.arrow: is damaged: its checksum is" in remark.text
    assert_bit_equal(again, whole, int(before.name.split("-")[1]))


class TestWarmStart:
    def test_what_fits_is_taken_and_a_new_ledger_begins(self, train: Train, whole: Ran) -> None:
        ran = train(("warm_start", str(whole.folder / "checkpoints")), ("epochs", 1), ("trainer.learning_rate", 1e-9),
                    ("slot_default.learning_rate", 1e-9))  # fmt: skip
        said = [remark.text for remark in ran.of_kind(Remark)]
        assert [text for text in said if text.startswith("warm start: ")] == ["warm start: 6 of 6 dense variables are taken over"]
        assert (ran.result.ledger.trained, ran.result.finished.steps) == (ROWS, STEPS // EPOCHS)
        there, here = rows_of(ran.folder)["user"], rows_of(whole.folder)["user"]
        assert there.keys() == here.keys()
        np.testing.assert_allclose([there[sign][:16] for sign in here], [row[:16] for row in here.values()], atol=1e-6)
        for weight, wanted in zip(ran.weights, whole.weights, strict=True):
            np.testing.assert_allclose(weight, wanted, atol=1e-6)

    def test_what_does_not_fit_begins_anew_and_is_listed(self, train: Train, whole: Ran) -> None:
        ran = train(("warm_start", checkpoint(whole, 16)[1]), ("epochs", 1), ("slot_default.dim", 8))
        said = [remark.text for remark in ran.of_kind(Remark)]
        assert "warm start: slot 'user' begins without rows: dim 16 there, 8 now" in said
        assert any(text.startswith("warm start: 5 of 6 dense variables are taken over; these begin anew: ") for text in said)
        assert ran.result.ledger.adds_up

    def test_it_is_no_way_to_go_on(self, train: Train, whole: Ran) -> None:
        with pytest.raises(ConfigError, match="warm_start begins a new run, resume and resume_from go on with one"):
            train(("warm_start", "x"), ("resume", "true"))


def test_nothing_to_go_on_from(train: Train, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none: there is no checkpoint; give another place, or start without --resume"):
        train(("resume_from", str(tmp_path / "none")))


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_folder_that_vanishes(train: Train, folder: Path, on_error: str) -> None:
    """It is said; the run ends, or trains on to its end."""
    gone: list[Event] = []

    def vanish(event: Event) -> None:
        if isinstance(event, Saved) and not gone:
            newest = max(folder.glob("run-*"), key=lambda path: int(path.name.partition("-")[2]))
            shutil.rmtree(newest / "checkpoints")
            gone.append(event)

    if on_error == "stop":
        with pytest.raises(CheckpointError, match=r"cannot be written: No such file or directory; it has gone"):
            train(see=vanish)
        return
    ran = train(("checkpoint.on_error", "warn"), see=vanish)
    assert ran.result.finished.examples == EPOCHS * ROWS
    assert any("no checkpoint: " in remark.text and "it has gone" in remark.text for remark in ran.of_kind(Remark))
    assert ran.result.ledger.adds_up


def test_after_a_checkpoint_that_failed_a_loss_goes_back_to_the_one_before(whole: Ran, folder: Path, tmp_path: Path) -> None:
    """And the next one is a full one: it needs nothing of those before."""
    config = config_of(folder / "data.parquet", ("checkpoint.on_error", "warn"), ("checkpoint.full_every", 100))
    said: list[Event] = []
    made = plan(config, assign([one_machine()], 1, 1))
    saver = Saver(made, str(tmp_path), "flowps-run", Ledger(), said.append)
    newest = next(f.manifest for f in found(Store(str(whole.folder / "checkpoints"))) if f.manifest)
    saver._newest, saver._count = [newest], 1
    saver._failed(CheckpointError("no room"))
    assert saver.newest is not None
    assert saver.newest.last is newest
    assert [event.text for event in said if isinstance(event, Remark)] == ["no checkpoint: no room"]
    asked: list[SaveTask] = []
    roles = SimpleNamespace(ask_shards=lambda method, task: asked.append(task), go_on=lambda step: None)
    saver.see(AtCut(0, 40, 0, ROWS, ROWS, [], False), roles)
    assert [task.since for task in asked] == [None]


def test_a_ledger_without_checkpoints(train: Train) -> None:
    """It is kept in any case."""
    ran = train(("checkpoint.every_steps", 0), ("checkpoint.every_s", 0))
    assert ran.result.ledger == Ledger(epoch=EPOCHS, read=EPOCHS * ROWS, trained=EPOCHS * ROWS, ended=EPOCHS * ROWS)


def test_checkpoints_of_another_run_are_in_the_way(whole: Ran) -> None:
    url = str(whole.folder / "checkpoints")
    with pytest.raises(CheckpointError, match=r"has checkpoints of an earlier run; go on from them with --resume"):
        prepare(url, None, is_newest=False)
    store = Store(url)
    older = next(folder.manifest for folder in found(store) if folder.manifest and folder.manifest.step == 16)
    resume = Resume(url, tuple(chain(store, older)))
    with pytest.raises(CheckpointError, match=r"is newer than step-000000016-\w+, where this run is to begin; give it another"):
        prepare(url, resume, is_newest=False)
    prepare(url, resume, is_newest=True)

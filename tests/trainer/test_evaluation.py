"""Evaluations on the validation data: when they are, that they change nothing, and how the best of them ends a training early."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import keras
import msgspec
import numpy as np
import pytest

from flowps.batch import Batch, Float32
from flowps.config import Checkpoint, Config, Data
from flowps.errors import StoppedError
from flowps.status.event import Evaluated
from flowps.trainer.loop import Trained
from flowps.trainer.models import ModelSpec
from flowps.trainer.state import Cut, State
from tests.trainer.test_loop import DIM, SIZE, SLOTS, SPEC, ListStream, World, make_batches, make_config

pytestmark = pytest.mark.timeout(120)  # a run that hangs is the failure most of these look for

_DATA = Data()
BOTH = replace(SPEC, labels=("click", "buy"))


@pytest.fixture(autouse=True)
def model_of_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose logit is the first embedding: what a lookup gives is what is predicted. And one of two labels."""

    def build(spec: ModelSpec) -> keras.Model:
        inputs = spec.inputs()
        return keras.Model(inputs, inputs["embeddings"][:, : len(spec.labels)])

    monkeypatch.setitem(sys.modules, "flowps_test_first", SimpleNamespace(build=build))


def config_of(
    epochs: int = 1, in_flight: int = 1, model: str = "flowps_test_first:build", every_steps: int = 0,
    data: Data = _DATA, **knobs: Any,
) -> Config:  # fmt: skip
    config = make_config(
        epochs, in_flight, model=model, data=data, checkpoint=Checkpoint(every_steps=every_steps, every_s=0)
    )  # fmt: skip
    return msgspec.structs.replace(config, trainer=msgspec.structs.replace(config.trainer, **knobs))


@dataclass
class Validated:
    """A world whose evaluations on the validation data have, one after the other, these AUCs: multiples of a quarter.

    cuts, rows   where the trainer was, and the rows there
    in_flight    batches in flight at each evaluation
    """

    aucs: Sequence[float]
    train: Sequence[Batch] = field(default_factory=lambda: make_batches(7))
    test: Sequence[Batch] | None = field(default_factory=lambda: make_batches(2, seed=1))
    cuts: list[Cut] = field(default_factory=list)
    rows: list[Float32] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world = World(self.train, self.test)
        self._rest = iter(self.aucs)

    def valid(self) -> ListStream:
        """Four positive and four negative samples; so many of the positive ones are predicted to be above all negative ones."""
        self.in_flight.append(len(self.world.in_flight))
        right = round(4 * next(self._rest))
        (batch,) = make_batches(1, seed=2)
        batch.labels[:] = [1] * 4 + [0] * 4
        self._scores = np.array([1.0] * right + [-1.0] * (4 - right) + [0.0] * 4, np.float32)
        return ListStream([replace(batch, signs=batch.signs + np.uint64(1 << 40))])

    def lookup(self, ticket: int, batch: Batch, training: bool) -> Float32:
        if batch.signs[0] < 1 << 40:
            return self.world.lookup(ticket, batch, training)
        self.world.lookups.append((ticket, training))
        return np.repeat(self._scores[:, None], SLOTS * DIM, axis=1)

    def cut(self, cut: Cut) -> None:
        self.cuts.append(cut)
        self.rows.append(self.world.rows.copy())

    def run(self, config: Config, spec: ModelSpec = SPEC, **changes: Any) -> Trained:
        return self.world.run(config, spec, **{"valid": self.valid, "lookup": self.lookup, "cut": self.cut, **changes})

    @property
    def evaluated(self) -> list[tuple[str, int, int, float | None, bool]]:
        return [(e.data, e.epoch, e.step, e.metrics.auc, e.is_best) for e in self.world.of_kind(Evaluated)]

    @property
    def steps(self) -> list[int]:
        """After which the validation data were evaluated on."""
        return [e.step for e in self.world.of_kind(Evaluated) if e.data == "valid"]


# --- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize(
    ("every", "steps"), [(0, [7, 14, 21]), (4, [4, 7, 8, 12, 14, 16, 20, 21]), (7, [7, 14, 21]), (100, [7, 14, 21])]
)  # fmt: skip
def test_they_come_in_time_and_at_the_end_of_every_epoch_but_not_twice_at_a_step(every: int, steps: list[int], in_flight: int):
    """With nothing in flight; what is read ahead is neither lost nor trained twice."""
    run = Validated([0.5] * 20)
    trained = run.run(config_of(3, in_flight, evaluate_steps=every))
    if in_flight == 1:
        assert run.steps == steps
    else:  # one that is due after the end of an epoch is at its end
        assert set(run.steps) >= {7, 14, 21}
        assert run.steps == sorted(set(run.steps))
        assert set(run.steps) <= set(steps)
    assert run.in_flight == [0] * len(run.steps)
    assert sorted(ticket for ticket, training in run.world.lookups if training) == list(range(21))
    assert [ticket for ticket, _ in run.world.pushes] == list(range(21))
    assert (trained.finished.steps, trained.finished.examples, trained.finished.goes_back_to) == (21, 21 * SIZE, 0)
    assert [e.epoch for e in run.world.of_kind(Evaluated) if e.data == "valid" and e.step % 7 == 0] == [0, 1, 2]


def test_without_patience_they_are_only_told():
    """The run ends with what it ends with, and the test is made there."""
    run = Validated([0.75, 0.5, 0.25])
    trained = run.run(config_of(3))
    assert run.evaluated[:3] == [("valid", 0, 7, 0.75, True), ("valid", 1, 14, 0.5, False), ("valid", 2, 21, 0.25, False)]
    assert [(data, step) for data, _, step, _, _ in run.evaluated[3:]] == [("test", 21)]
    assert (trained.finished.goes_back_to, trained.finished.epochs) == (0, 3)
    assert trained.test is not None


def test_they_change_nothing():
    """The rows and weights of a run with evaluations are those of one without, to the bit."""
    runs = [Validated([0.5] * 20), Validated([0.5] * 20)]
    trained = [
        runs[0].run(config_of(2, 1, model="dnn", evaluate_steps=2)),
        runs[1].run(config_of(2, 1, model="dnn"), valid=None),
    ]  # fmt: skip
    assert len(runs[0].steps) == 8
    assert runs[1].steps == []
    assert runs[0].world.rows.tobytes() == runs[1].world.rows.tobytes()
    for one, other in zip(*(of.model.get_weights() for of in trained), strict=True):
        assert one.tobytes() == other.tobytes()
    assert len(runs[0].world.pushes) == 14


# --- early stopping ---------------------------------------------------------------------------------------------------


def test_training_ends_when_none_was_better_for_so_long():
    """At the end of epochs: the third and fourth evaluation are no better than the second."""
    run = Validated([0.25, 0.75, 0.5, 0.75, 1.0])
    trained = run.run(config_of(9, patience=2))
    assert run.evaluated == [
        ("valid", 0, 7, 0.25, True), ("valid", 1, 14, 0.75, True), ("valid", 2, 21, 0.5, False), ("valid", 3, 28, 0.75, False)
    ]  # fmt: skip
    finished = trained.finished
    assert (finished.goes_back_to, finished.steps, finished.epochs, finished.stopped) == (14, 28, 4, False)
    assert trained.test is None, "it is for who has the rows of the best one"
    assert [(cut.step, cut.is_best, cut.last) for cut in run.cuts] == [(7, True, False), (14, True, False), (28, False, True)]


@pytest.mark.parametrize("in_flight", [1, 4])
def test_training_ends_in_the_middle_of_an_epoch(in_flight: int):
    run = Validated([0.75, 0.5, 0.5, 1.0], train=make_batches(40))
    trained = run.run(config_of(3, in_flight, patience=2, evaluate_steps=6))
    assert run.steps == [6, 12, 18]
    finished = trained.finished
    assert (finished.goes_back_to, finished.steps, finished.examples, finished.epochs) == (6, 18, 18 * SIZE, 0)
    assert not run.world.in_flight
    assert [ticket for ticket, _ in run.world.pushes] == list(range(18))
    last = run.cuts[-1]
    assert (last.last, last.step, last.epoch, last.samples, last.read) == (True, 18, 0, 18 * SIZE, 18 * SIZE)


def test_a_run_that_ends_with_its_best_evaluation_does_not_go_back():
    run = Validated([0.25, 0.5, 0.75])
    trained = run.run(config_of(3, patience=2))
    assert trained.finished.goes_back_to == 0
    assert trained.test is not None
    assert [e[:3] for e in run.evaluated if e[0] == "test"] == [("test", 3, 21)]


def test_a_run_that_trains_all_epochs_goes_back_to_its_best_evaluation_too():
    run = Validated([0.25, 0.75, 0.5])
    trained = run.run(config_of(3, patience=5))
    assert (trained.finished.goes_back_to, trained.finished.epochs, trained.test) == (14, 3, None)


def test_evaluations_that_say_nothing_end_training_without_a_way_back():
    """With one class there is no AUC: no evaluation is the best, and the run ends with what it has."""
    run = Validated([0.5] * 9)

    def valid() -> ListStream:
        stream = run.valid()
        (batch,) = stream
        batch.labels[:] = 1
        return ListStream([batch])

    trained = run.run(config_of(9, patience=2), valid=valid)
    assert [e[3:] for e in run.evaluated if e[0] == "valid"] == [(None, False)] * 2
    assert (trained.finished.goes_back_to, trained.finished.epochs) == (0, 2)
    assert trained.test is not None


def test_the_logloss_can_be_what_is_watched():
    """Three of four right with scores of 1 and -1 have a lower logloss than two of four, whatever it is."""
    run = Validated([0.5, 0.75, 0.5, 0.25, 1.0])
    trained = run.run(config_of(9, patience=2, monitor="logloss"))
    losses = [e.metrics.logloss for e in run.world.of_kind(Evaluated)]
    assert losses[1] < losses[0] == losses[2] < losses[3]
    assert [e[4] for e in run.evaluated] == [True, True, False, False]
    assert trained.finished.goes_back_to == 14


# --- cuts and what goes on from them ------------------------------------------------------------------------------------


def test_a_cut_that_is_due_with_an_evaluation_comes_after_it():
    """One cut, which says that the evaluation was the best."""
    run = Validated([0.5, 0.25, 0.75, 0.5], train=make_batches(9))
    run.run(config_of(1, every_steps=3, evaluate_steps=3, patience=9))
    assert [(cut.step, cut.is_best, cut.last) for cut in run.cuts] == [
        (3, True, False), (6, False, False), (9, True, False), (9, False, True)
    ]  # fmt: skip
    assert [cut.state.best["seen"] for cut in run.cuts if cut.state] == [3, 6, 9, 9]


def going_on(run: Validated, config: Config, cut: int, aucs: Sequence[float]) -> tuple[Validated, Trained]:
    """From a cut of a run, with evaluations that have these AUCs."""
    at = run.cuts[cut]
    assert at.state is not None
    again = Validated(aucs, run.train, run.test)
    again.world.rows = run.rows[cut].copy()
    skip = at.samples // SIZE

    def train(epoch: int) -> ListStream:
        return ListStream(list(run.train)[skip if epoch == at.epoch else 0 :])

    return again, again.run(config, train=train, resume=State.of_bytes(at.state.to_bytes()))


def test_a_run_that_goes_on_evaluates_what_is_left_and_ends_where_the_whole_one_ends():
    """Wherever it was cut: in the middle of an epoch or at its end, at a best evaluation, after one that was none, before one."""
    aucs = [0.25, 0.75, 0.5, 0.5, 0.25, 1.0]
    config = config_of(9, model="dnn", every_steps=2, evaluate_steps=5, patience=3)
    run = Validated(aucs, make_batches(10))
    trained = run.run(config)
    assert (run.steps, trained.finished.goes_back_to) == ([5, 10, 15, 20, 25], 10)
    assert {cut.step for cut in run.cuts} == {*range(2, 26, 2), 5, 10, 25}
    for step in (2, 5, 10, 14, 20):
        cut = [of.step for of in run.cuts].index(step)
        at = run.cuts[cut]
        assert at.state is not None
        seen = at.state.best.get("seen", 0) // 5
        again, found = going_on(run, config, cut, aucs[seen:])
        assert again.steps == run.steps[seen:], f"from step {at.step}"
        assert again.evaluated == run.evaluated[seen:]
        assert (found.finished.goes_back_to, found.finished.steps, found.finished.epochs) == (10, 25, 2)
        assert again.world.rows.tobytes() == run.world.rows.tobytes()
        for one, other in zip(found.model.get_weights(), trained.model.get_weights(), strict=True):
            assert one.tobytes() == other.tobytes()


def test_an_evaluation_that_was_decided_on_is_not_lost_to_a_resume():
    """With three batches in flight it is decided on two steps before; at the end of an epoch, 11, it comes before its time."""
    config = config_of(2, in_flight=3, every_steps=1, evaluate_steps=4)
    run = Validated([0.5] * 20, make_batches(11))
    run.run(config)
    assert run.steps == [4, 8, 11, 16, 20, 22]
    assert {3, 7, 10, 11} < {cut.step for cut in run.cuts}
    for cut, at in enumerate(run.cuts[:-1]):
        assert at.state is not None
        again, _ = going_on(run, config, cut, [0.5] * 20)
        assert again.steps == [step for step in run.steps if step > at.state.best.get("seen", 0)], f"from step {at.step}"


def test_a_run_that_was_over_is_over_when_it_goes_on_unless_it_has_more_patience():
    run = Validated([0.75, 0.5, 0.5], make_batches(7))
    run.run(config_of(9, patience=2))
    assert run.cuts[-1].last
    again, found = going_on(run, config_of(9, patience=2), -1, [])
    assert (again.steps, again.world.pushes, found.finished.goes_back_to, found.finished.steps) == ([], [], 7, 21)
    assert [(cut.step, cut.last) for cut in again.cuts] == [(21, True)]
    longer, found = going_on(run, config_of(9, patience=4), -1, [0.5, 1.0, 0.5, 0.5, 0.5, 0.5])
    assert longer.steps == [28, 35, 42, 49, 56, 63]
    assert longer.evaluated[1] == ("valid", 4, 35, 1.0, True)
    assert found.finished.goes_back_to == 35


def test_a_run_that_has_only_its_end_left_is_tested_as_it_was_at_the_cut():
    run = Validated([0.75, 0.5, 0.5])
    run.run(config_of(9, model="dnn", patience=2))
    best = run.cuts[0]
    assert (best.step, best.is_best) == (7, True)
    again = Validated([], run.train, run.test)
    again.world.rows = run.rows[0].copy()
    found = again.run(config_of(9, model="dnn", patience=2), resume=best.state, trains=False)
    assert (again.world.pushes, again.cuts, again.steps) == ([], [], [])
    assert (found.finished.goes_back_to, found.finished.steps) == (0, 7)
    assert [e[:3] for e in again.evaluated] == [("test", 0, 7)]
    once = Validated([1.0], run.train, run.test)
    assert once.run(config_of(1, model="dnn")).test == found.test, "as a run that has ended there"
    assert once.world.rows.tobytes() == run.rows[0].tobytes()


def test_a_stop_in_an_evaluation_leaves_it_out_and_is_a_cut():
    """Nothing was evaluated: a run that goes on from there does it again."""
    run = Validated([0.5, 0.75])

    def valid() -> ListStream:
        if len(run.in_flight) == 1:
            run.world.stop.set()
        return run.valid()

    trained = run.run(config_of(9, patience=1), valid=valid)
    assert (trained.finished.stopped, trained.finished.goes_back_to, trained.test) == (True, 0, None)
    assert run.steps == [7]
    last = run.cuts[-1]
    assert (last.last, last.step, last.is_best) == (True, 14, False)
    assert last.state is not None
    assert last.state.best["seen"] == 7
    again, found = going_on(run, config_of(3, patience=5), -1, [0.75, 0.5])
    assert again.steps == [14, 21]
    assert found.finished.goes_back_to == 14


@pytest.mark.parametrize("where", ["in the stream", "in the lookup"])
def test_an_error_in_an_evaluation_stops_the_run(where: str):
    run, broken = Validated([0.5]), OSError("the disk is gone")

    def valid() -> ListStream:
        stream = run.valid()
        return ListStream([], broken) if where == "in the stream" else stream

    def lookup(ticket: int, batch: Batch, training: bool) -> Float32:
        if not training:
            raise broken
        return run.lookup(ticket, batch, training)

    with pytest.raises(OSError, match="the disk is gone"):
        run.run(config_of(2), valid=valid, lookup=lookup)
    assert len(run.world.pushes) == 7


def test_an_evaluation_whose_stream_was_closed_by_others_is_not_left_out_in_silence():
    stream = ListStream([], StoppedError("reading samples: the stream was closed"))
    with pytest.raises(StoppedError, match="the stream was closed"):
        Validated([]).run(config_of(1), valid=lambda: stream)


# --- several labels, fewer negatives ------------------------------------------------------------------------------------


def with_two(batches: Sequence[Batch]) -> list[Batch]:
    """The second label is the other way round."""
    return [replace(batch, labels=np.stack([batch.labels, 1 - batch.labels], 1)) for batch in batches]


def test_every_label_is_evaluated_and_the_first_one_decides():
    run = Validated([0.75, 0.5, 1.0], with_two(make_batches(7)), with_two(make_batches(2, seed=1)))

    def valid() -> ListStream:
        return ListStream(with_two(list(run.valid())))

    trained = run.run(config_of(3, patience=1), BOTH, valid=valid)
    assert [e[3:] for e in run.evaluated] == [(0.75, True), (0.5, False)]
    assert trained.finished.goes_back_to == 7
    first = run.world.of_kind(Evaluated)[0]
    assert first.more["buy"].auc == 0.25
    assert (first.metrics.examples, first.more["buy"].examples) == (8, 8)


def test_predictions_of_evaluations_are_corrected_for_the_negatives_left_out():
    """The AUC is the same; the mean prediction is that of the corrected logits."""
    found = []
    for rate in (1.0, 0.25):
        run = Validated([0.75])
        trained = run.run(config_of(1, data=Data(negative_rate=rate)))
        (evaluated, test) = run.world.of_kind(Evaluated)
        assert trained.test == test.metrics
        found.append((evaluated.metrics, test.metrics, run.world.rows))
    scores = np.array([1.0] * 3 + [-1.0] + [0.0] * 4)
    for k, shift in enumerate((0.0, math.log(0.25))):
        assert found[k][0].prob_mean == pytest.approx(np.mean(1 / (1 + np.exp(-scores - shift))), rel=1e-6)
        assert found[k][0].auc == 0.75
    assert found[1][1].prob_mean < found[0][1].prob_mean
    assert found[0][2].tobytes() == found[1][2].tobytes(), "training does not know of it"

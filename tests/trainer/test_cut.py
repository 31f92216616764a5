"""Cuts: nothing is in flight at one, and a trainer that begins with its state goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import keras
import msgspec
import pytest

from flowps.batch import Batch
from flowps.config import Checkpoint, Config
from flowps.errors import CheckpointError
from flowps.status.event import Interval
from flowps.trainer.cut import CutClock
from flowps.trainer.loop import Trained
from flowps.trainer.models import ModelSpec
from flowps.trainer.state import Cut, State
from tests.trainer.test_loop import SIZE, SPEC, ListStream, World, make_batches, make_config

pytestmark = pytest.mark.timeout(120)


class Saved:
    """A world that can be cut: what the rows were at each cut, and what the trainer was told to say."""

    def __init__(self, epochs: list[list[Batch]]) -> None:
        self.epochs = epochs
        self.cuts: list[Cut] = []
        self.rows: list[Any] = []
        self.in_flight: list[int] = []

    def run(
        self, config: Config, at: Callable[[World, Cut], None] = lambda world, cut: None, **changes: Any
    ) -> tuple[World, Trained]:
        """Train; `at` is told of every cut."""
        world = World([])
        if "rows" in changes:
            world.rows = changes.pop("rows").copy()
        skip = changes.pop("skip", 0)

        def cut(of: Cut) -> None:
            self.cuts.append(of)
            self.rows.append(world.rows.copy())
            self.in_flight.append(len(world.in_flight))
            at(world, of)

        first = changes.get("resume").epoch if changes.get("resume") is not None else 0

        def train(epoch: int) -> ListStream:
            rest = self.epochs[epoch][skip if epoch == first else 0 :]
            world.streams.append(ListStream(rest))
            return world.streams[-1]

        return world, world.run(config, changes.pop("spec", SPEC), train=train, cut=cut, **changes)


def config_of(in_flight: int = 1, every_steps: int = 4, **more: Any) -> Config:
    return make_config(
        epochs=3, in_flight=in_flight, print_interval=5, checkpoint=Checkpoint(every_steps=every_steps, every_s=0), **more
    )


@pytest.fixture
def epochs() -> list[list[Batch]]:
    return [make_batches(11, seed) for seed in range(3)]


@pytest.mark.parametrize(("in_flight", "steps"), [(1, [4, 8, 12, 16, 20, 24, 28, 32]), (3, [4, 8, 11, 16, 20, 22, 28, 32])])
def test_at_a_cut_nothing_is_in_flight_and_what_was_read_is_trained(
    epochs: list[list[Batch]], in_flight: int, steps: list[int]
) -> None:
    saved = Saved(epochs)
    saved.run(config_of(in_flight))
    assert saved.in_flight == [0] * len(saved.cuts)
    assert [cut.step for cut in saved.cuts if not cut.last] == steps
    assert [cut.last for cut in saved.cuts] == [False] * 8 + [True]
    for cut in saved.cuts:
        assert cut.read == cut.examples == cut.step * SIZE
        assert cut.samples == (cut.step - 11 * cut.epoch) * SIZE
    last = saved.cuts[-1]
    assert (last.step, last.epoch, last.samples) == (33, 3, 0)


def test_a_cut_that_is_due_after_the_end_of_an_epoch_is_at_its_end(epochs: list[list[Batch]]) -> None:
    """Nothing is in flight there either; the next ones are in time again."""
    saved = Saved(epochs)
    saved.run(config_of(in_flight=4, every_steps=12))
    assert [(cut.step, cut.epoch) for cut in saved.cuts] == [(11, 0), (22, 1), (33, 2), (33, 3)]


class TestClock:
    @pytest.mark.parametrize("in_flight", [1, 2, 8])
    def test_by_steps(self, in_flight: int) -> None:
        """A cut after every tenth step; from the moment that it is decided, all that may be in flight comes before it."""
        clock, ends, found = CutClock(10, 0, in_flight), 3, []
        for steps in range(1, 60):
            if clock.at == steps + ends - 1:
                found.append(steps - 1)
                clock.done()
            at = clock.decide(steps, steps + ends, asked=False)
            assert at in (None, steps + ends + in_flight - 1)
            assert not clock.is_time
        assert found == [10, 20, 30, 40, 50][: len(found)]
        assert len(found) >= 4

    @pytest.mark.parametrize(
        ("steps", "last", "decided"),
        [
            (16, 10, False),  # not yet
            (17, 10, True),
            (19, 10, True),
            (20, 20, False),  # it has been
            (18, 18, False),  # at the end of an epoch, in its place
            (18, 17, False),
        ],
    )
    def test_what_was_decided_on_before_a_resume_is_decided_on_again(self, steps: int, last: int, decided: bool) -> None:
        clock, ends = CutClock(10, 0, in_flight=4), 3
        clock.recall(steps, steps + ends, last)
        assert clock.at == (20 + ends if decided else None)

    def test_by_time_or_when_asked(self) -> None:
        clock = CutClock(0, 1e-9, 3)
        assert clock.is_time
        assert clock.decide(5, 7, asked=False) is None, "who asks is heard in the step of all"
        assert clock.decide(5, 7, asked=True) == clock.at == 9
        assert clock.decide(6, 8, asked=True) is None, "one at a time"
        clock.done()
        assert clock.at is None
        assert not CutClock(0, 3600, 3).is_time


def intervals(world: World) -> list[tuple[Any, ...]]:
    return [(e.epoch, e.step, e.metrics, e.epoch_metrics) for e in world.of_kind(Interval)]


def with_dropout(spec: ModelSpec) -> keras.Model:
    """A model that draws random numbers and has state beside weights."""
    inputs = spec.inputs()
    x = keras.layers.Dense(8, activation="relu")(spec.concatenated(inputs))
    x = keras.layers.BatchNormalization()(x)
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dropout(0.5)(x)))


@pytest.fixture
def dropout(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "flowps_test_dropout", SimpleNamespace(build=with_dropout))
    return "flowps_test_dropout:build"


@pytest.mark.parametrize("model", ["dnn", "dropout"])
def test_going_on_from_a_cut_is_as_if_there_had_been_none(
    epochs: list[list[Batch]], model: str, request: pytest.FixtureRequest
) -> None:
    name = request.getfixturevalue("dropout") if model == "dropout" else model
    config = config_of(model=name)
    whole = Saved(epochs)
    world, trained = whole.run(config)
    for at in (1, 4, 8):  # in the first epoch, in the second, at the end
        cut, rows = whole.cuts[at], whole.rows[at]
        assert cut.state is not None
        state = State.of_bytes(cut.state.to_bytes())
        again, found = Saved(epochs).run(config, resume=state, rows=rows, skip=cut.samples // SIZE)
        assert again.rows.tobytes() == world.rows.tobytes()
        for weight, wanted in zip(found.model.get_weights(), trained.model.get_weights(), strict=True):
            assert weight.tobytes() == wanted.tobytes()
        assert intervals(again) == [of for of in intervals(world) if of[1] > cut.step]
        assert (found.finished.steps, found.finished.examples) == (33, 33 * SIZE)


@pytest.mark.parametrize(("in_flight", "max_staleness"), [(1, 1023), (3, 1023), (3, 0)])
def test_a_stop_is_a_cut_and_nothing_that_was_looked_up_is_lost(
    epochs: list[list[Batch]], in_flight: int, max_staleness: int
) -> None:
    config = config_of(in_flight, every_steps=1000)
    config = msgspec.structs.replace(config, trainer=msgspec.structs.replace(config.trainer, max_staleness=max_staleness))
    world, trained = Saved(epochs).run(config)
    first, cuts = World([]), list[Cut]()

    def push(ticket: int, gradient: Any, rate_scale: float) -> None:
        first.push(ticket, gradient, rate_scale)
        if ticket == 14:
            first.stop.set()

    stopped = first.run(config, train=lambda epoch: ListStream(epochs[epoch]), push=push, cut=cuts.append)
    assert (stopped.finished.stopped, stopped.test) == (True, None)
    (cut,) = cuts
    assert cut.last
    assert not first.in_flight
    assert cut.read == cut.examples == cut.step * SIZE
    assert 15 <= cut.step <= 15 + in_flight
    assert cut.state is not None
    if in_flight == 1 or max_staleness == 0:
        again, found = Saved(epochs).run(config, resume=cut.state, rows=first.rows, skip=cut.samples // SIZE)
        assert again.rows.tobytes() == world.rows.tobytes()
        for weight, wanted in zip(found.model.get_weights(), trained.model.get_weights(), strict=True):
            assert weight.tobytes() == wanted.tobytes()


def test_a_cut_by_time(epochs: list[list[Batch]], monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Saved(epochs)
    saved.run(make_config(epochs=3, in_flight=2, checkpoint=Checkpoint(every_steps=0, every_s=1e-9)))
    assert len(saved.cuts) > 10
    assert saved.in_flight == [0] * len(saved.cuts)


def test_without_checkpoints_the_end_is_the_only_cut(epochs: list[list[Batch]]) -> None:
    saved = Saved(epochs)
    saved.run(make_config(epochs=3, checkpoint=Checkpoint(every_steps=0, every_s=0)))
    assert [(cut.step, cut.last) for cut in saved.cuts] == [(33, True)]


def test_an_error_at_a_cut_ends_the_run(epochs: list[list[Batch]]) -> None:
    def fail(world: World, cut: Cut) -> None:
        raise CheckpointError("no room")

    with pytest.raises(CheckpointError, match="no room"):
        Saved(epochs).run(config_of(), fail)


def test_a_state_of_another_model_is_refused_and_what_differs_is_said(epochs: list[list[Batch]]) -> None:
    saved = Saved(epochs)
    saved.run(config_of())
    state = saved.cuts[0].state
    other = ModelSpec.of(["a", "b"], [3, 3], 2, (5,))
    with pytest.raises(CheckpointError, match=r"is another one: variable model/0 \(.*kernel\) has shape \(8, 4\) in the"):
        Saved(epochs).run(config_of(), resume=state, spec=other)


@pytest.mark.parametrize("data", [b"", b"no archive", b"PK\x03\x04 half of one"])
def test_what_is_no_state_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="the trainer's state cannot be read: "):
        State.of_bytes(data)

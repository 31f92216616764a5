"""The run of a trainer over streams that are lists and rows that are an array: epochs, events, evaluation, stop and errors."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import msgspec
import numpy as np
import psutil
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from tensorflow.python.eager import context
from tensorflow.python.ops import collective_ops

from flowps.batch import Batch, Float32
from flowps.config import Checkpoint, Config, Net, Slot, Status
from flowps.config import Trainer as TrainerKnobs
from flowps.errors import ConfigError, DataError, ModelError, StoppedError
from flowps.ps.client import PsClient
from flowps.ps.placement import place
from flowps.ps.shard import Shard
from flowps.status.event import Evaluated, Event, Finished, Interval, TrainerStatus
from flowps.status.run_status import RunStatus
from flowps.trainer.feed import default_feed_threads
from flowps.trainer.loop import Trained, Trainer
from flowps.trainer.models import ModelSpec
from flowps.trainer.state import Cut
from flowps.trainer.step import Step
from flowps.trainer.surroundings import Surroundings

pytestmark = pytest.mark.timeout(120)  # a run that hangs is the failure most of these look for

DIM, SLOTS, DENSE_WIDTH, SIZE, VOCABULARY = 3, 2, 2, 8, 20
SPEC = ModelSpec.of(["a", "b"], [DIM] * SLOTS, DENSE_WIDTH, (4,))
WAIT_S = 30.0


def make_batches(count: int, seed: int = 0, size: int = SIZE) -> list[Batch]:
    """Batches whose labels follow from the signs. Slot b has signs of its own."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        signs = rng.integers(0, VOCABULARY, (SLOTS, size)) + VOCABULARY * np.arange(SLOTS)[:, None]
        labels = (np.sin(7 * signs).sum(axis=0) > 0).astype(np.float32)
        dense = rng.normal(size=(size, DENSE_WIDTH)).astype(np.float32)
        offsets = np.arange(SLOTS * size + 1, dtype=np.int32)
        batches.append(Batch(labels, dense, signs.reshape(-1).astype(np.uint64), offsets))
    return batches


class ListStream(Iterator[Batch]):
    """Batches of a list, then the error if there is one; `blocks`: then a `next` that only `close` ends, as of a slow hub."""

    def __init__(self, batches: Sequence[Batch], error: BaseException | None = None, blocks: bool = False) -> None:
        self._rest, self._error, self._blocks = iter(batches), error, blocks
        self.closed = threading.Event()

    def __next__(self) -> Batch:
        for batch in self._rest:
            return batch
        if self._error is not None:
            raise self._error
        if self._blocks:
            assert self.closed.wait(WAIT_S)
            raise StoppedError("reading samples: the stream was closed")
        raise StopIteration

    def close(self) -> None:
        self.closed.set()


class World:
    """What surrounds a trainer: an array of rows with sums and SGD, and a record of everything that happened."""

    def __init__(self, train: Sequence[Batch], test: Sequence[Batch] | None = None) -> None:
        self.train_batches, self.test_batches = train, test
        self.rows = np.random.default_rng(9).normal(0, 0.1, (SLOTS * VOCABULARY, DIM)).astype(np.float32)
        self.lock = threading.Lock()
        self.in_flight: dict[int, Batch] = {}
        self.lookups: list[tuple[int, bool]] = []
        self.pushes: list[tuple[int, Float32]] = []
        self.events: list[Event] = []
        self.streams: list[ListStream] = []
        self.epochs: list[int] = []
        self.stop, self.status = threading.Event(), RunStatus()

    def train(self, epoch: int) -> ListStream:
        self.epochs.append(epoch)
        self.streams.append(ListStream(self.train_batches))
        return self.streams[-1]

    def test(self) -> ListStream:
        assert self.test_batches is not None
        self.streams.append(ListStream(self.test_batches))
        return self.streams[-1]

    def pooled(self, batch: Batch) -> Float32:
        vectors = self.rows[batch.signs.reshape(SLOTS, batch.size)]
        return np.ascontiguousarray(np.concatenate(list(vectors), axis=1))

    def lookup(self, ticket: int, batch: Batch, training: bool) -> Float32:
        with self.lock:
            self.lookups.append((ticket, training))
            if training:
                self.in_flight[ticket] = batch
            return self.pooled(batch)

    def find(self, ticket: int, batch: Batch) -> Callable[[], Float32]:
        with self.lock:
            self.in_flight[ticket] = batch
        return lambda: self.lookup(ticket, batch, True)

    def push(self, ticket: int, gradient: Float32, rate_scale: float) -> None:
        with self.lock:
            batch = self.in_flight.pop(ticket)
            self.pushes.append((ticket, gradient.copy()))
            parts = np.split(gradient, SLOTS, axis=1)
            np.subtract.at(self.rows, batch.signs.reshape(SLOTS, batch.size), np.float32(0.5) * np.stack(parts))

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def run(self, config: Config, spec: ModelSpec = SPEC, **changes: Any) -> Trained:
        """Train in this world; `changes` replace what the trainer is given."""
        parts = {name: getattr(self, name) for name in ("train", "lookup", "find", "push", "emit", "status", "stop")}
        parts["test"] = self.test if self.test_batches is not None else None
        return Trainer(spec, config, Surroundings(**{**parts, **changes})).run()

    def of_kind(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def make_config(epochs: int = 1, in_flight: int = 3, print_interval: int = 1_000, seed: int = 1, **changes: Any) -> Config:
    return Config(
        epochs=epochs,
        seed=seed,
        net=Net(hidden=(4,)),
        trainer=TrainerKnobs(in_flight=in_flight, feed_threads=3, learning_rate=0.02),
        status=Status(print_interval=print_interval, interval_s=1e6),
        **changes,
    )


# --- a whole run ----------------------------------------------------------------------------------------------------------


def test_pushes_carry_the_schedule():
    """Warm-up over two steps, then down to a quarter over four: each push has the factor of its own step."""
    world, scales = World(make_batches(8)), []

    def push(ticket: int, gradient: Float32, rate_scale: float) -> None:
        scales.append(rate_scale)
        world.push(ticket, gradient, rate_scale)

    knobs = msgspec.structs.replace(
        make_config().trainer, warmup_steps=2, decay="linear", decay_steps=4, decay_to=0.25
    )  # fmt: skip
    world.run(msgspec.structs.replace(make_config(), trainer=knobs), push=push)
    np.testing.assert_allclose(scales, [0.5, 1, 1, 0.8125, 0.625, 0.4375, 0.25, 0.25])


def test_a_dense_optimizer_that_divides_by_the_rate_is_not_scheduled_to_zero():
    knobs = msgspec.structs.replace(make_config().trainer, optimizer="ftrl", decay="cosine")
    with pytest.raises(ConfigError, match=r"ftrl divides by the learning rate, which trainer\.decay takes to 0"):
        World(make_batches(1)).run(msgspec.structs.replace(make_config(), trainer=knobs))
    world = World(make_batches(2))
    world.run(msgspec.structs.replace(make_config(), trainer=msgspec.structs.replace(knobs, decay_to=0.1)))
    assert len(world.pushes) == 2


def test_every_batch_of_every_epoch_is_looked_up_stepped_and_pushed_once_and_in_order():
    world = World(make_batches(7))
    trained = world.run(make_config(epochs=3))
    assert world.epochs == [0, 1, 2]
    assert sorted(world.lookups) == [(ticket, True) for ticket in range(21)]
    assert [ticket for ticket, _ in world.pushes] == list(range(21))
    assert {gradient.shape for _, gradient in world.pushes} == {(SIZE, SPEC.width)}
    assert world.in_flight == {}
    finished = trained.finished
    assert (finished.epochs, finished.steps, finished.examples, finished.stopped) == (3, 21, 21 * SIZE, False)
    assert finished.seconds > 0
    assert finished.first_step_at > 1e9
    assert trained.test is None
    assert isinstance(trained.model, keras.Model)
    assert all(stream.closed.is_set() for stream in world.streams)


def test_it_learns():
    world = World(make_batches(40, size=32), make_batches(10, seed=1, size=32))
    trained = world.run(make_config(epochs=3, in_flight=2))
    assert trained.test is not None
    assert trained.test.auc is not None
    assert trained.test.auc > 0.9


@pytest.mark.parametrize("has_halves", [False, True])
def test_without_staleness_a_run_is_to_the_bit_the_one_with_one_batch_in_flight(has_halves: bool):
    """Though rows of the next batch are found before the push: gradients, rows and the dense model."""

    def run(in_flight: int, max_staleness: int) -> tuple[World, Trained, list[tuple[int, int]]]:
        world, found = World(make_batches(12)), list[tuple[int, int]]()

        def find(ticket: int, batch: Batch) -> Callable[[], Float32]:
            with world.lock:
                found.append((ticket, len(world.pushes)))
            return lambda: world.lookup(ticket, batch, True)

        config = make_config(epochs=2)
        knobs = msgspec.structs.replace(config.trainer, in_flight=in_flight, max_staleness=max_staleness)
        return world, world.run(msgspec.structs.replace(config, trainer=knobs), find=find if has_halves else None), found

    (ours, model, found), (theirs, expected, whole) = run(4, 0), run(1, 0)
    assert [ticket for ticket, _ in ours.pushes] == [ticket for ticket, _ in theirs.pushes] == list(range(24))
    for (_, gradient), (_, other) in zip(ours.pushes, theirs.pushes, strict=True):
        np.testing.assert_array_equal(gradient, other)
    np.testing.assert_array_equal(ours.rows, theirs.rows)
    for weights, other in zip(model.model.get_weights(), expected.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weights, other)
    if has_halves:
        assert whole == [], "one batch in flight has nobody to overlap with"
        assert sorted(ticket for ticket, _ in found) == list(range(24))
        assert any(ticket > pushes for ticket, pushes in found), "found ahead of pushes that its rows were read after"


def test_events_tell_the_run():
    world = World(make_batches(7), make_batches(2, seed=1))
    trained = world.run(make_config(epochs=2, print_interval=3))
    assert [(event.epoch, event.step) for event in world.of_kind(Interval)] == [(1, 3), (1, 6), (1, 7), (2, 9), (2, 12), (2, 14)]
    assert [event.metrics.examples for event in world.of_kind(Interval)] == [n * SIZE for n in (3, 3, 1, 2, 3, 2)]
    assert [event.epoch_metrics.examples for event in world.of_kind(Interval)] == [n * SIZE for n in (3, 6, 7, 2, 5, 7)]
    (evaluated,) = world.of_kind(Evaluated)
    assert (evaluated.epoch, evaluated.step, evaluated.metrics) == (2, 14, trained.test)
    trained_status, report = world.of_kind(TrainerStatus)
    assert [trained_status.phase, report.phase] == ["trained", "ended"]
    assert report.step == 14
    for stage, count in {"EmbeddingLookup": 16, "TrainStep": 14, "PushGrad": 14, "PredictStep": 2}.items():
        assert report.stages[stage].count == count
    assert world.events[-1] == trained.finished, "the last event"
    assert len(world.of_kind(Finished)) == 1


def test_the_evaluation_scores_with_the_trained_rows_and_weights():
    test = make_batches(5, seed=1)
    world = World(make_batches(30), test)
    trained = world.run(make_config(epochs=2))
    logits = [trained.model({"embeddings": world.pooled(b), "dense_columns": b.dense})[:, 0] for b in test]
    scores, labels = np.concatenate(logits), np.concatenate([b.labels for b in test])
    assert trained.test is not None
    assert trained.test.examples == 5 * SIZE
    # The metric takes logits of one bin for equal. Of 400 pairs, about one in forty runs has one that close: it counts half.
    gaps = np.abs(np.subtract.outer(scores[labels == 1], scores[labels == 0]))
    tied = (gaps < 64 / (1 << 20)).mean() / 2
    assert tied < 0.01
    assert trained.test.auc == pytest.approx(roc_auc_score(labels, scores), abs=tied + 1e-6)
    assert trained.test.prob_mean == pytest.approx(expit(scores).mean(), rel=1e-4)


def test_the_evaluation_looks_up_without_training_and_pushes_nothing():
    world = World(make_batches(4), make_batches(3, seed=1))
    rows: list[Float32] = []

    def test() -> ListStream:
        rows.append(world.rows.copy())
        return world.test()

    world.run(make_config(), test=test)
    assert [training for _, training in world.lookups] == [True] * 4 + [False] * 3
    assert len(world.pushes) == 4
    np.testing.assert_array_equal(world.rows, rows[0])


def test_with_shards_the_evaluation_creates_no_rows():
    slots = [Slot(name=name, dim=DIM) for name in ("a", "b")]
    shards = [Shard([slots[p.slot] for p in of], [VOCABULARY] * len(of), 1, 3) for of in place(slots, 2).shards]
    client = PsClient(shards, place(slots, 2), slots)
    train, unseen = make_batches(20), make_batches(2, seed=1)
    for batch in unseen:
        batch.signs[:] += np.uint64(1 << 40)
    rows: list[int] = []
    world = World(train, unseen)

    def test() -> ListStream:
        rows.append(sum(shard.num_rows for shard in shards))
        return world.test()

    try:
        trained = world.run(make_config(), lookup=client.lookup, push=client.push, test=test)
    finally:
        client.close()
    assert rows == [len(np.unique(np.concatenate([batch.signs for batch in train])))]
    assert sum(shard.num_rows for shard in shards) == rows[0]
    assert trained.test is not None
    assert trained.test.examples == 2 * SIZE


def test_an_empty_epoch_is_no_error():
    world = World([])
    finished = world.run(make_config(epochs=2)).finished
    assert (finished.epochs, finished.steps, finished.examples, finished.first_step_at) == (2, 0, 0, 0.0)
    assert world.of_kind(Interval) == []


def test_reports_come_while_training_goes_on():
    reported = threading.Event()
    world = World(make_batches(3))

    def emit(event: Event) -> None:
        world.emit(event)
        if isinstance(event, TrainerStatus):
            reported.set()

    def lookup(ticket: int, batch: Batch, training: bool) -> Float32:
        if ticket == 2:
            assert reported.wait(WAIT_S)
        return world.lookup(ticket, batch, training)

    world.run(
        msgspec.structs.replace(make_config(), status=Status(print_interval=1_000, interval_s=1e-3)), emit=emit, lookup=lookup
    )
    assert len(world.of_kind(TrainerStatus)) >= 2


def test_feed_threads_are_chosen_when_not_given():
    assert default_feed_threads(1) == 1
    assert 1 <= default_feed_threads(4) <= 4
    world = World(make_batches(3))
    config = make_config()
    config = msgspec.structs.replace(config, trainer=msgspec.structs.replace(config.trainer, feed_threads=0))
    assert world.run(config).finished.steps == 3


def test_tensorflow_threads_asked_for_after_tensorflow_has_started_are_no_error():
    world = World(make_batches(3))
    config = make_config()
    config = msgspec.structs.replace(config, trainer=msgspec.structs.replace(config.trainer, tensorflow_threads=1))
    world.run(make_config())
    assert world.run(config).finished.steps == 3


# --- what the trainer's thread does not do, and what a trainer alone does not need --------------------------------------------


def test_feeds_are_staged_before_the_trainer_takes_them(monkeypatch: pytest.MonkeyPatch):
    staged: list[str] = []
    stage = Step.stage

    def told(self: Step, batch: Batch, embeddings: Float32) -> tuple[Any, ...]:
        staged.append(threading.current_thread().name)
        return stage(self, batch, embeddings)

    monkeypatch.setattr(Step, "stage", told)
    world = World(make_batches(7), make_batches(3, seed=1))
    world.run(make_config(epochs=2))
    assert len(staged) == 2 * 7 + 3, "once each"
    assert {name.rpartition("-")[0] for name in staged} == {"flowps-feed"}
    assert world.status.summaries()["StageFeed"].count == 2 * 7 + 3


def test_a_trainer_alone_makes_no_collective(monkeypatch: pytest.MonkeyPatch):
    """No server, no port, none of TensorFlow's private functions."""
    monkeypatch.setattr(collective_ops, "all_reduce_v2", None)
    monkeypatch.setattr(context.Context, "enable_collective_ops", None)
    monkeypatch.setattr(context, "_reset_context", None)
    listening = ports()
    world = World(make_batches(3), make_batches(1))
    assert world.run(make_config(in_flight=1, epochs=2)).finished.examples == 2 * 3 * SIZE
    assert context.context()._collective_ops_server_def is None
    assert ports() == listening


def ports() -> set[int]:
    """On which this process listens."""
    return {of.laddr.port for of in psutil.Process().net_connections("tcp") if of.status == psutil.CONN_LISTEN}


def narrow(config: Config, precision: str) -> Config:
    return msgspec.structs.replace(config, trainer=msgspec.structs.replace(config.trainer, precision=precision))


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_a_run_in_narrow_floats_comes_close_to_one_in_float32(precision: str):
    results = []
    for config in (make_config(epochs=4, in_flight=1), narrow(make_config(epochs=4, in_flight=1), precision)):
        world = World(make_batches(20), make_batches(5, seed=1))
        trained = world.run(config)
        assert trained.test is not None
        results.append(trained.test.logloss)
        assert keras.config.dtype_policy().name == "float32", "the process is as it was"
        assert "steps_left_out_by_loss_scaling" not in world.status.counters()
    assert {weight.dtype for weight in trained.model.get_weights()} == {np.dtype(np.float32)}
    assert results[1] == pytest.approx(results[0], abs=0.02)
    assert results[1] != results[0]


def test_steps_left_out_by_loss_scaling_are_counted_and_push_zeros():
    world = World(make_batches(9))
    for number in (4, 6):
        world.train_batches[number].dense[:] *= 1e3
    finished = world.run(narrow(make_config(in_flight=1), "mixed_float16")).finished
    assert (finished.steps, finished.examples) == (9, 9 * SIZE)
    left_out = world.status.counters()["steps_left_out_by_loss_scaling"]
    assert left_out == 2
    assert [ticket for ticket, gradient in world.pushes if not gradient.any()] == [4, 6]
    assert all(np.isfinite(gradient).all() for _, gradient in world.pushes)


# --- reproducible ---------------------------------------------------------------------------------------------------------


def test_in_flight_one_twice_with_one_seed_is_the_same_run():
    def run(seed: int) -> tuple[list[float], list[Float32], list[Float32]]:
        world = World(make_batches(8))
        trained = world.run(make_config(epochs=2, in_flight=1, print_interval=1, seed=seed))
        losses = [event.metrics.logloss for event in world.of_kind(Interval)]
        return losses, [gradient for _, gradient in world.pushes], [*trained.model.get_weights(), world.rows]

    (losses, gradients, weights), again, other = run(1), run(1), run(2)
    assert len(losses) == len(gradients) == 16
    assert losses == again[0]
    assert losses != other[0]
    for found, expected in zip([*gradients, *weights], [*again[1], *again[2]], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_in_flight_one_looks_up_only_what_has_been_pushed():
    world = World(make_batches(10))
    behind: list[int] = []

    def lookup(ticket: int, batch: Batch, training: bool) -> Float32:
        behind.append(ticket - len(world.pushes))
        return world.lookup(ticket, batch, training)

    world.run(make_config(in_flight=1), lookup=lookup)
    assert behind == [0] * 10


@pytest.mark.parametrize("in_flight", [2, 5])
def test_staleness_is_at_most_in_flight_minus_one(in_flight: int):
    world = World(make_batches(60))
    pushed_at_lookup, staleness = {}, []

    def lookup(ticket: int, batch: Batch, training: bool) -> Float32:
        found = world.lookup(ticket, batch, training)
        pushed_at_lookup[ticket] = len(world.pushes)
        return found

    def push(ticket: int, gradient: Float32, rate_scale: float) -> None:
        staleness.append(len(world.pushes) - pushed_at_lookup[ticket])
        world.push(ticket, gradient, rate_scale)

    world.run(make_config(in_flight=in_flight), lookup=lookup, push=push)
    assert len(staleness) == 60
    assert max(staleness) <= in_flight - 1


# --- stop -----------------------------------------------------------------------------------------------------------------


def test_stop_in_the_middle_ends_after_what_is_in_flight_without_evaluation():
    world = World(make_batches(50), make_batches(2, seed=1))

    def emit(event: Event) -> None:
        world.emit(event)
        if isinstance(event, Interval) and event.step == 4:
            world.stop.set()

    trained = world.run(make_config(epochs=3, print_interval=2), emit=emit)
    steps = trained.finished.steps
    assert (trained.finished.epochs, trained.finished.stopped) == (0, True)
    assert 4 <= steps <= 4 + 3
    assert trained.finished.examples == steps * SIZE
    assert [ticket for ticket, _ in world.pushes] == list(range(steps)), "what was stepped is pushed"
    assert len(world.lookups) == steps, "what was looked up is stepped"
    assert trained.test is None
    assert world.of_kind(Evaluated) == []
    assert isinstance(world.events[-1], Finished)
    assert world.epochs == [0]
    assert all(stream.closed.is_set() for stream in world.streams)


def test_stop_in_the_second_epoch_counts_the_first():
    world = World(make_batches(5))

    def emit(event: Event) -> None:
        world.emit(event)
        if isinstance(event, Interval) and event.epoch == 2:
            world.stop.set()

    finished = world.run(make_config(epochs=3, print_interval=1), emit=emit).finished
    assert 6 <= finished.steps <= 6 + 3
    assert (finished.epochs, finished.stopped) == (1, True)


def test_stop_while_the_trainer_waits_for_a_slow_hub():
    world = World(make_batches(3))
    stream = ListStream(make_batches(3), blocks=True)

    def push(ticket: int, gradient: Float32, rate_scale: float) -> None:
        world.push(ticket, gradient, rate_scale)
        if ticket == 2:
            world.stop.set()

    finished = world.run(make_config(), train=lambda epoch: stream, push=push).finished
    assert (finished.steps, finished.stopped) == (3, True)
    assert len(world.pushes) == 3
    assert stream.closed.is_set()


def test_stop_before_the_run_trains_nothing():
    world = World(make_batches(3), make_batches(1))
    world.stop.set()
    trained = world.run(make_config())
    assert (trained.finished.steps, trained.finished.stopped, trained.test) == (0, True, None)
    assert world.pushes == []


def test_stop_in_the_evaluation_leaves_it_out():
    world = World(make_batches(3), make_batches(20, seed=1))

    def lookup(ticket: int, batch: Batch, training: bool) -> Float32:
        if not training:
            world.stop.set()
        return world.lookup(ticket, batch, training)

    trained = world.run(make_config(), lookup=lookup)
    assert (trained.finished.steps, trained.finished.epochs, trained.finished.stopped) == (3, 1, True)
    assert trained.test is None
    assert world.of_kind(Evaluated) == []


# --- errors ---------------------------------------------------------------------------------------------------------------


class BrokenError(Exception):
    """What a lost shard or a bad file raises."""


LAST = 11


def broken_push(world: World, at: int) -> dict[str, Any]:
    def push(ticket: int, gradient: Float32, rate_scale: float) -> None:
        if ticket == at:
            raise BrokenError
        world.push(ticket, gradient, rate_scale)

    return {"push": push}


def broken_lookup(world: World, at: int) -> dict[str, Any]:
    def lookup(ticket: int, batch: Batch, training: bool) -> Float32:
        if ticket == at:
            raise BrokenError
        return world.lookup(ticket, batch, training)

    return {"lookup": lookup}


def broken_stream(world: World, at: int) -> dict[str, Any]:
    def train(epoch: int) -> ListStream:
        world.streams.append(ListStream(world.train_batches[:at], BrokenError()))
        return world.streams[-1]

    return {"train": train}


def broken_emit(world: World, at: int) -> dict[str, Any]:
    def emit(event: Event) -> None:
        if isinstance(event, Interval) and event.step > at:
            raise BrokenError
        world.emit(event)

    return {"emit": emit}


@pytest.mark.parametrize(("at", "in_flight"), [(0, 4), (5, 1), (LAST, 4)])
@pytest.mark.parametrize("broken", [broken_push, broken_lookup, broken_stream, broken_emit])
def test_an_error_stops_the_run_with_that_error(broken: Callable[[World, int], dict[str, Any]], at: int, in_flight: int):
    world = World(make_batches(LAST + 1), make_batches(1))
    with pytest.raises(BrokenError):
        world.run(make_config(in_flight=in_flight, print_interval=1), **broken(world, at))
    assert all(stream.closed.is_set() for stream in world.streams)
    assert world.of_kind(Evaluated) == []
    assert world.of_kind(Finished) == []
    assert isinstance(world.events[-1], TrainerStatus), "what the run came to is still reported"
    assert len(world.pushes) <= at + (broken is broken_emit) * (in_flight + 1)


@pytest.mark.parametrize("broken", [broken_push, broken_lookup])
def test_an_error_stops_a_run_that_waits_for_a_slow_hub(broken: Callable[[World, int], dict[str, Any]]):
    world = World([])
    stream = ListStream(make_batches(3), blocks=True)
    with pytest.raises(BrokenError):
        world.run(make_config(in_flight=6), train=lambda epoch: stream, **broken(world, 2))
    assert stream.closed.is_set()


@pytest.mark.parametrize("where", ["train", "test"])
def test_a_stream_that_cannot_be_opened_stops_the_run(where: str):
    def broken(*epoch: int) -> ListStream:
        raise BrokenError

    with pytest.raises(BrokenError):
        World(make_batches(2), make_batches(1)).run(make_config(), **{where: broken})


@pytest.mark.parametrize("where", ["stream", "lookup"])
def test_an_error_in_the_evaluation_stops_the_run(where: str):
    world = World(make_batches(2), make_batches(2))
    stream = ListStream(make_batches(1), BrokenError())
    changes = {"test": lambda: stream} if where == "stream" else broken_lookup(world, 3)
    with pytest.raises(BrokenError):
        world.run(make_config(), **changes)
    assert world.of_kind(Evaluated) == world.of_kind(Finished) == []


def test_an_evaluation_whose_stream_was_closed_by_others_is_not_left_out_in_silence():
    """As when a scheduler cancels the hub's tasks: nobody asked this run to stop."""
    world = World(make_batches(2), make_batches(2))
    stream = ListStream(make_batches(1), StoppedError("reading samples: the stream was closed"))
    with pytest.raises(StoppedError, match="the stream was closed"):
        world.run(make_config(), test=lambda: stream)


def test_a_training_whose_stream_was_closed_by_others_stops_the_run():
    stream = ListStream(make_batches(1), StoppedError("reading samples: the stream was closed"))
    with pytest.raises(StoppedError, match="the stream was closed"):
        World([]).run(make_config(), train=lambda epoch: stream)


def test_a_loss_that_is_not_finite_stops_the_run_and_its_gradient_is_not_pushed():
    world = World(make_batches(9))
    world.train_batches[4].dense[0, 0] = np.nan
    with pytest.raises(ModelError, match=r"nan|NaN"):
        world.run(make_config())
    assert [ticket for ticket, _ in world.pushes] == [0, 1, 2, 3]
    assert np.isfinite(world.rows).all()


def test_batches_of_another_shape_than_the_models_stop_the_run():
    with pytest.raises(DataError, match=r"dense \(8, 2\), expected \(8, 3\)"):
        World(make_batches(2)).run(make_config(), ModelSpec.of(["a", "b"], [DIM] * SLOTS, 3, (4,)))


def test_a_model_that_gives_nan_in_the_evaluation_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training checks its loss; what only the test data bring out must not end in a crash inside the metrics."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    text = """
import keras

def build(spec):
    inputs = spec.inputs()
    root = keras.ops.sqrt(inputs["dense_columns"])
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.concatenate([inputs["embeddings"], root])))
"""
    (tmp_path / "flowps_test_model_root.py").write_text(text, encoding="utf-8")
    train, test = make_batches(3), make_batches(2, seed=1)
    for batch in train:
        np.abs(batch.dense, out=batch.dense)
    try:
        with pytest.raises(ModelError, match=r"nan|NaN"):
            World(train, test).run(make_config(model="flowps_test_model_root:build"))
    finally:
        sys.modules.pop("flowps_test_model_root", None)


# --- samples left out, several labels -------------------------------------------------------------------------------------


def sampled(counts: Sequence[tuple[int, int]]) -> list[Batch]:
    """Batches of so many samples, with so many left out."""
    made = make_batches(len(counts), size=SIZE)
    return [
        replace(first(batch, size), left_out=left) for batch, (size, left) in zip(made, counts, strict=True)
    ]  # fmt: skip


def first(batch: Batch, size: int) -> Batch:
    signs = batch.signs.reshape(SLOTS, batch.size)[:, :size].reshape(-1)
    return Batch(batch.labels[:size], batch.dense[:size], signs, np.arange(SLOTS * size + 1, dtype=np.int32))


COUNTS = [(0, 8), (3, 5), (0, 8), (0, 8), (8, 0), (1, 7), (2, 6), (0, 8), (0, 3)]


@pytest.mark.parametrize("in_flight", [1, 3])
def test_at_every_cut_what_was_read_is_trained_or_was_left_out(in_flight: int):
    """Batches of which nothing is left are no steps; their samples are counted with the next step, or with the epoch's end."""
    world, cuts = World(sampled(COUNTS)), list[Cut]()
    config = make_config(2, in_flight, checkpoint=Checkpoint(every_steps=1, every_s=0))
    trained = world.run(config, cut=cuts.append)
    total = sum(size + left for size, left in COUNTS)
    assert (trained.finished.steps, trained.finished.examples) == (8, 2 * 14)
    assert [len(gradient) for _, gradient in world.pushes] == [3, 8, 1, 2] * 2
    for cut in cuts:
        assert cut.read == cut.examples + cut.left_out, f"after step {cut.step}"
        assert cut.read == cut.samples + total * cut.epoch
    assert cuts[-1].read == 2 * total
    if in_flight == 1:
        inside = [(cut.step, cut.samples) for cut in cuts if not cut.epoch]
        assert inside[:4] == [(1, 16), (2, 40), (3, 48), (4, 56)]


def test_an_epoch_of_which_everything_was_left_out_is_no_error():
    world, cuts = World(sampled([(0, 8), (0, 5)]), make_batches(1)), list[Cut]()
    trained = world.run(make_config(2), cut=cuts.append)
    assert (trained.finished.steps, trained.finished.epochs, world.pushes) == (0, 2, [])
    assert trained.test is not None
    assert (cuts[-1].read, cuts[-1].left_out, cuts[-1].last) == (26, 26, True)


def test_a_stop_leaves_nothing_that_was_read_unaccounted_for():
    world, cuts = World(sampled(COUNTS * 4)), list[Cut]()

    def push(ticket: int, gradient: Float32, rate_scale: float) -> None:
        world.push(ticket, gradient, rate_scale)
        if ticket == 5:
            world.stop.set()

    assert world.run(make_config(), push=push, cut=cuts.append).finished.stopped
    (cut,) = cuts
    assert cut.last
    assert cut.read == cut.examples + cut.left_out == cut.samples
    counts = [(size, left) for size, left in COUNTS * 4 if size][: cut.step]
    assert cut.examples == sum(size for size, _ in counts)


def test_a_run_with_several_labels_tells_of_each():
    spec = replace(SPEC, labels=("click", "buy"))

    def both(batches: Sequence[Batch]) -> list[Batch]:
        return [replace(b, labels=np.stack([b.labels, (b.dense[:, 0] > 0).astype(np.float32)], 1)) for b in batches]

    world = World(both(make_batches(60, size=32)), both(make_batches(10, seed=1, size=32)))
    # One batch in flight: with more, what is learned depends on how stale each lookup was, and so on the machine's load.
    trained = world.run(make_config(3, in_flight=1, print_interval=10, model="mmoe"), spec)
    assert trained.test is not None
    (evaluated,) = world.of_kind(Evaluated)
    assert evaluated.metrics == trained.test
    test = both(make_batches(10, 1, 32))
    logits = [np.asarray(trained.model({"embeddings": world.pooled(b), "dense_columns": b.dense})) for b in test]
    labels = [b.labels for b in test]
    for k, found in enumerate((evaluated.metrics, evaluated.more["buy"])):
        scores, wanted = np.concatenate(logits)[:, k], np.concatenate(labels)[:, k]
        assert found.auc == pytest.approx(roc_auc_score(wanted, scores), abs=1e-3)
        assert found.prob_mean == pytest.approx(expit(scores).mean(), rel=1e-4)
        assert found.auc > 0.8, "or it has learned nothing"
    assert all(list(interval.more) == ["buy"] for interval in world.of_kind(Interval))


def test_a_weight_of_0_trains_nothing():
    """A batch of such samples is a step, but no row and no weight moves."""
    batches = [replace(batch, weights=np.zeros(SIZE, np.float32)) for batch in make_batches(3)]
    world = World(batches)
    before = world.rows.copy()
    knobs = msgspec.structs.replace(make_config().trainer, optimizer="sgd")
    trained = world.run(msgspec.structs.replace(make_config(), trainer=knobs))
    assert (trained.finished.steps, trained.finished.examples) == (3, 3 * SIZE)
    np.testing.assert_array_equal(world.rows, before)


def test_a_keras_schedule_is_what_pushes_carry():
    text = (
        '{"class_name": "PiecewiseConstantDecay", "config": {"boundaries": [1, 3], "values": [1.0, 0.5, 0.25]}}'
    )  # fmt: skip
    world, scales = World(make_batches(7)), []

    def push(ticket: int, gradient: Float32, rate_scale: float) -> None:
        scales.append(rate_scale)
        world.push(ticket, gradient, rate_scale)

    knobs = msgspec.structs.replace(make_config().trainer, warmup_steps=2, schedule=text)
    world.run(msgspec.structs.replace(make_config(), trainer=knobs), push=push)
    assert scales == [0.5, 1, 1, 1, 0.5, 0.5, 0.25]

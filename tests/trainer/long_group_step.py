"""Several trainers: narrow floats, and how they end: at a stop, by each other's errors. For `make test-long`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from flowps.batch import Batch, Float32
from flowps.config import Config
from flowps.errors import ModelError, StoppedError
from flowps.ps.numbering import step_of, trainer_of
from tests.trainer.members import (
    DENSE_WIDTH,
    LONG_S,
    SOON_S,
    Member,
    Shards,
    Task,
    abort,
    all_results,
    batches_of,
    error_of,
    fail,
    hold,
    joined,
    make_config,
    serving,
    start_all,
    stop,
    tasks,
    train,
)  # fmt: skip
from tests.trainer.test_group_step import (
    Epochs,
    alone,
    assert_bit_equal,
    assert_of_all,
    assert_same,
    check_two_are_one,
    epochs_of,
    together,
)

pytestmark = pytest.mark.timeout(120)  # a trainer that waits for ever is the failure most of these look for


def moving_means(batches: Sequence[Batch], before: Float32) -> Float32:
    """Of the dense columns, as batch normalisation with momentum 0.7 has them."""
    for batch in batches:
        before = 0.7 * before + 0.3 * batch.dense.mean(axis=0)
    return before


def test_moving_statistics_are_the_mean_of_all_trainers_after_every_epoch(pair: list[Member]) -> None:
    """The normalisation itself is each trainer's own."""
    epochs = epochs_of([[8] * 5, [8] * 3], epochs=2)
    found = together(pair, make_config(epochs=2, model=":normal"), epochs).outcomes
    assert_bit_equal(found)
    mean = np.zeros(DENSE_WIDTH, np.float32)
    for epoch in range(2):
        mean = np.mean([moving_means(of[epoch], mean) for of in epochs], axis=0)
    moving_mean, moving_variance = found[0].state
    np.testing.assert_allclose(moving_mean[-DENSE_WIDTH:], mean, atol=1e-5)
    assert (moving_variance[-DENSE_WIDTH:] != 1).all()


def test_trainers_begin_with_the_same_weights_whatever_each_has_drawn(pair: list[Member]) -> None:
    assert_bit_equal(together(pair, make_config(model=":unequal"), epochs_of([[8] * 3, [8] * 3])).outcomes)


# --- early stopping ------------------------------------------------------------------------------------------------------


def test_two_trainers_stop_early_where_one_would(pair: list[Member]) -> None:
    """Each evaluates on its part of the validation data; what all of it says decides for both."""
    config = make_config(epochs=9, evaluate_steps=3, patience=2, monitor="logloss", learning_rate=0.3)
    epochs, valid = epochs_of([[8] * 5, [8] * 4], 9), [batches_of([8, 8, 3], 80), batches_of([8], 81)]
    expected, found = (run(who, config, epochs, None, valid) for run, who in ((alone, pair[0]), (together, pair)))
    (one,) = expected.outcomes
    assert one.finished.goes_back_to
    assert one.finished.steps < 45
    assert_bit_equal(found.outcomes)
    for outcome in found.outcomes:
        finished = outcome.finished
        assert (finished.goes_back_to, finished.steps, finished.epochs) == (
            one.finished.goes_back_to, one.finished.steps, one.finished.epochs
        )  # fmt: skip
        assert [(e.step, e.is_best) for e in outcome.validated] == [(e.step, e.is_best) for e in one.validated]
        for of_all, of_one in zip(outcome.validated, one.validated, strict=True):
            assert_of_all(of_all.metrics, of_one.metrics)


# --- narrow floats ----------------------------------------------------------------------------------------------------------

LEFT_OUT = "steps_left_out_by_loss_scaling"


def test_a_step_that_overflows_at_one_trainer_is_left_out_by_all(pair: list[Member]) -> None:
    epochs = epochs_of([[8] * 6, [8] * 6])
    batch = epochs[1][0][2]
    epochs[1][0][2] = replace(batch, dense=batch.dense * np.float32(3e3))
    found = together(pair, make_config(precision="mixed_float16"), epochs)
    assert_bit_equal(found.outcomes)
    left_out = [outcome.counters[LEFT_OUT] for outcome in found.outcomes]
    assert left_out[0] == left_out[1] > 0
    assert found.outcomes[0].finished.steps == 6
    assert found.unsound == 0, "a gradient of zeros was pushed, not one of infinities"


def test_two_trainers_leave_out_no_steps_that_one_takes(pair: list[Member]) -> None:
    epochs = epochs_of([[256] * 3, [256] * 3])
    config = make_config(batch_size=256, precision="mixed_float16")
    expected, found = alone(pair[0], config, epochs), together(pair, config, epochs)
    assert [LEFT_OUT in outcome.counters for outcome in (*expected.outcomes, *found.outcomes)] == [False] * 3
    assert {weight.dtype for weight in found.outcomes[0].weights} == {np.dtype(np.float32)}
    assert_same(found, expected, atol=0.01)


# --- errors -----------------------------------------------------------------------------------------------------------------


def started(
    pair: Sequence[Member], shards: Shards, config: Config, epochs: Epochs, timeout_s: float = LONG_S,
    **troubles: tuple[int, Callable[[], None]],
) -> list[int]:  # fmt: skip
    """Calls of trainers, with troubles of those named: `_1=(4, fail)`."""
    of = {int(name.removeprefix("_")): trouble for name, trouble in troubles.items()}
    return start_all(pair, tasks(shards, config, epochs, timeout_s=timeout_s, troubles=of))


def test_trainers_that_look_up_together_end_with_the_one_whose_data_are_bad(pair: list[Member]) -> None:
    """By themselves: the one that fails tells the shards."""
    with serving(2, 1) as shards:
        calls = started(pair, shards, make_config(), epochs_of([[8] * 9, [8] * 9]), _0=(4, fail))
        assert isinstance(error_of(pair[0], calls[0], LONG_S), OSError)
        assert isinstance(error_of(pair[1], calls[1]), StoppedError)


def test_a_trainer_that_waits_in_a_sum_for_one_that_has_failed_is_freed_by_an_abort(pair: list[Member]) -> None:
    epochs = epochs_of([[8] * 9, [8] * 9])
    with serving(2, 2) as shards:
        calls = started(pair, shards, make_config(in_flight=2), epochs, _1=(4, fail))
        assert isinstance(error_of(pair[1], calls[1], LONG_S), OSError)
        pair[0].call(abort)
        error = error_of(pair[0], calls[0])
    assert isinstance(error, StoppedError)
    assert str(error) == "the run was stopped because of another role's error"


def test_a_model_that_gives_nan_stops_all_with_that_error(pair: list[Member]) -> None:
    epochs = epochs_of([[8] * 5, [8] * 5])
    dense = epochs[1][0][2].dense.copy()
    dense[0, 0] = np.nan
    epochs[1][0][2] = replace(epochs[1][0][2], dense=dense)
    with serving(2, 1) as shards:
        calls = started(pair, shards, make_config(), epochs)
        for member, call in zip(pair, calls, strict=True):
            error = error_of(member, call, LONG_S)
            assert isinstance(error, ModelError)
            assert "lower trainer.learning_rate" in str(error)
        assert shards.unsound() == 0, "what is no gradient was not pushed"


def test_embeddings_gradients_that_are_nan_stop_all(pair: list[Member]) -> None:
    """As they stop one trainer; loss and dense gradients are finite."""
    epochs = epochs_of([[8] * 3, [8] * 3])
    with serving(1, 1) as shards:
        task = Task(make_config(model=":fragile"), shards.placement, shards.addresses, joined(epochs))
        assert isinstance(error_of(pair[0], pair[0].start(train, task)), ModelError)
    with serving(2, 1) as shards:
        calls = started(pair, shards, make_config(model=":fragile"), epochs)
        for member, call in zip(pair, calls, strict=True):
            assert isinstance(error_of(member, call, LONG_S), ModelError)


# --- stop -------------------------------------------------------------------------------------------------------------------

SIZES = [[8] * 6, [8] * 6]


def stopped(pair: Sequence[Member], calls: Sequence[int]) -> int:
    """All trainers end soon, after the same step, and none has an error; which step."""
    outcomes = all_results(pair, calls, SOON_S)
    assert_bit_equal(outcomes)
    assert [outcome.finished.stopped for outcome in outcomes] == [True, True]
    return outcomes[0].finished.steps


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_stop_of_one_trainer_is_a_stop_of_all_after_the_same_step(pair: list[Member], in_flight: int) -> None:
    """Requests do not come to all at the same time."""
    with serving(2, in_flight) as shards:
        assert 0 < stopped(pair, started(pair, shards, make_config(in_flight, 2), epochs_of(SIZES, 2), _1=(4, stop))) <= 6


def test_a_stop_at_the_end_of_an_epoch(pair: list[Member]) -> None:
    with serving(2, 1) as shards:
        assert stopped(pair, started(pair, shards, make_config(1, 2), epochs_of(SIZES, 2), _1=(6, stop))) <= 7


def test_a_stop_of_one_that_has_no_data_any_more(pair: list[Member]) -> None:
    with serving(2, 1) as shards:
        epochs = epochs_of([[8] * 6, [8] * 3], 2)
        assert 0 < stopped(pair, started(pair, shards, make_config(1, 2), epochs, _1=(3, stop))) <= 6


def waits_at(step: int) -> tuple[threading.Event, Callable[[int], None]]:
    """Set when trainer 0 looks up its batch of that step; what hears it."""
    waiting = threading.Event()

    def hear(batch: int) -> None:
        if (trainer_of(batch), step_of(batch)) == (0, step):
            waiting.set()

    return waiting, hear


def test_a_stop_while_one_waits_for_the_hub_and_the_other_for_the_first(pair: list[Member]) -> None:
    waiting, hear = waits_at(4)
    with serving(2, 1, hear=hear) as shards:
        calls = started(pair, shards, make_config(1, 2), epochs_of(SIZES, 2), _1=(4, hold))
        assert pair[1].reached.wait(LONG_S)
        assert waiting.wait(LONG_S)
        for member in pair:
            member.call(stop)
        assert stopped(pair, calls) in (4, 5)


def test_a_trainer_that_waits_in_a_shard_for_one_that_was_killed_is_freed_by_the_run(pair: list[Member]) -> None:
    """The last one here: a new member takes its time to start."""
    waiting, hear = waits_at(4)
    with serving(2, 1, hear=hear) as shards:
        calls = started(pair, shards, make_config(), epochs_of([[8] * 9, [8] * 9]), _1=(4, hold))
        assert pair[1].reached.wait(LONG_S)
        assert waiting.wait(LONG_S)
        pair[1].kill()
        shards.release()
        pair[0].call(abort)
        assert isinstance(error_of(pair[0], calls[0]), StoppedError)


# --- N trainers with batches of B are one with batches of N·B ---------------------------------------------------------------

UNEVEN = [[8] * 15, [8] * 9 + [5]]  # one has no more while the other goes on
BARE = [[8, 8, 3], []]  # one never has any


@pytest.mark.parametrize(
    ("sizes", "config"),
    [(UNEVEN, make_config(epochs=2, model=":regular")), (BARE, make_config(model=":constant", jit_compile=True))],
    ids=["uneven, a regulariser", "one without data, a model without weights, XLA"],
)
def test_two_trainers_are_one_with_twice_the_batch(pair: list[Member], sizes: list[list[int]], config: Config) -> None:
    check_two_are_one(pair, sizes, config)


def with_two(epochs: Epochs) -> Epochs:
    """Batches with a second label, and a weight for each sample, some of them 0; in some batches a sample was left out."""

    def second(batch: Batch, k: int) -> Batch:
        random = np.random.default_rng(k)
        labels = np.stack([batch.labels, (batch.dense[:, 0] > 0).astype(np.float32)], 1)
        return replace(batch, labels=labels, weights=random.choice([0.0, 0.5, 3.0], batch.size).astype(np.float32), left_out=k % 2)

    return [[[second(batch, 100 * n + k) for k, batch in enumerate(of)] for of in epochs_of] for n, epochs_of in enumerate(epochs)]


def test_with_several_labels_and_weights_two_trainers_are_one_with_twice_the_batch(pair: list[Member]) -> None:
    """Each sample counts with its weight, whichever trainer has it, and the mean is over all samples of both."""
    config = make_config(model="shared_bottom")
    config = msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, extra_labels=("buy",)))
    epochs = with_two(epochs_of([[8] * 7, [8] * 4 + [5]]))
    (test,) = zip(*with_two([[batches_of([8, 3], 70)], [batches_of([8], 71)]]), strict=True)
    expected, found = alone(pair[0], config, epochs, test), together(pair, config, epochs, test)
    assert_same(found, expected)
    assert_bit_equal(found.outcomes)
    for outcome in found.outcomes:
        for of_all, of_one in zip(
            [*outcome.intervals, outcome.test], [*expected.outcomes[0].intervals, expected.outcomes[0].test], strict=True
        ):
            assert_of_all(of_all, of_one)

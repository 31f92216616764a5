"""Several trainers against one with the batches of all. `long_group_step` has how they end by each other's errors, and more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from flowps.batch import Batch, Float32
from flowps.config import Config
from flowps.status.event import Metrics
from tests.trainer.members import (
    Member,
    Outcome,
    Task,
    all_results,
    batches_of,
    joined,
    make_config,
    serving,
    start_all,
    tasks,
    train,
)  # fmt: skip

pytestmark = pytest.mark.timeout(120)  # a trainer that waits for ever is the failure most of these look for

Epochs = Sequence[list[list[Batch]]]  # [trainer][epoch][step]
Rows = dict[str, dict[int, Float32]]


def epochs_of(sizes: Sequence[Sequence[int]], epochs: int = 1) -> Epochs:
    """Of each trainer the sizes of its batches; every epoch has others."""
    return [[batches_of(of, 10 * epoch + n + 1) for epoch in range(epochs)] for n, of in enumerate(sizes)]


@dataclass(frozen=True)
class Run:
    """What trainers, or one, came to, and the rows they left."""

    outcomes: list[Outcome]
    rows: Rows
    unsound: int


def together(
    pair: Sequence[Member], config: Config, epochs: Epochs, test: Sequence[list[Batch]] | None = None,
    valid: Sequence[list[Batch]] | None = None,
) -> Run:  # fmt: skip
    """A run of all, with shards of their own."""
    with serving(len(pair), config.trainer.in_flight) as shards:
        of_each = tasks(shards, config, epochs, test)
        if valid is not None:
            of_each = [replace(task, valid=of) for task, of in zip(of_each, valid, strict=True)]
        calls = start_all(pair, of_each)
        return Run(all_results(pair, calls), shards.rows(), shards.unsound())


def alone(
    member: Member, config: Config, epochs: Epochs, test: Sequence[list[Batch]] | None = None,
    valid: Sequence[list[Batch]] | None = None,
) -> Run:  # fmt: skip
    """What one trainer makes of it."""
    whole, whole_valid = (None if of is None else [batch for part in of for batch in part] for of in (test, valid))
    with serving(1, config.trainer.in_flight) as shards:
        task = Task(config, shards.placement, shards.addresses, joined(epochs), whole, valid=whole_valid)
        found = member.call(train, task)
        return Run([found], shards.rows(), shards.unsound())


def assert_same(found: Run, expected: Run, atol: float = 1e-4) -> None:
    """All that was learned: dense weights, and rows with their state."""
    (one,) = expected.outcomes
    for outcome in found.outcomes:
        for weight, wanted in zip(outcome.weights, one.weights, strict=True):
            np.testing.assert_allclose(weight, wanted, rtol=0, atol=atol)
    assert found.rows.keys() == expected.rows.keys()
    for slot, rows in expected.rows.items():
        assert found.rows[slot].keys() == rows.keys(), slot
        np.testing.assert_allclose([found.rows[slot][sign] for sign in rows], list(rows.values()), rtol=0, atol=atol, err_msg=slot)


def assert_of_all(metrics: Metrics | None, expected: Metrics | None) -> None:
    """Quality over the samples of all trainers."""
    assert metrics is not None
    assert expected is not None
    assert metrics.examples == expected.examples
    assert metrics.auc == pytest.approx(expected.auc, abs=0.02)  # of a few samples, two of which may change places
    for name in ("logloss", "prob_mean", "real_mean"):
        assert getattr(metrics, name) == pytest.approx(getattr(expected, name), abs=1e-4), name


def assert_bit_equal(outcomes: Sequence[Outcome]) -> None:
    """The dense part is one, whoever is asked."""
    first, *others = outcomes
    for other in others:
        assert [w.tobytes() for w in other.weights] == [w.tobytes() for w in first.weights]
        assert [s.tobytes() for s in other.state] == [s.tobytes() for s in first.state]
        assert other.intervals == first.intervals
        assert other.test == first.test
        assert (other.finished.steps, other.finished.examples) == (first.finished.steps, first.finished.examples)


# --- N trainers with batches of B are one with batches of N·B ---------------------------------------------------------------


def check_two_are_one(pair: list[Member], sizes: list[list[int]], config: Config) -> None:
    """Two trainers with batches of these sizes do what one with their batches joined does."""
    epochs, test = epochs_of(sizes, config.epochs), [batches_of([8, 8, 3], 70), batches_of([8], 71)]
    expected = alone(pair[0], config, epochs, test)
    found = together(pair, config, epochs, test)
    assert_same(found, expected)
    assert_bit_equal(found.outcomes)
    (one,) = expected.outcomes
    for n, outcome in enumerate(found.outcomes):
        assert (outcome.finished.steps, outcome.finished.examples) == (one.finished.steps, one.finished.examples)
        assert outcome.pushed == len(outcome.tickets) == sum(map(len, epochs[n])), "a push for each batch of its own"
        assert len(outcome.intervals) == len(one.intervals)
        for of_all, of_one in zip([*outcome.intervals, outcome.test], [*one.intervals, one.test], strict=True):
            assert_of_all(of_all, of_one)


def test_two_trainers_are_one_with_twice_the_batch(pair: list[Member]) -> None:
    """`long_group_step` has uneven ones, and other models."""
    check_two_are_one(pair, [[8] * 15, [8] * 15], make_config(epochs=2, warmup_steps=5, decay="linear", decay_steps=20))


@pytest.mark.long
def test_in_the_asynchronous_mode_every_sample_counts_once(pair: list[Member]) -> None:
    epochs, test = epochs_of([[8] * 11, [8] * 6 + [5]], epochs=3), [batches_of([8, 4], 70), []]
    found = together(pair, make_config(in_flight=2, epochs=3), epochs, test)
    assert_bit_equal(found.outcomes)
    for outcome, of in zip(found.outcomes, epochs, strict=True):
        assert outcome.finished.examples == 3 * (88 + 53)
        assert outcome.finished.steps == 3 * 11
        assert sum(metrics.examples for metrics in outcome.intervals) == 3 * (88 + 53)
        assert outcome.test is not None
        assert outcome.test.examples == 12
        assert outcome.pushed == len(outcome.tickets) == sum(map(len, of))
        assert all(np.isfinite(weight).all() for weight in outcome.weights)

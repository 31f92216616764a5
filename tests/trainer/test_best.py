"""`BestSoFar` against its slow twin: the whole list of evaluations, looked through each time."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.status.event import Metrics
from flowps.trainer.best import BestSoFar


def metrics(auc: float | None, logloss: float = 0.5) -> Metrics:
    return Metrics(100, auc, logloss, 0.2, 0.2)


def naive_best(values: Sequence[float | None]) -> int:
    """The first place of the best value, from 1; 0: there is none."""
    best = max((value for value in values if value is not None), default=None)
    return 0 if best is None else 1 + next(k for k, value in enumerate(values) if value == best)


def naive_is_over(values: Sequence[float | None], patience: int) -> bool:
    return 0 < patience <= len(values) - naive_best(values)


def told(monitor: str, patience: int, values: Sequence[float | None]) -> tuple[BestSoFar, list[bool]]:
    """After evaluations at steps 10, 20, …, and what each was told to be."""
    best, found = BestSoFar(monitor, patience), []
    for k, value in enumerate(values):
        given = metrics(value) if monitor == "auc" else metrics(0.5, -(value or 0.0))
        found.append(best.see(10 * (k + 1), given))
    return best, found


scores = st.lists(st.none() | st.sampled_from([0.1, 0.5, 0.7, 0.9]), max_size=12)


@settings(deadline=None, max_examples=200)
@given(values=scores, patience=st.integers(0, 4), monitor=st.sampled_from(["auc", "logloss"]), at=st.integers(0, 12))
def test_the_twin_agrees_and_a_state_goes_on_as_if_nothing_had_happened(
    values: list[float | None], patience: int, monitor: str, at: int
) -> None:
    if monitor == "logloss":
        values = [value or 0.0 for value in values]
    best, found = told(monitor, patience, values)
    assert (best.step, best.seen) == (10 * naive_best(values), 10 * len(values))
    assert best.is_over == naive_is_over(values, patience)
    assert found == [naive_best(values[: k + 1]) == k + 1 for k in range(len(values))]
    first, _ = told(monitor, patience, values[:at])
    second = BestSoFar(monitor, patience)
    second.restore(json.loads(json.dumps(first.state())))
    for k, value in enumerate(values[at:], at):
        given = metrics(value) if monitor == "auc" else metrics(0.5, -(value or 0.0))
        assert second.see(10 * (k + 1), given) == found[k]
    assert (second.step, second.seen, second.is_over, second.state()) == (best.step, best.seen, best.is_over, best.state())


def test_patience_is_counted_anew_after_a_better_one() -> None:
    best, found = told("auc", 2, [0.6, 0.5, 0.7, 0.7])
    assert (found, best.step, best.is_over) == ([True, False, True, False], 30, False)
    best.see(50, metrics(0.69))
    assert (best.step, best.is_over) == (30, True)


def test_without_patience_it_is_never_over() -> None:
    best, _ = told("auc", 0, [0.9] + [0.1] * 50)
    assert (best.is_over, best.step) == (False, 10)


def test_a_lower_logloss_is_better_whatever_the_auc() -> None:
    best = BestSoFar("logloss", 1)
    assert best.see(1, metrics(0.9, 0.5))
    assert best.see(2, metrics(0.1, 0.4))
    assert best.see(3, metrics(None, 0.3)), "one class alone has a logloss too"
    assert not best.see(4, metrics(0.99, 0.3))
    assert best.is_over


def test_evaluations_without_an_auc_are_no_better_and_no_reason_to_wait_for_ever() -> None:
    best, found = told("auc", 3, [None, None])
    assert (found, best.step, best.is_over) == ([False, False], 0, False)
    again = BestSoFar("auc", 3)
    again.restore(best.state())
    assert not again.see(30, metrics(None))
    assert (again.is_over, again.step) == (True, 0), "a run that goes on has seen the first two"


def test_a_logloss_that_is_nan_is_not_the_best() -> None:
    """There was nothing to evaluate."""
    best = BestSoFar("logloss", 5)
    assert not best.see(1, metrics(None, float("nan")))
    assert best.see(2, metrics(0.5, 0.7))
    assert best.step == 2


@pytest.mark.parametrize("state", [{}, {"value": 0.5, "since": 1.0, "step": 20.0}])
def test_a_state_of_an_earlier_version_is_taken(state: dict[str, float]) -> None:
    """Of one that had seen nothing, or what JSON makes of whole numbers."""
    best = BestSoFar("auc", 2)
    best.restore(state)
    assert (best.seen, best.step, best.is_over) == ((0, 20, False) if state else (0, 0, False))
    assert type(best.step) is int
    assert best.see(30, metrics(0.4)) == (not state)
    assert best.is_over == bool(state)

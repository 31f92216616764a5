"""What slots bring to the shards: counted as a twin counts, by `measure` and by a meter that many threads use."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.batch import Batch
from flowps.ps import load as load_module
from flowps.ps.load import LoadMeter, SlotLoad, measure
from tests.ps import drawn

Many = list[drawn.Bags]
"""[batch][slot][sample] → signs."""


def naive_loads(many: Many, counted: Sequence[int] | None = None) -> list[SlotLoad]:
    """[slot] → its load; distinct signs of the batches `counted` only, of all without."""
    samples = sum(len(of[0]) for of in many)
    sampled = many if counted is None else [many[n] for n in counted]
    found = []
    for s in range(len(many[0])):
        signs = [[sign for bag in of[s] for sign in bag] for of in many]
        distinct = sum(len({sign for bag in of[s] for sign in bag}) for of in sampled)
        rows = len({sign for of_batch in signs for sign in of_batch})
        found.append(SlotLoad(sum(map(len, signs)) / samples, distinct / sum(len(of[0]) for of in sampled), rows))
    return found


@st.composite
def batches(draw: st.DrawFn, most: int = 4) -> Many:
    """Some batches of the same slots and of any size; few different signs, so that they come again."""
    num_slots = draw(st.integers(1, 4))
    few = st.one_of(st.integers(0, 5), st.sampled_from(drawn.EDGES))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=most))
    return [draw(drawn.bags(num_slots, size, few)) for size in sizes]


def close(ours: Sequence[SlotLoad], theirs: Sequence[SlotLoad]) -> None:
    """Assert that they say the same but for rounding."""
    assert [load.rows for load in ours] == [load.rows for load in theirs]
    for of in ("signs", "distinct"):
        np.testing.assert_allclose([getattr(load, of) for load in ours], [getattr(load, of) for load in theirs], rtol=1e-12)


@drawn.bounded(max_examples=100)
@given(many=batches())
def test_measure(many: Many) -> None:
    """Signs, and those that are the first of their kind in a batch, per sample; rows over all batches."""
    close(measure(drawn.batch(bags) for bags in many), naive_loads(many))


def test_one_case_by_hand() -> None:
    """Sign 7 comes twice in the first batch and again in the second: two distinct signs of it a batch apart, but one row."""
    first: drawn.Bags = [[[7, 7, 8], [7], []], [[], [], []]]
    second: drawn.Bags = [[[7]], [[2**64 - 1]]]
    assert measure([drawn.batch(first), drawn.batch(second)]) == [SlotLoad(5 / 4, 3 / 4, 2), SlotLoad(1 / 4, 1 / 4, 1)]


def test_batches_without_slots() -> None:
    """No loads."""
    bare = Batch(np.zeros(2, np.float32), np.zeros((2, 1), np.float32), np.empty(0, np.uint64), np.zeros(1, np.int32))
    assert measure([bare]) == []
    meter = LoadMeter(0)
    meter.observe(bare)
    assert meter.loads([]) == []


def test_the_cost_of_a_share() -> None:
    """Half the signs are half the work with signs; the vector is sent whole by each. More of anything costs more."""
    load, slot = SlotLoad(10.0, 4.0, 100), drawn.slot("s", dim=16)
    sent = load.cost_ns(slot, 0.0)
    assert sent == SlotLoad(0.0, 0.0, 0).cost_ns(slot) > 0
    assert load.cost_ns(slot) - sent == pytest.approx(2 * (load.cost_ns(slot, 0.5) - sent))
    assert load.cost_ns(slot) < SlotLoad(11.0, 4.0, 100).cost_ns(slot) < SlotLoad(11.0, 5.0, 100).cost_ns(slot)
    assert load.cost_ns(slot) < load.cost_ns(drawn.slot("s", dim=17))
    # Pooling none sends all max_len rows of a sample, however many there are.
    rows = drawn.slot("s", dim=16, pooling="none", max_len=3)
    assert load.cost_ns(rows, 0.0) == 3 * sent


@drawn.bounded(max_examples=60)
@given(many=batches())
def test_a_meter_says_what_measure_says(many: Many) -> None:
    """Of few batches, in which it counts everything. Rows are for others to say."""
    meter = LoadMeter(len(many[0]))
    for bags in many:
        meter.observe(drawn.batch(bags))
    expected = naive_loads(many)
    close(meter.loads([load.rows for load in expected]), expected)


@drawn.bounded(max_examples=60)
@given(many=batches(most=12), first=st.integers(0, 3), every=st.integers(1, 5))
def test_distinct_signs_are_counted_now_and_then(many: Many, first: int, every: int) -> None:
    """In the first batches and in every so many after; all signs are counted in every batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module, "_SAMPLED_FIRST", first)
        patch.setattr(load_module, "_SAMPLED_EVERY", every)
        meter = LoadMeter(len(many[0]))
        for bags in many:
            meter.observe(drawn.batch(bags))
    expected = naive_loads(many, [n for n in range(len(many)) if n < first or n % every == 0])
    close(meter.loads([load.rows for load in expected]), expected)


def test_a_meter_that_saw_nothing() -> None:
    """Zeros, not a division by zero."""
    assert LoadMeter(2).loads([3, 4]) == [SlotLoad(0.0, 0.0, 3), SlotLoad(0.0, 0.0, 4)]


def test_rows_of_every_slot() -> None:
    """One number too few is a bug, not a shorter list."""
    with pytest.raises(ValueError, match="shorter"):
        LoadMeter(2).loads([3])


@pytest.mark.usefixtures("hurried_switching")
def test_many_threads_share_a_meter() -> None:
    """Nothing is lost, whoever's batches are the sampled ones."""
    meter = LoadMeter(2)
    batch = drawn.batch([[[1, 2, 2], [2]], [[], [5]]])

    def observe() -> None:
        for _ in range(200):
            meter.observe(batch)
            assert meter.loads([0, 0])[0].signs == 2.0

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(observe) for _ in range(4)]:
            done.result()
    assert meter.loads([2, 1]) == [SlotLoad(2.0, 1.0, 2), SlotLoad(0.5, 0.5, 1)]

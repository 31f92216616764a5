"""Timings and counters: quantiles against numpy, everything else exact, from many threads at once."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.status import run_status
from flowps.status.run_status import RELATIVE_ERROR, RunStatus, Stage, StageSummary

RNG = np.random.default_rng(7)
DISTRIBUTIONS = {
    "uniform": RNG.uniform(1e-6, 1e-2, 20_000),
    "lognormal over nine decades": RNG.lognormal(-7, 3, 20_000),
    "exponential": RNG.exponential(0.02, 20_000),
    "two far peaks": np.concatenate([RNG.normal(1e-4, 1e-6, 9_400), RNG.normal(5.0, 0.1, 600)]),
    "constant": np.full(1_000, 0.262144),
    "few": np.array([1e-3, 2e-3, 3e-3, 4e-3, 5e-3]),
    "one": np.array([0.2094886]),
    "half zeros": np.concatenate([np.zeros(500), RNG.uniform(0.1, 0.2, 500)]),
}


def fill(times_s: np.ndarray) -> Stage:
    stage = Stage()
    for seconds in times_s.tolist():
        stage.observe(seconds)
    return stage


@pytest.mark.parametrize("times_s", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_quantiles_are_within_one_percent_and_the_rest_is_exact(times_s: np.ndarray):
    found = fill(times_s).summary()
    us = times_s * 1e6
    # The sketch answers with an observed value, not with one between two.
    expected = np.quantile(us, [0.5, 0.95, 0.99], method="lower")
    np.testing.assert_allclose([found.p50_us, found.p95_us, found.p99_us], expected, rtol=RELATIVE_ERROR)
    assert found.count == len(us)
    assert found.max_us == us.max()
    assert found.total_us == pytest.approx(us.sum(), rel=1e-12)
    assert found.p50_us <= found.p95_us <= found.p99_us <= found.max_us


def test_nothing_observed_is_all_zeros():
    assert Stage().summary() == StageSummary(0, 0.0, 0.0, 0.0, 0.0, 0.0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(1e-9, 1e5), max_size=40), st.lists(st.floats(1e-9, 1e5), max_size=40), st.integers(1, 3)
)  # fmt: skip
def test_merge_equals_the_union(left: list[float], right: list[float], parts: int):
    merged = fill(np.array(left))
    others = [fill(np.array(right)[k::parts]) for k in range(parts)]
    before = [other.summary() for other in others]
    for other in others:
        merged.merge(other)
    union, found = fill(np.array(left + right)).summary(), merged.summary()
    assert (found.count, found.max_us) == (union.count, union.max_us)
    assert (found.p50_us, found.p95_us, found.p99_us) == (union.p50_us, union.p95_us, union.p99_us)
    assert found.total_us == pytest.approx(union.total_us, rel=1e-12)
    assert [other.summary() for other in others] == before, "the other one stays as it is"


def test_merge_does_not_tie_the_two_together():
    one, other = fill(np.array([1.0])), fill(np.array([2.0]))
    one.merge(other)
    one.observe(3.0)
    assert (one.summary().count, other.summary().count) == (3, 1)


def test_counters_add_up():
    status = RunStatus()
    status.count("dropped")
    status.count("dropped", 41)
    status.count("empty_reads", 0)
    assert status.counters() == {"dropped": 42, "empty_reads": 0}


def test_counters_and_summaries_are_copies():
    status = RunStatus()
    status.count("a")
    counters, summaries = dict(status.counters()), status.summaries()
    status.count("a")
    status.observe("b", 1.0)
    assert (counters, summaries) == ({"a": 1}, {})


def test_stages_by_name_leave_out_those_never_observed():
    status = RunStatus()
    status.stage("asked for only")
    status.observe("Step", 0.5)
    assert status.stage("Step") is status.stage("Step")
    assert list(status.summaries()) == ["Step"]


def test_timed_counts_the_body_once_and_takes_its_time(monkeypatch: pytest.MonkeyPatch):
    status = RunStatus()
    clock = iter([10.0, 10.25])
    monkeypatch.setattr(run_status, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with status.timed("Step"):
        pass
    assert status.summaries()["Step"].total_us == 250_000


def test_timed_does_not_count_a_body_that_raises():
    status = RunStatus()
    with pytest.raises(KeyError), status.timed("Step"):
        raise KeyError
    assert status.summaries() == {}


@pytest.mark.usefixtures("hurried_switching")
def test_many_threads_lose_nothing():
    status, threads, each = RunStatus(), 8, 300
    start = threading.Barrier(threads)
    seen: list[int] = []

    def work(k: int) -> None:
        start.wait(10)
        for i in range(each):
            status.observe("shared", 1e-6 * (k * each + i + 1))
            status.observe(f"own {k}", 1e-3)
            status.count("events")
            status.count("bytes", i)
            if i % 50 == 0:
                seen.append(status.summaries()["shared"].count)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    found, n = status.summaries(), threads * each
    assert found["shared"].count == n
    assert found["shared"].total_us == pytest.approx(n * (n + 1) / 2)
    assert found["shared"].max_us == pytest.approx(n)
    assert [found[f"own {k}"].count for k in range(threads)] == [each] * threads
    assert status.counters() == {"events": n, "bytes": threads * each * (each - 1) // 2}
    assert 0 < max(seen) <= n


def test_a_stage_is_observed_by_one_thread_at_a_time():
    """The sketch is not made for threads, though today's interpreter rarely interrupts it in the wrong place."""

    class Fragile:
        count = 0

        def add(self, us: float) -> None:
            count = self.count
            os.sched_yield()  # lets another thread in
            self.count = count + 1

    stage, fragile, start = Stage(), Fragile(), threading.Barrier(4)
    stage._sketch = fragile

    def work() -> None:
        start.wait(10)
        for _ in range(100):
            stage.observe(1e-3)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert fragile.count == 400


@pytest.mark.usefixtures("hurried_switching")
def test_merging_while_observing_loses_nothing():
    total, parts = Stage(), [Stage() for _ in range(4)]
    start = threading.Barrier(len(parts))

    def work(part: Stage) -> None:
        start.wait(10)
        for _ in range(200):
            part.observe(1e-3)
            total.observe(1e-3)
        total.merge(part)

    workers = [threading.Thread(target=work, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert total.summary().count == 2 * 200 * len(parts)

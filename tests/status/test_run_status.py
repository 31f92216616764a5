"""Timings and counters: quantiles against numpy, everything else exact, from many threads at once."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.status import run_status
from flowps.status import stage as stage_module
from flowps.status.run_status import RunStatus
from flowps.status.stage import RELATIVE_ERROR, Histogram, Stage, StageSummary
from flowps.status.trace import Trace

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
    st.lists(st.floats(0, 1e5), max_size=40), st.lists(st.floats(0, 1e5), max_size=40), st.integers(1, 3)
)  # fmt: skip
def test_merge_equals_the_union(left: list[float], right: list[float], parts: int):
    merged = fill(np.array(left)).histogram()
    others = [fill(np.array(right)[k::parts]).histogram() for k in range(parts)]
    before = [msgspec.to_builtins(other) for other in others]
    for other in others:
        merged.merge(other)
    union, found = fill(np.array(left + right)).summary(), merged.summary()
    assert (found.count, found.max_us) == (union.count, union.max_us)
    assert (found.p50_us, found.p95_us, found.p99_us) == (union.p50_us, union.p95_us, union.p99_us)
    assert found.total_us == pytest.approx(union.total_us, rel=1e-12)
    assert [msgspec.to_builtins(other) for other in others] == before, "the other one stays as it is"
    assert msgspec.json.decode(msgspec.json.encode(merged), type=Histogram) == merged, "and it crosses processes"


def test_a_histogram_is_a_copy():
    stage = fill(np.array([1.0]))
    copy = stage.histogram()
    stage.observe(3.0)
    assert (stage.histogram().count, copy.count) == (2, 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1e2), min_size=1, max_size=200), st.lists(st.floats(1.0, 1e8), min_size=1, max_size=9))
def test_how_many_are_below_a_bound_is_known_within_the_error(times_s: list[float], bounds_us: list[float]):
    bounds = sorted(bounds_us)
    found = fill(np.array(times_s)).histogram().up_to(bounds)
    us = np.array(times_s) * 1e6
    for bound, count in zip(bounds, found, strict=True):
        assert (us <= bound / (1 + 3 * RELATIVE_ERROR)).sum() <= count <= (us <= bound * (1 + 1e-9)).sum()
    assert found == sorted(found)


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


@pytest.mark.usefixtures("hurried_switching")
def test_counting_while_observing_loses_nothing(monkeypatch: pytest.MonkeyPatch):
    """Threads that observe, count what is pending when it is much, and ask for figures, all at once."""
    monkeypatch.setattr(stage_module, "_MOST_PENDING", 16)
    stage, threads, each = Stage(), 4, 2_000
    start, seen = threading.Barrier(threads), list[int]()

    def work() -> None:
        start.wait(10)
        for i in range(each):
            stage.observe(1e-3)
            if i % 100 == 0:
                seen.append(stage.histogram().count)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert stage.summary().count == threads * each
    assert sum(stage.histogram().counts.values()) == threads * each
    assert max(seen) <= threads * each


def test_a_span_is_an_observation_and_is_traced():
    status = RunStatus(Trace())
    status.span("Step", 1.0, 1.5, batch=7)
    with status.timed("Wait", batch=8):
        pass
    assert status.summaries()["Step"].total_us == pytest.approx(5e5)
    assert status.trace is not None
    (spans,) = status.trace.take("trainer-0", "here:1")
    assert [(name, batch) for name, _, _, _, batch in spans.spans] == [("Step", 7), ("Wait", 8)]

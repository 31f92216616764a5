"""What is told after a step: intervals, progress, and the steady state's figures, under a clock that the tests move."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from flowps.status.event import Event, Interval, Progress
from flowps.status.run_status import RunStatus
from flowps.trainer import hook as hook_module
from flowps.trainer.hook import SteadyClock, StepReporter
from flowps.trainer.metrics import StreamingMetrics
from flowps.trainer.state import State

SIZE = 4
LABELS = np.array([0, 1, 0, 1], np.float32)
LOGITS = np.array([-1, 1, 2, 3], np.float32)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Wall and CPU time that pass only when a test says so."""
    clock = SimpleNamespace(wall=1_000.0, cpu=50.0)
    monkeypatch.setattr(hook_module, "time", SimpleNamespace(perf_counter=lambda: clock.wall, process_time=lambda: clock.cpu))
    return clock


# --- intervals and progress -------------------------------------------------------------------------------------------


class Steps:
    """A reporter and the steps it was told of."""

    def __init__(self, print_interval: int, clock: SimpleNamespace, labels: tuple[str, ...] = ("label",)) -> None:
        self.events: list[Event] = []
        self.clock = clock
        self.reporter = StepReporter(self.events.append, print_interval, labels)
        self.step = 0

    def take(self, count: int, seconds: float = 0.01, labels: np.ndarray = LABELS, logits: np.ndarray = LOGITS) -> None:
        for _ in range(count):
            self.step += 1
            self.clock.wall += seconds
            self.reporter.after_step(self.step, self.step * SIZE, 0.5, labels, logits, 3)

    @property
    def intervals(self) -> list[Interval]:
        return [event for event in self.events if isinstance(event, Interval)]

    @property
    def progress(self) -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress)]


def test_an_interval_ends_every_print_interval_steps(clock: SimpleNamespace):
    steps = Steps(10, clock)
    steps.reporter.begin_epoch(1)
    steps.take(35)
    assert [(event.epoch, event.step) for event in steps.intervals] == [(1, 10), (1, 20), (1, 30)]
    assert [event.metrics.examples for event in steps.intervals] == [40, 40, 40]
    assert [event.epoch_metrics.examples for event in steps.intervals] == [40, 80, 120]


def test_the_end_of_an_epoch_reports_the_rest_once(clock: SimpleNamespace):
    steps = Steps(10, clock)
    steps.reporter.begin_epoch(1)
    steps.take(13)
    steps.reporter.end_interval(13)
    steps.reporter.end_interval(13)
    assert [(event.step, event.metrics.examples) for event in steps.intervals] == [(10, 40), (13, 12)]
    assert steps.intervals[-1].epoch_metrics.examples == 52


def test_no_step_is_no_interval(clock: SimpleNamespace):
    steps = Steps(1, clock)
    steps.reporter.begin_epoch(1)
    steps.reporter.end_interval(0)
    assert steps.events == []


def test_rates_are_those_of_the_interval(clock: SimpleNamespace):
    steps = Steps(10, clock)
    steps.reporter.begin_epoch(1)
    steps.take(10, seconds=0.1)
    steps.take(10, seconds=0.02)
    assert [event.steps_per_s for event in steps.intervals] == pytest.approx([10, 50])
    assert [event.examples_per_s for event in steps.intervals] == pytest.approx([10 * SIZE, 50 * SIZE])


def test_metrics_are_those_of_the_interval_and_epoch_metrics_of_the_epoch(clock: SimpleNamespace):
    worse, expected = -LOGITS, []
    steps, of_epoch = Steps(2, clock), StreamingMetrics()
    steps.reporter.begin_epoch(1)
    for logits in (LOGITS, worse):
        steps.take(2, logits=logits)
        interval = StreamingMetrics()
        for metrics in (interval, interval, of_epoch, of_epoch):
            metrics.update(LABELS, logits)
        expected.append((interval.result(), of_epoch.result()))
    assert [(event.metrics, event.epoch_metrics) for event in steps.intervals] == expected
    assert expected[0][0].auc != expected[1][0].auc, "or this test would show nothing"


def test_a_new_epoch_starts_metrics_rates_and_number_anew(clock: SimpleNamespace):
    steps = Steps(4, clock)
    steps.reporter.begin_epoch(1)
    steps.take(6, seconds=0.1)
    steps.reporter.end_interval(6)
    clock.wall += 100.0  # an evaluation, say
    steps.reporter.begin_epoch(2)
    steps.take(2, seconds=0.1)
    last = steps.intervals[-1]
    assert (last.epoch, last.step) == (2, 8)
    assert (last.metrics.examples, last.epoch_metrics.examples) == (2 * SIZE, 2 * SIZE)
    assert last.steps_per_s == pytest.approx(10)


def test_one_class_in_an_interval_has_no_auc(clock: SimpleNamespace):
    steps = Steps(1, clock)
    steps.reporter.begin_epoch(1)
    steps.take(1, labels=np.zeros(SIZE, np.float32))
    assert steps.intervals[0].metrics.auc is None


def test_progress_comes_twice_a_second_with_the_last_intervals_auc(clock: SimpleNamespace):
    steps = Steps(10, clock)
    steps.reporter.begin_epoch(2)
    steps.take(16, seconds=0.125)
    assert [event.step for event in steps.progress] == [4, 8, 12, 16]
    assert [event.examples for event in steps.progress] == [16, 32, 48, 64]
    assert [event.examples_per_s for event in steps.progress] == pytest.approx([SIZE / 0.125] * 4)
    auc = steps.intervals[0].metrics.auc
    assert auc is not None
    assert [event.auc for event in steps.progress] == [None, None, auc, auc]
    assert {(event.epoch, event.loss, event.queue_depth) for event in steps.progress} == {(2, 0.5, 3)}


def test_slow_steps_report_progress_each(clock: SimpleNamespace):
    steps = Steps(100, clock)
    steps.reporter.begin_epoch(1)
    steps.take(3, seconds=2.0)
    assert [event.examples_per_s for event in steps.progress] == pytest.approx([SIZE / 2.0] * 3)


# --- several labels -----------------------------------------------------------------------------------------------------

BOTH = ("click", "buy")
TWO_LABELS = np.stack([LABELS, 1 - LABELS], 1)
TWO_LOGITS = np.stack([LOGITS, LOGITS], 1)


def test_an_interval_has_the_figures_of_every_label(clock: SimpleNamespace):
    """Progress and the epoch go by the first one."""
    steps, of_first, of_second = Steps(2, clock, BOTH), StreamingMetrics(), StreamingMetrics()
    steps.reporter.begin_epoch(1)
    steps.take(2, seconds=0.5, labels=TWO_LABELS, logits=TWO_LOGITS)
    for _ in range(2):
        of_first.update(LABELS, LOGITS)
        of_second.update(1 - LABELS, LOGITS)
    (interval,) = steps.intervals
    assert (interval.metrics, interval.more) == (of_first.result(), {"buy": of_second.result()})
    assert interval.epoch_metrics == of_first.result()
    assert interval.metrics.auc != interval.more["buy"].auc
    assert steps.progress[-1].auc == interval.metrics.auc


def test_of_one_label_there_are_no_more(clock: SimpleNamespace):
    steps = Steps(1, clock)
    steps.reporter.begin_epoch(1)
    steps.take(1)
    assert steps.intervals[0].more == {}


@pytest.mark.parametrize("labels", [("label",), BOTH], ids=["one", "two"])
def test_what_was_seen_before_a_cut_is_in_the_next_interval(clock: SimpleNamespace, labels: tuple[str, ...]):
    """Through the file of a checkpoint: the interval that was under way, and the epoch before it."""
    given = {} if len(labels) == 1 else {"labels": TWO_LABELS, "logits": TWO_LOGITS}
    whole, first, again = (Steps(4, clock, labels) for _ in range(3))
    for steps, count in ((whole, 10), (first, 6)):
        steps.reporter.begin_epoch(1)
        steps.take(count, **given)
    state = State.of_bytes(State(6, 6 * SIZE, 0, 0, first.reporter.state()).to_bytes())
    again.reporter.begin_epoch(1)
    again.reporter.restore(state.arrays)
    again.step = 6
    again.take(4, **given)
    for steps in (whole, again):
        steps.reporter.end_interval(steps.step)
    assert [event.step for event in again.intervals] == [8, 10]
    for ours, wanted in zip(again.intervals, whole.intervals[1:], strict=True):
        assert (ours.metrics, ours.epoch_metrics, ours.more) == (wanted.metrics, wanted.epoch_metrics, wanted.more)


def test_restoring_nothing_changes_nothing(clock: SimpleNamespace):
    """As at the end of an epoch, whose metrics are not kept."""
    steps = Steps(3, clock, BOTH)
    steps.reporter.begin_epoch(1)
    steps.reporter.restore({})
    steps.take(3, labels=TWO_LABELS, logits=TWO_LOGITS)
    assert [event.metrics.examples for event in steps.intervals] == [3 * SIZE]


# --- steady state -----------------------------------------------------------------------------------------------------

WARM = hook_module._WARM_STEPS


def spend(clock: SimpleNamespace, status: RunStatus, steady: SteadyClock, steps: int, waited_s: float = 0.0) -> None:
    """Steps of 100 samples that each take 0.5 s, 0.75 s of CPU, and so much waiting."""
    for _ in range(steps):
        clock.wall += 0.5
        clock.cpu += 0.75
        if waited_s:
            status.observe("TrainerWait", waited_s)
        steady.after_step(100)


def test_the_first_steps_do_not_count(clock: SimpleNamespace):
    status = RunStatus()
    steady = SteadyClock(status)
    steady.resume()
    clock.wall += 60  # compiling
    spend(clock, status, steady, WARM, waited_s=0.4)
    clock.wall += 6  # the first step that counts takes longer than all others
    spend(clock, status, steady, 8, waited_s=0.1)
    steady.pause()
    assert steady.examples_per_s == pytest.approx(800 / (6 + 8 * 0.5))
    assert steady.cpu_s_per_million == pytest.approx(0.75 / 100 * 1e6)
    assert steady.trainer_wait_share == pytest.approx(8 * 0.1 / (6 + 8 * 0.5))


@pytest.mark.parametrize("steps", [0, 1, WARM - 1, WARM])
def test_a_run_too_short_has_no_steady_state(steps: int, clock: SimpleNamespace):
    status = RunStatus()
    steady = SteadyClock(status)
    steady.resume()
    spend(clock, status, steady, steps, waited_s=0.1)
    steady.pause()
    assert (steady.examples_per_s, steady.cpu_s_per_million, steady.trainer_wait_share) == (0.0, 0.0, 0.0)


def test_what_happens_in_a_pause_does_not_count(clock: SimpleNamespace):
    status = RunStatus()
    steady = SteadyClock(status)
    steady.resume()
    spend(clock, status, steady, WARM + 4, waited_s=0.25)
    steady.pause()
    clock.wall += 1_000
    clock.cpu += 1_000
    status.observe("TrainerWait", 1_000)
    steady.pause()  # twice is once
    steady.resume()
    spend(clock, status, steady, 4, waited_s=0.25)
    steady.pause()
    assert steady.examples_per_s == pytest.approx(200)
    assert steady.cpu_s_per_million == pytest.approx(7_500)
    assert steady.trainer_wait_share == pytest.approx(0.5)


def test_the_first_steps_may_spread_over_epochs(clock: SimpleNamespace):
    status = RunStatus()
    steady = SteadyClock(status)
    for _ in range(3):  # 8 steps an epoch: the 20th is in the third
        steady.resume()
        spend(clock, status, steady, 8)
        steady.pause()
        clock.wall += 1_000
    assert 2 * 8 < WARM < 3 * 8
    assert steady.examples_per_s == pytest.approx(200)
    assert steady.trainer_wait_share == 0.0, "no wait was ever observed"

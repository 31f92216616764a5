"""Log lines: what the users of this kind of trainer grep for, in the form they know."""

from __future__ import annotations

from collections.abc import Iterator

from flowps.status.event import Evaluated, Event, Finished, Interval, Metrics, Remark, Saved, Started, StatusReport
from flowps.status.figures import ShardFigures

_SHOWN_SHARDS = 8
_SHARD_STAGES = ("QueueWait", "Find", "Pool", "Reply", "PushSum", "PushStep")


def lines(event: Event) -> Iterator[str]:
    """The lines that say `event`; none for a progress update."""
    if isinstance(event, Started):
        yield (
            f"trainer: on {', '.join(event.devices)}, {event.in_flight} batches in flight, {event.feed_threads} feed thread(s); "
            f"hub: {event.hub_threads} threads, {event.tasks_in_flight} tasks in flight"
        )
    elif isinstance(event, Interval):
        yield from _interval(event)
    elif isinstance(event, Saved):
        yield (
            f"checkpoint {event.name} ({event.kind}): {event.rows:,} rows, {event.bytes / 1e6:,.1f} MB in {event.seconds:.2f} s; "
            f"training paused {event.pause_s:.3f} s"
        )
    elif isinstance(event, Remark):
        yield event.text
    elif isinstance(event, StatusReport):
        yield from _status(event)
    elif isinstance(event, Evaluated):
        on = "" if event.data == "test" else f" of data.{event.data}"
        best = "; the best so far" if event.is_best else ""
        yield f"evaluated {event.metrics.examples} examples{on} in {event.seconds:.1f} s: {quality(event.metrics)}{best}"
        for label, metrics in event.more.items():
            yield f"    label {label}: {quality(metrics)}"
    elif isinstance(event, Finished):
        yield (
            f"{'stopped' if event.stopped else 'trained'}: {event.examples} examples, {event.steps} steps, "
            f"{event.epochs} epoch(s) in {event.seconds:.1f} s"
            + (f" ({event.steady_examples_per_s:.1f} examples/sec in steady state)" if event.steady_examples_per_s else "")
        )


def quality(metrics: Metrics) -> str:
    """AUC, logloss and calibration in one line."""
    ratio = f"{metrics.prob_mean / metrics.real_mean:.3f}" if metrics.real_mean else "n/a"
    return (
        f"auc = {auc(metrics.auc)}, logloss = {metrics.logloss:.5f}, "
        f"calibration = {ratio} (mean prediction {metrics.prob_mean:.5f}, mean label {metrics.real_mean:.5f})"
    )


def auc(value: float | None) -> str:
    """An AUC as printed; it does not exist while only one class was seen."""
    return "n/a" if value is None else f"{value:.4f}"


def _interval(event: Interval) -> Iterator[str]:
    rates = f"({event.steps_per_s:.1f} it/sec; {event.examples_per_s:.1f} examples/sec)"
    for of_label, found in {"": event.metrics, **{f"{label}/": metrics for label, metrics in event.more.items()}}.items():
        for name, value in (
            ("auc", auc(found.auc)),
            ("xentropy_mean", f"{found.logloss:.4f}"),
            ("prob_mean", f"{found.prob_mean:.4f}"),
            ("real_mean", f"{found.real_mean:.4f}"),
        ):
            yield f"step {event.step}, {of_label}{name} = {value} {rates}"


def _status(event: StatusReport) -> Iterator[str]:
    for name, stage in sorted(event.stages.items()):
        yield (
            f"[RunStatus]: Ops{name} statistics => count: {stage.count}  P50: {stage.p50_us:.1f}  P95: {stage.p95_us:.1f}  "
            f"P99: {stage.p99_us:.1f}  Max: {stage.max_us:.1f}"
        )
    if event.counters:
        yield "[RunStatus]: counters => " + "  ".join(f"{name}: {value}" for name, value in sorted(event.counters.items()))
    if len(event.shards) <= _SHOWN_SHARDS:
        yield from (_shard(shard) for shard in event.shards)
    if event.verdict is not None and event.is_news:
        yield f"[RunStatus]: {event.verdict}"


def _shard(of: ShardFigures) -> str:
    """One line: how full it is, and how long each of its operations takes."""
    times = "  ".join(
        f"{name} P50: {of.stages[name].p50_us:.1f} P95: {of.stages[name].p95_us:.1f}" for name in _SHARD_STAGES if name in of.stages
    )
    hits = "" if of.hit_rate is None else f"  hits: {of.hit_rate:.1%}"
    return (
        f"[RunStatus]: Shard{of.shard} => rows: {of.rows}  index load: {of.index_load:.2f}{hits}  evicted: {of.evicted}  "
        f"in flight: {of.in_flight}  {times}"
    )

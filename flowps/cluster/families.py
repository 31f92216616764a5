"""The metric families that `prometheus` serves, and what of the figures goes into which: names, units, labels.

Reads figures and changes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from flowps.checkpoint.ledger import Ledger
from flowps.status.event import AtCut, Evaluated, Event, Finished, Interval, Metrics, Progress, from_wire
from flowps.status.figures import ShardFigures
from flowps.status.stage import Histogram

MOST_SLOTS = 200
"""Slots of a run that a process serves by name, the first that were busiest; all others are one, `OTHER`. Shards likewise."""
OTHER = "(other)"
LEDGER = "/ledger"  # the end of the topic of what a run begins with

BOUNDS_S = tuple(round(digit * 10.0**exponent, 6) for exponent in range(-5, 2) for digit in (1, 2, 5))  # 10 µs to 50 s
_BOUNDS_US = tuple(1e6 * bound for bound in BOUNDS_S)
_STALENESS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1024)
_CALL = re.compile(r"(Lookup|Push)Shard(\d+)")

COUNTERS = {
    "empty_reads": "Reads of the hub's stream that came back empty.",
    "feed_queue_empty": "Steps for which no feed was ready.",
    "hub_bytes": "Bytes of the batches that came from the hub.",
    "rpc_retries": "Lookups and pushes sent once more because a shard did not answer.",
    "steps_left_out_by_loss_scaling": "Steps of the dense weights left out because a gradient in float16 was not finite.",
}  # fmt: skip

F = TypeVar("F", CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily)


class Families:
    """Metric families by name, each made when it gets its first sample."""

    def __init__(self) -> None:
        self._found: dict[str, Metric] = {}

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._found.values())

    def counter(self, name: str, about: str, value: float, **labels: str) -> None:
        """Something that only grows; its name ends in _total on the page."""
        self._family(CounterMetricFamily, name, about, labels).add_metric([*labels.values()], value)

    def gauge(self, name: str, about: str, value: float, **labels: str) -> None:
        """Something as it is now."""
        self._family(GaugeMetricFamily, name, about, labels).add_metric([*labels.values()], value)

    def histogram(self, name: str, about: str, buckets: list[tuple[str, float]], total: float, **labels: str) -> None:
        """How many were at most so much, by bound, the last of which is +Inf; and their sum."""
        self._family(HistogramMetricFamily, name, about, labels).add_metric([*labels.values()], buckets, total)

    def _family(self, kind: type[F], name: str, about: str, labels: Mapping[str, str]) -> F:
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = kind(f"flowps_{name}", about, labels=list(labels))
        assert isinstance(found, kind), f"{name} has two types"
        return found


def add_stages(families: Families, run: str, role: str, stages: Mapping[str, Histogram]) -> None:
    others: dict[str, Histogram] = {}
    for name, times in stages.items():
        call = _CALL.fullmatch(name)
        if call is None:
            about = "Time of each pass through a stage of a role."
            families.histogram("stage_duration_seconds", about, *_buckets(times), run=run, role=role, stage=name)
        elif int(call[2]) < MOST_SLOTS:
            _add_calls(families, run, role, call[1], call[2], times)
        else:
            others.setdefault(call[1], Histogram()).merge(times)
    for name, times in others.items():
        _add_calls(families, run, role, name, OTHER, times)


def _add_calls(families: Families, run: str, role: str, call: str, shard: str, times: Histogram) -> None:
    about = "Time of a trainer's calls of a shard, the way there included."
    families.histogram("shard_call_duration_seconds", about, *_buckets(times), run=run, role=role, call=call, shard=shard)


def _buckets(times: Histogram) -> tuple[list[tuple[str, float]], float]:
    counts = zip(map(str, BOUNDS_S), times.up_to(_BOUNDS_US), strict=True)
    return [*counts, ("+Inf", times.count)], times.total_us / 1e6


def add_shard(families: Families, run: str, shard: str, of: ShardFigures, signs: Mapping[str, int]) -> None:
    gauges: list[tuple[str, str, float]] = [
        ("shard_rows", "Rows that a shard's tables hold.", of.rows),
        ("shard_capacity_rows", "Rows that they may hold.", of.capacity_rows),
        ("shard_memory_bytes", "Memory of the rows, their part of the index included.", of.bytes),
        ("shard_index_load_ratio", "Rows per entry of the index, of the fullest table.", of.index_load),
        ("shard_in_flight_batches", "Batches looked up and not pushed.", of.in_flight),
    ]
    counters = [
        ("shard_rows_inserted", "Rows created.", of.inserted),
        ("shard_rows_evicted", "Rows given up for room.", of.evicted),
        ("shard_rows_expired", "Rows begun anew because they were beyond their time to live.", of.expired),
        ("shard_signs_refused", "Sights of signs that were not admitted.", of.refused),
    ]
    for name, about, value in gauges:
        families.gauge(name, about, value, run=run, shard=shard)
    for name, about, value in counters:
        families.counter(name, about, value, run=run, shard=shard)
    for slot, count in signs.items():
        families.counter("shard_signs", "Signs looked up in training.", count, run=run, shard=shard, slot=_text(slot))
    staleness = sorted(of.staleness.items())
    below = [(str(float(bound)), float(sum(n for pushes, n in staleness if pushes <= bound))) for bound in _STALENESS]
    families.histogram(
        "shard_staleness_pushes", "Pushes of other batches between a batch's lookup and its own push.",
        [*below, ("+Inf", sum(n for _, n in staleness))], sum(pushes * n for pushes, n in staleness), run=run, shard=shard,
    )  # fmt: skip


def add_run(families: Families, run: str, events: Mapping[tuple[str, int], Any]) -> None:
    found: dict[tuple[str, int], Event] = {}
    for key, message in events.items():
        with suppress(msgspec.ValidationError):  # of another version of flowps
            if key[0] != LEDGER:
                found[key] = from_wire(message)
    progress, interval, ended = (found.get((kind, 0)) for kind in ("Progress", "Interval", "Finished"))
    cuts = [event for event in found.values() if isinstance(event, AtCut)]
    steps = [event.step for event in found.values() if isinstance(event, Progress | Interval | AtCut)]
    examples = [event.examples for event in found.values() if isinstance(event, Progress | AtCut)]
    if isinstance(ended, Finished):
        steps, examples = [*steps, ended.steps], [*examples, ended.examples]
    if steps:
        families.counter("steps", "Steps, since the first run that this one goes on from.", max(steps), run=run)
    if examples:
        families.counter("examples", "Examples trained, since the first run that this one goes on from.", max(examples), run=run)
    if isinstance(progress, Progress):
        families.gauge("examples_per_second", "Examples trained per second, just now.", progress.examples_per_s, run=run)
        families.gauge("epoch", "The epoch that is trained, from 1.", progress.epoch, run=run)
        families.gauge("loss", "Loss of the last step.", progress.loss, run=run)
        families.gauge("feed_queue_batches", "Batches looked up that wait for their step.", progress.queue_depth, run=run)
    if isinstance(interval, Interval):
        _add_quality(families, run, "interval", interval.metrics)
        _add_quality(families, run, "epoch", interval.epoch_metrics)
    evaluated = found.get(("Evaluated", 0))
    if isinstance(evaluated, Evaluated):
        _add_quality(families, run, "test", evaluated.metrics)
    with suppress(KeyError, msgspec.ValidationError):
        _add_ledger(families, run, msgspec.convert(events[LEDGER, 0], Ledger), cuts)


def _add_quality(families: Families, run: str, over: str, metrics: Metrics) -> None:
    """`over`: the steps since the last line of metrics, the epoch so far, or the test data."""
    figures = [
        ("auc", "Area under the ROC curve.", metrics.auc),
        ("logloss", "Mean cross entropy, in nats.", metrics.logloss),
        ("prediction_mean", "Mean of what was predicted.", metrics.prob_mean),
        ("label_mean", "Mean of the labels.", metrics.real_mean),
    ]
    for name, about, value in figures:
        if value is not None and not math.isnan(value):
            families.gauge(name, about, value, run=run, over=over)


def _add_ledger(families: Families, run: str, begun: Ledger, cuts: list[AtCut]) -> None:
    accounts = {
        "read": begun.read + sum(cut.read for cut in cuts),
        "trained": max((cut.examples for cut in cuts), default=begun.trained),
        "dropped": sum(begun.dropped.values()),
        "replayed": begun.replayed,
    }
    about = "The ledger at the last cut: read = trained + dropped + replayed."
    for account, count in accounts.items():
        families.gauge("ledger_examples", about, count, run=run, account=account)


def metric_name(counter: str) -> str:
    return re.sub(r"\W", "_", counter, flags=re.ASCII)


def _text(label: str) -> str:
    """As the page can show it, which is UTF-8."""
    return label.encode("utf-8", "backslashreplace").decode()

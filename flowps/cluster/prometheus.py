"""What Dask's `/metrics` pages say of runs, for Prometheus: run status as counters, gauges and histograms.

A process serves what it has: the stages and counters of its roles, and the figures of its shards. What is known of a run as a whole
(examples, loss, AUC, ledger) is served by the scheduler, through which all events of the trainers pass: a plugin keeps the last of
each kind. So nothing is pushed, the command is not needed, and nothing happens where something is observed: all is read when
somebody asks. A run's series end with it.

The pages are Dask's own: it serves prometheus_client's registry on the HTTP ports of scheduler and workers. Who asks learns from
the scheduler, at `TARGETS`, which pages there are.
"""

from __future__ import annotations

import json
import math
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import distributed
import msgspec
import prometheus_client
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.http.utils import RequestHandler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from flowps.checkpoint.ledger import Ledger
from flowps.cluster.offer import TRAINER_KEY
from flowps.cluster.role_status import statuses_here
from flowps.status.event import AtCut, Evaluated, Event, Finished, Interval, Metrics, Progress, from_wire
from flowps.status.figures import ShardFigures
from flowps.status.stage import Histogram
from flowps.version import __version__

MOST_SLOTS = 200
"""Slots of a run that a process serves by name, the first that were busiest; all others are one, `OTHER`. Shards likewise."""
OTHER = "(other)"
TARGETS = "/flowps/targets.json"
"""Where on the scheduler's port Prometheus finds (`http_sd_configs`) the pages of all processes: workers take any port."""

_WAIT_S = 0.2  # Dask's event loop answers, and must not stand still while a table grows
_RUN = "flowps-"  # how runs' names begin
_LEDGER = "/ledger"  # the end of the topic of what a run begins with
_KEPT = ("Progress", "Interval", "Evaluated", "AtCut", "Finished")

_BOUNDS_S = tuple(round(digit * 10.0**exponent, 6) for exponent in range(-5, 2) for digit in (1, 2, 5))  # 10 µs to 50 s
_BOUNDS_US = tuple(1e6 * bound for bound in _BOUNDS_S)
_STALENESS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1024)
_CALL = re.compile(r"(Lookup|Push)Shard(\d+)")

_COUNTERS = {
    "empty_reads": "Reads of the hub's stream that came back empty.",
    "feed_queue_empty": "Steps for which no feed was ready.",
    "hub_bytes": "Bytes of the batches that came from the hub.",
    "rpc_retries": "Lookups and pushes sent once more because a shard did not answer.",
    "steps_left_out_by_loss_scaling": "Steps of the dense weights left out because a gradient in float16 was not finite.",
}  # fmt: skip

F = TypeVar("F", CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily)


# --- what the roles do ----------------------------------------------------------------------------------------------------


def serve_here() -> None:
    """Have this process's page say what it knows of runs. Idempotent; any thread may call it."""
    with _here.lock:
        if not _here.is_served:
            prometheus_client.REGISTRY.register(_here)
            _here.is_served = True


def serve_shard(run_id: str, number: int, figures: Callable[[], ShardFigures]) -> None:
    """Have it say what a shard measures of itself, until `drop_shard`. `figures` is a method; its object is not kept alive."""
    _here.shards.add((run_id, number), figures)
    serve_here()


def drop_shard(run_id: str, number: int) -> None:
    """The shard is closed."""
    _here.shards.drop((run_id, number))


def tell_ledger(run_id: str, ledger: Ledger | None, log_event: Callable[[str, Any], None]) -> None:
    """Tell the scheduler what the run begins with; its ledger goes on from there. Called where trainer 0 is."""
    log_event(f"{run_id}{_LEDGER}", msgspec.to_builtins(msgspec.structs.replace(ledger or Ledger(), done=[])))


def serve_runs(client: distributed.Client, say: Callable[[str], None]) -> None:
    """Have the scheduler's page say what is known of runs as a whole; where it cannot, say so, and that is all."""

    def version() -> str:  # goes there whole: the scheduler's machine may have no flowps
        try:
            from flowps.version import __version__ as found
        except ImportError:
            return ""
        return found

    try:
        there = client.run_on_scheduler(version)
        if there == __version__:
            client.register_plugin(RunsPlugin())
            return
        why = f"its machine has {f'flowps {there}' if there else 'no flowps'}, this command has flowps {__version__}"
    except Exception as error:  # whatever it is, the run can do without
        why = f"{type(error).__name__}: {error}"
    say(
        f"metrics: the scheduler does not serve those of the whole run, examples, loss, AUC and ledger: {why}; those of shards and "
        "trainers are on their workers' pages"
    )


# --- what is served -------------------------------------------------------------------------------------------------------


class _Here(Collector):
    """Everything of this process. Any thread may collect it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_served = False
        self.shards = _Shards()
        self.plugins: set[RunsPlugin] = set()

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: series come and go with runs."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All there is now."""
        families, shards = _Families(), self.shards.read()
        for (run, role), status in statuses_here().items():
            if role.startswith("shard-") and not self.shards.has(run, role):
                continue  # its command was killed, and could not say that the run has ended
            _add_stages(families, run, role, status.histograms())
            counters = {**(dict.fromkeys(_COUNTERS, 0) if role.startswith("trainer-") else {}), **status.counters()}
            for name, value in counters.items():
                families.counter(_name(name), _COUNTERS.get(name, f"Counter {name} of run status."), value, run=run, role=role)
        for run, number, of, signs in shards:
            _add_shard(families, run, str(number), of, signs)
        for plugin in list(self.plugins):
            for run, events in plugin.runs().items():
                _add_run(families, run, events)
        yield from families


class _Families:
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


class _Shards:
    """The shards of this process, and what each has said of itself last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all that follows
        self._asked: dict[tuple[str, int], weakref.WeakMethod[Callable[[], ShardFigures]]] = {}
        self._said: dict[tuple[str, int], ShardFigures] = {}
        self._slots: dict[str, set[str]] = {}  # of each run those that are served by name
        self._asking: threading.Thread | None = None

    def add(self, key: tuple[str, int], figures: Callable[[], ShardFigures]) -> None:
        """A shard is there."""
        with self._lock:
            self._asked[key] = weakref.WeakMethod(figures)

    def drop(self, key: tuple[str, int]) -> None:
        """It has gone."""
        with self._lock:
            self._asked.pop(key, None)
            self._said.pop(key, None)
            if not any(run == key[0] for run, _ in self._asked):
                self._slots.pop(key[0], None)

    def has(self, run: str, role: str) -> bool:
        """Whether it is there; `role` as in role_status."""
        return (run, int(role.removeprefix("shard-"))) in self._asked

    def read(self) -> list[tuple[str, int, ShardFigures, dict[str, int]]]:
        """Run, number, figures of every shard, and signs by those slots that are served by name.

        A table that grows or is copied answers when that is done. Then the figures are those of the time before.
        """
        with self._lock:
            if not self._asked:
                return []
            if self._asking is None or not self._asking.is_alive():
                self._asking = threading.Thread(target=self._ask, name="flowps-metrics", daemon=True)
                self._asking.start()
            asking = self._asking
        asking.join(_WAIT_S)
        with self._lock:
            return [(*key, of, self._by_name(key[0], of.signs)) for key, of in self._said.items()]

    def _ask(self) -> None:
        with self._lock:
            asked = dict(self._asked)
        for key, reference in asked.items():
            figures, found = reference(), None
            with suppress(Exception):  # it is being closed
                found = figures() if figures is not None else None
            with self._lock:
                if found is not None and self._asked.get(key) is reference:
                    self._said[key] = found

    def _by_name(self, run: str, signs: Mapping[str, int]) -> dict[str, int]:
        """Once a slot has its name it keeps it, so that the sum of the others never falls."""
        named = self._slots.setdefault(run, set())
        for slot in sorted(signs, key=lambda slot: -signs[slot]):
            if len(named) >= MOST_SLOTS or not signs[slot]:
                break
            named.add(slot)
        found = {slot: count for slot, count in signs.items() if slot in named}
        rest = sum(signs.values()) - sum(found.values())
        return {**found, OTHER: rest} if rest else found


class RunsPlugin(SchedulerPlugin):
    """On the scheduler: keeps the last event of each kind of every run. Called by its event loop, but for `runs`."""

    name = "flowps-runs"
    idempotent = True  # of several commands the first one's serves all

    def __init__(self) -> None:
        self._scheduler: Any = None
        self._runs: dict[str, dict[tuple[str, int], Any]] = {}

    async def start(self, scheduler: Any) -> None:
        """See SchedulerPlugin."""
        self._scheduler = scheduler
        scheduler.http_application.add_handlers(".*", [(re.escape(TARGETS), _Targets, {"dask_server": scheduler})])
        _here.plugins.add(self)
        serve_here()

    async def close(self) -> None:
        """See SchedulerPlugin."""
        _here.plugins.discard(self)

    def log_event(self, topic: str, msg: Any) -> None:
        """See SchedulerPlugin. Keeps messages as they are; they are read when somebody asks."""
        if not topic.startswith(_RUN) or not isinstance(msg, dict):
            return
        run, kind = topic.removesuffix(_LEDGER), str(msg.get("type", ""))
        if run not in self._runs:
            self._runs = {**self._going(), run: {}}
        if topic.endswith(_LEDGER):
            self._runs[run][_LEDGER, 0] = msg
        elif kind in _KEPT:
            self._runs[run][kind, msg.get("trainer", 0)] = msg

    def runs(self) -> dict[str, dict[tuple[str, int], Any]]:
        """Of every run that goes on, by name: kind of event and trainer → the last. Any thread may call it."""
        return {run: dict(events) for run, events in self._going().items()}

    def _going(self) -> dict[str, dict[tuple[str, int], Any]]:
        """A run has ended when its command has given its trainers up, or has gone."""
        return {run: of for run, of in list(self._runs.items()) if f"{TRAINER_KEY}{run}-0" in self._scheduler.tasks}


class _Targets(RequestHandler):
    """The scheduler's page, as whoever asks has called it, and those of its workers. On its event loop."""

    def get(self) -> None:
        """See RequestHandler."""
        pages = {"scheduler": self.request.host}
        for worker in self.server.workers.values():
            if not worker.address.startswith("inproc://"):  # in the scheduler's own process, whose page has everything
                host = f"[{worker.host}]" if ":" in worker.host else worker.host
                pages[str(worker.name)] = f"{host}:{worker.services['dashboard']}"
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps([{"targets": [page], "labels": {"worker": name}} for name, page in pages.items()]))


_here = _Here()


# --- families -------------------------------------------------------------------------------------------------------------


def _add_stages(families: _Families, run: str, role: str, stages: Mapping[str, Histogram]) -> None:
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


def _add_calls(families: _Families, run: str, role: str, call: str, shard: str, times: Histogram) -> None:
    about = "Time of a trainer's calls of a shard, the way there included."
    families.histogram("shard_call_duration_seconds", about, *_buckets(times), run=run, role=role, call=call, shard=shard)


def _buckets(times: Histogram) -> tuple[list[tuple[str, float]], float]:
    counts = zip(map(str, _BOUNDS_S), times.up_to(_BOUNDS_US), strict=True)
    return [*counts, ("+Inf", times.count)], times.total_us / 1e6


def _add_shard(families: _Families, run: str, shard: str, of: ShardFigures, signs: Mapping[str, int]) -> None:
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


def _add_run(families: _Families, run: str, events: Mapping[tuple[str, int], Any]) -> None:
    found: dict[tuple[str, int], Event] = {}
    for key, message in events.items():
        with suppress(msgspec.ValidationError):  # of another version of flowps
            if key[0] != _LEDGER:
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
        _add_ledger(families, run, msgspec.convert(events[_LEDGER, 0], Ledger), cuts)


def _add_quality(families: _Families, run: str, over: str, metrics: Metrics) -> None:
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


def _add_ledger(families: _Families, run: str, begun: Ledger, cuts: list[AtCut]) -> None:
    accounts = {
        "read": begun.read + sum(cut.read for cut in cuts),
        "trained": max((cut.examples for cut in cuts), default=begun.trained),
        "dropped": sum(begun.dropped.values()),
        "replayed": begun.replayed,
    }
    about = "The ledger at the last cut: read = trained + dropped + replayed."
    for account, count in accounts.items():
        families.gauge("ledger_examples", about, count, run=run, account=account)


def _name(counter: str) -> str:
    return re.sub(r"\W", "_", counter, flags=re.ASCII)


def _text(label: str) -> str:
    """As the page can show it, which is UTF-8."""
    return label.encode("utf-8", "backslashreplace").decode()

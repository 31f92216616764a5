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
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import distributed
import msgspec
import prometheus_client
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.http.utils import RequestHandler
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from flowps.checkpoint.ledger import Ledger
from flowps.cluster.families import COUNTERS, LEDGER, MOST_SLOTS, OTHER, Families, add_run, add_shard, add_stages, metric_name
from flowps.cluster.offer import TRAINER_KEY, scheduler_lacks
from flowps.cluster.role_status import statuses_here
from flowps.status.figures import ShardFigures

TARGETS = "/flowps/targets.json"
"""Where on the scheduler's port Prometheus finds (`http_sd_configs`) the pages of all processes: workers take any port."""

_WAIT_S = 0.2  # Dask's event loop answers, and must not stand still while a table grows
_RUN = "flowps-"  # how runs' names begin
_KEPT = ("Progress", "Interval", "Evaluated", "AtCut", "Finished")

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
    log_event(f"{run_id}{LEDGER}", msgspec.to_builtins(msgspec.structs.replace(ledger or Ledger(), done=[])))


def serve_runs(client: distributed.Client, say: Callable[[str], None]) -> None:
    """Have the scheduler's page say what is known of runs as a whole; where it cannot, say so, and that is all."""

    try:
        why = scheduler_lacks(client)
        if not why:
            client.register_plugin(RunsPlugin())
            return
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
        families, shards = Families(), self.shards.read()
        for (run, role), status in statuses_here().items():
            if role.startswith("shard-") and not self.shards.has(run, role):
                continue  # its command was killed, and could not say that the run has ended
            add_stages(families, run, role, status.histograms())
            counters = {**(dict.fromkeys(COUNTERS, 0) if role.startswith("trainer-") else {}), **status.counters()}
            for name, value in counters.items():
                families.counter(metric_name(name), COUNTERS.get(name, f"Counter {name} of run status."), value, run=run, role=role)
        for run, number, of, signs in shards:
            add_shard(families, run, str(number), of, signs)
        for plugin in list(self.plugins):
            for run, events in plugin.runs().items():
                add_run(families, run, events)
        yield from families


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
        run, kind = topic.removesuffix(LEDGER), str(msg.get("type", ""))
        if run not in self._runs:
            self._runs = {**self._going(), run: {}}
        if topic.endswith(LEDGER):
            self._runs[run][LEDGER, 0] = msg
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

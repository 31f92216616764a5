"""The pages that Prometheus scrapes: right values, good names, bounded, gone with the run. The Grafana dashboard asks for them."""

from __future__ import annotations

import gc
import json
import math
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import msgspec
import numpy as np
import prometheus_client
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from flowps.checkpoint.ledger import Ledger
from flowps.cluster import families, prometheus, role_status
from flowps.cluster.families import MOST_SLOTS, OTHER
from flowps.cluster.launch import gather_workers, launch
from flowps.cluster.offer import TRAINER_KEY
from flowps.cluster.plan import plan
from flowps.cluster.prometheus import TARGETS, RunsPlugin, drop_shard, serve_runs, serve_shard, tell_ledger
from flowps.cluster.run import Result, run
from flowps.cluster.run_dir import RunDir
from flowps.config import Config
from flowps.status.event import AtCut, Evaluated, Event, Finished, Interval, Metrics, Progress, to_wire
from flowps.status.figures import ShardFigures
from flowps.trainer import hook
from flowps.version import __version__
from tests.cluster.conftest import PYTHON, ROWS, USERS, Command, config_of, write_data

DASHBOARD = Path(__file__).resolve().parents[2] / "examples" / "monitoring" / "flowps.json"
DEADLINE_S = 30.0
EPOCHS, BATCH = 3, 32

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
        return answer.read().decode()


@dataclass
class Page:
    """What a process says to who scrapes it."""

    families: dict[str, Metric]

    @staticmethod
    def of(text: str) -> Page:
        return Page({family.name: family for family in text_string_to_metric_families(text)})

    @staticmethod
    def here() -> Page:
        """Of this process, as Dask would make it."""
        return Page.of(prometheus_client.generate_latest().decode())

    @property
    def names(self) -> set[str]:
        """As queries say them."""
        return {sample.name for family in self.families.values() for sample in family.samples}

    def all(self, name: str, **labels: str) -> dict[frozenset[tuple[str, str]], float]:
        """The other labels of the samples of that name that have these → value."""
        wanted = set(labels.items())
        return {
            frozenset(set(sample.labels.items()) - wanted): sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and wanted <= set(sample.labels.items())
        }

    def one(self, name: str, **labels: str) -> float:
        """The one sample that has these labels, beside `run`."""
        (value,) = self.all(name, **labels).values()
        return value

    def ours(self) -> list[Metric]:
        return [family for name, family in self.families.items() if name.startswith("flowps_")]


@dataclass
class Scraped:
    """A run that has been scraped just before its end, and after it."""

    pages: dict[str, Page]
    after: Page
    events: list[Event]
    result: Result
    targets: list[dict[str, Any]]

    @property
    def page(self) -> Page:
        return self.pages["scheduler"]


def scrape_run(folder: Path, *knobs: tuple[str, object]) -> Scraped:
    """Train with two shards and an evaluation; scrape every page when the last event has come."""
    data = write_data(folder / "data.parquet")
    config = config_of(data, ("data.test", data), ("epochs", EPOCHS), ("ps.num_shards", 2), ("status.print_interval", 5), *knobs)
    events: list[Event] = []
    pages: dict[str, Page] = {}
    targets: list[dict[str, Any]] = []
    with launch(config) as (client, _), closing(RunDir(folder / "run")) as run_dir:
        said: list[str] = []
        serve_runs(client, said.append)
        assert not said
        made = plan(config, gather_workers(client, config, print, lambda: False))
        host = f"127.0.0.1:{client.cluster.scheduler.http_server.port}"

        def scrape(event: Event) -> None:
            events.append(event)
            if isinstance(event, Finished):
                targets.extend(json.loads(get(f"http://{host}{TARGETS}")))
                pages.update({of["labels"]["worker"]: Page.of(get(f"http://{of['targets'][0]}/metrics")) for of in targets})

        run_dir.prepare(made.config, made.schema)
        result = run(client, made, run_dir, [run_dir.record, scrape], lambda: False)
        deadline, after = time.monotonic() + DEADLINE_S, Page({})
        while (after := Page.of(get(f"http://{host}/metrics"))).ours():  # Dask hears a little later that nobody wants the trainers
            assert time.monotonic() < deadline, after.ours()
    assert not prometheus._here.plugins, "the scheduler has taken it along"
    return Scraped(pages, after, events, result, targets)


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hook, "_PROGRESS_S", 0.0)  # a run of a second
        yield scrape_run(tmp_path_factory.mktemp("embedded"))


# --- a real page ----------------------------------------------------------------------------------------------------------


class TestValues:
    def test_every_step_was_timed_once(self, scraped):
        steps = scraped.result.finished.steps
        assert steps == EPOCHS * -(-ROWS // BATCH)
        count = "flowps_stage_duration_seconds_count"
        assert scraped.page.one(count, role="trainer-0", stage="TrainStep") == steps
        for shard in ("shard-0", "shard-1"):
            assert scraped.page.one(count, role=shard, stage="Push") == steps
        assert scraped.page.one("flowps_steps_total") == steps
        for shard in "01":
            assert scraped.page.one("flowps_shard_call_duration_seconds_count", call="Push", shard=shard) == steps

    def test_a_histogram_has_the_sum_of_the_stage_and_buckets_that_add_up(self, scraped):
        labels = {"role": "trainer-0", "stage": "TrainStep"}
        buckets = scraped.page.all("flowps_stage_duration_seconds_bucket", **labels)
        bounds = sorted((float(dict(key)["le"]), value) for key, value in buckets.items())
        counts = [count for _, count in bounds]
        assert counts == sorted(counts)
        assert math.isinf(bounds[-1][0])
        assert counts[-1] == scraped.page.one("flowps_stage_duration_seconds_count", **labels)
        (report,) = [event for event in scraped.events if getattr(event, "phase", "") == "ended"]
        stage = report.stages["TrainStep"]
        assert scraped.page.one("flowps_stage_duration_seconds_sum", **labels) == pytest.approx(stage.total_us / 1e6)
        below = sum(1 for bound, count in bounds if count < 0.5 * stage.count)  # the bucket of the median
        assert (0, *(bound for bound, _ in bounds))[below] <= 1.01 * stage.p50_us / 1e6
        assert stage.p50_us / 1e6 <= 1.01 * bounds[below][0]

    def test_examples_and_ledger_are_the_runs(self, scraped):
        finished, ledger = scraped.result.finished, scraped.result.ledger
        assert scraped.page.one("flowps_examples_total") == finished.examples == EPOCHS * ROWS
        accounts = {account: scraped.page.one("flowps_ledger_examples", account=account)
                    for account in ("read", "trained", "dropped", "replayed")}  # fmt: skip
        assert accounts == {"read": ledger.read, "trained": ledger.trained, "dropped": 0, "replayed": ledger.replayed}
        assert accounts["read"] == accounts["trained"] + accounts["dropped"] + accounts["replayed"]

    def test_quality_is_that_of_the_last_interval_epoch_and_evaluation(self, scraped):
        interval = [event for event in scraped.events if isinstance(event, Interval)][-1]
        (evaluated,) = [event for event in scraped.events if isinstance(event, Evaluated)]
        for over, metrics in (("interval", interval.metrics), ("epoch", interval.epoch_metrics), ("test", evaluated.metrics)):
            assert scraped.page.one("flowps_auc", over=over) == metrics.auc
            assert scraped.page.one("flowps_logloss", over=over) == metrics.logloss
            assert scraped.page.one("flowps_prediction_mean", over=over) == metrics.prob_mean
            assert scraped.page.one("flowps_label_mean", over=over) == metrics.real_mean
        progress = [event for event in scraped.events if isinstance(event, Progress)][-1]
        assert scraped.page.one("flowps_loss") == progress.loss
        assert scraped.page.one("flowps_examples_per_second") == progress.examples_per_s
        assert scraped.page.one("flowps_feed_queue_batches") == progress.queue_depth
        assert scraped.page.one("flowps_epoch") == EPOCHS

    def test_shards_have_what_their_tables_have(self, scraped):
        page, tables = scraped.page, scraped.result.tables
        for name, figure in (("rows", "rows"), ("capacity_rows", "capacity_rows"), ("rows_inserted_total", "inserted"),
                             ("rows_evicted_total", "evicted"), ("signs_refused_total", "refused")):  # fmt: skip
            assert sum(page.all(f"flowps_shard_{name}").values()) == sum(getattr(table, figure) for table in tables), name
        assert sum(page.all("flowps_shard_rows").values()) == USERS
        assert sum(page.all("flowps_shard_signs_total", slot="user").values()) == EPOCHS * ROWS
        steps = scraped.result.finished.steps
        for shard in "01":
            assert page.one("flowps_shard_in_flight_batches", shard=shard) == 0
            assert page.one("flowps_shard_staleness_pushes_count", shard=shard) == steps
            assert page.one("flowps_shard_staleness_pushes_bucket", shard=shard, le="1.0") == steps, "two in flight, in order"
            assert page.one("flowps_shard_staleness_pushes_sum", shard=shard) <= steps
            assert 0 < page.one("flowps_shard_index_load_ratio", shard=shard) < 1
            assert page.one("flowps_shard_memory_bytes", shard=shard) > 0

    def test_counters_are_there_before_they_count(self, scraped):
        for name in ("empty_reads", "feed_queue_empty", "hub_bytes", "rpc_retries", "steps_left_out_by_loss_scaling"):
            assert scraped.page.one(f"flowps_{name}_total", role="trainer-0") >= 0
        assert scraped.page.one("flowps_hub_bytes_total", role="trainer-0") > 0

    def test_nothing_is_left_of_it(self, scraped):
        assert not scraped.after.ours()
        assert "dask_scheduler_workers" in scraped.after.families, "Dask's own stay"

    def test_one_process_has_one_page(self, scraped):
        assert [target["labels"] for target in scraped.targets] == [{"worker": "scheduler"}]


@pytest.mark.long
def test_every_process_serves_its_own(tmp_path):
    scraped = scrape_run(tmp_path, ("cluster.mode", "processes"))
    assert set(scraped.pages) == {"scheduler", "hub", "ps-0", "ps-1", "trainer-0"}
    assert scraped.page.one("flowps_examples_total") == EPOCHS * ROWS
    assert scraped.page.one("flowps_ledger_examples", account="trained") == EPOCHS * ROWS
    steps = scraped.result.finished.steps
    count = "flowps_stage_duration_seconds_count"
    assert scraped.pages["trainer-0"].one(count, stage="TrainStep") == steps
    for shard in "01":
        page = scraped.pages[f"ps-{shard}"]
        assert page.one(count, role=f"shard-{shard}", stage="Push") == steps
        assert set(page.all("flowps_shard_rows")) == {frozenset({("shard", shard), *_run(page)})}
    assert not scraped.pages["hub"].ours()
    for name in ("flowps_shard_rows", "flowps_examples_total", count):
        series = [(name, *sorted(key)) for page in scraped.pages.values() for key in page.all(name)]
        assert len(series) == len(set(series)), "nothing is counted twice"
    assert not scraped.after.ours()


def _run(page: Page) -> set[tuple[str, str]]:
    return {("run", dict(key)["run"]) for key in page.all("flowps_shard_rows")}


# --- names ----------------------------------------------------------------------------------------------------------------


def test_names_follow_the_conventions(scraped):
    """What `promtool check metrics` looks at (prometheus/client_golang, testutil/promlint)."""
    families = scraped.page.ours()
    assert len(families) > 25
    for family in families:
        words = family.name.split("_")
        assert re.fullmatch(r"[a-z_]+", family.name), family.name
        assert family.documentation.endswith("."), family.name
        assert all((sample.name == f"{family.name}_total") for sample in family.samples) == (family.type == "counter"), family.name
        assert words[-1] not in ("total", "count", "sum", "bucket"), family.name
        assert not {"gauge", "counter", "histogram", "summary"} & set(words), family.name
        assert not {"ms", "us", "milliseconds", "microseconds", "minutes", "hours", "kb", "mb", "gb", "percent"} & set(words)
        for sample in family.samples:
            labels = set(sample.labels) - {"le"}
            assert labels <= {"run", "role", "stage", "shard", "slot", "call", "over", "account"}
            assert "run" in labels
            assert ("le" in sample.labels) == sample.name.endswith("_bucket")


def queries() -> list[str]:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_asks_for_what_there_is(scraped):
    asked = {name for query in queries() for name in re.findall(r"\b(?:flowps|process)_[a-z_]+", query)}
    assert len(asked) > 20
    assert asked <= scraped.page.names
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    (run_variable,) = [variable for variable in board["templating"]["list"] if variable["name"] == "run"]
    assert re.fullmatch(r"label_values\((\w+), run\)", run_variable["definition"])[1] in scraped.page.names


def test_the_dashboard_asks_for_labels_that_there_are(scraped):
    """Each label of a selector or legend is one of that metric; values by which it selects are those of a run."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            for name, selector in re.findall(r"\b(flowps_[a-z_]+)\{([^}]*)\}", target["expr"]):
                there = [dict(key) for key in scraped.page.all(name)]
                for label, operator, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', selector):
                    value = ".*" if value == "$run" else value if operator == "=~" else re.escape(value)
                    assert any(re.fullmatch(value, labels.get(label, "")) for labels in there), (name, label, value)
            by = re.search(r"by \(([^)]*)\)", target["expr"])
            if by is not None:
                kept = {*by[1].split(", "), "worker", "instance"}
                assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, target["expr"]


def test_the_dashboards_panels_do_not_overlap():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


# --- shards ---------------------------------------------------------------------------------------------------------------


class FakeShard:
    """A shard that says what it is told to."""

    def __init__(self, signs: dict[str, int] | None = None, rows: int = 7) -> None:
        self.signs, self.rows = signs or {}, rows
        self.may_answer = threading.Event()
        self.may_answer.set()

    def figures(self) -> ShardFigures:
        assert self.may_answer.wait(DEADLINE_S)
        if self.rows < 0:
            raise AttributeError("closed")
        return ShardFigures(0, "", "", {}, self.rows, 10, 100, 0.5, 7, 1, 2, 3, 1, {0: 5, 3: 1, 2000: 1}, self.signs, [])


RUN = "flowps-0123456789ab"


@pytest.fixture
def serve() -> Iterator[Any]:
    """Serve a shard, for the time of a test."""
    served: list[int] = []

    def serve(shard: FakeShard) -> FakeShard:
        served.append(len(served))
        serve_shard(RUN, served[-1], shard.figures)
        return shard

    yield serve
    for number in served:
        drop_shard(RUN, number)
    assert not Page.here().all("flowps_shard_rows", run=RUN)


def test_at_most_so_many_slots_have_names_and_the_others_never_fall(serve):
    shard = serve(FakeShard({f"slot{k}": k for k in range(MOST_SLOTS + 50)}))
    signs = Page.here().all("flowps_shard_signs_total", run=RUN)
    assert len(signs) == MOST_SLOTS + 1
    assert sum(signs.values()) == sum(shard.signs.values())
    key = frozenset({("shard", "0"), ("slot", OTHER)})
    assert signs[key] == sum(range(50)), "the heaviest have names"
    shard.signs = {name: count + 10_000 * name.endswith("7") for name, count in shard.signs.items()}
    again = Page.here().all("flowps_shard_signs_total", run=RUN)
    assert again.keys() == signs.keys(), "once it has its name it keeps it"
    assert all(again[of] >= signs[of] for of in signs)
    other = serve(FakeShard({f"another{k}": 1 for k in range(5)}))
    assert Page.here().one("flowps_shard_signs_total", run=RUN, shard="1") == sum(other.signs.values()), "one bound for the run"


def test_slots_come_when_they_are_looked_up(serve):
    shard = serve(FakeShard({"user": 0, "item": 3}))
    assert Page.here().all("flowps_shard_signs_total", run=RUN) == {frozenset({("shard", "0"), ("slot", "item")}): 3}
    shard.signs = {"user": 2, "item": 3}
    assert len(Page.here().all("flowps_shard_signs_total", run=RUN)) == 2


def test_staleness_beyond_the_last_bound_is_counted(serve):
    kept = serve(FakeShard())
    buckets = Page.here().all("flowps_shard_staleness_pushes_bucket", run=RUN, shard="0")
    found = {dict(key)["le"]: count for key, count in buckets.items()}
    assert (found["0.0"], found["2.0"], found["3.0"], found["1024.0"], found["+Inf"]) == (5, 5, 6, 6, 7)
    assert Page.here().one("flowps_shard_staleness_pushes_sum", run=RUN) == 2003
    del kept


def test_a_shard_that_takes_its_time_is_not_waited_for(serve):
    """A table that grows holds its lock for seconds; the page is made by Dask's event loop."""
    shard, quick = serve(FakeShard()), serve(FakeShard(rows=70))
    assert Page.here().one("flowps_shard_rows", run=RUN, shard="0") == 7
    shard.may_answer.clear()
    shard.rows = 8
    for _ in range(3):
        began = time.monotonic()
        page = Page.here()
        assert time.monotonic() - began < 5
        assert page.one("flowps_shard_rows", run=RUN, shard="0") == 7, "as it was"
        assert page.one("flowps_shard_rows", run=RUN, shard="1") == quick.rows
    assert sum(thread.name == "flowps-metrics" for thread in threading.enumerate()) == 1, "it is asked once"
    shard.may_answer.set()
    deadline = time.monotonic() + DEADLINE_S
    while Page.here().one("flowps_shard_rows", run=RUN, shard="0") != 8:
        assert time.monotonic() < deadline
    assert not [thread for thread in threading.enumerate() if thread.name == "flowps-metrics" and thread.is_alive()]


def test_a_shard_that_fails_to_answer_takes_nobody_with_it(serve):
    shard, other = serve(FakeShard()), serve(FakeShard(rows=70))
    shard.rows = -1
    page = Page.here()
    assert page.one("flowps_shard_rows", run=RUN, shard="1") == other.rows
    assert not page.all("flowps_shard_rows", run=RUN, shard="0")


def test_a_shard_is_not_kept_alive(serve):
    """Dask drops the actor when its command has gone; only then is it closed."""
    shard = serve(FakeShard())
    Page.here()
    gone = threading.Event()
    shard.__class__ = type("Mortal", (FakeShard,), {"__del__": lambda self: gone.set()})
    del shard
    gc.collect()
    assert gone.is_set()


# --- roles ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def status() -> Iterator[Any]:
    """A trainer of a run here."""
    prometheus.serve_here()
    yield role_status.status_of(Config(), RUN, "trainer-0")
    role_status.forget(RUN)
    assert not Page.here().all("flowps_stage_duration_seconds_count", run=RUN)


def test_calls_of_very_many_shards_are_put_together(status):
    for shard in range(2 * MOST_SLOTS):
        status.observe(f"LookupShard{shard}", 0.001)
    calls = Page.here().all("flowps_shard_call_duration_seconds_count", run=RUN, call="Lookup")
    assert len(calls) == MOST_SLOTS + 1
    assert Page.here().one("flowps_shard_call_duration_seconds_count", run=RUN, shard=OTHER) == MOST_SLOTS
    assert not Page.here().all("flowps_stage_duration_seconds_count", run=RUN)


def test_times_are_in_seconds_and_in_the_bucket_of_their_length(status):
    for seconds in (1e-6, 0.0015, 0.0015, 3.0, 1e4):
        status.observe("Some", seconds)
    page = Page.here()
    buckets = page.all("flowps_stage_duration_seconds_bucket", run=RUN, stage="Some")
    found = {float(dict(key)["le"]): count for key, count in buckets.items()}
    assert (found[1e-5], found[0.001], found[0.002], found[2.0], found[5.0], found[50.0], found[math.inf]) == (1, 1, 3, 3, 4, 4, 5)
    assert page.one("flowps_stage_duration_seconds_sum", run=RUN, stage="Some") == pytest.approx(10_003.003001)


def test_a_counter_that_nobody_knows_is_served_too(status):
    status.count("some.odd-name", 3)
    assert Page.here().one("flowps_some_odd_name_total", run=RUN) == 3


def test_a_shard_whose_command_was_killed_is_not_served(status):
    """It could not say that the run has ended; the shard itself was closed by Dask."""
    role_status.status_of(Config(), RUN, "shard-5").observe("Push", 1.0)
    assert not Page.here().all("flowps_stage_duration_seconds_count", run=RUN, role="shard-5")
    shard = FakeShard()
    serve_shard(RUN, 5, shard.figures)
    assert Page.here().one("flowps_stage_duration_seconds_count", run=RUN, role="shard-5") == 1
    drop_shard(RUN, 5)


@pytest.mark.usefixtures("hurried_switching")
def test_it_may_be_scraped_while_everybody_observes(status, serve):
    shards, stop = [serve(FakeShard({"a": 1})) for _ in range(3)], threading.Event()
    errors: list[BaseException] = []

    def observe(number: int) -> None:
        k = 0
        while not stop.is_set():
            status.observe(f"Stage{k % 50}", 0.001)
            status.count(f"counter{number}_{k % 20}")
            shards[number].signs = {f"slot{k % 300}": k, "a": k}
            k += 1

    def scrape() -> None:
        try:
            for _ in range(5):
                for family in Page.here().ours():
                    for sample in family.samples:
                        assert math.isfinite(sample.value)
        except BaseException as error:
            errors.append(error)

    observers = [threading.Thread(target=observe, args=(number,)) for number in range(3)]
    scrapers = [threading.Thread(target=scrape) for _ in range(2)]
    for thread in (*observers, *scrapers):
        thread.start()
    for thread in scrapers:
        thread.join()
    stop.set()
    for thread in observers:
        thread.join()
    assert not errors


# --- whole runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def scheduler() -> Iterator[SimpleNamespace]:
    """A plugin, as on a scheduler with a task of the run."""
    plugin = RunsPlugin()
    plugin._scheduler = SimpleNamespace(tasks={f"{TRAINER_KEY}{RUN}-0": None})
    prometheus._here.plugins.add(plugin)
    prometheus.serve_here()
    yield SimpleNamespace(plugin=plugin, log=plugin.log_event, tasks=plugin._scheduler.tasks)
    prometheus._here.plugins.discard(plugin)


METRICS = Metrics(100, 0.75, 0.5, 0.25, 0.2)


def test_the_last_event_of_each_kind_counts(scheduler):
    for step in (10, 20):
        scheduler.log(RUN, to_wire(Progress(1, step, 32 * step, 1000.0, 0.5 / step, None, 3)))
        scheduler.log(RUN, to_wire(Interval(1, step, 1.0, 32.0, METRICS, METRICS)))
    scheduler.log("another topic", to_wire(Progress(1, 99, 99, 1.0, 1.0, None, 3)))
    scheduler.log(RUN, {"type": "Progress of another version"})
    scheduler.log(RUN, "no event")
    page = Page.here()
    assert page.one("flowps_steps_total", run=RUN) == 20
    assert page.one("flowps_examples_total", run=RUN) == 640
    assert page.one("flowps_loss", run=RUN) == 0.025
    assert page.one("flowps_auc", run=RUN, over="epoch") == 0.75
    assert {dict(key).get("run", RUN) for key in page.all("flowps_steps_total")} == {RUN}


def test_an_auc_that_does_not_exist_is_not_served(scheduler):
    none = Metrics(0, None, math.nan, math.nan, math.nan)
    scheduler.log(RUN, to_wire(Interval(1, 10, 1.0, 32.0, none, METRICS)))
    page = Page.here()
    for name in ("auc", "logloss", "prediction_mean", "label_mean"):
        assert not page.all(f"flowps_{name}", run=RUN, over="interval")
        assert page.all(f"flowps_{name}", run=RUN, over="epoch")


def test_events_of_another_version_are_passed_over(scheduler):
    scheduler.log(RUN, {"type": "Progress", "step": "ten"})
    scheduler.log(RUN, to_wire(Interval(1, 10, 1.0, 32.0, METRICS, METRICS)))
    page = Page.here()
    assert page.one("flowps_steps_total", run=RUN) == 10
    assert not page.all("flowps_loss", run=RUN)


def test_the_ledger_goes_on_from_the_one_that_the_run_began_with(scheduler):
    begun = Ledger(epoch=1, read=1000, trained=700, dropped={"bad": 100}, replayed=200)
    tell_ledger(RUN, begun, scheduler.log)
    ledger = lambda: {dict(key)["account"]: value for key, value in Page.here().all("flowps_ledger_examples", run=RUN).items()}  # noqa: E731
    assert ledger() == {"read": 1000, "trained": 700, "dropped": 100, "replayed": 200}
    for trainer, read in ((0, 60), (1, 40)):
        scheduler.log(RUN, to_wire(AtCut(trainer, 10, 1, 800, read, [], False)))
    found = ledger()
    assert found == {"read": 1100, "trained": 800, "dropped": 100, "replayed": 200}
    assert found["read"] == found["trained"] + found["dropped"] + found["replayed"]


def test_a_run_without_a_checkpoint_begins_with_nothing(scheduler):
    tell_ledger(RUN, None, scheduler.log)
    assert set(Page.here().all("flowps_ledger_examples", run=RUN).values()) == {0}


def test_a_run_ends_when_nobody_wants_its_trainers(scheduler):
    """Also when its command was killed: the scheduler drops the tasks of a client that has gone."""
    scheduler.log(RUN, to_wire(Interval(1, 10, 1.0, 32.0, METRICS, METRICS)))
    assert Page.here().all("flowps_steps_total", run=RUN)
    scheduler.tasks.clear()
    assert not Page.here().all("flowps_steps_total", run=RUN)
    another = f"{RUN[:-1]}c"
    scheduler.tasks[f"{TRAINER_KEY}{another}-0"] = None
    scheduler.log(another, to_wire(Interval(1, 20, 1.0, 32.0, METRICS, METRICS)))
    assert list(scheduler.plugin._runs) == [another], "it is forgotten"


def test_a_scheduler_without_flowps_is_gone_on_without(tmp_path):
    said: list[str] = []
    preload = tmp_path / "without.py"
    preload.write_text("import sys\nsys.modules['flowps'] = None\n")
    options = ("--host", "127.0.0.1", "--port", 0, "--dashboard-address", "127.0.0.1:0", "--preload", preload)
    with closing(Command(*PYTHON, "dask", "scheduler", *options, cwd=tmp_path)) as scheduler:
        address = scheduler.wait_for(r"Scheduler at:\s+(\S+)")[1]
        page = scheduler.wait_for(r"dashboard at:\s+(http://\S+)/status")[1]
        with distributed.Client(address) as client:
            serve_runs(client, said.append)
        assert "dask_scheduler_workers" in get(f"{page}/metrics"), "it goes on too"
    (line,) = said
    assert line == (
        "metrics: the scheduler does not serve those of the whole run, examples, loss, AUC and ledger: its machine has no flowps, "
        f"this command has flowps {__version__}; those of shards and trainers are on their workers' pages"
    )
    assert "Traceback" not in scheduler.said


def test_a_scheduler_that_fails_is_gone_on_without():
    said: list[str] = []
    serve_runs(SimpleNamespace(run_on_scheduler=lambda function: 1 / 0), said.append)
    assert "AUC and ledger: ZeroDivisionError: division by zero; those of" in said[0]


def test_the_pages_of_workers_are_named_with_their_hosts():
    """IPv6 in brackets, and no page of a worker that shares the scheduler's."""
    handler = prometheus._Targets.__new__(prometheus._Targets)
    worker = lambda name, address, host, port: SimpleNamespace(name=name, address=address, host=host, services={"dashboard": port})  # noqa: E731
    workers = [worker("a", "tcp://[fe80::1]:1", "fe80::1", 81), worker(7, "tcp://10.0.0.1:1", "10.0.0.1", 82),
               worker("in", "inproc://10.0.0.1/1", "10.0.0.1", 83)]  # fmt: skip
    handler.server = SimpleNamespace(workers={of.address: of for of in workers})
    written: list[str] = []
    handler.request = SimpleNamespace(host="here:8787")
    handler.set_header, handler.write = lambda *header: None, written.append  # type: ignore[method-assign]
    handler.get()
    assert {of["labels"]["worker"]: of["targets"] for of in msgspec.json.decode(written[0])} == {
        "scheduler": ["here:8787"], "a": ["[fe80::1]:81"], "7": ["10.0.0.1:82"]
    }  # fmt: skip


def test_bounds_are_round_and_ascend():
    assert np.all(np.diff(families.BOUNDS_S) > 0)
    assert families.BOUNDS_S[0] == 1e-5
    assert families.BOUNDS_S[-1] == 50

"""The page `/flowps`: what it shows of a run, how that comes to the scheduler, and the page of a training in a real browser."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import distributed
import msgspec
import pytest
from bokeh.document import Document
from bokeh.models.widgets.markups import Div
from tornado.websocket import WebSocketClientConnection, websocket_connect

from flowps.checkpoint.ledger import Ledger
from flowps.cluster import offer
from flowps.cluster.dashboard import board as boards
from flowps.cluster.dashboard import courier as couriers
from flowps.cluster.dashboard import html, show
from flowps.cluster.dashboard.board import Board, Series
from flowps.cluster.dashboard.courier import OPERATION, Courier
from flowps.cluster.dashboard.follower import Follower
from flowps.cluster.dashboard.glance import Glance, Point
from flowps.cluster.dashboard.page import _Page
from flowps.cluster.dashboard.show import Shown, refusal, show_run
from flowps.cluster.launch import launch
from flowps.cluster.plan import Plan
from flowps.config import Config
from flowps.errors import FlowpsError, StoppedError
from flowps.status.event import AtCut, Event, Progress, StatusReport, TrainerStatus
from flowps.status.stage import StageSummary
from flowps.version import __version__
from tests.cluster.conftest import Command, DaskCluster, joined, train_command
from tests.status import samples as events

GLANCE = Glance("quick & <run>", "/runs/quick & <run>", 1.7e9, 2, 5_324_800, 2, 30.0)
DEADLINE_S = 60.0


# --- what there is to see ---------------------------------------------------------------------------------------------


def follow(*seen: Event, trainers: int = 1, ledger: Ledger | None = None) -> Glance:
    """The glance after these events, a second apart."""
    follower = Follower(GLANCE, trainers, ledger or Ledger())
    for second, event in enumerate(seen, 1):
        follower.see(event, float(second))
    return follower.glance


def test_a_glance_has_where_the_run_is() -> None:
    glance = follow(events.STARTED, events.PROGRESS, events.INTERVAL)
    assert (glance.phase, glance.epoch, glance.step, glance.examples, glance.queue_depth) == ("training", 1, 1300, 1_331_200, 3)
    assert (glance.examples_per_s, glance.rate_of, glance.loss, glance.auc, glance.auc_of) == (
        38_399.8, "now", 0.45123, 0.67149, "last interval",
    )  # fmt: skip
    assert glance.setup == "on GPU:0, GPU:1 · 1 feed thread · 4 hub threads, 5 tasks in flight"
    assert glance.seconds == 3.0


def test_steps_and_intervals_are_points() -> None:
    follower = Follower(GLANCE, 1, Ledger())
    assert follower.see(events.PROGRESS, 1.5) == Point(1.5, examples_per_s=38_399.8, loss=0.45123)
    assert follower.see(events.INTERVAL, 2.0) == Point(2.0, logloss=0.40321, auc=0.67149)
    assert follower.see(events.REPORT, 2.0) is None


def test_a_loss_that_is_no_number_is_none() -> None:
    glance = follow(msgspec.structs.replace(events.PROGRESS, loss=float("nan")))
    assert glance.loss is None
    json.dumps(msgspec.to_builtins(glance), allow_nan=False)


def stage(count: int, total_us: float) -> StageSummary:
    return StageSummary(count, total_us, 1.0, 2.0, 3.0, 4.0)


def report(seconds: float, step_s: float, wait_s: float, busy_s: float, process: str = "host:17") -> StatusReport:
    """After so many seconds of which so many went to steps, to waiting for lookups, and to the work of the one shard."""
    shard = msgspec.structs.replace(
        events.SHARD,
        process=process,
        stages={"Lookup": stage(1, busy_s * 5e5), "Push": stage(1, busy_s * 5e5), "Find": stage(1, 9e9)},
    )
    stages = {"TrainStep": stage(5, step_s * 1e6), "TrainerWaitForLookup": stage(5, wait_s * 1e6)}
    usage = [msgspec.structs.replace(events.REPORT.usage[0], cpu_s=2 * busy_s)]
    return StatusReport(seconds, 10, stages, {}, [shard], usage, [], events.VERDICT)


def test_shares_are_of_the_time_between_two_reports() -> None:
    glance = follow(events.STARTED, report(10.0, 5.0, 5.0, 5.0), report(20.0, 13.0, 6.0, 9.0))
    assert (glance.window_s, glance.reported_s, glance.is_whole) == (10.0, 3.0, False)
    assert glance.budget == [("steps", pytest.approx(0.8)), ("waits for lookups", pytest.approx(0.1))]
    (shard,) = glance.shards
    assert shard.busy == pytest.approx(0.4)
    assert (shard.rows, shard.capacity_rows, shard.bytes, shard.in_flight) == (1_234_567, 2_000_000, 187_654_321, 2)
    assert (glance.cores_busy, glance.cores, glance.rss_bytes, glance.processes) == (pytest.approx(0.8), 2, 2 << 30, 1)
    assert (glance.in_flight, glance.verdict) == (2, events.VERDICT)


def test_the_last_report_is_of_the_whole_run() -> None:
    ended = TrainerStatus(0, 20.0, 10, "ended", {}, {})
    glance = follow(events.STARTED, report(10.0, 5.0, 5.0, 5.0), ended, report(20.0, 13.0, 6.0, 9.0))
    assert (glance.window_s, glance.is_whole) == (20.0, True)
    assert glance.budget[0] == ("steps", pytest.approx(0.65))


def test_a_shard_that_came_back_has_worked_in_this_window_alone() -> None:
    glance = follow(events.STARTED, report(10.0, 5.0, 5.0, 9.0), report(20.0, 5.0, 5.0, 4.0, process="host:18"))
    assert glance.shards[0].busy == pytest.approx(0.4)


def test_after_a_loss_reports_begin_anew() -> None:
    glance = follow(events.STARTED, report(100.0, 90.0, 5.0, 50.0), events.STARTED, report(10.0, 9.0, 1.0, 5.0))
    assert (glance.window_s, glance.shards[0].busy) == (10.0, pytest.approx(0.5))


def test_the_account_is_made_up_when_all_trainers_are_at_a_cut() -> None:
    first, second = (AtCut(k, 100, 0, 6400, 3200, [], False) for k in range(2))
    ledger = Ledger(read=600, trained=0, dropped={"bad": 100}, replayed=500)
    assert follow(events.STARTED, first, trainers=2, ledger=ledger).account == ""
    glance = follow(events.STARTED, first, second, trainers=2, ledger=ledger)
    assert glance.account == "7,000 read = 6,400 trained + 100 dropped + 500 replayed, at step 100"


def test_after_a_loss_the_account_claims_no_more_than_is_known() -> None:
    cut = AtCut(0, 100, 0, 6400, 6400, [], False)
    assert follow(events.STARTED, cut, events.STARTED, cut).account == (
        "6,400 trained at step 100; what was replayed is counted at the end"
    )


def test_what_has_happened_is_told_and_bounded() -> None:
    glance = follow(*[events.REMARK] * 100, events.SAVED, events.EVALUATED)
    assert len(glance.notes) == 40
    assert [text.split(":")[0].split(" in ")[0] for _, text in glance.notes[-3:]] == [
        "worker ps-1 was lost", "checkpoint step-000000100-3fa9c2 (full)", "evaluated 102400 examples",
    ]  # fmt: skip


def test_in_the_end_there_are_the_test_metrics_and_the_steady_rate() -> None:
    glance = follow(events.PROGRESS, events.EVALUATED, events.FINISHED)
    assert (glance.auc, glance.auc_of, glance.loss_of) == (0.67149, "test", "test")
    assert (glance.examples_per_s, glance.rate_of, glance.phase) == (38_399.84, "in steady state", "saving")
    short = msgspec.structs.replace(events.FINISHED, steady_examples_per_s=0.0)
    assert follow(short).examples_per_s == pytest.approx(2_662_400 / 71.04)


@pytest.mark.parametrize(
    ("us", "words"),
    [(0.001, "0.0 µs"), (7.3, "7.3 µs"), (12.4, "12 µs"), (999.4, "1.00 ms"), (27_181.0, "27.2 ms"), (1.34e6, "1.34 s")],
)
def test_times_have_a_unit(us: float, words: str) -> None:
    assert html.time(us) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (99_999, "99,999"), (123_456, "123 k"), (2_662_400, "2.66 M"), (72_754_838, "72.8 M"), (3e9, "3.00 G")],
)
def test_counts_are_short(number: float, words: str) -> None:
    assert html.count(number) == words


def test_sizes_and_durations() -> None:
    assert [html.size(of) for of in (17, 52_782_008, 1.36e9, 4e13)] == ["17 B", "52.8 MB", "1.36 GB", "40.0 TB"]
    assert [html.duration(of) for of in (4.9, 65, 7200)] == ["0:04", "1:05", "2:00:00"]


def test_names_cannot_break_the_page() -> None:
    verdict = msgspec.structs.replace(events.VERDICT, evidence="<script>1</script>")
    glance = msgspec.structs.replace(
        follow(events.STARTED, events.PROGRESS, events.REPORT), verdict=verdict, notes=[(1.0, "<b>")], error="<i>", account="<u>"
    )
    whole = "".join(piece(glance) for piece in (html.verdict, html.tiles, html.stages, html.shards, html.notes))
    whole += html.header(glance, 0.0)
    assert "quick &amp; &lt;run&gt;" in whole
    for tag in ("<run>", "<script>", "<b>1", "<i>", "<u>"):
        assert tag not in whole


def test_a_run_that_stands_still_or_says_nothing_is_seen() -> None:
    glance = follow(events.STARTED, events.PROGRESS)
    assert "training" in html.header(glance, 0.0)
    assert "no step for 0:58" in html.header(msgspec.structs.replace(glance, seconds=60.0), 0.0)
    assert "no word of the run for 1:05" in html.header(glance, 65.0)


def test_stages_go_in_the_order_of_the_travel_and_unknown_ones_are_shown_too() -> None:
    names = ("PushGrad", "NewStage", "LookupShard1", "TrainStep", "LookupShard0", "EmbeddingLookup", "ReadSample", "FirstFeedWait")
    glance = follow(StatusReport(1.0, 1, {name: stage(1, 1.0) for name in names}, {}))
    text = html.stages(glance)
    shown = ["ReadSample", "EmbeddingLookup", "LookupShard0", "LookupShard1", "TrainStep", "PushGrad", "NewStage"]
    places = [text.index(name) for name in shown]
    assert places == sorted(places)
    assert "FirstFeedWait" not in text


# --- what the scheduler keeps -----------------------------------------------------------------------------------------


def test_a_series_is_bounded_and_covers_the_whole_time() -> None:
    series = Series(limit=64)
    for second in range(10_000):
        series.append((float(second), 2.0, None))
    assert 32 <= len(series.rows) <= 65
    assert series.rows[0][0] < 300
    assert series.rows[-1][0] > 9_700
    assert {row[1:] for row in series.rows} == {(2.0, None)}
    assert series.generation > 0


def tell(board: Board, run: str, glance: Glance = GLANCE, *points: Point) -> None:
    """As a courier does."""
    board.receive(run, msgspec.to_builtins(glance), msgspec.to_builtins(list(points)))


ENDED = msgspec.structs.replace(GLANCE, phase="trained")


def test_the_board_has_the_newest_run_and_those_that_live() -> None:
    board = Board()
    assert board.newest() is None
    tell(board, "a")
    tell(board, "b", ENDED)
    tell(board, "c", ENDED)
    assert board.newest() is board.find("c")
    assert [run.name for run in board.choices()] == ["c", "a"]


def test_a_run_that_says_nothing_for_long_does_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    tell(board, "a")
    tell(board, "b")
    monkeypatch.setattr(boards, "SILENT_S", 0.0)
    assert [run.name for run in board.choices()] == ["b"]


def test_the_board_forgets_the_oldest_that_has_ended() -> None:
    board = Board()
    tell(board, "lives")
    for k in range(20):
        tell(board, f"ended-{k}", ENDED)
    assert board.find("lives") is not None
    assert board.find("ended-19") is not None
    assert sum(board.find(f"ended-{k}") is not None for k in range(20)) == 7


# --- the page, without a browser --------------------------------------------------------------------------------------


def words(page: _Page) -> str:
    """All that its document has in words."""
    return " ".join(model.text for model in page._doc.select({"type": Div}))


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def page(board: Board) -> _Page:
    return _Page(board, Document())


def test_a_page_before_the_first_run(page: _Page) -> None:
    assert "no run yet" in words(page)


def test_a_page_follows_the_newest_run_until_another_is_chosen(board: Board, page: _Page) -> None:
    first, second = (msgspec.structs.replace(GLANCE, name=name) for name in ("first", "second"))
    tell(board, "1", first)
    page.update()
    assert page._doc.title == "flowps: first"
    assert not page._select.visible
    tell(board, "2", second)
    page.update()
    assert page._doc.title == "flowps: second"
    assert page._select.visible
    page._select.value = "1"
    assert page._doc.title == "flowps: first"
    tell(board, "3", msgspec.structs.replace(GLANCE, name="third"))
    page.update()
    assert page._doc.title == "flowps: first"
    page._select.value = "3"
    tell(board, "4", msgspec.structs.replace(GLANCE, name="fourth"))
    page.update()
    assert page._doc.title == "flowps: fourth"


def test_plots_come_with_their_points_and_get_only_new_ones(board: Board, page: _Page) -> None:
    tell(board, "1")
    page.update()
    assert page._plots.children == []
    tell(board, "1", GLANCE, *(Point(float(k), examples_per_s=k, loss=0.5) for k in range(3)))
    page.update()
    assert [of.title.text for of in page._plots.children] == ["examples/s", "loss"]
    source = page._steps.source
    before = source.data["rate"]
    tell(board, "1", GLANCE, Point(3.0, examples_per_s=3.0, loss=None), Point(3.0, logloss=0.4, auc=None))
    page.update()
    assert source.data["rate"] is before
    assert list(source.data["rate"]) == [0, 1, 2, 3]
    assert list(source.data["ms"]) == [0.0, 1000.0, 2000.0, 3000.0]
    assert len(page._plots.children) == 2, "no empty plot"


def test_the_end_is_shown_at_once(board: Board, page: _Page) -> None:
    tell(board, "1")
    page.update()
    tell(board, "1", ENDED)
    (callback,) = [of for of in page._doc.session_callbacks if type(of).__name__ == "NextTickCallback"]
    callback.callback()
    assert "ended: trained" in words(page)


# --- the way there ----------------------------------------------------------------------------------------------------


class SlowClient:
    """A client whose scheduler answers nothing until it is let."""

    def __init__(self) -> None:
        self.asked, self.let = threading.Event(), threading.Event()
        self.messages: list[dict[str, Any]] = []
        self.scheduler = type("Scheduler", (), {OPERATION: None})

    def sync(self, operation: object, callback_timeout: float, **message: Any) -> None:
        self.messages.append(message)
        self.asked.set()
        self.let.wait(DEADLINE_S)


def test_a_slow_scheduler_holds_nothing_up_and_little_waits_for_it() -> None:
    client = SlowClient()
    courier = Courier(client, "run", GLANCE, lambda: 0.0)
    assert client.asked.wait(DEADLINE_S)
    for step in range(10_000):
        courier.put(msgspec.structs.replace(GLANCE, step=step), Point(float(step), examples_per_s=1.0))
    client.let.set()
    courier.close()
    last = client.messages[-1]
    assert last["glance"]["step"] == 9_999
    assert [point[0] for point in last["points"]] == [float(step) for step in range(10_000 - 240, 10_000)]


def test_a_scheduler_that_never_answers_does_not_keep_a_run_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(couriers, "_LAST_S", 0.05)
    client = SlowClient()
    courier = Courier(client, "run", GLANCE, lambda: 0.0)
    assert client.asked.wait(DEADLINE_S)
    began = time.monotonic()
    courier.close()
    assert time.monotonic() - began < DEADLINE_S / 4
    client.let.set()
    courier._thread.join(DEADLINE_S)
    assert not courier._thread.is_alive()


def test_a_scheduler_that_is_gone_is_no_error() -> None:
    client = SlowClient()
    client.scheduler = None  # type: ignore[assignment]
    courier = Courier(client, "run", GLANCE, lambda: 0.0)
    courier.put(GLANCE)
    courier.close()
    assert not courier._thread.is_alive()
    assert client.messages == []


def test_without_news_the_clock_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(couriers, "_HEARTBEAT_S", 0.01)
    monkeypatch.setattr(couriers, "_PAUSE_S", 0.01)
    client, beats = SlowClient(), threading.Semaphore(0)
    client.let.set()
    monkeypatch.setattr(client, "sync", lambda _, callback_timeout, **message: (client.messages.append(message), beats.release()))
    with closing(Courier(client, "run", GLANCE, lambda: 12.0)):
        for _ in range(3):
            assert beats.acquire(timeout=DEADLINE_S)
    assert [message["glance"]["seconds"] for message in client.messages[:3]] == [0.0, 12.0, 12.0]


# --- on a scheduler ---------------------------------------------------------------------------------------------------


@pytest.fixture
def served(make_config: Callable[..., Config]) -> Iterator[tuple[distributed.Client, str]]:
    """An embedded cluster with a dashboard."""
    with launch(make_config(("cluster.dashboard", "127.0.0.1:0"))) as (client, dashboard):
        yield client, dashboard


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
        assert answer.status == 200
        return str(answer.read(), "utf-8")


@contextmanager
def shown_on(client: distributed.Client, dashboard: str, plan: Plan, name: str) -> Iterator[tuple[Shown, list[str]]]:
    """A run that is shown, and what was said of it."""
    said: list[str] = []
    with show_run(client, dashboard, plan, Path(f"/runs/{name}"), Ledger(), said.append) as shown:
        yield shown, said


def board_of(client: distributed.Client) -> Board:
    """Of a scheduler in this process."""
    found: Board = client.cluster.scheduler.extensions["flowps"]
    return found


def test_the_page_is_served_and_in_the_menu(served: tuple[distributed.Client, str], make_plan: Callable[..., Plan]) -> None:
    client, dashboard = served
    with shown_on(client, dashboard, make_plan(), "a") as (_, said):
        assert said == [f"this run: {dashboard.removesuffix('status')}flowps"]
        for name in ("status", "flowps", "workers"):
            assert '<a href="flowps">Flowps</a>' in get(f"{dashboard.removesuffix('status')}{name}")
        assert "flowps-lost" in get(said[0].removeprefix("this run: "))


def test_the_scheduler_hears_of_steps_and_of_the_end(
    served: tuple[distributed.Client, str], make_plan: Callable[..., Plan]
) -> None:  # fmt: skip
    client, dashboard = served
    heard = threading.Event()
    with shown_on(client, dashboard, make_plan(), "a") as (shown, _):
        board = board_of(client)

        def receive(**message: Any) -> None:
            board.receive(**message)
            if message["points"]:
                heard.set()

        client.cluster.scheduler.handlers[OPERATION] = receive
        shown(events.PROGRESS)
        assert heard.wait(DEADLINE_S)
        run = board.newest()
        assert run is not None
        assert (run.glance.name, run.glance.phase, run.glance.step) == ("a", "training", 1300)
        assert run.steps.rows[0][1:] == (38_399.8, 0.45123)
        shown(events.FINISHED)
        shown.conclude(Ledger(read=10, trained=10, ended=10))
    assert (run.glance.phase, run.glance.account) == ("trained", "10 read = 10 trained + 0 dropped + 0 replayed")


@pytest.mark.parametrize(
    ("error", "phase", "said"),
    [(FlowpsError("a shard was lost"), "failed", "a shard was lost"), (StoppedError("by a signal"), "stopped", "by a signal"),
     (KeyboardInterrupt(), "stopped", "KeyboardInterrupt")],
)  # fmt: skip
def test_what_has_ended_a_run_is_shown(
    served: tuple[distributed.Client, str], make_plan: Callable[..., Plan], error: BaseException, phase: str, said: str
) -> None:
    client, dashboard = served
    with pytest.raises(type(error)), shown_on(client, dashboard, make_plan(), "a"):
        raise error
    run = board_of(client).newest()
    assert run is not None
    assert (run.glance.phase, run.glance.error) == (phase, said)


def test_two_runs_at_once_are_both_there(served: tuple[distributed.Client, str], make_plan: Callable[..., Plan]) -> None:
    client, dashboard = served
    with shown_on(client, dashboard, make_plan(), "a") as (one, _):
        with distributed.Client(client.cluster) as other, shown_on(other, dashboard, make_plan(), "b") as (two, said):
            assert said[0].startswith("this run: ")
            one(events.PROGRESS)
            two(Progress(1, 7, 70, 1.0, 0.5, None, 0))
        board = board_of(client)
        assert board.newest().glance.name == "b"  # type: ignore[union-attr]
        assert board.newest().glance.phase == "trained"  # type: ignore[union-attr]
    assert sorted(run.glance.name for run in board._runs.values()) == ["a", "b"]
    served_pages = [
        of for of in client.cluster.scheduler.http_application.applications if "/flowps" in getattr(of, "app_paths", ())
    ]
    assert len(served_pages) == 1
    assert get(f"{dashboard.removesuffix('status')}status").count('href="flowps"') == 1


def test_without_a_dashboard_nothing_is_shown_or_said(
    started: Callable[..., tuple[distributed.Client, Plan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, plan = started()
    monkeypatch.setattr(show, "Courier", None)
    with shown_on(client, "", plan, "a") as (shown, said):
        shown(events.PROGRESS)
        shown.conclude(Ledger())
    assert said == []


def test_a_scheduler_without_a_dashboard_refuses(started: Callable[..., tuple[distributed.Client, Plan]]) -> None:
    client, _ = started()
    assert refusal(client) == "it serves no dashboard"


def test_a_scheduler_with_another_flowps_refuses(
    served: tuple[distributed.Client, str], make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, dashboard = served
    monkeypatch.setattr(offer, "__version__", "99")
    with shown_on(client, dashboard, make_plan(), "a") as (shown, said):
        shown(events.PROGRESS)
    assert said == [
        f"no page of this run on the scheduler's dashboard: its machine has flowps {__version__}, this command has flowps 99"
    ]


class Refusing:
    """A client whose scheduler answers so, one answer after the other."""

    def __init__(self, *answers: object) -> None:
        self._answers = iter(answers)

    def run_on_scheduler(self, function: object) -> object:
        answer = next(self._answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        (("",), f"its machine has no flowps, this command has flowps {__version__}"),
        ((__version__, ModuleNotFoundError("No module named 'bokeh'")), "ModuleNotFoundError: No module named 'bokeh'"),
        ((ValueError("no code here"),), "ValueError: no code here"),
    ],
)
def test_whatever_a_scheduler_answers_is_a_line(answers: tuple[object, ...], why: str) -> None:
    assert refusal(Refusing(*answers)) == why


def test_a_scheduler_whose_machine_has_no_flowps_refuses(tmp_path: Path) -> None:
    words = "import sys; sys.modules['flowps'] = None; from distributed.cli.dask_scheduler import main; main()"
    where = ("--host", "127.0.0.1", "--port", 0, "--dashboard-address", "127.0.0.1:0")
    with (
        closing(Command(sys.executable, "-c", words, *where, cwd=tmp_path)) as scheduler,
        distributed.Client(scheduler.wait_for(r"Scheduler at:\s+(\S+)")[1]) as client,
    ):
        assert refusal(client) == f"its machine has no flowps, this command has flowps {__version__}"
    assert "Traceback" not in scheduler.said


@pytest.mark.long
def test_a_run_on_a_scheduler_that_refuses_says_so_and_goes_on(samples: Path, tmp_path: Path) -> None:
    with closing(DaskCluster(tmp_path)) as dask:  # without a dashboard
        joined(dask.add("all", "HUB=2 PS=1 TRAINER=1"))
        with closing(train_command(samples, tmp_path / "run", "--cluster.scheduler", dask.address)) as command:
            said = command.succeed()
    assert "no page of this run on the scheduler's dashboard: it serves no dashboard\n" in said


@pytest.mark.long
def test_a_run_without_a_dashboard_imports_no_page(samples: Path, tmp_path: Path) -> None:
    """Nor does Dask's worker import Bokeh, which takes it a second."""
    run = ["--data.train", str(samples / "train.parquet"), "--run_dir", str(tmp_path / "run"), "--cluster.dashboard", ""]
    words = (
        "import sys; from flowps.train import main; "
        f"main({run!r}); print('imported:', 'bokeh' in sys.modules, 'flowps.cluster.dashboard.page' in sys.modules)"
    )
    with closing(Command(sys.executable, "-c", words, cwd=tmp_path)) as command:
        said = command.succeed()
    assert "imported: False False" in said
    assert "this run: " not in said
    assert "no page" not in said


# --- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--disable-crash-reporter",
    "--remote-debugging-port=0",
)  # fmt: skip

# What a person reads is in the shadow trees of Bokeh's elements.
FIND = """
const find = (selector, root = document) => {
    for (const element of root.querySelectorAll("*")) {
        if (element.matches(selector)) return element
        const found = element.shadowRoot && find(selector, element.shadowRoot)
        if (found) return found
    }
    return null
}
const text = selector => find(selector)?.textContent ?? ""
"""


class Tab:
    """A page of a browser, spoken to over its DevTools protocol. `complaints`: warnings and errors of its console."""

    def __init__(self, connection: WebSocketClientConnection) -> None:
        self._connection = connection
        self._number = 0
        self._session: dict[str, str] = {}
        self.complaints: list[str] = []

    async def open(self, url: str) -> None:
        """Go there."""
        target = await self._call("Target.createTarget", url="about:blank")
        attached = await self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Runtime", "Log", "Page"):
            await self._call(f"{domain}.enable")
        await self._call("Page.navigate", url=url)

    async def wait_for(self, condition: str, what: str) -> Any:
        """Wait in the page until the JavaScript `condition` holds; the value of `what` then."""
        script = f"""new Promise(resolve => {{
            {FIND}
            const look = () => ({condition}) ? resolve({what}) : setTimeout(look, 50)
            look()
        }})"""
        answer = await self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        await self._connection.write_message(json.dumps(message))
        while True:
            said = await self._connection.read_message()
            assert said is not None, "the browser has gone"
            answer = json.loads(said)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                found: dict[str, Any] = answer["result"]
                return found
            self._hear(answer.get("method"), answer.get("params"))

    def _hear(self, event: str, about: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(str(about["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("warning", "error", "assert"):
            self.complaints.append(" ".join(str(of.get("value")) for of in about["args"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("warning", "error"):
            self.complaints.append(str(about["entry"]))


def in_browser(folder: Path, visit: Callable[[Tab], Awaitable[None]]) -> None:
    """Start a browser and visit pages in it."""
    assert CHROMIUM is not None

    async def run(address: str) -> None:
        connection = await websocket_connect(address, max_message_size=1 << 26)
        try:
            await asyncio.wait_for(visit(Tab(connection)), 3 * DEADLINE_S)
        finally:
            connection.close()
            while await connection.read_message() is not None:
                pass

    with closing(Command(CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'browser'}", "about:blank", cwd=folder)) as browser:
        asyncio.run(run(browser.wait_for(r"DevTools listening on (ws://\S+)")[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt-get install chromium")
def test_a_person_sees_a_training_go_on_and_end(samples: Path, tmp_path: Path) -> None:
    knobs = ("--cluster.dashboard", "127.0.0.1:0", "--epochs", 100_000, "--status.interval_s", 1, "--checkpoint.every_s", 3)

    async def look(tab: Tab) -> None:
        await tab.open(url)
        there = "text('.step') && text('.rate') != '–'"
        step, rate = await tab.wait_for(there, "[text('.step'), text('.rate')]")
        assert int(step.replace(",", "")) > 0
        assert float(rate.replace(",", "")) > 0
        assert await tab.wait_for("true", "document.title") == "flowps: run"
        assert await tab.wait_for("true", "text('.run') + ', ' + text('.phase')") == "run, training"
        await tab.wait_for(f"text('.step') != {step!r} && text('.rate') != {rate!r}", "0")
        # The first reports: the verdict, latencies, load; and a checkpoint, with its ledger.
        assert await tab.wait_for("text('.bound') != 'not known yet'", "text('.bound')")
        assert "TrainStep" in await tab.wait_for("text('.stages').includes('PushGrad')", "text('.stages')")
        await tab.wait_for("text('.shards').includes('%')", "0")
        assert "read = " in await tab.wait_for("text('.ledger').includes('at step')", "text('.ledger')")
        links = "[...document.querySelectorAll('a')].filter(link => link.href.endsWith('/flowps')).length"
        assert await tab.wait_for("find('canvas')", links) == 1
        assert tab.complaints == []
        command.signal(signal.SIGINT)
        await tab.wait_for("text('.phase') == 'ended: stopped'", "0")
        await tab.wait_for("getComputedStyle(document.getElementById('flowps-lost')).display != 'none'", "0")

    run_dir = tmp_path / "run"
    with closing(train_command(samples, run_dir, *knobs)) as command:
        url = command.wait_for(r"^this run: (http://127\.0\.0\.1:\d+/flowps)$")[1]
        in_browser(tmp_path, look)
        assert command.refuse(StoppedError.exit_code).startswith("error: stopped by a signal")
    assert not [line for line in command.said.splitlines() if "Traceback" in line or "tornado" in line]

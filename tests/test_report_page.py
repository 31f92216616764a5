"""The page of `flowps.report --html`: what stands where, that it needs nothing else, and that names stay names."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from flowps.cluster.shard_report import PlacementReport, ShardReport
from flowps.ps.load import SlotLoad
from flowps.report import main
from flowps.status.event import Metrics, Remark, StatusReport
from flowps.status.verdict import Verdict
from tests.test_report import CONFIG, LOADS, STAGES, VERDICT, interval, run_of, shard, stages_of, written

SECTIONS = ["verdict", "training", "speed", "latency", "shards", "ledger", "events", "config"]
PICTURES = ["Logloss and AUC", "Examples per second", "of each stage of the trainer", "Times of the main stages",
            "of each stage of the shards", "Each shard's share"]  # fmt: skip
HOSTILE = "<script>alert('x')</script>&amp;\"$x^2$"
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """A page in parts: text by section, tables, pictures, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.section = ""
        self.text: dict[str, str] = {}
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.pictures: list[str] = []
        self.pictured: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        found = dict(attrs)
        if tag == "section":
            self.section = found["id"] or ""
        elif tag == "svg":
            self.pictures.append(found["aria-label"] or "")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if "svg" in self.open and data.strip():
            self.pictured.append(data)

    def table(self, first_head: str, *, having: str = "") -> list[list[str]]:
        """The rows of the table whose first head is that."""
        return next(rows[1:] for rows in self.tables if rows[0][0] == first_head and (not having or having in rows[0]))


def html_of(folder: Path) -> str:
    """The page that the command writes, the text of which the caller may read of `capsys`."""
    out = folder.parent / f"{folder.name}.html"
    assert main([str(folder), "--html", str(out)]) == 0
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return html_of(run_of(tmp_path_factory.mktemp("runs") / "r1"))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_all_sections_and_pictures_are_there(page: Page) -> None:
    assert [value for tag, name, value in page.attributes if tag == "section" and name == "id"] == SECTIONS
    assert len(page.pictures) == len(PICTURES)
    assert all(words in says for words, says in zip(PICTURES, page.pictures, strict=True))


def test_links_lead_to_sections(page: Page) -> None:
    links = [value for tag, name, value in page.attributes if tag == "a" and name == "href"]
    assert links == [f"#{section}" for section in SECTIONS[1:]]


def test_it_needs_nothing_from_elsewhere(html: str, page: Page) -> None:
    assert not [tag for tag, _, _ in page.attributes if tag in ("script", "link", "img", "iframe", "object", "base")]
    for tag, name, value in page.attributes:
        if name in ("href", "xlink:href", "src", "srcset", "action", "data"):
            assert value.startswith("#"), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import|https?://|<!ENTITY", html)


def test_every_id_is_there_once_and_what_is_used_is_there(html: str, page: Page) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", html)) | {value[1:] for _, name, value in page.attributes if name.endswith("href")}
    assert used
    assert used <= set(ids)


def test_colours_are_the_pages_in_light_and_in_dark(html: str) -> None:
    style = html[html.index("<style>") : html.index("</style>")]
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in style.split("@media (prefers-color-scheme: dark)")[:2])
    assert light == dark
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert {"--ink", "--muted", "--grid", "--series-1", "--series-2"} <= used <= light
    pictures = html[html.index("<svg") :]
    assert not re.search(r"#[0-9a-f]{6}\b", pictures), "no picture has a colour of its own"


def test_the_verdict_comes_first(page: Page) -> None:
    said = page.text["verdict"]
    assert "Bound by EmbeddingLookup on shard 1" in said
    assert "Trainer waited 40% of the time, for lookups." in said
    assert "add shards (ps.num_shards)" in said
    assert "not finished" not in said


def test_figures(page: Page) -> None:
    assert page.table("examples", having="calibration") == [
        ["100", "0.7500", "0.8000", "0.50000", "0.25000", "0.25000", "1.000"]
    ]  # fmt: skip
    stages = {row[0]: row[1:] for row in page.table("stage")}
    assert list(stages)[:4] == ["ReadSample", "EmbeddingLookup", "PushGrad", "TrainStep"]
    assert stages["EmbeddingLookup"] == ["30", "27.600", "55.200", "82.800", "110.400", "0.8"]
    shards = page.table("shard", having="hit rate")
    assert shards[0][:6] == ["0", "ps-0", "45.0%", "55.0%", "622", "1,000"]
    assert page.table("slot") == [
        ["item", "0, 1", "", "70.0%", "2.00", "1.250", "1,234"],
        ["user", "0", "", "30.0%", "1.00", "0.500", "10"],
    ]
    assert page.table("shard", having="sign")[0] == ["0", "user", str(2**63 + 1), "12.50%"]
    assert page.table("shard", having="mean")[0] == ["0", "0.75", "1", "0: 25.0%, 1: 75.0%"]
    assert page.table("process")[0] == ["host:7", "7.0", "2", "8"]
    assert page.table("trainer") == [["1", "29", "27.600", "3.000", "25.000", "–"]]
    whole = "".join(page.text.values())
    for figure in ("4,000", "examples/s in steady state", "3.1%", "of the time the trainer waited", "1,244", "0.5000"):
        assert figure in whole, figure


def test_the_ledger(page: Page) -> None:
    assert "ledger: 1,000 read = 960 trained + 10 dropped" in page.text["ledger"]
    assert page.table("samples") == [
        ["read", "1,000"], ["trained", "960"], ["dropped", "10"], ["of these, label is null", "10"], ["replayed", "30"],
        ["not learned by rows of shard 1", "5"],
    ]  # fmt: skip


def test_what_happened(page: Page) -> None:
    said = page.text["events"]
    assert said.index("trainer: on GPU:0") < said.index("worker ps-1 was lost") < said.index("evaluated 960 examples")
    assert "xentropy_mean" not in said


def test_what_bounded_the_run_and_when(page: Page) -> None:
    """The last report's verdict is of the whole run, and no part of its course."""
    widths = [value for tag, name, value in page.attributes if tag == "i" and name == "style" and "flex-grow" in value]
    assert widths == ["flex-grow:1.0;background:var(--series-1)", "flex-grow:1.0;background:var(--series-2)"]
    assert "FeedQueue 50%" in page.text["speed"]
    assert "EmbeddingLookup on shard 1 50%" in page.text["speed"]


def test_the_config(page: Page) -> None:
    assert sorted(page.table("knob")) == [
        ["data.batch_size", "32", "4096"], ["data.train", "a.parquet", "–"], ["ps.num_shards", "2", "1"], ["run_dir", "there", "–"],
        ["slot.user.dim", "32", "16"], ["status.print_interval", "10", "100"],
    ]  # fmt: skip
    assert "batch_size = 32" in page.text["config"]


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = run_of(
        tmp_path / "<b>run & co", config={**CONFIG, "slot": [{"name": HOSTILE, "dim": 8}]}, events=[interval(10), Remark(HOSTILE)],
        stages={**STAGES, **stages_of(**{HOSTILE: 5.0})}, verdict=Verdict(HOSTILE, HOSTILE, HOSTILE),
    )  # fmt: skip
    placed = PlacementReport(HOSTILE, [ShardReport(HOSTILE, [HOSTILE])], {HOSTILE: SlotLoad(1.0, 1.0, 1)})
    (folder / "placement.json").write_bytes(msgspec.json.encode(placed))
    hostile = msgspec.structs.replace(shard(0), worker=HOSTILE, signs={HOSTILE: 3}, hot=[(HOSTILE, 7, 0.5)])
    written(folder / "status.jsonl", [StatusReport(1.0, 30, {HOSTILE: STAGES["TrainStep"]}, {}, [hostile], [], [],
                                                   Verdict(HOSTILE, HOSTILE, HOSTILE))])  # fmt: skip
    html = html_of(folder)
    page = Page(html)
    assert "<script" not in html
    assert "<b>run" not in html
    for section in ("verdict", "shards", "events", "config"):
        assert HOSTILE in page.text[section], section
    assert page.table("slot")[0][0] == HOSTILE
    assert HOSTILE in page.pictured, "a stage's name, as it is, in the picture"


def test_a_run_that_has_not_finished(tmp_path: Path) -> None:
    page = Page(html_of(run_of(tmp_path / "r", finished=False)))
    assert "has not finished, or failed; what follows is as far as it went" in page.text["verdict"]
    assert "Bound by EmbeddingLookup" in page.text["verdict"]
    assert "written at the end" in page.text["ledger"]
    assert "Not evaluated" in page.text["training"]
    assert len(page.pictures) == len(PICTURES)


def test_a_run_that_has_measured_nothing(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "r", finished=False, events=[])
    (folder / "status.jsonl").write_bytes(b"")
    (folder / "placement.json").unlink()
    page = Page(html_of(folder))
    assert page.pictures == []
    assert "No verdict" in page.text["verdict"]
    assert "before slots were placed" in page.text["shards"]
    assert "Nothing yet." in page.text["events"]


def test_one_shard_has_no_shares(tmp_path: Path) -> None:
    page = Page(html_of(run_of(tmp_path / "r", shards=1)))
    assert not [says for says in page.pictures if "share" in says]
    assert "Lookup" in page.pictured
    assert "Lookup · shard 0" not in page.pictured


@pytest.mark.parametrize("metrics", [Metrics(0, None, float("nan"), float("nan"), float("nan")), Metrics(5, None, 0.0, 0.1, 0.0)])
def test_figures_that_do_not_exist(tmp_path: Path, metrics: Metrics) -> None:
    events = [interval(10, 0.0, metrics), interval(20, 100.0, metrics)]
    assert len(Page(html_of(run_of(tmp_path / "r", events=events, rate=0.0))).pictures) == len(PICTURES)


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    events = [interval(10 * k, 1000.0 + k % 7) for k in range(1, 5001)]
    folder = run_of(tmp_path / "r", events=events)
    written(folder / "status.jsonl", [StatusReport(float(k), k, STAGES, {}, [shard(0)], [], [], VERDICT) for k in range(1, 2001)])
    html = html_of(folder)
    assert len(html) < 500_000
    assert "EmbeddingLookup on shard 1 100%" in Page(html).text["speed"]


def test_steps_that_the_run_went_back_behind_are_not_drawn_twice(tmp_path: Path) -> None:
    def heights(name: str, steps: Sequence[int]) -> str:
        svg = html_of(run_of(tmp_path / name, events=[interval(step) for step in steps])).split("<figure>")[1]
        return svg.split("</figure>")[0]

    assert heights("a", [10, 20, 30, 20, 30, 40]) == heights("b", [10, 20, 30, 40])


def test_a_page_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_of(tmp_path / "r")), "--html", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: cannot be written: Is a directory\n"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_it(html: str, tmp_path: Path) -> None:
    """It finds the same parts."""
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet = ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    command = ["chromium", *options, *quiet, "--dump-dom", f"file://{tmp_path}/page.html"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    shown = Page(found.stdout)
    assert [value for tag, name, value in shown.attributes if tag == "section" and name == "id"] == SECTIONS
    assert len(shown.pictures) == len(PICTURES)
    assert LOADS.keys() <= {row[0] for row in shown.table("slot")}

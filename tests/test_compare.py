"""The command that sets runs side by side: what it prints, what it draws, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from flowps.compare import against, main
from flowps.picture import MOST_RUNS
from flowps.run_record import names_of, read_run
from flowps.status.event import StatusReport
from tests.test_report import CONFIG, STAGES, interval, run_of, stages_of, usage, written

# The engineering log's case: the same trainer with a lookup of 27.6 ms and with one of 262 ms.
FAST = {**STAGES}
SLOW = {**STAGES, **stages_of(EmbeddingLookup=262.0, TrainStep=25.2, LookupShard0=200.0)}
del SLOW["PermitWait"]


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """A fast run and a slow one."""
    slow_config = {**CONFIG, "run_dir": "elsewhere", "ps": {"num_shards": 1}, "slot": [{"name": "user", "dim": 64}]}
    fast = run_of(tmp_path / "fast", stages=FAST, rate=240_000.0)
    slow = run_of(tmp_path / "slow", stages=SLOW, rate=40_000.0, config=slow_config, verdict=None)
    return [str(fast), str(slow)]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints with these arguments."""
    assert main(arguments) == 0
    found = capsys.readouterr()
    assert found.err == ""
    return found.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 1) -> str:
    """The one line with which the command refuses."""
    assert main(arguments) == status
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    return found.err


def rows_of(text: str) -> dict[tuple[str, str], list[str]]:
    """Of the table of stages: stage and run → the other columns."""
    lines = text.split("\n\n")[0].splitlines()
    found, stage = {}, ""
    for line in lines[2:]:
        cells = line.split(maxsplit=5) if line[0] != " " else [stage, *line.split(maxsplit=4)]
        stage = cells[0]
        found[stage, cells[1]] = cells[2:]
    return found


def test_every_stage_of_every_run_against_the_first(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, *runs)
    assert text.splitlines()[0].split() == ["stage", "(ms)", "run", "P50", "P95", "P99", "P50", "against", "fast"]
    rows = rows_of(text)
    assert rows["EmbeddingLookup", "fast"] == ["27.600", "55.200", "82.800"]
    assert rows["EmbeddingLookup", "slow"] == ["262.000", "524.000", "786.000", "9.5× slower"]
    assert rows["TrainStep", "slow"][-1] == "same"  # within the error of the quantiles
    assert rows["PermitWait", "slow"] == ["–", "–", "–", "–"]
    assert rows["LookupShard0", "fast"] == ["–", "–", "–"]
    assert rows["LookupShard0", "slow"] == ["200.000", "400.000", "600.000", "–"]


def test_the_stages_that_matter_come_first(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    stages = list(dict.fromkeys(stage for stage, _ in rows_of(said(capsys, *runs))))
    assert stages[:4] == ["ReadSample", "EmbeddingLookup", "PushGrad", "TrainStep"]
    assert set(stages[4:]) == {"PermitWait", "LookupShard0"}


def test_rates_quality_verdicts_and_knobs(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, rates, remarks, knobs = said(capsys, *runs).split("\n\n")
    figures = {
        cells[0].strip(): cells[1].split("  ") for line in rates.splitlines()[2:] if (cells := [line[:41], line[41:].strip()])
    }
    assert [cell.strip() for cell in figures["steady examples/s"] if cell] == ["240,000", "40,000"]
    assert figures["against fast"] == ["6.0× slower"]
    # Of two processes, 1.5 s in all each second; 10 steps of 32 between the last two of three reports, the first with 20 steps.
    assert [cell.strip() for cell in figures["CPU s per million examples, all processes"] if cell] == ["4687.50"] * 2
    assert [cell.strip() for cell in figures["of which the trainer's process"] if cell] == ["25.50"] * 2
    assert [cell.strip() for cell in figures["trainer waited"] if cell] == ["3.1%"] * 2
    assert [cell.strip() for cell in figures["test AUC"] if cell] == ["0.75000"] * 2
    assert [cell.strip() for cell in figures["test logloss"] if cell] == ["0.50000"] * 2
    assert [cell.strip() for cell in figures["embedding rows"] if cell] == ["1,244"] * 2
    assert remarks.splitlines() == [
        "fast: bound by EmbeddingLookup on shard 1: trainer waited 40% of the time, for lookups → add shards (ps.num_shards)",
        "slow: no verdict: too little was trained",
    ]
    assert [line.split() for line in knobs.splitlines()[2:]] == [["slot.user.dim", "32", "64"], ["ps.num_shards", "2", "1"]]


def test_runs_of_one_config(runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = run_of(tmp_path / "other", config={**CONFIG, "run_dir": "else"})
    assert said(capsys, runs[0], str(other)).endswith("\n\nno knob differs\n")


def test_three_runs_with_one_name(runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    third = run_of(tmp_path / "other" / "fast", stages=stages_of(EmbeddingLookup=12.0))
    rows = rows_of(said(capsys, *runs, str(third)))
    parent = tmp_path.name
    assert [run for stage, run in rows if stage == "EmbeddingLookup"] == [f"{parent}/fast", f"{parent}/slow", "other/fast"]
    assert rows["EmbeddingLookup", "other/fast"][-1] == "2.3× faster"
    assert names_of([read_run(third), read_run(third)]) == ["fast", "fast (2)"]


@pytest.mark.parametrize(
    ("speed_up", "words"),
    [
        (None, "–"), (1.0, "same"), (1.019, "same"), (1 / 1.019, "same"), (1.05, "1.05× faster"), (2.3, "2.3× faster"),
        (1 / 2.3, "2.3× slower"), (1 / 1.96, "2.0× slower"), (9.96, "10× faster"), (1 / 60.3, "60× slower"),
        (1 / 12345.0, "12,345× slower"),
    ],
)  # fmt: skip
def test_ratios_in_words(speed_up: float | None, words: str) -> None:
    assert against(speed_up) == words


def test_a_stage_that_took_no_time_has_no_ratio(runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nothing was waited for in one of them: how much longer the other waited is no number."""
    other = run_of(tmp_path / "other", stages={**STAGES, **stages_of(PermitWait=1e-6)})
    rows = rows_of(said(capsys, runs[0], str(other)))
    assert rows["PermitWait", "other"] == ["0.000", "0.000", "0.000", "–"]


def test_markdown(runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = run_of(tmp_path / "other", config={**CONFIG, "slot": [{"name": "a|b<c>", "dim": 8}]})
    stages, rates, remarks, knobs = said(capsys, runs[0], str(other), "--format", "markdown").rstrip().split("\n\n")
    for table in (stages, rates, knobs):
        lines = [line.replace("\\|", "") for line in table.splitlines()]
        assert len({line.count("|") for line in lines}) == 1
        assert set(lines[1]) <= set("|-:")
    assert "| EmbeddingLookup | fast | 27.600 | 55.200 | 82.800 |  |" in stages.splitlines()
    assert "|  | other | 27.600 | 55.200 | 82.800 | same |" in stages.splitlines()
    assert "| steady examples/s | 240,000 | 4,000 |" in rates.splitlines()
    assert "| slot.a\\|b&lt;c&gt;.dim | – | 8 |" in knobs.splitlines()
    assert remarks.startswith("- fast: bound by EmbeddingLookup")


def test_json(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, *runs, "--format", "json"))
    fast, slow = found["runs"]
    assert (fast["name"], fast["path"], fast["finished"], fast["steps"]) == ("fast", runs[0], True, 30)
    assert slow["speed_up"] == pytest.approx(1 / 6)
    assert slow["cpu_s_per_million"] == pytest.approx(4687.5)
    assert fast["verdict"]["bound_by"] == "EmbeddingLookup"
    lookups = found["stages"]["EmbeddingLookup"]
    assert [of["p50_us"] for of in lookups] == [27_600.0, 262_000.0]
    assert lookups[1]["speed_up"] == pytest.approx(27.6 / 262)
    assert found["stages"]["LookupShard0"][0] is None
    assert found["knobs"] == {"slot.user.dim": [32, 64], "ps.num_shards": [2, 1]}


def test_a_run_that_has_not_finished_is_compared_as_far_as_it_went(
    runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    events = [interval(10, 1.0), interval(20, 3000.0), interval(30, 6000.0)]  # the first is left out: it compiled
    going = run_of(tmp_path / "going", finished=False, stages=SLOW, events=events)
    text = said(capsys, runs[0], str(going))
    assert "going: has not finished, or failed; compared as far as it went, step 30, with the rate of its metric lines\n" in text
    assert rows_of(text)["EmbeddingLookup", "going"][-1] == "9.5× slower"
    found = json.loads(said(capsys, runs[0], str(going), "--format", "json"))["runs"][1]
    assert found["examples_per_s"] == pytest.approx(4000.0)  # of 960 examples each
    assert (found["finished"], found["rows"]) == (False, 2 * 622)
    assert (found["test_auc"], found["trainer_wait_share"]) == (None, None)


def test_cpu_is_that_of_the_last_attempt(runs: list[str], tmp_path: Path) -> None:
    reports = [(3.0, 40, 90.0), (5.0, 50, 99.0), (2.0, 25, 10.0), (3.0, 35, 12.0)]
    written(
        Path(runs[0]) / "status.jsonl",
        [StatusReport(seconds, step, STAGES, {}, [], usage(cpu_s)) for seconds, step, cpu_s in reports],
    )
    assert read_run(Path(runs[0])).cpu_s_per_million == pytest.approx(3.0 / 320 * 1e6)


def test_to_a_file(runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shown = said(capsys, *runs)
    assert said(capsys, *runs, "--out", str(tmp_path / "table.txt")) == ""
    assert (tmp_path / "table.txt").read_text(encoding="utf-8") == shown


def texts_of(svg: Path) -> list[str]:
    return [element.text or "" for element in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_shows_runs_stages_and_rates(runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said(capsys, *runs, "--picture", str(tmp_path / "p.svg"))
    shown = texts_of(tmp_path / "p.svg")
    for text in ("slow against fast", "EmbeddingLookup", "LookupShard0", "240,000", "40,000", "27.6 / 55.2", "262 / 524"):
        assert text in shown, text
    assert shown.count("fast") == shown.count("slow") == 2  # beside the rates, and in the legend
    assert main([*runs, "--picture", str(tmp_path / "P.PNG")]) == 0
    pixels = imread(tmp_path / "P.PNG")
    assert pixels.shape[1] == 1920
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[2])[::7].tolist()}) > 20


@pytest.mark.parametrize("count", [2, 3, MOST_RUNS])
def test_no_text_of_the_picture_lies_on_another(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a", "a-rather-long-name-for-the-directory-of-a-run-20261126", *"cdefgh"][:count]
    many = stages_of(**{f"Stage{k}": 10.0**k for k in range(-5, 5)}, **{f"LookupShard{k}": 5.0 for k in range(40)})
    runs = [
        str(run_of(tmp_path / name, finished=name != "c", stages={**SLOW, **many}, rate=1e5 * k)) for k, name in enumerate(names, 1)
    ]
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append((self, boxes_of(self))))
    assert main([*runs, "--picture", "p.png"]) == 0
    ((figure, boxes),) = figures
    assert len(boxes) > 26 * (1 + count)
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.width, text
        assert box.y0 >= 0, text
        assert box.y1 <= figure.bbox.height, text
    for (one, box), (other, other_box) in combinations(boxes, 2):
        assert not box.padded(-1).overlaps(other_box.padded(-1)), (one, other)


def boxes_of(figure: Figure) -> list:
    """All text that is drawn, and where."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    beyond = set()  # ticks that are there, but not drawn
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond |= {id(label) for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high
                   for label in (tick.label1, tick.label2)}  # fmt: skip
    found = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text().strip() and text.get_visible()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in found if id(text) not in beyond]


def test_a_directory_that_is_no_runs(runs: list[str]) -> None:
    command = [sys.executable, "-m", "flowps.compare", runs[0], f"{runs[1]}/nowhere"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == (
        f"error: {runs[1]}/nowhere/config.toml: cannot be read: No such file or directory; is this the directory of a run?\n"
    )


def test_a_run_that_has_measured_nothing(runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    new = run_of(tmp_path / "new", finished=False)
    (new / "status.jsonl").write_bytes(b"")
    assert f"{new}: has not finished, and has no status report yet" in refused(capsys, runs[0], str(new))


def test_files_of_another_version(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (Path(runs[1]) / "status.jsonl").write_text(
        '{"type":"StatusReport","seconds":1,"step":2,"stages":{"ReadSample":3},"counters":{}}\n'
    )
    assert f"{runs[1]}/status.jsonl: is no file of this version of flowps" in refused(capsys, *runs)


def test_one_run(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "it takes two to compare" in refused(capsys, runs[0], status=2)


def test_pictures_that_cannot_be(runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--picture p.gif: a picture is a .png or .svg file" in refused(capsys, *runs, "--picture", "p.gif", status=2)
    assert "9 runs, and a picture shows 8 at most" in refused(capsys, *[runs[0]] * 9, "--picture", "p.png", status=2)
    nowhere = tmp_path / "nowhere" / "p.png"
    assert f"{nowhere}: cannot be written: No such file or directory" in refused(capsys, *runs, "--picture", str(nowhere))


def test_a_file_that_cannot_be_written(runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"{tmp_path}: cannot be written: Is a directory" in refused(capsys, *runs, "--out", str(tmp_path))


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "P50, P95 and P99 of every run" in capsys.readouterr().out

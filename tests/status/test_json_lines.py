"""Logs as JSON: every line of a run, good or bad, is one object; and what people read is in it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from flowps import train as command_module
from flowps.errors import OutputError
from flowps.status.event import Event
from flowps.status.json_lines import JsonConsole, JsonDisplay, json_line
from flowps.status.lines import lines
from flowps.train import main
from tests.status.samples import (
    AT_CUT,
    EVALUATED,
    FINISHED,
    INTERVAL,
    NOTHING,
    PROGRESS,
    REMARK,
    REPORT,
    SAVED,
    STARTED,
    TRAINER,
    WRITTEN,
)
from tests.test_train import ROOT, command, good_columns, write

COMMON = {"time", "level", "event", "message"}


def strict(text: str) -> list[dict[str, Any]]:
    """Every line as an object; NaN and infinity are refused, as other readers than Python's do."""
    assert text.endswith("\n") or not text
    found = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]
    for of in found:
        assert of.keys() >= COMMON
        assert of["level"] in ("info", "warning", "error")
        assert abs(datetime.now(UTC) - datetime.fromisoformat(of["time"])) < timedelta(hours=1)
        assert of["time"].endswith("+00:00")
    return found


def printed(*objects: Any, **how: Any) -> dict[str, Any]:
    """What the console makes of one call."""
    console = JsonConsole(file=StringIO())
    console.print(*objects, **how)
    (found,) = strict(console.file.getvalue())
    return found


def shown(*events: Event) -> list[dict[str, Any]]:
    console = JsonConsole(file=StringIO())
    with JsonDisplay(console) as display:
        for event in events:
            display(event)
    return strict(console.file.getvalue())


# --- lines ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message", ["", "µs → 城市", 'a\nb\t"c" \\ \x1b[1m', "\udc80", "[bold]not markup[/bold] :smile:", "x" * 10_000]
)
def test_any_text_is_one_line_of_ascii_that_says_it(message: str):
    line = json_line("info", "Kind", message, name=message)
    assert line.isascii()
    assert "\n" not in line
    assert (json.loads(line)["message"], json.loads(line)["name"]) == (message, message)


def test_numbers_that_json_does_not_have_are_null():
    line = json_line("info", "Kind", "", figures=[float("nan"), {"a": float("-inf")}, 1.5], metrics=NOTHING)
    found = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert found["figures"] == [None, {"a": None}, 1.5]
    assert found["metrics"]["logloss"] is None


# --- the console ----------------------------------------------------------------------------------------------------------


def test_a_print_is_an_announcement():
    found = printed("train: 2,000 examples in [1] partitions", soft_wrap=True)
    assert (found["level"], found["event"], found["message"]) == ("info", "Announcement", "train: 2,000 examples in [1] partitions")


def test_a_long_line_stays_one():
    assert printed("word " * 500, soft_wrap=True)["message"] == ("word " * 500).rstrip()


def test_a_table_is_one_object_with_its_rows():
    table = Table("column", "type", title="schema")
    table.add_row("label", "int8")
    table.add_row("城市[0]", "int64")
    found = printed(table)
    assert found["title"] == "schema"
    assert found["rows"] == [{"column": "label", "type": "int8"}, {"column": "城市[0]", "type": "int64"}]
    assert [line.split() for line in found["message"].splitlines()] == [
        ["schema"], ["column", "type"], ["label", "int8"], ["城市[0]", "int64"]
    ]  # fmt: skip


def test_a_full_disk_is_an_output_error():
    class Full(StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputError, match="No space left on device"):
        JsonConsole(file=Full()).print("something")


# --- events ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event", [STARTED, INTERVAL, SAVED, REMARK, EVALUATED, REPORT, FINISHED], ids=lambda event: type(event).__name__
)
def test_an_event_is_one_object_with_its_fields_and_the_text(event: Event):
    (found,) = shown(event)
    assert found["event"] == type(event).__name__
    assert found["message"] == "\n".join(lines(event))
    assert found.keys() == COMMON | set(event.__struct_fields__)


def test_fields_are_those_of_the_event():
    (found,) = shown(INTERVAL)
    assert (found["step"], found["metrics"]["auc"], found["level"]) == (1300, 0.67149, "info")
    (report,) = shown(REPORT)
    assert report["shards"][0]["staleness"] == {"0": 900, "1": 539}
    assert report["shards"][0]["hot"] == [["item", 2**63 + 1, 0.034]]
    assert report["verdict"]["bound_by"] == "EmbeddingLookup"


def test_what_people_should_know_is_a_warning():
    assert shown(REMARK)[0]["level"] == "warning"


def test_what_is_not_printed_for_people_is_not_printed():
    assert shown(PROGRESS, AT_CUT, WRITTEN, TRAINER) == []


# --- as a command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    return write(tmp_path / "train.parquet", good_columns(2000), row_group_size=300)


def run(*arguments: object, environment: dict[str, str] | None = None) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
    """Exit status and the objects of both streams of the command."""
    found = subprocess.run(
        [sys.executable, "-m", "flowps.train", *command(*arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False, env={**os.environ, **(environment or {})},
    )  # fmt: skip
    return found.returncode, strict(found.stdout), strict(found.stderr)


def test_every_line_of_a_run_is_an_object(tmp_path, train_file):
    status, out, err = run(
        "--data.train", train_file, "--data.test", train_file, "--run_dir", tmp_path / "run", "--log-format", "json",
        "--ps.num_shards", 2, "--status.progress", "live", environment={"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (status, err) == (0, [])
    kinds = [of["event"] for of in out]
    assert {"Announcement", "Started", "Interval", "Evaluated", "StatusReport", "Finished"} <= set(kinds)
    assert kinds[0] == "Announcement"
    assert out[0]["message"].startswith("flowps ")
    # In the order of a text log, and with its numbers.
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    intervals = [of for of in out if of["event"] == "Interval"]
    assert [(of["step"], of["metrics"]) for of in intervals] == [
        (line["step"], line["metrics"]) for line in lines if line["type"] == "Interval"
    ]  # fmt: skip
    assert intervals[0]["message"].startswith("step 10, auc = ")
    (schema,) = [of for of in out if of.get("title") == "schema"]
    assert [row["column"] for row in schema["rows"]] == ["label", "price", "user", "tags"]
    assert any(of["message"].startswith("ledger: 2,000 read = 2,000 trained") for of in out)


@pytest.mark.parametrize(
    ("status", "arguments", "kind", "said"),
    [
        (2, ["--log-format=json"], "ConfigError", "error: data.train: no training data"),
        (1, ["--log_format", "json", "--data.train", "nothing.parquet"], "DataError", "error: data.train"),
        (2, ["--log-format", "json", "--data.batch_size", "none"], "ConfigError", "error: --data.batch_size"),
        (2, ["--no.such.knob", "1", "--log_format=json"], "ConfigError", "error: --no.such.knob: no such knob"),
        (2, ["run.toml"], "ConfigError", "error: data.batch_size"),
    ],
)
def test_a_refusal_is_an_object_on_standard_error(tmp_path, monkeypatch, capsys, status, arguments, kind, said):
    """Also where the knobs cannot be read, as far as it can be told what they ask for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text('log_format = "json"\n[data]\nbatch_size = 0\n')
    assert main(["--cluster.dashboard", "", *arguments]) == status
    out, err = capsys.readouterr()
    strict(out)
    (found,) = strict(err)
    assert (found["level"], found["event"], found["exit_status"]) == ("error", kind, status)
    assert found["message"].startswith(said)


@pytest.mark.parametrize("arguments", [[], ["--run_dir", "log_format json"], ["run.toml"], ["missing.toml"]])
def test_other_refusals_are_text(tmp_path, monkeypatch, capsys, arguments: Sequence[str]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text('log_format = "text"\n[data]\nbatch_size = 0\n')
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_bug_is_an_object_too(train_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_module, "train", lambda config: 1 / 0)
    assert main(command("--data.train", train_file, "--log-format", "json")) == 1
    (found,) = strict(capsys.readouterr().err)
    assert found["event"] == "ZeroDivisionError"
    assert found["message"] == "error: ZeroDivisionError('division by zero'); this is a bug of flowps"
    assert found["traceback"].startswith("Traceback")
    with pytest.raises(ZeroDivisionError):
        main(command("--data.train", train_file))


@pytest.mark.long
def test_a_stop_is_said_in_objects(tmp_path, train_file):
    arguments = command("--data.train", train_file, "--run_dir", tmp_path / "run", "--epochs", 1_000_000, "--log-format", "json")
    process = subprocess.Popen(
        [sys.executable, "-m", "flowps.train", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if json.loads(line)["event"] == "Interval":
                process.send_signal(signal.SIGTERM)
                break
        out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 130
    assert strict(said + out)[-1]["event"] == "Announcement"
    assert [(of["level"], of["event"]) for of in strict(err)] == [("warning", "Interrupted"), ("error", "StoppedError")]

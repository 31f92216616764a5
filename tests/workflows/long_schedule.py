"""The scheduler at work: missed starts, retries, a longest time, and a stop in good order. Minutes: `make test-long`."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import pytest
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.background import BackgroundScheduler

from tests.workflows.pipelines import Days
from workflows import retrainer as retrainer_module
from workflows import schedule as module
from workflows.ledger import LeaseError
from workflows.pipeline import Read, Schedule
from workflows.schedule import Retrainer, main, schedule, scheduler_of

pytestmark = pytest.mark.timeout(60)
BERLIN = ZoneInfo("Europe/Berlin")


# --- runs ----------------------------------------------------------------------------------------------------------------

RETRAIN = """
import pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
calls = folder / "calls"
count = len(calls.read_text().split()) if calls.exists() else 0
calls.open("a").write(f"{{time.time()}}\\n")
{body}
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A retraining of the test's own, in a process as the real one; how often it was called is in a file."""

    def make(body: str) -> None:
        script = tmp_path / "fake.py"
        script.write_text(RETRAIN.format(folder=str(tmp_path), body=body))
        popen = subprocess.Popen

        def start(command: list[str], **keywords: object) -> subprocess.Popen[bytes]:
            assert command[1:3] == ["-m", "workflows.retrain"]
            return popen([sys.executable, str(script)], **keywords)  # type: ignore[call-overload, no-any-return]

        monkeypatch.setattr(retrainer_module.subprocess, "Popen", start)

    return make


def times(folder: Path) -> list[float]:
    path = folder / "calls"
    return [float(of) for of in path.read_text().split()] if path.exists() else []


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it has not come to it"
        time.sleep(0.05)


def read_of(folder: Path, **knobs: object) -> Read:
    read = Days(folder).read()
    plan = msgspec.structs.replace(Schedule(cron="0 0 1 1 *"), **knobs)
    return dataclasses.replace(read, pipeline=msgspec.structs.replace(read.pipeline, schedule=plan))


class Running:
    """A scheduler on a thread of its own, as the command runs one."""

    def __init__(self, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.signal, "signal", lambda number, handler: None)
        self.retrainer: Retrainer | None = None
        real = module.scheduler_of

        def kept(read: Read, retrainer: Retrainer) -> object:
            self.retrainer = retrainer
            return real(read, retrainer)

        monkeypatch.setattr(module, "scheduler_of", kept)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=schedule, args=(read, self.stopped), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.stopped.set()
        if self.retrainer is not None:
            self.retrainer.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()


def start_now(read: Read, late_s: float = 1.0) -> None:
    """Let the kept job be due since a while ago, as if the scheduler had been down meanwhile."""
    scheduler_of(read, Retrainer(read)).shutdown()
    store = SQLAlchemyJobStore(url=f"sqlite:///{read.state / 'schedule.sqlite'}")
    store.start(BackgroundScheduler(), "default")
    job = store.lookup_job("cron")
    job.next_run_time = datetime.now(read.zone) - timedelta(seconds=late_s)
    store.update_job(job)
    store.shutdown()


def test_a_start_that_was_missed_is_made_up_for_once(
    tmp_path: Path, calls: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls("")
    read = read_of(tmp_path, cron="* * * * *", misfire_grace_s=3600.0)
    start_now(read, late_s=600)
    running = Running(read, monkeypatch)
    until(lambda: len(times(tmp_path)) == 1)
    time.sleep(0.5)
    running.stop()
    assert len(times(tmp_path)) <= 2, "ten were missed, one is made up for; a minute may have begun meanwhile"


def test_a_start_that_is_too_late_is_left_out(
    tmp_path: Path, calls: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls("")
    read = read_of(tmp_path, misfire_grace_s=5.0)
    start_now(read, late_s=600)
    running = Running(read, monkeypatch)
    time.sleep(1.0)
    running.stop()
    assert times(tmp_path) == []


def test_another_cron_takes_the_place_of_the_kept_one(tmp_path: Path) -> None:
    first = scheduler_of(read_of(tmp_path, cron="0 0 1 1 *"), Retrainer(read_of(tmp_path)))
    assert first.get_job("cron").next_run_time.strftime("%m-%d %H") == "01-01 00"
    first.shutdown()
    second = scheduler_of(read_of(tmp_path, cron="0 5 2 2 *"), Retrainer(read_of(tmp_path)))
    assert second.get_job("cron").next_run_time.strftime("%m-%d %H") == "02-02 05"
    second.shutdown()


def test_a_failure_is_tried_again_after_twice_as_long_each_time(
    tmp_path: Path, calls: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls("sys.exit(1 if count < 2 else 0)")
    read = read_of(tmp_path, retries=3, backoff_s=0.5)
    start_now(read)
    running = Running(read, monkeypatch)
    until(lambda: len(times(tmp_path)) == 3)
    time.sleep(1.0)
    running.stop()
    found = times(tmp_path)
    assert len(found) == 3
    assert found[1] - found[0] >= 0.5
    assert found[2] - found[1] >= 1.0
    said = capfd.readouterr().out
    assert "the retraining ended with status 1; retry 1 of 3 in 0 s" in said
    assert "retry 2 of 3 in 1 s" in said


def test_retries_end(
    tmp_path: Path, calls: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls("sys.exit(1)")
    read = read_of(tmp_path, retries=1, backoff_s=0.1)
    start_now(read)
    running = Running(read, monkeypatch)
    until(lambda: len(times(tmp_path)) == 2)
    time.sleep(0.7)
    running.stop()
    assert len(times(tmp_path)) == 2
    assert "ended with status 1, after 1 retries; the next start is by the clock" in capfd.readouterr().out


@pytest.mark.parametrize(("status", "said"), [(2, "ended with status 2, after 0 retries"), (3, "another retraining is at work")])
def test_what_another_try_does_not_mend_is_not_tried_again(
    tmp_path: Path,
    calls: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    status: int,
    said: str,
) -> None:
    calls(f"sys.exit({status})")
    read = read_of(tmp_path, retries=3, backoff_s=0.1)
    start_now(read)
    running = Running(read, monkeypatch)
    until(lambda: len(times(tmp_path)) == 1)
    time.sleep(0.7)
    running.stop()
    assert len(times(tmp_path)) == 1
    assert said in capfd.readouterr().out


def test_a_retry_survives_a_restart(tmp_path: Path, calls: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    calls("sys.exit(1 if count < 1 else 0)")
    read = read_of(tmp_path, retries=3, backoff_s=2.0)
    start_now(read)
    running = Running(read, monkeypatch)
    until(lambda: len(times(tmp_path)) == 1)
    time.sleep(0.4)
    running.stop()
    monkeypatch.undo()
    calls("sys.exit(1 if count < 1 else 0)")
    again = Running(read, monkeypatch)
    until(lambda: len(times(tmp_path)) == 2)
    again.stop()


def test_one_that_takes_too_long_is_stopped_in_good_order(
    tmp_path: Path, calls: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls("""
def save(number, frame):
    (folder / "saved").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
time.sleep(30)
""")
    read = read_of(tmp_path, max_runtime_s=1.5)
    start_now(read)
    running = Running(read, monkeypatch)
    until((tmp_path / "saved").exists)
    time.sleep(0.3)
    running.stop()
    assert len(times(tmp_path)) == 1, "it is no failure to try again at once"
    assert "took longer than schedule.max_runtime_s" in capfd.readouterr().out


def test_a_second_scheduler_is_refused(tmp_path: Path, calls: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    calls("")
    read = read_of(tmp_path)
    running = Running(read, monkeypatch)
    until(lambda: running.retrainer is not None)
    with pytest.raises(LeaseError, match="another scheduler is at work on this pipeline"):
        schedule(read, threading.Event())
    running.stop()


@pytest.mark.parametrize("signals", [1, 2])
def test_the_command_stops_in_good_order(tmp_path: Path, signals: int) -> None:
    """A signal reaches the retraining, which saves what it has; the second one does not wait for it."""
    read = read_of(tmp_path)
    start_now(read)
    site = tmp_path / "site"
    site.mkdir()
    fake = RETRAIN.format(folder=str(tmp_path), body=f"wait_s = {30 if signals == 2 else 0.2}" + """
def save(number, frame):
    (folder / "asked").touch()
    time.sleep(wait_s)
    (folder / "saved").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
(folder / "begun").touch()
time.sleep(30)
""")  # fmt: skip
    (tmp_path / "fake.py").write_text(fake)
    (site / "sitecustomize.py").write_text(
        f"import sys, runpy\nif sys.orig_argv[1:3] == ['-m', 'workflows.retrain']:\n"
        f"    runpy.run_path({str(tmp_path / 'fake.py')!r}, run_name='__main__'); sys.exit(0)\n"
    )
    path = tmp_path / "pipeline.toml"
    path.write_text(path.read_text() + '\n[schedule]\ncron = "0 0 1 1 *"\n')
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(Path(__file__).resolve().parents[2])])}
    command = subprocess.Popen([sys.executable, "-m", "workflows.schedule", str(path)], env=env, stdout=subprocess.PIPE, text=True)
    try:
        until((tmp_path / "begun").exists)
        command.send_signal(signal.SIGTERM)
        until((tmp_path / "asked").exists)
        if signals == 2:
            command.send_signal(signal.SIGTERM)
        out, _ = command.communicate(timeout=20)
    finally:
        command.kill()
    assert command.returncode == 0
    assert (tmp_path / "saved").exists() == (signals == 1)
    assert "next cron start: " in out
    assert out.rstrip().endswith("stopped")


def test_a_pipeline_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.toml")]) == 2
    assert "no such file" in capsys.readouterr().err

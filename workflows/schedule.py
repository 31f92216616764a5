"""Retrain by the clock: `python -m workflows.schedule pipeline.toml`.

For those who have no scheduler: begins `python -m workflows.retrain` whenever `schedule.cron` says so, one at a time, until it is
stopped. A start that was missed, because this command was down, is made up for once, if it is not later than
`schedule.misfire_grace_s`; one that comes while a retraining is going on is left out, for the next takes all slots that are due. A
retraining that fails is begun again after `schedule.backoff_s`, then after twice as long; one that takes longer than
`schedule.max_runtime_s` is stopped. When the next start is, and which retry, survives a restart: it is in the pipeline's `state`.

Ctrl-C and SIGTERM let a retraining save what it has, and end; a second one does not wait for it.

Exit status: 0 stopped, 2 a bad pipeline, 3 another scheduler is at work on it.
"""

from __future__ import annotations

import argparse
import fcntl
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger

from flowps.arguments import run_command
from flowps.errors import ConfigError, RunDirError
from workflows.ledger import LeaseError
from workflows.pipeline import Read, Schedule, read_pipeline, zone_of
from workflows.retrainer import Retrainer, retrainers, run_job

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_CRON = "cron"  # name of the job
_LOOK_S = 5.0


def trigger_of(knobs: Schedule) -> CronTrigger:
    """What `knobs.cron` means. Raises ConfigError."""
    expected = f"schedule.cron: {knobs.cron!r}: expected minute hour day month weekday, as in 15 * * * *"
    fields = knobs.cron.split()
    if len(fields) != 5:
        raise ConfigError(f"{expected}; found {len(fields)} fields")
    minute, hour, day, month, weekday = fields
    if day != "*" and weekday != "*":
        raise ConfigError(f"{expected}; of day and weekday one must be *: cron means either of them, which no one expects")
    try:
        return CronTrigger(
            minute=minute, hour=hour, day=day, month=month, day_of_week=_weekdays(weekday), timezone=zone_of(knobs.time_zone),
            jitter=knobs.jitter_s or None,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"{expected}: {error}") from None


def _weekdays(field: str) -> str:
    """cron's weekdays, where 0 and 7 are Sunday, by their names: the library counts from Monday."""
    days = list[str]()
    for part in field.lower().split(","):
        values, slash, step = part.partition("/")
        if values == "*" and not slash:
            return "*"
        first, dash, last = ("0", "-", "6") if values == "*" else values.partition("-")
        numbers = [_DAYS.index(of) if of in _DAYS else int(of) for of in ([first, last] if dash else [first])]
        if not all(0 <= number <= 7 for number in numbers) or numbers[0] > numbers[-1] or (slash and int(step) < 1):
            raise ValueError(f"weekday {part!r}")
        days += [_DAYS[number % 7] for number in range(numbers[0], numbers[-1] + 1, int(step) if slash else 1)]
    return ",".join(sorted(set(days), key=_DAYS.index))


def scheduler_of(read: Read, retrainer: Retrainer) -> BackgroundScheduler:
    """A scheduler with the pipeline's jobs, those that were kept in its state among them; not started."""
    knobs, key = read.pipeline.schedule, str(read.path)
    trigger = trigger_of(knobs)
    read.state.mkdir(parents=True, exist_ok=True)
    scheduler = BackgroundScheduler(
        jobstores={"default": SQLAlchemyJobStore(url=f"sqlite:///{read.state / 'schedule.sqlite'}")},
        executors={"default": ThreadPoolExecutor(1)},
        job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": max(1, round(knobs.misfire_grace_s))},
        timezone=read.zone,
    )
    retrainers[key], retrainer.scheduler = retrainer, scheduler
    scheduler.start(paused=True)
    # Adding a job anew would forget a start that was missed: it is kept while it means the same.
    meaning = f"{knobs.cron} {knobs.time_zone} {knobs.jitter_s} {knobs.misfire_grace_s} {key}"
    kept = scheduler.get_job(_CRON)
    if kept is None or kept.name != meaning:
        scheduler.add_job(run_job, trigger, (key,), id=_CRON, name=meaning, replace_existing=True)
    return scheduler


@contextmanager
def _only_one(read: Read) -> Iterator[None]:
    read.state.mkdir(parents=True, exist_ok=True)
    with (read.state / "schedule.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LeaseError(f"{read.state}: another scheduler is at work on this pipeline") from None
        yield


def schedule(read: Read, stopped: threading.Event) -> None:
    """Run until `stopped`, and then until the retraining that is going on has ended."""
    with _only_one(read):
        retrainer = Retrainer(read)
        scheduler = scheduler_of(read, retrainer)

        def stop(number: int, frame: Any) -> None:
            stopped.set()
            retrainer.stop()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for job in scheduler.get_jobs():
                retrainer.say(f"next {job.id} start: {job.next_run_time:%Y-%m-%d %H:%M:%S %Z}")
            scheduler.resume()
            while not stopped.wait(_LOOK_S):
                if not scheduler._thread.is_alive():  # it ends where its jobs cannot be kept
                    raise RunDirError(f"{read.state / 'schedule.sqlite'}: the scheduler has ended; is the disk full?")
        finally:
            scheduler.shutdown(wait=True)
            for number, handler in before.items():
                signal.signal(number, handler)
            retrainers.pop(str(read.path), None)
        retrainer.say("stopped")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m workflows.schedule", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path, metavar="PIPELINE", help="the pipeline's TOML file")
    options = parser.parse_args(argv)
    return run_command(lambda: schedule(read_pipeline(options.pipeline), threading.Event()))


if __name__ == "__main__":
    sys.exit(main())

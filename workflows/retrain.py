"""Retrain on what is new: `python -m workflows.retrain pipeline.toml [--until SLOT] [--backfill FROM TO] [--dry-run]`.

Takes every slot that is ready and not yet trained, in order of time, through the steps: check its samples, measure the live model
on it, train on from the live model, compare both on the fixed set, then publish the new model or reject it. Slots are named by
time, as in 2024-09-21T14, or 2024-09-21 for all of a day. A command that was killed goes on where it was; one that finds nothing
new does nothing; two at once on one pipeline are refused.

    python -m workflows.retrain ctr.toml
    python -m workflows.retrain ctr.toml --until 2024-09-21T14
    python -m workflows.retrain ctr.toml --backfill 2024-09-01 2024-09-07 --again
    python -m workflows.retrain ctr.toml --dry-run

Exit status: 0 nothing is left to do, 1 a failure, 2 a bad pipeline, 3 another command is at work, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flowps.arguments import run_command
from flowps.errors import FlowpsError, OutputError, RunDirError, StoppedError
from flowps.hub.partition import list_files
from flowps.status.progress import PlainConsole
from workflows.attempt import Around, go, prune
from workflows.ledger import Attempt, Kind, Ledger
from workflows.notify import tell
from workflows.pipeline import Read, read_pipeline
from workflows.slots import File, Found, Slot, find
from workflows.store import Registry


@dataclass(frozen=True)
class Wanted:
    """Which slots: from `first` to `last` (None: no bound), and whether those that were trained are trained anew."""

    first: Slot | None = None
    last: Slot | None = None
    again: bool = False

    def has(self, slot: Slot) -> bool:
        """Whether it is one of them."""
        return (self.first is None or self.first <= slot) and (self.last is None or slot <= self.last)


@dataclass(frozen=True)
class Due:
    """What is to be trained of a slot."""

    slot: Slot
    kind: Kind
    files: tuple[File, ...]


def retrain(read: Read, wanted: Wanted, console: Console) -> list[Attempt]:
    """Train all slots that are due, and what was begun before; the attempts that have ended. Raises FlowpsError."""

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    ended: list[Attempt] = []
    with closing(Ledger(read.state)) as ledger, closing(ledger.lease(read.pipeline.lease_s)) as lease:
        list_files(read.pipeline.gate.fixed, "gate.fixed")  # its lack is no fault of a slot
        registry = Registry(read.registry)
        registry.prepare()
        if not registry.live() and any(of.status == "published" for of in ledger.attempts()):
            raise RunDirError(
                f"{read.registry}: has no live model, but the ledger says that models were published: is it the right "
                "registry, and there? A model that is there is made live with python -m workflows.registry promote"
            )
        around = Around(read, ledger, registry, lease, console, partial(tell, read.pipeline.notify, say))
        if wanted.again and wanted.first is not None and wanted.last is not None:
            ledger.request(wanted.first.name, wanted.last.name)
        while (attempt := _next(around, wanted)) is not None:
            try:
                ended.append(go(around, *attempt))
            except StoppedError:
                raise
            except FlowpsError as error:
                around.tell("failed", {"slot": attempt[0].slot, "attempt": attempt[0].id, "why": str(error)})
                raise
            prune(around)
        live = registry.live()
    done = Counter(of.status for of in ended)
    say(", ".join(f"{count} {status}" for status, count in done.items()) or "nothing is due")
    say(f"live model: {live or 'none yet'}")
    return ended


def _next(around: Around, wanted: Wanted) -> tuple[Attempt, tuple[File, ...]] | None:
    """The attempt that was begun, or a new one of the first slot that is due, with its files; None: nothing is."""
    ledger = around.ledger
    begun = ledger.running()
    if begun is not None:
        around.say(f"{begun.slot}: going on with attempt {begun.id}")
        files = () if ledger.result(begun, "files") is not None else _files_of(around, begun)
        return begun, files
    due = next(due_slots(around.read, ledger, wanted), None)
    if due is None and ledger.requested() is not None:
        ledger.close_request()
        return _next(around, wanted)
    if due is None:
        return None
    attempt = ledger.begin(due.slot.name, due.kind, around.registry.live())
    around.say(f"{due.slot}: {due.kind}, {len(due.files)} file(s); the live model is {attempt.base or 'none yet'}")
    if due.kind in ("late", "more"):
        around.tell("late", {"slot": attempt.slot, "kind": attempt.kind, "attempt": attempt.id})
    return attempt, due.files


def _files_of(around: Around, attempt: Attempt) -> tuple[File, ...]:
    """What an attempt would be begun with now: it was killed before it had taken its files."""
    found = next(
        (of for of in _found(around.read, around.read.pattern.parse(attempt.slot).begins) if of.slot.name == attempt.slot), None
    )
    if found is None:
        return ()
    known = around.ledger.known(attempt.slot) if attempt.kind == "more" else {}
    return tuple(file for file in found.files if file.url not in known)


def due_slots(read: Read, ledger: Ledger, wanted: Wanted) -> Iterator[Due]:
    """The slots that are due, in order of time; those that were asked for anew first."""
    ended: dict[str, int] = {}  # slot → its last attempt that has ended
    for attempt in ledger.attempts():
        if attempt.status not in ("running", "superseded"):
            ended[attempt.slot] = attempt.id
    request = ledger.requested()
    found = [of for of in _found(read, _since(read, ledger, wanted)) if of.is_ready]
    if request is not None:
        first, last = read.pattern.parse(request.first), read.pattern.parse(request.last)
        for of in found:
            if first <= of.slot <= last and ended.get(of.slot.name, 0) <= request.since:
                yield Due(of.slot, "again", of.files)
        return
    newest = max((read.pattern.parse(name) for name in ended), default=None)
    for of in found:
        if not wanted.has(of.slot):
            continue
        if of.slot.name not in ended:
            yield Due(of.slot, "late" if newest is not None and of.slot < newest else "new", of.files)
            continue
        known = ledger.known(of.slot.name)
        if more := tuple(file for file in of.files if file.url not in known):
            yield Due(of.slot, "more", more)


def changed(found: Sequence[Found], ledger: Ledger) -> dict[str, list[str]]:
    """slot → its files that were trained, and have been written anew since: nothing is done about them by itself."""
    changed: dict[str, list[str]] = {}
    for of in found:
        known = ledger.known(of.slot.name)
        then = {url: (file.size, file.modified) for url, file in known.items()}
        urls = [file.url for file in of.files if then.get(file.url, (file.size, file.modified)) != (file.size, file.modified)]
        if urls:
            changed[of.slot.name] = urls
    return changed


def _since(read: Read, ledger: Ledger, wanted: Wanted) -> datetime:
    """Slots that begin before are not looked at: there may be years of them."""
    request, knobs = ledger.requested(), read.pipeline.partitions
    if request is not None:
        return read.pattern.parse(request.first).begins
    if wanted.first is not None:
        return wanted.first.begins
    begins = read.pattern.parse(knobs.first).begins if knobs.first else datetime.min
    newest = max((read.pattern.parse(of.slot).begins for of in ledger.attempts() if of.status != "running"), default=None)
    return begins if newest is None else max(begins, newest - timedelta(seconds=knobs.late_s))


def _found(read: Read, since: datetime) -> list[Found]:
    knobs = read.pipeline.partitions
    return find(knobs.root, read.pattern, read.zone, knobs.marker, knobs.min_age_s, time.time(), since)


def give_up(read: Read, console: Console) -> None:
    """Reject the attempt that was begun and has not ended: one that fails in the same way at every start."""
    with closing(Ledger(read.state)) as ledger, closing(ledger.lease(read.pipeline.lease_s)):
        attempt = ledger.running()
        if attempt is None:
            console.print("nothing was begun", soft_wrap=True)
            return
        ledger.end(attempt, "rejected", "given up by hand")
        console.print(f"{attempt.slot}: given up; --backfill {attempt.slot} {attempt.slot} --again trains it anew", soft_wrap=True)


def show_plan(read: Read, wanted: Wanted, console: Console) -> None:
    """What `retrain` would do now."""
    with closing(Ledger(read.state)) as ledger:
        due = {of.slot.name: of for of in due_slots(read, ledger, wanted)}
        last = {attempt.slot: attempt for attempt in ledger.attempts()}
        found = _found(read, _since(read, ledger, wanted))
        others = changed(found, ledger)
        table = Table("slot", "files", "now", "would be done", title_justify="left")
        for of in found:
            name, attempt = of.slot.name, last.get(of.slot.name)
            now = of.waits_for and f"waits {of.waits_for}"
            now = attempt.status if attempt is not None else now or "ready"
            if attempt is not None and attempt.version:
                now += f" as model {attempt.version}"
            if name in others:
                now += f", {len(others[name])} file(s) changed since"
            plan = "goes on" if attempt is not None and attempt.status == "running" else ""
            if name in due and not plan:
                plan = f"train ({due[name].kind}, {len(due[name].files)} file(s))"
            table.add_row(name, str(len(of.files)), now, plan)
        console.print(table)
    console.print(f"live model: {Registry(read.registry).live() or 'none yet'}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m workflows.retrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path, metavar="PIPELINE", help="the pipeline's TOML file")
    parser.add_argument("--until", metavar="SLOT", help="leave later slots alone")
    parser.add_argument("--backfill", nargs=2, metavar=("FROM", "TO"), help="these slots, also before partitions.first")
    parser.add_argument("--again", action="store_true", help="with --backfill: also those that were trained")
    parser.add_argument("--give-up", action="store_true", help="first reject the slot that was begun and has not come to its end")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    options = parser.parse_args(argv)
    if options.again and not options.backfill:
        parser.error("--again: say which slots with --backfill FROM TO")
    if options.until and options.backfill:
        parser.error("--until and --backfill: give one; --backfill has its own end")
    read = read_pipeline(options.pipeline)
    last = options.backfill[1] if options.backfill else options.until
    wanted = Wanted(
        read.pattern.parse(options.backfill[0]) if options.backfill else None,
        read.pattern.last(last) if last else None,
        options.again,
    )
    console = PlainConsole()
    if wanted.first is not None and wanted.last is not None and wanted.last < wanted.first:
        parser.error(f"--backfill: {options.backfill[1]} comes before {options.backfill[0]}")
    try:
        if options.give_up:
            give_up(read, console)
        if options.dry_run:
            show_plan(read, wanted, console)
        else:
            retrain(read, wanted, console)
    except sqlite3.Error as error:
        raise RunDirError(f"{read.state / 'ledger.sqlite'}: {error}; is the disk full?") from error
    except OSError as error:
        raise OutputError(f"{error.filename or read.state}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())

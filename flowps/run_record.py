"""`RunRecord`: what a run directory holds, read back for people: knobs, status, metrics, placement, the end.

Covers reading and what can be worked out of one run's files; `cluster.run_dir` writes them. Called by the commands `report` and
`compare` and by `picture`. A run that is still going, or has failed, is read as far as it went: a last line that is not whole yet
does not count. Long files are read line by line, and `compare` needs only the end of them.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from flowps.checkpoint.ledger import Ledger
from flowps.cluster.run_dir import CHECKPOINTS, Summary, read_placement
from flowps.cluster.shard_report import PlacementReport
from flowps.errors import RunDirError
from flowps.status.event import Event, Interval, StatusReport
from flowps.status.figures import Usage

MAIN_STAGES = ("ReadSample", "EmbeddingLookup", "PushGrad", "TrainStep")
"""What people look at first."""

_WARM_STEPS = 20  # compiling and the first pages of the tables, as in `trainer.hook`
_BLOCK_BYTES = 1 << 16
_MAY_BE_NAN = ("logloss", "prob_mean", "real_mean", "steps_per_s", "examples_per_s")  # written as null
T = TypeVar("T")


class Ending(Summary):
    """What is read back of summary.json; all but `finished` may be missing in one that is older."""

    rows: int = 0
    best_auc: float | None = None
    ledger: Ledger | None = None


class _Spent(msgspec.Struct, tag="StatusReport"):
    """Of a status report, what processes had used."""

    seconds: float
    step: int
    usage: list[Usage] = []


@dataclass(frozen=True)
class RunRecord:
    """One run.

    knobs    path → value, `slot.NAME.key` for those of one slot
    last     the last status report; None: it has not made one
    ending   None: it has not finished, or failed
    """

    path: Path
    toml: str
    knobs: dict[str, Any]
    last: StatusReport | None
    ending: Ending | None

    @property
    def name(self) -> str:
        """Of its directory."""
        return self.path.resolve().name or str(self.path)

    @property
    def steps(self) -> int:
        """That were trained."""
        return self.ending.finished.steps if self.ending is not None else self.last.step if self.last is not None else 0

    @property
    def rows(self) -> int:
        """Embedding rows in the end, or when the shards were last asked."""
        if self.ending is not None:
            return self.ending.rows
        return sum(shard.rows for shard in self.last.shards) if self.last is not None else 0

    @cached_property
    def examples_per_s(self) -> float | None:
        """In steady state; of a run without an end from its metric lines but the first. None: it did not come so far."""
        if self.ending is not None:
            return self.ending.finished.steady_examples_per_s or None
        intervals = [event for event in self.events() if isinstance(event, Interval)][1:]
        seconds = sum(seconds_of(event) for event in intervals)
        return sum(event.metrics.examples for event in intervals) / seconds if seconds else None

    @property
    def cpu_s_per_million(self) -> float | None:
        """CPU seconds of all processes per million examples, from the first report after the first steps to the last.

        None with fewer than two such reports. Processes that were replaced between them are left out.
        """
        began: _Spent | None = None
        now: _Spent | None = None
        for spent in _lines(self.path / "status.jsonl", _Spent):
            if now is not None and spent.seconds < now.seconds:
                began = None  # the run has begun again, from a checkpoint
            now = spent
            if began is None and spent.step >= _WARM_STEPS:
                began = spent
        if began is None or now is None or now.step <= began.step:
            return None
        earlier = {of.process: of.cpu_s for of in began.usage}
        cpu_s = sum(of.cpu_s - earlier[of.process] for of in now.usage if of.process in earlier)
        examples = (now.step - began.step) * self.knobs.get("data.batch_size", 0) * self.knobs.get("trainer.count", 1)
        return cpu_s / examples * 1e6 if cpu_s and examples else None

    @property
    def version(self) -> str | None:
        """Of flowps, that wrote the newest checkpoint in the run directory; None: there is none."""
        manifests = sorted((self.path / CHECKPOINTS).glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
        if not manifests:
            return None
        try:
            return str(msgspec.json.decode(manifests[-1].read_bytes())["manifest"]["flowps"])
        except (OSError, msgspec.MsgspecError, LookupError, TypeError):
            return None  # what is wrong with a checkpoint, others say

    def placement(self) -> PlacementReport | None:
        """None if the run ended before there was one. Raises RunDirError."""
        return read_placement(self.path) if (self.path / "placement.json").exists() else None

    def events(self) -> Iterator[Event]:
        """What metrics.jsonl holds. Raises RunDirError."""
        return _lines(self.path / "metrics.jsonl", Event)  # type: ignore[arg-type]

    def reports(self) -> Iterator[tuple[float, StatusReport]]:
        """All status reports, each after the seconds that the run had lasted, in all its attempts. Raises RunDirError."""
        before = earlier = 0.0
        for report in _lines(self.path / "status.jsonl", StatusReport):
            if report.seconds < before:
                earlier += before
            before = report.seconds
            yield earlier + report.seconds, report


def read_run(folder: Path) -> RunRecord:
    """The run in `folder`. Raises RunDirError where there is none, or where another version's files are."""
    toml = _read(folder / "config.toml").decode("utf-8", "replace")
    try:
        knobs = dict(_flat(tomllib.loads(toml), ""))
    except tomllib.TOMLDecodeError as error:
        raise RunDirError(f"{folder / 'config.toml'}: is no file of this version of flowps: {error}") from None
    summary, status = folder / "summary.json", folder / "status.jsonl"
    return RunRecord(
        folder, toml, knobs,
        _decoded(line, StatusReport, status) if (line := _last_line(status)) else None,
        _decoded(_read(summary), Ending, summary) if summary.exists() else None,
    )  # fmt: skip


def names_of(records: Sequence[RunRecord]) -> list[str]:
    """For each run the shortest end of its path that no other has."""
    paths = [record.path.resolve() for record in records]
    longest = max(len(path.parts) for path in paths)
    for length in range(1, longest + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [name if names.index(name) == k else f"{name} ({names[: k + 1].count(name)})" for k, name in enumerate(names)]


def stages_of(records: Sequence[RunRecord]) -> list[str]:
    """The trainers' stages of any run: those of MAIN_STAGES first, the others in the order in which a batch passes them."""
    passed = sorted((record.last.stages for record in records if record.last is not None), key=len, reverse=True)
    found = {name: None for stages in passed for name in stages}
    return [name for name in MAIN_STAGES if name in found] + [name for name in found if name not in MAIN_STAGES]


def seconds_of(interval: Interval) -> float:
    """How long an interval took; 0 if its rate says nothing."""
    rate = interval.examples_per_s
    return interval.metrics.examples / rate if rate > 0 else 0.0


def _flat(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif key == "slot" and isinstance(value, list):
            for entry in value:
                yield from _flat({k: v for k, v in entry.items() if k != "name"}, f"slot.{entry.get('name')}.")
        else:
            yield f"{prefix}{key}", value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _lines(path: Path, kind: type[T]) -> Iterator[T]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):  # or it is still being written
                    yield _decoded(line, kind, path, number)
    except OSError as error:
        raise _unreadable(path, error) from None


def _last_line(path: Path) -> bytes:
    """The last whole line; empty if there is none."""
    try:
        with path.open("rb") as file:
            start, tail = file.seek(0, os.SEEK_END), b""
            while start and tail.count(b"\n") < 2:
                size = min(start, _BLOCK_BYTES)
                start -= size
                file.seek(start)
                tail = file.read(size) + tail
    except OSError as error:
        raise _unreadable(path, error) from None
    return tail[: tail.rfind(b"\n") + 1].rstrip(b"\n").rpartition(b"\n")[2]


def _decoded(content: bytes, kind: type[T], path: Path, line: int | None = None) -> T:
    try:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.ValidationError:
            return msgspec.convert(_with_nan(msgspec.json.decode(content)), kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        where = path if line is None else f"{path}, line {line}"
        raise RunDirError(f"{where}: is no file of this version of flowps: {error}") from None


def _with_nan(tree: Any) -> Any:
    """NaN where it was written as null."""
    if isinstance(tree, dict):
        return {key: float("nan") if value is None and key in _MAY_BE_NAN else _with_nan(value) for key, value in tree.items()}
    return [_with_nan(value) for value in tree] if isinstance(tree, list) else tree


def _unreadable(path: Path, error: OSError) -> RunDirError:
    return RunDirError(f"{path}: cannot be read: {error.strerror or error}; is this the directory of a run?")

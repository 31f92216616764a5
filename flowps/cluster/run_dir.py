"""`RunDir`: what a run leaves on disk.

config.toml     the resolved config; `python -m flowps.train RUN_DIR/config.toml` runs it again
schema.json     columns, slots, hash: what the rows mean
metrics.jsonl   one line per interval, evaluation, checkpoint and remark
status.jsonl    one line per status report
model.keras     the dense model
embeddings/     one Parquet file per slot
placement.json  which slots are on which shard, the load that was expected of each and, in the end, the load there was
summary.json    the end of the run: figures, paths and the ledger
checkpoints/    the run as it was at some moments, to go on from; unless checkpoint.url names another place
previous/       what an earlier run left there, until this one has finished

The directory is locked while a run uses it: two at once would leave a mixture.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from flowps.cluster.shard_report import PlacementReport
from flowps.config import Config
from flowps.errors import RunDirError
from flowps.hub.schema import Schema
from flowps.knob import dump
from flowps.status.event import Evaluated, Event, Finished, Interval, Metrics, Remark, Saved, Started, StatusReport

_PLACEMENT, _SUMMARY = "placement.json", "summary.json"
CHECKPOINTS = "checkpoints"
T = TypeVar("T")


class Summary(msgspec.Struct):
    """What is read back of summary.json."""

    finished: Finished
    test: Metrics | None = None
    more: dict[str, Metrics] = {}
    checkpoint: str = ""


def read_placement(folder: Path) -> PlacementReport:
    """What the run in `folder` has written of its placement. Raises RunDirError."""
    return _read(folder / _PLACEMENT, PlacementReport)


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read: {error.strerror or error}; is this the directory of a run?") from None
    except msgspec.MsgspecError as error:
        raise RunDirError(f"{path}: is no file of this version of flowps: {error}") from None


class RunDir:
    """The directory of one run, created or taken over by `prepare`, and held until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = path / "model.keras"
        self.embeddings = path / "embeddings"
        self.summary = path / _SUMMARY
        self.checkpoints = path / CHECKPOINTS
        self.previous = path / "previous"
        self._aside = path / "previous.unfinished"
        self._config, self._schema = path / "config.toml", path / "schema.json"
        self._placement = path / _PLACEMENT
        self._metrics, self._status = path / "metrics.jsonl", path / "status.jsonl"
        self._lock: int | None = None

    def prepare(self, config: Config, schema: Schema, goes_on: bool = False) -> bool:
        """Create the directory, or take it over from an earlier run with the same schema. Returns whether `previous` has results.

        What an earlier run trained is kept in `previous/` until this run has finished; of one that `goes_on`, everything stays.
        Raises RunDirError when the directory cannot be written, is in use by another run, holds something that is no run, or a run
        with another schema.
        """
        try:
            if os.path.lexists(self.path) and not self.path.is_dir():
                raise RunDirError(f"run directory {self.path}: is a file; choose another with --run_dir")
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if self._check_earlier(schema) and not goes_on:
                self._put_aside()
            self._config.write_text(dump(config), encoding="utf-8")
            self._schema.write_text(json.dumps(schema.to_json(), indent=2) + "\n", encoding="utf-8")
            for path in (self._metrics, self._status):
                path.touch()
        except OSError as error:
            raise RunDirError(
                f"run directory {self.path}: cannot be written: {error.strerror or error}; choose another with --run_dir"
            ) from None
        return self.previous.exists()

    def close(self) -> None:
        """Let other runs have the directory. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RunDirError(
                f"run directory {self.path}: another run is using it; wait until that has ended, or choose another with --run_dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # A file system without locks, over a network: the run goes on without one.

    def record(self, event: Event) -> None:
        """Append an event to the file it belongs to."""
        if isinstance(event, StatusReport):
            self._append(self._status, msgspec.to_builtins(event))
        elif isinstance(event, Started | Interval | Saved | Remark | Evaluated | Finished):
            self._append(self._metrics, msgspec.to_builtins(event))

    def place(self, report: PlacementReport) -> None:
        """Write what is known of the placement so far."""
        self._write(self._placement, report)

    def check_model(self) -> None:
        """Raise RunDirError if the trainer's worker has written to another disk."""
        if not self.model.exists():
            raise RunDirError(
                f"{self.model}: the trainer's worker has written it, but it is not on this machine; give a run directory "
                "(--run_dir) on a file system that all machines share"
            )

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, last, and give up what the earlier run left."""
        self._write(self.summary, summary)
        shutil.rmtree(self.previous, ignore_errors=True)

    def _put_aside(self) -> None:
        """Move what the earlier run trained to `previous/`, its own `previous/` too; of one that trained nothing, nothing stays."""
        left = [
            self.model,
            self.summary,
            self.embeddings,
            self._config,
            self._metrics,
            self._status,
            self._placement,
            self.checkpoints,
            self.previous,
            self._schema,
        ]
        if not self._aside.exists():  # or an interrupted move is taken up again
            if not self._has_trained:
                for path in left:
                    if path == self.checkpoints:
                        shutil.rmtree(path, ignore_errors=True)
                    elif path != self.previous:
                        path.unlink(missing_ok=True)
                return
            self._aside.mkdir()
        for path in left:
            if path.exists():
                path.rename(self._aside / path.name)
        self._aside.rename(self.previous)

    @property
    def _has_trained(self) -> bool:
        """Whether the last run here has come as far as to leave something."""
        saved = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        return saved or any(path.exists() for path in (self.model, self.summary, self.embeddings))

    def _check_earlier(self, schema: Schema) -> bool:
        if not any(self.path.iterdir()):
            return False
        try:
            # While results are put aside, and until the new schema is written, it stands with them.
            places = (self._schema, self._aside / self._schema.name, self.previous / self._schema.name)
            schema_file = next((path for path in places if path.exists()), self._schema)
            found = json.loads(schema_file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("not an object")
        except (OSError, ValueError):
            raise RunDirError(
                f"run directory {self.path}: holds files but no readable schema.json, so it is no run of flowps; "
                "choose another with --run_dir"
            ) from None
        # By way of JSON, so that tuples and lists compare.
        wanted = json.loads(json.dumps(schema.to_json()))
        differs = difference(found, wanted)
        if differs and (self._has_trained or self._aside.exists() or self.previous.exists()):
            raise RunDirError(
                f"run directory {self.path}: holds a run with another schema ({differs}); "
                "choose another with --run_dir, or make the schemas equal"
            )
        return True

    @staticmethod
    def _write(path: Path, content: object) -> None:
        """Whole or not at all."""
        unfinished = path.with_suffix(".unfinished")
        try:
            unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
            unfinished.rename(path)
        except OSError as error:
            raise RunDirError(f"{path}: cannot be written: {error.strerror or error}") from None

    @staticmethod
    def _append(path: Path, line: dict[str, Any]) -> None:
        # msgspec writes NaN as null, which JSON readers accept.
        try:
            with path.open("ab") as file:
                file.write(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            raise RunDirError(f"{path}: cannot be written: {error.strerror or error}") from None


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first thing that makes the rows or the model of two runs different, in words; learning rates and bounds do not."""
    for key in ("label", "dense", "hash"):
        if found.get(key) != wanted[key]:
            return f"{key}: {found.get(key)!r} there, {wanted[key]!r} now"
    labels = found.get("labels", [found.get("label")])  # runs from before there were several
    if labels != wanted["labels"]:
        return f"labels: {labels} there, {wanted['labels']} now"
    there = {slot["name"]: slot for slot in found.get("slots", [])}
    now = {slot["name"]: slot for slot in wanted["slots"]}
    if there.keys() != now.keys():
        return f"slots only there: {sorted(there.keys() - now.keys())[:5]}, only now: {sorted(now.keys() - there.keys())[:5]}"
    for name, slot in now.items():
        earlier = {"weights": "", **there[name]}  # runs from before there were weights do not name them
        lengths = ("max_len",) if slot["pooling"] == "none" else ()
        for setting in ("type", "seed", "dim", "pooling", "hash_size", "optimizer", "weights", *lengths):
            if earlier.get(setting) != slot[setting]:
                return f"slot {name!r}: {setting} {earlier.get(setting)!r} there, {slot[setting]!r} now"
    return None if list(there) == list(now) else "slots in another order"

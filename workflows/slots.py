"""Slots: folders below a root that are named by time, which of them are ready, and what files they have.

Names are of a clock on a wall: where clocks are put back, an hour comes twice and is one folder; where they are put forward, it is
missing. Nothing here expects a folder that is not there. What has been trained of a slot, the ledger knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any
from zoneinfo import ZoneInfo

import fsspec
from fsspec.implementations.local import LocalFileSystem

from flowps.errors import ConfigError, DataError

_GRAINS = (("Y", r"\d{4}", "%Y"), ("m", r"\d{2}", "-%m"), ("d", r"\d{2}", "-%d"), ("H", r"\d{2}", "T%H"), ("M", r"\d{2}", ":%M"))
_LAST_YEAR = 9999  # of datetime
_DIRECTIVE = re.compile(r"%(.)")


@dataclass(frozen=True, order=True)
class Slot:
    """`begins` by the wall's clock; `name` as in 2024-09-21T14, as fine as the folders are. Slots are in order of time."""

    begins: datetime
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class File:
    """A Parquet file of a slot. `url` as fsspec opens it; `modified` in seconds since 1970, 0: the file system does not say."""

    url: str
    size: int
    modified: float


@dataclass(frozen=True)
class Found:
    """A slot's folder. `waits_for`: why it is not ready; "": it is."""

    slot: Slot
    url: str
    files: tuple[File, ...]
    waits_for: str

    @property
    def is_ready(self) -> bool:
        """Whether it may be trained."""
        return not self.waits_for


@dataclass(frozen=True)
class Pattern:
    """How a slot's folder is called, with strftime's directives, as in date=%Y-%m-%d/hour=%H. Raises ConfigError."""

    text: str

    def __post_init__(self) -> None:
        found = _DIRECTIVE.findall(self.text)
        known = [directive for directive, _, _ in _GRAINS]
        if sorted(found) != sorted(known[: len(found)]) or len(found) < 1:
            raise ConfigError(
                f"partitions.slots: {self.text!r}: expected each of %Y %m %d %H %M once, without a gap from %Y on to the finest "
                "that folders have, as in date=%Y-%m-%d/hour=%H"
            )

    @cached_property
    def _parts(self) -> list[re.Pattern[str]]:
        """Of each folder of the path, one below the other."""
        classes = {directive: f"(?P<{directive}>{digits})" for directive, digits, _ in _GRAINS}

        def of(part: str) -> re.Pattern[str]:
            pieces = _DIRECTIVE.split(part)
            return re.compile("".join(classes[p] if k % 2 else re.escape(p) for k, p in enumerate(pieces)))

        return [of(part) for part in self.text.strip("/").split("/")]

    @property
    def keys(self) -> list[str]:
        """Of the folders that are called KEY=VALUE."""
        return [key for part in self.text.strip("/").split("/") for key, equals, _ in [part.partition("=")] if equals]

    @cached_property
    def _fineness(self) -> int:
        return len(_DIRECTIVE.findall(self.text))

    @cached_property
    def _name(self) -> str:
        return "".join(shown for _, _, shown in _GRAINS[: self._fineness])

    def slot(self, begins: datetime) -> Slot:
        """The one that begins there, or has begun."""
        name = begins.strftime(self._name)
        return Slot(datetime.strptime(name, self._name), name)

    def parse(self, name: str) -> Slot:
        """The slot of that name; a coarser one, a day of slots that are hours, is its first. Raises ConfigError."""
        for fineness in range(len(_GRAINS), 0, -1):
            shown = "".join(shown for _, _, shown in _GRAINS[:fineness])
            try:
                begins = datetime.strptime(name, shown)
            except ValueError:
                continue
            return self.slot(begins)
        raise ConfigError(f"{name!r}: is no slot; expected one as in {self.slot(datetime(2024, 9, 21, 14))}")

    def last(self, name: str) -> Slot:
        """The last slot that `name` means: of a day of slots that are hours, its last hour. Raises ConfigError."""
        first = self.parse(name)
        fineness = sum(name.count(sign) for sign in "-T:") + 1
        if fineness >= self._fineness:
            return first
        return self.slot(_next(first.begins, fineness) - timedelta(seconds=1))

    def ends(self, slot: Slot, zone: ZoneInfo) -> float:
        """When, in seconds since 1970: the later time where a clock that is changed shows it twice, or never."""
        shown = _next(slot.begins, self._fineness).replace(tzinfo=zone)
        return max(shown.timestamp(), shown.replace(fold=1).timestamp())

    def folders(self, fs: Any, root: str, since: datetime) -> Iterator[tuple[Slot, str]]:
        """The slots below a folder that begin at `since` or later, in no order, with their paths. Older folders are not listed."""
        yield from self._below(fs, root, 0, {}, since)

    def _below(self, fs: Any, folder: str, depth: int, read: dict[str, str], since: datetime) -> Iterator[tuple[Slot, str]]:
        known = next((n for n, (directive, _, _) in enumerate(_GRAINS) if directive not in read), len(_GRAINS))
        if known:
            digits = "".join(f"%{directive}" for directive, _, _ in _GRAINS[:known])
            try:
                begins = datetime.strptime("".join(read[directive] for directive, _, _ in _GRAINS[:known]), digits)
            except ValueError:  # the 30th of February
                return
            if begins.year < _LAST_YEAR and _next(begins, known) <= since:
                return
            if depth == len(self._parts):
                yield self.slot(begins), folder
                return
        for entry in fs.ls(folder, detail=True):
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if entry["type"] == "directory" and (match := self._parts[depth].fullmatch(name)):
                yield from self._below(fs, str(entry["name"]).rstrip("/"), depth + 1, {**read, **match.groupdict()}, since)


def _next(begins: datetime, fineness: int) -> datetime:
    """When the slot of so many of year, month, day, hour and minute ends that begins there."""
    match fineness:
        case 1:
            return begins.replace(year=begins.year + 1)
        case 2:
            return (begins.replace(day=1) + timedelta(days=32)).replace(day=1)
        case 3:
            return begins + timedelta(days=1)
        case 4:
            return begins + timedelta(hours=1)
        case _:
            return begins + timedelta(minutes=1)


def find(
    root: str, pattern: Pattern, zone: ZoneInfo, marker: str, min_age_s: float, now: float, since: datetime = datetime.min
) -> list[Found]:  # fmt: skip
    """The slots below `root` that begin at `since` or later, in order of time, ready or not.

    marker      file that makes a slot ready; "": being over, and having no file that is newer, for `min_age_s` does
    now         in seconds since 1970

    Raises DataError where the folder cannot be listed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(root)
        latest = datetime.fromtimestamp(now, zone).replace(tzinfo=None) + timedelta(days=1)
        fs.invalidate_cache()  # what was there at the last look is not asked for
        if not fs.isdir(path):
            raise DataError(f"partitions.root: {root}: no such folder")
        return sorted(
            (
                _look(fs, folder, slot, marker, min_age_s, now, pattern.ends(slot, zone))
                if slot.begins <= latest
                else Found(slot, folder, (), "for its time: it is in the future")
                for slot, folder in pattern.folders(fs, path.rstrip("/"), since)
            ),
            key=lambda found: found.slot,
        )
    except DataError:
        raise
    except Exception as error:  # every object store has errors of its own
        raise DataError(f"partitions.root: {root}: cannot be listed: {type(error).__name__}: {error}") from error


def _look(fs: Any, folder: str, slot: Slot, marker: str, min_age_s: float, now: float, ends: float) -> Found:
    is_local = isinstance(fs, LocalFileSystem)
    inside = fs.find(folder, detail=True)
    files = tuple(
        File(path if is_local else str(fs.unstrip_protocol(path)), int(of["size"]), _modified(of))
        for path, of in sorted(inside.items())
        if _is_data(path[len(folder) + 1 :])
    )
    url = folder if is_local else str(fs.unstrip_protocol(folder))
    return Found(slot, url, files, _waits_for(files, set(inside), f"{folder}/{marker}" if marker else "", min_age_s, now, ends))


def _is_data(path: str) -> bool:
    """Whether Spark and pyarrow would read it too."""
    return path.endswith((".parquet", ".pq")) and not any(part.startswith(("_", ".")) for part in path.split("/"))


def _waits_for(files: Sequence[File], paths: set[str], marker: str, min_age_s: float, now: float, ends: float) -> str:
    if marker:
        return "" if marker in paths else f"for {marker.rpartition('/')[2]}"
    if not files:
        return "for files"
    ready_at = max(ends, *(file.modified for file in files)) + min_age_s
    return "" if now >= ready_at else f"for {ready_at - now:,.0f} s more"


def _modified(entry: dict[str, Any]) -> float:
    """Of an fsspec entry: they agree on no name."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = entry.get(name)
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, str):
            try:
                return datetime.fromisoformat(value).timestamp()
            except ValueError:
                continue
    return 0.0

"""`Sink`: a file that is being written, front to back; what passes is counted and hashed.

Whole or not at all: a local file is written beside its place and moved there once it is on the disk; an object appears when
its last byte has been taken. Only `Store.create` makes sinks.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from flowps.checkpoint.file import CHUNK_BYTES, Bytes, FileEntry, piece, refusing
from flowps.errors import CheckpointError


class Sink(ABC):
    """What Arrow needs of a binary file, for one thread at a time.

    The file is there when `commit` has returned. After `abort`, or an error of `commit`, nothing of it is. After an
    error of `write` there is a hole, and it comes again from whatever is called next. All raise CheckpointError that names the
    file as it is `shown`.

    path  relative to the store
    """

    closed = False  # Arrow asks

    def __init__(self, path: str, shown: str) -> None:
        self.path = path
        self.shown = shown
        self.size_bytes = 0
        self._hash = xxhash.xxh3_128()
        self._error: CheckpointError | None = None

    def write(self, data: Bytes) -> int:
        """Append all of it; it may change afterwards."""
        self._check()
        view = piece(data)
        try:
            with refusing(self.shown, "written"):
                for start in range(0, len(view), CHUNK_BYTES):
                    chunk = view[start : start + CHUNK_BYTES]
                    self._hash.update(chunk)
                    self._append(chunk)
        except CheckpointError as error:
            self._error = error
            raise
        self.size_bytes += len(view)
        return len(view)

    def commit(self) -> None:
        """Put the file in its place, to stay there if the machine fails."""
        try:
            self._check()
            with refusing(self.shown, "written"):
                self._finish()
        except BaseException:
            self.abort()
            raise

    def entry(self, section: str = "", rows: int = 0) -> FileEntry:
        """What a manifest says of the file, as far as it is written."""
        return FileEntry(self.path, self.size_bytes, self._hash.hexdigest(), section, rows)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    @abstractmethod
    def abort(self) -> None:
        """Remove what was written, as far as that can be done. Raises nothing; does nothing after `commit`."""

    @abstractmethod
    def _append(self, chunk: memoryview) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


class LocalSink(Sink):
    """A file on a disk of this machine."""

    def __init__(self, path: str, shown: str, place: Path) -> None:
        super().__init__(path, shown)
        self._place = place
        self._unfinished = place.with_name(f"{place.name}.unfinished")
        self._file = self._unfinished.open("wb", buffering=0)

    def _append(self, chunk: memoryview) -> None:
        while chunk:
            chunk = chunk[self._file.write(chunk) :]

    def _finish(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._unfinished.rename(self._place)
        try:
            sync_folder(self._place.parent)
        except BaseException:
            self._place.unlink(missing_ok=True)
            raise

    def abort(self) -> None:
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._unfinished.unlink(missing_ok=True)


class ObjectSink(Sink):
    """A file of any other file system of fsspec; `place` is what that calls it."""

    def __init__(self, path: str, shown: str, fs: Any, place: str) -> None:
        super().__init__(path, shown)
        self._fs, self._place = fs, place
        self._file = _open(fs, place)

    def _append(self, chunk: memoryview) -> None:
        self._file.write(chunk)

    def _finish(self) -> None:
        self._file.close()

    def abort(self) -> None:
        if self._file.closed:
            return
        # Closing it would make it whole, and so would its end as an object of Python.
        with suppress(Exception):
            self._file.discard()
        with suppress(Exception):
            self._file.closed = True
        # Where a file grows in its place, as in memory. One that it was to replace is lost; no file of a checkpoint is.
        with suppress(Exception):
            self._fs.rm_file(self._place)


def _open(fs: Any, place: str) -> Any:
    try:
        return fs.open(place, "wb")
    except FileNotFoundError:
        # Object stores have no folders; of the others, those that want one made say so.
        fs.makedirs(place.rpartition("/")[0], exist_ok=True)
        return fs.open(place, "wb")


def sync_folder(folder: Path) -> None:
    """See to it that names given or taken in `folder` stay so if the machine fails."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems over a network that see to it themselves
            raise
    finally:
        os.close(number)

"""`Writing`: a shard's part of a checkpoint on its way to disk, beside training.

Chunks are taken as fast as they come while they fit into `max_bytes`; a thread writes them. Threads: `put` and `finish` are called
by one thread, `done` and `result` by any.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from flowps.checkpoint.file import FileEntry
from flowps.checkpoint.part import PartWriter

Columns = Mapping[str, NDArray[Any]]


class Writing:
    """What is put is written by `writer`; one chunk larger than `max_bytes` is taken when no other waits."""

    def __init__(self, writer: PartWriter, max_bytes: int) -> None:
        self._writer, self._max_bytes = writer, max_bytes
        self._changed = threading.Condition()  # guards everything below
        self._waiting: deque[tuple[str, Columns, int]] = deque()
        self._bytes = 0
        self._ended = False
        self._files: list[FileEntry] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="flowps-save", daemon=True)
        self._thread.start()

    def put(self, section: str, columns: Columns) -> None:
        """Take a chunk, which nobody may change any more; waits while there is no room. Raises what writing has raised."""
        size = sum(array.nbytes for array in columns.values())
        with self._changed:
            self._changed.wait_for(lambda: not self._bytes or self._bytes + size <= self._max_bytes or self._error is not None)
            if self._error is not None:
                raise self._error
            self._waiting.append((section, columns, size))
            self._bytes += size
            self._changed.notify_all()

    def finish(self) -> None:
        """Nothing more comes."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def abort(self, error: BaseException) -> None:
        """Give up, and leave nothing; `result` raises `error`."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    @property
    def done(self) -> bool:
        """Whether `result` has something to say."""
        return not self._thread.is_alive()

    def result(self) -> list[FileEntry]:
        """The files, once they are written. Raises what writing has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._files is not None
        return self._files

    def _run(self) -> None:
        try:
            while (chunk := self._next()) is not None:
                section, columns, size = chunk
                self._writer.write(section, columns)
                with self._changed:
                    self._bytes -= size
                    self._changed.notify_all()
            self._files = self._writer.close()
        except BaseException as error:  # handed over whole
            self._writer.abort()
            self.abort(error)

    def _next(self) -> tuple[str, Columns, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._ended or self._error is not None)
            if self._error is not None:
                raise self._error
            return self._waiting.popleft() if self._waiting else None

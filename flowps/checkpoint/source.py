"""`Source`: a file of a store that is being read, front to back; what passes is hashed and compared in the end.

Nothing is mapped into memory: a file that somebody cuts short would end the process (SIGBUS) instead of the read. Only
`Store.open` makes sources.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from flowps.checkpoint.file import CHUNK_BYTES, USE_ANOTHER, FileEntry, check_size, refusing, space
from flowps.errors import CheckpointError

_RANGE_BYTES = 16 << 20  # far away, a request costs as much time as some megabytes do


class Readable(Protocol):
    """Fills memory with the bytes that come next, as far as there are some, and says how many there were."""

    def readinto(self, view: memoryview, /) -> int | None: ...


class Source:
    """What Arrow needs of a binary file, for one thread at a time.

    What `read` gives is worth something only when `finish` has found no fault. Both raise CheckpointError that names the file as
    it is `shown`.
    """

    closed = False  # Arrow asks

    def __init__(self, entry: FileEntry, shown: str, file: Readable) -> None:
        self.shown = shown
        self._entry = entry
        self._file = file
        self._position = 0
        self._memory = _Memory()
        self._hash = xxhash.xxh3_128()

    def read(self, size_bytes: int = -1) -> NDArray[np.uint8]:
        """The next bytes, fewer at the end of the file; all that are left if `size_bytes` is negative.

        In memory that is used again once neither the array nor anything made of it without a copy is there any more.
        """
        left = self._entry.size_bytes - self._position
        found = self._memory.take(left if size_bytes < 0 else min(size_bytes, left))
        view = found.data
        for start in range(0, len(view), CHUNK_BYTES):
            self._fill(view[start : start + CHUNK_BYTES])
        return found

    def close(self) -> None:
        """Nothing: whoever opened it closes it."""

    def finish(self) -> None:
        """Read what is left and compare the checksum."""
        scratch = space(CHUNK_BYTES).data
        while left := self._entry.size_bytes - self._position:
            self._fill(scratch[: min(left, CHUNK_BYTES)])
        found, expected = self._hash.hexdigest(), self._entry.checksum
        if found != expected:
            raise CheckpointError(f"{self.shown}: is damaged: its checksum is {found}, expected {expected}; {USE_ANOTHER}")

    def _fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            with refusing(self.shown, "read"):
                found = self._file.readinto(view[done:])
            if not found:  # it was cut short after it was opened
                check_size(self.shown, self._position + done, self._entry.size_bytes)
            done += found or 0
        self._hash.update(view)
        self._position += len(view)


class _Memory:
    """Memory for one chunk after the other. The system takes longer to give new pages than to read what it has in its cache."""

    def __init__(self) -> None:
        self._owned: list[NDArray[np.uint8]] = []

    def take(self, size_bytes: int) -> NDArray[np.uint8]:
        """So many bytes, with anything in them."""
        if size_bytes < CHUNK_BYTES:
            return space(size_bytes)
        for i in range(len(self._owned)):
            # Known to the list and to the question alone: numpy and Arrow hold what they look into, so nothing does any more.
            if sys.getrefcount(self._owned[i]) <= 2 and len(self._owned[i]) >= size_bytes:
                return self._owned[i][:size_bytes]
        found = space(size_bytes)
        self._owned = [*self._owned[-2:], found]  # one is looked at, one is read and waits, the next is filled
        return found[:]


class Ranges:
    """An object read range by range: fsspec's own open files can be shared by all who read one (in memory they are)."""

    def __init__(self, fs: Any, place: str, size_bytes: int) -> None:
        self._fs, self._place, self._size_bytes = fs, place, size_bytes
        self._position = 0
        self._range = memoryview(b"")

    def readinto(self, view: memoryview, /) -> int:
        """As Readable says."""
        if not self._range and self._position < self._size_bytes:
            end = min(self._position + _RANGE_BYTES, self._size_bytes)
            self._range = memoryview(self._fs.cat_file(self._place, start=self._position, end=end))
            self._position += len(self._range)
        count = min(len(view), len(self._range))
        view[:count] = self._range[:count]
        self._range = self._range[count:]
        return count

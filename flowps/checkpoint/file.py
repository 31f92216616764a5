"""One file of a store: what is kept in mind of it, the refusals that name it, and how much is hashed and moved at a time.

Bytes go out by `sink` and come in by `source`; where files lie is the business of `store`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from flowps.errors import CheckpointError, FlowpsError

Bytes = bytes | bytearray | memoryview | NDArray[Any]  # and Arrow's buffers: one piece of memory

# Hashed and then written, or read and then hashed, while it is still in the processor's cache.
CHUNK_BYTES = 1 << 20

USE_ANOTHER = "use another checkpoint"

_NO_ROOM = "free space there, or have checkpoints written elsewhere"
_NOT_ALLOWED = "give this user the right to it, or choose another place for checkpoints"
_ADVICE = {
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: _NOT_ALLOWED,
    errno.ENOENT: "it has gone: was it deleted, or a disk unmounted? Bring it back, or choose another place for checkpoints",
    errno.ENOTDIR: "something on the way is a file; choose another place for checkpoints",
    errno.EISDIR: "a folder is in its place; choose another place for checkpoints",
    errno.EIO: "the disk may be failing; choose another place for checkpoints",
}


class FileEntry(msgspec.Struct, frozen=True):
    """What a manifest says of one file.

    path      relative to the store, with slashes
    checksum  XXH3-128 of the whole file, 32 hexadecimal digits
    section   of a shard's part: which of its sections this is, and how many rows that has
    """

    path: str
    size_bytes: int
    checksum: str
    section: str = ""
    rows: int = 0


def check_size(shown: str, found: int, expected: int) -> None:
    """Raise CheckpointError, naming the file as it is `shown`, if its size in bytes is another."""
    if found != expected:
        what = "is truncated" if found < expected else "is too long"
        raise CheckpointError(f"{shown}: {what}: found {found:,} bytes, expected {expected:,}; {USE_ANOTHER}")


@contextmanager
def refusing(shown: str, action: str) -> Iterator[None]:
    """Whatever goes wrong inside while `action` ("written", "read") is done with what is `shown` becomes a CheckpointError."""
    try:
        yield
    except FlowpsError:
        raise
    except Exception as error:  # every object store has errors of its own
        raise CheckpointError(f"{shown}: cannot be {action}: {_reason(error)}{_advice(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return " ".join(error.strerror.split())
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _advice(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, OSError) and number is None:  # fsspec's own errors have only a type
        number = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}.get(type(error))
    advice = _ADVICE.get(number) if number is not None else None
    return f"; {advice}" if advice else ""


def piece(data: Any) -> memoryview:
    """All of `data`, which is Bytes, as plain bytes, not copied."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def space(size_bytes: int) -> NDArray[np.uint8]:
    """Memory of so many bytes, not cleared."""
    return np.empty(size_bytes, np.uint8)

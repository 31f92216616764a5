"""A message with one large array: everything but the array is protobuf's work, the array goes in and out beside it.

On the wire it is an ordinary `bytes` field. protobuf would copy it into the message and out again, several megabytes each way; here
it is made where the message is, and read where the message came in (`python -m bench.rpc` shows what that brings).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from flowps.errors import DataError

ARRAY_FIELD, PADDING_FIELD = 15, 14  # of every message here that has a large array
_DELIMITED = 2  # protobuf's wire types; see protobuf.dev/programming-guides/encoding
_FIXED = {1: 8, 5: 4}
LINE_BYTES = 64  # a cache line


class Writing:
    """A message that is being written: `small` serialised, and an array of `size_bytes` to be filled in place."""

    def __init__(self, small: Message, size_bytes: int) -> None:
        head = small.SerializeToString()
        tag = bytes([ARRAY_FIELD << 3 | _DELIMITED]) + _varint(size_bytes)
        # gRPC sends bytes objects only. This one's memory can be written to until `finish`, which does not copy it.
        self._buffer = io.BytesIO(bytes(len(head) + 2 + LINE_BYTES - 1 + len(tag) + size_bytes))
        view = self._buffer.getbuffer()
        # The padding's own tag and length take two bytes. The pool kernels write past the caches where lines start on one.
        before = len(head) + 2 + len(tag)
        fill = -(np.frombuffer(view, np.uint8).ctypes.data + before) % LINE_BYTES
        begin = b"".join([head, bytes([PADDING_FIELD << 3 | _DELIMITED, fill]), bytes(fill), tag])
        view[: len(begin)] = begin
        self._end = len(begin) + size_bytes
        self._array: memoryview | None = view[len(begin) : self._end]

    def array(self, kind: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
        """Where the array goes, C-contiguous. Nobody may write to it once `finish` is called."""
        assert self._array is not None
        return np.frombuffer(self._array, kind).reshape(shape)

    def finish(self) -> bytes:
        """The message; a copy of it where a view of the array is left."""
        self._array = None
        try:
            self._buffer.truncate(self._end)
        except BufferError:
            # A thread of a team has ended its part and not yet let go of it: nobody writes any more, the memory cannot be taken.
            return bytes(self._buffer.getbuffer()[: self._end])
        return self._buffer.getvalue()


def write(small: Message, pieces: Sequence[NDArray[Any]]) -> bytes:
    """`small` serialised, and its array: `pieces` of one dtype, one after the other."""
    writing = Writing(small, sum(piece.nbytes for piece in pieces))
    if pieces:
        array = writing.array(pieces[0].dtype.type, (-1,))
        np.concatenate([piece.reshape(-1) for piece in pieces], out=array)
        del array
    return writing.finish()


def read(data: bytes) -> tuple[bytes, memoryview]:
    """What `write` was given: the serialised rest, and the array's bytes, a view of `data`.

    Reads any valid encoding of such a message. Raises DataError for one that is not.
    """
    view = memoryview(data)
    rest: list[memoryview] = []
    array = view[:0]
    at = kept = 0
    while at < len(view):
        start = at
        tag, at = _read_varint(view, at)
        kind = tag & 7
        if kind == _DELIMITED:
            length, at = _read_varint(view, at)
            if at + length > len(view):
                raise DataError(f"a message of {len(view)} bytes is cut off: a field of {length} bytes begins at byte {at}")
            if tag >> 3 in (ARRAY_FIELD, PADDING_FIELD):
                if tag >> 3 == ARRAY_FIELD:
                    array = view[at : at + length]
                rest.append(view[kept:start])
                kept = at + length
            at += length
        elif kind == 0:
            _, at = _read_varint(view, at)
        elif kind in _FIXED:
            at += _FIXED[kind]
        else:
            raise DataError(f"a message of {len(view)} bytes is not protobuf: wire type {kind} at byte {start}")
    if at > len(view):
        raise DataError(f"a message of {len(view)} bytes is cut off")
    rest.append(view[kept:])
    return b"".join(rest), array


def array_of(data: memoryview, kind: type[np.generic], shape: tuple[int, ...], what: str) -> NDArray[Any]:
    """`data` as an array, without a copy where it is aligned. Nobody may write to it.

    Raises DataError where the sizes differ.
    """
    wanted = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
    if len(data) != wanted:
        raise DataError(f"{what}: found {len(data)} bytes, expected {wanted}: {np.dtype(kind)} {list(shape)}")
    found = np.frombuffer(data, np.dtype(kind).newbyteorder("<")).reshape(shape)
    if not found.flags.aligned:
        return found.copy()
    return np.asarray(_Lent(found))


class _Lent:
    """Memory of a message that nobody writes to, shown as writable: numba compiles kernels anew for read-only arrays."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array  # keeps the memory
        self.__array_interface__ = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise DataError(f"a message of {len(view)} bytes is cut off")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise DataError(f"a message of {len(view)} bytes is not protobuf: a number of more than 64 bits at byte {at}")

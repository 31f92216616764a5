"""A message with one large array: everything but the array is protobuf's work, the array goes in and out beside it.

On the wire it is an ordinary `bytes` field. protobuf would copy it into the message and out again, several megabytes each way; here
it is made where the message is, and read where the message came in (`python -m bench.rpc` shows what that brings).
"""

from __future__ import annotations

import ctypes
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
_ALIGNMENT = 16  # of the array
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize  # of NULL and a length: bytes of any content
_new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, (ctypes.c_char_p, ctypes.c_ssize_t)


class Writing:
    """A message that is being written: `small` serialised, and an array of `size_bytes` to be filled in place."""

    def __init__(self, small: Message, size_bytes: int) -> None:
        head = small.SerializeToString()
        tag = bytes([ARRAY_FIELD << 3 | _DELIMITED]) + _varint(size_bytes)
        # gRPC sends bytes objects only. A new one may be filled as long as nobody else has it (docs.python.org/3/c-api/bytes.html);
        # any other way to one zeroes or copies some megabytes.
        self._data: bytes = _new_bytes(None, len(head) + len(tag) + size_bytes + 2 * 2 + LINE_BYTES)
        self._space = np.asarray(_Lent(np.frombuffer(self._data, np.uint8)))
        # Padding before the array, so that it is aligned but does not start on a cache line: the pool kernels would write past the
        # caches, and gRPC reads it next. The rest of the padding comes behind; its own tag and length take two bytes.
        before = len(head) + 2 + len(tag)
        fill = (_ALIGNMENT - self._space.ctypes.data - before) % LINE_BYTES
        self._start, self._size_bytes = before + fill, size_bytes
        begin = b"".join([head, _padding(fill), tag])
        end = _padding(LINE_BYTES - fill)
        self._space[: len(begin)] = np.frombuffer(begin, np.uint8)
        self._space[self._start + size_bytes :] = np.frombuffer(end, np.uint8)

    def array(self, kind: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
        """Where the array goes, C-contiguous. Nobody may write to it once `finish` is called."""
        return self._space[self._start : self._start + self._size_bytes].view(kind).reshape(shape)

    def finish(self) -> bytes:
        """The message."""
        return self._data


def _padding(size: int) -> bytes:
    return bytes([PADDING_FIELD << 3 | _DELIMITED, size]) + bytes(size)


def write(small: Message, pieces: Sequence[NDArray[Any]]) -> bytes:
    """`small` serialised, and its array: `pieces` of one dtype, one after the other."""
    writing = Writing(small, sum(piece.nbytes for piece in pieces))
    if pieces:
        array = writing.array(pieces[0].dtype.type, (-1,))
        np.concatenate([piece.reshape(-1) for piece in pieces], out=array)
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

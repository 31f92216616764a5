"""Arrays ↔ the messages of flowps.proto, checked where they come in.

Covers the layout, narrow lengths and float16. Neither calls nor serves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from flowps.batch import Float32, Int32
from flowps.errors import DataError
from flowps.ps.kernels import half as half_kernels
from flowps.ps.memory import aligned_empty
from flowps.ps.parcel import Lines, Parcel
from flowps.ps.wire import flowps_pb2 as pb
from flowps.ps.wire import frame
from flowps.ps.wire.protocol import PROTOCOL

_LENGTHS: dict[int, type[np.generic]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_LEAST_SCALE, _MOST_SCALE = 2.0**-126, 2.0**126  # they and their inverses are normal numbers of float32
_MOST_RATE_SCALE = 1e6  # a schedule's ends at 1
_MAX_HALF = 32_768.0  # what the largest number of an array is scaled to; float16 ends at 65,504
_IS_LITTLE = sys.byteorder == "little"
_MOST_SIGNS = np.iinfo(np.int32).max


def parse(data: bytes, message: Message) -> memoryview:
    """Fill `message` from `data`, all but its array, which is returned. Raises DataError for bytes that are no such message."""
    small, array = frame.read(data)
    try:
        message.ParseFromString(small)
    except DecodeError as error:
        raise DataError(f"a message of {len(data)} bytes is no {message.DESCRIPTOR.name}: {error}") from None
    return array


def write_lookup(run: str, batch_id: int, parcel: Parcel, training: bool, half: bool) -> bytes:
    """A LookupRequest."""
    longest = max((int(of.max()) for of in parcel.lengths if len(of)), default=0)
    width = 1 if longest < 1 << 8 else 2 if longest < 1 << 16 else 4
    narrow = [of.astype(f"<u{width}") for of in parcel.lengths]
    request = pb.LookupRequest(
        head=pb.Head(protocol=PROTOCOL, run=run), batch=batch_id, size=parcel.size, training=training,
        floats=pb.FLOAT16 if half else pb.FLOAT32, length_bytes=width, lengths=b"".join(of.data for of in narrow),
        shares=b"" if parcel.shares is None else b"".join(_little(of).data for of in parcel.shares),
    )  # fmt: skip
    return frame.write(request, [_little(of) for of in parcel.signs])


def read_parcel(request: pb.LookupRequest, signs: memoryview, num_slots: int) -> Parcel:
    """The parcel of a LookupRequest, of which `signs` is the array. Raises DataError where its arrays do not fit together."""
    kind = _LENGTHS.get(request.length_bytes)
    if kind is None:
        raise DataError(f"length_bytes: found {request.length_bytes}, expected 1, 2 or 4")
    narrow = frame.array_of(memoryview(request.lengths), kind, (num_slots * request.size,), "lengths")
    count = int(narrow.sum(dtype=np.int64))
    if count > _MOST_SIGNS:
        raise DataError(f"lengths: found {count} signs in all, more than 2^31")
    found = frame.array_of(signs, np.uint64, (count,), "signs")
    lengths: Int32 = narrow.astype(np.int32)
    if not request.shares:
        return Parcel(request.size, [found], [lengths])
    shares = frame.array_of(memoryview(request.shares), np.float32, (count,), "shares")
    if not np.isfinite(shares).all():
        raise DataError("shares: found NaN or infinity, expected finite weights")
    return Parcel(request.size, [found], [lengths], [shares])


def write_pool(run: str, batch_id: int, size: int, half: bool) -> bytes:
    """A PoolRequest."""
    request = pb.PoolRequest(
        head=pb.Head(protocol=PROTOCOL, run=run), batch=batch_id, size=size, floats=pb.FLOAT16 if half else pb.FLOAT32
    )  # fmt: skip
    return bytes(request.SerializeToString())


def write_reply(look_up: Callable[[Float32 | None], Float32], shape: tuple[int, int], half: bool) -> bytes:
    """A LookupReply of what `look_up` writes into the array it is given, float32 `shape`, or returns where it is given none."""
    if half:
        return _write_half(pb.LookupReply(), look_up(None))
    if not _IS_LITTLE:
        return frame.write(pb.LookupReply(scale=1.0), [_little(look_up(None))])
    writing = frame.Writing(pb.LookupReply(scale=1.0), shape[0] * shape[1] * 4)
    look_up(writing.array(np.float32, shape))
    return writing.finish()


def wants_half(floats: int) -> bool:
    """Whether a request speaks of float16. Raises DataError for what only a later version may know."""
    if floats not in (pb.FLOAT32, pb.FLOAT16):
        raise DataError(f"floats: found {floats}, expected 0 (float32) or 1 (float16)")
    return floats == pb.FLOAT16


def read_reply(data: bytes, size: int, width: int, half: bool) -> Float32:
    """The embeddings of a LookupReply, float32 [size, width]; a view of `data` unless they came as float16."""
    reply = pb.LookupReply()
    return _widened(parse(data, reply), (size, width), half, reply.scale, "embeddings")


def write_push(run: str, batch_id: int, gradient: Lines, rate_scale: float, half: bool) -> bytes:
    """A PushRequest."""
    request = pb.PushRequest(
        head=pb.Head(protocol=PROTOCOL, run=run), batch=batch_id, size=gradient.size, scale=1.0, rate_scale=rate_scale,
        floats=pb.FLOAT16 if half else pb.FLOAT32,
    )  # fmt: skip
    if half:
        return _write_half(request, gradient.array())
    if not _IS_LITTLE:
        return frame.write(request, [_little(gradient.array())])
    writing = frame.Writing(request, gradient.size * gradient.width * 4)
    gradient.write_to(writing.array(np.float32, (gradient.size, gradient.width)))
    return writing.finish()


def read_gradient(request: pb.PushRequest, array: memoryview, width: int) -> Float32:
    """The gradient of a PushRequest, float32 [size, width]; a view of the message unless it came as float16."""
    if not 0 <= request.rate_scale <= _MOST_RATE_SCALE:
        raise DataError(f"rate_scale: found {request.rate_scale}, expected a number from 0 to {_MOST_RATE_SCALE:g}")
    return _widened(array, (request.size, width), wants_half(request.floats), request.scale, "gradient")


def _write_half(message: Any, values: Float32) -> bytes:
    """`message` with `values` as float16, scaled by a power of two so that the largest is near the end of its range.

    Gradients are tiny: unscaled, most would be 0. NaN and infinity stay what they are: the shard refuses their rows and says so.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    bits = half_kernels.largest(flat.view(np.int32))
    sound = bits < half_kernels.INFINITE
    most = float(np.array(bits, np.int32).view(np.float32)) if sound else _largest_finite(flat)
    scale = float(np.clip(2.0 ** np.floor(np.log2(_MAX_HALF / most)), _LEAST_SCALE, _MOST_SCALE)) if most > 0 else 1.0
    message.scale = scale
    writing = frame.Writing(message, flat.size * 2)
    out = writing.array(np.int16, (flat.size,))
    if sound and _IS_LITTLE:
        half_kernels.narrow(flat, np.float32(scale), out)
    else:
        with np.errstate(invalid="ignore"):
            out[:] = (flat * np.float32(scale)).astype("<f2").view("<i2")
    return writing.finish()


def _largest_finite(values: Float32) -> float:
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _widened(array: memoryview, shape: tuple[int, int], half: bool, scale: float, what: str) -> Float32:
    if not half:
        found: Float32 = frame.array_of(array, np.float32, shape, what)
        return found
    if not _LEAST_SCALE <= scale <= _MOST_SCALE:
        raise DataError(f"scale of {what}: found {scale}, expected a number from 2^-126 to 2^126")
    narrow = frame.array_of(array, np.float16, shape, what).view(np.int16)
    widened = aligned_empty(shape)
    half_kernels.widen(narrow.reshape(-1), np.float32(1 / scale), widened.reshape(-1))
    return widened


def _little(values: NDArray[Any]) -> NDArray[Any]:
    """Little-endian and contiguous; itself where it is so already, as on all machines that flowps is run on."""
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<"))

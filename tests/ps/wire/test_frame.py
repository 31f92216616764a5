"""`frame` against protobuf: each reads what the other writes, in any order of fields, and refuses what the other refuses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from flowps.errors import DataError
from flowps.ps.wire import flowps_pb2 as pb
from flowps.ps.wire import frame, message
from tests.ps import drawn

requests = st.builds(
    pb.LookupRequest,
    head=st.builds(pb.Head, protocol=st.integers(0, 2**32 - 1), run=st.text(max_size=20)),
    batch=st.integers(0, 2**64 - 1), size=st.integers(0, 2**32 - 1), training=st.booleans(), lengths=st.binary(max_size=300),
    shares=st.binary(max_size=300),
)  # fmt: skip


def test_an_array_in_pieces_is_one_array() -> None:
    """The pieces stand one after the other; a message without any has an empty array."""
    pieces = [np.arange(3, dtype="<u8"), np.empty(0, "<u8"), np.array([2**64 - 1], "<u8")]
    assert pb.LookupRequest.FromString(frame.write(pb.LookupRequest(), pieces)).signs == b"".join(p.tobytes() for p in pieces)
    for none in ([], [np.empty(0, "<u8")]):
        small, array = frame.read(frame.write(pb.LookupRequest(size=4), none))
        assert pb.LookupRequest.FromString(small) == pb.LookupRequest(size=4)
        assert len(array) == 0


@drawn.bounded(max_examples=200)
@given(requests, st.binary(max_size=400))
@example(pb.LookupRequest(), b"x" * 127)  # lengths of one and two bytes
@example(pb.LookupRequest(), b"x" * 128)
@example(pb.LookupRequest(), b"x" * 16384)
def test_protobuf_reads_what_frame_writes(small: pb.LookupRequest, array: bytes) -> None:
    """Every field, and the array as a field of its own; and frame reads its own."""
    written = frame.write(small, [np.frombuffer(array, np.uint8)])
    found = pb.LookupRequest.FromString(written)
    assert found.signs == array
    assert set(found.padding) <= {0}
    found.ClearField("signs")
    found.ClearField("padding")
    assert found == small
    rest, view = frame.read(written)
    assert bytes(view) == array
    assert pb.LookupRequest.FromString(rest) == small


@drawn.bounded(max_examples=200)
@given(requests, st.binary(max_size=400), st.binary(max_size=80))
def test_frame_reads_what_protobuf_writes(small: pb.LookupRequest, array: bytes, padding: bytes) -> None:
    """protobuf puts the array where its number says, and leaves it out where it is empty."""
    whole = pb.LookupRequest()
    whole.CopyFrom(small)
    whole.signs, whole.padding = array, padding
    found = pb.LookupRequest()
    assert bytes(message.parse(whole.SerializeToString(), found)) == array
    assert found == small


def field(number: int, kind: int, value: bytes) -> bytes:
    """A field as it is on the wire."""
    return varint(number << 3 | kind) + (varint(len(value)) if kind == 2 else b"") + value


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    more = [value >> shift & 0x7F | 0x80 for shift in range(0, max(7, value.bit_length()), 7)]
    return bytes([*more[:-1], more[-1] & 0x7F])


UNKNOWN = [
    field(900, 0, varint(2**64 - 1)),
    field(901, 1, b"8 bytes."),
    field(902, 2, b"of a later version"),
    field(2**29 - 1, 5, b"4 by"),
    field(15, 0, varint(7)),  # the array's number with another type is an unknown field
]


@drawn.bounded(max_examples=100)
@given(st.data())
def test_fields_in_any_order_beside_unknown_ones(data: st.DataObject) -> None:
    """As protobuf has it: the order means nothing, of a field that comes twice the last counts, unknown ones are passed over."""
    small = pb.LookupRequest(head=pb.Head(protocol=1, run="r"), batch=2**64 - 1, size=3, training=True, lengths=b"123", shares=b"")
    known = [
        pb.LookupRequest(**{name.name: value}).SerializeToString() for name, value in small.ListFields()
    ]  # fmt: skip
    arrays = [field(15, 2, b"first"), field(15, 2, b"last one"), field(14, 2, bytes(5)), field(14, 2, b"")]
    parts = data.draw(st.permutations([*known, *arrays, *UNKNOWN]))
    joined = b"".join(parts)
    found = pb.LookupRequest()
    array = bytes(message.parse(joined, found))
    theirs = pb.LookupRequest.FromString(joined)
    assert array == theirs.signs == max([b"first", b"last one"], key=lambda value: parts.index(field(15, 2, value)))
    theirs.ClearField("signs")
    theirs.ClearField("padding")
    assert found.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


def test_a_message_cut_off_anywhere() -> None:
    """Refused wherever protobuf refuses it; where it ends with a field, what is there is read."""
    whole = frame.write(pb.LookupRequest(head=pb.Head(protocol=1, run="run"), batch=300, size=3), [np.arange(20, dtype="<u8")])
    refused = 0
    for length in range(len(whole)):
        refused += agree(whole[:length])
    assert refused > len(whole) - 10
    with pytest.raises(DataError, match=r"a message of 100 bytes is cut off: a field of 160 bytes begins at byte \d+"):
        frame.read(whole[:100])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x08", "a message of 1 bytes is cut off"),
        (b"\x7a", "a message of 1 bytes is cut off"),
        (b"\x7a\x05abc", "a field of 5 bytes begins at byte 2"),
        (b"\x7a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "a field of 18446744073709551615 bytes"),
        (b"\x09abc", "a message of 4 bytes is cut off"),
        (b"\x0dabc", "a message of 4 bytes is cut off"),
        (b"\x08" + b"\xff" * 10, "not protobuf: a number of more than 64 bits at byte 11"),
        (b"\x0b\x0c", "not protobuf: wire type 3 at byte 0"),
        (b"\x0e", "not protobuf: wire type 6 at byte 0"),
        (b"\x07", "not protobuf: wire type 7 at byte 0"),
    ],
)
def test_what_is_no_message(data: bytes, said: str) -> None:
    """The error says where."""
    with pytest.raises(DataError, match=said):
        frame.read(data)


@pytest.mark.parametrize("data", [b"\x00\x00", b"\x0a\x04\x12\x05ab", b"\x0a\x03\x12\x01\xff"])
def test_what_only_protobuf_finds_is_refused_as_well(data: bytes) -> None:
    """A field number 0, a field cut off inside another, text that is no UTF-8: those are protobuf's to check."""
    with pytest.raises(DataError, match=r"a message of \d bytes is no LookupRequest"):
        message.parse(data, pb.LookupRequest())


def agree(data: bytes) -> bool:
    """Whether frame and protobuf both refuse `data`; where both read it, that they read the same."""
    found = pb.LookupRequest()
    try:
        array = bytes(message.parse(data, found))
    except DataError as error:
        if "wire type 3" not in str(error) and "wire type 4" not in str(error):  # groups, which nothing here has
            with pytest.raises(DecodeError):
                pb.LookupRequest.FromString(data)
        return True
    theirs = pb.LookupRequest.FromString(data)
    assert theirs.signs == array
    theirs.ClearField("signs")
    theirs.ClearField("padding")
    assert found.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)
    return False


@drawn.bounded(max_examples=40)
@given(drawn.generators)
def test_bytes_changed_at_random_are_read_as_protobuf_reads_them(random: np.random.Generator) -> None:
    """Refused by both or the same to both."""
    of = pb.LookupRequest(head=pb.Head(protocol=1, run="run"), batch=300, size=3, lengths=b"\1\2\3", shares=bytes(24))
    whole = frame.write(of, [np.arange(6, dtype="<u8")])
    for _ in range(25):
        changed = bytearray(whole)
        for at in random.integers(0, 60, random.integers(1, 4)):  # where the tags and lengths are
            changed[at] = random.integers(0, 256)
        agree(bytes(changed))


@pytest.mark.parametrize("size_bytes", [0, 1, 4, 63, 64, 65, 127, 128, 129, 16383, 16384, 1 << 21])
def test_the_array_is_aligned_but_not_on_a_cache_line(size_bytes: int) -> None:
    """Whatever stands before it, and whatever the length of its length; at most two lines are spent on that."""
    for run in itertools.accumulate("abc" * 30):
        small = pb.PushRequest(head=pb.Head(protocol=1, run=run))
        writing = frame.Writing(small, size_bytes)
        array = writing.array(np.uint8, (size_bytes,))
        assert array.ctypes.data % frame.LINE_BYTES == 16 or not size_bytes
        array[:] = 7
        del array
        found = pb.PushRequest.FromString(writing.finish())
        assert found.gradient == b"\7" * size_bytes
        assert len(found.padding) <= frame.LINE_BYTES


def test_the_message_is_not_copied_once_it_is_made() -> None:
    """What gRPC gets is the memory that a large array was made in."""
    writing = frame.Writing(pb.PushRequest(), 1 << 20)
    array = writing.array(np.uint8, (1 << 20,))
    at = array.ctypes.data
    del array
    done = np.frombuffer(writing.finish(), np.uint8)
    assert done.ctypes.data <= at < done.ctypes.data + len(done)


def test_a_view_that_is_still_there_does_not_end_the_run() -> None:
    """Its owner only has not let go of it yet: the message is made, be it by a copy."""
    writing = frame.Writing(pb.LookupReply(), 400)
    kept = writing.array(np.float32, (10, 10))
    kept[:] = 3
    assert pb.LookupReply.FromString(writing.finish()).embeddings == np.full(100, 3, np.float32).tobytes()


@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.uint32, np.float32, np.uint64])
@pytest.mark.parametrize("start", range(9))
def test_an_array_is_aligned_wherever_the_message_lies(kind: Any, start: int) -> None:
    """As a view where it is aligned, as a copy where it is not; kernels are compiled for writable arrays only."""
    values = np.arange(12, dtype=kind)
    data = memoryview(bytes(start) + values.tobytes())[start:]
    found = frame.array_of(data, kind, (3, 4), "what")
    np.testing.assert_array_equal(found, values.reshape(3, 4))
    assert found.flags.aligned
    assert found.flags.writeable
    assert found.flags.c_contiguous
    assert found.dtype == np.dtype(kind)
    aligned = np.frombuffer(data, np.uint8).ctypes.data % np.dtype(kind).alignment == 0
    assert np.shares_memory(found, np.frombuffer(data, np.uint8)) == aligned


def test_an_array_keeps_its_message() -> None:
    """When nobody else holds it, its memory is still there."""
    found = frame.array_of(memoryview(np.arange(1000, dtype=np.uint64).tobytes()), np.uint64, (1000,), "signs")
    other = [bytes(8000) for _ in range(100)]
    np.testing.assert_array_equal(found, np.arange(1000))
    del other


def test_an_array_of_another_size() -> None:
    """The error says what was found, and what the other fields let expect."""
    with pytest.raises(DataError, match=r"embeddings: found 20 bytes, expected 24: float32 \[2, 3\]"):
        frame.array_of(memoryview(bytes(20)), np.float32, (2, 3), "embeddings")
    assert frame.array_of(memoryview(b""), np.float32, (0, 7), "embeddings").shape == (0, 7)

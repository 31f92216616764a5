"""Arrays ↔ messages: what goes in comes out, float16 within its bound, and arrays that do not fit together are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flowps.batch import Float32
from flowps.errors import DataError
from flowps.ps.parcel import Columns, Lines, Parcel
from flowps.ps.wire import flowps_pb2 as pb
from flowps.ps.wire import message
from tests.ps import drawn
from tests.ps.wire import loopback

bags = st.tuples(st.integers(0, 3), st.integers(0, 4)).flatmap(lambda shape: drawn.bags(*shape, drawn.signs))


def received(data: bytes, num_slots: int) -> Parcel:
    """The parcel of a LookupRequest, as a server gets it."""
    request = pb.LookupRequest()
    signs = message.parse(data, request)
    return message.read_parcel(request, signs, num_slots)


# --- lookups ----------------------------------------------------------------------------------------------------------


@drawn.bounded(max_examples=100)
@given(bags, st.booleans(), drawn.generators)
@example([], False, np.random.default_rng())
@example([[]], True, np.random.default_rng())
@example([[[0, 2**63, 2**64 - 1], []]], True, np.random.default_rng())
def test_a_parcel_arrives_as_it_was_sent(of: drawn.Bags, weighted: bool, random: np.random.Generator) -> None:
    """Signs over the whole range of uint64, lengths, and shares bit by bit; without slots, samples or signs too."""
    if not of:
        sent = Parcel(3, [], [])
    else:
        num_signs = sum(len(bag) for samples in of for bag in samples)
        sent = loopback.parcel(of, random.uniform(-2, 2, num_signs).tolist() if weighted else None)
    found = received(message.write_lookup("run", 2**64 - 1, sent, True, False), len(of))
    assert found.size == sent.size
    for ours, theirs in zip(found.joined()[:2], sent.joined()[:2], strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    shares, expected = found.joined()[2], sent.joined()[2]
    if expected is None or not len(expected):  # no shares, and shares of no signs, are the same message
        assert shares is None
    else:
        assert shares is not None
        assert shares.tobytes() == expected.tobytes()


def test_a_lookup_as_a_stranger_reads_it() -> None:
    """flowps.proto is all that is needed: little-endian, slot after slot, samples in order."""
    sent = loopback.parcel([[[1, 2], [3]], [[], [2**64 - 1]]], [0.5, 1, 2, -1])
    request = pb.LookupRequest.FromString(message.write_lookup("the run", 7, sent, training=True, half=True))
    assert (request.head.protocol, request.head.run) == (1, "the run")
    assert (request.batch, request.size, request.training, request.floats) == (7, 2, True, pb.FLOAT16)
    assert (request.length_bytes, request.lengths) == (1, b"\2\1\0\1")
    assert request.signs == b"".join(sign.to_bytes(8, "little") for sign in (1, 2, 3, 2**64 - 1))
    assert np.frombuffer(request.shares, "<f4").tolist() == [0.5, 1, 2, -1]
    evaluated = pb.LookupRequest.FromString(message.write_lookup("r", 7, sent, training=False, half=False))
    assert (evaluated.training, evaluated.floats) == (False, pb.FLOAT32)


@pytest.mark.parametrize(("longest", "width"), [(0, 1), (255, 1), (256, 2), (65_535, 2), (65_536, 4)])
def test_lengths_are_as_narrow_as_the_longest_bag_lets_them(longest: int, width: int) -> None:
    """And arrive as they were."""
    lengths = np.array([1, longest, 0], np.int32)
    sent = Parcel(3, [np.arange(longest + 1, dtype=np.uint64)], [lengths])
    data = message.write_lookup("run", 0, sent, True, False)
    assert pb.LookupRequest.FromString(data).length_bytes == width
    np.testing.assert_array_equal(received(data, 1).lengths[0], lengths)


LOOKUP = {"size": 2, "length_bytes": 1, "lengths": b"\2\1\0\1", "shares": np.ones(4, "<f4").tobytes()}


@pytest.mark.parametrize(
    ("changed", "num_signs", "said"),
    [
        ({"length_bytes": 0}, 4, "length_bytes: found 0, expected 1, 2 or 4"),
        ({"length_bytes": 3}, 4, "length_bytes: found 3, expected 1, 2 or 4"),
        ({"length_bytes": 8}, 4, "length_bytes: found 8, expected 1, 2 or 4"),
        ({"length_bytes": 2}, 4, r"lengths: found 4 bytes, expected 8: uint16 \[4\]"),
        ({"lengths": b"\2\1\0"}, 4, r"lengths: found 3 bytes, expected 4: uint8 \[4\]"),
        ({"size": 3}, 4, r"lengths: found 4 bytes, expected 6: uint8 \[6\]"),
        ({"size": 2**32 - 1}, 4, r"lengths: found 4 bytes, expected 8589934590"),
        ({"lengths": b"\2\1\0\2"}, 4, r"signs: found 32 bytes, expected 40: uint64 \[5\]"),
        ({}, 3, r"signs: found 24 bytes, expected 32: uint64 \[4\]"),
        ({}, 5, r"signs: found 40 bytes, expected 32: uint64 \[4\]"),
        ({"shares": bytes(12)}, 4, r"shares: found 12 bytes, expected 16: float32 \[4\]"),
        ({"shares": np.array([1, np.nan, 1, 1], "<f4").tobytes()}, 4, "shares: found NaN or infinity, expected finite weights"),
        ({"shares": np.array([1, 1, 1, -np.inf], "<f4").tobytes()}, 4, "shares: found NaN or infinity"),
        (
            {"length_bytes": 4, "lengths": np.full(4, 2**32 - 1, "<u4").tobytes()}, 4,
            r"lengths: found 17179869180 signs in all, more than 2\^31",
        ),
    ],
)  # fmt: skip
def test_arrays_of_a_lookup_that_do_not_fit_together(changed: dict[str, Any], num_signs: int, said: str) -> None:
    """The error names the array, what was found and what was expected; nothing of the size that was promised is allocated."""
    request = pb.LookupRequest(**{**LOOKUP, **changed})
    with pytest.raises(DataError, match=said):
        message.read_parcel(request, memoryview(bytes(8 * num_signs)), 2)


def test_an_answer_is_written_where_it_is_sent_from() -> None:
    """The endpoint gets the message's own memory to write to, on a cache line; a stranger reads float32 in C order."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    given: list[tuple[int, bool]] = []

    def look_up(out: Float32 | None) -> Float32:
        assert out is not None
        given.append((out.ctypes.data % 64, out.flags.c_contiguous))
        out[:] = values
        return out

    data = message.write_reply(look_up, (2, 3), half=False)
    assert given == [(16, True)]
    reply = pb.LookupReply.FromString(data)
    assert reply.embeddings == values.astype("<f4").tobytes()
    np.testing.assert_array_equal(message.read_reply(data, 2, 3, half=False), values)


def test_an_answer_without_floats() -> None:
    """Of no samples, or of a shard without slots."""
    for shape in ((0, 3), (2, 0), (0, 0)):
        for half in (False, True):
            data = message.write_reply(lambda out, shape=shape: np.empty(shape, np.float32) if out is None else out, shape, half)
            assert message.read_reply(data, *shape, half).shape == shape


@pytest.mark.parametrize("half", [False, True])
def test_an_answer_of_another_shape_is_refused(half: bool) -> None:
    """As float16 where float32 was asked for, too."""
    data = message.write_reply(lambda out: np.zeros((2, 3), np.float32) if out is None else out, (2, 3), half)
    with pytest.raises(DataError, match=r"embeddings: found \d+ bytes, expected \d+: float(16|32) \[2, 4\]"):
        message.read_reply(data, 2, 4, half)
    with pytest.raises(DataError, match="embeddings: found"):
        message.read_reply(data, 2, 3, not half)


# --- pushes -----------------------------------------------------------------------------------------------------------


def pushed(data: bytes, width: int) -> Float32:
    """The gradient of a PushRequest, as a server gets it."""
    request = pb.PushRequest()
    array = message.parse(data, request)
    return message.read_gradient(request, array, width)


def test_a_push_as_a_stranger_reads_it() -> None:
    """float32, or float16 times `scale`."""
    gradient = np.array([[1, -2, 0.5], [0, 4, 3]], np.float32)
    request = pb.PushRequest.FromString(message.write_push("run", 9, Lines(gradient), 0.25, half=False))
    assert (request.head.protocol, request.head.run, request.batch, request.size) == (1, "run", 9, 2)
    assert (request.rate_scale, request.floats) == (0.25, pb.FLOAT32)
    assert request.gradient == gradient.astype("<f4").tobytes()
    request = pb.PushRequest.FromString(message.write_push("run", 9, Lines(gradient), 0.25, half=True))
    assert request.floats == pb.FLOAT16
    assert math.log2(request.scale) % 1 == 0  # multiplying by it loses nothing
    np.testing.assert_array_equal(np.frombuffer(request.gradient, "<f2").reshape(2, 3) / np.float32(request.scale), gradient)


@pytest.mark.parametrize("half", [False, True])
def test_columns_of_a_gradient_travel_side_by_side(half: bool) -> None:
    """The shard's own, taken out of the whole buffer's lines."""
    whole = np.arange(20, dtype=np.float32).reshape(2, 10)
    found = pushed(message.write_push("run", 0, Lines(whole, Columns([(0, 6, 3), (3, 1, 2)]), 5), 1.0, half), 5)
    np.testing.assert_array_equal(found, whole[:, [6, 7, 8, 1, 2]])


@pytest.mark.parametrize(
    ("changed", "num_bytes", "said"),
    [
        ({}, 20, r"gradient: found 20 bytes, expected 24: float32 \[2, 3\]"),
        ({}, 28, r"gradient: found 28 bytes, expected 24"),
        ({}, 0, r"gradient: found 0 bytes, expected 24"),
        ({"size": 3}, 24, r"gradient: found 24 bytes, expected 36: float32 \[3, 3\]"),
        ({"size": 2**32 - 1}, 24, r"gradient: found 24 bytes, expected 51539607540"),
        ({"floats": pb.FLOAT16}, 24, r"gradient: found 24 bytes, expected 12: float16 \[2, 3\]"),
        ({"floats": pb.FLOAT16, "scale": 0.0}, 12, "scale of gradient: found 0.0, expected a number"),
        ({"floats": pb.FLOAT16, "scale": -1.0}, 12, "scale of gradient: found -1.0"),
        ({"floats": pb.FLOAT16, "scale": math.nan}, 12, "scale of gradient: found nan"),
        ({"floats": pb.FLOAT16, "scale": math.inf}, 12, "scale of gradient: found inf"),
        ({"rate_scale": -0.5}, 24, "rate_scale: found -0.5, expected a number from 0"),
        ({"rate_scale": math.nan}, 24, "rate_scale: found nan"),
        ({"rate_scale": math.inf}, 24, "rate_scale: found inf"),
    ],
)
def test_a_push_that_does_not_fit_together(changed: dict[str, Any], num_bytes: int, said: str) -> None:
    """The error names the field, what was found and what was expected."""
    request = pb.PushRequest(**{"size": 2, "scale": 1.0, "rate_scale": 1.0, **changed})
    with pytest.raises(DataError, match=said):
        message.read_gradient(request, memoryview(bytes(num_bytes)), 3)


@pytest.mark.parametrize("floats", [2, 7, -1])
def test_floats_of_a_later_version_are_refused(floats: int) -> None:
    """Rather than read as what they are not."""
    with pytest.raises(DataError, match="floats"):
        message.read_gradient(pb.PushRequest(size=2, floats=floats, scale=1, rate_scale=1), memoryview(bytes(24)), 3)


def test_a_scale_too_small_to_divide_by_is_refused() -> None:
    """It would make NaN of zeros."""
    request = pb.PushRequest(size=2, floats=pb.FLOAT16, scale=1e-45, rate_scale=1)
    with pytest.raises(DataError, match="scale of gradient"):
        message.read_gradient(request, memoryview(bytes(12)), 3)


# --- float16 ----------------------------------------------------------------------------------------------------------


def over_the_wire(values: Float32) -> Float32:
    """As float16 and back, by a push and by a lookup's answer, which are the same."""
    back = pushed(message.write_push("run", 0, Lines(values), 1.0, half=True), values.shape[1])
    answer = message.read_reply(message.write_reply(lambda out: values, values.shape, half=True), *values.shape, half=True)
    np.testing.assert_array_equal(back, answer)
    assert back.dtype == np.float32
    return back


def check_bound(values: Float32, found: Float32) -> None:
    """2^-11 of each number, and 2^-38 of the largest for those so small beside it that float16 has fewer bits for them.

    The largest is scaled to 2^14 … 2^15; float16 has 11 significant bits from 2^-14 on, and steps of 2^-24 below.
    """
    wide = values.astype(np.float64)
    bound = np.abs(wide) * 2.0**-11 + np.abs(wide).max(initial=0) * 2.0**-38
    assert (np.abs(found - wide) <= bound).all()
    assert ((found == 0) | (np.sign(found) == np.sign(values))).all()


exponents = st.integers(-45, 111)


@drawn.bounded(max_examples=150)
@given(drawn.generators, exponents, st.integers(0, 30))
@example(np.random.default_rng(0), -45, 30)
@example(np.random.default_rng(0), 111, 30)
def test_float16_is_exact_beside_the_largest(random: np.random.Generator, exponent: int, spread: int) -> None:
    """Whatever the largest is, and however far the others are below it."""
    size, width = random.integers(1, 6, 2)
    values = random.uniform(-1, 1, (size, width)) * 2.0 ** (exponent - random.uniform(0, spread, (size, width)))
    found = over_the_wire(values.astype(np.float32))
    check_bound(values.astype(np.float32), found)


@pytest.mark.parametrize("largest", [1e-30, 1e-25, 1e-20, 1e-8, 1.0, 65_504.0, 65_520.0, 1e10, 1e30])
def test_tiny_gradients_survive(largest: float) -> None:
    """Beside their like as well as they would in float16 beside 1, and a million times smaller ones still to 3 digits."""
    values = np.array([[largest, -largest / 3, largest / 1e6, -largest / 1e8]], np.float32)
    found = over_the_wire(values)
    np.testing.assert_allclose(found[0, :3], values[0, :3], rtol=2.0**-11)
    np.testing.assert_allclose(found[0, 3], values[0, 3], rtol=1e-2)


def test_nothing_is_nothing() -> None:
    """Zeros, also negative ones, and no numbers at all."""
    for values in (np.zeros((2, 3), np.float32), -np.zeros((2, 3), np.float32), np.empty((0, 3), np.float32)):
        assert over_the_wire(values).tobytes() == values.tobytes()


def test_nan_and_infinity_stay_what_they_are() -> None:
    """The shard counts their rows as unsound; the others arrive as if those were not there."""
    values = np.array([[np.nan, 1e-6, -2e-6], [np.inf, 3e-12, -np.inf]], np.float32)
    found = over_the_wire(values)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(values))
    assert found[1, 0] == np.inf
    assert found[1, 2] == -np.inf
    finite = np.isfinite(values)
    check_bound(values[finite][None], found[finite][None])
    for only in (np.nan, np.inf, -np.inf):
        np.testing.assert_array_equal(over_the_wire(np.full((1, 2), only, np.float32)), np.full((1, 2), only))


def test_the_largest_numbers_stay_finite() -> None:
    """As long as 11 bits of them are in the range of float32."""
    values = np.array([[3.4e38, -1e36, 1e32]], np.float32)
    check_bound(values, over_the_wire(values))


@pytest.mark.parametrize("exponent", [-110, -120])
def test_the_smallest_normal_numbers_survive(exponent: int) -> None:
    """Whatever float32 holds with all its digits."""
    values = np.array([[1.2345, -1.001, 1.999]], np.float32) * np.float32(2.0**exponent)
    check_bound(values, over_the_wire(values))

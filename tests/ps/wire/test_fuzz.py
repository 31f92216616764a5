"""Garbage at the server: valid requests with bytes changed, cut, put in and taken out, and with fields changed.

What is answered must be valid by the naive reading of flowps.proto here; all else must get an error status and change nothing: rows
and batches in flight are as before. The server goes on in any case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from flowps.ps.shard import Shard
from flowps.ps.wire import flowps_pb2 as pb
from tests.ps import drawn
from tests.ps.wire.loopback import (
    MAX_BYTES,
    RUN,
    SLOTS,
    WIDTH,
    calling,
    evaluation,
    head,
    local,
    serving,
    shard_of,
    state_of,
)

Code = grpc.StatusCode
KINDS: dict[str, type[Any]] = {
    "Describe": pb.DescribeRequest, "Lookup": pb.LookupRequest, "Find": pb.LookupRequest, "Pool": pb.PoolRequest,
    "Push": pb.PushRequest, "Forget": pb.ForgetRequest,
}  # fmt: skip
# What a stranger may be told; INTERNAL would be a bug, UNKNOWN an exception that got away.
REFUSALS = {Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.NOT_FOUND}


class World:
    """A shard with a batch in flight behind a server, and requests that are valid there."""

    def __init__(self, shard: Shard, call: Callable[..., Any]) -> None:
        self.shard, self.call = shard, call
        self._batch = 0
        self.pushed: set[int] = set()
        self.renew()

    def renew(self) -> None:
        """Put a new batch in flight, and one whose rows are only found; no other."""
        for batch in list(self.shard._remembered):
            self.call("Forget", pb.ForgetRequest(head=head(), batch=batch))
        self._batch += 1000
        self.call("Lookup", self.lookup(self._batch))
        self.call("Find", self.lookup(self._batch + 500))
        self.state = state_of(self.shard)

    def lookup(self, batch: int, weighted: bool = False) -> pb.LookupRequest:
        """Of three samples."""
        shares = np.array([0.5, 1, -1, 2, 1], "<f4").tobytes() if weighted else b""
        return pb.LookupRequest(
            head=head(), batch=batch, size=3, training=True, length_bytes=1, lengths=b"\2\0\1\1\1\0", shares=shares,
            signs=np.array([1, 2**40, 2, 2**63, 2**64 - 1], "<u8").tobytes(),
        )  # fmt: skip

    def valid(self, random: np.random.Generator) -> tuple[str, Message]:
        """One of the requests."""
        batch, half = self._batch, bool(random.integers(2))
        gradient = random.uniform(-1, 1, (3, WIDTH))
        return [
            ("Describe", pb.DescribeRequest(head=head())),
            ("Lookup", self.lookup(batch + 1, weighted=half)),
            ("Find", self.lookup(batch + 2, weighted=half)),
            ("Pool", pb.PoolRequest(head=head(), batch=batch + 500, size=3, floats=pb.FLOAT16 if half else pb.FLOAT32)),
            ("Forget", pb.ForgetRequest(head=head(), batch=batch)),
            ("Push", pb.PushRequest(
                head=head(), batch=batch, size=3, floats=pb.FLOAT16 if half else pb.FLOAT32, scale=1.0, rate_scale=0.5,
                padding=bytes(7), gradient=gradient.astype("<f2" if half else "<f4").tobytes(),
            )),
        ][random.choice(6, p=[0.1, 0.25, 0.15, 0.15, 0.1, 0.25])]  # fmt: skip

    def send(self, name: str, data: bytes) -> grpc.StatusCode:
        """What becomes of a request."""
        in_flight = set(self.shard._remembered)
        refused: Any = None
        try:
            self.call(name, data)
        except grpc.RpcError as error:
            refused = error
        if refused is not None:
            assert refused.code() in REFUSALS, (name, data, refused)
            assert refused.details()
            assert state_of(self.shard) == self.state, (name, data)
            return refused.code()
        assert is_valid(name, data, in_flight, self.pushed), (name, data)
        if state_of(self.shard) != self.state:
            if name == "Push":
                self.pushed.add(pb.PushRequest.FromString(data).batch)
            self.renew()
        return Code.OK


def is_valid(name: str, data: bytes, in_flight: set[int], pushed: set[int]) -> bool:
    """Whether `data` is a request that flowps.proto allows, at a shard with these batches."""
    try:
        request = KINDS[name].FromString(data)
    except DecodeError:
        return False
    if request.head.protocol != 1 or (name != "Describe" and request.head.run != RUN):
        return False
    if name in ("Describe", "Forget"):
        return True
    if request.size > 2**20 or request.size * WIDTH * 4 > MAX_BYTES:
        return False
    if name == "Push":
        return request.batch in pushed or (request.batch in in_flight and request.size == 3 and has_gradient(request))
    if name == "Pool":
        return request.batch in in_flight
    return (request.training and request.batch in in_flight) or (has_parcel(request) and (request.training or name == "Lookup"))


def has_gradient(request: pb.PushRequest) -> bool:
    """Of the right size, with numbers that can be divided by."""
    if request.floats == pb.FLOAT16 and not (math.isfinite(request.scale) and request.scale > 0):
        return False
    floats = request.size * WIDTH
    return len(request.gradient) == floats * (2 if request.floats == pb.FLOAT16 else 4) and 0 <= request.rate_scale < math.inf


def has_parcel(request: pb.LookupRequest) -> bool:
    """Lengths of every bag, as many signs, and as many shares if any."""
    width = request.length_bytes
    if width not in (1, 2, 4) or len(request.lengths) != len(SLOTS) * request.size * width:
        return False
    count = sum(int.from_bytes(request.lengths[at : at + width], "little") for at in range(0, len(request.lengths), width))
    shares = np.frombuffer(request.shares[: len(request.shares) // 4 * 4], "<f4")
    weighted = not request.shares or (len(request.shares) == 4 * count and bool(np.isfinite(shares).all()))
    return len(request.signs) == 8 * count and weighted


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One for all tests here: what a request leaves behind, the next one meets."""
    with (
        shard_of(capacity_rows=100_000, max_in_flight=10) as shard,
        serving(local(shard)) as server,
        calling(server.address) as call,
    ):
        yield World(shard, call)


@pytest.mark.parametrize(
    "changed",
    [
        {"rate_scale": 1e300},
        {"rate_scale": 1e39},
        {"floats": pb.FLOAT16, "scale": 1e-45, "gradient": bytes(6 * WIDTH)},
    ],
)
def test_numbers_beyond_float32_are_refused(changed: dict[str, Any]) -> None:
    """Rows stay finite and the batch in flight."""
    with shard_of() as shard, serving(local(shard)) as server, calling(server.address) as call:
        world = World(shard, call)
        batch, _ = shard._remembered
        whole = {"head": head(), "batch": batch, "size": 3, "scale": 1.0, "rate_scale": 1.0, "gradient": bytes(12 * WIDTH)}
        request = pb.PushRequest(**{**whole, **changed})
        with pytest.raises(grpc.RpcError) as raised:
            call("Push", request)
        assert raised.value.code() is Code.INVALID_ARGUMENT  # type: ignore[attr-defined]
        assert state_of(shard) == world.state


def test_a_signalling_nan_is_a_nan() -> None:
    """As in float32: its rows are counted as unsound and stay, the others are stepped."""
    with shard_of() as shard, serving(local(shard)) as server, calling(server.address) as call:
        World(shard, call)
        batch, _ = shard._remembered
        gradient = np.zeros((3, WIDTH), "<u2")
        gradient[0, 0] = 0x7C01
        request = pb.PushRequest(
            head=head(), batch=batch, size=3, floats=pb.FLOAT16, scale=1.0, rate_scale=1.0, gradient=gradient.tobytes()
        )  # fmt: skip
        call("Push", request)
        assert sum(stats.unsound for stats in shard.stats()) == 2


def mutate(random: np.random.Generator, data: bytes) -> bytes:
    """Some bytes changed, cut, put in, taken out or repeated; more often where the small fields are."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        at = int(random.integers(0, max(1, min(len(changed), random.choice([20, 70, 1000])))))
        kind = random.integers(7)
        if kind == 0:
            changed[at : at + 1] = random.bytes(1)
        elif kind == 1 and changed:
            changed[at] ^= 1 << int(random.integers(8))
        elif kind == 2:
            del changed[int(random.integers(0, len(changed) + 1)) :]
        elif kind == 3:
            changed[at:at] = random.bytes(int(random.integers(1, 6)))
        elif kind == 4:
            del changed[at : at + int(random.integers(1, 9))]
        elif kind == 5:
            changed += random.bytes(int(random.integers(1, 20)))
        else:
            changed += changed[at : at + int(random.integers(1, 60))]
    return bytes(changed)


@drawn.bounded(max_examples=60)
@given(random=drawn.generators)
def test_bytes_changed_at_random(world: World, random: np.random.Generator) -> None:
    """Each refused and without effect, or valid."""
    for _ in range(25):
        name, request = world.valid(random)
        world.send(name, mutate(random, request.SerializeToString()))
    assert len(world.call("Lookup", evaluation())) > 4 * WIDTH


@drawn.bounded(max_examples=100)
@given(name=st.sampled_from(sorted(KINDS)), data=st.binary(max_size=200))
def test_bytes_at_random(world: World, name: str, data: bytes) -> None:
    """Nothing of them is right."""
    assert world.send(name, data) is not Code.OK


def test_every_beginning_of_a_request(world: World) -> None:
    """Cut off after every byte: refused, where it is not valid by chance."""
    random = np.random.default_rng(0)
    answered = 0
    for _ in range(12):
        name, request = world.valid(random)
        data = request.SerializeToString()
        for length in range(0, len(data), 1 if len(data) < 60 else 7):
            answered += world.send(name, data[:length]) is Code.OK
    assert answered < 12 * 5


def test_requests_to_the_wrong_call(world: World) -> None:
    """The other calls' requests, whole: their fields have other meanings."""
    random = np.random.default_rng(1)
    for _ in range(40):
        _, request = world.valid(random)
        for name in KINDS:
            world.send(name, request.SerializeToString())


VALUES: dict[str, list[Any]] = {
    "batch": [0, 1, 2**40, 2**63, 2**64 - 1],
    "size": [0, 1, 2, 4, 255, 2**20, 2**20 + 1, 2**31, 2**32 - 1],
    "training": [False],
    "floats": [pb.FLOAT32, pb.FLOAT16],
    "length_bytes": [0, 1, 2, 3, 4, 8, 2**32 - 1],
    "lengths": [b"", b"\0" * 6, b"\1" * 5, b"\1" * 7, b"\xff" * 6, b"\xff" * 12, b"\xff" * 24, bytes(12), bytes(24)],
    "signs": [b"", bytes(8), bytes(39), bytes(41), bytes(48)],
    "shares": [b"", bytes(19), bytes(20), bytes(21), np.full(5, np.nan, "<f4").tobytes(), np.full(5, np.inf, "<f4").tobytes()],
    "padding": [b"", bytes(1000)],
    "scale": [0.0, -1.0, math.nan, math.inf, -math.inf, 2.0**100, 2.0**-100],
    "rate_scale": [0.0, -0.0, -1e-300, 1.0, math.nan, math.inf, -math.inf],
    "gradient": [b"", bytes(1), bytes(6 * WIDTH - 1), bytes(6 * WIDTH), bytes(12 * WIDTH), bytes(12 * WIDTH + 4), bytes(1000)],
    "head": [pb.Head(), pb.Head(protocol=2, run=RUN), pb.Head(protocol=1), pb.Head(protocol=2**32 - 1, run=RUN)],
}


@drawn.bounded(max_examples=60)
@given(random=drawn.generators)
def test_fields_changed_at_random(world: World, random: np.random.Generator) -> None:
    """One or several take values at the ends of their ranges and beyond."""
    for _ in range(15):
        name, request = world.valid(random)
        for field in random.permutation([field.name for field in request.DESCRIPTOR.fields])[: random.choice([1, 1, 2, 3])]:
            value = VALUES[field][random.integers(len(VALUES[field]))]
            if isinstance(value, Message):
                getattr(request, field).CopyFrom(value)
            else:
                setattr(request, field, value)
        world.send(name, request.SerializeToString())

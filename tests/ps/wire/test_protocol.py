"""What both sides agree on: errors as status codes, gRPC's options, targets."""

from __future__ import annotations

import grpc
import pytest

from flowps.errors import CapacityError, DataError, FlowpsError, StoppedError, UnknownBatchError
from flowps.ps.wire import protocol


@pytest.mark.parametrize("kind", [DataError, CapacityError, UnknownBatchError, StoppedError])
def test_errors_come_back_as_what_they_were(kind: type[FlowpsError]) -> None:
    """By their code, with their message."""
    code = next(code for raised, code in protocol.CODES if raised is kind)
    found = protocol.error_of(code, "what was said")
    assert type(found) is kind
    assert str(found) == "what was said"


def test_codes_are_told_apart() -> None:
    """No two errors share one, and none is a code that calls are made again for, or that stands for the way there."""
    codes = [code for _, code in protocol.CODES]
    assert len(set(codes)) == len(codes)
    for code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAUTHENTICATED", "FAILED_PRECONDITION", "INTERNAL"):
        assert protocol.error_of(grpc.StatusCode[code], "") is None


def test_a_message_may_be_a_little_larger_than_its_array() -> None:
    """And never larger than gRPC can count."""
    options = dict(protocol.options(1 << 20, so_reuseport=0))
    assert options["grpc.max_send_message_length"] == options["grpc.max_receive_message_length"] > 1 << 20
    assert options["grpc.so_reuseport"] == 0
    assert dict(protocol.options(1 << 31))["grpc.max_send_message_length"] == 2**31 - 1


@pytest.mark.parametrize(("host", "target"), [("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80"), ("node7", "node7:80")])
def test_targets(host: str, target: str) -> None:
    """IPv6 addresses stand in brackets."""
    assert protocol.target_of(host, 80) == target

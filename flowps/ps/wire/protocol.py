"""What both sides of the wire agree on beside the messages: the protocol's number, gRPC's options, errors as status codes."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np

from flowps.errors import CapacityError, DataError, StoppedError, UnknownBatchError
from flowps.ps.wire import flowps_pb2 as pb

PROTOCOL = 1
ATTEMPTS = 3  # of one call: each has that part of the call's deadline
SERVICE = pb.DESCRIPTOR.services_by_name["EmbeddingShard"].full_name

CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (DataError, grpc.StatusCode.INVALID_ARGUMENT),
    (CapacityError, grpc.StatusCode.OUT_OF_RANGE),
    (UnknownBatchError, grpc.StatusCode.NOT_FOUND),
    (StoppedError, grpc.StatusCode.ABORTED),
)


def error_of(code: grpc.StatusCode, said: str) -> Exception | None:
    """What the endpoint has raised, by the status code it came as; None for a code that stands for the way there."""
    return next((kind(said) for kind, of in CODES if of is code), None)


def options(max_message_bytes: int, **more: Any) -> list[tuple[str, Any]]:
    """gRPC options of both sides."""
    # A message has a little beside its array.
    limit = min(max_message_bytes + (1 << 16), np.iinfo(np.int32).max)
    return [
        ("grpc.max_send_message_length", limit), ("grpc.max_receive_message_length", limit),
        *((f"grpc.{name}", value) for name, value in more.items()),
    ]  # fmt: skip


def target_of(host: str, port: int) -> str:
    """host:port, as gRPC takes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

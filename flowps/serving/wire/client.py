"""`EmbeddingClient`: asks a server of `python -m flowps.serve` for rows. Any thread may call any method."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from numpy.typing import ArrayLike

from flowps.batch import Float32, Uint64
from flowps.errors import DataError, UnreachableError, WireError
from flowps.serving.wire import serving_pb2 as pb
from flowps.serving.wire.security import Tls

_SERVICE = pb.DESCRIPTOR.services_by_name["Embeddings"].full_name
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)


@dataclass(frozen=True)
class ServedSlot:
    """A slot as the server describes it; `seed` and `hash_size` make its signs."""

    name: str
    dim: int
    rows: int
    seed: int
    hash_size: int
    dtype: str
    pooling: str


@dataclass(frozen=True)
class Served:
    """What a server serves. `hash`: the rule that makes signs of values; `created`: Unix time."""

    version: int
    flowps: str
    created: float
    run: str
    steps: int
    hash: str
    slots: tuple[ServedSlot, ...]


@dataclass(frozen=True)
class Answer:
    """Rows float32 [n, dim] of each slot, how many of its signs have none, and the bundle's version that all are of."""

    version: int
    rows: dict[str, Float32]
    unknown: dict[str, int]


class EmbeddingClient:
    """Of the server at `address`, as in "127.0.0.1:50051". To be closed, or used with `with`.

    tls_ca             PEM file of the authority that signed the server's certificate; "": no TLS
    tls_cert, tls_key  one's own certificate, where the server asks for one
    tls_name           the name in the server's certificate, where it is not that of `address`
    timeout_s          of a call
    """

    def __init__(
        self, address: str, *, tls_ca: str = "", tls_cert: str = "", tls_key: str = "", tls_name: str = "", timeout_s: float = 5.0,
    ) -> None:  # fmt: skip
        self._address, self._timeout_s = address, timeout_s
        options: list[tuple[str, Any]] = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        credentials = Tls(tls_cert, tls_key, tls_ca).channel_credentials()
        if credentials is not None and tls_name:
            options.append(("grpc.ssl_target_name_override", tls_name))
        self._channel = (
            grpc.insecure_channel(address, options) if credentials is None else grpc.secure_channel(address, credentials, options)
        )
        self._describe = self._channel.unary_unary(
            f"/{_SERVICE}/Describe", pb.DescribeRequest.SerializeToString, pb.DescribeReply.FromString
        )
        self._lookup = self._channel.unary_unary(
            f"/{_SERVICE}/Lookup", pb.LookupRequest.SerializeToString, pb.LookupReply.FromString
        )

    def lookup(self, signs: Mapping[str, ArrayLike]) -> dict[str, Float32]:
        """Slot → rows, float32 [n, dim], of its uint64 `signs` [n]; zeros for a sign without a row. Raises as `ask`."""
        return self.ask(signs).rows

    def ask(self, signs: Mapping[str, ArrayLike]) -> Answer:
        """As `lookup`, and what the server says besides.

        Raises DataError for a request that the server refuses, UnreachableError when it does not answer in time or has too many
        calls, and WireError for all else.
        """
        request = pb.LookupRequest()
        for name, values in signs.items():
            request.slots.add(name=name, signs=_signs(name, values).tolist())
        reply = self._call(self._lookup, request)
        return Answer(
            reply.version,
            {slot.name: np.frombuffer(slot.rows, "<f4").reshape(-1, slot.dim) for slot in reply.slots},
            {slot.name: slot.unknown for slot in reply.slots},
        )

    def describe(self) -> Served:
        """What is served now. Raises as `ask`."""
        found = self._call(self._describe, pb.DescribeRequest())
        slots = tuple(ServedSlot(s.name, s.dim, s.rows, s.seed, s.hash_size, s.dtype, s.pooling) for s in found.slots)
        return Served(found.version, found.flowps, found.created, found.run, found.steps, found.hash, slots)

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._channel.close()

    def __enter__(self) -> EmbeddingClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _call(self, call: Any, request: Any) -> Any:
        try:
            return call(request, timeout=self._timeout_s)
        except ValueError:  # what gRPC says of a closed channel
            raise WireError(f"{self._address}: the connection was closed") from None
        except grpc.RpcError as error:
            code, said = error.code(), error.details()
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            raise DataError(said)
        kind = UnreachableError if code in _PASSING else WireError
        raise kind(f"{self._address}: {code.name}: {said}; is it the address of python -m flowps.serve?")


def _signs(name: str, values: ArrayLike) -> Uint64:
    found = values if isinstance(values, np.ndarray) else np.array(values, object)
    if found.dtype == object and all(isinstance(value, int | np.integer) for value in found.flat):
        with suppress(OverflowError):  # by way of float64 a list of small and large numbers would lose digits
            found = np.array(found.tolist(), np.uint64)
    if found.ndim != 1 or found.dtype.kind not in "iu" or (found.dtype.kind == "i" and (found < 0).any()):
        raise DataError(f"slot {name!r}: signs must be whole numbers from 0 to 2^64 - 1, in one row: see flowps.serving.signs_of")
    return found.astype(np.uint64, copy=False)

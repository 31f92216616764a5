"""`RemoteShard`: an endpoint in another process, over gRPC.

Every call has a deadline. Lookups and pushes are sent again when the way there fails: the server makes a lookup's answer once and
applies a push once, whatever comes twice (see `once`). Any thread may call any method.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import grpc
import numpy as np

from flowps.batch import Float32
from flowps.errors import CapacityError, StoppedError, UnreachableError, WireError
from flowps.heap import keep_memory
from flowps.ps.endpoint import Endpoint
from flowps.ps.parcel import Lines, Parcel
from flowps.ps.wire import flowps_pb2 as pb
from flowps.ps.wire import message
from flowps.ps.wire.protocol import ATTEMPTS, PROTOCOL, SERVICE, error_of, options
from flowps.ps.wire.security import Security
from flowps.version import __version__

_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)
_random = random.Random()  # not that which models may be seeded with
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class RemoteShard(Endpoint):
    """Shard `number` of run `run` at `address`.

    slots              name, width, part and parts of each, as the server must have them
    half               whether embeddings and gradients travel as float16
    max_message_bytes  of the largest array in a message
    timeout_s          of one lookup or push, repetitions included
    count              told the name of everything worth counting (`rpc_retries`)
    """

    def __init__(
        self, address: str, number: int, run: str, slots: Sequence[tuple[str, int, int, int]], security: Security, *,
        half: bool = False, max_message_bytes: int = 1 << 30, timeout_s: float = 60.0,
        count: Callable[[str], None] = lambda name: None,
    ) -> None:  # fmt: skip
        self._address, self._number, self._run, self._slots = address, number, run, list(slots)
        self._width = sum(width for _, width, _, _ in slots)
        self._half, self._max_bytes, self._timeout_s, self._count = half, max_message_bytes, timeout_s, count
        keep_memory()
        self._metadata = security.metadata
        credentials = security.channel_credentials()
        more = {"ssl_target_name_override": security.name} if credentials and security.name else {}
        opts = options(max_message_bytes, use_local_subchannel_pool=1, **more)
        self._channel = grpc.secure_channel(address, credentials, opts) if credentials else grpc.insecure_channel(address, opts)
        names = ("Describe", "Lookup", "Find", "Pool", "Push", "Forget")
        self._calls = {name: self._channel.unary_unary(f"/{SERVICE}/{name}") for name in names}

    def connect(self, timeout_s: float) -> None:
        """Wait until the server is there, and check that it is the right one. Raises WireError."""
        request = pb.DescribeRequest(head=pb.Head(protocol=PROTOCOL, run=self._run)).SerializeToString()
        found = pb.DescribeReply()
        message.parse(self._describe(request, timeout_s), found)
        self._check(found)

    def _describe(self, request: bytes, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.001, deadline - time.monotonic())
            try:
                answer: bytes = self._calls["Describe"](request, timeout=left_s, metadata=self._metadata, wait_for_ready=True)
                return answer
            except ValueError:  # what gRPC says of a closed channel
                raise StoppedError(f"{self._name}: the connection was closed") from None
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise WireError(
                        f"{self._name} does not answer within {timeout_s:g} s: can this machine reach it? (cluster.interface "
                        "chooses the network, cluster.connect_timeout_s waits longer; with TLS on one side only nobody answers "
                        f"either){self._what_is_wrong(request)}"
                    ) from None
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or left_s <= _FIRST_PAUSE_S:
                    self._refused("Describe", error)
            time.sleep(_FIRST_PAUSE_S * _random.uniform(0.5, 1.0))

    def _what_is_wrong(self, request: bytes) -> str:
        """What gRPC says of the way there; it says so only to those who do not wait for it."""
        try:
            self._calls["Describe"](request, timeout=_FIRST_PAUSE_S, metadata=self._metadata)
        except grpc.RpcError as error:
            return f": {error.details()}" if error.code() is grpc.StatusCode.UNAVAILABLE else ""
        return ""

    def _check(self, found: pb.DescribeReply) -> None:
        if found.version != __version__:
            raise WireError(f"{self._name} has flowps {found.version}, this trainer {__version__}: install the same version")
        there = [(slot.name, slot.width, slot.part, slot.parts) for slot in found.slots]
        # The smaller limit is that of both: what is too large for the server stays so however often it is sent.
        self._max_bytes = min(self._max_bytes, found.max_message_bytes)
        differ = [k for k, (theirs, ours) in enumerate(zip(there, self._slots, strict=False)) if theirs != ours]
        if (found.run, found.shard) == (self._run, self._number) and differ:
            (name, *theirs), (wanted, *ours) = there[differ[0]], self._slots[differ[0]]
            raise WireError(
                f"{self._name} has slot {name!r} (width, part, parts: {theirs}) where this trainer has slot {wanted!r} ({ours}): "
                "is an old server still on this port?"
            )
        if (found.run, found.shard, there) != (self._run, self._number, self._slots):
            raise WireError(
                f"{self._name} is shard {found.shard} of run {found.run!r} with {len(there)} slots, not shard {self._number} of "
                f"run {self._run!r} with {len(self._slots)}: is an old server still on this port?"
            )

    def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Float32 | None = None) -> Float32:
        """See Endpoint."""
        return self._read(self._send("Lookup", batch_id, self._lookup_request(batch_id, parcel, training)), parcel.size, out)

    def find(self, batch_id: int, parcel: Parcel) -> None:
        """See Endpoint."""
        self._send("Find", batch_id, self._lookup_request(batch_id, parcel, training=True))

    def pool(self, batch_id: int, size: int, out: Float32 | None = None) -> Float32:
        """See Endpoint."""
        return self._read(self._send("Pool", batch_id, message.write_pool(self._run, batch_id, size, self._half)), size, out)

    def push(self, batch_id: int, gradient: Lines, rate_scale: float) -> int:
        """See Endpoint."""
        request = message.write_push(self._run, batch_id, gradient, rate_scale, self._half)
        self._check_size(batch_id, len(request))
        reply = pb.PushReply()
        message.parse(self._send("Push", batch_id, request), reply)
        return int(reply.rows)

    def forget(self, batch_id: int) -> None:
        """See Endpoint."""
        head = pb.Head(protocol=PROTOCOL, run=self._run)
        self._send("Forget", batch_id, pb.ForgetRequest(head=head, batch=batch_id).SerializeToString())

    def close(self) -> None:
        """End the connection; calls that wait raise StoppedError. Idempotent."""
        self._channel.close()

    @property
    def _name(self) -> str:
        return f"shard {self._number} at {self._address}"

    def _lookup_request(self, batch_id: int, parcel: Parcel, training: bool) -> bytes:
        request = message.write_lookup(self._run, batch_id, parcel, training, self._half)
        self._check_size(batch_id, max(len(request), parcel.size * self._width * 4))
        return request

    def _read(self, answer: bytes, size: int, out: Float32 | None) -> Float32:
        """The embeddings of a LookupReply, in `out` if it is given."""
        embeddings = message.read_reply(answer, size, self._width, self._half)
        if out is None:
            return embeddings
        np.copyto(out, embeddings)
        return out

    def _check_size(self, batch_id: int, size: int) -> None:
        if size > self._max_bytes:
            raise CapacityError(
                f"batch {batch_id}: a message of {size:,} bytes between trainer and {self._name}, but cluster.max_message_mib "
                f"allows {self._max_bytes:,}; lower data.batch_size, raise cluster.max_message_mib (2047 at most) or add shards"
            )

    def _send(self, name: str, batch_id: int, request: bytes) -> bytes:
        """The answer, after as many attempts as the deadline allows."""
        deadline = time.monotonic() + self._timeout_s
        pause_s = _FIRST_PAUSE_S
        while True:
            attempt_s = min(self._timeout_s / ATTEMPTS, deadline - time.monotonic())
            try:
                answer: bytes = self._calls[name](request, timeout=max(0.001, attempt_s), metadata=self._metadata)
                return answer
            except ValueError:  # what gRPC says of a closed channel
                raise StoppedError(f"{self._name}: {name} of batch {batch_id}: the connection was closed") from None
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.CANCELLED:
                    raise StoppedError(f"{self._name}: {name} of batch {batch_id}: the connection was closed") from None
                if error.code() not in _PASSING or time.monotonic() + pause_s >= deadline:
                    self._refused(f"{name} of batch {batch_id}", error)
            self._count("rpc_retries")
            time.sleep(pause_s * _random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _refused(self, what: str, error: grpc.RpcError) -> NoReturn:
        code, said = error.code(), error.details()
        raised = error_of(code, said)
        if raised is not None:
            raise raised from None
        found = f"{self._name}: {what}: {code.name}: {said}"
        if code in _PASSING:
            raise UnreachableError(f"{found}; no answer within {self._timeout_s:g} s (cluster.rpc_timeout_s)") from None
        raise WireError(found) from None

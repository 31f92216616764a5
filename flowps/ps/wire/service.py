"""`ShardServer`: an endpoint on the network, as flowps.proto describes it, with the standard health and reflection services.

Covers listening, who is admitted, the bounded queue, and errors as status codes. What a call does is the endpoint's; that it may
come again is `once`'s.

Threads: gRPC's own accept; a pool of its own works on calls, a few more may wait, later ones are refused before
their message is read (RESOURCE_EXHAUSTED) and come again: memory stays bounded, and the trainers wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from flowps.batch import Float32
from flowps.errors import DataError, WireError
from flowps.heap import keep_memory
from flowps.ps.endpoint import Endpoint
from flowps.ps.parcel import Lines
from flowps.ps.wire import flowps_pb2 as pb
from flowps.ps.wire import message
from flowps.ps.wire.once import Once
from flowps.ps.wire.protocol import ATTEMPTS, CODES, PROTOCOL, SERVICE, options, target_of
from flowps.ps.wire.security import Security
from flowps.status.run_status import RunStatus
from flowps.version import __version__

_MOST_SAMPLES = 1 << 20  # of a batch: data.batch_size ends there
_WAITING = 8  # calls that may wait for a thread; more are refused
_MOST_SAID_BYTES = 2000  # of an error: it is a header of up to three times that, and gRPC takes 8 KiB of them
_GRACE_S = 1.0  # for calls that still run when a server closes


@dataclass(frozen=True)
class Served:
    """What a server tells of its shard.

    slots   name, width, part and parts of each, in the order of a parcel
    """

    run: str
    shard: int
    slots: Sequence[tuple[str, int, int, int]]
    max_message_bytes: int

    @property
    def width(self) -> int:
        """Floats of one sample's embeddings."""
        return sum(width for _, width, _, _ in self.slots)


class ShardServer:
    """Serves `endpoint` on `host` until `close`.

    port       0: any free one
    in_flight  batches that all trainers together may have in flight
    status     gets the stages QueueWait (until a thread takes a call) and Reply (a lookup's message read and its answer written)

    Raises WireError when it cannot listen there, or must not (see Security.check_host).
    """

    def __init__(
        self, endpoint: Endpoint, served: Served, security: Security, host: str, port: int, in_flight: int,
        status: RunStatus | None = None,
    ) -> None:  # fmt: skip
        security.check_host(host)
        keep_memory()
        # Every batch may have a lookup and a push here, each with its repetitions that wait for the first.
        threads = max(4, 2 * ATTEMPTS * in_flight)
        status = status or RunStatus()
        self._threads = _TimedPool(threads, status)
        self._server = grpc.server(
            self._threads, interceptors=[_Admission(security)],
            maximum_concurrent_rpcs=threads + _WAITING, options=options(served.max_message_bytes, so_reuseport=0),
        )  # fmt: skip
        calls = _Calls(endpoint, served, in_flight, status)
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(_answering(call))
            for name, call in (
                ("Describe", calls.describe), ("Lookup", calls.lookup), ("Find", calls.find), ("Pool", calls.pool),
                ("Push", calls.push), ("Forget", calls.forget),
            )
        }  # fmt: skip
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        credentials = security.server_credentials()
        target = target_of(host, port)
        try:
            bound = self._server.add_secure_port(target, credentials) if credentials else self._server.add_insecure_port(target)
        except RuntimeError:
            bound = 0
        if not bound:
            raise WireError(
                f"shard {served.shard} cannot listen on {target}: the port is taken, or the address is not this machine's; "
                "choose another ps.port (0: any free one), or another cluster.interface"
            )
        self._server.start()
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self.address = target_of(host, bound)

    def close(self) -> None:
        """Stop listening; calls that still run have a second. Idempotent."""
        self._health.enter_graceful_shutdown()
        self._server.stop(_GRACE_S).wait()
        ending = threading.Thread(target=self._threads.shutdown, daemon=True)
        ending.start()
        ending.join(_GRACE_S)  # a call that hangs has had its time


class _TimedPool(ThreadPoolExecutor):
    """Observes how long work waits for a thread."""

    def __init__(self, threads: int, status: RunStatus) -> None:
        super().__init__(threads, "flowps-ps-server")
        self._waited = status.stage("QueueWait")

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """See Executor."""
        submitted = time.perf_counter()

        def run() -> Any:
            self._waited.observe(time.perf_counter() - submitted)
            return function(*arguments, **named)

        return super().submit(run)


class _RefusedError(Exception):
    """A call's status code and what is said with it."""

    def __init__(self, code: grpc.StatusCode, said: str) -> None:
        super().__init__(said)
        self.code = code


class _Calls:
    """The calls: bytes in, bytes out."""

    def __init__(self, endpoint: Endpoint, served: Served, in_flight: int, status: RunStatus) -> None:
        self._endpoint, self._served, self._reply = endpoint, served, status.stage("Reply")
        self._once = Once(kept_pushes=max(1024, 16 * in_flight))

    def describe(self, data: bytes) -> bytes:
        request = pb.DescribeRequest()
        message.parse(data, request)
        self._check(request.head, any_run=True)
        slots = [
            pb.DescribeReply.Slot(name=name, width=width, part=part, parts=parts)
            for name, width, part, parts in self._served.slots
        ]  # fmt: skip
        return pb.DescribeReply(
            protocol=PROTOCOL, version=__version__, run=self._served.run, shard=self._served.shard, slots=slots,
            max_message_bytes=self._served.max_message_bytes,
        ).SerializeToString()  # fmt: skip

    def lookup(self, data: bytes) -> bytes:
        request, signs, half = self._asked(data)

        def work() -> bytes:
            began = time.perf_counter()
            parcel = message.read_parcel(request, signs, len(self._served.slots))
            return self._answer(
                began, request, half, lambda out: self._endpoint.lookup(request.batch, parcel, request.training, out)
            )

        return self._once.lookup(request.batch, work) if request.training else work()

    def find(self, data: bytes) -> bytes:
        request, signs, _ = self._asked(data)
        if not request.training:
            raise DataError("rows are found ahead in training only: an evaluation looks up")

        def work() -> None:
            began = time.perf_counter()
            parcel = message.read_parcel(request, signs, len(self._served.slots))
            self._reply.observe(time.perf_counter() - began)
            self._endpoint.find(request.batch, parcel)

        self._once.find(request.batch, work)
        return pb.FindReply().SerializeToString()

    def pool(self, data: bytes) -> bytes:
        request = pb.PoolRequest()
        message.parse(data, request)
        self._check(request.head)
        self._check_size(request.size)
        half = message.wants_half(request.floats)

        def work() -> bytes:
            began = time.perf_counter()
            return self._answer(began, request, half, lambda out: self._endpoint.pool(request.batch, request.size, out))

        return self._once.lookup(request.batch, work)

    def push(self, data: bytes) -> bytes:
        request = pb.PushRequest()
        array = message.parse(data, request)
        self._check(request.head)
        self._check_size(request.size)

        def work() -> int:
            gradient = message.read_gradient(request, array, self._served.width)
            return self._endpoint.push(request.batch, Lines(gradient), request.rate_scale)

        return pb.PushReply(rows=self._once.push(request.batch, work)).SerializeToString()

    def forget(self, data: bytes) -> bytes:
        request = pb.ForgetRequest()
        message.parse(data, request)
        self._check(request.head)
        self._once.forget(request.batch)
        self._endpoint.forget(request.batch)
        return pb.ForgetReply().SerializeToString()

    def _asked(self, data: bytes) -> tuple[pb.LookupRequest, memoryview, bool]:
        """A LookupRequest, its signs, and whether the answer is to be in float16."""
        request = pb.LookupRequest()
        signs = message.parse(data, request)
        self._check(request.head)
        self._check_size(request.size)
        return request, signs, message.wants_half(request.floats)

    def _answer(
        self, began: float, request: pb.LookupRequest | pb.PoolRequest, half: bool, read: Callable[[Float32 | None], Float32]
    ) -> bytes:
        """A LookupReply of what `read` gives; the time since `began` that is not in it is the stage Reply."""
        in_shard_s = 0.0

        def timed(out: Float32 | None) -> Float32:
            nonlocal in_shard_s
            start = time.perf_counter()
            found = read(out)
            in_shard_s = time.perf_counter() - start
            return found

        answer = message.write_reply(timed, (request.size, self._served.width), half)
        self._reply.observe(time.perf_counter() - began - in_shard_s)
        return answer

    def _check(self, head: pb.Head, any_run: bool = False) -> None:
        if head.protocol != PROTOCOL:
            raise _RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the client speaks protocol {head.protocol}, this server (flowps {__version__}) protocol {PROTOCOL}: "
                "install the same version of flowps on both",
            )
        if not any_run and head.run != self._served.run:
            raise _RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the client belongs to run {head.run!r}, this shard to run {self._served.run!r}",
            )

    def _check_size(self, size: int) -> None:
        """Before anything of that size is allocated."""
        if size > _MOST_SAMPLES or size * self._served.width * 4 > self._served.max_message_bytes:
            raise DataError(
                f"{size} samples with {self._served.width} floats each are more than a message of "
                f"{self._served.max_message_bytes} bytes holds"
            )


def _answering(call: Callable[[bytes], bytes]) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    """`call` as gRPC wants it, its errors as status codes."""

    def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return call(data)
        except _RefusedError as refused:
            _abort(context, refused.code, str(refused))
        except Exception as error:
            code = next((code for kind, code in CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
            said = str(error) if code is not grpc.StatusCode.INTERNAL else f"{type(error).__name__}: {error}"
            _abort(context, code, said)

    return answer


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, said: str) -> NoReturn:
    cut = said.encode()[:_MOST_SAID_BYTES].decode(errors="ignore")
    context.abort(code, said if cut == said else f"{cut} …")
    raise AssertionError("abort raises")


class _Admission(grpc.ServerInterceptor):
    """Refuses calls without the token before their message is read; health may be asked by anyone."""

    def __init__(self, security: Security) -> None:
        self._security = security

        def refuse(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            _abort(
                context, grpc.StatusCode.UNAUTHENTICATED,
                "the call carries no token, or another one: cluster.token_file must hold the same text on all machines",
            )  # fmt: skip

        # As of a stream of requests, none of which is asked for: a single one would have been read before.
        self._refusing = grpc.stream_unary_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        if details.method.startswith(f"/{health.SERVICE_NAME}/") or self._security.admits(details.invocation_metadata):
            return continuation(details)
        return self._refusing

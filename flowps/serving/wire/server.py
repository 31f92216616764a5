"""`LookupServer`: a bundle's embeddings on the network, as serving.proto describes it, with the standard health and reflection
services.

Threads: gRPC's own accept; a pool of its own works on calls, a few more may wait, later ones are refused (RESOURCE_EXHAUSTED):
memory stays bounded.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from flowps.errors import DataError, WireError
from flowps.hub.hashing import slot_seed
from flowps.serving.live import Live, Meter
from flowps.serving.rows import Tables
from flowps.serving.vectors import RULE
from flowps.serving.wire import serving_pb2 as pb
from flowps.serving.wire.security import Tls

SERVICE = pb.DESCRIPTOR.services_by_name["Embeddings"].full_name
_WAITING = 64  # calls that may wait for a thread; more are refused
_SLACK_BYTES = 1 << 16  # of a message beside its rows
_MOST_SAID_BYTES = 2000  # of an error: gRPC takes 8 KiB of headers


class LookupServer:
    """Serves what is `live` on `host` until `close`.

    port               0: any free one
    threads            that work on calls
    max_message_bytes  of a request and of an answer

    Raises WireError when it cannot listen there, and ConfigError for certificates that are none.
    """

    def __init__(
        self, live: Live, meter: Meter, host: str, port: int, *, tls: Tls = Tls(), threads: int = 8,  # noqa: B008  immutable
        max_message_bytes: int = 64 << 20,
    ) -> None:  # fmt: skip
        credentials = tls.server_credentials()
        self._threads = ThreadPoolExecutor(threads, "flowps-serve")
        limit = max_message_bytes + _SLACK_BYTES
        self._server = grpc.server(
            self._threads, maximum_concurrent_rpcs=threads + _WAITING,
            options=[("grpc.max_send_message_length", limit), ("grpc.max_receive_message_length", limit), ("grpc.so_reuseport", 0)],
        )  # fmt: skip
        calls = _Calls(live, meter, max_message_bytes)
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(_answering(name, call, meter))
            for name, call in (("Describe", calls.describe), ("Lookup", calls.lookup))
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        target = _target(host, port)
        try:
            bound = self._server.add_secure_port(target, credentials) if credentials else self._server.add_insecure_port(target)
        except RuntimeError:
            bound = 0
        if not bound:
            self._threads.shutdown()
            raise WireError(
                f"cannot listen on {target}: the port is taken, or the address is not this machine's; choose another --port (0: "
                "any free one) or --host"
            )
        self._server.start()
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self.address = _target(host, bound)

    def close(self, grace_s: float = 5.0) -> None:
        """Say that it ends, take no more calls, and let those that run end within `grace_s`. Idempotent."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait()
        self._threads.shutdown()


class _Calls:
    """The two calls: bytes in, bytes out."""

    def __init__(self, live: Live, meter: Meter, max_message_bytes: int) -> None:
        self._live, self._meter, self._max_bytes = live, meter, max_message_bytes

    def describe(self, data: bytes) -> bytes:
        _parse(data, pb.DescribeRequest())
        tables = self._live.tables
        manifest = tables.manifest
        slots = [
            pb.DescribeReply.Slot(
                name=slot.name, dim=slot.dim, rows=slot.rows, seed=int(slot_seed(slot.name)), hash_size=slot.hash_size,
                dtype=slot.dtype, pooling=slot.pooling,
            )
            for slot in manifest.slots
        ]  # fmt: skip
        return pb.DescribeReply(
            version=tables.version.number, flowps=manifest.flowps, created=manifest.created, run=manifest.run, steps=manifest.steps,
            hash=RULE, slots=slots,
        ).SerializeToString()  # fmt: skip

    def lookup(self, data: bytes) -> bytes:
        request = pb.LookupRequest()
        _parse(data, request)
        tables = self._live.tables
        self._check(request, tables)
        reply = pb.LookupReply(version=tables.version.number)
        for slot in request.slots:
            rows = tables.rows[slot.name]
            found, unknown = rows.read(np.array(slot.signs, np.uint64))
            reply.slots.add(name=slot.name, dim=rows.dim, unknown=unknown, rows=found.astype("<f4", copy=False).tobytes())
            self._meter.looked_up(slot.name, len(slot.signs), unknown)
        return reply.SerializeToString()

    def _check(self, request: pb.LookupRequest, tables: Tables) -> None:
        """Before anything of the answer's size is allocated."""
        for slot in request.slots:
            if slot.name not in tables.rows:
                known = list(tables.rows)
                near = difflib.get_close_matches(slot.name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known[:20])}{', …' * (len(known) > 20)}"
                raise DataError(f"no slot {slot.name!r} in version {tables.version.number} of the bundle{hint}")
        size = sum(len(slot.signs) * tables.rows[slot.name].dim * 4 for slot in request.slots)
        if size > self._max_bytes:
            raise DataError(
                f"the answer would have {size:,} bytes, more than the {self._max_bytes:,} of a message; ask for fewer signs "
                "at once, or raise --max_message_mib"
            )


def _parse(data: bytes, into: Any) -> None:
    try:
        into.ParseFromString(data)
    except DecodeError as error:
        raise DataError(f"the request is no {into.DESCRIPTOR.full_name}: {error}") from None


def _answering(name: str, call: Callable[[bytes], bytes], meter: Meter) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    """`call` as gRPC wants it, its errors as status codes."""

    def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
        began, code, said = time.perf_counter(), grpc.StatusCode.OK, ""
        try:
            return call(data)
        except DataError as error:
            code, said = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except Exception as error:
            code, said = grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"
        finally:
            meter.answered(name, code.name, time.perf_counter() - began)
        context.abort(code, said.encode()[:_MOST_SAID_BYTES].decode(errors="ignore"))
        raise AssertionError("abort raises")

    return answer


def _target(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

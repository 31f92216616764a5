"""A shard behind a server on loopback, clients of it, endpoints that do what a test wants, and a relay that breaks connections."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

import grpc
import numpy as np

from flowps.batch import Float32
from flowps.ps.endpoint import Endpoint, LocalEndpoint
from flowps.ps.parcel import Lines, Parcel
from flowps.ps.shard import Shard
from flowps.ps.wire import flowps_pb2 as pb
from flowps.ps.wire import service
from flowps.ps.wire.protocol import ATTEMPTS, PROTOCOL, SERVICE
from flowps.ps.wire.remote import RemoteShard
from flowps.ps.wire.security import Security
from flowps.ps.wire.service import Served, ShardServer
from tests.ps import drawn

HOST, RUN = "127.0.0.1", "run-1"
PLAIN = Security(ca="", cert="", key="", name="", token="a secret", insecure=False)
SLOTS = [drawn.slot("a", dim=4, optimizer="sgd", learning_rate=1.0), drawn.slot("b", dim=8)]
SIGNATURE = [(slot.name, slot.width, 0, 1) for slot in SLOTS]
WIDTH = sum(slot.width for slot in SLOTS)
MAX_BYTES = 1 << 20
THREADS = 2 * ATTEMPTS  # of a server for one batch in flight
QUEUE = THREADS + service._WAITING  # calls that it takes
LONG_S = 60.0  # a deadline that is never reached in a test that passes


@contextmanager
def shard_of(capacity_rows: int = 1000, max_in_flight: int = 4, threads: int = 1) -> Iterator[Shard]:
    """A shard of SLOTS."""
    with closing(Shard(SLOTS, [capacity_rows] * len(SLOTS), 7, max_in_flight, threads)) as shard:
        yield shard


def local(shard: Shard) -> LocalEndpoint:
    """The shard as an endpoint."""
    return LocalEndpoint(shard, [slot.width for slot in SLOTS])


@contextmanager
def serving(
    endpoint: Endpoint, security: Security = PLAIN, *, in_flight: int = 4, run: str = RUN, shard: int = 0,
    slots: Sequence[tuple[str, int, int, int]] = SIGNATURE, max_bytes: int = MAX_BYTES, host: str = HOST, port: int = 0,
) -> Iterator[ShardServer]:  # fmt: skip
    """A server of `endpoint`."""
    with closing(ShardServer(endpoint, Served(run, shard, slots, max_bytes), security, host, port, in_flight)) as server:
        yield server


@contextmanager
def reaching(address: str, security: Security = PLAIN, **more: Any) -> Iterator[RemoteShard]:
    """A client of the server at `address`; SLOTS of RUN unless `more` says otherwise."""
    given: dict[str, Any] = {
        "number": 0, "run": RUN, "slots": SIGNATURE, "max_message_bytes": MAX_BYTES, "timeout_s": LONG_S, **more
    }  # fmt: skip
    with closing(RemoteShard(address, security=security, **given)) as remote:
        yield remote


@contextmanager
def a_remote_shard(there: dict[str, Any] | None = None, **more: Any) -> Iterator[tuple[RemoteShard, Shard]]:
    """A client, and the shard that it reaches; `there`: settings of the server."""
    with shard_of() as shard, reached(local(shard), there, **more) as remote:
        yield remote, shard


@contextmanager
def reached(endpoint: Endpoint, there: dict[str, Any] | None = None, **more: Any) -> Iterator[RemoteShard]:
    """A client of `endpoint` behind a server."""
    with serving(endpoint, **(there or {})) as server, reaching(server.address, **more) as remote:
        yield remote


@contextmanager
def calling(address: str, token: str | None = PLAIN.token) -> Iterator[Callable[..., Any]]:
    """`call(name, request)` of a stranger who knows the messages only; `call.future` to go on meanwhile."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    limit = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, limit) as channel:

        def call(name: str, request: Any, timeout: float = LONG_S, wait: bool = True) -> Any:
            of = channel.unary_unary(name if name.startswith("/") else f"/{SERVICE}/{name}")
            data = request if isinstance(request, bytes) else request.SerializeToString()
            if not wait:
                return of.future(data, timeout=timeout, metadata=metadata)
            return of(data, timeout=timeout, metadata=metadata)

        yield call


@contextmanager
def filled(address: str) -> Iterator[list[Any]]:
    """The queue of a server for one batch in flight, whose endpoint lets nobody out; the calls in it."""
    with calling(address) as call:
        done = threading.Semaphore(0)
        sent = [call("Lookup", evaluation(), wait=False) for _ in range(QUEUE + 5)]
        for of in sent:
            of.add_done_callback(lambda _: done.release())
        for _ in range(5):
            assert done.acquire(timeout=LONG_S)
        refused = [of for of in sent if of.done()]
        assert [of.code() for of in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 5
        yield [of for of in sent if of not in refused]


def evaluation(size: int = 1) -> pb.LookupRequest:
    """A lookup that may come any number of times."""
    lengths = bytes(size * len(SLOTS))
    return pb.LookupRequest(head=head(), size=size, length_bytes=1, lengths=lengths)


def head(run: str = RUN) -> pb.Head:
    """What every request begins with."""
    return pb.Head(protocol=PROTOCOL, run=run)


def parcel(of: drawn.Bags, shares: Sequence[float] | None = None) -> Parcel:
    """The bags as one shard gets them, slot after slot, each slot a piece of its own."""
    signs, offsets = drawn.arrays(of)
    size, lengths = len(of[0]), np.diff(offsets)
    bounds = offsets[::size] if size else np.zeros(len(of) + 1, int)
    pieces = [slice(bounds[s], bounds[s + 1]) for s in range(len(of))]
    weights = None if shares is None else np.array(shares, np.float32)
    return Parcel(
        size, [signs[at] for at in pieces], [lengths[s * size : (s + 1) * size] for s in range(len(of))],
        None if weights is None else [weights[at] for at in pieces],
    )  # fmt: skip


def some_parcel(seed: int = 0, size: int = 5) -> Parcel:
    """A parcel of SLOTS."""
    return parcel(drawn.random_bags(np.random.default_rng(seed), len(SLOTS), size, values=15))


def lines(size: int, seed: int = 0) -> Lines:
    """Some gradient."""
    return Lines(np.random.default_rng(seed).uniform(-1, 1, (size, WIDTH)).astype(np.float32))


def rows_of(shard: Shard) -> dict[str, dict[int, tuple[bytes, bytes]]]:
    """{slot: {sign: weights and state}}."""
    return {
        rows.slot.name: {
            int(sign): (weights.tobytes(), state.tobytes())
            for sign, weights, state in zip(rows.signs, rows.weights, rows.state, strict=True)
        }
        for rows in shard.rows()
    }


def state_of(shard: Shard) -> object:
    """All that a refused request must leave as it is: rows, and the batches in flight."""
    return rows_of(shard), set(shard._remembered)


class Scripted(Endpoint):
    """`inner`, or zeros; counts its calls, and calls `before` and `after` of each with its name and number, from 0 on."""

    def __init__(
        self, inner: Endpoint | None = None, before: Callable[[str, int], object] = lambda name, number: None,
        after: Callable[[str, int], object] = lambda name, number: None,
    ) -> None:  # fmt: skip
        self._inner, self._before, self._after = inner, before, after
        self._lock = threading.Lock()
        self.calls: dict[str, int] = {"lookup": 0, "push": 0, "forget": 0}  # of halves: once there are some

    def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Float32 | None = None) -> Float32:
        """See Endpoint."""
        with self._around("lookup"):
            if self._inner is not None:
                return self._inner.lookup(batch_id, parcel, training, out)
            if out is None:
                return np.zeros((parcel.size, WIDTH), np.float32)
            out[:] = 0
            return out

    def find(self, batch_id: int, parcel: Parcel) -> None:
        """See Endpoint."""
        with self._around("find"):
            if self._inner is not None:
                self._inner.find(batch_id, parcel)

    def pool(self, batch_id: int, size: int, out: Float32 | None = None) -> Float32:
        """See Endpoint."""
        with self._around("pool"):
            return np.zeros((size, WIDTH), np.float32) if self._inner is None else self._inner.pool(batch_id, size, out)

    def push(self, batch_id: int, gradient: Lines, rate_scale: float) -> int:
        """See Endpoint."""
        with self._around("push"):
            return 0 if self._inner is None else self._inner.push(batch_id, gradient, rate_scale)

    def forget(self, batch_id: int) -> None:
        """See Endpoint."""
        with self._around("forget"):
            if self._inner is not None:
                self._inner.forget(batch_id)

    @contextmanager
    def _around(self, name: str) -> Iterator[None]:
        with self._lock:
            number = self.calls.get(name, 0)
            self.calls[name] = number + 1
        self._before(name, number)
        yield
        self._after(name, number)


class Gate:
    """Where calls wait until it is opened, at the latest when the test leaves."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._entered = threading.Semaphore(0)
        self._lock = threading.Lock()
        self.inside = self.most_inside = 0

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()

    def open(self) -> None:
        """Let all pass, from now on."""
        self._open.set()

    def shut(self) -> None:
        """Let nobody pass who comes from now on."""
        self._open.clear()

    def wait_here(self, name: str = "", number: int = 0) -> None:
        """`before` or `after` of a Scripted."""
        with self._lock:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        self._entered.release()
        assert self._open.wait(LONG_S)
        with self._lock:
            self.inside -= 1

    def wait_for(self, calls: int) -> None:
        """Until so many more have come."""
        for _ in range(calls):
            assert self._entered.acquire(timeout=LONG_S)


class Relay:
    """Passes bytes between clients and the server at `address`, until `cut`."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self._to = host, int(port)
        self._listener = socket.create_server((HOST, 0))
        self.address = f"{HOST}:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def cut(self) -> None:
        """Break all connections there are; new ones are welcome."""
        with self._lock:
            for of in self._sockets:
                with suppress(OSError):
                    of.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()
        for of in self._sockets:
            of.close()

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=work, args=args, name="relay")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._to)
            with self._lock:
                self._sockets += [near, far]
            self._start(self._pass_on, near, far)
            self._start(self._pass_on, far, near)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for of in (source, target):
            with suppress(OSError):
                of.shutdown(socket.SHUT_RDWR)


@contextmanager
def relay_to(address: str) -> Iterator[Relay]:
    """A relay before the server at `address`."""
    with closing(Relay(address)) as relay:
        yield relay


@contextmanager
def a_dead_address() -> Iterator[str]:
    """An address that is taken, and where nobody listens: connections are refused."""
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        yield f"{HOST}:{taken.getsockname()[1]}"


@contextmanager
def a_silent_address() -> Iterator[str]:
    """An address where connections are accepted and nothing is ever said."""
    with socket.create_server((HOST, 0)) as listener:
        yield f"{HOST}:{listener.getsockname()[1]}"

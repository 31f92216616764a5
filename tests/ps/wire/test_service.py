"""`ShardServer` as strangers see it: health, reflection, status codes, the bounded queue, calls that come twice, ports, closing."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from flowps.errors import WireError
from flowps.ps.shard import Shard
from flowps.ps.together import Together
from flowps.ps.wire import flowps_pb2 as pb
from flowps.ps.wire import once as once_module
from flowps.ps.wire import service as service_module
from flowps.ps.wire.protocol import SERVICE
from flowps.ps.wire.security import TOKEN_KEY, Security
from flowps.ps.wire.service import Served, ShardServer
from flowps.status.run_status import RunStatus
from flowps.version import __version__
from tests.ps.wire.loopback import (
    HOST,
    LONG_S,
    MAX_BYTES,
    PLAIN,
    QUEUE,
    RUN,
    SIGNATURE,
    THREADS,
    WIDTH,
    Gate,
    Scripted,
    calling,
    evaluation,
    filled,
    head,
    local,
    reaching,
    serving,
    shard_of,
    some_parcel,
    state_of,
)

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
Code = grpc.StatusCode


def a_lookup(batch: int = 1, **changed: Any) -> pb.LookupRequest:
    """Of two samples, in training; of SLOTS."""
    given: dict[str, Any] = {
        "head": head(), "batch": batch, "size": 2, "training": True, "length_bytes": 1, "lengths": b"\2\1\0\1",
        "signs": np.array([1, 2, 3, 2**64 - 1], "<u8").tobytes(), **changed,
    }  # fmt: skip
    return pb.LookupRequest(**given)


def a_push(batch: int = 1, **changed: Any) -> pb.PushRequest:
    """Of what `a_lookup` looked up."""
    given: dict[str, Any] = {
        "head": head(), "batch": batch, "size": 2, "scale": 1.0, "rate_scale": 1.0,
        "gradient": np.ones((2, WIDTH), "<f4").tobytes(), **changed,
    }  # fmt: skip
    return pb.PushRequest(**given)


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """The status of a call that fails."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value.code(), raised.value.details()  # type: ignore[attr-defined]


# --- what everyone may ask --------------------------------------------------------------------------------------------


def test_health_as_any_prober_asks() -> None:
    """Of the server and of its service, without a token; other services are not known."""
    with serving(Scripted()) as server, grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=LONG_S).status == SERVING
        assert refused(lambda: stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=LONG_S))[0] is Code.NOT_FOUND


def test_whoever_watches_health_is_told_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the server stops to listen."""
    monkeypatch.setattr(service_module, "_GRACE_S", 0.1)
    with serving(Scripted()) as server, grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=LONG_S)
        assert next(watch).status == SERVING
        server.close()
        assert next(watch).status == NOT_SERVING
        watch.cancel()


class WithToken(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """What a generic client calls `-H "authorization: Bearer TOKEN"`."""

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(details._replace(metadata=PLAIN.metadata), request)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(details._replace(metadata=PLAIN.metadata), requests)


def test_a_client_that_knows_nothing_but_the_address_and_the_token() -> None:
    """Reflection lists the services and describes their messages; made from that, a call is answered."""
    with serving(Scripted()) as server, grpc.insecure_channel(server.address) as bare:
        channel = grpc.intercept_channel(bare, WithToken())
        found = ProtoReflectionDescriptorDatabase(channel)
        assert set(found.get_services()) == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        pool = descriptor_pool.DescriptorPool(found)
        service = pool.FindServiceByName(SERVICE)
        assert [method.name for method in service.methods] == ["Describe", "Lookup", "Find", "Pool", "Push", "Forget"]
        method = service.FindMethodByName("Describe")
        of = {kind: message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type)}
        request = of[method.input_type](head={"protocol": 1})
        call = channel.unary_unary(f"/{SERVICE}/{method.name}", type(request).SerializeToString, of[method.output_type].FromString)
        reply = call(request, timeout=LONG_S)
        assert (reply.version, reply.run, [slot.name for slot in reply.slots]) == (__version__, RUN, ["a", "b"])
        for name, method in service.methods_by_name.items():  # every message is described, and as in the file here
            ours = pb.DESCRIPTOR.services_by_name["EmbeddingShard"].methods_by_name[name]
            assert [field.name for field in method.input_type.fields] == [field.name for field in ours.input_type.fields]


def test_describe() -> None:
    """All that a client checks or a person wants to know; of any run, which is how it finds out."""
    with serving(Scripted(), shard=3) as server, calling(server.address) as call:
        for run in (RUN, "another", ""):
            reply = pb.DescribeReply.FromString(call("Describe", pb.DescribeRequest(head=head(run))))
            assert (reply.protocol, reply.version, reply.run, reply.shard) == (1, __version__, RUN, 3)
            assert [(slot.name, slot.width, slot.part, slot.parts) for slot in reply.slots] == SIGNATURE
            assert reply.max_message_bytes == 1 << 20


# --- refusals ---------------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, Any, grpc.StatusCode, str]] = [
    ("Describe", pb.DescribeRequest(), Code.FAILED_PRECONDITION, "speaks protocol 0, this server .* protocol 1: install the same"),
    ("Lookup", a_lookup(head=pb.Head(protocol=2, run=RUN)), Code.FAILED_PRECONDITION, "the client speaks protocol 2"),
    ("Lookup", b"", Code.FAILED_PRECONDITION, "the client speaks protocol 0"),
    ("Lookup", a_lookup(head=head("run-2")), Code.FAILED_PRECONDITION, "belongs to run 'run-2', this shard to run 'run-1'"),
    ("Push", a_push(head=head("")), Code.FAILED_PRECONDITION, "belongs to run '', this shard to run 'run-1'"),
    ("Forget", pb.ForgetRequest(head=head("RUN-1"), batch=1), Code.FAILED_PRECONDITION, "belongs to run 'RUN-1'"),
    ("Lookup", b"\xff" * 50, Code.INVALID_ARGUMENT, "a message of 50 bytes is not protobuf"),
    ("Push", a_push().SerializeToString()[:-1], Code.INVALID_ARGUMENT, "a message of .* bytes is cut off"),
    ("Forget", b"\x0a\x05ab", Code.INVALID_ARGUMENT, "a message of 4 bytes is cut off"),
    ("Describe", b"\x0a\x02\x12\x05", Code.INVALID_ARGUMENT, "a message of 4 bytes is no DescribeRequest"),
    ("Lookup", a_lookup(size=3), Code.INVALID_ARGUMENT, r"lengths: found 4 bytes, expected 6: uint8 \[6\]"),
    ("Lookup", a_lookup(size=2**32 - 1), Code.INVALID_ARGUMENT, "4294967295 samples with 12 floats each are more than"),
    ("Lookup", a_lookup(size=2**20 + 1), Code.INVALID_ARGUMENT, "1048577 samples with"),
    ("Lookup", a_lookup(length_bytes=0), Code.INVALID_ARGUMENT, "length_bytes: found 0, expected 1, 2 or 4"),
    ("Lookup", a_lookup(lengths=b"\2\1\0\0"), Code.INVALID_ARGUMENT, r"signs: found 32 bytes, expected 24: uint64 \[3\]"),
    ("Lookup", a_lookup(lengths=b"\2\1\0\xff"), Code.INVALID_ARGUMENT, r"signs: found 32 bytes, expected 2064"),
    ("Lookup", a_lookup(shares=bytes(15)), Code.INVALID_ARGUMENT, "shares: found 15 bytes, expected 16"),
    ("Lookup", a_lookup(shares=np.full(4, np.nan, "<f4").tobytes()), Code.INVALID_ARGUMENT, "shares: found NaN or infinity"),
    ("Find", a_lookup(9, training=False), Code.INVALID_ARGUMENT, "rows are found ahead in training only"),
    ("Find", a_lookup(9, lengths=b"\2\1\0\0"), Code.INVALID_ARGUMENT, r"signs: found 32 bytes, expected 24: uint64 \[3\]"),
    ("Find", a_lookup(7), Code.NOT_FOUND, "batch 7: "),
    ("Pool", pb.PoolRequest(head=head(), batch=9, size=2), Code.NOT_FOUND, "batch 9: its rows are to be pooled"),
    ("Pool", pb.PoolRequest(head=head(), batch=7, size=2**20 + 1), Code.INVALID_ARGUMENT, "1048577 samples with"),
    ("Pool", pb.PoolRequest(head=head("run-2"), batch=7), Code.FAILED_PRECONDITION, "belongs to run 'run-2'"),
    ("Push", a_push(7, size=3), Code.INVALID_ARGUMENT, r"gradient: found 96 bytes, expected 144: float32 \[3, 12\]"),
    ("Push", a_push(7, size=2**32 - 1), Code.INVALID_ARGUMENT, "4294967295 samples with 12 floats each"),
    ("Push", a_push(7, gradient=b""), Code.INVALID_ARGUMENT, "gradient: found 0 bytes, expected 96"),
    ("Push", a_push(7, floats=pb.FLOAT16), Code.INVALID_ARGUMENT, "gradient: found 96 bytes, expected 48: float16"),
    ("Push", a_push(7, floats=pb.FLOAT16, scale=0), Code.INVALID_ARGUMENT, "scale of gradient: found 0.0"),
    ("Push", a_push(7, rate_scale=math.nan), Code.INVALID_ARGUMENT, "rate_scale: found nan"),
    ("Push", a_push(7, rate_scale=-1), Code.INVALID_ARGUMENT, "rate_scale: found -1.0"),
    (
        "Push", a_push(7, size=1, gradient=bytes(4 * WIDTH)), Code.INVALID_ARGUMENT,
        r"batch 7: a push has a gradient of float32 \(1, 12\), expected float32 \(2, 12\)",
    ),
    ("Push", a_push(8), Code.NOT_FOUND, "batch 8: a push came, but the shard remembers no lookup of it"),
    ("Push", a_push(2**64 - 1), Code.NOT_FOUND, "batch 18446744073709551615: "),
    ("/flowps.EmbeddingShard/Erase", b"", Code.UNIMPLEMENTED, "Method not found"),
    ("/flowps.Other/Lookup", a_lookup(), Code.UNIMPLEMENTED, "Method not found"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world() -> Any:
    """A shard with batch 7 in flight, and the way to it."""
    with shard_of() as shard, serving(local(shard)) as server, calling(server.address) as call:
        call("Lookup", a_lookup(7))
        yield shard, call


@pytest.mark.parametrize(("name", "request_", "code", "said"), WRONG, ids=[f"{n}-{name}" for n, (name, *_) in enumerate(WRONG)])
def test_a_wrong_request_changes_nothing(
    world: tuple[Shard, Any], name: str, request_: Any, code: grpc.StatusCode, said: str
) -> None:  # fmt: skip
    """A status that says what is wrong; rows and batches in flight are as before, and right requests are answered."""
    shard, call = world
    before = state_of(shard)
    found, details = refused(lambda: call(name, request_))
    assert found is code
    assert pytest.raises(AssertionError, match=said).matches(AssertionError(details)), details
    assert state_of(shard) == before
    assert len(pb.LookupReply.FromString(call("Lookup", evaluation())).embeddings) == 4 * WIDTH


def test_what_was_refused_may_come_right() -> None:
    """A lookup or a push that did not fit together is not remembered as done."""
    with shard_of() as shard, serving(local(shard)) as server, calling(server.address) as call:
        refused(lambda: call("Lookup", a_lookup(size=3)))
        assert not shard._remembered
        call("Lookup", a_lookup())
        refused(lambda: call("Push", a_push(gradient=b"")))
        assert set(shard._remembered) == {1}
        assert pb.PushReply.FromString(call("Push", a_push())).rows == 4
        assert not shard._remembered


def test_a_message_larger_than_allowed_is_not_taken() -> None:
    """Nor one whose answer would be; the server goes on."""
    with shard_of() as shard, serving(local(shard), max_bytes=1 << 16) as server, calling(server.address) as call:
        code, said = refused(lambda: call("Push", a_push(gradient=bytes(1 << 18))))
        assert code is Code.RESOURCE_EXHAUSTED
        assert "larger than max" in said
        samples = (1 << 16) // (4 * WIDTH)
        code, said = refused(lambda: call("Lookup", evaluation(samples + 1)))
        assert code is Code.INVALID_ARGUMENT
        assert f"{samples + 1} samples with 12 floats each are more than a message of 65536 bytes holds" in said
        assert len(call("Lookup", evaluation(samples))) > 4 * WIDTH * samples


def test_a_shard_without_slots_takes_no_more_samples_than_others() -> None:
    """They cost nothing in its answers, and are counted all the same."""
    with serving(Scripted(), slots=[]) as server, calling(server.address) as call:
        asked = a_lookup(size=2**20 + 1, lengths=b"", signs=b"")
        code, said = refused(lambda: call("Lookup", asked))
        assert code is Code.INVALID_ARGUMENT
        assert "1048577 samples" in said


@pytest.mark.parametrize("token", [None, "", "another secret", "a secre", "a secret "])
def test_calls_without_the_token_are_refused(token: str | None) -> None:
    """Whatever they are, known or not; the answer says which knob."""
    with shard_of() as shard, serving(local(shard)) as server, calling(server.address, token) as call:
        for name in ("Describe", "Lookup", "Push", "Forget", "/flowps.EmbeddingShard/Erase"):
            code, said = refused(lambda name=name: call(name, a_lookup()))  # type: ignore[misc]
            assert code is Code.UNAUTHENTICATED
            assert "cluster.token_file must hold the same text on all machines" in said
        assert state_of(shard) == ({"a": {}, "b": {}}, set())


def test_reflection_needs_the_token() -> None:
    """It answers nothing without."""
    with serving(Scripted()) as server, grpc.insecure_channel(server.address) as channel:
        assert refused(ProtoReflectionDescriptorDatabase(channel).get_services)[0] is Code.UNAUTHENTICATED


def test_the_token_may_stand_among_others() -> None:
    """A proxy may have added its own; other schemes do not count."""
    with serving(Scripted()) as server, grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(f"/{SERVICE}/Describe")
        request = pb.DescribeRequest(head=head()).SerializeToString()
        assert call(request, timeout=LONG_S, metadata=((TOKEN_KEY, "Basic x"), ("other", "y"), *PLAIN.metadata))
        for value in (PLAIN.token, f"bearer {PLAIN.token}", f"Basic {PLAIN.token}"):
            code, _ = refused(lambda value=value: call(request, timeout=LONG_S, metadata=((TOKEN_KEY, value),)))  # type: ignore[misc]
            assert code is Code.UNAUTHENTICATED


def test_messages_without_the_token_are_not_read() -> None:
    """A stranger does not make the server take messages into memory: not even whether one is too large is found out."""
    with serving(Scripted(), max_bytes=1 << 10) as server, calling(server.address, "another secret") as call:
        assert refused(lambda: call("Push", a_push(gradient=bytes(1 << 18))))[0] is Code.UNAUTHENTICATED


# --- the queue --------------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded() -> None:
    """As many calls as there are threads are worked on, some more wait; all others are refused at once, and pass later."""
    with Gate() as gate:
        endpoint = Scripted(before=gate.wait_here)
        with serving(endpoint, in_flight=1) as server, calling(server.address) as call:
            for _ in range(3):  # who was refused has taken nobody's place
                with filled(server.address) as waiting:
                    assert len(waiting) == QUEUE
                    code, said = refused(lambda: call("Lookup", a_lookup()))
                    assert code is Code.RESOURCE_EXHAUSTED
                    assert "oncurrent" in said
                    gate.wait_for(THREADS)
                    assert gate.inside == gate.most_inside == THREADS
                    gate.open()
                    assert all(len(of.result()) > 4 * WIDTH for of in waiting)
                    gate.shut()
                    gate.wait_for(QUEUE - THREADS)
            gate.open()
            assert call("Lookup", a_lookup())
            assert endpoint.calls["lookup"] == 3 * QUEUE + 1


def test_memory_does_not_grow_with_what_is_refused() -> None:
    """Of many large messages at once only those in the queue are there; the others were refused, whenever they came."""
    with Gate() as gate, serving(Scripted(before=gate.wait_here), in_flight=1) as server, calling(server.address) as call:
        done = threading.Semaphore(0)
        requests = [call("Push", a_push(n, size=2000, gradient=bytes(2000 * 4 * WIDTH)), wait=False) for n in range(100)]
        for of in requests:
            of.add_done_callback(lambda _: done.release())
        for _ in range(100 - QUEUE):
            assert done.acquire(timeout=LONG_S)
        assert sum(not of.done() for of in requests) == QUEUE
        gate.wait_for(THREADS)
        assert gate.most_inside == THREADS
        gate.open()
        codes = [of.code() for of in requests]
        assert codes.count(Code.OK) == QUEUE
        assert codes.count(Code.RESOURCE_EXHAUSTED) == 100 - QUEUE


# --- calls that come twice --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hurried_switching")
def test_the_same_call_from_many_at_once() -> None:
    """One lookup and one push are made; all get the same answer, bit by bit."""
    with shard_of() as shard:
        endpoint = Scripted(local(shard))
        with serving(endpoint) as server, calling(server.address) as call, ThreadPoolExecutor(8) as threads:
            for batch in range(5):
                looked_up = set(threads.map(lambda _, batch=batch: call("Lookup", a_lookup(batch)), range(8)))
                assert len({pb.LookupReply.FromString(of).embeddings for of in looked_up}) == 1
                assert set(threads.map(lambda _, batch=batch: call("Push", a_push(batch)), range(8))) == {b"\x08\x04"}
        assert endpoint.calls == {"lookup": 5, "push": 5, "forget": 0}
        assert not shard._remembered


def test_evaluations_are_made_each_time() -> None:
    """They have no number of their own, see what was learned meanwhile, and nothing of them is kept."""
    with shard_of() as shard, serving(local(shard)) as server, calling(server.address) as call:
        asked = a_lookup(0, training=False)
        first = pb.LookupReply.FromString(call("Lookup", asked)).embeddings
        call("Lookup", a_lookup(0))
        second = pb.LookupReply.FromString(call("Lookup", asked)).embeddings
        call("Push", a_push(0))
        third = pb.LookupReply.FromString(call("Lookup", asked)).embeddings
    assert len({first, second, third}) == 3


def test_forgetting_twice_and_anew() -> None:
    """Giving up what is not there is no error; the number is free again."""
    with shard_of(max_in_flight=1) as shard, serving(local(shard)) as server, calling(server.address) as call:
        forget = pb.ForgetRequest(head=head(), batch=1)
        for _ in range(3):
            call("Forget", forget)
            call("Forget", forget)
            assert not shard._remembered
            call("Lookup", a_lookup())
            assert set(shard._remembered) == {1}
        assert pb.PushReply.FromString(call("Push", a_push())).rows == 4


def test_repetitions_do_not_keep_out_the_one_that_all_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three trainers that step together wait, and ask again twice; the third must still get in."""
    came = threading.Semaphore(0)
    lookup = once_module.Once.lookup

    def counted(*args: Any) -> bytes:
        came.release()
        return lookup(*args)

    monkeypatch.setattr(once_module.Once, "lookup", counted)
    with shard_of() as shard:
        together = Together(local(shard), WIDTH, trainers=3)
        with serving(together, in_flight=3) as server, calling(server.address) as call:
            try:
                for attempt in range(3):
                    calls = [call("Lookup", a_lookup(n << 40), LONG_S if attempt == 2 else 0.1, wait=False) for n in (0, 1)]
                    for _ in calls:
                        assert came.acquire(timeout=LONG_S)
                    if attempt < 2:
                        assert [of.code() for of in calls] == [Code.DEADLINE_EXCEEDED] * 2
                assert call("Lookup", a_lookup(2 << 40), timeout=2.0)
                assert all(of.result() for of in calls)
            finally:
                together.close()


# --- listening and closing --------------------------------------------------------------------------------------------


def test_a_port_that_is_taken() -> None:
    """The error names the shard, the address, and the knobs; nothing of the server that failed is left."""
    with serving(Scripted()) as server:
        before = set(threading.enumerate())
        port = int(server.address.rsplit(":", 1)[1])
        said = rf"shard 5 cannot listen on {server.address}: the port is taken.*ps\.port \(0: any free one\).*cluster\.interface"
        with pytest.raises(WireError, match=said), serving(Scripted(), shard=5, port=port):
            pass
        gc.collect()
        assert set(threading.enumerate()) == before


def test_an_address_of_another_machine() -> None:
    """Likewise; 192.0.2.1 is nobody's (RFC 5737)."""
    trusting = Security("", "", "", "", "token", insecure=True)
    with pytest.raises(WireError, match=r"shard 0 cannot listen on 192\.0\.2\.1:0: .*the address is not this machine's"):
        service_module.ShardServer(
            Scripted(), service_module.Served(RUN, 0, SIGNATURE, 1 << 20), trusting, "192.0.2.1", 0, in_flight=1
        )  # fmt: skip


def test_ipv6() -> None:
    """The address stands in brackets, and is one that clients can use."""
    try:
        with serving(Scripted(), host="::1") as server, reaching(server.address) as remote:
            assert server.address.startswith("[::1]:")
            remote.connect(LONG_S)
    except WireError as error:
        pytest.skip(f"no IPv6 here: {error}")


def test_closing_frees_the_port() -> None:
    """For the next server, at once; closing twice is no error."""
    with serving(Scripted()) as server:
        pass
    server.close()
    with serving(Scripted(), port=int(server.address.rsplit(":", 1)[1])) as other:
        assert other.address == server.address


def test_calls_that_run_may_end_when_a_server_closes() -> None:
    """Within the time of grace; new ones are refused."""
    with Gate() as gate, serving(Scripted(before=gate.wait_here)) as server, calling(server.address) as call:
        running = call("Lookup", a_lookup(), wait=False)
        gate.wait_for(1)
        with ThreadPoolExecutor(1) as thread:
            closed = thread.submit(server.close)
            with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as late:
                describe = late.unary_unary(f"/{SERVICE}/Describe")
                while (code := status(describe)) is Code.OK:  # the closing thread has not come that far
                    pass
            assert code is Code.UNAVAILABLE
            gate.open()
            assert len(running.result()) > 4 * WIDTH
            closed.result(LONG_S)


def status(describe: Any) -> grpc.StatusCode:
    """Of a call."""
    try:
        describe(pb.DescribeRequest(head=head()).SerializeToString(), timeout=LONG_S, metadata=PLAIN.metadata)
    except grpc.RpcError as error:
        return error.code()  # type: ignore[attr-defined]
    return Code.OK


def test_a_call_that_hangs_does_not_keep_a_server_from_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time of grace its client is told that the server has gone."""
    monkeypatch.setattr(service_module, "_GRACE_S", 0.1)
    with Gate() as gate, serving(Scripted(before=gate.wait_here)) as server, calling(server.address) as call:
        hanging = call("Lookup", a_lookup(), wait=False)
        gate.wait_for(1)
        server.close()
        assert hanging.code() is Code.UNAVAILABLE
        gate.open()


def test_closing_ends_the_threads() -> None:
    """All that the server has started, also while somebody still holds it."""
    before = set(threading.enumerate())
    with serving(Scripted()) as server, calling(server.address) as call:
        call("Lookup", a_lookup())
        started = set(threading.enumerate()) - before
        assert started
        server.close()
        for thread in started:
            thread.join(2.0)
        assert not [thread for thread in started if thread.is_alive()]


def test_a_shard_with_threads_of_its_own() -> None:
    """Answers are what one thread would make."""
    with shard_of(threads=3) as shard, shard_of() as twin, serving(local(shard)) as server, reaching(server.address) as remote:
        for batch in range(3):
            sent = some_parcel(batch, size=300)
            np.testing.assert_array_equal(remote.lookup(batch, sent, True), local(twin).lookup(batch, sent, True))


# --- what it measures ---------------------------------------------------------------------------------------------------


def test_waiting_for_a_thread_and_the_answer_are_timed() -> None:
    """A call that finds all threads at work waits for as long as they do."""
    status = RunStatus()
    with shard_of() as shard:
        server = ShardServer(local(shard), Served(RUN, 0, SIGNATURE, MAX_BYTES), PLAIN, HOST, 0, 4, status)
        with closing(server), reaching(server.address) as remote:
            remote.connect(LONG_S)
            for number in range(3):
                remote.lookup(number, some_parcel(), training=True)
            remote.find(3, some_parcel())
            assert status.summaries()["Reply"].count == 4, "signs were read, too"
            remote.pool(3, 5)
    found = status.summaries()
    assert found["Reply"].count == 5
    assert found["QueueWait"].count >= 5
    assert found["Reply"].total_us > 0

"""Lookups over gRPC: what is answered, what is refused and why, health, reflection, TLS."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import xxhash
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from flowps.errors import ConfigError, DataError, UnreachableError, WireError
from flowps.serving.client import EmbeddingClient
from flowps.serving.live import Live
from flowps.serving.wire import serving_pb2 as pb
from flowps.serving.wire.security import Tls
from flowps.serving.wire.server import SERVICE, LookupServer
from tests.ps.wire.test_security import Certificates
from tests.serving.samples import DIMS, ROWS, make_bundle, sign
from tests.serving.test_live import LONG_S, USER, WEIGHTS, Told

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "out"
    make_bundle(out)
    return out


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def live(out: Path, told: Told) -> Live:
    return Live(out, told)


@pytest.fixture
def server(live: Live, told: Told) -> Iterator[LookupServer]:
    with closing(LookupServer(live, told, HOST, 0, max_message_bytes=1 << 12)) as server:
        yield server


@pytest.fixture
def client(server: LookupServer) -> Iterator[EmbeddingClient]:
    with EmbeddingClient(server.address, timeout_s=LONG_S) as client:
        yield client


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command, which makes the certificates")
    return Certificates(tmp_path_factory.mktemp("certificates"))


class TestLookups:
    def test_give_rows_and_zeros_for_unknown_signs(self, client, told):
        found = client.lookup({"user": [7, 8, 2**64 - 1, 7, 2**63], "city": [5], "empty": [1, 2]})
        np.testing.assert_array_equal(found["user"], [[3, 4], [0, 0], [-7, 8], [3, 4], [5, 6]])
        np.testing.assert_array_equal(found["city"], [[0.5, 0.25, 0.125]])
        np.testing.assert_array_equal(found["empty"], np.zeros((2, 4)))
        assert all(rows.dtype == np.float32 for rows in found.values())
        assert told.signs == [("user", 5, 1), ("city", 1, 0), ("empty", 2, 2)]
        assert told.calls == [("Lookup", "OK")]

    def test_of_nothing_give_nothing(self, client):
        assert client.lookup({}) == {}
        assert client.lookup({"user": []})["user"].shape == (0, 2)

    def test_tell_the_version(self, client):
        answer = client.ask({"user": USER})
        assert (answer.version, answer.unknown) == (1, {"user": 0})
        np.testing.assert_array_equal(answer.rows["user"], WEIGHTS)

    @pytest.mark.parametrize(
        "signs",
        [USER, USER.tolist(), np.array([0, 7], np.int64), np.array([0, 7], np.uint8), (0, 7, 2**64 - 1), [np.uint64(2**63), 1]],
    )
    def test_take_signs_of_any_whole_numbers(self, client, signs):
        expected = [ROWS["user"].get(int(sign), [0, 0]) for sign in signs]
        np.testing.assert_array_equal(client.lookup({"user": signs})["user"], expected)

    @pytest.mark.parametrize("signs", [[1.5], ["a"], [-1], [2**64], [[1]], 7, np.array([-1]), np.array([1.0]), [None]])
    def test_refuse_what_is_no_sign(self, client, signs):
        with pytest.raises(DataError, match=r"slot 'user': signs must be whole numbers from 0 to 2\^64 - 1, in one row"):
            client.lookup({"user": signs})

    def test_describe_says_what_is_needed_to_make_signs(self, client):
        found = client.describe()
        assert (found.version, found.hash, found.run, found.steps) == (1, "xxh64", "by hand", 1)
        assert [(slot.name, slot.dim, slot.rows) for slot in found.slots] == [
            (name, dim, len(ROWS.get(name, {}))) for name, dim in DIMS.items()
        ]
        assert [slot.seed for slot in found.slots] == [xxhash.xxh64_intdigest(name.encode()) for name in DIMS]
        assert sign(5, "user") == xxhash.xxh64_intdigest((5).to_bytes(8, "little"), seed=found.slots[0].seed)


class TestRefusals:
    def test_of_a_slot_that_there_is_not(self, client, told):
        with pytest.raises(DataError, match=r"no slot 'users' in version 1 of the bundle; did you mean user\?"):
            client.lookup({"user": [1], "users": [1]})
        with pytest.raises(DataError, match="no slot 'x' in version 1 of the bundle; there are user, city, empty"):
            client.lookup({"x": [1]})
        assert told.calls == [("Lookup", "INVALID_ARGUMENT")] * 2
        assert told.signs == []

    def test_of_more_than_a_message_holds(self, client):
        with pytest.raises(DataError, match=r"the answer would have 4,104 bytes, more than the 4,096 of a message; ask for fewer"):
            client.lookup({"user": range(513)})
        assert client.lookup({"user": range(512)})["user"].shape == (512, 2)
        with pytest.raises(UnreachableError, match="RESOURCE_EXHAUSTED"):
            client.lookup({"user": range(20_000)})

    def test_of_what_is_no_request(self, server, told):
        with grpc.insecure_channel(server.address) as channel:
            for name in ("Lookup", "Describe"):
                with pytest.raises(grpc.RpcError) as refused:
                    channel.unary_unary(f"/{SERVICE}/{name}")(b"\xff\xff", timeout=LONG_S)
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert f"the request is no flowps.serving.{name}Request" in refused.value.details()

    def test_of_a_server_that_fails(self, client, live, monkeypatch):
        monkeypatch.setattr(live, "_tables", None)
        with pytest.raises(WireError, match="INTERNAL: AttributeError"):
            client.lookup({"user": [1]})

    def test_of_an_address_where_nobody_answers(self):
        with socket.socket() as taken:
            taken.bind((HOST, 0))
            client = EmbeddingClient(f"{HOST}:{taken.getsockname()[1]}", timeout_s=LONG_S)
            with (
                closing(client),
                pytest.raises(UnreachableError, match=r"UNAVAILABLE: .*; is it the address of python -m flowps.s"),
            ):
                client.describe()
        with pytest.raises(WireError, match="the connection was closed"):
            client.describe()

    def test_of_a_port_that_is_taken(self, server, live, told):
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(WireError, match=rf"cannot listen on {HOST}:{port}: the port is taken"):
            LookupServer(live, told, HOST, port)


class TestStandardServices:
    def test_health_is_told_until_the_end(self, live, told):
        server = LookupServer(live, told, HOST, 0)
        with grpc.insecure_channel(server.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for name in ("", SERVICE):
                found = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=LONG_S)
                assert found.status == health_pb2.HealthCheckResponse.SERVING
            watched = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=LONG_S)
            assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
            closing_it = threading.Thread(target=server.close)
            closing_it.start()
            assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watched.cancel()
            closing_it.join(LONG_S)
        server.close()

    def test_reflection_describes_the_service(self, server):
        with grpc.insecure_channel(server.address) as channel:
            found = ProtoReflectionDescriptorDatabase(channel)
            assert {SERVICE, "grpc.health.v1.Health"} <= set(found.get_services())
            proto = found.FindFileContainingSymbol(SERVICE)
        assert proto.name == "flowps/serving/wire/serving.proto"
        assert [method.name for method in proto.service[0].method] == ["Describe", "Lookup"]


class TestTls:
    def ask(self, server: LookupServer, **tls: str) -> Any:
        with EmbeddingClient(server.address, timeout_s=LONG_S, **tls) as client:
            return client.lookup({"user": [7]})["user"].tolist()

    def test_of_the_server_alone(self, files, live, told):
        with closing(LookupServer(live, told, HOST, 0, tls=Tls(*files.here))) as server:
            assert self.ask(server, tls_ca=files.own) == [[3, 4]]
            for tls in ({}, {"tls_ca": files.other}):
                with pytest.raises(UnreachableError):
                    self.ask(server, **tls)

    def test_of_both_sides(self, files, live, told):
        with closing(LookupServer(live, told, HOST, 0, tls=Tls(*files.here, files.own))) as server:
            mine = {"tls_cert": files.here[0], "tls_key": files.here[1]}
            assert self.ask(server, tls_ca=files.own, **mine) == [[3, 4]]
            theirs = {"tls_cert": files.foreign[0], "tls_key": files.foreign[1]}
            for tls in ({}, theirs):
                with pytest.raises(UnreachableError):
                    self.ask(server, tls_ca=files.own, **tls)

    def test_by_another_name(self, files, live, told):
        with closing(LookupServer(live, told, HOST, 0, tls=Tls(*files.named))) as server:
            assert self.ask(server, tls_ca=files.own, tls_name="shards.example") == [[3, 4]]
            with pytest.raises(UnreachableError):
                self.ask(server, tls_ca=files.own)

    def test_of_files_that_are_none_is_refused(self, files, tmp_path, live, told):
        cert, key = files.here
        nothing = tmp_path / "nothing.pem"
        nothing.write_text("nothing")
        with pytest.raises(ConfigError, match=r"--tls_cert and --tls_key belong together: give both"):
            Tls(cert)
        with pytest.raises(ConfigError, match=r"none.pem cannot be read: No such file"):
            LookupServer(live, told, HOST, 0, tls=Tls(str(tmp_path / "none.pem"), key))
        for tls in (Tls(str(nothing), key), Tls(cert, key, str(nothing)), Tls(cert, files.foreign[1])):
            with pytest.raises(ConfigError, match=r"must be PEM files of an authority, a certificate and its key"):
                LookupServer(live, told, HOST, 0, tls=tls)

    def test_is_needed_where_other_machines_reach_it(self, files):
        for host in ("0.0.0.0", "10.0.0.1", "::", "somewhere"):
            with pytest.raises(ConfigError, match=rf"--host {host}: other machines reach it, .* or allow it .* with --insecure"):
                Tls().check_host(host, insecure=False)
            Tls().check_host(host, insecure=True)
            Tls(*files.here).check_host(host, insecure=False)
        for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
            Tls().check_host(host, insecure=False)
        with pytest.raises(ConfigError, match="--tls_ca: a server needs a certificate too"):
            Tls(ca=files.own).check_host(HOST, insecure=False)


def test_the_request_is_packed():
    """So that signs cost 8 bytes each, and other languages write them in one piece."""
    request = pb.LookupRequest()
    request.slots.add(name="user", signs=range(1000))
    assert len(request.SerializeToString()) < 8 * 1000 + 20

"""TLS on both sides and the token: who gets in, and what those are told who do not; which files and hosts are refused."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from flowps.errors import ConfigError, FlowpsError, WireError
from flowps.ps.wire import flowps_pb2 as pb
from flowps.ps.wire import remote as remote_module
from flowps.ps.wire.protocol import SERVICE
from flowps.ps.wire.security import Security
from tests.ps.wire.loopback import (
    HOST,
    LONG_S,
    PLAIN,
    Scripted,
    head,
    lines,
    local,
    reaching,
    serving,
    shard_of,
    some_parcel,
    state_of,
)

TOKEN = PLAIN.token


class Authority:
    """Makes certificates with the `openssl` command."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._run("req", "-x509", *self._new_key(name), "-subj", f"/CN={name}", "-days", "2", "-out", self.pem)

    @property
    def pem(self) -> str:
        """Its own certificate."""
        return str(self.folder / f"{self.name}.pem")

    def certify(self, name: str, subject: str) -> tuple[str, str]:
        """A certificate for `subject` (such as IP:127.0.0.1), and its key."""
        cert, request, key = (str(self.folder / f"{name}.{of}") for of in ("pem", "csr", "key"))
        self._run("req", *self._new_key(name), "-subj", f"/CN={name}", "-addext", f"subjectAltName={subject}", "-out", request)
        self._run(
            "x509", "-req", "-in", request, "-CA", self.pem, "-CAkey", str(self.folder / f"{self.name}.key"), "-CAcreateserial",
            "-days", "2", "-copy_extensions", "copy", "-out", cert,
        )  # fmt: skip
        return cert, key

    def _new_key(self, name: str) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(self.folder / f"{name}.key")]

    def _run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True)


class Certificates:
    """Of one authority for this machine by its address (`here`) and by a name, and of another for this machine (`foreign`)."""

    def __init__(self, folder: Path) -> None:
        own, other = Authority(folder, "own"), Authority(folder, "other")
        self.own, self.other = own.pem, other.pem
        self.here = own.certify("here", f"IP:{HOST}")
        self.named = own.certify("named", "DNS:shards.example")
        self.foreign = other.certify("foreign", f"IP:{HOST}")

    def security(self, of: str = "here", ca: str = "own", name: str = "", token: str = TOKEN) -> Security:
        """What a machine with these files has."""
        cert, key = getattr(self, of)
        return Security.of(getattr(self, ca), cert, key, name, "", False, token)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Made once for all tests here."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command, which makes the certificates")
    return Certificates(tmp_path_factory.mktemp("tls"))


def ask(security: Security, there: Security) -> None:
    """Make every call of a client with `security` at a server with `there`."""
    with (
        shard_of() as shard,
        shard_of() as twin,
        serving(local(shard), there) as server,
        reaching(server.address, security) as remote,
    ):
        remote.connect(LONG_S)
        np.testing.assert_array_equal(remote.lookup(0, some_parcel(), True), local(twin).lookup(0, some_parcel(), True))
        remote.push(0, lines(5), 1.0)
        remote.forget(1)


def test_tls_on_both_sides(files: Certificates) -> None:
    """Each machine with a certificate for its address."""
    ask(files.security(), files.security())


def test_one_name_for_all_machines(files: Certificates) -> None:
    """The certificates carry it instead of addresses; the client looks for it."""
    ask(files.security("named", name="shards.example"), files.security("named", name="shards.example"))


def test_a_client_without_a_name_of_its_own(files: Certificates) -> None:
    """Only the server's certificate is looked up by name or address: the client's must be of the authority, for whatever name."""
    ask(files.security("named"), files.security("here"))


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are made once, with all the time they need, and not again: time passes when they have failed."""
    times = itertools.chain([0.0, 0.0], itertools.repeat(1e9))
    monkeypatch.setattr(remote_module, "time", SimpleNamespace(monotonic=times.__next__))


REFUSED: list[tuple[str, Callable[[Certificates], Security], Callable[[Certificates], Security], str]] = [
    ("no TLS at the client", lambda of: PLAIN, lambda of: of.security(), ""),
    ("no TLS at the server", lambda of: of.security(), lambda of: PLAIN, "WRONG_VERSION_NUMBER"),
    (
        "another authority, both ways",
        lambda of: of.security("foreign", "other"),
        lambda of: of.security(),
        "CERTIFICATE_VERIFY_FAILED",
    ),
    ("the server's of another authority", lambda of: of.security(), lambda of: of.security("foreign"), "CERTIFICATE_VERIFY_FAILED"),
    ("the client's of another authority", lambda of: of.security("foreign"), lambda of: of.security(), ""),
    ("a name at the client only", lambda of: of.security(name="shards.example"), lambda of: of.security(), "Hostname Verification"),
    ("a name at the server only", lambda of: of.security("named"), lambda of: of.security("named"), "Hostname Verification"),
    ("another name", lambda of: of.security(name="else.example"), lambda of: of.security("named"), "Hostname Verification"),
]


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize(("security", "there", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_others_are_kept_out(
    files: Certificates, security: Callable[[Certificates], Security], there: Callable[[Certificates], Security], said: str
) -> None:
    """A lookup fails and says why; nothing reaches the shard."""
    with shard_of() as shard:
        endpoint = Scripted(local(shard))
        refused = pytest.raises(WireError, match=f"shard 0 at {HOST}.*: Lookup of batch 0: UNAVAILABLE: .*{said}")
        with serving(endpoint, there(files)) as server, reaching(server.address, security(files)) as remote, refused:
            remote.lookup(0, some_parcel(), True)
        assert not any(endpoint.calls.values())


@pytest.mark.parametrize(("security", "there"), [case[1:3] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_connecting_to_a_server_with_other_credentials(
    files: Certificates, security: Callable[[Certificates], Security], there: Callable[[Certificates], Security]
) -> None:
    """Ends in time and speaks of TLS."""
    refused = pytest.raises(WireError, match=rf"shard 0 at {HOST}:\d+ does not answer within 0\.1 s: .*TLS")
    with serving(Scripted(), there(files)) as server, reaching(server.address, security(files)) as remote, refused:
        remote.connect(0.1)


@pytest.mark.parametrize(
    ("case", "said"), [(2, "CERTIFICATE_VERIFY_FAILED"), (5, "Hostname Verification"), (1, "WRONG_VERSION_NUMBER")]
)
def test_connecting_says_why_it_failed(files: Certificates, case: int, said: str) -> None:
    """What TLS found, as calls later on do."""
    _, security, there, _ = REFUSED[case]
    refused = pytest.raises(WireError, match=said)
    with serving(Scripted(), there(files)) as server, reaching(server.address, security(files)) as remote, refused:
        remote.connect(0.5)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("token", ["another", TOKEN + " ", TOKEN[:-1], TOKEN.upper()])
def test_another_token_is_refused(files: Certificates, tls: bool, token: str) -> None:
    """With and without TLS, at connecting and in every call: at once, with the knob; nothing reaches the shard."""
    there = files.security() if tls else PLAIN
    here = files.security(token=token) if tls else Security("", "", "", "", token, False)
    with shard_of() as shard, serving(local(shard), there) as server, reaching(server.address, here) as remote:
        before = state_of(shard)
        for call in (
            lambda: remote.connect(LONG_S), lambda: remote.lookup(0, some_parcel(), True), lambda: remote.push(0, lines(5), 1.0),
            lambda: remote.forget(0),
        ):  # fmt: skip
            with pytest.raises(WireError, match=r"UNAUTHENTICATED: .*cluster\.token_file must hold the same text on all machines"):
                call()
        assert state_of(shard) == before


def test_tls_without_a_certificate_of_the_client(files: Certificates) -> None:
    """The token alone does not do."""
    credentials = grpc.ssl_channel_credentials(Path(files.own).read_bytes())
    request = pb.DescribeRequest(head=head()).SerializeToString()
    with serving(Scripted(), files.security()) as server, grpc.secure_channel(server.address, credentials) as channel:
        describe = channel.unary_unary(f"/{SERVICE}/Describe")
        with pytest.raises(grpc.RpcError) as raised:
            describe(request, timeout=LONG_S, metadata=PLAIN.metadata)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_the_token_does_not_show() -> None:
    """In what a person is shown of a server that refuses."""
    wrong = Security("", "", "", "", "my own secret", False)
    with serving(Scripted()) as server, reaching(server.address, wrong) as remote, pytest.raises(WireError) as raised:
        remote.connect(LONG_S)
    assert TOKEN not in str(raised.value)
    assert "my own secret" not in str(raised.value)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"ca": "a"}, "cluster.tls_cert, cluster.tls_key"),
        ({"cert": "a"}, "cluster.tls_ca, cluster.tls_key"),
        ({"ca": "a", "key": "a"}, "cluster.tls_cert"),
        ({"cert": "a", "key": "a"}, "cluster.tls_ca"),
    ],
)
def test_the_files_of_tls_belong_together(given: dict[str, str], missing: str) -> None:
    """The error names those that are missing."""
    files: dict[str, Any] = {"ca": "", "cert": "", "key": "", **given}
    with pytest.raises(ConfigError, match=f"belong together; missing: {missing}$"):
        Security.of(name="", token_file="", insecure=False, drawn="token", **files)


@pytest.mark.parametrize("knob", ["tls_ca", "tls_cert", "tls_key"])
def test_a_file_that_is_not_there(tmp_path: Path, knob: str) -> None:
    """On the machine that uses it: the error names the knob and the file."""
    there = tmp_path / "there.pem"
    there.write_text("")
    named = {of: str(tmp_path / "gone.pem" if of == knob else there) for of in ("tls_ca", "tls_cert", "tls_key")}
    security = Security.of(*named.values(), "", "", False, "token")
    said = rf"cluster\.{knob}: {tmp_path}/gone\.pem cannot be read on this machine: No such file"
    with pytest.raises(ConfigError, match=said):
        security.server_credentials()
    with pytest.raises(ConfigError, match=said):
        security.channel_credentials()


def test_a_token_in_a_file(tmp_path: Path) -> None:
    """Without the line's end; instead of the one that was drawn for the run."""
    path = tmp_path / "token"
    path.write_text("  of this cluster\n")
    assert Security.of("", "", "", "", str(path), False, "drawn").token == "of this cluster"
    assert Security.of("", "", "", "", "", False, "drawn").token == "drawn"
    assert Security.of("", "", "", "", "", False, "drawn").metadata == (("authorization", "Bearer drawn"),)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_token_file(tmp_path: Path, text: str) -> None:
    """Would let everyone in."""
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"cluster\.token_file: {path} is empty; put a long random text into it"):
        Security.of("", "", "", "", str(path), False, "drawn")


def test_a_token_file_that_is_not_there(tmp_path: Path) -> None:
    """Or a folder."""
    for path, said in ((tmp_path / "gone", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=rf"cluster\.token_file: {path} cannot be read on this machine: {said}"):
            Security.of("", "", "", "", str(path), False, "drawn")


@pytest.mark.parametrize("text", ["schlüssel", "two\nlines", "with\0zero", "\x7f"])
def test_a_token_that_cannot_be_sent(tmp_path: Path, text: str) -> None:
    """gRPC takes printable ASCII only."""
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"cluster\.token_file"):
        Security.of("", "", "", "", str(path), False, "drawn")


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("broken", ["ca", "cert", "key", "key of another"])
def test_files_that_are_no_certificates(files: Certificates, tmp_path: Path, broken: str, side: str) -> None:
    """Neither a server nor a client is made, and the error names the knobs."""
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    cert, key = files.here
    given = {"ca": files.own, "cert": cert, "key": key}
    if broken in given:
        given[broken] = str(nonsense)
    else:
        given["key"] = files.foreign[1]
    security = Security.of(*given.values(), "", "", False, "token")
    way = serving(Scripted(), security) if side == "server" else reaching(f"{HOST}:1", security)
    with pytest.raises(FlowpsError, match=r"cluster\.tls_"), way:
        pass


# --- hosts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_this_machine_is_safe_without_tls(host: str) -> None:
    """Nobody else can listen there."""
    PLAIN.check_host(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "192.168.1.1", "2001:db8::1", "node7", "localhost.example", ""])
def test_the_network_is_not(files: Certificates, host: str) -> None:
    """It needs TLS, or the word of the user that it is trusted; the error names the knobs."""
    said = rf"listen on {host}, where other machines reach it, without TLS: give --cluster\.tls_ca.*--cluster\.insecure true"
    with pytest.raises(WireError, match=said):
        PLAIN.check_host(host)
    Security("", "", "", "", TOKEN, insecure=True).check_host(host)
    files.security().check_host(host)


def test_a_server_is_not_opened_to_the_network() -> None:
    """It refuses before it listens."""
    with pytest.raises(WireError, match=r"a shard would listen on 0\.0\.0\.0"), serving(Scripted(), host="0.0.0.0"):
        pass


def test_a_server_in_a_trusted_network() -> None:
    """Is allowed on demand, on all addresses."""
    trusting = Security("", "", "", "", TOKEN, insecure=True)
    with serving(Scripted(), trusting, host="0.0.0.0") as server:
        port = server.address.rsplit(":", 1)[1]
        with reaching(f"{HOST}:{port}", trusting) as remote:
            remote.connect(LONG_S)


def test_tls_to_the_network(files: Certificates) -> None:
    """Needs no further word."""
    with serving(Scripted(), files.security(), host="0.0.0.0") as server:
        port = server.address.rsplit(":", 1)[1]
        with reaching(f"{HOST}:{port}", files.security()) as remote:
            remote.connect(LONG_S)

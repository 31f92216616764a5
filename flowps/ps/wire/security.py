"""Who may call a shard, and how the way there is protected: TLS on both sides, and a shared token.

Files are read on the machine that uses them. Covers credentials only.
"""

from __future__ import annotations

import hmac
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from flowps.errors import ConfigError, WireError

TOKEN_KEY = "authorization"


@dataclass(frozen=True)
class Security:
    """What a server and its clients agree on.

    ca, cert, key   PEM files of TLS, all three or none
    name            that all certificates carry; "": each has the address of its machine
    token           that every call must carry; never empty
    insecure        whether to speak without TLS to other machines
    """

    ca: str
    cert: str
    key: str
    name: str
    token: str
    insecure: bool

    @staticmethod
    def of(ca: str, cert: str, key: str, name: str, token_file: str, insecure: bool, drawn: str) -> Security:
        """From a config; `drawn`: the token where there is no file. Raises ConfigError where it is incomplete or unreadable."""
        if any((ca, cert, key)) and not all((ca, cert, key)):
            raise ConfigError(
                "cluster.tls_ca, cluster.tls_cert and cluster.tls_key belong together; missing: "
                + ", ".join(f"cluster.{k}" for k, v in (("tls_ca", ca), ("tls_cert", cert), ("tls_key", key)) if not v)
            )
        token = _read(token_file, "cluster.token_file").decode("ascii", "replace").strip() if token_file else drawn
        if not (token.isascii() and token.isprintable()):
            raise ConfigError(f"cluster.token_file: {token_file} must hold one line of printable ASCII letters")
        if not token:
            raise ConfigError(f"cluster.token_file: {token_file} is empty; put a long random text into it")
        return Security(ca, cert, key, name, token, insecure)

    @property
    def has_tls(self) -> bool:
        """Whether TLS is on."""
        return bool(self.ca)

    def check_host(self, host: str) -> None:
        """Raise WireError for an address of the network that lookups would travel to unprotected."""
        if not self.has_tls and not self.insecure and not _is_loopback(host):
            raise WireError(
                f"a shard would listen on {host}, where other machines reach it, without TLS: give --cluster.tls_ca, "
                "--cluster.tls_cert and --cluster.tls_key, or allow it in a network you trust with --cluster.insecure true"
            )

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """For a server; None: no TLS."""
        if not self.has_tls:
            return None
        ca, cert, key = self._files()
        return grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """For a client; None: no TLS."""
        if not self.has_tls:
            return None
        ca, cert, key = self._files()
        return grpc.ssl_channel_credentials(ca, key, cert)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return ((TOKEN_KEY, f"Bearer {self.token}"),)

    def admits(self, metadata: object) -> bool:
        """Whether a call's metadata carries the token."""
        wanted = f"Bearer {self.token}".encode()
        found = [value for key, value in metadata if key == TOKEN_KEY]  # type: ignore[attr-defined]
        return any(hmac.compare_digest(value.encode() if isinstance(value, str) else value, wanted) for value in found)

    def _files(self) -> tuple[bytes, bytes, bytes]:
        named = (("tls_ca", self.ca), ("tls_cert", self.cert), ("tls_key", self.key))
        ca, cert, key = (_read(path, f"cluster.{knob}") for knob, path in named)
        # gRPC takes any bytes, and never says of a connection that cannot be made that they are no certificates.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_verify_locations(self.ca)
            context.load_cert_chain(self.cert, self.key, password="")
        except OSError as error:
            raise ConfigError(
                f"cluster.tls_ca {self.ca}, cluster.tls_cert {self.cert} and cluster.tls_key {self.key} must be PEM files of an "
                f"authority, a certificate and its key without a password: {error}"
            ) from None
        return ca, cert, key


def _read(path: str, knob: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{knob}: {path} cannot be read on this machine: {error.strerror or error}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""TLS of lookups: the server shows a certificate, and asks for that of its clients where it is told which authority signs them."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from flowps.errors import ConfigError


@dataclass(frozen=True)
class Tls:
    """PEM files, each "" for none.

    cert, key   one's own certificate and its key, both or none; a server that has none speaks without TLS
    ca          of the authority that must have signed the other side's certificate; of a client it is what turns TLS on
    """

    cert: str = ""
    key: str = ""
    ca: str = ""

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise ConfigError("--tls_cert and --tls_key belong together: give both")

    def check_host(self, host: str, insecure: bool) -> None:
        """Raise ConfigError for a server on an address of the network that lookups would travel to unprotected."""
        if self.ca and not self.cert:
            raise ConfigError("--tls_ca: a server needs a certificate too: give --tls_cert and --tls_key")
        if not self.cert and not insecure and not _is_loopback(host):
            raise ConfigError(
                f"--host {host}: other machines reach it, and lookups would travel without TLS: give --tls_cert and --tls_key, or "
                "allow it in a network you trust with --insecure"
            )

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """For a server; None: no TLS. Raises ConfigError."""
        if not self.cert:
            return None
        self._check()
        ca = _read(self.ca) if self.ca else None
        return grpc.ssl_server_credentials([(_read(self.key), _read(self.cert))], ca, require_client_auth=ca is not None)

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """For a client; None: no TLS. Raises ConfigError."""
        if not self.ca:
            return None
        self._check()
        key, cert = (_read(self.key), _read(self.cert)) if self.cert else (None, None)
        return grpc.ssl_channel_credentials(_read(self.ca), key, cert)

    def _check(self) -> None:
        """gRPC takes any bytes, and never says of a connection that cannot be made that they are no certificates."""
        for path in (self.ca, self.cert, self.key):
            if path:
                _read(path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            if self.ca:
                context.load_verify_locations(self.ca)
            if self.cert:
                context.load_cert_chain(self.cert, self.key, password="")
        except OSError as error:
            given = ", ".join(path for path in (self.ca, self.cert, self.key) if path)
            raise ConfigError(
                f"TLS: {given} must be PEM files of an authority, a certificate and its key without a password: {error}"
            ) from None


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS: {path} cannot be read: {error.strerror or error}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

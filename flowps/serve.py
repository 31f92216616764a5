"""Answer lookups in the embeddings of a bundle over gRPC: `python -m flowps.serve OUT [--port 50051]`.

Signs of slots in, float32 rows out; a sign without a row reads zeros. A newer version of the bundle is loaded as it becomes live,
and calls go on meanwhile; one that is broken is remarked, and the old one stays. Health checking and reflection are the standard
services of gRPC, figures are served to Prometheus with --metrics_port. SIGTERM and Ctrl-C end it, once running calls are answered.

    python -m flowps.serve bundles/ctr --port 50051 --metrics_port 9100
    python -m flowps.serve bundles/ctr --host 0.0.0.0 --tls_cert cert.pem --tls_key key.pem

Exit status: 0 when it was ended, 1 for a bundle that cannot be served or an address that cannot be listened on, 2 for options that
contradict each other.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import FrameType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from rich.console import Console

from flowps.arguments import run_command
from flowps.errors import WireError
from flowps.serving.live import Live, Watcher
from flowps.serving.rows import Tables
from flowps.serving.wire.security import Tls
from flowps.serving.wire.server import LookupServer
from flowps.status.progress import PlainConsole
from flowps.version import __version__

_BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """See Meter; figures of this process in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("flowps_serve_requests", "calls that have ended", ["call", "code"], registry=registry)
        self._seconds = Histogram("flowps_serve_seconds", "time of calls", ["call"], buckets=_BOUNDS_S, registry=registry)
        self._signs = Counter("flowps_serve_signs", "signs that were looked up", ["slot"], registry=registry)
        self._unknown = Counter("flowps_serve_unknown_signs", "of these, those without a row", ["slot"], registry=registry)
        self._rows = Gauge("flowps_serve_rows", "rows that are served", ["slot"], registry=registry)
        self._bytes = Gauge("flowps_serve_table_bytes", "memory of the rows that are served", registry=registry)
        self._version = Gauge("flowps_serve_bundle_version", "version of the bundle that is served", registry=registry)
        self._created = Gauge("flowps_serve_bundle_created_seconds", "Unix time at which it was made", registry=registry)
        self._loads = Counter("flowps_serve_loads", "versions that were loaded, the first among them", registry=registry)
        self._failures = Counter("flowps_serve_load_failures", "versions that could not be loaded", registry=registry)

    def answered(self, call: str, code: str, seconds: float) -> None:
        """See Meter."""
        self._requests.labels(call, code).inc()
        self._seconds.labels(call).observe(seconds)

    def looked_up(self, slot: str, signs: int, unknown: int) -> None:
        """See Meter."""
        self._signs.labels(slot).inc(signs)
        self._unknown.labels(slot).inc(unknown)

    def loaded(self, tables: Tables) -> None:
        """See Meter."""
        self._rows.clear()  # slots may have gone
        for name, rows in tables.rows.items():
            self._rows.labels(name).set(len(rows.signs))
        self._bytes.set(tables.nbytes)
        self._version.set(tables.version.number)
        self._created.set(tables.manifest.created)
        self._loads.inc()

    def failed(self) -> None:
        """See Meter."""
        self._failures.inc()


def serve(options: argparse.Namespace, console: Console, ended: SimpleQueue[int]) -> None:
    """Serve until `ended` has something. Raises FlowpsError for what keeps it from beginning."""
    tls = Tls(options.tls_cert, options.tls_key, options.tls_ca)
    tls.check_host(options.host, options.insecure)
    metrics = Metrics()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    with ExitStack() as opened:
        live = Live(options.out, metrics, say)
        if options.metrics_port is not None:
            say(f"metrics: {opened.enter_context(_metrics_served(metrics, options.host, options.metrics_port))}")
        server = opened.enter_context(
            closing(
                LookupServer(
                    live, metrics, options.host, options.port, tls=tls, threads=options.threads,
                    max_message_bytes=options.max_message_mib << 20,
                )
            )
        )  # fmt: skip
        tables = live.tables
        say(
            f"flowps {__version__}: version {tables.version.number} of {options.out}: {tables.num_rows:,} rows of "
            f"{len(tables.rows)} slots, {tables.nbytes / 1e6:,.1f} MB"
        )
        opened.enter_context(closing(Watcher(live, options.poll_s)))
        say(f"serving on {server.address}{'' if tls.cert else ', without TLS'}")
        ended.get()
        say("ending: calls that run are answered first")


@contextmanager
def _metrics_served(metrics: Metrics, host: str, port: int) -> Iterator[str]:
    """Figures for Prometheus over HTTP; gives their URL."""
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise WireError(f"--metrics_port {port}: cannot listen there: {error.strerror or error}; 0 takes any free one") from None
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def _ended_by_signals() -> Iterator[SimpleQueue[int]]:
    """A queue that SIGTERM or Ctrl-C is put into; a second one ends the process at once."""
    ended: SimpleQueue[int] = SimpleQueue()  # an Event may not be set by a handler: its lock may be held by what is interrupted
    numbers = (signal.SIGINT, signal.SIGTERM)

    def on_signal(number: int, frame: FrameType | None) -> None:
        for of in numbers:
            signal.signal(of, signal.SIG_DFL)
        ended.put(number)

    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _within(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return value

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m flowps.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the bundle's folder, as python -m flowps.export has made it")
    add = parser.add_argument
    port = _within(int, 0, 65_535)
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=port, default=50051, metavar="N", help="of gRPC; 0: any free one (default: %(default)s)")
    add(
        "--metrics_port",
        type=port,
        metavar="N",
        help="serve figures to Prometheus there, without TLS; 0: any free one (default: none)",
    )
    add("--poll_s", type=_within(float, 0.01, 86_400), default=5.0, metavar="X",
        help="seconds between two looks for a newer version (default: %(default)s)")  # fmt: skip
    add("--threads", type=_within(int, 1, 1024), default=8, metavar="N", help="threads that answer (default: %(default)s)")
    add(
        "--max_message_mib",
        type=_within(int, 1, 2047),
        default=64,
        metavar="N",
        help="the largest request or answer (default: %(default)s)",
    )
    add("--tls_cert", default="", metavar="FILE", help="PEM file of the server's certificate")
    add("--tls_key", default="", metavar="FILE", help="PEM file of its key")
    add("--tls_ca", default="", metavar="FILE", help="PEM file of the authority that must have signed the certificates of clients")
    add("--insecure", action="store_true", help="listen without TLS where other machines reach it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    options = _parser().parse_args(argv)
    with _ended_by_signals() as ended:
        return run_command(lambda: serve(options, PlainConsole(), ended))


if __name__ == "__main__":
    sys.exit(main())

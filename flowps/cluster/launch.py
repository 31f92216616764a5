"""A Dask client to run on: the embedded cluster, one process with threads."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import dask
import distributed

from flowps.cluster.plan import Plan
from flowps.errors import ConfigError

# Dask's sampling profiler stops every thread 100 times a second to look at its stack, here on the trainer's own cores.
_EMBEDDED = {"distributed.worker.profile.enabled": False}


@contextmanager
def embedded(plan: Plan) -> Iterator[tuple[distributed.Client, str]]:
    """A client of a cluster in this process, gone when the context is left, and the dashboard's address ("": none).

    Raises ConfigError for a dashboard address that cannot be used.
    """
    address = plan.config.cluster.dashboard
    port = address.rpartition(":")[2]
    if address and not (port.isdigit() and int(port) < 1 << 16):
        raise ConfigError(f"cluster.dashboard: found {address!r}, expected host:port, as in 127.0.0.1:8787 (port 0: any free one)")
    with warnings.catch_warnings(), dask.config.set(_EMBEDDED), _quiet():
        # A second run beside the first takes any free port and prints it.
        warnings.filterwarnings("ignore", message="Port .* is already in use", category=UserWarning)
        try:
            cluster = distributed.LocalCluster(
                n_workers=1, threads_per_worker=plan.hub_threads, processes=False, memory_limit=0,
                # Loopback, also where there is no page to serve: Dask opens these ports in any case.
                dashboard_address=address or "127.0.0.1:0",
                worker_dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": bool(address)},
            )  # fmt: skip
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"cluster.dashboard: the embedded cluster cannot start on {address!r}: {error}") from None
        with cluster, distributed.Client(cluster) as client:
            yield client, _dashboard(cluster, address)


def _dashboard(cluster: distributed.LocalCluster, address: str) -> str:
    """The dashboard's address as asked for, with the port it really got; Dask's own link names the machine's outer address."""
    if not address:
        return ""
    return f"http://{address.rpartition(':')[0] or 'localhost'}:{cluster.scheduler.http_server.port}/status"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's remarks off the terminal while the cluster lives.

    It reports a busy GIL (loading numba and TensorFlow), and every failed task with its stack trace, which the command raises and
    reports itself.
    """
    loggers = [
        logging.getLogger(f"distributed.{name}") for name in ("core", "utils_perf", "scheduler", "worker", "worker.state_machine")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""A Dask client to run on: one process with threads, local processes, or a cluster that is there already."""

from __future__ import annotations

import contextvars
import json
import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from pathlib import Path

import dask
import distributed
from dask.system import CPU_COUNT

from flowps.cluster.assign import Assignment, assign, reassign
from flowps.cluster.offer import Offer, ask, workers_now
from flowps.config import Config
from flowps.errors import ClusterError, ConfigError, MissingWorkersError, StoppedError
from flowps.heap import ARROW_POOL, KEEP_BYTES, MMAP_BYTES, memory_kept

# Dask's sampling profiler stops every thread 100 times a second to look at its stack, here on the trainer's own cores.
# Its nanny makes workers give freed memory back at once, and the next partition's page faults cost more than decoding it saves.
# It gives a worker up for good that happens to be away 15 s after it was lost, be it for the second time: the nanny brings it back.
_LOCAL = {
    "distributed.worker.profile.enabled": False,
    "distributed.deploy.lost-worker-timeout": "365 days",
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": KEEP_BYTES,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": MMAP_BYTES,
    "distributed.nanny.pre-spawn-environ.ARROW_DEFAULT_MEMORY_POOL": ARROW_POOL,
}
_LOOPBACK = "127.0.0.1"
_HANDSHAKE_S = 1.0  # after the connection
_POLL_S = 0.5  # between two looks at who has joined


@contextmanager
def launch(config: Config) -> Iterator[tuple[distributed.Client, str]]:
    """A client of the cluster that `config` asks for, and the dashboard's address ("": none).

    What was started here is gone when the context is left. Raises ConfigError for a dashboard address that cannot be used, and for
    knobs that contradict each other; ClusterError for a scheduler that does not answer.
    """
    if config.cluster.scheduler:
        if config.cluster.mode == "processes":
            raise ConfigError("cluster.mode = processes and cluster.scheduler are both set: give one")
        with _connected(config) as client:
            yield client, _dashboard_of(client)
        return
    if config.cluster.mode == "embedded" and config.trainer.count > 1:
        raise ConfigError(
            f"trainer.count = {config.trainer.count} in one process: each trainer needs a process of its own; "
            "give --cluster.mode processes, or a cluster (--cluster.scheduler)"
        )
    address = config.cluster.dashboard
    port = address.rpartition(":")[2]
    if address and not (port.isdigit() and int(port) < 1 << 16):
        raise ConfigError(f"cluster.dashboard: found {address!r}, expected host:port, as in 127.0.0.1:8787 (port 0: any free one)")
    start = _embedded if config.cluster.mode == "embedded" else _processes
    # A client that is the caller's current one, of another cluster, would be that of our actors too.
    apart = contextvars.Context()
    with warnings.catch_warnings(), dask.config.set(_LOCAL), _quiet():
        # A second run beside the first takes any free port and prints it.
        warnings.filterwarnings("ignore", message="Port .* is already in use", category=UserWarning)
        try:
            with _interrupts_held():
                cluster = apart.run(start, config, address or f"{_LOOPBACK}:0")
        except (OSError, RuntimeError) as error:
            if config.cluster.mode == "processes" and isinstance(error, RuntimeError):
                raise ConfigError(
                    f"cluster.mode = processes: a process cannot start: {error} In a script of your own the run must be started "
                    'under `if __name__ == "__main__":`, for each process imports the script'
                ) from None
            raise ConfigError(
                f"cluster.dashboard: the {config.cluster.mode} cluster cannot start on {address!r}: {error}"
            ) from None
        keeping = memory_kept() if config.cluster.mode == "embedded" else nullcontext()
        with keeping, cluster, apart.run(distributed.Client, cluster) as client:
            yield client, _dashboard(cluster, address)


def gather_workers(
    client: distributed.Client, config: Config, say: Callable[[str], None], interrupted: Callable[[], bool]
) -> Assignment:
    """Who does what, once enough workers are there.

    Says once what it waits for, up to cluster.wait_s. Raises ClusterError when that is over, and for a worker with another flowps.
    """

    def choose(offers: Sequence[Offer]) -> Assignment:
        return assign(offers, config.ps.num_shards, config.trainer.count)

    return _gather(client, config, choose, say, interrupted)


def gather_anew(
    client: distributed.Client, config: Config, assignment: Assignment, lost: Collection[int], say: Callable[[str], None],
    interrupted: Callable[[], bool],
) -> Assignment:  # fmt: skip
    """Who does what, once there are workers for the shards that are lost. As `gather_workers`."""
    return _gather(client, config, lambda offers: reassign(offers, assignment, lost), say, interrupted)


def _gather(
    client: distributed.Client, config: Config, choose: Callable[[Sequence[Offer]], Assignment], say: Callable[[str], None],
    interrupted: Callable[[], bool],
) -> Assignment:  # fmt: skip
    deadline = time.monotonic() + config.cluster.wait_s
    told = False
    while True:
        try:
            return choose(ask(client, config.cluster.interface))
        except MissingWorkersError as error:
            if not config.cluster.has_processes or time.monotonic() >= deadline:
                raise
            missing = str(error)
        if not told:
            say(f"waiting up to {config.cluster.wait_s:g} s for workers: {missing}")
            told = True
        _wait_for_change(client, deadline, interrupted)


def hub_threads(config: Config) -> int:
    """Threads for hub tasks of a cluster that is started here."""
    return config.cluster.threads or int(CPU_COUNT)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start threads and processes that never see Ctrl-C, which reaches the whole group: only the command decides what it means.

    They inherit what this thread holds back; one that comes meanwhile is seen after.
    """
    resource_tracker.ensure_running()  # starting it, Python lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _embedded(config: Config, dashboard: str) -> distributed.SpecCluster:
    """A scheduler and a worker in this process. Without a page to serve, they do not load what Dask draws its own with.

    `LocalCluster` gives its worker a page whenever it is told where to listen, and otherwise it listens everywhere.
    """
    common = {"protocol": "inproc://", "dashboard": bool(config.cluster.dashboard)}
    # Loopback, also where there is no page to serve: Dask opens these ports in any case.
    at_worker = {"nthreads": hub_threads(config), "memory_limit": 0, "dashboard_address": f"{_LOOPBACK}:0"}
    worker = {"cls": distributed.Worker, "options": common | at_worker}
    scheduler = {"cls": distributed.Scheduler, "options": common | {"dashboard_address": dashboard}}
    return distributed.SpecCluster(workers={0: worker}, scheduler=scheduler, silence_logs=logging.WARNING)


def _processes(config: Config, dashboard: str) -> distributed.SpecCluster:
    """A process for the hub, one for each shard and each trainer."""
    threads = hub_threads(config)
    roles: dict[str, tuple[int, dict[str, float]]] = {"hub": (threads, {"HUB": threads})}
    roles |= {f"ps-{k}": (1, {"PS": 1}) for k in range(config.ps.num_shards)}
    roles |= {f"trainer-{k}": (1, {"TRAINER": 1}) for k in range(config.trainer.count)}
    options = {
        "host": _LOOPBACK, "dashboard_address": f"{_LOOPBACK}:0", "memory_limit": 0, "silence_logs": logging.CRITICAL,
    }  # fmt: skip
    workers = {
        name: {"cls": distributed.Nanny, "options": {**options, "name": name, "nthreads": nthreads, "resources": resources}}
        for name, (nthreads, resources) in roles.items()
    }
    scheduler = {
        "cls": distributed.Scheduler,
        "options": {"host": _LOOPBACK, "dashboard_address": dashboard, "dashboard": bool(config.cluster.dashboard)},
    }
    return distributed.SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL)


@contextmanager
def _connected(config: Config) -> Iterator[distributed.Client]:
    """A client of the user's cluster."""
    address, timeout_s = config.cluster.scheduler, config.cluster.connect_timeout_s
    if "://" not in address and address.endswith(".json"):
        address = _address_in(Path(address))
    try:
        client = _client(address, timeout_s)
    except (OSError, TimeoutError, ValueError, TypeError, MemoryError) as error:
        said = f": {error}" if isinstance(error, ValueError | TypeError) else ""
        raise ClusterError(
            f"cluster.scheduler: no Dask scheduler answers at {address} within {timeout_s:g} s{said}; is it running, and can this "
            "machine reach it? (dask scheduler prints its address; --cluster.connect_timeout_s waits longer)"
        ) from None
    with _quiet("worker", "client", "core", "utils"), client:  # also while it closes: who was lost is said in our own words
        yield client


def _client(address: str, timeout_s: float) -> distributed.Client:
    """A connected client. Raises TimeoutError after `timeout_s`, also where somebody answers who is no scheduler: Dask waits on."""
    found: Future[distributed.Client] = Future()

    def connect() -> None:
        try:
            found.set_result(distributed.Client(address, timeout=timeout_s, name="flowps"))
        except BaseException as error:  # handed over whole
            found.set_exception(error)

    threading.Thread(target=connect, name="flowps-connect", daemon=True).start()
    return found.result(timeout_s + _HANDSHAKE_S)


def _address_in(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["address"])
    except OSError as error:
        raise ClusterError(f"cluster.scheduler: scheduler file {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise ClusterError(f"cluster.scheduler: {path} is no scheduler file: it has no address") from None


def _wait_for_change(client: distributed.Client, deadline: float, interrupted: Callable[[], bool]) -> None:
    before = workers_now(client).keys()
    while time.monotonic() < deadline:
        if interrupted():
            raise StoppedError("stopped by a signal while waiting for workers")
        time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))
        if workers_now(client).keys() != before:
            return


def _dashboard(cluster: distributed.SpecCluster, address: str) -> str:
    """The dashboard's address as asked for, with the port it really got; Dask's own link names the machine's outer address."""
    if not address:
        return ""
    return f"http://{address.rpartition(':')[0] or 'localhost'}:{cluster.scheduler.http_server.port}/status"


def _dashboard_of(client: distributed.Client) -> str:
    """The dashboard's address of a scheduler that is there already; "" if it serves none."""
    # A lambda goes there whole: the scheduler's machine needs no flowps. Its port answers without a dashboard too, for metrics.
    served = client.run_on_scheduler(
        lambda dask_scheduler: any(
            "/status" in getattr(application, "app_paths", ()) for application in dask_scheduler.http_application.applications
        )
    )
    return str(client.dashboard_link or "") if served else ""


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep Dask's remarks off the terminal while the cluster lives: those of `names`, or of all that run in this process.

    It reports a busy GIL (loading numba and TensorFlow), and every failed task with its stack trace, which the command raises and
    reports itself.
    """
    loggers = [
        logging.getLogger(f"distributed.{name}")
        for name in names or ("core", "utils_perf", "scheduler", "worker", "worker.state_machine")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""`Offer`: what a Dask worker has for a run; asked of every worker of a cluster.

Covers asking and the check that all run the same flowps. `assign` decides who gets what.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import distributed
import psutil
from distributed.system import MEMORY_LIMIT
from distributed.utils import get_ip_interface

from flowps.errors import ClusterError
from flowps.version import __version__

ROLES = ("HUB", "PS", "TRAINER")

TRAINER_KEY = "flowps-trainer-"  # how the keys of trainers' tasks begin
_DASK_SHARE = 0.8  # of a worker's memory limit; beyond it Dask starts no more tasks there, and ends it at 95 %

# Sent as text: a worker that has no flowps, or another one, must be able to answer.
_VERSION = "__import__('flowps.version').version.__version__"


@dataclass(frozen=True)
class Offer:
    """A worker.

    name         as Dask calls it, for people
    address      Dask's
    host         the address at which its shards and trainers can be reached
    resources    as declared: HUB, PS, TRAINER, GPU
    available    bytes that its process may still take
    process      tells processes of all machines apart
    trains       whether a trainer of another run is in it: a process can have one
    """

    name: str
    address: str
    host: str
    threads: int
    available: int
    process: str
    resources: Mapping[str, float] = field(default_factory=dict)
    trains: bool = False


def workers_now(client: distributed.Client, timeout_s: float | None = None) -> dict[str, dict[str, Any]]:
    """What the scheduler knows of each worker, by address.

    `Client.scheduler_info` answers from a copy that the client itself refreshes every two seconds, without workers.
    """
    scheduler = client.scheduler
    if scheduler is None:  # Dask has given the connection up, and closed the client by itself
        raise OSError("the connection to the scheduler was closed")
    found: dict[str, dict[str, Any]] = client.sync(scheduler.identity, n_workers=-1, callback_timeout=timeout_s)["workers"]
    return found


def ask(client: distributed.Client, interface: str) -> list[Offer]:
    """The workers that are there now, by name. Raises ClusterError for a worker without this version of flowps."""
    workers = workers_now(client)
    versions = client.run(eval, _VERSION, on_error="return", workers=list(workers))
    for address, version in versions.items():
        if version != __version__:
            found = f"flowps {version}" if isinstance(version, str) else f"no flowps ({version})"
            raise ClusterError(
                f"worker {workers[address]['name']} at {address} has {found}, this command has flowps {__version__}: "
                "install the same version on all machines"
            )
    # What is read goes over Dask's own connections.
    inner = [address for address in versions if workers[address]["resources"].keys() & {*ROLES} == {"HUB"}]
    found = client.run(_look_around, interface, inner, workers=list(versions))
    offers = []
    for address, answer in found.items():
        if isinstance(answer, str):
            raise ClusterError(f"worker {workers[address]['name']} at {address}: {answer}")
        host, available, process, trains = answer
        worker = workers[address]
        offers.append(
            Offer(str(worker["name"]), address, host, worker["nthreads"], available, process, worker["resources"], trains)
        )
    return sorted(offers, key=lambda offer: _natural(offer.name))


def scheduler_lacks(client: distributed.Client) -> str:
    """What the scheduler's machine lacks to run functions of this flowps, in words; "" if nothing."""

    def version() -> str:  # goes there whole: that machine may have no flowps
        try:
            from flowps.version import __version__ as found
        except ImportError:
            return ""
        return found

    there = client.run_on_scheduler(version)
    if there == __version__:
        return ""
    return f"its machine has {f'flowps {there}' if there else 'no flowps'}, this command has flowps {__version__}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(address: str) -> str:
    """The host of an address like tcp://10.0.0.2:40331."""
    return urlsplit(address).hostname or "127.0.0.1"


def available_memory() -> int:
    """Bytes this process may still take: the machine's available memory, or what a container's limit leaves of it."""
    return min(psutil.virtual_memory().available, MEMORY_LIMIT - psutil.Process().memory_info().rss)


def _look_around(interface: str, inner: Sequence[str], dask_worker: distributed.Worker) -> tuple[str, int, str, bool] | str:
    """Runs on a worker: where it can be reached, its memory, its process, whether that trains; or what is wrong.

    `inner`: workers of whom nobody asks anything but by way of Dask. Dask gives it `dask_worker`.
    """
    process = f"{socket.gethostname()}:{os.getpid()}"
    try:
        here = not interface or dask_worker.address in inner
        host = host_of(dask_worker.address) if here else get_ip_interface(interface)
    except ValueError as error:
        return f"cluster.interface: {socket.gethostname()} has no address on {interface!r}: {error}"
    available, limit = available_memory(), dask_worker.memory_manager.memory_limit
    if limit:
        available = min(available, int(_DASK_SHARE * limit) - psutil.Process().memory_info().rss)
    trains = any(
        task.state in ("executing", "long-running")
        for key, task in dask_worker.state.tasks.items()
        if str(key).startswith(TRAINER_KEY)
    )
    return host, available, process, trains


def _natural(name: str) -> tuple[int, str]:
    return len(name), name

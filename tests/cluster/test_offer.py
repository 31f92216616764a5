"""What workers answer when they are asked what they have, and whom a run cannot use."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator

import distributed
import psutil
import pytest

from flowps.cluster import offer as offer_module
from flowps.cluster.offer import TRAINER_KEY, ask, available_memory, host_of
from flowps.errors import ClusterError
from flowps.version import __version__


@pytest.fixture(scope="module")
def client() -> Iterator[distributed.Client]:
    """Of three workers in this process: `w-10` and `w-2`, and one without a name of its own."""
    dash, where = {"dashboard_address": "127.0.0.1:0"}, {"protocol": "inproc://"}
    workers = {
        name: {
            "cls": distributed.Worker,
            "options": {**where, **dash, "name": name, "nthreads": nthreads, "resources": resources, "memory_limit": 0},
        }
        for name, nthreads, resources in (("w-10", 2, {"PS": 3}), ("w-2", 1, {"HUB": 1, "TRAINER": 1}), (0, 1, {}))
    }
    scheduler = {"cls": distributed.Scheduler, "options": {**where, **dash, "dashboard": False}}
    with (
        distributed.SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.WARNING) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_every_worker_says_what_it_has(client: distributed.Client) -> None:
    offers = ask(client, "")
    assert [offer.name for offer in offers] == ["0", "w-2", "w-10"]  # as people count
    last = offers[-1]
    assert (last.threads, last.resources) == (2, {"PS": 3})
    assert last.address.startswith("inproc://")
    assert last.host == host_of(last.address)
    assert {offer.process for offer in offers} == {f"{socket.gethostname()}:{os.getpid()}"}
    assert 0 < last.available <= psutil.virtual_memory().total


def test_an_interface_has_the_address(client: distributed.Client) -> None:
    assert {offer.host for offer in ask(client, "lo")} == {"127.0.0.1"}


def test_an_interface_that_is_not_there_is_refused_with_those_that_are(client: distributed.Client) -> None:
    with pytest.raises(ClusterError) as refusal:
        ask(client, "eth77")
    said = str(refusal.value)
    assert said.startswith("worker ")
    assert f"cluster.interface: {socket.gethostname()} has no address on 'eth77': " in said
    assert "'lo'" in said


def test_a_worker_that_only_reads_needs_no_interface() -> None:
    dash, where = {"dashboard_address": "127.0.0.1:0"}, {"protocol": "inproc://"}
    options = {**where, **dash, "nthreads": 1, "resources": {"HUB": 1}}
    with (
        distributed.SpecCluster(
            workers={"hub": {"cls": distributed.Worker, "options": options}},
            scheduler={"cls": distributed.Scheduler, "options": {**where, **dash, "dashboard": False}},
            silence_logs=logging.WARNING,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        (offer,) = ask(client, "eth77")
    assert offer.host == host_of(offer.address)


def test_dasks_own_memory_limit_is_counted(client: distributed.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = psutil.Process().memory_info().rss * 2
    for worker in client.cluster.workers.values():
        monkeypatch.setattr(worker.memory_manager, "memory_limit", limit)
    assert {0 < offer.available < limit * 0.8 for offer in ask(client, "")} == {True}


def test_a_trainer_of_another_run_is_seen_while_it_runs(client: distributed.Client) -> None:
    leave = distributed.Event("leave")
    asked = client.submit(lambda: distributed.Event("leave").wait(), key=f"{TRAINER_KEY}other-0", workers=["w-2"], pure=False)
    deadline = time.monotonic() + 10
    while not any(offer.trains for offer in ask(client, "")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [offer.name for offer in ask(client, "") if offer.trains] == ["w-2"]
    leave.set()
    asked.result()
    assert not any(offer.trains for offer in ask(client, ""))


def test_another_version_is_refused_and_both_are_named(client: distributed.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offer_module, "__version__", "9.9.9")
    with pytest.raises(ClusterError) as refusal:
        ask(client, "")
    said = str(refusal.value)
    assert f"has flowps {__version__}, this command has flowps 9.9.9: install the same version on all machines" in said


def test_a_worker_without_flowps_is_refused(client: distributed.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offer_module, "_VERSION", "__import__('flowps_is_not_there')")
    with pytest.raises(
        ClusterError, match=r"worker \S+ at inproc:.* has no flowps \(No module named 'flowps_is_not_there'\), this"
    ):
        ask(client, "")


def test_nobody_is_there() -> None:
    with (
        distributed.LocalCluster(
            n_workers=0, processes=False, dashboard_address="127.0.0.1:0", scheduler_kwargs={"dashboard": False}
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert ask(client, "") == []


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("tcp://10.0.0.2:40331", "10.0.0.2"),
        ("tls://ps-0.example:8786", "ps-0.example"),
        ("tcp://[fd00::2]:40331", "fd00::2"),
        ("inproc://10.0.0.2/4/5", "10.0.0.2"),
    ],
)
def test_the_host_of_an_address(address: str, host: str) -> None:
    assert host_of(address) == host


def test_memory_is_what_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    used = psutil.Process().memory_info().rss
    monkeypatch.setattr(offer_module, "MEMORY_LIMIT", used + (1 << 20))
    assert available_memory() < 1 << 30
    monkeypatch.setattr(offer_module, "MEMORY_LIMIT", 1 << 60)
    assert available_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.5)

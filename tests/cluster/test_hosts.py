"""Roles on several hosts, which are network namespaces: each has an address of its own, and only the files in common.

10.77.0.1  scheduler, hub
10.77.0.2  two shards
10.77.0.3  trainer, and the command
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.cluster.conftest import Command, DaskCluster, assert_same, joined, train_command

pytestmark = [pytest.mark.netns, pytest.mark.long]
INTERFACE = "veth0"


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Three namespaces on one switch, which is a fourth."""
    names = [f"flowps-{os.getpid()}-{what}" for what in ("switch", "hub", "ps", "trainer")]
    switch, *hosts = names
    with ExitStack() as opened:
        for name in names:
            try:
                run("ip", "netns", "add", name)
            except (OSError, subprocess.CalledProcessError) as error:
                said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
                pytest.skip(f"ip netns add is not permitted here: {said}")
            opened.callback(run, "ip", "netns", "delete", name)  # its links go with it
        run("ip", "-n", switch, "link", "add", "bridge0", "up", "type", "bridge")
        for k, host in enumerate(hosts, 1):
            run("ip", "link", "add", INTERFACE, "netns", host, "type", "veth", "peer", "name", f"port{k}", "netns", switch)
            run("ip", "-n", switch, "link", "set", f"port{k}", "master", "bridge0", "up")
            run("ip", "-n", host, "address", "add", f"10.77.0.{k}/24", "dev", INTERFACE)
            run("ip", "-n", host, "link", "set", INTERFACE, "up")
            run("ip", "-n", host, "link", "set", "lo", "up")
        yield hosts


class Cluster:
    """The roles on their hosts."""

    def __init__(self, dask: DaskCluster, samples: Path, host: str) -> None:
        self._dask, self._samples, self._host = dask, samples, host

    def train(self, run_dir: Path, *knobs: object) -> Command:
        """Start a run on the third host."""
        knobs = ("--cluster.scheduler", self._dask.address, "--ps.num_shards", 2, *knobs)
        return train_command(self._samples, run_dir, *knobs, netns=self._host)


@pytest.fixture(scope="module")
def cluster(hosts: list[str], samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    hub, ps, trainer = hosts
    with closing(DaskCluster(tmp_path_factory.mktemp("hosts"), ("--interface", INTERFACE), netns=hub)) as dask:
        assert dask.address.startswith("tcp://10.77.0.1:")
        joined(
            dask.add("hub", "HUB=2", netns=hub),
            dask.add("ps-0", "PS=1", netns=ps),
            dask.add("ps-1", "PS=1", netns=ps),
            dask.add("trainer", "TRAINER=1", netns=trainer),
        )
        yield Cluster(dask, samples, trainer)


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Knobs: a certificate for all three hosts, its authority, and a token."""
    folder = tmp_path_factory.mktemp("tls")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", 1)
    hosts = ",".join(f"IP:10.77.0.{k}" for k in (1, 2, 3))
    run("openssl", "req", "-x509", *key, "-subj", "/CN=authority", "-keyout", folder / "ca.key", "-out", folder / "ca.pem")
    run(
        *("openssl", "req", "-x509", *key, "-subj", "/CN=flowps", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"),
        *("-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-addext", f"subjectAltName={hosts}"),
    )
    run("openssl", "rand", "-hex", "-out", folder / "token", 32)
    tls = [word for name in ("ca", "cert", "key") for word in (f"--cluster.tls_{name}", folder / f"{name}.pem")]
    return (*tls, "--cluster.token_file", folder / "token")


INSECURE = ("--cluster.insecure", "true")


def test_three_hosts_train_what_one_process_trains(cluster: Cluster, embedded: Path, tmp_path: Path) -> None:
    with closing(cluster.train(tmp_path / "run", *INSECURE)) as command:
        command.succeed()
    assert_same(tmp_path / "run", embedded)


def test_with_tls_and_a_token_too(cluster: Cluster, credentials: tuple[object, ...], embedded: Path, tmp_path: Path) -> None:
    with closing(cluster.train(tmp_path / "run", *credentials, "--cluster.interface", INTERFACE)) as command:
        command.succeed()
    assert_same(tmp_path / "run", embedded)


def test_without_tls_it_must_be_allowed(cluster: Cluster, tmp_path: Path) -> None:
    with closing(cluster.train(tmp_path / "run")) as command:
        said = command.refuse()
    assert re.search(
        r"a shard would listen on 10\.77\.0\.2, where other machines reach it, without TLS: give --cluster\.tls_ca", said
    )
    assert said.endswith("or allow it in a network you trust with --cluster.insecure true")


def test_a_file_that_a_host_does_not_have(cluster: Cluster, credentials: tuple[object, ...], tmp_path: Path) -> None:
    with closing(cluster.train(tmp_path / "run", *credentials, "--cluster.token_file", tmp_path / "none")) as command:
        said = command.refuse(status=2)
    assert f"cluster.token_file: {tmp_path}/none cannot be read on this machine: No such file or directory" in said


def test_an_interface_that_a_host_does_not_have(cluster: Cluster, tmp_path: Path) -> None:
    with closing(cluster.train(tmp_path / "run", *INSECURE, "--cluster.interface", "eth7")) as command:
        said = command.refuse()
    assert re.search(r"worker ps-[01] at tcp://10\.77\.0\.2:\d+: cluster\.interface: \S+ has no address on 'eth7'", said)
    assert f"Valid network interfaces are: ['lo', '{INTERFACE}']" in said


def test_an_interface_that_other_hosts_do_not_reach(cluster: Cluster, tmp_path: Path) -> None:
    knobs = ("--cluster.interface", "lo", "--cluster.connect_timeout_s", 2)
    with closing(cluster.train(tmp_path / "run", *knobs)) as command:
        said = command.refuse(timeout_s=30)
    assert re.search(r"shard 0 at 127\.0\.0\.1:\d+ does not answer within 2 s: can this machine reach it\?", said)
    assert "cluster.interface chooses the network" in said

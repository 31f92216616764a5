"""The embedded cluster: where its dashboard is, and what is refused; and waiting for workers."""

from __future__ import annotations

import gc
import socket
import urllib.request
from collections.abc import Callable, Iterator

import distributed
import pyarrow as pa
import pytest

from flowps.cluster.launch import gather_workers, launch
from flowps.config import Config
from flowps.errors import ConfigError, MissingWorkersError, StoppedError
from flowps.heap import ARROW_POOL


@pytest.mark.parametrize("address", ["here", "127.0.0.1", "127.0.0.1:http", ":"])
def test_a_dashboard_address_that_is_none_is_refused(make_config: Callable[..., Config], address: str) -> None:
    with (
        pytest.raises(ConfigError, match=r"cluster.dashboard: found '.*', expected host:port"),
        launch(make_config(("cluster.dashboard", address))),
    ):
        pass


# Dask leaves the sockets with which it tried in vain to the garbage collector, which must come while the mark holds.
dask_drops_sockets = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed:ResourceWarning"
)


@pytest.fixture
def collected() -> Iterator[None]:
    yield
    gc.collect()


@dask_drops_sockets
@pytest.mark.usefixtures("collected")
def test_a_dashboard_address_of_another_machine_is_refused(make_config: Callable[..., Config]) -> None:
    """192.0.2.0/24 is for documentation: no machine has it."""
    with (
        pytest.raises(ConfigError, match=r"cluster.dashboard: the embedded cluster cannot start on '192.0.2.1:0'"),
        launch(make_config(("cluster.dashboard", "192.0.2.1:0"))),
    ):
        pass


@dask_drops_sockets
@pytest.mark.usefixtures("collected")
def test_a_port_that_is_taken_is_replaced_and_the_right_one_told(make_config: Callable[..., Config]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with launch(make_config(("cluster.dashboard", f"127.0.0.1:{port}"))) as (_, dashboard):
            assert f":{port}/" not in dashboard
            with urllib.request.urlopen(dashboard, timeout=30) as page:
                assert b"Dask" in page.read()


def test_without_a_dashboard_there_is_no_address(make_config: Callable[..., Config]) -> None:
    with launch(make_config()) as (client, dashboard):
        assert dashboard == ""
        assert client.submit(sum, [1, 2]).result() == 3


def test_arrows_memory_is_kept_while_one_process_does_all(make_config: Callable[..., Config]) -> None:
    before = pa.default_memory_pool().backend_name
    with launch(make_config()) as (client, _):
        used = client.submit(lambda: pa.default_memory_pool().backend_name, pure=False).result()
        assert used == ARROW_POOL
    assert pa.default_memory_pool().backend_name == before


def test_several_trainers_in_one_process_are_refused(make_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError) as refusal, launch(make_config(("trainer.count", 2))):
        pass
    assert str(refusal.value) == (
        "trainer.count = 2 in one process: each trainer needs a process of its own; give --cluster.mode processes, or a cluster "
        "(--cluster.scheduler)"
    )


# --- waiting for workers ----------------------------------------------------------------------------------------------


@pytest.fixture
def empty() -> Iterator[distributed.LocalCluster]:
    """A cluster that has no workers yet."""
    with distributed.LocalCluster(
        n_workers=0, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0",
        worker_dashboard_address="127.0.0.1:0", scheduler_kwargs={"dashboard": False},
    ) as cluster:  # fmt: skip
        yield cluster


def test_a_worker_that_joins_later_is_waited_for(make_config: Callable[..., Config], empty: distributed.LocalCluster) -> None:
    config, said = make_config(("cluster.scheduler", "there"), ("ps.num_shards", 2)), []

    def say(line: str) -> None:
        said.append(line)
        empty.scale(1)

    with distributed.Client(empty) as client:
        found = gather_workers(client, config, say, lambda: False)
    assert [offer.name for offer in (*found.trainers, *found.shards)] == ["0", "0", "0"]
    (line,) = said  # once
    assert line.startswith("waiting up to 60 s for workers: the cluster has no workers: start some, as in dask worker SCHEDULER ")


def test_waiting_for_workers_has_an_end(make_config: Callable[..., Config], empty: distributed.LocalCluster) -> None:
    config, said = make_config(("cluster.scheduler", "there"), ("cluster.wait_s", 0.1)), []
    with distributed.Client(empty) as client, pytest.raises(MissingWorkersError, match="the cluster has no workers"):
        gather_workers(client, config, said.append, lambda: False)
    assert len(said) == 1


def test_waiting_for_workers_can_be_stopped(make_config: Callable[..., Config], empty: distributed.LocalCluster) -> None:
    config = make_config(("cluster.scheduler", "there"))
    with distributed.Client(empty) as client, pytest.raises(StoppedError) as stop:
        gather_workers(client, config, lambda line: None, lambda: True)
    assert str(stop.value) == "stopped by a signal while waiting for workers"
    assert stop.value.exit_code == 130


def test_a_cluster_of_ones_own_is_not_waited_for(make_config: Callable[..., Config], empty: distributed.LocalCluster) -> None:
    with distributed.Client(empty) as client, pytest.raises(MissingWorkersError):
        gather_workers(client, make_config(), pytest.fail, lambda: False)

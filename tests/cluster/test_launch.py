"""The embedded cluster: where its dashboard is, and what is refused."""

from __future__ import annotations

import gc
import socket
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from flowps.cluster.launch import launch
from flowps.config import Config
from flowps.errors import ConfigError


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

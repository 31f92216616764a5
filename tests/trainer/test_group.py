"""A group's port, before the group listens there. What a group does takes processes: long_group.py."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from flowps.trainer.group import _MOST_HELD, hold_port, let_go


@pytest.fixture
def ports() -> Iterator[list[int]]:
    """Some that are held."""
    held = [hold_port() for _ in range(_MOST_HELD)]
    yield held
    for port in held:
        let_go(port)


def test_a_port_that_is_held_is_given_to_the_group_alone(ports: list[int]) -> None:
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", ports[0]))
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])  # as TensorFlow's
    assert server.add_insecure_port(f"0.0.0.0:{ports[0]}") == ports[0]
    assert len(set(ports)) == len(ports)


def test_what_many_runs_leave_held_is_bounded(ports: list[int]) -> None:
    """The oldest goes when there is one too many."""
    newest = hold_port()
    with socket.socket() as other:
        other.bind(("", ports[0]))
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", ports[1]))
    let_go(newest)


def test_one_that_is_let_go_is_anybodys(ports: list[int]) -> None:
    let_go(ports[0])
    with socket.socket() as other:
        other.bind(("", ports[0]))
    let_go(ports[0])

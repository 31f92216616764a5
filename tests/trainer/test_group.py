"""A group's port, before the group listens there. What a group does takes processes: long_group.py."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from flowps.trainer.group import hold_port


def test_a_port_that_is_held_is_given_to_the_group_alone() -> None:
    port = hold_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])  # as TensorFlow's
    assert server.add_insecure_port(f"0.0.0.0:{port}") == port


def test_ports_held_differ() -> None:
    assert len({hold_port() for _ in range(50)}) == 50

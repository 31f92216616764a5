"""A group: sums over processes, and what becomes of whoever waits for one that is late, lost or never comes."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest

from flowps.errors import ClusterError, StoppedError
from flowps.trainer.group import Group, hold_port
from tests.trainer import members as members_module
from tests.trainer.members import HOST, LONG_S, SOON_S, Member, Members, abort, error_of, peers_of

pytestmark = pytest.mark.timeout(120)  # a trainer that waits for ever is the failure most of these look for


# --- what a member does; a process of its own runs it -----------------------------------------------------------------------


def join(peers: tuple[str, ...], number: int, timeout_s: float = LONG_S) -> Group:
    group = members_module._here["group"] = Group(peers, number, timeout_s)
    group.begin()
    group.join()
    return group


def add(peers: tuple[str, ...], number: int, *values: list[float], timeout_s: float = LONG_S) -> list[bytes]:
    """Join, and add up each of `values` under a key of its own, twice; the sums' bytes."""
    group = join(peers, number, timeout_s)
    return [group.add(np.array(of), key).tobytes() for _ in range(2) for key, of in enumerate(values, 1)]


def add_late(peers: tuple[str, ...], number: int, timeout_s: float = LONG_S) -> list[bytes]:
    """Join, say so, and add."""
    group = join(peers, number, timeout_s)
    members_module._here["reached"].set()
    return [group.add(np.array([number + 1.0]), 1).tobytes()]


def add_and_hold(peers: tuple[str, ...], number: int) -> None:
    """Add once, and come no more."""
    join(peers, number).add(np.ones(1), 1)
    members_module.hold()


def add_twice(peers: tuple[str, ...], number: int) -> None:
    """Add, say so, and add again."""
    group = join(peers, number)
    group.add(np.ones(1), 1)
    members_module._here["reached"].set()
    group.add(np.ones(1), 1)


def add_with_proxy(peers: tuple[str, ...], number: int, timeout_s: float) -> list[bytes]:
    """Add where a proxy is set that nobody answers at."""
    names = ("http_proxy", "https_proxy", "grpc_proxy")
    before = {name: os.environ.get(name) for name in (*names, "no_grpc_proxy")}
    os.environ.update(dict.fromkeys(names, f"http://{HOST}:{hold_port()}"))
    try:
        return add(peers, number, [number + 1.0], timeout_s=timeout_s)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def add_after_abort(peers: tuple[str, ...], number: int) -> None:
    """What an abort that comes early finds: the group is known, and not joined."""
    group = Group(peers, number, LONG_S)
    group.begin()
    group.abort()
    group.join()
    group.add(np.ones(1), 1)


def numbers(*of: float) -> bytes:
    return np.array(of).tobytes()


# --- sums -------------------------------------------------------------------------------------------------------------------


def test_sums_are_the_same_bits_everywhere_in_one_group_after_the_other(pair: list[Member]) -> None:
    random = np.random.default_rng(0)
    for _ in range(3):
        values = [[random.normal(size=1000).tolist(), random.normal(size=3).tolist(), [0.1 * n]] for n, _ in enumerate(pair)]
        peers = peers_of(2)
        calls = [member.start(add, peers, n, *values[n]) for n, member in enumerate(pair)]
        found = [member.result(call) for member, call in zip(pair, calls, strict=True)]
        assert found[0] == found[1]
        for key in range(3):
            assert found[0][key] == found[0][key + 3], "a key may be used again"
            np.testing.assert_allclose(np.frombuffer(found[0][key]), np.add(values[0][key], values[1][key]), rtol=1e-15)


def test_sums_are_exact_up_to_two_to_the_53(pair: list[Member]) -> None:
    peers = peers_of(2)
    calls = [member.start(add, peers, n, [2.0**52 + n, 3.0]) for n, member in enumerate(pair)]
    for member, call in zip(pair, calls, strict=True):
        assert member.result(call)[0] == numbers(2.0**53 + 1, 6.0)


@pytest.mark.parametrize("first", [0, 1])
def test_who_comes_late_is_waited_for(pair: list[Member], first: int) -> None:
    """The first trainer leads the group: it may be the late one as well."""
    peers = peers_of(2)
    early = pair[first].start(add_late, peers, first)
    assert pair[first].reached.wait(LONG_S)
    late = pair[1 - first].start(add_late, peers, 1 - first)
    assert pair[first].result(early) == pair[1 - first].result(late) == [numbers(3.0)]


has_ipv6 = pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="this machine has no IPv6")


@pytest.mark.parametrize(("host", "timeout_s"), [(HOST, LONG_S), pytest.param("[::1]", 3.0, marks=has_ipv6)])
def test_a_proxy_for_the_web_is_none_for_trainers(pair: list[Member], host: str, timeout_s: float) -> None:
    peers = peers_of(2, host)
    calls = [member.start(add_with_proxy, peers, n, timeout_s) for n, member in enumerate(pair)]
    for member, call in zip(pair, calls, strict=True):
        assert member.result(call) == [numbers(3.0)] * 2


# --- who does not come ------------------------------------------------------------------------------------------------------


def test_who_waits_in_vain_is_told_how_long(pair: list[Member]) -> None:
    error = error_of(pair[0], pair[0].start(add_late, peers_of(2), 0, 0.5))
    assert isinstance(error, ClusterError)
    assert str(error).startswith("trainer 0: another trainer did not come within 0.5 s: ")
    assert "\n" not in str(error)


def test_a_port_that_is_taken(pair: list[Member]) -> None:
    with socket.create_server((HOST, 0)) as taken:
        address = f"{HOST}:{taken.getsockname()[1]}"
        error = error_of(pair[1], pair[1].start(add, (*peers_of(1), address), 1, [1.0]))
    assert isinstance(error, ClusterError)
    assert str(error).startswith(f"trainer 1 cannot listen on {address} for the other trainers: ")


def test_who_waits_for_one_that_was_killed_ends_and_can_join_others_later(pair: list[Member], processes: Members) -> None:
    """By itself if it waited when that happened; otherwise TensorFlow waits for another process at that address, until an abort."""
    peers = peers_of(2)
    pair[0].start(add_and_hold, peers, 0)
    waiting = pair[1].start(add_twice, peers, 1)
    for member in pair:
        assert member.reached.wait(LONG_S)
    pair[0].kill()
    try:
        error = error_of(pair[1], waiting, 1.0)
        assert isinstance(error, ClusterError)
        assert str(error).startswith("trainer 1: another trainer was lost: ")
    except TimeoutError:
        pair[1].call(abort)
        assert isinstance(error_of(pair[1], waiting), StoppedError)
    again, peers = processes.renewed(), peers_of(2)
    assert again[1] is pair[1]
    calls = [member.start(add, peers, n, [n + 1.0]) for n, member in enumerate(again)]
    assert [member.result(call) for member, call in zip(again, calls, strict=True)] == [[numbers(3.0)] * 2] * 2


# --- abort ------------------------------------------------------------------------------------------------------------------


def test_an_abort_frees_who_waits(pair: list[Member]) -> None:
    waiting = pair[0].start(add_late, peers_of(2), 0)
    assert pair[0].reached.wait(LONG_S)
    pair[0].call(abort)
    error = error_of(pair[0], waiting)
    assert isinstance(error, StoppedError)
    assert str(error) == "the run was stopped because of another role's error"


def test_an_abort_that_comes_before_the_others_are_met_is_not_lost(pair: list[Member]) -> None:
    error = error_of(pair[0], pair[0].start(add_after_abort, peers_of(2), 0), SOON_S / 2)
    assert isinstance(error, StoppedError)

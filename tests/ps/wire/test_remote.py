"""`RemoteShard`: it keeps the contract of endpoints; connecting, deadlines, calls that are made again, limits, closing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from flowps.config import Slot
from flowps.errors import CapacityError, DataError, FlowpsError, StoppedError, UnknownBatchError, WireError
from flowps.ps.client import PsClient
from flowps.ps.endpoint import Endpoint, LocalEndpoint
from flowps.ps.load import measure
from flowps.ps.parcel import Parcel
from flowps.ps.placement import place
from flowps.ps.shard import Shard
from flowps.ps.wire import message as message_module
from flowps.ps.wire import remote as remote_module
from flowps.ps.wire import service as service_module
from flowps.ps.wire.protocol import CODES
from flowps.version import __version__
from tests.ps import drawn
from tests.ps.contract import EndpointContract
from tests.ps.wire.loopback import (
    HOST,
    LONG_S,
    SIGNATURE,
    WIDTH,
    Gate,
    Scripted,
    a_dead_address,
    a_remote_shard,
    a_silent_address,
    filled,
    lines,
    local,
    parcel,
    reached,
    reaching,
    relay_to,
    rows_of,
    serving,
    shard_of,
    some_parcel,
    state_of,
)  # fmt: skip


class TestRemoteShard(EndpointContract):
    """Bit by bit what the shard does."""

    half = False

    @contextmanager
    def reach(self, shard: Shard, slots: Sequence[Slot]) -> Iterator[Endpoint]:
        """See EndpointContract."""
        widths = [slot.width for slot in slots]
        signature = [(slot.name, slot.width, 0, 1) for slot in slots]
        with (
            serving(LocalEndpoint(shard, widths), slots=signature) as server,
            reaching(server.address, slots=signature, half=self.half) as remote,
        ):
            yield remote


class TestRemoteShardInFloat16(TestRemoteShard):
    """Within what float16 loses, a step's gradient and an answer's embeddings each time."""

    half = True
    tolerance = 5e-3


# --- connecting -------------------------------------------------------------------------------------------------------


def test_connecting_to_the_right_server() -> None:
    """Checks it, and changes nothing there."""
    with a_remote_shard() as (remote, shard):
        before = state_of(shard)
        remote.connect(LONG_S)
        assert state_of(shard) == before


def test_a_trainer_that_is_there_before_the_server_waits() -> None:
    """As soon as the shard listens, the trainer goes on."""
    with shard_of() as shard, serving(local(shard)) as gone:
        address = gone.address
    refused = threading.Event()
    with shard_of() as shard, ThreadPoolExecutor(1) as thread, reaching(address) as remote:

        def look(state: grpc.ChannelConnectivity) -> None:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                refused.set()

        remote._channel.subscribe(look)
        connected = thread.submit(remote.connect, LONG_S)
        assert refused.wait(LONG_S)
        assert not connected.done()
        with serving(local(shard), port=int(address.rsplit(":", 1)[1])):
            connected.result(LONG_S)
        remote._channel.unsubscribe(look)


@pytest.mark.parametrize("address", [a_dead_address, a_silent_address])
def test_nobody_answers(address: Any) -> None:
    """In time, with the shard, its address, the time, and the knobs to turn."""
    with address() as there, reaching(there, number=3) as remote:
        said = rf"shard 3 at {there} does not answer within 0\.2 s: .*cluster\.interface.*cluster\.connect_timeout_s"
        with pytest.raises(WireError, match=said):
            remote.connect(0.2)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"run": "run-0"}, r"is shard 0 of run 'run-0' .*, not shard 0 of run 'run-1' .*old server still on this port"),
        ({"shard": 2}, r"is shard 2 of run 'run-1' .*, not shard 0 of run 'run-1'"),
        ({"slots": SIGNATURE[:1]}, r"is .* with 1 slots, not .* with 2: is an old server"),
    ],
)
def test_another_server_is_refused(there: dict[str, Any], said: str) -> None:
    """The error names what is there and what was expected."""
    with a_remote_shard(there) as (remote, _), pytest.raises(WireError, match=rf"shard 0 at {HOST}:\d+ {said}"):
        remote.connect(LONG_S)


@pytest.mark.parametrize("changed", [("b", 16, 0, 1), ("c", 8, 0, 1), ("b", 8, 1, 2)])
def test_a_slot_that_differs_is_named(changed: tuple[str, int, int, int]) -> None:
    """By name, with what differs: width, or which part of the slot."""
    slots = [SIGNATURE[0], changed]
    with a_remote_shard({"slots": slots}) as (remote, _), pytest.raises(WireError, match="slot 'b'"):
        remote.connect(LONG_S)


@pytest.mark.parametrize("changed", [("b", 16, 0, 1), ("c", 8, 0, 1), ("b", 8, 1, 2)])
def test_other_slots_are_refused(changed: tuple[str, int, int, int]) -> None:
    """Of another width or name, or another part of one."""
    slots = [SIGNATURE[0], changed]
    with a_remote_shard({"slots": slots}) as (remote, _), pytest.raises(WireError, match="slot"):
        remote.connect(LONG_S)


def test_another_version_of_flowps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are named, and what to do."""
    monkeypatch.setattr(service_module, "__version__", "0.0.9")
    said = rf"has flowps 0\.0\.9, this trainer {__version__}: install the same version"
    with a_remote_shard() as (remote, _), pytest.raises(WireError, match=said):
        remote.connect(LONG_S)


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are named, at connecting and in every call."""
    monkeypatch.setattr(remote_module, "PROTOCOL", 2)
    monkeypatch.setattr(message_module, "PROTOCOL", 2)
    with a_remote_shard() as (remote, _):
        said = rf"FAILED_PRECONDITION: the client speaks protocol 2, this server \(flowps {__version__}\) protocol 1: install"
        with pytest.raises(WireError, match=said):
            remote.connect(LONG_S)
        with pytest.raises(WireError, match=said):
            remote.lookup(0, some_parcel(), True)


def test_a_server_of_another_run_refuses_the_calls() -> None:
    """Also where the trainer did not ask before; both runs are named and nothing has changed."""
    with a_remote_shard(run="run-2") as (remote, shard):
        before = state_of(shard)
        said = "FAILED_PRECONDITION: the client belongs to run 'run-2', this shard to run 'run-1'"
        with pytest.raises(WireError, match=said):
            remote.lookup(0, some_parcel(), True)
        with pytest.raises(WireError, match=said):
            remote.push(0, lines(5), 1.0)
        with pytest.raises(WireError, match=said):
            remote.forget(0)
        assert state_of(shard) == before


def test_a_full_queue_while_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is no reason to give up: others' calls pass, here in the first pause."""
    with Gate() as gate, serving(Scripted(before=gate.wait_here), in_flight=1) as server, filled(server.address):
        clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda pause_s: gate.open())
        monkeypatch.setattr(remote_module, "time", clock)
        with reaching(server.address) as remote:
            try:
                remote.connect(LONG_S)
            finally:
                gate.open()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind, _ in CODES])
def test_errors_of_the_shard_arrive_as_they_are(kind: type[FlowpsError]) -> None:
    """Type and message, whatever letters it has; and at once: nothing is made again."""

    def fail(name: str, number: int) -> None:
        raise kind(f"{name}: größer als erlaubt, 100 %\nsecond line")

    retried: list[str] = []
    endpoint = Scripted(before=fail)
    with serving(endpoint) as server, reaching(server.address, count=retried.append) as remote:
        calls = {
            "lookup": lambda: remote.lookup(0, some_parcel(), True), "push": lambda: remote.push(0, lines(5), 1.0),
            "forget": lambda: remote.forget(0),
        }  # fmt: skip
        for name, call in calls.items():
            with pytest.raises(kind) as raised:
                call()
            assert type(raised.value) is kind
            assert str(raised.value) == f"{name}: größer als erlaubt, 100 %\nsecond line"
    assert (set(endpoint.calls.values()), retried) == ({1}, [])


def test_a_bug_at_the_shard_is_told() -> None:
    """With its type, the shard, the call and the batch; it is not made again."""

    def fail(name: str, number: int) -> None:
        raise ZeroDivisionError("by zero")

    endpoint = Scripted(before=fail)
    with serving(endpoint) as server, reaching(server.address) as remote:
        said = f"shard 0 at {server.address}: Lookup of batch 17: INTERNAL: ZeroDivisionError: by zero"
        with pytest.raises(WireError, match=said):
            remote.lookup(17, some_parcel(), True)
    assert endpoint.calls["lookup"] == 1


def test_a_long_error_arrives_too() -> None:
    """Such as that of a full table of 1,000 slots, which names them all; be it cut."""

    def fail(name: str, number: int) -> None:
        raise CapacityError("all rows of the slots " + ", ".join(f"a_slot_with_a_long_name_{s}" for s in range(1000)))

    said = "all rows of the slots a_slot_with_a_long_name_0, "
    with reached(Scripted(before=fail), timeout_s=0.3) as remote, pytest.raises(CapacityError, match=said):
        remote.lookup(0, some_parcel(), True)


def test_an_answer_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers with other lines than it was asked for is refused, not read past its end."""
    answer = message_module.write_reply(lambda out: np.zeros((5, WIDTH + 1), np.float32), (5, WIDTH + 1), half=True)
    monkeypatch.setattr(service_module.message, "write_reply", lambda *_: answer)
    with reached(Scripted(), half=True) as remote:
        with pytest.raises(DataError, match="embeddings: found 130 bytes, expected 120"):
            remote.lookup(0, some_parcel(), True)
        with pytest.raises(DataError, match="embeddings: found 130 bytes, expected 0"):
            remote.lookup(0, some_parcel(size=0), False)


# --- deadlines and repetitions ----------------------------------------------------------------------------------------


def test_a_shard_that_never_answers() -> None:
    """An error in time, for every call, with the knob; the batch can be named by it."""
    with Gate() as gate, reached(Scripted(before=gate.wait_here), timeout_s=0.2) as remote:
        said = r"Lookup of batch 8: DEADLINE_EXCEEDED: .*no answer within 0\.2 s \(cluster\.rpc_timeout_s\)"
        with pytest.raises(WireError, match=rf"shard 0 at {HOST}:\d+: {said}"):
            remote.lookup(8, some_parcel(), True)
        with pytest.raises(WireError, match="Push of batch 8: DEADLINE_EXCEEDED"):
            remote.push(8, lines(5), 1.0)
        with pytest.raises(WireError, match="Forget of batch 8: DEADLINE_EXCEEDED"):
            remote.forget(8)
        gate.open()


def test_a_machine_that_never_answers() -> None:
    """It accepts connections, and that is all."""
    with a_silent_address() as address, reaching(address, timeout_s=0.2) as remote, pytest.raises(WireError) as raised:
        remote.push(8, lines(5), 1.0)
    assert f"shard 0 at {address}: Push of batch 8: " in str(raised.value)
    assert "no answer within 0.2 s" in str(raised.value)


def test_pauses_grow_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as long each time up to a second, and not all trainers at the same moment; every repetition is counted."""
    clock = SimpleNamespace(now=0.0, pauses=[])

    def sleep(pause_s: float) -> None:
        clock.pauses.append(pause_s)
        clock.now += pause_s

    monkeypatch.setattr(remote_module, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    retried: list[str] = []
    with a_dead_address() as address, reaching(address, timeout_s=20.0, count=retried.append) as remote:
        said = rf"shard 0 at {address}: Lookup of batch 1: (UNAVAILABLE|DEADLINE_EXCEEDED): .*no answer within 20 s"
        with pytest.raises(WireError, match=said):
            remote.lookup(1, some_parcel(), True)
    longest = [min(1.0, 0.05 * 2**k) for k in range(len(clock.pauses))]
    assert all(most / 2 <= pause <= most for pause, most in zip(clock.pauses, longest, strict=True))
    assert len({pause / most for pause, most in zip(clock.pauses, longest, strict=True)}) > 1
    assert 19 <= clock.now <= 20
    assert retried == ["rpc_retries"] * len(clock.pauses)


@pytest.mark.parametrize("name", ["lookup", "find", "pool", "push", "forget"])
def test_a_call_whose_answer_was_lost_is_made_once(name: str) -> None:
    """The connection breaks when the shard has done its work: the trainer asks again and gets what the first would have got."""
    retried: list[str] = []
    with shard_of() as shard, shard_of() as twin:

        def cut(called: str, number: int) -> None:
            if called == name and number == 0:
                relay.cut()

        endpoint = Scripted(local(shard), after=cut)
        with (
            serving(endpoint) as server, relay_to(server.address) as relay, reaching(relay.address, count=retried.append) as remote
        ):  # fmt: skip
            expected = local(twin)
            for batch_id in (1, 2):
                sent = some_parcel(batch_id)
                np.testing.assert_array_equal(remote.lookup(batch_id, sent, True), expected.lookup(batch_id, sent, True))
                assert remote.push(batch_id, lines(5), 0.5) == expected.push(batch_id, lines(5), 0.5)
            remote.lookup(3, some_parcel(3), True)
            remote.forget(3)
            expected.lookup(3, some_parcel(3), True)
            expected.forget(3)
            remote.find(4, some_parcel(4))
            np.testing.assert_array_equal(remote.pool(4, 5), expected.lookup(4, some_parcel(4), True))
            assert state_of(shard) == state_of(twin)
    # A batch may be given up twice, everything else was done once.
    assert endpoint.calls == {"lookup": 3, "find": 1, "pool": 1, "push": 2, "forget": 1 + (name == "forget")}
    assert set(retried) == {"rpc_retries"}


@pytest.mark.parametrize("name", ["lookup", "find", "pool", "push"])
def test_a_call_that_takes_longer_than_an_attempt_is_made_once(name: str) -> None:
    """The second attempt waits for what the first has begun."""
    asked_again = threading.Event()

    def wait(called: str, number: int) -> None:
        if called == name:
            assert asked_again.wait(LONG_S)

    with shard_of() as shard, shard_of() as twin:
        endpoint = Scripted(local(shard), before=wait)
        with serving(endpoint) as server, reaching(server.address, timeout_s=2.0, count=lambda _: asked_again.set()) as remote:
            expected = local(twin)
            np.testing.assert_array_equal(remote.lookup(1, some_parcel(), True), expected.lookup(1, some_parcel(), True))
            assert remote.push(1, lines(5), 1.0) == expected.push(1, lines(5), 1.0)
            remote.find(2, some_parcel(2))
            np.testing.assert_array_equal(remote.pool(2, 5), expected.lookup(2, some_parcel(2), True))
            assert state_of(shard) == state_of(twin)
    assert endpoint.calls == {"lookup": 1, "find": 1, "pool": 1, "push": 1, "forget": 0}


def test_a_lookup_that_comes_after_its_push_is_refused() -> None:
    """It was held up on its way; the batch is not in flight again."""
    with a_remote_shard() as (remote, shard):
        remote.lookup(1, some_parcel(), True)
        remote.push(1, lines(5), 1.0)
        before = state_of(shard)
        with pytest.raises(UnknownBatchError, match="batch 1: a lookup came after its push"):
            remote.lookup(1, some_parcel(), True)
        assert state_of(shard) == before


def test_a_server_that_starts_anew() -> None:
    """The connection comes back by itself; what the old shard had in flight the new one does not know."""
    with shard_of() as shard, serving(local(shard)) as first, relay_to(first.address) as relay, reaching(relay.address) as remote:
        remote.lookup(1, some_parcel(), True)
        with shard_of() as other, serving(local(other)) as second:
            relay._to = HOST, int(second.address.rsplit(":", 1)[1])
            relay.cut()
            with pytest.raises(UnknownBatchError, match=r"batch 1: .*remembers no lookup"):
                remote.push(1, lines(5), 1.0)
            remote.lookup(2, some_parcel(), True)
            assert set(other._remembered) == {2}


def test_a_full_queue_is_waited_for() -> None:
    """RESOURCE_EXHAUSTED at first, and the answer as soon as there is room."""
    retried: list[str] = []
    with Gate() as gate, serving(Scripted(before=gate.wait_here), in_flight=1) as server, filled(server.address):

        def count(name: str) -> None:
            retried.append(name)
            gate.open()

        with reaching(server.address, count=count) as remote:
            assert remote.lookup(10_000, some_parcel(), True).shape == (5, WIDTH)
    assert retried[0] == "rpc_retries"


def test_a_queue_that_stays_full() -> None:
    """An error in time that says so."""
    with Gate() as gate, serving(Scripted(before=gate.wait_here), in_flight=1) as server, filled(server.address):
        said = r"RESOURCE_EXHAUSTED: .*no answer within 0\.2 s"
        with reaching(server.address, timeout_s=0.2) as remote, pytest.raises(WireError, match=said):
            remote.push(10_000, lines(5), 1.0)
        gate.open()


# --- sizes ------------------------------------------------------------------------------------------------------------


def of_size(num_bytes: int) -> Parcel:
    """Samples whose answer has so many bytes."""
    size, rest = divmod(num_bytes, WIDTH * 4)
    assert not rest
    return parcel([[[]] * size, [[]] * size])


SMALL = 64 * WIDTH * 4


@pytest.mark.parametrize("half", [False, True])
def test_an_answer_as_large_as_allowed(half: bool) -> None:
    """Passes; one sample more is refused with what to do, before anything is sent."""
    with shard_of() as shard:
        endpoint = Scripted(local(shard))
        with serving(endpoint, max_bytes=SMALL) as server, reaching(server.address, max_message_bytes=SMALL, half=half) as remote:
            assert remote.lookup(0, of_size(SMALL), True).shape == (64, WIDTH)
            said = (
                rf"batch 1: a message of {SMALL + WIDTH * 4:,} bytes between trainer and shard 0 at {server.address}, but "
                rf"cluster\.max_message_mib allows {SMALL:,}; lower data\.batch_size, raise cluster\.max_message_mib .*add shards"
            )
            with pytest.raises(CapacityError, match=said):
                remote.lookup(1, of_size(SMALL + WIDTH * 4), True)
            assert endpoint.calls["lookup"] == 1


def test_a_request_larger_than_allowed() -> None:
    """Many signs of one sample, or a gradient: refused before it is sent."""
    with shard_of(capacity_rows=20_000) as shard:
        endpoint = Scripted(local(shard))
        with serving(endpoint, max_bytes=SMALL) as server, reaching(server.address, max_message_bytes=SMALL) as remote:
            fits, over = (parcel([[[*range(n)]], [[]]]) for n in (SMALL // 8 - 20, SMALL // 8))
            remote.lookup(0, fits, True)
            with pytest.raises(CapacityError, match="batch 1: a message of "):
                remote.lookup(1, over, True)
            with pytest.raises(CapacityError, match="batch 0: a message of "):
                remote.push(0, lines(64), 1.0)
            assert endpoint.calls == {"lookup": 1, "push": 0, "forget": 0}


def test_large_messages_pass() -> None:
    """Several times what gRPC allows by itself (4 MiB), both ways."""
    limit = 32 << 20
    with a_remote_shard({"max_bytes": limit}, max_message_bytes=limit) as (remote, shard), shard_of() as twin:
        size = (16 << 20) // (WIDTH * 4)
        sent = parcel([[[5]] * size, [[6, 7]] * size])
        np.testing.assert_array_equal(remote.lookup(0, sent, True), local(twin).lookup(0, sent, True))
        gradient = lines(size)
        assert remote.push(0, gradient, 1.0) == local(twin).push(0, gradient, 1.0) == 3
        assert rows_of(shard) == rows_of(twin)


def test_a_server_that_allows_less_says_so_at_once() -> None:
    """A message that is too large stays too large: it is not sent again, and the error is not about time."""
    retried: list[str] = []
    with a_remote_shard({"max_bytes": 1 << 10}, timeout_s=0.3, count=retried.append) as (remote, _):
        remote.connect(LONG_S)
        with pytest.raises(FlowpsError, match=r"larger than max|max_message_mib allows 1,024"):
            remote.lookup(0, parcel([[[*range(20_000)]], [[]]]), True)
    assert not retried


# --- closing, and several shards ---------------------------------------------------------------------------------------


def test_closed_while_calls_wait() -> None:
    """They end at once, told that the run was stopped; closing twice is no error."""
    with Gate() as gate, serving(Scripted(before=gate.wait_here)) as server, reaching(server.address) as remote:
        with ThreadPoolExecutor(3) as threads:
            waiting: dict[str, Future[Any]] = {
                "Lookup of batch 1": threads.submit(remote.lookup, 1, some_parcel(), True),
                "Push of batch 2": threads.submit(remote.push, 2, lines(5), 1.0),
                "Forget of batch 3": threads.submit(remote.forget, 3),
            }
            gate.wait_for(3)
            remote.close()
            for name, call in waiting.items():
                with pytest.raises(StoppedError, match=f"shard 0 at {server.address}: {name}: the connection was closed"):
                    call.result(LONG_S)
        remote.close()
        gate.open()


def test_calls_after_closing_are_refused() -> None:
    """As those that wait are: a run that ends closes what others may still use."""
    with a_remote_shard() as (remote, _):
        remote.close()
        with pytest.raises(StoppedError, match="Lookup of batch 1: the connection was closed"):
            remote.lookup(1, some_parcel(), True)
        with pytest.raises(StoppedError, match="Forget of batch 1: the connection was closed"):
            remote.forget(1)


def test_connecting_after_closing_is_refused() -> None:
    """Likewise."""
    with a_remote_shard() as (remote, _):
        remote.close()
        with pytest.raises(StoppedError, match="closed"):
            remote.connect(1.0)


def test_a_server_that_is_closed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that goes while a call waits has failed, whatever the reason: nobody asked the trainer to stop."""
    monkeypatch.setattr(service_module, "_GRACE_S", 0.1)
    with Gate() as gate, ThreadPoolExecutor(1) as thread:
        with serving(Scripted(before=gate.wait_here)) as server, reaching(server.address, timeout_s=0.6) as remote:
            waiting = thread.submit(remote.lookup, 1, some_parcel(), True)
            gate.wait_for(1)
            server.close()
            with pytest.raises(WireError, match="Lookup of batch 1"):
                waiting.result(LONG_S)
        gate.open()


def test_trainers_that_step_together_are_told_when_the_run_ends() -> None:
    """StoppedError is no failure of the wire."""
    with reached(Scripted(before=lambda *_: stop())) as remote, pytest.raises(StoppedError, match="the run ends"):
        remote.push(1, lines(5), 1.0)


def stop() -> None:
    """What `Together` raises after its `close`."""
    raise StoppedError("trainers that step together: the run ends")


def test_a_client_of_remote_shards_gets_what_one_of_local_shards_gets() -> None:
    """Bit by bit: whole slots, and slots that are split over several shards; looked up whole and in halves."""
    slots = [drawn.slot("heavy", dim=8, pooling="mean"), drawn.slot("b", dim=4, optimizer="sgd"), drawn.slot("c", dim=16)]
    random = np.random.default_rng(0)
    batches = []
    for _ in range(4):
        bags = drawn.random_bags(random, len(slots), size=6, values=30)
        bags[0] = [[*bag, *bag[::-1], *bag] for bag in bags[0]]
        batches.append(drawn.batch(bags))
    placement = place(slots, 3, measure(batches))
    assert max(piece.parts for pieces in placement.shards for piece in pieces) > 1
    seen = []
    for far in (False, True):
        with ExitStack() as opened:
            shards: list[Shard] = []
            ways: list[Endpoint] = []
            for k, pieces in enumerate(placement.shards):
                held = [slots[piece.slot] for piece in pieces]
                shard = Shard(held, [1000] * len(held), 7, 4)
                opened.callback(shard.close)
                shards.append(shard)
                way: Endpoint = LocalEndpoint(shard, [slot.width for slot in held])
                if far:
                    signature = [(slots[p.slot].name, slots[p.slot].width, p.part, p.parts) for p in pieces]
                    server = opened.enter_context(serving(way, shard=k, slots=signature))
                    way = opened.enter_context(reaching(server.address, number=k, slots=signature))
                    way.connect(LONG_S)
                ways.append(way)
            client = PsClient(ways, placement, slots)
            opened.callback(client.close)
            outs = []
            for step, batch in enumerate(batches):
                looked_up = client.find(step, batch)() if step % 2 else client.lookup(step, batch, training=True)
                outs.append(looked_up.tobytes())
                client.push(step, np.random.default_rng(step).uniform(-1, 1, (6, placement.width)).astype(np.float32), 0.5)
                outs.append(client.lookup(99, batches[0], training=False).tobytes())
            seen.append((outs, [rows_of(shard) for shard in shards]))
    assert seen[0] == seen[1]

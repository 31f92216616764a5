"""Processes that train as members of a group, or alone, and the shards that they share, in this process.

A collective needs a process of its own for each trainer. Starting one takes seconds: a file's tests share its members, so most
groups here are not the first one of their processes.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from flowps.batch import Batch, Float32
from flowps.config import Config, Data, Net, Slot, Status
from flowps.config import Trainer as TrainerKnobs
from flowps.errors import StoppedError
from flowps.ps.client import PsClient
from flowps.ps.endpoint import Endpoint, LocalEndpoint
from flowps.ps.numbering import batch_id
from flowps.ps.parcel import Lines, Parcel
from flowps.ps.placement import Placement, place
from flowps.ps.shard import Shard
from flowps.ps.together import Together
from flowps.ps.wire.remote import RemoteShard
from flowps.ps.wire.security import Security
from flowps.ps.wire.service import Served, ShardServer
from flowps.status.event import Evaluated, Event, Finished, Interval, Metrics
from flowps.status.run_status import RunStatus
from flowps.trainer.group import Group, hold_port, let_go
from flowps.trainer.loop import Trained, Trainer
from flowps.trainer.models import ModelSpec
from flowps.trainer.surroundings import Surroundings

_given: list[int] = []  # ports at which trainers may meet
LONG_S = 60.0  # how long is waited for what must happen; never reached unless a test fails
SOON_S = 10.0  # within which a trainer must hear of what has become of another: far below the deadlines of its calls
HOST, RUN = "127.0.0.1", "a-run"
PLAIN = Security(ca="", cert="", key="", name="", token="a secret", insecure=False)
MAX_BYTES = 1 << 20

SLOTS = (
    Slot(name="user", dim=4, learning_rate=0.05, init_scale=0.3),  # adagrad
    Slot(name="items", dim=4, pooling="mean", optimizer="adam", learning_rate=0.01, init_scale=0.3),
    Slot(name="seen", dim=2, pooling="none", max_len=3, optimizer="momentum", learning_rate=0.05, init_scale=0.3),
)
DENSE_WIDTH = 3


# --- samples --------------------------------------------------------------------------------------------------------------


def make_batch(size: int, seed: int, weighted: bool = True) -> Batch:
    """Bags of 0 to 4 signs of a small vocabulary, each sign with a weight of its own; the label depends on the first slot."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 5, (len(SLOTS), size))
    lengths[0] = 1
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    slot_of = np.repeat(np.arange(len(SLOTS)), lengths.sum(axis=1))
    values = random.integers(0, 12, offsets[-1])
    dense = random.normal(size=(size, DENSE_WIDTH)).astype(np.float32)
    labels = ((values[:size] % 3 == 0) ^ (random.random(size) < 0.1)).astype(np.float32)
    signs = ((slot_of << 40) + values * 0x9E3779B1 + 1).astype(np.uint64)
    shares = random.choice([0.5, 1.0, 2.0], len(signs)).astype(np.float32)
    return Batch(labels, dense, signs, offsets, shares if weighted else None)


def batches_of(sizes: Sequence[int], seed: int) -> list[Batch]:
    """Batches of these sizes; every third one without weights."""
    return [make_batch(size, seed * 1000 + k, weighted=k % 3 != 2) for k, size in enumerate(sizes)]


def joined(epochs: Sequence[Sequence[Sequence[Batch]]]) -> list[list[Batch]]:
    """Of [trainer][epoch][step] what one trainer would have: in each step the batches of all that still have one."""
    found = []
    for of_trainers in zip(*epochs, strict=True):
        steps = max(map(len, of_trainers))
        found.append([Batch.concat([of[k] for of in of_trainers if k < len(of)]) for k in range(steps)])
    return found


# --- models ---------------------------------------------------------------------------------------------------------------
# Keras is imported late: flowps.trainer sets what TensorFlow reads from the environment.


def regular(spec: ModelSpec) -> Any:
    """With regularisers, which must count once, not once for every trainer."""
    import keras

    inputs = spec.inputs()
    x = spec.concatenated(inputs)
    x = keras.layers.Dense(5, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.05))(x)
    return keras.Model(inputs, keras.layers.Dense(1, bias_regularizer=keras.regularizers.L1(0.02))(x))


def normal(spec: ModelSpec) -> Any:
    """With moving statistics beside the weights."""
    import keras

    inputs = spec.inputs()
    x = keras.layers.BatchNormalization(momentum=0.7)(spec.concatenated(inputs))
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(4, activation="relu")(x)))


def constant(spec: ModelSpec) -> Any:
    """Without a trainable weight."""
    import keras

    inputs = spec.inputs()
    return keras.Model(inputs, keras.ops.sum(spec.concatenated(inputs), axis=1, keepdims=True))


def fragile(spec: ModelSpec) -> Any:
    """Where an embedding is negative its gradient is NaN (0 times infinity), while the loss and the dense gradients are finite."""
    import keras

    inputs = spec.inputs()
    root = keras.ops.sqrt(keras.ops.relu(inputs["embeddings"]))
    return keras.Model(inputs, keras.layers.Dense(1)(keras.ops.concatenate([root, inputs["dense_columns"]], axis=1)))


def unequal(spec: ModelSpec) -> Any:
    """With first weights of its own in every process."""
    import keras

    inputs = spec.inputs()
    ours = keras.initializers.Constant((os.getpid() % 89) / 100)
    return keras.Model(inputs, keras.layers.Dense(1, kernel_initializer=ours)(spec.concatenated(inputs)))


# --- shards, in this process ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """Shards and where they are served; `together`: what makes one step of several trainers'."""

    placement: Placement
    addresses: list[str]
    shards: list[Shard]
    together: list[Together]

    def rows(self) -> dict[str, dict[int, Float32]]:
        """{slot: {sign: weights and state}}."""
        found: dict[str, dict[int, Float32]] = {}
        for shard in self.shards:
            for rows in shard.rows():
                of_slot = found.setdefault(rows.slot.name, {})
                for sign, weights, state in zip(rows.signs, rows.weights, rows.state, strict=True):
                    of_slot[int(sign)] = np.concatenate([weights, state])
        return found

    def unsound(self) -> int:
        """Rows that were not stepped because their gradient was NaN or infinite."""
        return sum(stats.unsound for shard in self.shards for stats in shard.stats())

    def release(self) -> None:
        """What a run does when a role has failed: no trainer waits here for another any longer."""
        for of in self.together:
            of.close()


class _Heard(Endpoint):
    """`inner`; tells of every lookup before it is made."""

    def __init__(self, inner: Endpoint, hear: Callable[[int], None]) -> None:
        self._inner, self._hear = inner, hear

    def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Float32 | None = None) -> Float32:
        """See Endpoint."""
        self._hear(batch_id)
        return self._inner.lookup(batch_id, parcel, training, out)

    def push(self, batch_id: int, gradient: Lines, rate_scale: float) -> int:
        """See Endpoint."""
        return self._inner.push(batch_id, gradient, rate_scale)

    def forget(self, batch_id: int) -> None:
        """See Endpoint."""
        self._inner.forget(batch_id)


@contextmanager
def serving(
    trainers: int, in_flight: int, num_shards: int = 2, hear: Callable[[int], None] = lambda batch: None
) -> Iterator[Shards]:
    """Shards of SLOTS for so many trainers, as the cluster sets them up. `hear`: told the number of every batch looked up."""
    placement = place(SLOTS, num_shards)
    shards, together, addresses = [], [], []
    with ExitStack() as opened:
        for k, pieces in enumerate(placement.shards):
            slots = [SLOTS[piece.slot] for piece in pieces]
            widths = [slot.width for slot in slots]
            shards.append(opened.enter_context(closing(Shard(slots, [1000] * len(slots), 7, trainers * in_flight))))
            endpoint: Endpoint = LocalEndpoint(shards[-1], widths)
            if trainers > 1 and in_flight == 1:
                endpoint = opened.enter_context(closing(Together(endpoint, sum(widths), trainers)))
                together.append(endpoint)
            served = Served(RUN, k, signature(placement, k), MAX_BYTES)
            server = ShardServer(_Heard(endpoint, hear), served, PLAIN, HOST, 0, trainers * in_flight)
            addresses.append(opened.enter_context(closing(server)).address)
            # Whoever still waits goes before the server that it waits in.
            opened.callback(Shards(placement, [], [], list(together)).release)
        yield Shards(placement, addresses, shards, together)
    gc.collect()
    for thread in threading.enumerate():  # gRPC tells its pool to end, and does not wait for it
        if thread.name.startswith("flowps-ps-server"):
            thread.join(LONG_S)


def signature(placement: Placement, shard: int) -> list[tuple[str, int, int, int]]:
    """What server and client agree on."""
    return [(SLOTS[piece.slot].name, SLOTS[piece.slot].width, piece.part, piece.parts) for piece in placement.shards[shard]]


# --- what a member does ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A run of one trainer.

    epochs     the batches of each
    test       those to evaluate on; `valid`: those between epochs
    peers      of its group; none: it is alone
    timeout_s  of a collective, a lookup and a push
    trouble    what is called before the batch of that number of all is read; what it raises, the stream raises
    """

    config: Config
    placement: Placement
    addresses: list[str]
    epochs: list[list[Batch]]
    test: list[Batch] | None = None
    number: int = 0
    peers: tuple[str, ...] = ()
    timeout_s: float = LONG_S
    trouble: tuple[int, Callable[[], None]] | None = None
    valid: list[Batch] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a trainer has come to.

    weights    of the dense model; `state`: what is not trained
    intervals  metrics of each, as every trainer knows them
    pushed     its own pushes; `tickets` those of its own lookups in training
    validated  its evaluations between epochs
    """

    weights: list[Float32]
    state: list[Float32]
    finished: Finished
    test: Metrics | None
    intervals: list[Metrics]
    counters: dict[str, int]
    pushed: int
    tickets: list[int]
    validated: list[Evaluated]


def make_config(in_flight: int = 1, epochs: int = 1, batch_size: int = 8, model: str = "dnn", **knobs: Any) -> Config:
    """Of a small run; `knobs` are the trainer's. A model of this file is named as ":name"."""
    given = {"learning_rate": 0.02, "feed_threads": in_flight, "tensorflow_threads": 1, **knobs}
    return Config(
        model=f"{__name__}{model}" if model.startswith(":") else model, epochs=epochs, seed=3, data=Data(batch_size=batch_size),
        net=Net(hidden=(6, 4)), trainer=TrainerKnobs(in_flight=in_flight, **given), status=Status(print_interval=5, interval_s=1e6),
    )  # fmt: skip


class Stream(Iterator[Batch]):
    """Batches of a list, with a trouble."""

    def __init__(self, batches: Sequence[Batch], first: int, trouble: tuple[int, Callable[[], None]] | None) -> None:
        self._rest, self._at, self._trouble, self._closed = iter(batches), first, trouble, False

    def __next__(self) -> Batch:
        if self._trouble is not None and self._at == self._trouble[0]:
            self._trouble[1]()
        if self._closed:
            raise StoppedError("reading samples: the stream was closed")
        self._at += 1
        return next(self._rest)

    def close(self) -> None:
        """See BatchStream."""
        self._closed = True
        _here["go_on"].set()


_here: dict[str, Any] = {}  # what a call finds of another that runs in the same member


def train(task: Task) -> Outcome:
    """Run a trainer, as the trainer's role does."""
    status, tickets = RunStatus(), []
    events: list[Event] = []
    max_lens = [slot.max_len if slot.pooling == "none" else 0 for slot in SLOTS]
    labels = ("label", *task.config.data.extra_labels)
    spec = ModelSpec.of(
        [s.name for s in SLOTS], [s.dim for s in SLOTS], DENSE_WIDTH, None, max_lens, net=task.config.net, labels=labels
    )  # fmt: skip
    firsts = np.cumsum([0, *map(len, task.epochs)]).tolist()
    stop = _here["stop"] = threading.Event()
    group = _here["group"] = Group(task.peers, task.number, task.timeout_s) if task.peers else None
    together = group is not None and task.config.trainer.in_flight == 1
    with ExitStack() as opened:
        remotes: list[RemoteShard] = []
        _here["remotes"] = remotes
        for k, address in enumerate(task.addresses):
            of_shard = signature(task.placement, k)
            remote = RemoteShard(address, k, RUN, of_shard, PLAIN, max_message_bytes=MAX_BYTES, timeout_s=task.timeout_s)
            remotes.append(opened.enter_context(closing(remote)))
        shards = opened.enter_context(closing(PsClient(remotes, task.placement, SLOTS, status)))

        def lookup(ticket: int, batch: Batch, training: bool) -> Float32:
            if training:
                tickets.append(ticket)
            return shards.lookup(batch_id(task.number, ticket), batch, training)

        around = Surroundings(
            train=lambda epoch: Stream(task.epochs[epoch], firsts[epoch], task.trouble),
            test=None if task.test is None else lambda: Stream(task.test or [], 0, None),
            valid=None if task.valid is None else lambda: Stream(task.valid or [], 0, None),
            lookup=lookup, push=lambda ticket, gradient, scale: shards.push(batch_id(task.number, ticket), gradient, scale),
            emit=events.append, status=status, stop=stop, group=group,
            attend=lambda ticket: shards.attend(batch_id(task.number, ticket)) if together else None,
            give_up=lambda ticket: shards.forget(batch_id(task.number, ticket)) if together else None,
        )  # fmt: skip
        trainer = Trainer(spec, task.config, around)
        trained = trainer.run()
    return _outcome(trained, events, status, sorted(tickets))


def _outcome(trained: Trained, events: Sequence[Event], status: RunStatus, tickets: list[int]) -> Outcome:
    summaries = status.summaries()
    return Outcome(
        [np.array(v) for v in trained.model.trainable_variables],
        [np.array(v) for v in trained.model.non_trainable_variables if v.dtype.startswith("float")],
        trained.finished, trained.test, [event.metrics for event in events if isinstance(event, Interval)],
        dict(status.counters()), summaries["PushGrad"].count if "PushGrad" in summaries else 0, tickets,
        [event for event in events if isinstance(event, Evaluated) and event.data == "valid"],
    )  # fmt: skip


def abort() -> None:
    """Free this member's trainer, as the cluster does when another role has failed."""
    stop()
    for remote in _here.get("remotes", []):
        remote.close()
    if _here.get("group") is not None:
        _here["group"].abort()


def stop() -> None:
    """Ask this member's trainer to stop."""
    if "stop" in _here:
        _here["stop"].set()


def fail() -> None:
    """A trouble: a bad file."""
    raise OSError("the disk is on fire")


def hold() -> None:
    """A trouble: a slow hub. Says that it is there, and waits until the test, or the end of the stream, lets it go on."""
    _here["reached"].set()
    assert _here["go_on"].wait(LONG_S)


# --- members --------------------------------------------------------------------------------------------------------------


class Member:
    """A process that does what it is told, each call on a thread of its own.

    reached, go_on   where a call waits, and what lets it go on
    """

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.reached, self.go_on = spawn.Event(), spawn.Event()
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, self.reached, self.go_on), daemon=True)
        self._process.start()
        theirs.close()
        self._calls = 0
        self._answers: dict[int, tuple[Any, BaseException | None]] = {}
        self._unanswered: set[int] = set()

    def start(self, function: Callable[..., Any], *arguments: Any) -> int:
        """Begin a call; its number."""
        self._calls += 1
        self._unanswered.add(self._calls)
        self._pipe.send((self._calls, function, arguments))
        return self._calls

    def result(self, call: int, timeout_s: float = LONG_S) -> Any:
        """What the call returned. Raises what it raised, and TimeoutError."""
        while call not in self._answers:
            if not self._pipe.poll(timeout_s):
                raise TimeoutError(f"the member has not answered within {timeout_s:g} s")
            number, *answer = self._pipe.recv()
            self._unanswered.remove(number)
            self._answers[number] = tuple(answer)
        returned, error = self._answers.pop(call)
        if error is not None:
            raise error
        return returned

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call and wait."""
        return self.result(self.start(function, *arguments))

    def kill(self) -> None:
        """As the kernel does when memory runs out."""
        self._process.kill()
        self._process.join(LONG_S)

    @property
    def is_idle(self) -> bool:
        """Whether it is there, and all of its calls have ended, or do so now that they are freed."""
        if not self._process.is_alive():  # nobody may touch an event that somebody waited for who was killed
            return False
        self.go_on.set()
        try:
            if self._unanswered:
                self.start(abort)
            for call in sorted(self._unanswered):
                with suppress(Exception):
                    self.result(call, SOON_S / 4)
        except OSError:  # it has just ended
            return False
        self.reached.clear()
        self.go_on.clear()
        return not self._unanswered

    def close(self) -> None:
        """End the process; one that cannot end by itself is an error, unless it was killed."""
        idle = self.is_idle
        if idle:
            self._pipe.send(None)
            self._process.join(LONG_S)
        ended = self._process.exitcode
        self.kill()
        self._pipe.close()
        self._process.close()
        assert not idle or ended == 0, f"a member has ended with {ended}"


def _serve(pipe: Connection, reached: Any, go_on: Any) -> None:
    _here.update(reached=reached, go_on=go_on)
    sending = threading.Lock()

    def answer(number: int, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        try:
            found: tuple[Any, BaseException | None] = function(*arguments), None
        except BaseException as error:
            error.add_note("".join(traceback.format_exception(error)))
            # What was being handled may be an error that cannot be sent.
            error.__cause__ = error.__context__ = None
            found = None, error
        with sending:
            pipe.send((number, *found))

    threads = []
    while (call := pipe.recv()) is not None:
        threads.append(threading.Thread(target=answer, args=call))
        threads[-1].start()
    for thread in threads:
        thread.join()


class Members:
    """Several members; `renewed` gives them to a test."""

    def __init__(self, count: int) -> None:
        self._members = [Member() for _ in range(count)]

    def renewed(self) -> list[Member]:
        """The members, new ones in place of those that an earlier test has killed, or that still do what it asked for."""
        for k, member in enumerate(self._members):
            if not member.is_idle:
                self._members[k] = Member()
                member.close()
        return self._members

    def close(self) -> None:
        """End all."""
        for port in _given:
            let_go(port)
        with ExitStack() as opened:
            for member in self._members:
                opened.callback(member.close)


def peers_of(count: int, host: str = HOST) -> tuple[str, ...]:
    """Where so many trainers may meet."""
    ports = [hold_port() for _ in range(count)]
    _given.extend(ports)
    return tuple(f"{host}:{port}" for port in ports)


def tasks(
    shards: Shards, config: Config, epochs: Sequence[list[list[Batch]]], test: Sequence[list[Batch]] | None = None,
    timeout_s: float = LONG_S, troubles: dict[int, tuple[int, Callable[[], None]]] | None = None,
) -> list[Task]:  # fmt: skip
    """Of a group: [trainer][epoch][step] and [trainer][step]."""
    peers = peers_of(len(epochs))
    return [
        Task(
            config, shards.placement, shards.addresses, list(of), None if test is None else test[n], n, peers, timeout_s,
            (troubles or {}).get(n),
        )
        for n, of in enumerate(epochs)
    ]  # fmt: skip


def start_all(members: Sequence[Member], of: Sequence[Task]) -> list[int]:
    """Begin to train; each one's call."""
    return [member.start(train, task) for member, task in zip(members, of, strict=True)]


def all_results(members: Sequence[Member], calls: Sequence[int], timeout_s: float = LONG_S) -> list[Outcome]:
    """What they come to."""
    return [member.result(call, timeout_s) for member, call in zip(members, calls, strict=True)]


def error_of(member: Member, call: int, timeout_s: float = SOON_S) -> Exception:
    """What the call has raised, soon."""
    try:
        found = member.result(call, timeout_s)
    except TimeoutError:
        raise
    except Exception as error:
        return error
    raise AssertionError(f"no error, but {found}")

"""`python -m bench.rpc [--rounds N] [--calls N] [--json FILE]`: lookups and pushes from process to process, beside a bare echo.

A server process with shards, a client process, gRPC on loopback between them. Each case in blocks, every round in another order:

    echo      grpcio's own: the bytes of the same request, and a reply of the same size that lies ready; nothing reads them
    flowps    RemoteShard → ShardServer → Shard
    protobuf  the same, its arrays put into and taken out of the messages by protobuf (see `flowps.ps.wire.frame`)
    local     the shard's own part of it, called in the server process

Cases: 64 kB of signs for 1.7 MB of embeddings, and half a batch of `dsp_ctr` and of `criteo`, which is what one of two shards gets.
All signs are known. On the wire float32 or float16. All of that twice, in processes of their own: as shipped, and without
`keep_memory`; both with the environment that Dask's nanny gives its workers, which has malloc give memory back.

Milliseconds of single calls: median, 10th and 90th percentile, wall clock; the CPU time, medians, of both processes whole, the
threads of gRPC included; and their page faults, means: malloc gave memory back and took it anew. A ratio is one of medians, its
least and most those of single rounds. Machines are shared: compare within a run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from bench import machine, workload
from flowps.batch import Float32
from flowps.config import Slot
from flowps.ps.endpoint import LocalEndpoint
from flowps.ps.memory import aligned_empty
from flowps.ps.parcel import Lines, Parcel
from flowps.ps.shard import Shard
from flowps.ps.wire import flowps_pb2 as pb
from flowps.ps.wire import frame, message, remote, service
from flowps.ps.wire.protocol import options
from flowps.ps.wire.remote import RemoteShard
from flowps.ps.wire.security import Security
from flowps.ps.wire.service import Served, ShardServer

CONTENDERS = ("echo", "flowps", "protobuf", "local")
OPERATIONS = ("lookup", "push")
TARGET = 1.3  # × the echo, for a lookup of the first case with float32
_HOST, _RUN, _SECURITY = "127.0.0.1", "bench", Security("", "", "", "", "bench", insecure=False)
_MAX_BYTES, _IN_FLIGHT, _THREADS = 1 << 28, 4, 8
_BATCHES, _WARM_UP = 8, 2  # of a case; calls of a block that are not counted
_NANNY = {"MALLOC_TRIM_THRESHOLD_": "65536"}  # distributed.nanny.pre-spawn-environ
_STARTED_S, _BLOCK_S, _ENDED_S = 120, 300, 30

Block = dict[str, NDArray[np.float64]]
"""Of each operation, [call, (wall, client's CPU, server's CPU, page faults of both)], in seconds."""


@dataclass(frozen=True)
class Case:
    """What a shard is asked.

    shape   its slots and the samples of a batch
    signs   that a batch has, bags left empty by chance; 0: as many as the shape draws
    run     slots that are neighbours in the trainer's batch
    """

    name: str
    shape: workload.Shape
    signs: int = 0
    run: int = 2
    dim: int = 16

    @property
    def width(self) -> int:
        """Floats of a line."""
        return self.shape.num_slots * self.dim

    @property
    def signature(self) -> list[tuple[str, int, int, int]]:
        """As client and server must agree on."""
        return [(f"s{k}", self.dim, 0, 1) for k in range(self.shape.num_slots)]


def half(name: str) -> workload.Shape:
    """Half the slots of a workload, with about half its signs."""
    whole = workload.shape_of(name, 0)
    order = np.argsort(-np.array(whole.mean_signs), kind="stable")
    mine = sorted(int(slot) for place, slot in enumerate(order) if place % 4 in (0, 3))
    return workload.Shape(
        whole.size, tuple(whole.cardinalities[slot] for slot in mine), tuple(whole.mean_signs[slot] for slot in mine),
        whole.zipf_exponent,
    )  # fmt: skip


def cases() -> list[Case]:
    """Those that are reported. That of the target comes first."""
    small = workload.Shape(1024, (100_001,) * 26, (1.0,) * 26, 1.05)
    halves = [Case(f"half of {name}", half(name)) for name in ("dsp_ctr", "criteo")]
    return [Case("64 kB of signs", small, signs=8192, run=26), *halves]


def parcels(case: Case) -> list[Parcel]:
    """Batches of a case as a client sends them, the same each time."""
    shape, random = case.shape, np.random.default_rng(1)
    found = []
    for batch in itertools.islice(workload.draw(shape), _BATCHES):
        lengths, kept = np.diff(batch.offsets), np.ones(len(batch.signs), bool)
        if case.signs:
            kept = random.permutation(len(kept)) < case.signs
            lengths = np.add.reduceat(kept, batch.offsets[:-1], dtype=np.int32)
        signs, bounds = batch.signs[kept], np.concatenate([[0], np.cumsum(lengths.reshape(shape.num_slots, -1).sum(axis=1))])
        starts = range(0, shape.num_slots, case.run)
        ends = [min(start + case.run, shape.num_slots) for start in starts]
        found.append(
            Parcel(
                shape.size,
                [signs[bounds[start] : bounds[end]] for start, end in zip(starts, ends, strict=True)],
                [lengths[start * shape.size : end * shape.size] for start, end in zip(starts, ends, strict=True)],
            )
        )
    return found


def gradient_of(case: Case) -> Float32:
    """What is pushed; small, so that rows stay as they are."""
    grads = aligned_empty((case.shape.size, case.width))
    grads[:] = 1e-4 * np.random.default_rng(2).standard_normal(grads.shape, np.float32)
    return grads


class _PlainWriting:
    """As `frame.Writing`, the array put into the message."""

    def __init__(self, small: Message, size_bytes: int) -> None:
        self._message, self._array = small, aligned_empty((1, size_bytes // 4)).reshape(-1)

    def array(self, kind: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
        return self._array.view(kind).reshape(shape)

    def finish(self) -> bytes:
        return _plain_write(self._message, [self._array])


def _plain_write(small: Message, pieces: Sequence[NDArray[Any]]) -> bytes:
    field = small.DESCRIPTOR.fields_by_number[frame.ARRAY_FIELD].name
    setattr(small, field, b"".join(np.ascontiguousarray(piece).data for piece in pieces))
    data: bytes = small.SerializeToString()
    return data


def _plain_parse(data: bytes, found: Message) -> memoryview:
    found.ParseFromString(data)
    field = found.DESCRIPTOR.fields_by_number.get(frame.ARRAY_FIELD)
    return memoryview(b"" if field is None else getattr(found, field.name))


_parse = message.parse
_PLAIN = SimpleNamespace(Writing=_PlainWriting, write=_plain_write, array_of=frame.array_of)


def _keep_no_memory() -> None:
    """Have this process's servers and clients leave malloc as it is."""
    for module in (remote, service):
        setattr(module, "keep_memory", lambda: None)  # noqa: B010  mypy knows that it is imported there


def _cpu_clock(pid: int) -> int:
    """The clock of a process's CPU time, as Linux numbers them (clock_getcpuclockid)."""
    return ~pid << 3 | 2


def _page_faults(pid: int) -> int:
    """Of a process so far, those that read no disk (proc_pid_stat(5))."""
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[7])


class _Clock:
    """Times lookups and the pushes after them. `pids`: of the client, and of the server if it is not the same; `first`: a batch."""

    def __init__(self, pids: Sequence[int], first: int) -> None:
        self._pids, self._next = pids, first
        self._clocks = [_cpu_clock(pid) for pid in pids]

    def block(self, calls: int, lookup: Callable[[int], object], push: Callable[[int], object]) -> Block:
        """Call both, by turns, with the numbers of batches."""
        found = np.zeros((len(OPERATIONS), calls + _WARM_UP, 4))
        for n in range(calls + _WARM_UP):
            for k, call in enumerate((lookup, push)):
                faults = sum(map(_page_faults, self._pids))
                before = [time.clock_gettime(clock) for clock in self._clocks]
                begin = time.perf_counter()
                call(self._next)
                found[k, n, 0] = time.perf_counter() - begin
                for side, clock in enumerate(self._clocks):
                    found[k, n, 1 + side] = time.clock_gettime(clock) - before[side]
                found[k, n, 3] = sum(map(_page_faults, self._pids)) - faults
            self._next += 1
        return {name: found[k, _WARM_UP:] for k, name in enumerate(OPERATIONS)}


def _path(case: Case, narrow: bool, operation: str) -> str:
    return f"/bench.Echo/{case.name.replace(' ', '-')}-{narrow}-{operation}"


class _Role:
    """What a process is. `introduction`: what the other one must know of it."""

    introduction: list[str]

    def use(self, plain: bool) -> None:
        """Have protobuf do the arrays of this process's messages from now on, or flowps."""
        for name, value in (("frame", _PLAIN if plain else frame), ("parse", _plain_parse if plain else _parse)):
            setattr(message, name, value)


class _Server(_Role):
    """A shard and a server for each case, and an echo for all. Its introduction: where each of them is, the echo last."""

    def __init__(self, of: Sequence[Case], opened: ExitStack) -> None:
        self.introduction = []
        self._local: dict[Case, tuple[LocalEndpoint, list[Parcel], Float32]] = {}
        self._clock = _Clock([os.getpid()], 1 << 40)
        replies: dict[str, bytes] = {}
        for case in of:
            slots = [Slot(name=name, dim=case.dim) for name, *_ in case.signature]
            shard = opened.enter_context(closing(Shard(slots, case.shape.cardinalities, 7, _IN_FLIGHT)))
            endpoint = LocalEndpoint(shard, [slot.width for slot in slots])
            served = Served(_RUN, 0, case.signature, _MAX_BYTES)
            server = opened.enter_context(closing(ShardServer(endpoint, served, _SECURITY, _HOST, 0, _IN_FLIGHT)))
            self.introduction.append(server.address)
            joined = [Parcel(p.size, [np.concatenate(p.signs)], [np.concatenate(p.lengths)]) for p in parcels(case)]
            grads = gradient_of(case)
            self._local[case] = endpoint, joined, grads
            for narrow in (False, True):
                replies[_path(case, narrow, "lookup")] = _reply(grads, narrow)
                replies[_path(case, narrow, "push")] = _push_reply(joined[0])
        echo = grpc.server(ThreadPoolExecutor(_THREADS), options=options(_MAX_BYTES, so_reuseport=0))
        echo.add_generic_rpc_handlers((_Echo(replies),))
        self.introduction.append(f"{_HOST}:{echo.add_insecure_port(f'{_HOST}:0')}")
        echo.start()
        opened.callback(lambda: echo.stop(None).wait())

    def local(self, case: Case, calls: int) -> Block:
        """The shard's part of lookups and pushes, all in this process."""
        endpoint, batches, grads = self._local[case]
        out = aligned_empty((case.shape.size, case.width))
        return self._clock.block(
            calls,
            lambda n: endpoint.lookup(n, batches[n % len(batches)], True, out),
            lambda n: endpoint.push(n, Lines(grads), 1.0),
        )


def _reply(values: Float32, narrow: bool) -> bytes:
    """A lookup's reply with some embeddings."""

    def put(out: Float32 | None) -> Float32:
        if out is None:
            return values
        out[:] = values
        return out

    return message.write_reply(put, (len(values), values.shape[1]), narrow)


def _push_reply(batch: Parcel) -> bytes:
    """One as long as a shard's."""
    reply: bytes = pb.PushReply(rows=sum(map(len, batch.signs))).SerializeToString()
    return reply


class _Echo(grpc.GenericRpcHandler):
    """Answers with what lies ready."""

    def __init__(self, replies: dict[str, bytes]) -> None:
        self._handlers = {
            path: grpc.unary_unary_rpc_method_handler(lambda data, context, reply=reply: reply) for path, reply in replies.items()
        }

    def service(self, details: Any) -> Any:
        return self._handlers.get(details.method)


class _Client(_Role):
    """Calls them."""

    def __init__(self, of: Sequence[Case], addresses: Sequence[str], server_pid: int, opened: ExitStack) -> None:
        self.introduction = []
        self._clock = _Clock([os.getpid(), server_pid], 0)
        self._echo = opened.enter_context(grpc.insecure_channel(addresses[-1], options(_MAX_BYTES, use_local_subchannel_pool=1)))
        self._of: dict[Case, tuple[list[Parcel], Float32]] = {case: (parcels(case), gradient_of(case)) for case in of}
        self._remotes: dict[tuple[Case, bool], RemoteShard] = {}
        for case, address in zip(of, addresses, strict=False):
            for narrow in (False, True):
                made = RemoteShard(address, 0, _RUN, case.signature, _SECURITY, half=narrow, max_message_bytes=_MAX_BYTES)
                opened.callback(made.close)
                made.connect(_STARTED_S)
                self._remotes[case, narrow] = made

    def sizes(self, case: Case, narrow: bool) -> dict[str, float]:
        """Bytes of the array there and back and so on, of an average batch."""
        batches, grads = self._of[case]
        requests = [message.write_lookup(_RUN, n, parcel, True, narrow) for n, parcel in enumerate(batches)]
        return {
            "size": case.shape.size,
            "slots": case.shape.num_slots,
            "signs": float(np.mean([sum(map(len, parcel.signs)) for parcel in batches])),
            "lookup_request_bytes": float(np.mean([len(request) for request in requests])),
            "lookup_reply_bytes": len(_reply(grads, narrow)),
            "push_request_bytes": len(message.write_push(_RUN, 0, Lines(grads), 1.0, narrow)),
            "push_reply_bytes": len(_push_reply(batches[0])),
        }

    def echo(self, case: Case, narrow: bool, calls: int) -> Block:
        """A block of echoes."""
        batches, grads = self._of[case]
        lookups = [message.write_lookup(_RUN, n, parcel, True, narrow) for n, parcel in enumerate(batches)]
        push = message.write_push(_RUN, 0, Lines(grads), 1.0, narrow)
        ask = {name: self._echo.unary_unary(_path(case, narrow, name)) for name in OPERATIONS}
        return self._clock.block(calls, lambda n: ask["lookup"](lookups[n % len(lookups)]), lambda n: ask["push"](push))

    def remote(self, case: Case, narrow: bool, calls: int) -> Block:
        """A block of flowps's calls."""
        batches, grads = self._of[case]
        shard = self._remotes[case, narrow]
        return self._clock.block(
            calls,
            lambda n: shard.lookup(n, batches[n % len(batches)], True),
            lambda n: shard.push(n, Lines(grads), 1.0),
        )


def _work(pipe: Connection, make: Callable[[ExitStack], _Role], keep: bool) -> None:
    """A process's life: make what it is, then do what comes through the pipe, until that is closed."""
    if not keep:
        _keep_no_memory()
    with ExitStack() as opened, suppress(EOFError):
        made = make(opened)
        pipe.send(made.introduction)
        while True:
            method, arguments = pipe.recv()
            pipe.send(getattr(made, method)(*arguments))


class _Process:
    """A process that does what it is asked."""

    def __init__(self, make: Callable[[ExitStack], _Role], keep: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_work, args=(far, make, keep), daemon=True)
        before = {name: os.environ.get(name) for name in _NANNY}
        os.environ.update(_NANNY)  # malloc looks when a process begins
        try:
            self._process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        far.close()
        self.pid = self._process.pid or 0
        self.introduction = self._answer(_STARTED_S)

    def ask(self, method: str, *arguments: object) -> Any:
        """Call a method there."""
        self._pipe.send((method, arguments))
        return self._answer(_BLOCK_S)

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.join(_ENDED_S)
        self._process.kill()
        self._process.join()

    def _answer(self, timeout_s: float) -> Any:
        try:
            if self._pipe.poll(timeout_s):
                return self._pipe.recv()
            said = f"said nothing within {timeout_s} s"
        except EOFError:
            said = "has ended"
        self.close()
        raise SystemExit(f"bench.rpc: a process {said}; see above")


class Pair:
    """A server process and a client process of some cases; `keep`: as shipped, otherwise without `keep_memory`."""

    def __init__(self, of: Sequence[Case], keep: bool) -> None:
        with ExitStack() as opened:
            self._server = opened.enter_context(closing(_Process(partial(_Server, of), keep)))
            make = partial(_Client, of, self._server.introduction, self._server.pid)
            self._client = opened.enter_context(closing(_Process(make, keep)))
            self._opened = opened.pop_all()

    def block(self, contender: str, case: Case, narrow: bool, calls: int) -> Block:
        """Some calls of one contender, one after the other."""
        for process in (self._server, self._client):
            process.ask("use", contender == "protobuf")
        if contender == "local":
            return self._server.ask("local", case, calls)
        return self._client.ask("echo" if contender == "echo" else "remote", case, narrow, calls)

    def sizes(self, case: Case, narrow: bool) -> dict[str, float]:
        """What an average batch has, and the bytes of its messages."""
        self._client.ask("use", False)
        return self._client.ask("sizes", case, narrow)

    def close(self) -> None:
        """End both processes."""
        self._opened.close()


@dataclass(frozen=True)
class Key:
    """What a block is of."""

    keep: bool
    case: Case
    narrow: bool
    contender: str


def collect(keys: Sequence[Key], pairs: Mapping[bool, Pair], rounds: int, calls: int) -> dict[Key, list[Block]]:
    """A block of each key in every round, in another order each time. Each key once before that: kernels, rows, connections."""
    random, found = np.random.default_rng(0), {key: list[Block]() for key in keys}
    for turn in range(-1, rounds):
        for k in random.permutation(len(keys)):
            key = keys[k]
            block = pairs[key.keep].block(key.contender, key.case, key.narrow, calls if turn >= 0 else _BATCHES)
            if turn >= 0:
                found[key].append(block)
    return found


def run(of: Sequence[Case], rounds: int, calls: int) -> dict[str, Any]:
    """Measure, and say what was found."""
    wires = {"float32": False, "float16": True}
    keys = [
        Key(keep, case, narrow, contender)
        for keep, case, narrow, contender in itertools.product((True, False), of, wires.values(), CONTENDERS)
        # The shard knows nothing of the wire, and what protobuf costs is shown once.
        if not narrow or contender in ("echo", "flowps")
    ]
    with ExitStack() as opened:
        pairs = {keep: opened.enter_context(closing(Pair(of, keep))) for keep in (True, False)}
        found = collect(keys, pairs, rounds, calls)
        sizes = {(case, wire): pairs[True].sizes(case, narrow) for case, (wire, narrow) in itertools.product(of, wires.items())}
    results = []
    for keep, case, (wire, narrow), operation in itertools.product((True, False), of, wires.items(), OPERATIONS):
        of_contender = {
            contender: [block[operation] for block in found[key]]
            for contender in CONTENDERS
            if (key := Key(keep, case, narrow and contender != "local", contender)) in found
        }
        size = sizes[case, wire]
        results.append(
            {
                "case": case.name, "operation": operation, "wire": wire, "keep_memory": keep,
                **{name: size[name] for name in ("size", "slots", "signs")},
                "request_bytes": size[f"{operation}_request_bytes"],
                "reply_bytes": size[f"{operation}_reply_bytes"],
                **compared(of_contender),
            }
        )  # fmt: skip
    first = next(r for r in results if (r["operation"], r["wire"]) == ("lookup", "float32"))
    return {
        "rounds": rounds,
        "calls": calls,
        "results": results,
        "target": {"case": first["case"], "operation": "lookup", "ratio_at_most": TARGET, "ratio": first["ratio"]},
        "versions": {name: version(name) for name in ("grpcio", "protobuf")},
        "machine": machine.describe(),
    }


def compared(of_contender: Mapping[str, Sequence[NDArray[np.float64]]]) -> dict[str, Any]:
    """The figures of each contender, and what they are to each other. The blocks are those of one operation, see `Block`."""
    figures: dict[str, Any] = {}
    for name, blocks in of_contender.items():
        wall, client, server, faults = np.concatenate(blocks).T
        p10, median, p90 = (float(q) * 1e3 for q in np.quantile(wall, (0.1, 0.5, 0.9)))
        cpu = {"cpu_ms": client + server, "client_cpu_ms": client, "server_cpu_ms": server}
        figures[name] = {
            "ms": median, "ms_p10": p10, "ms_p90": p90,
            **{key: float(np.median(seconds)) * 1e3 for key, seconds in cpu.items()},
            "page_faults": float(faults.mean()),
        }  # fmt: skip
    echo, flowps, local = (figures[name]["ms"] for name in ("echo", "flowps", "local"))
    each = [
        float(np.median(ours[:, 0]) / np.median(echoed[:, 0]))
        for ours, echoed in zip(of_contender["flowps"], of_contender["echo"], strict=True)
    ]
    return {
        **figures,
        "without_shard_ms": flowps - local,
        "ratio": flowps / echo,
        "ratio_least": min(each),
        "ratio_most": max(each),
        "ratio_without_shard": (flowps - local) / echo,
    }


def markdown(result: dict[str, Any]) -> str:
    """The figures as Markdown tables that can be read as they stand."""
    head = ["call", "on the wire", "MB there / back", "echo ms", "flowps ms (10–90 %)", "× echo (least–most)", "of it the shard",
            "× echo without it", "CPU ms of both, echo / flowps"]  # fmt: skip
    shipped = [head]
    for r in (r for r in result["results"] if r["keep_memory"]):
        echo, flowps = r["echo"], r["flowps"]
        shipped.append(
            [
                f"{r['operation']}, {r['case']}", r["wire"], f"{r['request_bytes'] / 1e6:.2f} / {r['reply_bytes'] / 1e6:.2f}",
                f"{echo['ms']:.2f}", f"{flowps['ms']:.2f} ({flowps['ms_p10']:.2f}–{flowps['ms_p90']:.2f})",
                f"{r['ratio']:.2f} ({r['ratio_least']:.2f}–{r['ratio_most']:.2f})", f"{r['local']['ms']:.2f}",
                f"{r['ratio_without_shard']:.2f}", f"{echo['cpu_ms']:.2f} / {flowps['cpu_ms']:.2f}",
            ]
        )  # fmt: skip
    others = [["call, float32", "ms, CPU ms, page faults: flowps", "arrays by protobuf", "without `keep_memory`", "both"]]
    for on in (r for r in result["results"] if r["keep_memory"] and r["wire"] == "float32"):
        off = next(
            r for r in result["results"]
            if not r["keep_memory"] and all(r[name] == on[name] for name in ("case", "operation", "wire"))
        )  # fmt: skip
        ways = (on["flowps"], on["protobuf"], off["flowps"], off["protobuf"])
        others.append(
            [
                f"{on['operation']}, {on['case']}",
                *(f"{way['ms']:.2f}, {way['cpu_ms']:.2f}, {way['page_faults']:.0f}" for way in ways),
            ]
        )
    target = result["target"]
    return "\n".join(
        [
            *table(shipped, 2), "", *table(others, 1), "",
            f"Target: the {target['operation']} of {target['case']} takes at most {target['ratio_at_most']} × the echo; "
            f"found {target['ratio']:.2f}. {', '.join(f'{name} {found}' for name, found in result['versions'].items())}.",
        ]
    )  # fmt: skip


def table(lines: Sequence[Sequence[str]], words: int) -> list[str]:
    """Markdown; the first `words` columns are no numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * w if k < words else "-" * (w - 1) + ":" for k, w in enumerate(widths)]
    padded = [
        [f"{cell:{'<' if k < words else '>'}{widths[k]}}" for k, cell in enumerate(line)] for line in [lines[0], rule, *lines[1:]]
    ]
    return [f"| {' | '.join(line)} |" for line in padded]


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.rpc", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--calls", type=int, default=16, help="of a block")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    arguments = parser.parse_args()
    result = run(cases(), arguments.rounds, arguments.calls)
    print(markdown(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

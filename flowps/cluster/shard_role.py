"""What runs where a shard is: a Dask actor that creates, serves, saves and reports it.

Lookups and pushes do not come through the actor, which has one thread: a trainer in the same process calls the shard directly, any
other over gRPC.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from flowps.batch import Uint64
from flowps.checkpoint.file import FileEntry
from flowps.checkpoint.manifest import Manifest, ShardPart
from flowps.checkpoint.part import PartWriter, read_section
from flowps.checkpoint.store import Store
from flowps.checkpoint.writing import Writing
from flowps.cluster.plan import Plan
from flowps.cluster.prometheus import drop_shard, serve_shard
from flowps.cluster.role_status import status_of
from flowps.config import Config, Slot
from flowps.errors import FlowpsError, RunDirError
from flowps.ps.endpoint import Endpoint, LocalEndpoint
from flowps.ps.export import export_rows
from flowps.ps.placement import Piece
from flowps.ps.shard import Shard, ShardWork
from flowps.ps.snapshot import Columns, Part, TableState
from flowps.ps.table import TableStats
from flowps.ps.together import Together
from flowps.ps.wire.security import Security
from flowps.ps.wire.service import Served, ShardServer
from flowps.status.figures import ShardFigures, usage_here

# The shards in this process, by run and number. Written by their actors, read by trainers in this process.
_shards: dict[tuple[str, int], Shard | Together] = {}


def shard_here(run_id: str, number: int) -> Shard | Together | None:
    """The shard, if it is in this process."""
    return _shards.get((run_id, number))


@dataclass(frozen=True)
class SaveTask:
    """What a shard is told at a cut.

    url, name   of the folder of checkpoints, and of this one in it
    step        after which the cut is
    since       the step of an earlier cut of this run: only what has changed since then; None: all rows
    copy_bytes  that may wait to be written
    """

    url: str
    name: str
    step: int
    since: int | None
    copy_bytes: int


class ShardActor:
    """Shard `number` of the plan, as a Dask actor."""

    def __init__(self, run_id: str, plan: Plan, number: int) -> None:
        self._run_id, self._plan, self._number = run_id, plan, number
        pieces, trainers = plan.placement.shards[number], plan.config.trainer.count
        self._slots = [_slot(plan, piece) for piece in pieces]
        self._in_flight = plan.config.trainer.in_flight * trainers
        self._shard: Shard | None = Shard(
            self._slots,
            [math.ceil(plan.capacity_rows[piece.slot] / piece.parts) for piece in pieces],
            plan.config.seed,
            self._in_flight,
            plan.config.ps.threads,
            [plan.allocate[piece.slot] for piece in pieces],
            status_of(plan.config, run_id, f"shard-{number}"),
        )
        widths = [slot.width for slot in self._slots]
        # In the synchronous mode a step of all trainers is one step of the rows.
        self._together = Together(LocalEndpoint(self._shard, widths), sum(widths), trainers) if plan.steps_together else None
        self._endpoint: Endpoint = self._together or LocalEndpoint(self._shard, widths)
        self._server: ShardServer | None = None
        self._served_at_s: float | None = None
        self._writing: Writing | None = None
        self._states: list[dict[str, Any]] = []
        _shards[run_id, number] = self._together or self._shard
        serve_shard(run_id, number, self.figures)

    def serve(self, token: str) -> str:
        """Answer lookups and pushes over the network; returns where."""
        cluster, port = self._plan.config.cluster, self._plan.config.ps.port
        served = Served(self._run_id, self._number, signature(self._plan, self._number), cluster.max_message_mib << 20)
        host = self._plan.assignment.shards[self._number].host
        if self._shard is None:
            raise FlowpsError("the shard was closed: it cannot be served")
        try:
            self._server = ShardServer(
                self._endpoint,
                served,
                security_of(self._plan.config, token),
                host,
                port and port + self._number,
                self._in_flight,
                self._shard.status,
            )
        except FlowpsError as error:
            raise alone(error) from None
        if self._plan.assignment.has_process(self._number):
            self._served_at_s = time.process_time()
        return self._server.address

    def export(self, folder: str) -> dict[str, int]:
        """Write the shard's rows as Parquet, a file per slot or part of one, and return their number by slot."""
        if self._shard is None:
            raise FlowpsError("the shard was closed: its rows are gone")
        pieces = self._plan.placement.shards[self._number]
        own = {_slot(self._plan, piece): self._plan.schema.slots[piece.slot] for piece in pieces}
        parts = {
            self._plan.schema.slots[p.slot].name: f".part-{p.part + 1}-of-{p.parts}" for p in pieces if p.parts > 1
        }  # fmt: skip
        rows = (replace(chunk, slot=own[chunk.slot]) for chunk in self._shard.rows())
        try:
            return export_rows(rows, Path(folder), parts)
        except OSError as error:
            raise RunDirError(f"{folder}: the rows cannot be written: {error.strerror or error}") from None

    def save(self, task: SaveTask) -> None:
        """Copy the rows as they are, with nothing in flight, and write them beside training; returns when they are copied.

        `saved` has the files, or what went wrong.
        """
        if self._shard is None:
            raise FlowpsError("the shard was closed: its rows are gone")
        if self._writing is not None:
            self._writing.abort(FlowpsError("given up for a later checkpoint"))
        writing = Writing(PartWriter(Store(task.url), f"{task.name}/shard-{self._number}"), task.copy_bytes)
        self._writing, self._states = writing, msgspec.to_builtins(self._shard.states())
        try:
            for chunk in self._shard.snapshot(task.step, task.since):
                writing.put(_section(chunk.table, chunk.section), chunk.columns)
        except Exception as error:  # `saved` raises it: the other shards are to be heard too
            writing.abort(error)
        writing.finish()

    def saved(self) -> ShardPart | None:
        """What `save` has written; None while it writes. Raises what went wrong."""
        if self._writing is None or not self._writing.done:
            return None
        writing, self._writing = self._writing, None
        try:
            files = writing.result()
        except Exception as error:
            raise alone(error) from None
        slots = self._plan.schema.slots
        return ShardPart(
            [(slots[p.slot].name, p.part, p.parts) for p in self._plan.placement.shards[self._number]], self._states, files
        )

    def restore(self, url: str, chain: Sequence[Manifest], taken: Sequence[str] | None) -> int:
        """Take what the checkpoint chain[-1] has of this shard's rows; chain[0] is a full one, deltas follow. Returns the rows.

        taken   only the rows of these slots; None: of all
        """
        if self._shard is None:
            raise FlowpsError("the shard was closed: its rows are gone")
        store, last = Store(url), chain[-1]
        slots = self._plan.schema.slots
        own = [(slots[p.slot].name, p.part, p.parts) for p in self._plan.placement.shards[self._number]]
        same = [k for k, part in enumerate(last.shards) if [tuple(piece) for piece in part.pieces] == own]
        names = {name for name, _, _ in own}
        others = [k for k, part in enumerate(last.shards) if names & {name for name, _, _ in part.pieces}]
        parts = [
            Part(
                [_only(msgspec.convert(state, TableState), taken) for state in last.shards[k].states],
                [_sections(store, manifest.shards[k].files) for manifest in chain],
            )
            for k in same or others
        ]
        try:
            self._shard.restore(parts, self._keeps)
        except Exception as error:
            raise alone(error) from None
        return self._shard.num_rows

    def _keeps(self, slot: str, signs: Uint64) -> NDArray[np.bool_]:
        """Which of a slot's signs live here."""
        slots = self._plan.schema.slots
        piece = next((p for p in self._plan.placement.shards[self._number] if slots[p.slot].name == slot), None)
        if piece is None:
            return np.zeros(len(signs), bool)
        half = np.uint64(32)
        found: NDArray[np.bool_] = (((signs >> half) * np.uint64(piece.parts)) >> half) == np.uint64(piece.part)
        return found

    def figures(self) -> ShardFigures:
        """What the shard measures of itself."""
        if self._shard is None:
            raise FlowpsError("the shard was closed: its rows are gone")
        stats, work, traffic = self._shard.stats(), self._shard.work(), self._shard.traffic()
        return ShardFigures(
            self._number, "", usage_here().process, self._shard.status.summaries(), work.rows,
            sum(table.capacity_rows for table in stats), work.bytes, max((table.index_load for table in stats), default=0.0),
            sum(table.inserted for table in stats), sum(table.evicted for table in stats), sum(table.expired for table in stats),
            sum(table.refused for table in stats), traffic.in_flight, traffic.staleness, traffic.signs, traffic.hot,
        )  # fmt: skip

    def stats(self) -> list[TableStats]:
        """What each table has done and holds."""
        return [] if self._shard is None else self._shard.stats()

    def work(self) -> ShardWork:
        """What was done so far. Of a shard that has a process to itself, `busy_s` is the CPU time of it, the way there included."""
        if self._shard is None:
            return ShardWork(0, 0.0, 0, 0)
        work = self._shard.work()
        return work if self._served_at_s is None else replace(work, busy_s=time.process_time() - self._served_at_s)

    def __del__(self) -> None:
        """Dask drops the actor when the command that has started it is gone."""
        with suppress(Exception):
            self.close()

    def release(self) -> None:
        """A role has failed: no trainer waits here for another any longer."""
        if self._together is not None:
            self._together.close()

    def close(self) -> None:
        """Stop serving, and give the memory back."""
        drop_shard(self._run_id, self._number)
        if self._writing is not None:
            self._writing.abort(FlowpsError("the shard was closed while it was being saved"))
        if self._together is not None:
            self._together.close()
        if self._server is not None:
            self._server.close()
        if self._shard is not None:
            self._shard.close()
        self._shard = self._server = None
        _shards.pop((self._run_id, self._number), None)


def _only(state: TableState, taken: Sequence[str] | None) -> TableState:
    """With other names for slots whose rows are not taken: no slot here has them."""
    if taken is None:
        return state
    return msgspec.structs.replace(state, slots=[name if name in taken else f"{name}\0" for name in state.slots])


def _section(table: int, name: str) -> str:
    return f"table-{table}.{name}"


def _sections(store: Store, files: Sequence[FileEntry]) -> Callable[[int, str], Iterator[Columns]]:
    """The sections of one shard's part of a checkpoint; one that it does not have is empty."""
    of_section = {file.section: file for file in files}

    def section(table: int, name: str) -> Iterator[Columns]:
        file = of_section.get(_section(table, name))
        return iter(()) if file is None else read_section(store, file)

    return section


def alone(error: Exception) -> Exception:
    """The error without those that it came of: Dask sends them along, and some, like gRPC's, cannot be sent."""
    error.__cause__ = error.__context__ = None
    return error


def _slot(plan: Plan, piece: Piece) -> Slot:
    """A slot as its shard has it: a split slot's parts are sums that can be added up, a divisor is in the client's weights."""
    slot = plan.schema.slots[piece.slot]
    return slot if piece.parts == 1 else msgspec.structs.replace(slot, pooling="sum")


def signature(plan: Plan, shard: int) -> list[tuple[str, int, int, int]]:
    """What server and client must agree on: name, width, part and parts of the shard's slots."""
    slots = plan.schema.slots
    return [(slots[p.slot].name, slots[p.slot].width, p.part, p.parts) for p in plan.placement.shards[shard]]


def security_of(config: Config, token: str) -> Security:
    c = config.cluster
    return Security.of(c.tls_ca, c.tls_cert, c.tls_key, c.tls_name, c.token_file, c.insecure, token)

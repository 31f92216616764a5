"""Placement: which slots, or sign ranges of a heavy slot, live on which shard, and where each slot stands in a pooled line.

Covers the plan only: `load` counts what it is made from, `client` sends by it. Moves no rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from flowps.config import Slot
from flowps.ps.load import SlotLoad
from flowps.ps.memory import row_bytes


@dataclass(frozen=True, order=True)
class Piece:
    """What a shard holds of the slot at position `slot`: the signs whose upper 32 bits are in [part, part + 1) · 2^32 / parts."""

    slot: int
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Placement:
    """`shards[k]`: what lives on shard k, ascending. `columns[s]`: first float of slot s in a line of `width` floats."""

    shards: tuple[tuple[Piece, ...], ...]
    columns: tuple[int, ...]
    width: int


class ShardLoad(msgspec.Struct, frozen=True):
    """A shard's share of what all shards have or do: of the signs looked up, of the rows, of their bytes, of the time spent."""

    lookups: float
    rows: float
    bytes: float
    time: float


def place(
    slots: Sequence[Slot], num_shards: int, loads: Sequence[SlotLoad] | None = None, *, wire: bool = True
) -> Placement:  # fmt: skip
    """Spread `slots` over `num_shards` shards so that all are about equally busy.

    A slot heavier than a fair share is cut into equal sign ranges, each on another shard; one with pooling none is not, because its
    parts could not be added up. Then the heaviest first, each to the shard that has least (longest processing time first: Graham,
    "Bounds on multiprocessing timing anomalies", 1969). Without `loads` every slot counts by its floats. A shard may stay empty
    when there are fewer slots than shards.

    wire   whether the shards are in other processes than the trainers: then bytes count too
    """
    costs = [float(slot.width) if loads is None else loads[s].cost_ns(slot, wire=wire) for s, slot in enumerate(slots)]
    fair = sum(costs) / num_shards
    pieces: list[tuple[float, Piece]] = []
    for s, slot in enumerate(slots):
        can_split = loads is not None and slot.pooling != "none" and costs[s] > fair
        parts = min(num_shards, math.ceil(costs[s] / fair)) if can_split else 1
        cost = costs[s] if loads is None else loads[s].cost_ns(slot, 1 / parts, wire=wire)
        pieces += [(cost, Piece(s, part, parts)) for part in range(parts)]
    busy = [0.0] * num_shards
    shards: list[list[Piece]] = [[] for _ in range(num_shards)]
    for cost, piece in sorted(pieces, key=lambda found: (-found[0], found[1])):
        free = [k for k in range(num_shards) if all(there.slot != piece.slot for there in shards[k])]
        k = min(free, key=lambda k: (busy[k], k))
        shards[k].append(piece)
        busy[k] += cost
    return Placement(tuple(tuple(sorted(shard)) for shard in shards), *columns_of(slots))


def columns_of(slots: Sequence[Slot]) -> tuple[tuple[int, ...], int]:
    """First float of each slot in a pooled line, and the line's width."""
    columns, width = [], 0
    for slot in slots:
        columns.append(width)
        width += slot.width
    return tuple(columns), width


def predict(placement: Placement, slots: Sequence[Slot], loads: Sequence[SlotLoad], *, wire: bool = True) -> list[ShardLoad]:
    """What each shard's share will be, if the slots go on as `loads` says and a split slot's signs are spread evenly."""
    found = []
    for shard in placement.shards:
        parts = [(loads[p.slot], slots[p.slot], 1 / p.parts) for p in shard]
        found.append(
            (
                sum(load.signs * share for load, _, share in parts),
                sum(load.rows * share for load, _, share in parts),
                sum(load.rows * share * row_bytes(slot) for load, slot, share in parts),
                sum(load.cost_ns(slot, share, wire=wire) for load, slot, share in parts),
            )
        )
    return shares(found)


def shares(amounts: Sequence[tuple[float, float, float, float]]) -> list[ShardLoad]:
    """Each shard's share of the signs, rows, bytes and time of all."""
    totals = [sum(column) or 1.0 for column in zip(*amounts, strict=True)]
    return [ShardLoad(*(value / total for value, total in zip(of_shard, totals, strict=True))) for of_shard in amounts]


def describe(shard: Sequence[Piece], slots: Sequence[Slot]) -> list[str]:
    """The slots of a shard by name; of one that is split, which part: `hist_attrs (1/2)`."""
    return [slots[p.slot].name + (f" ({p.part + 1}/{p.parts})" if p.parts > 1 else "") for p in shard]

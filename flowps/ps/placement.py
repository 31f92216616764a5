"""Placement: which slots live on which shard, and where each slot's vector stands in a pooled line.

Slots are placed whole. Covers the plan only; moves no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowps.config import Slot


@dataclass(frozen=True)
class Placement:
    """`shards[k]`: positions (in the run's slots) of the slots on shard k, ascending. `columns[s]`: first float of slot s."""

    shards: tuple[tuple[int, ...], ...]
    columns: tuple[int, ...]
    width: int


def place(slots: Sequence[Slot], num_shards: int) -> Placement:
    """Spread `slots` over `num_shards` shards so that their floats per sample are about equal.

    Largest first, each to the shard that has least (Graham, "Bounds on multiprocessing timing anomalies", 1969). A shard may stay
    empty when there are fewer slots than shards.
    """
    load = [0] * num_shards
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    for position in sorted(range(len(slots)), key=lambda s: (-slots[s].width, s)):
        k = load.index(min(load))
        shards[k].append(position)
        load[k] += slots[position].width
    columns, width = [], 0
    for slot in slots:
        columns.append(width)
        width += slot.width
    return Placement(tuple(tuple(sorted(shard)) for shard in shards), tuple(columns), width)

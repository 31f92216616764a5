"""What is said of the shards: who has which slots, the share of the load that was expected of each, and the share there was.

Plain data for `placement.json`, and the table that people read. Made by `run`, read by `announce`, `report` and the next run's
`forecast`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.table import Column, Table

from flowps.ps.load import SlotLoad
from flowps.ps.placement import ShardLoad

_LEAST_NAMES = 12  # characters of a shard's slots, however narrow the terminal
_FRAME = 3 * 7 + 1  # characters between and around seven columns
_SHARES = ("lookups", "rows", "bytes", "time")


class ShardReport(msgspec.Struct, frozen=True):
    """One shard. `predicted` is None where nothing was measured before, `measured` until the run has ended."""

    worker: str
    slots: list[str]
    predicted: ShardLoad | None = None
    measured: ShardLoad | None = None


class PlacementReport(msgspec.Struct, frozen=True):
    """All shards. `source`: what the prediction was made from; `loads`: of every slot, as measured by this run."""

    source: str
    shards: list[ShardReport]
    loads: dict[str, SlotLoad] = {}


def busiest(loads: Sequence[ShardLoad]) -> float:
    """The time of the busiest shard, over the mean of all."""
    return max(load.time for load in loads) * len(loads)


def shard_table(report: PlacementReport, width: int) -> Table:
    """A line per shard: its slots, and its share of the signs looked up, the rows, their bytes and the time.

    width   columns of the terminal: as many slots are named as there is room
    """
    has_measured = any(shard.measured for shard in report.shards)
    what = "predicted → measured" if has_measured else "predicted"
    table = Table("", "worker", "slots", *(Column(of, justify="right") for of in _SHARES),
                  title=f"shards: {what} share in %", title_justify="left")  # fmt: skip
    shares = [[_share(shard, of) for of in _SHARES] for shard in report.shards]
    wide = [max(len(head), *(len(cell) for cell in cells)) for head, cells in zip(_SHARES, zip(*shares, strict=True), strict=True)]
    taken = sum(wide) + max(len("worker"), *(len(shard.worker) for shard in report.shards)) + len(str(len(shares)))
    room = max(_LEAST_NAMES, width - taken - _FRAME)
    for k, shard in enumerate(report.shards):
        names = f"{len(shard.slots)}: {', '.join(shard.slots)}" if shard.slots else "none"
        table.add_row(str(k), shard.worker, names if len(names) <= room else f"{names[: room - 1]}…", *shares[k])
    return table


def balance(report: PlacementReport) -> str:
    """How even the shards are, in a line."""
    said = []
    for what in ("predicted", "measured"):
        loads = [load for shard in report.shards if (load := getattr(shard, what))]
        if loads:
            said.append(f"{busiest(loads):.2f}× the mean {what}")
    return f"busiest shard: {', '.join(said)} (load {report.source})" if said else f"slots placed by {report.source}"


def _share(shard: ShardReport, of: str) -> str:
    found = [f"{100 * getattr(load, of):.1f}" for load in (shard.predicted, shard.measured) if load is not None]
    return "→".join(found)

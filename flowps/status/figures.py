"""What is known of a run's roles at one moment: plain data that crosses processes and goes to `status.jsonl`.

Times and counts are since the role began; a window is the difference of two moments (`verdict`).
"""

from __future__ import annotations

import os
import socket
import time

import msgspec
import psutil

from flowps.status.stage import StageSummary


class Usage(msgspec.Struct, frozen=True):
    """What a process has used. `process`: host and pid; `cores`: that it may use, at most those of the host."""

    process: str
    host: str
    cpu_s: float
    rss_bytes: int
    cores: int


class ShardFigures(msgspec.Struct, frozen=True):
    """A shard.

    stages      QueueWait (until a thread took a call), Lookup, Find, Pool, Reply, Push, PushSum (gradients added up per row) and
                PushStep; without the way there when shard and trainer are in one process
    rows        of at most capacity_rows; bytes: of them; index_load: rows per entry of the index, of the fullest table
    inserted, evicted, expired, refused   as in `TableStats`, of all tables
    signs       looked up, by slot
    hot         the signs asked for most: slot, sign, share of all signs; estimated from a sample
    staleness   pushes between a batch's lookup and its own push → how many batches
    """

    shard: int
    worker: str
    process: str
    stages: dict[str, StageSummary]
    rows: int
    capacity_rows: int
    bytes: int
    index_load: float
    inserted: int
    evicted: int
    expired: int
    refused: int
    in_flight: int
    staleness: dict[int, int]
    signs: dict[str, int]
    hot: list[tuple[str, int, float]]

    @property
    def hit_rate(self) -> float | None:
        """Share of the signs looked up that had a row; None before the first."""
        signs = sum(self.signs.values())
        return 1 - (self.inserted + self.refused) / signs if signs else None


class Setup(msgspec.Struct, frozen=True):
    """What the roles are set up with, as far as it bounds them.

    remote    whether shards are in other processes than trainers
    narrower  whether the trainer's net could be multiplied several times as fast in bfloat16 and is not
    """

    hub_threads: int
    tasks_in_flight: int
    feed_threads: int
    in_flight: int
    num_shards: int
    remote: bool
    narrower: bool = False


class Moment(msgspec.Struct, frozen=True):
    """Everything that is measured, at one moment. `seconds`: since the run began; `stages`: of the trainer."""

    seconds: float
    stages: dict[str, StageSummary]
    shards: list[ShardFigures] = []
    usage: list[Usage] = []


def usage_here() -> Usage:
    """Of this process, now."""
    host, process = socket.gethostname(), psutil.Process()
    return Usage(
        f"{host}:{process.pid}", host, time.process_time(), process.memory_info().rss, len(os.sched_getaffinity(0))
    )  # fmt: skip

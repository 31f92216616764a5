"""Checkpoints as a run of two shards writes them, small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowps.checkpoint.file import FileEntry
from flowps.checkpoint.manifest import Manifest, ShardPart, publish
from flowps.checkpoint.part import PartWriter
from flowps.checkpoint.store import Store

Columns = dict[str, NDArray[Any]]


def columns(rows: int = 5, seed: int = 0) -> Columns:
    """Of one section."""
    drawn = np.random.default_rng(seed)
    return {
        "sign": drawn.integers(0, 2**64 - 1, rows, np.uint64, endpoint=True),
        "weights": drawn.random((rows, 4), np.float32),
        "state": np.empty((rows, 0), np.float32),
    }


def part(store: Store, prefix: str, rows: int = 5, seed: int = 0) -> list[FileEntry]:
    """Two sections of one shard."""
    with PartWriter(store, prefix) as writer:
        writer.write("rows", columns(rows, seed))
        writer.write("admission", {"count": np.arange(rows, dtype=np.uint8)})
        return writer.close()


def manifest(name: str, step: int, shards: Sequence[Sequence[FileEntry]] = (), **settings: Any) -> Manifest:
    """Of a checkpoint with such files."""
    given: dict[str, Any] = {"epoch": 0, "created": float(step), "schema": {"label": "y"}, "trainer": [], "seconds": 0.5}
    return Manifest(
        name=name,
        step=step,
        settings={"seed": 1},
        shards=[ShardPart([("城市", i, 2)], [{"stamp": 7}], list(files)) for i, files in enumerate(shards)],
        ledger={"read": 10},
        rows=5 * len(shards),
        **{**given, **settings},
    )


def checkpoint(store: Store, step: int, base: str = "", name: str = "", **settings: Any) -> Manifest:
    """One that is published."""
    name = name or f"step-{step:09d}"
    shards = [part(store, f"{name}/shard-{i}", seed=step + i) for i in range(2)]
    trainer = [store.put(f"{name}/dense.weights", b"dense weights" * step)]
    made = manifest(name, step, shards, base=base, trainer=trainer, **settings)
    publish(store, made)
    return made


def named(step: int) -> str:
    """The name of the checkpoint at a step."""
    return f"step-{step:09d}"


def unfinished(store: Store, step: int) -> str:
    """One that was killed before its manifest; its name."""
    part(store, f"{named(step)}/shard-0")
    return named(step)

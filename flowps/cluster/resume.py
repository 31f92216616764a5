"""What an earlier run has left to go on from: which checkpoint, whether it is one of this run's, and what is left of its epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from flowps.checkpoint.file import FileEntry
from flowps.checkpoint.ledger import Ledger
from flowps.checkpoint.manifest import Manifest, chain, check, found, load, newest_valid
from flowps.checkpoint.store import Store
from flowps.cluster.cut import STATE
from flowps.cluster.run_dir import CHECKPOINTS, difference
from flowps.config import Config
from flowps.errors import CheckpointError, ConfigError
from flowps.hub.partition import Partition
from flowps.hub.schema import Schema
from flowps.ps.placement import Piece, Placement, columns_of

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Resume:
    """A checkpoint that a run begins with: in the store `url`, from a full one to the last, which is it."""

    url: str
    chain: tuple[Manifest, ...]

    @property
    def last(self) -> Manifest:
        """The checkpoint itself."""
        return self.chain[-1]

    @property
    def ledger(self) -> Ledger:
        """What was read and trained until there."""
        return msgspec.convert(self.last.ledger, Ledger)

    @property
    def state(self) -> FileEntry:
        """The file of the trainer's state."""
        state = next((file for file in self.last.trainer if file.section == STATE), None)
        if state is None:
            raise CheckpointError(f"{self.url}/{self.last.name}: has no state of a trainer; use another checkpoint")
        return state

    def placement(self, schema: Schema, num_shards: int) -> Placement | None:
        """Where the slots were, if there are as many shards now: sums are then added up in the same order."""
        number = {slot.name: k for k, slot in enumerate(schema.slots)}
        if len(self.last.shards) != num_shards:
            return None
        shards = tuple(
            tuple(sorted(Piece(number[name], part, parts) for name, part, parts in of.pieces)) for of in self.last.shards
        )
        return Placement(shards, *columns_of(schema.slots))


def prepare(url: str, resume: Resume | None, is_newest: bool) -> None:
    """Make the folder of a run's checkpoints. Raises CheckpointError where it cannot be, or has those of another run.

    is_newest   whether `resume` was taken because it is the newest that is sound
    """
    store = Store(url)
    store.prepare()
    if is_newest:
        return
    there = [folder.manifest for folder in found(store) if folder.manifest is not None]
    if resume is None and there:
        raise CheckpointError(
            f"{url}: has checkpoints of an earlier run; go on from them with --resume, delete them, or choose another "
            "checkpoint.url"
        )
    newer = [manifest.name for manifest in there if resume is not None and manifest.step > resume.last.step]
    if newer:
        raise CheckpointError(
            f"{url}: has {newer[0]}, which is newer than {resume.last.name if resume else ''}, where this run is to begin; give "
            "it another --run_dir (or checkpoint.url), or delete what is newer"
        )


def find(config: Config, say: Callable[[str], None]) -> Resume | None:
    """The checkpoint that the run is to begin with; None for a run from the beginning.

    `say` is told of each checkpoint that is passed over, and why. Raises CheckpointError where there is none that is sound, or the
    one named is not; ConfigError for --resume without a place to look.
    """
    own_url = config.checkpoint.url or (str(Path(config.run_dir).absolute() / CHECKPOINTS) if config.run_dir else "")
    if config.resume and not config.resume_from and not own_url:
        raise ConfigError("resume: of which run? give its --run_dir, or --checkpoint.url; --resume_from names a checkpoint")
    if config.resume_from:
        name = config.resume_from.rstrip("/")
        if Store(name).exists(_MANIFEST):
            url, _, name = name.rpartition("/")
            store = Store(url or ".")
            return Resume(store.url, tuple(check(store, load(store, name))))
        own_url = name
    elif not config.resume:
        return None
    store = Store(own_url)
    return Resume(own_url, tuple(chain(store, newest_valid(store, say))))


def check_fits(resume: Resume, config: Config, schema: Schema) -> None:
    """Raise CheckpointError where the run would mean something else than what was saved."""
    where = f"{resume.url}/{resume.last.name}"
    differs = difference(resume.last.schema, schema.to_json())
    if differs:
        raise CheckpointError(f"{where}: is of another model: {differs}; make the settings equal, or start a new run directory")
    now = settings_of(config)
    for key, then in resume.last.settings.items():
        if key in now and now[key] != then:
            raise CheckpointError(
                f"{where}: {key} = {then!r} there, {now[key]!r} now; set {key} = {then!r}, or start a new run directory"
            )


def settings_of(config: Config) -> dict[str, object]:
    """What must stay as it is for the rest of a run: what is drawn, and in which order samples are read."""
    return {"seed": config.seed, "data.shuffle": config.data.shuffle, "data.partition_rows": config.data.partition_rows}


def left_of(order: Iterable[Partition], ledger: Ledger) -> Iterator[Partition]:
    """What is left of an epoch's partitions, in order. Raises CheckpointError for one whose file has changed since."""
    for partition in order:
        rows = ledger.rows_trained(partition.url, partition.first_row, partition.num_rows)
        if rows < partition.num_rows:
            yield replace(partition, skip=rows)

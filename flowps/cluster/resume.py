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
_TO_BE_CHOSEN: tuple[str, ...] = ()  # until the schema is known
_ROWS_MEAN = ("type", "seed", "dim", "hash_size", "optimizer", "storage")  # what must be equal for a slot's rows to be taken over


@dataclass(frozen=True)
class Resume:
    """A checkpoint that a run begins with: in the store `url`, from a full one to the last, which is it.

    taken   None: the run goes on where it was. Otherwise it only begins with the rows of these slots, and what dense weights fit
    """

    url: str
    chain: tuple[Manifest, ...]
    taken: tuple[str, ...] | None = None

    @property
    def last(self) -> Manifest:
        """The checkpoint itself."""
        return self.chain[-1]

    @property
    def goes_on(self) -> bool:
        """Whether the run is the same one."""
        return self.taken is None

    @property
    def ledger(self) -> Ledger:
        """What was read and trained until there."""
        return msgspec.convert(self.last.ledger, Ledger) if self.goes_on else Ledger()

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


def place_of(config: Config, run_dir: Path | None) -> str:
    """The folder of the run's checkpoints, as every worker can name it; "" where neither says it."""
    if config.checkpoint.url:
        return _absolute(config.checkpoint.url)
    return "" if run_dir is None else str(run_dir.absolute() / CHECKPOINTS)


def _absolute(url: str) -> str:
    """Workers have working directories of their own."""
    return url if "://" in url else str(Path(url).absolute())


def find(config: Config, say: Callable[[str], None]) -> Resume | None:
    """The checkpoint that the run is to begin with; None for a run from the beginning.

    `say` is told of each checkpoint that is passed over, and why. Raises CheckpointError where there is none that is sound, or the
    one named is not; ConfigError for --resume without a place to look.
    """
    if config.warm_start and (config.resume or config.resume_from):
        raise ConfigError("warm_start begins a new run, resume and resume_from go on with one: give one of them")
    url = place_of(config, Path(config.run_dir) if config.run_dir else None)
    if config.resume and not config.resume_from and not url:
        raise ConfigError("resume: of which run? give its --run_dir, or --checkpoint.url; --resume_from names a checkpoint")
    taken = _TO_BE_CHOSEN if config.warm_start else None
    if named := config.resume_from or config.warm_start:
        url = _absolute(named).rstrip("/")
        if Store(url).exists(_MANIFEST):
            url, _, name = url.rpartition("/")
            store = Store(url)
            return Resume(url, tuple(check(store, load(store, name))), taken)
    elif not config.resume:
        return None
    store = Store(url)
    try:
        return Resume(url, tuple(chain(store, newest_valid(store, say))), taken)
    except CheckpointError as error:
        option = "--warm_start" if config.warm_start else "--resume"
        raise CheckpointError(f"{error}; give another place, or start without {option}") from None


def choose(resume: Resume, schema: Schema, say: Callable[[str], None]) -> Resume:
    """For a warm start, with the slots whose rows mean the same in both; `say` is told of the others, and why."""
    if resume.goes_on:
        return resume
    there = {slot["name"]: slot for slot in resume.last.schema["slots"]}
    now = {slot["name"]: slot for slot in schema.to_json()["slots"]}
    taken = []
    for name, slot in now.items():
        differs = [f"{key} {there[name].get(key)!r} there, {slot[key]!r} now" for key in _ROWS_MEAN if name in there
                   and there[name].get(key) != slot[key]]  # fmt: skip
        if name in there and not differs:
            taken.append(name)
        else:
            say(f"warm start: slot {name!r} begins without rows: {', '.join(differs) or 'it is new'}")
    left = [name for name in there if name not in now]
    if left:
        say(f"warm start: {len(left)} slots of the checkpoint are in this run no more: {', '.join(left[:5])}")
    if resume.last.schema.get("hash") != schema.to_json()["hash"]:
        raise CheckpointError(f"{resume.url}/{resume.last.name}: signs were hashed in another way; its rows are of no use here")
    return replace(resume, taken=tuple(taken))


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
    """What must stay as it is for the rest of a run: what is drawn, which samples are read, and in which order."""
    data = config.data
    return {
        "seed": config.seed, "data.shuffle": data.shuffle, "data.partition_rows": data.partition_rows,
        "data.negative_rate": data.negative_rate,
    }  # fmt: skip


def left_of(order: Iterable[Partition], ledger: Ledger) -> Iterator[Partition]:
    """What is left of an epoch's partitions, in order. Raises CheckpointError for one whose file has changed since."""
    for partition in order:
        rows = ledger.rows_trained(partition.url, partition.first_row, partition.num_rows)
        if rows < partition.num_rows:
            yield replace(partition, skip=rows)

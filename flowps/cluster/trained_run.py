"""`TrainedRun`: a run that has been, as evaluation and prediction take it up: its config, schema, and the checkpoint it ended with.

Covers finding these in a run directory and planning the scoring of other files. Does not score (`scoring`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from flowps.checkpoint.manifest import chain, check, found, load, newest_valid
from flowps.checkpoint.store import Store
from flowps.cluster.assign import Assignment
from flowps.cluster.plan import Memory, Plan
from flowps.cluster.resume import Resume, place_of
from flowps.cluster.run_dir import Summary
from flowps.config import Config
from flowps.errors import CheckpointError, ConfigError, RunDirError, SchemaError
from flowps.hub.decode import Dense
from flowps.hub.partition import SampleFile, list_files
from flowps.hub.saved import schema_for
from flowps.hub.schema import Schema
from flowps.hub.stream import ReadSpec
from flowps.knob import load as load_config
from flowps.ps.placement import place

_IN_FLIGHT = 4  # at least, unless it is given: nothing gets stale where nothing is pushed

_FREE = ("cluster.", "ps.", "checkpoint.url")
_FREE_KNOBS = {
    "data.batch_size", "data.partition_rows", "data.tasks_in_flight", "trainer.count", "trainer.in_flight",
    "trainer.max_staleness", "trainer.feed_threads", "trainer.tensorflow_threads", "trainer.jit_compile",
}  # fmt: skip


def is_free(knob: str) -> bool:
    """Whether a knob may be other than in training: it says where and how samples are scored, not what the scores are."""
    return knob.startswith(_FREE) or knob in _FREE_KNOBS


@dataclass(frozen=True)
class TrainedRun:
    """The run in `path`.

    schema   the content of schema.json
    resume   the checkpoint whose rows and dense weights it has
    """

    path: Path
    config: Config
    schema: dict[str, Any]
    resume: Resume

    def schema_for(self, files: Sequence[SampleFile], labelled: bool) -> Schema:
        """The schema for other files. Raises SchemaError where they have not what the model needs."""
        return schema_for(self.schema, files[0].columns, files[0].url, labelled)

    @property
    def columns(self) -> set[str]:
        """That the model was trained on: features, weights of their values, labels."""
        slots = self.schema["slots"]
        labels = self.schema.get("labels", [self.schema["label"]])
        return {slot["name"] for slot in slots} | {slot.get("weights", "") for slot in slots} | {*self.schema["dense"], *labels}

    def files(self, sources: Sequence[str], columns: Sequence[str] = (), labelled: bool = True) -> list[SampleFile]:
        """The Parquet files that `sources` name. Others than the model's and these `columns` may differ between them.

        Raises DataError and SchemaError for the files.
        """
        slots = self.schema["slots"]
        weights = {slot.get("weights", "") for slot in slots}
        labels = self.schema.get("labels", [self.schema["label"]]) if labelled else []
        needed = {slot["name"] for slot in slots} | weights | {*self.schema["dense"], *labels, *columns}
        found = list_files(sources, "DATA", only=needed)
        for name in columns:
            if name not in found[0].columns:
                raise SchemaError(f"{found[0].url}: no column {name!r}; it has {', '.join(list(found[0].columns)[:30])}")
        return found

    def read_spec(self, schema: Schema, labelled: bool, columns: Sequence[str]) -> ReadSpec:
        """How samples are read: as in training, in the order of the files; `columns` are brought along."""
        data = self.config.data
        return ReadSpec(
            schema, Dense(data.dense_fill, data.log1p), data.batch_size, False, self.config.seed, labelled=labelled,
            columns=tuple(columns),
        )  # fmt: skip

    def plan(self, schema: Schema, assignment: Assignment) -> Plan:
        """Where the rows are to be, without anything to train: what a shard and a scorer are told."""
        config, slots = self.config, schema.slots
        placement = self.resume.placement(schema, config.ps.num_shards)
        if placement is None:
            placement = place(slots, config.ps.num_shards, None, wire=not assignment.is_one_process)
        rows = tuple(self.resume.last.settings["capacity_rows"])
        available = sum({offer.process: offer.available for offer in assignment.shards}.values())
        return Plan(
            config, schema, (), (), assignment, placement, None, rows, (False,) * len(slots), Memory(0, 0, 0, available), None
        )


def open_run(
    path: Path, overrides: Sequence[tuple[str, list[str]]], checkpoint: str, say: Callable[[str], None]
) -> TrainedRun:  # fmt: skip
    """The run in `path`, with knobs that are to be other than in training.

    checkpoint   its name, or path, or "": the one that the run ended with, or of a run that has not ended the newest that is sound
    say          told of checkpoints that are passed over

    Raises RunDirError where there is no run, ConfigError for a knob that belongs to the trained model, CheckpointError where there
    is no checkpoint to read the rows from.
    """
    if not (path / "config.toml").is_file():
        raise RunDirError(f"{path}: has no config.toml; is this the directory of a run?")
    for knob, _ in overrides:
        if not is_free(knob):
            raise ConfigError(f"--{knob}: belongs to the trained model; --help lists the knobs that may differ from the run's")
    config = load_config(path / "config.toml", overrides)
    trainer = config.trainer
    if "trainer.in_flight" not in dict(overrides):
        trainer = msgspec.structs.replace(trainer, in_flight=max(_IN_FLIGHT, trainer.in_flight))
    config = msgspec.structs.replace(
        config, trainer=trainer, run_dir=str(path.absolute()), trace="", tensorboard="", resume=False, resume_from="", warm_start=""
    )
    try:
        schema = json.loads((path / "schema.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path / 'schema.json'}: cannot be read: {error}; is this the directory of a run?") from None
    url, name = place_of(config, path), checkpoint or _ended_with(path)
    if "/" in name:  # of another folder than the run's
        url, _, name = name.rpartition("/")
    try:
        store = Store(url)
        resume = Resume(url, tuple(check(store, load(store, name)) if name else chain(store, newest_valid(store, say))))
    except CheckpointError as error:
        what = f"{name} cannot be had" if name else "there is none to be had"
        raise CheckpointError(
            f"{path}: the rows are read from a checkpoint, and {what}: {error}; {_others(url)}a run has one "
            "when it ends, unless checkpoint.every_s and checkpoint.every_steps are 0"
        ) from None
    return TrainedRun(path, config, schema, resume)


def _others(url: str) -> str:
    """What checkpoints there are, in words."""
    try:
        names = [folder.name for folder in found(Store(url)) if folder.manifest is not None]
    except CheckpointError:
        return ""
    return f"there are {', '.join(names)}; " if names else ""


def _ended_with(path: Path) -> str:
    """The checkpoint that the run ended with; "": it has not ended, or has not said."""
    try:
        return msgspec.json.decode((path / "summary.json").read_bytes(), type=Summary).checkpoint
    except (OSError, msgspec.MsgspecError):
        return ""

"""A pipeline: what is retrained from which partitions, how a new model is judged, and where it goes. Read from a TOML file.

Covers names, types, ranges, and what can be checked without looking at data: the run's own TOML file, time zones, the pattern of
folders. `config` is a run's description as `python -m flowps.train` takes it; what changes from slot to slot is filled in.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Meta

from flowps import knob
from flowps.config import Config
from flowps.errors import ConfigError
from workflows.slots import Pattern

Share = Annotated[float, Meta(ge=0, le=1)]


class _Section(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A table of a pipeline's TOML file."""


class Partitions(_Section, frozen=True, kw_only=True):
    """Where partitions are, and when one is ready."""

    root: Annotated[str, Meta(description="folder of the partitions: a path or an fsspec URL")]
    slots: Annotated[
        str, Meta(description="a slot's folder below it, with strftime's %Y %m %d %H %M, as in date=%Y-%m-%d/hour=%H")
    ] = "date=%Y-%m-%d/hour=%H"
    time_zone: Annotated[str, Meta(description="whose clock the folders' names are of, as in Europe/Berlin")] = "UTC"
    marker: Annotated[str, Meta(description="file whose presence makes a slot ready; empty: its age does")] = "_SUCCESS"
    min_age_s: Annotated[
        float, Meta(ge=0, description="without a marker: seconds since the slot's end and since its newest file")
    ] = 3600.0
    late_s: Annotated[
        float, Meta(ge=0, description="how much older than the newest trained slot one may be to be trained by itself, in seconds")
    ] = 7 * 86_400.0
    keys: Annotated[bool, Meta(description="whether the folders' keys, as date and hour, are columns to train on")] = False
    first: Annotated[str, Meta(description="slots before this one, as in 2024-09-21T14, are left alone; empty: none are")] = ""


class Validate(_Section, frozen=True, kw_only=True):
    """How far a slot may be from the last accepted ones before it is refused. Checks need a history of `least`."""

    history: Annotated[int, Meta(ge=1, le=10_000, description="accepted slots that a slot is compared with")] = 24
    least: Annotated[int, Meta(ge=1, le=10_000, description="accepted slots without which only the schema is checked")] = 3
    fewest_rows: Annotated[float, Meta(ge=0, description="rows, as a share of the median of the history")] = 0.2
    most_rows: Annotated[float, Meta(gt=0, description="the same, at most")] = 5.0
    label_rate: Annotated[float, Meta(ge=0, description="difference of the share of positive labels, relative to the median")] = 0.5
    null_rate: Annotated[Share, Meta(description="rise of a column's share of nulls above the most in the history")] = 0.1
    new_signs: Annotated[
        Share,
        Meta(description="rise of a column's share of values that the live model does not know, above the most in the history"),
    ] = 0.3
    sample_rows: Annotated[int, Meta(ge=1000, description="rows of a slot in which new values are counted")] = 100_000


class Gate(_Section, frozen=True, kw_only=True):
    """What a new model must reach on the fixed set beside the live one, to be published."""

    fixed: Annotated[
        tuple[str, ...],
        Meta(min_length=1, description="Parquet files with labels that no slot has: what new and live model are compared on"),
    ]
    auc_drop: Annotated[float, Meta(ge=0, description="AUC below the live model's, at most")] = 0.002
    least_auc: Annotated[Share, Meta(description="AUC at least, also of a first model")] = 0.5
    ne_rise: Annotated[float, Meta(ge=0, description="normalised entropy above the live model's, at most, relative to it")] = 0.01
    calibration: Annotated[
        float,
        Meta(
            gt=0,
            description="how far the sum of predictions may be from that of the labels, relative to it, or as far as the live's",
        ),
    ] = 0.2


class Publish(_Section, frozen=True, kw_only=True):
    """Where accepted models go."""

    registry: Annotated[str, Meta(description="folder of published models: a path or an fsspec URL")]
    dtype: Annotated[Literal["float32", "float16", "int8"], Meta(description="what rows are published in")] = "float32"
    keep: Annotated[int, Meta(ge=2, description="models that stay, the live one and the one before among them")] = 10


class Schedule(_Section, frozen=True, kw_only=True):
    """When `python -m workflows.schedule` begins a retraining."""

    cron: Annotated[str, Meta(description="minute hour day month weekday, as in 15 * * * *")] = "15 * * * *"
    time_zone: Annotated[str, Meta(description="whose clock cron means")] = "UTC"
    jitter_s: Annotated[float, Meta(ge=0, description="begin up to so many seconds earlier or later, at random")] = 0.0
    misfire_grace_s: Annotated[
        float, Meta(gt=0, description="begin a run that was missed, by a stop or by a run before it, up to so many seconds late")
    ] = 3600.0
    max_runtime_s: Annotated[float, Meta(gt=0, description="end a retraining that takes longer; the next goes on")] = 86_400.0
    retries: Annotated[int, Meta(ge=0, le=100, description="after a failure")] = 3
    backoff_s: Annotated[float, Meta(gt=0, description="seconds before the first retry, doubled for each further one")] = 60.0


class Notify(_Section, frozen=True, kw_only=True):
    """Who is told of what happens. Both get the same JSON: on standard input, and as the body of a POST."""

    command: Annotated[tuple[str, ...], Meta(description="program and arguments")] = ()
    webhook: Annotated[str, Meta(description="an http or https URL")] = ""
    on: Annotated[
        tuple[Literal["published", "rejected", "failed", "late", "rolled_back"], ...], Meta(description="what is told")
    ] = ("published", "rejected", "failed", "rolled_back")
    timeout_s: Annotated[float, Meta(gt=0, description="seconds after which a notification is given up")] = 30.0


class Pipeline(_Section, frozen=True, kw_only=True):
    """All of it."""

    config: Annotated[str, Meta(description="TOML file of a run, as python -m flowps.train takes it, beside this one")]
    state: Annotated[str, Meta(description="folder for the ledger, runs and evidence, on a local disk; beside this file")]
    partitions: Partitions
    gate: Gate
    publish: Publish
    validate: Validate = msgspec.field(default_factory=Validate)
    schedule: Schedule = msgspec.field(default_factory=Schedule)
    notify: Notify = msgspec.field(default_factory=Notify)
    keep_runs: Annotated[int, Meta(ge=2, description="run directories that stay, with the checkpoint to train on from")] = 3
    lease_s: Annotated[float, Meta(gt=0, description="seconds without a sign of life after which a retraining counts as dead")] = (
        120.0
    )


@dataclass(frozen=True)
class Read:
    """A pipeline's file, read: the pipeline, the run that it retrains, and what its words mean. Paths are absolute."""

    path: Path
    pipeline: Pipeline
    config: Config
    pattern: Pattern
    zone: ZoneInfo
    state: Path
    registry: str


def read_pipeline(path: Path) -> Read:
    """Read a pipeline's TOML file; relative paths in it are beside it. Raises ConfigError."""
    pipeline = knob.load_as(Pipeline, path)
    path = path.resolve()
    beside = path.parent
    root, registry = _beside(beside, pipeline.partitions.root), _beside(beside, pipeline.publish.registry)
    fixed = tuple(_beside(beside, source) for source in pipeline.gate.fixed)
    pipeline = msgspec.structs.replace(
        pipeline,
        partitions=msgspec.structs.replace(pipeline.partitions, root=root),
        publish=msgspec.structs.replace(pipeline.publish, registry=registry),
        gate=msgspec.structs.replace(pipeline.gate, fixed=fixed),
    )
    if "://" in pipeline.state:
        raise ConfigError(f"state: {pipeline.state!r}: expected a folder on a local disk: SQLite needs its locks")
    if pipeline.notify.webhook and not pipeline.notify.webhook.startswith(("http://", "https://")):
        raise ConfigError(f"notify.webhook: {pipeline.notify.webhook!r}: expected an http or https URL")
    config = knob.load(beside / pipeline.config)
    for name in _FILLED_IN:
        section, _, leaf = name.rpartition(".")
        if getattr(getattr(config, section) if section else config, leaf) not in ("", (), False):
            raise ConfigError(f"{beside / pipeline.config}: {name}: leave it out; retraining fills it in for every slot")
    if not config.checkpoint.is_on:
        raise ConfigError(
            f"{beside / pipeline.config}: checkpoint.every_s and every_steps are 0: retraining goes on from checkpoints"
        )
    pattern = Pattern(pipeline.partitions.slots)
    if not pipeline.partitions.keys:
        exclude = (*config.data.exclude, *map(glob_of, pattern.keys))
        config = msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, exclude=exclude))
    if pipeline.partitions.first:
        pattern.parse(pipeline.partitions.first)
    zone, state = zone_of(pipeline.partitions.time_zone), Path(os.path.normpath(beside / pipeline.state))
    return Read(path, pipeline, config, pattern, zone, state, registry)


_FILLED_IN = ("data.train", "data.test", "run_dir", "resume", "resume_from", "warm_start")


def zone_of(name: str) -> ZoneInfo:
    """The time zone of that name. Raises ConfigError."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        raise ConfigError(f"{name!r}: no such time zone; expected a name as in Europe/Berlin or UTC") from None


def glob_of(name: str) -> str:
    """A glob that only the name itself matches."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _beside(folder: Path, place: str) -> str:
    return place if "://" in place else os.path.normpath(folder / place)

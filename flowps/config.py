"""Every knob of a run: its name, type, unit, default and range.

One description serves TOML files, `--section.key value` overrides and `--help`; `flowps.knob` reads it. Checks that need the data
(does the label column exist?) belong to the hub; checks that need the machine (is there enough memory?) to the cluster.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Pooling = Literal["sum", "mean"]
RowOptimizer = Literal["sgd", "adagrad"]
Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]


class _Section(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A table of a run's TOML file."""


class SlotDefault(_Section, frozen=True, kw_only=True):
    """What holds for every slot that does not say otherwise."""

    dim: Annotated[int, Meta(ge=1, le=4096, description="floats per embedding row")] = 16
    pooling: Annotated[Pooling, Meta(description="how the rows of one sample's signs become one vector")] = "sum"
    capacity_rows: Annotated[
        int, Meta(ge=0, le=1 << 31, description="rows this slot adds to its table's bound; 0: an equal share of ps.memory_share")
    ] = 0
    hash_size: Annotated[
        int, Meta(ge=0, le=1 << 62, description="fold the slot's values into this many signs; 0: keep all 64 bits")
    ] = 0
    optimizer: Annotated[RowOptimizer, Meta(description="how a row takes a step")] = "adagrad"
    learning_rate: Annotated[float, Meta(gt=0, le=100, description="step size of the rows")] = 0.05
    initial_accumulator: Annotated[
        float, Meta(ge=0, le=1e6, description="adagrad's first sum of squares; Keras's 0.1 learns far worse on rare signs")
    ] = 1e-8
    epsilon: Annotated[float, Meta(ge=1e-30, le=1, description="added to adagrad's sum of squares under the root, as in Keras")] = (
        1e-7
    )
    init_scale: Annotated[
        float, Meta(ge=0, le=100, description="a new row is uniform in [-init_scale, init_scale), drawn from its sign and the seed")
    ] = 0.01


class Slot(SlotDefault, frozen=True, kw_only=True):
    """One sparse feature column. In TOML: a `[[slot]]` entry; keys left out come from `[slot_default]`."""

    name: Annotated[str, Meta(min_length=1, description="the column's name")]


class Data(_Section, frozen=True, kw_only=True):
    """Sample files and how they become batches."""

    train: Annotated[
        tuple[str, ...], Meta(description="training files: paths, globs, directories (hive keys become columns) or fsspec URLs")
    ] = ()
    test: Annotated[tuple[str, ...], Meta(description="files to evaluate on after the last epoch, likewise")] = ()
    label: Annotated[str, Meta(description="the label column, each value 0 or 1")] = "label"
    dense: Annotated[tuple[str, ...], Meta(description="columns to take as dense numbers, besides the float ones; globs work")] = ()
    exclude: Annotated[tuple[str, ...], Meta(description="columns to leave out; globs work")] = ()
    batch_size: Annotated[int, Meta(ge=1, le=1 << 20, description="samples per step")] = 4096
    shuffle: Annotated[bool, Meta(description="shuffle partitions and the rows inside, by seed and epoch")] = True
    dense_fill: Annotated[float, Meta(ge=-1e30, le=1e30, description="what a null in a dense column becomes (before log1p)")] = 0.0
    log1p: Annotated[bool, Meta(description="take sign(x)·ln(1 + |x|) of the dense columns")] = False
    partition_rows: Annotated[
        Positive, Meta(description="join neighbouring row groups of a file up to this many rows per hub task")
    ] = 16_384
    tasks_in_flight: Annotated[
        NonNegative, Meta(description="hub tasks running or waiting to be read; 0: one more than the cores")
    ] = 0


class Net(_Section, frozen=True, kw_only=True):
    """Shape of the built-in dense networks."""

    hidden: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=65_536)], ...], Meta(description="units of the hidden layers, ReLU between")
    ] = (128, 64)


class Trainer(_Section, frozen=True, kw_only=True):
    """The TensorFlow side: feeds in, gradients out."""

    optimizer: Annotated[str, Meta(description="optimizer of the dense weights: any Keras optimizer by name")] = "adam"
    learning_rate: Annotated[float, Meta(gt=0, le=100, description="its step size")] = 0.001
    in_flight: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            description="batches looked up and not yet pushed; 1: synchronous and reproducible; staleness is at most in_flight - 1",
        ),
    ] = 2
    feed_threads: Annotated[
        NonNegative, Meta(le=256, description="threads that read batches and look them up; 0: chosen from the cores (bench.feed)")
    ] = 0
    tensorflow_threads: Annotated[
        NonNegative, Meta(le=1024, description="threads inside one TensorFlow operation; 0: TensorFlow's choice, all cores")
    ] = 0
    jit_compile: Annotated[bool, Meta(description="compile the step with XLA")] = False


class Ps(_Section, frozen=True, kw_only=True):
    """The embedding shards."""

    num_shards: Annotated[int, Meta(ge=1, le=1024, description="shards the slots are placed on")] = 1
    memory_share: Annotated[
        float, Meta(gt=0, le=1, description="share of the machine's available memory that slots without capacity_rows may fill")
    ] = 0.5


class Cluster(_Section, frozen=True, kw_only=True):
    """Where the roles run."""

    dashboard: Annotated[str, Meta(description="host:port of Dask's dashboard; port 0: any free one; empty: none")] = (
        "127.0.0.1:8787"
    )
    threads: Annotated[NonNegative, Meta(le=1024, description="threads for hub tasks; 0: one per core")] = 0


class Status(_Section, frozen=True, kw_only=True):
    """What the run says about itself."""

    print_interval: Annotated[Positive, Meta(description="steps between metric lines")] = 100
    interval_s: Annotated[float, Meta(gt=0, le=1e9, description="seconds between [RunStatus] lines")] = 30.0
    progress: Annotated[Literal["auto", "live", "plain"], Meta(description="auto: live on a terminal, plain lines elsewhere")] = (
        "auto"
    )


class Config(_Section, frozen=True, kw_only=True):
    """A run."""

    model: Annotated[
        str, Meta(description='dnn, deepfm, lr, or your own: "my_module:build", a function from a ModelSpec to a keras.Model')
    ] = "dnn"
    epochs: Annotated[int, Meta(ge=1, le=1_000_000_000, description="passes over data.train")] = 1
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1, description="seed of shuffling, rows and dense weights")] = 0
    run_dir: Annotated[str, Meta(description="where the run leaves its files; empty: runs/<date>-<time>")] = ""
    data: Data = Data()
    slot_default: SlotDefault = SlotDefault()
    slot: Annotated[tuple[Slot, ...], Meta(description="per-slot settings")] = ()
    net: Net = Net()
    trainer: Trainer = Trainer()
    ps: Ps = Ps()
    cluster: Cluster = Cluster()
    status: Status = Status()

    def slot_named(self, name: str) -> Slot:
        """The `[[slot]]` entry of that name, or the defaults under that name."""
        for slot in self.slot:
            if slot.name == name:
                return slot
        return Slot(name=name, **msgspec.structs.asdict(self.slot_default))

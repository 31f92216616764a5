"""Every knob of a run: its name, type, unit, default and range.

One description serves TOML files, `--section.key value` overrides and `--help`; `flowps.knob` reads it. Checks that need the data
(does the label column exist?) belong to the hub; checks that need the machine (is there enough memory?) to the cluster.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

GIVEN = " (a function)"
"""How the name of a model ends that was given as a Python function which cannot be imported by name."""

Pooling = Literal["sum", "mean", "sqrtn", "none"]
RowOptimizer = Literal[
    "sgd", "momentum", "adagrad", "rowwise_adagrad", "adam", "amsgrad", "adamw", "rmsprop",
    "ftrl", "group_ftrl", "group_adagrad", "lamb",
]  # fmt: skip
Initializer = Literal["zeros", "constant", "uniform", "normal", "truncated_normal"]
Storage = Literal["float32", "bfloat16", "float16"]
Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Units = tuple[Annotated[int, Meta(ge=1, le=65_536)], ...]


class _Section(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A table of a run's TOML file."""


class SlotDefault(_Section, frozen=True, kw_only=True):
    """What holds for every slot that does not say otherwise."""

    dim: Annotated[int, Meta(ge=1, le=4096, description="floats per embedding row")] = 16
    pooling: Annotated[
        Pooling,
        Meta(
            description="how the rows of one sample's signs become one vector: their sum, their mean, their sum divided by the "
            "root of their number; none: the first max_len rows one after the other, zeros after the last"
        ),
    ] = "sum"
    max_len: Annotated[int, Meta(ge=1, le=65_536, description="with pooling none: rows of a sample; later signs are left out")] = 32
    capacity_rows: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 31,
            description="rows this slot adds to its table's hard bound, taken at the start; 0: an equal share of ps.memory_share, "
            "taken as rows are created; when a table is full, the least recently used rows go",
        ),
    ] = 0
    capacity_bytes: Annotated[
        int, Meta(ge=0, le=1 << 62, description="the same bound in bytes, index included, instead of capacity_rows")
    ] = 0
    hash_size: Annotated[
        int, Meta(ge=0, le=1 << 62, description="fold the slot's values into this many signs; 0: keep all 64 bits")
    ] = 0
    storage: Annotated[
        Storage,
        Meta(description="what weights are stored in, rounded stochastically if narrower; the optimizer's state is float32"),
    ] = "float32"
    ttl_steps: Annotated[
        int, Meta(ge=0, le=1 << 31, description="a row that was not looked up for so many steps starts anew; 0: rows keep for ever")
    ] = 0
    admit_after: Annotated[
        int,
        Meta(ge=1, le=255, description="a sign gets its row in the batch in which it is seen for this many times; zeros before"),
    ] = 1
    admit_probability: Annotated[
        float, Meta(gt=0, le=1, description="with which a sign without a row gets one, each time a batch has it; zeros before")
    ] = 1.0
    optimizer: Annotated[RowOptimizer, Meta(description="how a row takes a step")] = "adagrad"
    learning_rate: Annotated[float, Meta(gt=0, le=100, description="step size of the rows")] = 0.05
    initial_accumulator: Annotated[
        float,
        Meta(
            ge=0,
            le=1e6,
            description="first sum of squares of the adagrads and ftrls; Keras's 0.1 learns far worse on rare signs",
        ),
    ] = 1e-8
    epsilon: Annotated[
        float, Meta(ge=1e-30, le=1, description="keeps divisors from 0: under the root of adagrad and rmsprop, as in Keras")
    ] = 1e-7
    momentum: Annotated[float, Meta(ge=0, lt=1, description="share of the last step that momentum keeps")] = 0.9
    beta1: Annotated[float, Meta(ge=0, lt=1, description="decay of the mean gradient of the adams and lamb")] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1, description="decay of the mean square of the adams and lamb")] = 0.999
    rho: Annotated[float, Meta(ge=0, lt=1, description="decay of the mean square of rmsprop")] = 0.9
    ftrl_beta: Annotated[float, Meta(ge=0, le=1e6, description="beta of ftrl and group_ftrl")] = 1.0
    l1: Annotated[float, Meta(ge=0, le=1e6, description="L1 strength of the ftrls: makes weights zero")] = 0.0
    l21: Annotated[float, Meta(ge=0, le=1e6, description="L2,1 strength of group_ftrl and group_adagrad: makes rows zero")] = 0.0
    l2: Annotated[
        float,
        Meta(ge=0, le=1e6, description="L2 strength of the ftrls; of others, times the weights of touched rows, in the gradient"),
    ] = 0.0
    weight_decay: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="decoupled decay of touched rows, times the learning rate; adamw: 0.004 where it is 0; not of the ftrls",
        ),
    ] = 0.0
    clip_value: Annotated[float, Meta(ge=0, le=1e30, description="bound on every number of a row's gradient; 0: none")] = 0.0
    clip_norm: Annotated[float, Meta(ge=0, le=1e30, description="bound on the L2 norm of a row's gradient; 0: none")] = 0.0
    weight_bound: Annotated[float, Meta(ge=0, le=1e30, description="bound on every weight, after each step; 0: none")] = 0.0
    initializer: Annotated[
        Initializer,
        Meta(description="first weights of a row, drawn from its sign and the seed; truncated_normal is cut at 2 deviations"),
    ] = "uniform"
    init_scale: Annotated[
        float, Meta(ge=0, le=100, description="uniform in [-init_scale, init_scale); standard deviation of normals; the constant")
    ] = 0.01
    init_by_dim: Annotated[bool, Meta(description="divide init_scale by the root of dim")] = False


class Slot(SlotDefault, frozen=True, kw_only=True):
    """One sparse feature column. In TOML: a `[[slot]]` entry; keys left out come from `[slot_default]`."""

    name: Annotated[str, Meta(min_length=1, description="the column's name")]
    weights: Annotated[
        str,
        Meta(
            description="the column with the weight of each value: a list of floats of the same length as the slot's list (or one "
            "float for a slot with one value); empty: all weigh 1"
        ),
    ] = ""

    @property
    def width(self) -> int:
        """Floats of a sample's embeddings: one vector, or max_len of them."""
        return self.dim * (self.max_len if self.pooling == "none" else 1)


class Data(_Section, frozen=True, kw_only=True):
    """Sample files and how they become batches."""

    train: Annotated[
        tuple[str, ...], Meta(description="training files: paths, globs, directories (hive keys become columns) or fsspec URLs")
    ] = ()
    test: Annotated[tuple[str, ...], Meta(description="files to evaluate on after the last epoch, likewise")] = ()
    valid: Annotated[
        tuple[str, ...], Meta(description="files to evaluate on at the end of every epoch, and as trainer.evaluate_steps says")
    ] = ()
    label: Annotated[str, Meta(description="the label column, each value 0 or 1")] = "label"
    extra_labels: Annotated[
        tuple[str, ...], Meta(description="label columns of further tasks, for shared_bottom, mmoe or your own model")
    ] = ()
    sample_weight: Annotated[
        str, Meta(description="the column with the weight of each sample in the loss, at least 0; empty: all weigh 1")
    ] = ""
    negative_rate: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="share of the training samples with label 0 that are trained, drawn anew in each epoch; predictions are "
            "corrected for it; a batch has what is left of data.batch_size samples",
        ),
    ] = 1.0
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
    """Shape and regularisation of the built-in dense networks."""

    hidden: Annotated[Units, Meta(description="units of the hidden layers, ReLU between")] = (128, 64)
    dropout: Annotated[float, Meta(ge=0, lt=1, description="share of every hidden layer's units left out of a training step")] = 0.0
    batch_norm: Annotated[bool, Meta(description="normalise every hidden layer over the batch, before its ReLU")] = False
    l2: Annotated[float, Meta(ge=0, le=1e6, description="L2 strength of the kernels of the dense layers, as Keras's L2")] = 0.0
    cross_layers: Annotated[int, Meta(ge=1, le=64, description="dcn: cross layers")] = 3
    cross_rank: Annotated[NonNegative, Meta(le=65_536, description="dcn: rank of a cross layer's matrix; 0: full")] = 0
    cin: Annotated[Units, Meta(description="xdeepfm: feature maps of the layers of its compressed interaction network")] = (64, 64)
    attention_layers: Annotated[int, Meta(ge=1, le=64, description="autoint: self-attention layers over the slots")] = 2
    attention_heads: Annotated[int, Meta(ge=1, le=64, description="autoint: heads of a self-attention layer")] = 2
    attention_dim: Annotated[int, Meta(ge=1, le=4096, description="autoint: floats of a head")] = 16
    bottom: Annotated[
        Units, Meta(description="dlrm: hidden units between the dense columns and their vector of the slots' dim")
    ] = (64,)
    target: Annotated[str, Meta(description="din: the slot whose vector the history is compared with")] = ""
    activation_unit: Annotated[Units, Meta(description="din: hidden units of the network that weighs the history")] = (36,)
    tower: Annotated[Units, Meta(description="shared_bottom, mmoe: hidden units of each label's own network")] = (32,)
    experts: Annotated[int, Meta(ge=1, le=1024, description="mmoe: experts, each with the layers of hidden")] = 4


class Trainer(_Section, frozen=True, kw_only=True):
    """The TensorFlow side: feeds in, gradients out."""

    count: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            description="trainers, each in a process of its own; a step takes data.batch_size samples of each and all share one "
            "dense update",
        ),
    ] = 1
    precision: Annotated[
        Literal["float32", "mixed_bfloat16", "mixed_float16"],
        Meta(
            description="what the layers compute in (weights stay float32): bfloat16 is much faster on processors with AMX and on "
            "GPUs (bench.stages); float16 with loss scaling"
        ),
    ] = "float32"
    optimizer: Annotated[str, Meta(description="optimizer of the dense weights: any Keras optimizer by name")] = "adam"
    learning_rate: Annotated[float, Meta(gt=0, le=100, description="its step size")] = 0.001
    clip_norm: Annotated[float, Meta(ge=0, le=1e30, description="bound on the L2 norm of each dense gradient; 0: none")] = 0.0
    clip_global_norm: Annotated[
        float, Meta(ge=0, le=1e30, description="bound on the L2 norm of all dense gradients together; 0: none")
    ] = 0.0
    clip_value: Annotated[float, Meta(ge=0, le=1e30, description="bound on every number of the dense gradients; 0: none")] = 0.0
    evaluate_steps: Annotated[
        NonNegative, Meta(description="steps between two evaluations on data.valid; 0: only at the end of every epoch")
    ] = 0
    patience: Annotated[
        NonNegative,
        Meta(
            description="evaluations on data.valid without a better one after which training ends; the run then ends with the best "
            "one's rows and weights; 0: trains to the end, and keeps what it ends with"
        ),
    ] = 0
    monitor: Annotated[Literal["auc", "logloss"], Meta(description="what is better: a higher AUC or a lower logloss")] = "auc"
    warmup_steps: Annotated[
        NonNegative, Meta(description="steps over which all learning rates, of rows and dense weights, rise to their values")
    ] = 0
    decay: Annotated[Literal["none", "linear", "cosine"], Meta(description="how they fall after that")] = "none"
    decay_steps: Annotated[Positive, Meta(description="steps after the warm-up until they have fallen to decay_to")] = 10_000
    decay_to: Annotated[float, Meta(ge=0, le=1, description="share of the learning rates that is left then")] = 0.0
    schedule: Annotated[
        str,
        Meta(
            description="instead of decay a Keras learning-rate schedule, as keras.optimizers.schedules.serialize gives it, in "
            "JSON; it multiplies all learning rates, so begin at 1; empty: none"
        ),
    ] = ""
    in_flight: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            description="batches looked up and not yet pushed; 1: synchronous and reproducible; staleness is at most in_flight - 1",
        ),
    ] = 2
    max_staleness: Annotated[
        int,
        Meta(
            ge=0,
            le=1023,
            description="pushes of the trainer's earlier batches that may be missing when a batch's rows are read; 0: none, as "
            "with one batch in flight, while the rows of the next are searched already; more than in_flight - 1 never are",
        ),
    ] = 1023
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
    threads: Annotated[int, Meta(ge=1, le=64, description="threads of a shard that share the work of one lookup or push")] = 1
    memory_share: Annotated[
        float, Meta(gt=0, le=1, description="share of the machine's available memory that slots without capacity_rows may fill")
    ] = 0.5
    load_from: Annotated[
        str,
        Meta(
            description="run directory whose measured load decides where the slots go; empty: an earlier run in run_dir, or else "
            "the first partition"
        ),
    ] = ""
    port: Annotated[int, Meta(ge=0, le=65_535, description="shard k listens on port + k; 0: any free port")] = 0


class Cluster(_Section, frozen=True, kw_only=True):
    """Where the roles run, and how they speak to each other."""

    mode: Annotated[
        Literal["embedded", "processes"],
        Meta(
            description="one process for everything, or local processes for hub, shards and trainers; with a scheduler, its workers"
        ),
    ] = "embedded"
    scheduler: Annotated[
        str, Meta(description="a running Dask cluster: its address, as in tcp://10.0.0.1:8786, or its scheduler file")
    ] = ""
    connect_timeout_s: Annotated[
        float, Meta(gt=0, le=86_400, description="seconds within which scheduler and shards must answer")
    ] = 15.0
    wait_s: Annotated[
        float, Meta(ge=0, le=86_400, description="seconds to wait for the workers that the run needs, once the scheduler answers")
    ] = 60.0
    interface: Annotated[
        str,
        Meta(description="network interface of the shards' and trainers' own traffic, as in eth0; empty: that of the Dask worker"),
    ] = ""
    lost_after_s: Annotated[
        float, Meta(gt=0, le=86_400, description="seconds without a sign of life after which a worker of the run is lost")
    ] = 30.0
    rpc_timeout_s: Annotated[
        float, Meta(gt=0, le=86_400, description="seconds for one lookup or push over the network, its repetitions included")
    ] = 60.0
    collective_timeout_s: Annotated[
        float, Meta(gt=0, le=86_400, description="seconds that a trainer waits for the others in one step")
    ] = 300.0
    max_message_mib: Annotated[int, Meta(ge=1, le=2047, description="the largest message between trainer and shard")] = 1024
    wire: Annotated[
        Literal["float32", "float16"], Meta(description="what embeddings and gradients are sent in between trainer and shard")
    ] = "float32"
    tls_ca: Annotated[str, Meta(description="PEM file of the authority that signed tls_cert; read on every machine")] = ""
    tls_cert: Annotated[str, Meta(description="PEM file of the machine's certificate for its shards and trainers")] = ""
    tls_key: Annotated[str, Meta(description="PEM file of the certificate's key")] = ""
    tls_name: Annotated[str, Meta(description="the name that all certificates carry; empty: each the address of its machine")] = ""
    token_file: Annotated[
        str, Meta(description="file with a secret that every lookup and push must carry; empty: one drawn for the run")
    ] = ""
    insecure: Annotated[bool, Meta(description="allow lookups and pushes between machines without TLS")] = False
    dashboard: Annotated[str, Meta(description="host:port of Dask's dashboard; port 0: any free one; empty: none")] = (
        "127.0.0.1:8787"
    )
    threads: Annotated[NonNegative, Meta(le=1024, description="threads for hub tasks; 0: one per core")] = 0

    @property
    def has_processes(self) -> bool:
        """Whether roles may be lost one by one."""
        return bool(self.scheduler) or self.mode == "processes"


class Status(_Section, frozen=True, kw_only=True):
    """What the run says about itself."""

    print_interval: Annotated[Positive, Meta(description="steps between metric lines")] = 100
    interval_s: Annotated[float, Meta(gt=0, le=1e9, description="seconds between [RunStatus] lines")] = 30.0
    trace_from: Annotated[NonNegative, Meta(description="the first step that `trace` shows")] = 0
    trace_batches: Annotated[NonNegative, Meta(description="batches that `trace` shows; 0: all")] = 0
    progress: Annotated[Literal["auto", "live", "plain"], Meta(description="auto: live on a terminal, plain lines elsewhere")] = (
        "auto"
    )


class Checkpoint(_Section, frozen=True, kw_only=True):
    """When a run is saved whole, so that it can go on from there; also at its end and when it is stopped."""

    url: Annotated[
        str,
        Meta(
            description="folder of the checkpoints, on a file system that all machines share, or an fsspec URL; empty: in run_dir"
        ),
    ] = ""
    every_steps: Annotated[NonNegative, Meta(description="steps between two checkpoints; 0: by time alone")] = 0
    every_s: Annotated[
        float, Meta(ge=0, le=1e9, description="seconds between two checkpoints; 0: by steps alone; both 0: none")
    ] = 600.0
    keep: Annotated[Positive, Meta(description="checkpoints that are kept, besides those that they need")] = 2
    full_every: Annotated[
        Positive,
        Meta(description="each so many checkpoints all rows are saved, between them only those that have changed; 1: always all"),
    ] = 1
    copy_mib: Annotated[
        Positive, Meta(description="memory of a shard for rows on their way to disk; training waits longer when they are more")
    ] = 2048
    on_error: Annotated[
        Literal["stop", "warn"], Meta(description="what a checkpoint that cannot be written does to the run: end it, or a remark")
    ] = "stop"
    recovery: Annotated[
        Literal["rollback", "partial", "none"],
        Meta(
            description="when a shard or trainer is lost: all go back to the last checkpoint, or only a lost shard does and the "
            "others go on, or the run ends"
        ),
    ] = "rollback"

    @property
    def is_on(self) -> bool:
        """Whether the run is saved at all."""
        return self.every_steps > 0 or self.every_s > 0


class Config(_Section, frozen=True, kw_only=True):
    """A run."""

    model: Annotated[
        str,
        Meta(
            description="dnn, lr, fm, wide_deep, deepfm, dcn, xdeepfm, autoint, dlrm, din, for several labels shared_bottom, mmoe, "
            'or your own: "my_module:build", a function from a ModelSpec to a keras.Model'
        ),
    ] = "dnn"
    epochs: Annotated[int, Meta(ge=1, le=1_000_000_000, description="passes over data.train")] = 1
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1, description="seed of shuffling, rows and dense weights")] = 0
    run_dir: Annotated[str, Meta(description="where the run leaves its files; empty: runs/<date>-<time>")] = ""
    resume: Annotated[bool, Meta(description="go on from the newest checkpoint in checkpoint.url that is sound")] = False
    resume_from: Annotated[str, Meta(description="go on from this checkpoint, or the newest in this folder of checkpoints")] = ""
    warm_start: Annotated[
        str,
        Meta(
            description="begin with the rows and dense weights of this checkpoint, or the newest in this folder of checkpoints, as "
            "far as they fit; what does not is listed"
        ),
    ] = ""
    trace: Annotated[
        str, Meta(description="file for the way of every batch, thread by thread, as Perfetto and Chrome show it; empty: none")
    ] = ""
    tensorboard: Annotated[
        str, Meta(description="folder for TensorBoard: metrics of every interval and curves of the evaluation; empty: none")
    ] = ""
    log_format: Annotated[
        Literal["text", "json"],
        Meta(description="what is printed: lines for people, or every line a JSON object for log collectors"),
    ] = "text"
    data: Data = Data()
    slot_default: SlotDefault = SlotDefault()
    slot: Annotated[tuple[Slot, ...], Meta(description="per-slot settings")] = ()
    net: Net = Net()
    trainer: Trainer = Trainer()
    ps: Ps = Ps()
    cluster: Cluster = Cluster()
    checkpoint: Checkpoint = Checkpoint()
    status: Status = Status()

    def slot_named(self, name: str) -> Slot:
        """The `[[slot]]` entry of that name, or the defaults under that name."""
        for slot in self.slot:
            if slot.name == name:
                return slot
        return Slot(name=name, **msgspec.structs.asdict(self.slot_default))

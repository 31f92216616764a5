"""`python -m bench.stages {criteo,dsp_ctr} [--net NET] [--precision P] [--json FILE]`: where the CPU time of a batch goes.

Batches of the generated data go through the stages of a run one after the other, in this process, nothing beside them but
TensorFlow's own threads; the table is warm: it has seen all files once. "run" is what the same stage took in a training, where all
stages share the cores: the median of its run status; a partition's time is cut into its batches.

A floor is what the stage cannot do without, by a bare library call or kernel in the same turn:

    ReadPartition     pyarrow's own read of the row groups, as it reads them by default
    DecodePartition   every value hashed once, in the cache, and every sign written once
    EmbeddingLookup   rows whose places are known, summed (`bench.shard.gather`); another batch's, so that they are as cold
    TrainStep         the matrix products of the dense layers, forward and backward, as TensorFlow multiplies them in this precision
    PushGrad          an Adagrad step of each occurrence of a row whose place is known (`bench.shard.scatter`)

Between them stand the checks, handing arrays to TensorFlow, and the metrics, which have no floor but their own call. What a run
uses beside all of these (Dask, queues, Python, caches that stages take from each other) is the last line: CPU of the run less the
sum of the stages.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from bench import machine
from bench.end_to_end import GENERATED, NETS, TRAINED, command_of, training
from bench.rival import PRECISIONS
from bench.shard import gather, places, scatter
from bench.workload import SignBatch
from flowps.arguments import parse
from flowps.batch import Batch, Float32
from flowps.config import Config
from flowps.heap import memory_kept
from flowps.hub.decode import Dense, cut, decode
from flowps.hub.hashing import hash_strings, hash_words
from flowps.hub.partition import Partition, list_files, partitions, read_table
from flowps.hub.schema import Schema, infer
from flowps.hub.stream import ReadSpec
from flowps.ps.client import PsClient
from flowps.ps.placement import place
from flowps.ps.shard import Shard
from flowps.trainer.metrics import StreamingMetrics
from flowps.trainer.models import ModelSpec, build
from flowps.trainer.step import Step

STAGES = {
    "ReadPartition": "",
    "DecodePartition": "DecodePartition",
    "EmbeddingLookup": "EmbeddingLookup",
    "StageFeed": "StageFeed",
    "TrainStep": "TrainStep",
    "PushGrad": "PushGrad",
    "Metrics": "",
}
"""Stages in the order of the travel, and what run status calls them."""
_WARM_UP = 4
_CACHED = 1 << 11  # values that, with their signs, a first-level cache has room for
_SEED, _UNFOLDED = np.uint64(7), np.uint64(0)


@dataclass
class Clock:
    """Seconds of stages and floors, per batch: wall clock, and CPU of all threads of the process."""

    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def timed(self, name: str, batches: float, call: Callable[[], Any]) -> Any:
        """What `call` gives, its time counted as that of so many batches."""
        wall, cpu = time.perf_counter(), time.process_time()
        found = call()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        self.seconds.setdefault(name, []).append((wall / batches, cpu / batches))
        return found

    def ms(self, name: str, what: int) -> float:
        """The median, without the first ones."""
        found = self.seconds[name]
        return float(np.median([of[what] for of in found[min(_WARM_UP, len(found) // 2) :]])) * 1e3


class Travel:
    """The stages of a run of `config`, and their floors."""

    def __init__(self, config: Config) -> None:
        self.config, self.clock = config, Clock()
        files = list_files(config.data.train, "data.train")
        self.schema: Schema = infer(files[0].columns, config)
        self.parts = partitions(files, config.data.partition_rows)
        slots = self.schema.slots
        rows = [max(1, sum(part.num_rows for part in self.parts))] * len(slots)
        self.shard = Shard(slots, rows, config.seed, 2)
        placement = place(slots, 1)
        self.client = PsClient([self.shard], placement, slots)
        spec = ModelSpec.of(
            [slot.name for slot in slots], [slot.dim for slot in slots], len(self.schema.dense), net=config.net
        )  # fmt: skip
        model = build(config.model, spec, config.trainer.precision, config.seed)
        self.step = Step(model, spec, config.trainer.optimizer, config.trainer.learning_rate, config.trainer.jit_compile)
        self.products = _products(model, config.data.batch_size, config.trainer.precision)
        self.metrics, self.tickets = StreamingMetrics(), 0
        self._has_strings = any(files[0].columns[slot.name] in (pa.string(), pa.large_string()) for slot in slots)
        self.spec = ReadSpec(
            self.schema, Dense(config.data.dense_fill, config.data.log1p), config.data.batch_size, True, config.seed
        )  # fmt: skip

    def run(self, turns: int) -> None:
        """Warm the table with all partitions, then time so many, of which every second batch is the floors'."""
        for part in self.parts:
            for batch in self._batches(part, Clock()):
                self._learn(batch, Clock())
        for turn in range(turns):
            part = self.parts[turn % len(self.parts)]
            batches = [batch for batch in self._batches(part, self.clock) if batch.size == self.config.data.batch_size]
            for mine, floors in zip(batches[::2], batches[1::2], strict=False):
                self._learn(mine, self.clock)
                self._floors(floors)

    def _batches(self, part: Partition, clock: Clock) -> list[Batch]:
        size = self.config.data.batch_size
        count = part.num_rows / size
        table = clock.timed("ReadPartition", count, lambda: read_table(part, self.spec.read, self.spec.strings))
        clock.timed("floor ReadPartition", count, lambda: _bare_read(part, self.schema.columns))
        order = np.random.default_rng(self.tickets).permutation(part.num_rows)
        bounds = [*range(0, part.num_rows, size), part.num_rows]
        found: list[Batch] = clock.timed(
            "DecodePartition", count, lambda: cut(decode(table, self.schema, self.spec.dense, part.url), order, bounds)
        )
        count_signs = sum(len(batch.signs) for batch in found)
        floor = _hash_strings if self._has_strings else _hash_words
        clock.timed("floor DecodePartition", count, lambda: floor(count_signs))
        return found

    def _learn(self, batch: Batch, clock: Clock) -> None:
        ticket, self.tickets = self.tickets, self.tickets + 1
        embeddings: Float32 = clock.timed("EmbeddingLookup", 1, lambda: self.client.lookup(ticket, batch, training=True))
        inputs = clock.timed("StageFeed", 1, lambda: self.step.stage(batch, embeddings))
        _, logits, gradient = clock.timed("TrainStep", 1, lambda: self.step.train(batch, embeddings, 1.0, inputs))
        grads = gradient.numpy()
        clock.timed("PushGrad", 1, lambda: self.client.push(ticket, grads))
        clock.timed("Metrics", 1, lambda: self.metrics.update(batch.labels, logits))

    def _floors(self, batch: Batch) -> None:
        (_, table), *_ = self.shard._tables
        rows, bounds = places(self.shard, SignBatch(batch.signs, batch.offsets))
        flat = np.zeros(batch.size * self.client._route.width, np.float32)
        last, arena = len(bounds) - 1, table.memory.arena
        # In the order of the stages, so that each finds the caches as its stage does: full of what others have left.
        self.clock.timed("floor TrainStep", 1, self.products)
        self.clock.timed("floor EmbeddingLookup", 1, lambda: gather(rows, bounds, 0, last, arena, flat))
        flat[:] = 1e-6
        self.products()
        self.clock.timed("floor PushGrad", 1, lambda: scatter(rows, bounds, 0, last, arena, flat, np.float32(1e-6)))


def _bare_read(part: Partition, columns: Sequence[str]) -> Any:
    with pq.ParquetFile(part.url) as file:
        return file.read_row_groups(list(part.row_groups), columns=columns, use_threads=False)


def _hash_words(count: int) -> None:
    """So many words hashed in the cache, and their signs written."""
    words, out = np.arange(_CACHED, dtype=np.uint64), np.empty(count, np.uint64)
    for at in range(0, count, _CACHED):
        signs = out[at : at + _CACHED]
        hash_words(words[: len(signs)], _SEED, _UNFOLDED, signs)


def _hash_strings(count: int) -> None:
    """So many strings of eight characters hashed in the cache, and their signs written."""
    text, starts, out = np.zeros(8 * _CACHED, np.uint8), np.arange(_CACHED + 1) * 8, np.empty(count, np.uint64)
    for at in range(0, count, _CACHED):
        signs = out[at : at + _CACHED]
        hash_strings(text, starts[: len(signs) + 1], _SEED, _UNFOLDED, signs)


def _products(model: Any, size: int, precision: str) -> Callable[[], Any]:
    """The matrix products of a step of `model`: of each dense layer its outputs, the gradient of its weights and of its inputs."""
    kind = "bfloat16" if precision == "mixed_bfloat16" else "float32"
    shapes = [tuple(variable.shape) for variable in model.trainable_variables if len(variable.shape) == 2]
    layers = [
        tuple(tf.cast(tf.random.normal(shape, stddev=0.01), kind) for shape in ((size, width), (width, units), (size, units)))
        for width, units in shapes
    ]

    @tf.function
    def multiply(of: Any) -> Any:
        return [
            [tf.matmul(x, w), tf.matmul(x, g, transpose_a=True), tf.matmul(g, w, transpose_b=True)] for x, w, g in of
        ]  # fmt: skip

    return lambda: multiply(layers)[0][0].numpy()[0, 0]


def in_a_run(arguments: list[str], batch_size: int, partition_rows: int) -> dict[str, Any]:
    """Medians of the stages of a training in ms per batch, its CPU per batch, and its rate."""
    with training(arguments, {}) as (run_dir, _):
        finished = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["finished"]
        status = json.loads((run_dir / "status.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    stages = {name: found["p50_us"] / 1e3 for name, found in status["stages"].items()}
    stages["DecodePartition"] *= batch_size / partition_rows
    return {
        "stages_ms": stages,
        "cpu_ms": finished["steady_cpu_s_per_million"] * batch_size / 1e3,
        "examples_per_s": finished["steady_examples_per_s"],
    }


def measure(workload: str, net: str, precision: str, turns: int, data: Path | None = None) -> dict[str, Any]:
    """All stages of a workload; `data`: the folder of its files, instead of those that are generated."""
    arguments = command_of(workload, net, data, ["--trainer.precision", precision])
    config = parse("flowps.train", "", arguments)
    ran = in_a_run(arguments, config.data.batch_size, config.data.partition_rows)
    with memory_kept():  # as in a run
        travel = Travel(config)
        travel.run(turns)
    clock, stages = travel.clock, []
    for name, known_as in STAGES.items():
        floor = f"floor {name}"
        has_floor = floor in clock.seconds
        stages.append(
            {
                "stage": name,
                "wall_ms": clock.ms(name, 0),
                "cpu_ms": clock.ms(name, 1),
                "floor_cpu_ms": clock.ms(floor, 1) if has_floor else None,
                "ratio": clock.ms(name, 1) / clock.ms(floor, 1) if has_floor else None,
                "run_wall_ms": ran["stages_ms"].get(known_as),
            }
        )
    return {
        "workload": workload,
        "net": net,
        "precision": precision,
        "batch_size": config.data.batch_size,
        "stages": stages,
        "sum_cpu_ms": sum(of["cpu_ms"] for of in stages),
        "run_cpu_ms": ran["cpu_ms"],
        "examples_per_s": ran["examples_per_s"],
        "turns": turns,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The stages of some measurements, as a Markdown table for each."""
    lines: list[str] = []
    for of in result["workloads"]:
        lines += [
            f"`{of['workload']}`, net {of['net']}, {of['precision']}, batches of {of['batch_size']:,}:",
            "",
            "| stage | CPU, ms per batch | wall, ms | floor, CPU ms | × floor | in a run, wall ms, P50 |",
            "|---|---|---|---|---|---|",
        ]
        for stage in of["stages"]:
            floor = ("–", "–") if stage["ratio"] is None else (f"{stage['floor_cpu_ms']:.2f}", f"{stage['ratio']:.2f}")
            run = "–" if stage["run_wall_ms"] is None else f"{stage['run_wall_ms']:.2f}"
            lines.append(f"| {stage['stage']} | {stage['cpu_ms']:.2f} | {stage['wall_ms']:.2f} | {' | '.join(floor)} | {run} |")
        rest = of["run_cpu_ms"] - of["sum_cpu_ms"]
        lines += [
            f"| everything else in a run | {rest:.2f} | | | | |",
            f"| **a run** ({of['examples_per_s']:,.0f} examples/s) | **{of['run_cpu_ms']:.2f}** | | | | |",
            "",
        ]
    return "\n".join(lines).rstrip()


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=GENERATED, nargs="?", help="default: both, in both precisions")
    parser.add_argument("--net", choices=list(NETS), help="default: small for criteo, dnn for dsp_ctr")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: both")
    parser.add_argument("--turns", type=int, default=12, help="partitions to time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args()
    found = [
        measure(workload, options.net or TRAINED[workload].net, precision, options.turns)
        for workload in ([options.workload] if options.workload else GENERATED)
        for precision in ([options.precision] if options.precision else PRECISIONS)
    ]
    result = {"workloads": found, "machine": machine.describe()}
    print(markdown(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`python -m bench.hundred [--workers N ...] [--json FILE]`: on paper, what many workers do, and what bounds them first.

No measurement of its own: CPU per batch of each stage from `stages.json`, CPU of the wire per call and per byte from `rpc.json`
(least squares over its cases, flowps's own work taken off), and, to see how far the model can be believed, what `stages.json` and
`roles.json` have measured of runs on this machine.

    hub       ReadPartition, DecodePartition, and sending the signs
    shard     EmbeddingLookup, PushGrad; the wire: signs in, embeddings out, gradients in; split evenly, by `--busiest` at worst
    trainer   StageFeed, TrainStep, Metrics; the wire, of both neighbours; a call to every shard for a lookup and one for a push

A byte's CPU is half the sender's and half the receiver's. A worker is a machine with the measured one's cores and one role; of all
ways to give out roles the best is taken. A trainer's step also waits for the ring that adds up dense gradients (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms", 2009): 2 (T - 1) / T times the dense weights, and 2 (T - 1) messages. What bounds a
cluster is the smallest of: hubs, shards, trainers (CPU); the network card of a trainer, shard or hub; tasks of Dask's scheduler.
Left out: stragglers (all trainers wait for the slowest one's step), and reading from a store that is slower than a disk.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.contender import DIM
from bench.rival import NETS
from flowps.synthetic import WORKLOADS

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Cluster:
    """What all workers have."""

    cores: int = 2
    network_gbit: float = 10.0
    latency_us: float = 50.0
    tasks_per_s: float = 1000.0
    busiest: float = 1.1

    @property
    def bytes_per_s(self) -> float:
        """Of a network card, one way."""
        return self.network_gbit * 1e9 / 8


@dataclass(frozen=True)
class Work:
    """What a batch takes: CPU seconds of each role without the wire, bytes on it; and CPU seconds of the wire per call and byte."""

    batch_size: int
    partition_batches: float
    hub_s: float
    shard_s: float
    trainer_s: float
    sign_bytes: float
    pooled_bytes: float
    dense_bytes: float
    call_s: float
    byte_s: float


def wire() -> tuple[float, float]:
    """CPU seconds per call and per byte, both sides together."""
    cases = [of for of in _read("rpc.json")["results"] if of["keep_memory"]]
    bytes_of = np.array([of["request_bytes"] + of["reply_bytes"] for of in cases])
    cpu_s = np.array([of["flowps"]["cpu_ms"] - of["local"]["cpu_ms"] for of in cases]) / 1e3
    byte_s, call_s = np.polyfit(bytes_of, cpu_s, 1)
    return max(0.0, float(call_s)), float(byte_s)


def work_of(stages: dict[str, Any]) -> Work:
    """Of a workload and precision as measured."""
    cpu_s = {of["stage"]: of["cpu_ms"] / 1e3 for of in stages["stages"]}
    data = WORKLOADS[stages["workload"]]()
    size, slots, signs = stages["batch_size"], len(data.slots), sum(slot.mean_signs for slot in data.slots)
    widths = [slots * DIM + len(data.dense), *NETS[stages["net"]][1], 1]
    dense_weights = sum((above + 1) * below for above, below in pairwise(widths))
    call_s, byte_s = wire()
    return Work(
        size, 16.0, cpu_s["ReadPartition"] + cpu_s["DecodePartition"], cpu_s["EmbeddingLookup"] + cpu_s["PushGrad"],
        cpu_s["StageFeed"] + cpu_s["TrainStep"] + cpu_s["Metrics"], size * (signs * 8 + slots * 4), size * slots * DIM * 4.0,
        dense_weights * 4.0, call_s, byte_s,
    )  # fmt: skip


def bounds(work: Work, cluster: Cluster, trainers: int, shards: int, hubs: int) -> dict[str, float]:
    """Batches per second that each part allows."""
    carried = work.sign_bytes + 2 * work.pooled_bytes  # between trainer and shards
    calls_s = 2 * shards * work.call_s
    hub_s = work.hub_s + work.sign_bytes * work.byte_s / 2
    shard_s = work.shard_s + (carried * work.byte_s + calls_s) / 2
    trainer_s = work.trainer_s + ((carried + work.sign_bytes) * work.byte_s + calls_s) / 2
    ring_s = 2 * (trainers - 1) * (work.dense_bytes / trainers / cluster.bytes_per_s + cluster.latency_us / 1e6)
    card = cluster.bytes_per_s
    return {
        "hubs": hubs * cluster.cores / hub_s,
        "shards": shards * cluster.cores / shard_s / cluster.busiest,
        "trainers": trainers / (trainer_s / cluster.cores + ring_s),
        # Both ways are separate; a trainer gets signs and embeddings, a shard gets signs and gradients.
        "network of trainers": trainers * card / (work.sign_bytes + work.pooled_bytes),
        "network of shards": shards * card / (work.sign_bytes + work.pooled_bytes) / cluster.busiest,
        "network of hubs": hubs * card / work.sign_bytes,
        "Dask's scheduler": cluster.tasks_per_s * work.partition_batches,
    }


def best(work: Work, cluster: Cluster, workers: int) -> dict[str, Any]:
    """The roles of so many workers that give most, and what bounds them."""
    ways = [(trainers, shards) for trainers in range(1, workers - 1) for shards in range(1, workers - trainers)]
    found = max(
        ((trainers, shards, workers - trainers - shards) for trainers, shards in ways),
        key=lambda roles: min(bounds(work, cluster, *roles).values()),
    )
    of = bounds(work, cluster, *found)
    order = sorted(of, key=of.__getitem__)
    return {
        "workers": workers,
        **dict(zip(("trainers", "shards", "hubs"), found, strict=True)),
        "examples_per_s": of[order[0]] * work.batch_size,
        "bound_by": order[0],
        "examples_per_s_of_each": {name: of[name] * work.batch_size for name in order},
    }


def check(work: Work, stages: dict[str, Any], cores: int) -> dict[str, Any]:
    """Predicted and measured: one process, in the same run as the stages; and processes over one process, of `roles.json`."""
    alone = work.hub_s + work.shard_s + work.trainer_s
    carried = 2 * work.sign_bytes + 2 * work.pooled_bytes  # hub to trainer, trainer to shards, and back
    roles = next((of for of in _read("roles.json")["workloads"] if of["workload"] == stages["workload"]), None)
    return {
        "one_process_predicted": cores / alone * work.batch_size,
        "one_process_measured": stages["examples_per_s"],
        "processes_share_predicted": alone / (alone + carried * work.byte_s + 2 * 2 * work.call_s),
        "processes_share_measured": roles["ratio"] if roles and stages["precision"] == "float32" else None,
    }


def model(cluster: Cluster, workers: list[int]) -> dict[str, Any]:
    """All workloads and precisions of `stages.json`."""
    measured = _read("stages.json")
    found = []
    for stages in measured["workloads"]:
        work = work_of(stages)
        found.append(
            {
                **{key: stages[key] for key in ("workload", "net", "precision")},
                "check": check(work, stages, measured["machine"]["cores"]),
                "clusters": [best(work, cluster, n) for n in workers],
            }
        )
    call_s, byte_s = wire()
    told = {"cores": cluster.cores, "network_gbit": cluster.network_gbit, "latency_us": cluster.latency_us}
    return {
        "assumed": {**told, "tasks_per_s": cluster.tasks_per_s, "busiest": cluster.busiest},
        "wire": {"call_cpu_ms": call_s * 1e3, "megabyte_cpu_ms": byte_s * 1e9},
        "workloads": found,
        "machine": measured["machine"],
    }


def markdown(result: dict[str, Any]) -> str:
    """What the model says, and what it says of runs that were measured."""
    lines = [
        "| workload | precision | workers | trainers / shards / hubs | examples/s | bound by | then by |",
        "|---|---|---|---|---|---|---|",
    ]
    for of in result["workloads"]:
        for cluster in of["clusters"]:
            names = list(cluster["examples_per_s_of_each"])
            after = f"{names[1]} ({cluster['examples_per_s_of_each'][names[1]]:,.0f})"
            lines.append(
                f"| `{of['workload']}` | {of['precision']} | {cluster['workers']} "
                f"| {cluster['trainers']} / {cluster['shards']} / {cluster['hubs']} | {cluster['examples_per_s']:,.0f} "
                f"| {cluster['bound_by']} | {after} |"
            )
    lines += [
        "",
        "| workload | precision | one process, examples/s: predicted / measured "
        "| in processes with 2 shards, share of that: predicted / measured |",
        "|---|---|---|---|",
    ]
    for of in result["workloads"]:
        c = of["check"]
        share = "–" if c["processes_share_measured"] is None else f"{c['processes_share_measured']:.2f}"
        lines.append(
            f"| `{of['workload']}` | {of['precision']} | {c['one_process_predicted']:,.0f} / {c['one_process_measured']:,.0f} "
            f"| {c['processes_share_predicted']:.2f} / {share} |"
        )
    told, of_wire = result["assumed"], result["wire"]
    lines += [
        "",
        f"Assumed: workers of {told['cores']} cores, cards of {told['network_gbit']:g} Gbit/s, {told['latency_us']:g} µs "
        f"a message, a busiest shard {told['busiest']:g} times as busy as the mean. Measured, both ends together: "
        f"{of_wire['call_cpu_ms']:.2f} ms of CPU for a call, {of_wire['megabyte_cpu_ms']:.2f} ms for a megabyte.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Compute, print, and write JSON when asked."""
    default = Cluster()
    parser = argparse.ArgumentParser(
        prog="python -m bench.hundred", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 10, 30, 100], help="at least 3: one of each role")
    parser.add_argument("--cores", type=int, default=default.cores, help="of a worker, each as fast as a measured one")
    parser.add_argument("--network-gbit", type=float, default=default.network_gbit, help="of a worker's card, each way")
    parser.add_argument("--latency-us", type=float, default=default.latency_us, help="of a message")
    parser.add_argument("--tasks-per-s", type=float, default=default.tasks_per_s, help="that Dask's scheduler does")
    parser.add_argument("--busiest", type=float, default=default.busiest, help="load of the busiest shard over the mean")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args()
    if min(options.workers) < 3:
        parser.error("--workers: a cluster has a trainer, a shard and a hub at least, each a worker")
    cluster = Cluster(options.cores, options.network_gbit, options.latency_us, options.tasks_per_s, options.busiest)
    result = model(cluster, options.workers)
    print(markdown(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()

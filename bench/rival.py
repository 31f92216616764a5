"""`python -m bench.rival {keras,torch} {criteo,dsp_ctr} --train FILE ... --test FILE ...`: a workload trained without flowps.

The same net, written plainly in Keras (`bench.rival_keras`) or in PyTorch (`bench.rival_torch`), over a fixed table of hashed
values (`bench.rival_reader`): what a good engineer would write by hand. Values may collide there, no row is added and none is
evicted, which is less than flowps does. Rows and dense weights start from the same distributions, and learn by the same optimizers
at the same rates.

`python -m bench.end_to_end WORKLOAD --rival NAME` has it trained beside flowps, by turns: `against`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench import machine
from bench.rival_reader import Samples, Shape, ahead, batches
from flowps.arguments import parse
from flowps.batch import Float32
from flowps.config import Config, SlotDefault


@dataclass(frozen=True)
class Workload:
    """How a data set is trained on; of every slot so many buckets."""

    batch_size: int
    net: str
    log1p: bool
    buckets: int


# More buckets than a slot has values in the generated files: 100,001, and what a million samples have of `criteo`'s million.
WORKLOADS = {"criteo": Workload(4096, "small", True, 1 << 18), "dsp_ctr": Workload(1024, "dnn", False, 1 << 17)}
NETS = {"small": ("dnn", (128, 64)), "deepfm": ("deepfm", (400, 400, 400)), "dnn": ("dnn", (512, 256))}
"""Model and hidden units."""
PRECISIONS = ("float32", "mixed_bfloat16")
RIVALS = {"keras": "Keras", "torch": "PyTorch"}
FIGURES = ("examples_per_s", "cpu_s_per_million", "run_cpu_s", "peak_rss_bytes", "first_step_s", "trainer_wait_share", "test_auc")
COUNTED = {
    "examples_per_s": "steady state",
    "cpu_s_per_million": "steady state, the process that trains",
    "run_cpu_s": "all processes of the command, from start to end",
    "peak_rss_bytes": "the process that had most",
    "ratio": "flowps over the rival: of the medians, and of the rounds the least and the most",
}
_SAME = {
    "slot_default": "dim pooling optimizer learning_rate initial_accumulator epsilon initializer init_scale init_by_dim",
    "net": "dropout batch_norm l2",
    "trainer": "count optimizer learning_rate warmup_steps decay",
}
"""Knobs that a rival has in their defaults only."""
_WARM_STEPS = 20  # as of `flowps.trainer.hook.SteadyClock`
_AHEAD = 8  # batches


class Rival(Protocol):
    """A table, a net and their optimizers. The calls come from one thread, but for those of `prepare`."""

    def prepare(self, samples: Samples) -> tuple[Any, ...]:
        """A batch for the others."""

    def train(self, batch: tuple[Any, ...]) -> float:
        """Take one step; its loss."""

    def predict(self, batch: tuple[Any, ...]) -> Float32:
        """The logits."""


def main() -> int:
    """Train as the command line says."""
    started = time.time()
    parser = argparse.ArgumentParser(
        prog="python -m bench.rival", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rival", choices=list(RIVALS))
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--net", choices=list(NETS), help="dense network (default: small for criteo, dnn for dsp_ctr)")
    parser.add_argument("--train", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--test", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--batch-size", type=int, help="samples of a step (default: 4096 for criteo, 1024 for dsp_ctr)")
    parser.add_argument("--buckets", type=int, help="of a slot, a power of two (default: 2^18 for criteo, 2^17 for dsp_ctr)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="what the net computes in (default: float32)")
    parser.add_argument("--epochs", type=int, default=1, help="default: 1")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    require(options.rival)
    how = WORKLOADS[options.workload]
    shape = Shape.of(options.train[0], options.buckets or how.buckets)
    model, hidden = NETS[options.net or how.net]
    made = importlib.import_module(f"bench.rival_{options.rival}").Rival(
        shape, model, hidden, SlotDefault(), options.precision, options.seed
    )
    size = options.batch_size or how.batch_size
    found = train(made, shape, options.train, size, how.log1p, options.epochs, options.seed)
    found["first_step_s"] = found.pop("first_step_at") - started
    labels, logits = predict(made, shape, options.test, size, how.log1p)
    found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["run_cpu_s"] = time.process_time()
    found["test_auc"] = float(importlib.import_module("sklearn.metrics").roc_auc_score(labels, logits))  # 0.1 GiB, not counted
    text = json.dumps({**found, "buckets": shape.buckets, "machine": described(options.rival)}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


def require(rival: str) -> None:
    """End the command where the rival cannot run."""
    if rival == "torch" and importlib.util.find_spec("torch") is None:
        raise SystemExit("the rival torch needs PyTorch, which is not installed: pip install torch")


def described(rival: str) -> dict[str, Any]:
    """The machine, and the rival's version where it is not one of flowps's packages."""
    found: dict[str, Any] = machine.describe()
    if rival == "torch":
        found["versions"] = {**found["versions"], "torch": version("torch")}
    return found


def train(
    rival: Rival, shape: Shape, files: Sequence[str], size: int, log1p: bool, epochs: int = 1, seed: int = 0
) -> dict[str, Any]:  # fmt: skip
    """Take a step with every batch; the rates of those after the first steps, 0 where there are none."""
    steps = examples = steady = 0
    wall = cpu = waited = wait = first_step_at = 0.0
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch])
        read = map(rival.prepare, batches(files, shape, size, log1p=log1p, shuffle=order))
        with closing(ahead(read, _AHEAD)) as prepared:
            asked = time.perf_counter()
            for batch in prepared:
                waited += time.perf_counter() - asked
                rival.train(batch)
                steps += 1
                examples += len(batch[-1])
                if steps == 1:
                    first_step_at = time.time()
                if steps == _WARM_STEPS:
                    wall, cpu, wait, steady = time.perf_counter(), time.process_time(), waited, examples
                asked = time.perf_counter()
    counted = examples - steady if steps > _WARM_STEPS else 0
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "examples_per_s": counted / wall if counted else 0.0,
        "cpu_s_per_million": cpu / counted * 1e6 if counted else 0.0,
        "trainer_wait_share": (waited - wait) / wall if counted else 0.0,
        "first_step_at": first_step_at,
        "steps": steps,
        "examples": examples,
    }


def predict(rival: Rival, shape: Shape, files: Sequence[str], size: int, log1p: bool) -> tuple[Float32, Float32]:
    """Labels and logits of all samples of these files."""
    logits, labels = list[Float32](), list[Float32]()
    for samples in batches(files, shape, size, log1p=log1p):
        logits.append(rival.predict(rival.prepare(samples)))
        labels.append(samples.labels)
    return np.concatenate(labels), np.concatenate(logits)


# --- beside flowps --------------------------------------------------------------------------------------------------------


def against(
    rival: str, workload: str, net: str, command: Sequence[str], rounds: int, run: Callable[[], dict[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    """flowps and the rival by turns, each round in the other order.

    command   arguments of flowps.train, of which the rival takes those that hold for it too
    run       trains with flowps; its figures
    """
    config = parse("flowps.train", "", command)
    arguments = arguments_of(rival, workload, net, config)
    found: dict[str, list[dict[str, Any]]] = {"flowps": [], rival: []}
    for turn in range(rounds):
        for side in list(found)[:: -1 if turn % 2 else 1]:
            found[side].append(run() if side == "flowps" else run_rival(arguments))
    return {
        "workload": workload,
        "net": net,
        "precision": config.trainer.precision,
        "batch_size": config.data.batch_size,
        "rounds": rounds,
        **compared(workload, rival, found["flowps"], found[rival]),
        "counted": COUNTED,
        "machine": described(rival),
    }


def arguments_of(rival: str, workload: str, net: str, config: Config) -> list[str]:
    """The rival's command line for what this run of flowps does; ends the command where the rival does not do it."""
    for section, names in _SAME.items():
        for name in names.split():
            found, default = (getattr(getattr(of, section), name) for of in (config, Config()))
            if found != default:
                raise SystemExit(f"--{section}.{name} {found}: a rival has {default} only; leave the knob out")
    if config.slot:
        raise SystemExit(f"--slot.{config.slot[0].name}: a rival has no knobs of single slots; leave them out")
    if (config.model, config.net.hidden) != NETS[net]:
        raise SystemExit(f"--model {config.model}, --net.hidden {config.net.hidden}: a rival has the nets {', '.join(NETS)} only")
    if config.trainer.precision not in PRECISIONS:
        raise SystemExit(f"--trainer.precision {config.trainer.precision}: a rival has {', '.join(PRECISIONS)} only")
    return [
        rival, workload, "--net", net, "--train", *config.data.train, "--test", *config.data.test,
        "--batch-size", str(config.data.batch_size), "--precision", config.trainer.precision, "--epochs", str(config.epochs),
        "--seed", str(config.seed),
    ]  # fmt: skip


def run_rival(arguments: Sequence[str]) -> dict[str, Any]:
    """One training, in a process of its own; its figures."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "result.json"
        ended = subprocess.run(
            [sys.executable, "-m", "bench.rival", *arguments, "--json", str(to)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}, check=False,
        )  # fmt: skip
        if ended.returncode:
            raise SystemExit(f"the rival failed with status {ended.returncode}: {ended.stderr.decode()}")
        found: dict[str, Any] = json.loads(to.read_text(encoding="utf-8"))
    del found["machine"]
    return found


def compared(
    workload: str, rival: str, ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    """Medians of both sides, and flowps over the rival: of the medians, and of the rounds the least and the most."""
    if not all(run["examples_per_s"] for run in (*ours, *theirs)):
        raise SystemExit(f"{workload}: too few steps for a steady state; use more data")
    medians = [{name: statistics.median(run[name] for run in runs) for name in FIGURES} for runs in (ours, theirs)]
    each = [of_ours["examples_per_s"] / of_theirs["examples_per_s"] for of_ours, of_theirs in zip(ours, theirs, strict=True)]
    return {
        "flowps": {**medians[0], "runs": list(ours)},
        "rival": {"name": rival, **medians[1], "runs": list(theirs)},
        "ratio": medians[0]["examples_per_s"] / medians[1]["examples_per_s"],
        "ratio_least": min(each),
        "ratio_most": max(each),
        "cpu_ratio": medians[0]["cpu_s_per_million"] / medians[1]["cpu_s_per_million"],
    }


def markdown(*results: Mapping[str, Any]) -> str:
    """What `against` has found, as a Markdown table."""
    lines = [
        "| workload | net | precision | trained by | examples/s | × the rival | CPU s per million | peak memory | trainer waited "
        "| test AUC |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for of in results:
        for side, name in (("flowps", "flowps"), ("rival", RIVALS[of["rival"]["name"]])):
            r = of[side]
            speeds = [run["examples_per_s"] for run in r["runs"]]
            ratio = f"{of['ratio']:.2f} ({of['ratio_least']:.2f}–{of['ratio_most']:.2f})" if side == "flowps" else "1"
            lines.append(
                f"| `{of['workload']}` | {of['net']} | {of['precision']} | {name} "
                f"| {r['examples_per_s']:,.0f} ({min(speeds):,.0f}–{max(speeds):,.0f}) | {ratio} | {r['cpu_s_per_million']:.1f} "
                f"| {r['peak_rss_bytes'] / 2**30:.1f} GiB | {r['trainer_wait_share']:.1%} | {r['test_auc']:.4f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

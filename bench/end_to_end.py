"""`python -m bench.end_to_end {criteo,dsp_ctr,ml1m}`: train a workload as a user would and report speed, memory and quality.

Each run is the command `python -m flowps.train` in a process of its own. Steady-state figures leave out its first steps and the
evaluation; the figures of several runs are given as medians, with all of them under "runs". The data is generated once, seeded,
and reused; `--data DIR` takes files of the same columns made elsewhere (`train*` and `test*` Parquet files, or folders of those
names): list columns and strings are slots, numbers are dense. `ml1m` (MovieLens 1M, all columns slots) needs it.

`--mode processes` gives hub, shards and trainer processes of their own, on this machine. `--compare` runs both modes by turns, each
round in the other order, and reports what of the one process's speed is left. `--rival keras` and `--rival torch` train the same
net without flowps too (`bench.rival`), likewise by turns. What each figure counts is under "counted".
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bench import machine, rival
from flowps.synthetic import WORKLOADS, generate


@dataclass(frozen=True)
class Workload:
    """How a generated data set is trained on."""

    batch_size: int
    net: str
    log1p: bool
    numbers: str = "dense"  # what columns of plain numbers are


TRAINED = {name: Workload(of.batch_size, of.net, of.log1p) for name, of in rival.WORKLOADS.items()}
TRAINED["ml1m"] = Workload(4096, "small", False, "slots")
GENERATED = tuple(name for name in TRAINED if name in WORKLOADS)
NETS = {net: ["--model", model, "--net.hidden", *map(str, hidden)] for net, (model, hidden) in rival.NETS.items()}
MODES = {"embedded": 1, "processes": 2}  # and how many shards each has
TARGET = 0.5  # of the speed in one process, for several
COUNTED = {
    "examples_per_s": "steady state",
    "cpu_s_per_million": "steady state; the process that trains: everything in the mode embedded, no shards and no hub otherwise",
    "tree_cpu_s_per_million": "all processes of the command, from the first line of metrics of the training to its last",
    "run_cpu_s": "all processes of the command, from start to end",
    "peak_rss_bytes": "the process that had most",
    "peak_rss_sum_bytes": "the peaks of all processes until the evaluation has ended, summed; shared pages count in each",
}
_MEDIANS = (
    "examples_per_s",
    "cpu_s_per_million",
    "tree_cpu_s_per_million",
    "run_cpu_s",
    "peak_rss_bytes",
    "peak_rss_sum_bytes",
    "first_step_s",
    "trainer_wait_share",
    "empty_reads",
    "test_auc",
)
_LOOK_S = 0.05  # between two looks at what a run has written


def main() -> int:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.end_to_end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="After --: more knobs for flowps.train, as in -- --trainer.in_flight 4",
    )  # fmt: skip
    parser.add_argument("workload", choices=list(TRAINED), nargs="?", help="with --compare: all of them when left out")
    parser.add_argument("--net", choices=list(NETS), help="dense network (default: small for criteo, dnn for dsp_ctr)")
    parser.add_argument("--mode", choices=list(MODES), default="embedded", help="where the roles run")
    parser.add_argument("--shards", type=int, help="shards (default: 1, with --mode processes or --compare 2)")
    parser.add_argument("--compare", action="store_true", help="both modes by turns; --runs rounds")
    parser.add_argument("--rival", choices=list(rival.RIVALS), help="flowps and the same without it by turns; --runs rounds")
    parser.add_argument("--data", type=Path, help="folder of the data (default: data/bench/WORKLOAD, generated when missing)")
    parser.add_argument("--runs", type=int, default=3, help="runs to take the medians of (default: 3)")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments, knobs = sys.argv[1:], []
    if "--" in arguments:  # argparse takes them for arguments of its own, depending on what stands before
        at = arguments.index("--")
        arguments, knobs = arguments[:at], arguments[at + 1 :]
    options = parser.parse_args(arguments)
    if options.compare and options.rival:
        parser.error("give --compare or --rival")
    if options.compare:
        workloads = [options.workload] if options.workload else list(GENERATED)
        result = compare(workloads, options.net, options.data, options.runs, options.shards or MODES["processes"], knobs)
    elif options.workload:
        how = options.mode, options.data, options.runs, knobs, options.shards or MODES[options.mode]
        beside = functools.partial(measure_beside, options.rival) if options.rival else measure
        result = beside(options.workload, options.net, *how)
    else:
        parser.error("name a workload, or give --compare")
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


def measure(
    workload: str, net: str | None, mode: str, data: Path | None, runs: int, knobs: Sequence[str], shards: int = 1
) -> dict[str, Any]:  # fmt: skip
    """The result of `runs` warm runs and one with a cold numba cache."""
    net = net or TRAINED[workload].net
    command = command_of(workload, net, data, [*roles(mode, shards), *knobs])
    with tempfile.TemporaryDirectory() as cold:
        # One file is enough for the first step, and the kernels are compiled whatever comes after.
        first = first_file(command)
        _run(first, {})  # brings TensorFlow's files into memory, so that only numba's cache is cold
        cold_first_step_s = _run(first, {"NUMBA_CACHE_DIR": cold})["first_step_s"]
    found = [_run(command, {}) for _ in range(runs)]
    _check_steady(workload, found)
    return {
        "workload": workload,
        "net": net,
        "mode": mode,
        "shards": shards,
        **_medians(found),
        "first_step_cold_s": cold_first_step_s,
        "best_auc": found[0]["best_auc"],
        "knobs": list(knobs),
        "counted": COUNTED,
        "runs": found,
        "machine": machine.describe(),
    }


def measure_beside(
    other: str, workload: str, net: str | None, mode: str, data: Path | None, rounds: int, knobs: Sequence[str], shards: int
) -> dict[str, Any]:  # fmt: skip
    """flowps and a rival by turns."""
    rival.require(other)
    if workload not in rival.WORKLOADS:
        raise SystemExit(f"--rival: the rivals train {', '.join(rival.WORKLOADS)} only, not {workload}")
    net = net or TRAINED[workload].net
    command = command_of(workload, net, data, [*roles(mode, shards), *knobs])
    with training(first_file(command, evaluate=False), {}):  # kernels compiled, TensorFlow's files in memory
        pass
    found = rival.against(other, workload, net, command, rounds, lambda: _run(command, {}))
    return {**found, "mode": mode, "shards": shards, "knobs": list(knobs)}


def compare(
    workloads: Sequence[str], net: str | None, data: Path | None, rounds: int, shards: int, knobs: Sequence[str]
) -> dict[str, Any]:  # fmt: skip
    """Both modes by turns, `shards` shards in several processes and one in one; what of the speed is left."""
    results: list[dict[str, Any]] = []
    for workload in workloads:
        used = net or TRAINED[workload].net
        commands = {
            mode: command_of(workload, used, data, [*roles(mode, shards if mode == "processes" else 1), *knobs]) for mode in MODES
        }
        for command in commands.values() if not results else ():  # kernels compiled, TensorFlow's files in memory
            with training(first_file(command, evaluate=False), {}):
                pass
        found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        for turn in range(rounds):
            for mode in list(MODES)[:: -1 if turn % 2 else 1]:
                found[mode].append(_run(commands[mode], {}))
        results.append({"workload": workload, "net": used, **compared(workload, found)})
    return {
        "rounds": rounds,
        "shards": shards,
        "workloads": results,
        "target": {"ratio_at_least": TARGET},
        "knobs": list(knobs),
        "counted": COUNTED,
        "machine": machine.describe(),
    }


def compared(workload: str, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each mode's runs, and of several processes over one: of the medians, and of the rounds the least and the most."""
    for runs in found.values():
        _check_steady(workload, runs)
    modes: dict[str, dict[str, Any]] = {mode: {**_medians(runs), "runs": runs} for mode, runs in found.items()}
    one, several = modes["embedded"], modes["processes"]
    each = [p["examples_per_s"] / e["examples_per_s"] for e, p in zip(one["runs"], several["runs"], strict=True)]
    both = (one["tree_cpu_s_per_million"], several["tree_cpu_s_per_million"])
    return {
        **modes,
        "ratio": several["examples_per_s"] / one["examples_per_s"],
        "ratio_least": min(each),
        "ratio_most": max(each),
        "tree_cpu_ratio": both[1] / both[0] if all(both) else None,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """What `compare` has found, as a Markdown table."""
    lines = [
        "| workload | net | roles | examples/s | × one process | CPU s per million, all processes | peak memory, summed "
        "| trainer waited | test AUC |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for of in result["workloads"]:
        for mode, name in (("embedded", "one process"), ("processes", f"processes, {result['shards']} shards")):
            r = of[mode]
            speeds = [run["examples_per_s"] for run in r["runs"]]
            ratio = f"{of['ratio']:.2f} ({of['ratio_least']:.2f}–{of['ratio_most']:.2f})" if mode == "processes" else "1"
            cpu = "–" if r["tree_cpu_s_per_million"] is None else f"{r['tree_cpu_s_per_million']:.1f}"
            lines.append(
                f"| `{of['workload']}` | {of['net']} | {name} | {r['examples_per_s']:,.0f} ({min(speeds):,.0f}–{max(speeds):,.0f}) "
                f"| {ratio} | {cpu} | {r['peak_rss_sum_bytes'] / 2**30:.1f} GiB | {r['trainer_wait_share']:.1%} "
                f"| {r['test_auc']:.4f} |"
            )
    return "\n".join([*lines, "", f"Target: at least {result['target']['ratio_at_least']} × the speed in one process."])


def measure_once(workload: str, knobs: list[str]) -> dict[str, Any]:
    """One warm run of a workload with its own net and more knobs."""
    return _run(command_of(workload, TRAINED[workload].net, None, knobs), {})


def roles(mode: str, shards: int) -> list[str]:
    """The knobs that say where the roles run."""
    return ["--cluster.mode", mode, "--ps.num_shards", str(shards)]


def command_of(workload: str, net: str, data: Path | None, knobs: Sequence[str]) -> list[str]:
    """Arguments of flowps.train, training files first."""
    how = TRAINED[workload]
    if data is None:
        if workload not in WORKLOADS:
            raise SystemExit(
                f"{workload} is not generated here: give --data with the folder of its train*.parquet and test*.parquet"
            )
        data = Path("data/bench") / workload
        generate(WORKLOADS[workload](), data)
    train, test = _files(data, "train"), _files(data, "test")
    return [
        "--data.train", *train, "--data.test", *test, "--data.batch_size", str(how.batch_size),
        "--data.log1p", str(how.log1p).lower(), *(_dense(train[0]) if how.numbers == "dense" else []), *NETS[net],
        "--cluster.dashboard", "", *knobs,
    ]  # fmt: skip


def first_file(command: Sequence[str], evaluate: bool = True) -> list[str]:
    """The same on the first of its training files only."""
    return ["--data.train", command[1], *command[command.index("--data.test" if evaluate else "--data.batch_size") :]]


@dataclass
class Usage:
    """What a run has used in all, once it has ended.

    samples   lines of metrics.jsonl, and what all processes together had used when each was seen: CPU seconds, peak bytes
    """

    cpu_s: float = 0.0
    peak_rss_bytes: int = 0
    samples: list[tuple[dict[str, Any], float, int]] = field(default_factory=list)


@contextmanager
def training(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[tuple[Path, Usage]]:
    """The directory of a training that has ended, in a process of its own, and what it has used."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        run_dir, usage = Path(folder) / "run", Usage()
        process = subprocess.Popen(
            [sys.executable, "-m", "flowps.train", *arguments, "--run_dir", str(run_dir)],
            stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, **environment},
        )  # fmt: skip
        process.returncode = _watch(process.pid, run_dir / "metrics.jsonl", usage)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"the training failed with status {process.returncode}: {errors.read().decode()}")
        yield run_dir, usage


def _watch(pid: int, metrics: Path, usage: Usage) -> int:
    """Sample at every line that comes; returns the exit status."""
    size, processes = 0, list[psutil.Process]()
    while True:
        ended, status, found = os.wait4(pid, os.WNOHANG)
        if ended:
            # The kernel adds those of processes that were waited for: all, as Dask's nannies do.
            usage.cpu_s, usage.peak_rss_bytes = found.ru_utime + found.ru_stime, found.ru_maxrss * 1024
            return os.waitstatus_to_exitcode(status)
        time.sleep(_LOOK_S)
        with suppress(OSError):
            if metrics.stat().st_size == size:
                continue
            lines = metrics.read_bytes()
            new, size = lines[size:].splitlines(), len(lines)
            if not processes:  # all are there when the trainer has started, which is the first line
                processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            with suppress(psutil.NoSuchProcess):
                used = _used(processes)
                usage.samples += [(json.loads(line), *used) for line in new]


def _used(processes: Iterable[psutil.Process]) -> tuple[float, int]:
    """CPU seconds so far, and the sum of the peaks of resident memory."""
    cpu_s, peak = 0.0, 0
    for process in processes:
        times = process.cpu_times()
        cpu_s += times.user + times.system
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        peak += int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return cpu_s, peak


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """One training."""
    started = time.time()
    with training(arguments, environment) as (run_dir, usage):
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        reports = (run_dir / "status.jsonl").read_text(encoding="utf-8").splitlines()
    finished = summary["finished"]
    return {
        "examples_per_s": finished["steady_examples_per_s"],
        "cpu_s_per_million": finished["steady_cpu_s_per_million"],
        "tree_cpu_s_per_million": tree_cpu_s_per_million(usage, finished["examples"] / finished["steps"]),
        "run_cpu_s": usage.cpu_s,
        "peak_rss_bytes": usage.peak_rss_bytes,
        "peak_rss_sum_bytes": max((peak for _, _, peak in usage.samples), default=usage.peak_rss_bytes),
        "first_step_s": finished["first_step_at"] - started,
        "trainer_wait_share": finished["steady_trainer_wait_share"],
        "empty_reads": json.loads(reports[-1])["counters"].get("empty_reads", 0),
        "test_auc": summary["test"]["auc"],
        "best_auc": summary["best_auc"],
    }


def tree_cpu_s_per_million(usage: Usage, examples_per_step: float) -> float | None:
    """Between the first and the last interval that were seen; None for a run with fewer than two."""
    seen = [(line["step"] * examples_per_step, cpu_s) for line, cpu_s, _ in usage.samples if line["type"] == "Interval"]
    if len(seen) < 2:
        return None
    (first, before), (last, after) = seen[0], seen[-1]
    return (after - before) / (last - first) * 1e6


def _medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of each figure that all runs have."""
    return {key: None if any(run[key] is None for run in runs) else statistics.median(run[key] for run in runs) for key in _MEDIANS}


def _check_steady(workload: str, runs: Sequence[Mapping[str, Any]]) -> None:
    if not all(run["examples_per_s"] for run in runs):
        raise SystemExit(f"{workload}: too few steps for a steady state; use more data")


def _files(data: Path, split: str) -> list[str]:
    """The Parquet files of a split: DATA/SPLIT*.parquet, or DATA/SPLIT/**.parquet."""
    found = sorted(data.glob(f"{split}*.parquet")) or sorted((data / split).rglob("*.parquet"))
    if not found:
        raise SystemExit(f"{data}: no {split}*.parquet and no folder {split}/ with Parquet files")
    return [str(path) for path in found]


def _dense(file: str) -> list[str]:
    """The knob that makes every column of plain numbers dense, whatever its type."""
    names = [
        f.name for f in pq.read_schema(file) if f.name != "label" and (pa.types.is_integer(f.type) or pa.types.is_floating(f.type))
    ]
    return ["--data.dense", *names] if names else []


if __name__ == "__main__":
    sys.exit(main())

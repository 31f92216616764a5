"""`python -m bench.end_to_end {criteo,dsp_ctr}`: train a generated workload as a user would and report speed, memory and quality.

Each run is the command `python -m flowps.train` in a process of its own. Steady-state figures leave out its first steps and the
evaluation; the figures of several runs are given as medians, with all of them under "runs". The data is generated once, seeded,
and reused; `--data DIR` takes files of the same columns made elsewhere (`train*` and `test*` Parquet files, or folders of those
names): list columns and strings are slots, numbers are dense.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench import machine
from flowps.synthetic import WORKLOADS, generate


@dataclass(frozen=True)
class Workload:
    """How a generated data set is trained on."""

    batch_size: int
    net: str
    log1p: bool


TRAINED = {"criteo": Workload(4096, "small", True), "dsp_ctr": Workload(1024, "dnn", False)}
NETS = {
    "small": ["--model", "dnn", "--net.hidden", "128", "64"],
    "deepfm": ["--model", "deepfm", "--net.hidden", "400", "400", "400"],
    "dnn": ["--model", "dnn", "--net.hidden", "512", "256"],
}
_MEDIANS = (
    "examples_per_s",
    "cpu_s_per_million",
    "peak_rss_bytes",
    "first_step_s",
    "trainer_wait_share",
    "empty_reads",
    "test_auc",
)


def main() -> int:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.end_to_end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="After --: more knobs for flowps.train, as in -- --trainer.in_flight 4",
    )  # fmt: skip
    parser.add_argument("workload", choices=list(TRAINED))
    parser.add_argument("--net", choices=list(NETS), help="dense network (default: small for criteo, dnn for dsp_ctr)")
    parser.add_argument("--mode", choices=["embedded"], default="embedded", help="where the roles run")
    parser.add_argument("--data", type=Path, help="folder of the data (default: data/bench/WORKLOAD, generated when missing)")
    parser.add_argument("--runs", type=int, default=3, help="runs to take the medians of (default: 3)")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments, knobs = sys.argv[1:], []
    if "--" in arguments:  # argparse takes them for arguments of its own, depending on what stands before
        at = arguments.index("--")
        arguments, knobs = arguments[:at], arguments[at + 1 :]
    options = parser.parse_args(arguments)
    result = measure(options.workload, options.net, options.mode, options.data, options.runs, knobs)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


def measure(workload: str, net: str | None, mode: str, data: Path | None, runs: int, knobs: list[str]) -> dict[str, Any]:
    """The result of `runs` warm runs and one with a cold numba cache."""
    net = net or TRAINED[workload].net
    command = _command(workload, net, data, knobs)
    with tempfile.TemporaryDirectory() as cold:
        # One file is enough for the first step, and the kernels are compiled whatever comes after.
        first = ["--data.train", command[1], *command[command.index("--data.test") :]]
        _run(first, {})  # brings TensorFlow's files into memory, so that only numba's cache is cold
        cold_first_step_s = _run(first, {"NUMBA_CACHE_DIR": cold})["first_step_s"]
    found = [_run(command, {}) for _ in range(runs)]
    if not all(run["examples_per_s"] for run in found):
        raise SystemExit(f"{workload}: too few steps for a steady state; use more data")
    return {
        "workload": workload,
        "net": net,
        "mode": mode,
        **{key: statistics.median(run[key] for run in found) for key in _MEDIANS},
        "first_step_cold_s": cold_first_step_s,
        "best_auc": found[0]["best_auc"],
        "knobs": knobs,
        "runs": found,
        "machine": machine.describe(),
    }


def measure_once(workload: str, knobs: list[str]) -> dict[str, Any]:
    """One warm run of a workload with its own net and more knobs."""
    return _run(_command(workload, TRAINED[workload].net, None, knobs), {})


def _command(workload: str, net: str, data: Path | None, knobs: list[str]) -> list[str]:
    """Arguments of flowps.train, training files first."""
    how = TRAINED[workload]
    if data is None:
        data = Path("data/bench") / workload
        generate(WORKLOADS[workload](), data)
    train, test = _files(data, "train"), _files(data, "test")
    return [
        "--data.train", *train, "--data.test", *test, "--data.batch_size", str(how.batch_size),
        "--data.log1p", str(how.log1p).lower(), *_dense(train[0]), *NETS[net], "--cluster.dashboard", "", *knobs,
    ]  # fmt: skip


def _run(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """One training in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        started = time.time()
        process = subprocess.Popen(
            [sys.executable, "-m", "flowps.train", *arguments, "--run_dir", str(run_dir)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **environment},
        )  # fmt: skip
        assert process.stderr is not None
        with process.stderr as stream:
            errors = stream.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"the training failed with status {process.returncode}: {errors.decode()}")
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        reports = (run_dir / "status.jsonl").read_text(encoding="utf-8").splitlines()
    finished = summary["finished"]
    return {
        "examples_per_s": finished["steady_examples_per_s"],
        "cpu_s_per_million": finished["steady_cpu_s_per_million"],
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "first_step_s": finished["first_step_at"] - started,
        "trainer_wait_share": finished["steady_trainer_wait_share"],
        "empty_reads": json.loads(reports[-1])["counters"].get("empty_reads", 0),
        "test_auc": summary["test"]["auc"],
        "best_auc": summary["best_auc"],
    }


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

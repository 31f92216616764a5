"""`python -m bench.checkpoint [--rows N] [--json FILE]`: what saving and going on cost, beside bare writing and reading.

    shard      one shard with dim 16 and Adagrad (16 + 16 floats a row): saved whole, saved again after 1 % of its rows were
               touched, and restored; in the same round as many bytes written and read plainly. Everything that is written is on
               disk (fsync), everything that is read is in the page cache. A plain read is one into as much memory, that is there;
               reading into a small buffer over and over, which stays in the processor's cache, is measured too.
    training   the same training with a checkpoint every 60 s and with none, `criteo`, one process
    recovery   training in local processes on as many signs; the shard with all rows is killed, until the next step is printed

Medians of the rounds. Machines are shared: compare within a run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bench import end_to_end, machine
from flowps.checkpoint.file import FileEntry
from flowps.checkpoint.part import PartWriter, read_section, verify
from flowps.checkpoint.store import Store
from flowps.checkpoint.writing import Writing
from flowps.config import Slot
from flowps.ps.shard import Shard
from flowps.ps.snapshot import Columns, Part, TableState

DIM, TOUCHED = 16, 0.01
TARGETS = {
    "pause_s": 1.0, "save_bandwidth_share": 0.5, "restore_bandwidth_share": 0.5, "delta_bytes_share": 0.05,
    "delta_time_share": 0.05, "throughput_share": 0.95, "recovery_s": 20.0,
}  # fmt: skip
_BLOCK, _BATCH = 8 << 20, 500_000
_COPY_BYTES = 2 << 30  # checkpoint.copy_mib
_EPOCHS, _EVERY_S, _TRAININGS = 24, 60, 3
_SIGNS = 100  # of a sample, in the recovery


def signs_of(first: int, count: int) -> np.ndarray:
    """Signs `first` … `first + count` - 1 of a sequence without repetitions (SplitMix64 is a bijection)."""
    z = np.arange(first, first + count, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def touch(shard: Shard, signs: np.ndarray) -> None:
    """Look signs up, each in a bag of its own, and push."""
    for at in range(0, len(signs), _BATCH):
        some = signs[at : at + _BATCH]
        out = np.zeros((len(some), DIM), np.float32)
        offsets, zero = np.arange(len(some) + 1, dtype=np.int32), np.zeros(1, np.int64)
        shard.lookup(0, some, offsets, len(some), zero, zero, out, True)
        shard.push(0, out)


def save(shard: Shard, store: Store, prefix: str, step: int, since: int | None) -> tuple[list[FileEntry], float, float]:
    """Files, seconds that training would wait, and seconds until all is on disk."""
    began = time.perf_counter()
    writing = Writing(PartWriter(store, prefix), _COPY_BYTES)
    for chunk in shard.snapshot(step, since):
        writing.put(f"table-{chunk.table}.{chunk.section}", chunk.columns)
    writing.finish()
    paused = time.perf_counter() - began
    return writing.result(), paused, time.perf_counter() - began


def restore(rows: int, store: Store, states: list[TableState], files: list[FileEntry]) -> tuple[float, float]:
    """Seconds until a new shard has all rows of a full checkpoint; and those before, for comparing its files and allocating it."""
    of_section = {file.section: file for file in files}

    def section(table: int, name: str) -> Iterator[Columns]:
        file = of_section.get(f"table-{table}.{name}")
        return iter(()) if file is None else read_section(store, file)

    began = time.perf_counter()
    verify(store, files)
    with closing(_shard(rows)) as shard:
        before = time.perf_counter()
        shard.restore([Part(states, [section])], lambda slot, signs: np.ones(len(signs), bool))
        seconds = time.perf_counter() - before
        assert shard.num_rows == sum(state.rows for state in states)
    return seconds, before - began


def of_shard(rows: int, rounds: int, folder: Path) -> dict[str, Any]:
    """One shard, saved and restored."""
    found: list[dict[str, float]] = []
    with closing(_shard(rows)) as shard:
        touch(shard, signs_of(0, rows))
        for turn in range(rounds + 1):  # the first one brings memory and compiles
            store = Store(str(folder / f"round-{turn}"))
            store.prepare()
            files, pause_s, save_s = save(shard, store, "full", 2 * turn, None)
            size, states = sum(file.size_bytes for file in files), shard.states()
            raw_write_s, raw_read_s, raw_buffer_s = _plain(folder / "plain", size)
            restore_s, prepare_s = restore(rows, store, states, files)
            touch(shard, signs_of(turn * 7919 % (rows // 2), int(rows * TOUCHED)))
            changed, delta_pause_s, delta_s = save(shard, store, "delta", 2 * turn + 1, 2 * turn)
            found.append(
                {
                    "bytes": size, "pause_s": pause_s, "save_s": save_s, "raw_write_s": raw_write_s,
                    "prepare_s": prepare_s, "restore_s": restore_s, "raw_read_s": raw_read_s, "raw_buffer_s": raw_buffer_s,
                    "delta_bytes_share": sum(f.size_bytes for f in changed) / size, "delta_pause_s": delta_pause_s,
                    "delta_s": delta_s, "delta_time_share": delta_s / save_s,
                    "save_bandwidth_share": raw_write_s / save_s, "restore_bandwidth_share": raw_read_s / restore_s,
                    "restore_buffer_share": raw_buffer_s / restore_s,
                }
            )  # fmt: skip
            for name in ("full", "delta"):
                store.delete(name)
    medians = {key: statistics.median(of[key] for of in found[1:]) for key in found[0]}
    return {"rows": rows, **medians, "rounds": found[1:]}


def _shard(rows: int) -> Shard:
    return Shard([Slot(name="slot", dim=DIM)], [rows + rows // 50], 0, 1, 1, [True])


def _plain(path: Path, size: int) -> tuple[float, float, float]:
    """Seconds to write as many bytes, until they are on disk; to read them into as much memory; and into a small buffer."""
    block = memoryview(bytearray(os.urandom(_BLOCK)))
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for at in range(0, size, _BLOCK):
            file.write(block[: min(_BLOCK, size - at)])
        os.fsync(file.fileno())
    wrote = time.perf_counter()
    rows = np.ones(size, np.uint8).data  # memory that is there, as a shard's is
    begun = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        at = 0
        while found := file.readinto(rows[at : at + _BLOCK]):
            at += found
    read = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass
    buffered = time.perf_counter()
    path.unlink()
    return wrote - began, read - begun, buffered - read


def of_training(rounds: int) -> dict[str, Any]:
    """Examples per second with a checkpoint every minute, and with none, by turns."""
    knobs = ["--epochs", str(_EPOCHS), "--checkpoint.keep", "1", "--checkpoint.every_s"]
    found: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(rounds):
        for name in list(found)[:: -1 if turn % 2 else 1]:
            every_s = str(_EVERY_S) if name == "with" else "0"
            found[name].append(end_to_end.measure_once("criteo", [*knobs, every_s])["examples_per_s"])
    speeds = {name: statistics.median(of) for name, of in found.items()}
    return {"every_s": _EVERY_S, "examples_per_s": speeds, "runs": found, "throughput_share": speeds["with"] / speeds["without"]}


def of_recovery(rows: int, folder: Path) -> dict[str, Any]:
    """Seconds from the death of the only shard to the next interval that is printed."""
    samples = rows // _SIGNS
    lists = pa.ListArray.from_arrays(np.arange(0, rows + 1, _SIGNS, dtype=np.int32), pa.array(signs_of(0, rows).view(np.int64)))
    labels = np.arange(samples) % 2
    pq.write_table(pa.table({"label": labels.astype(np.int8), "signs": lists}), folder / "data.parquet", row_group_size=16_384)
    epoch = -(-samples // 1024)
    command = [
        sys.executable, "-m", "flowps.train", "--data.train", str(folder / "data.parquet"), "--data.batch_size", "1024",
        "--epochs", "1000000", "--run_dir", str(folder / "run"), "--cluster.mode", "processes", "--cluster.dashboard", "",
        "--slot_default.capacity_rows", str(rows + rows // 50), "--status.print_interval", "1", "--model", "lr",
        "--checkpoint.every_steps", str(epoch + 2), "--checkpoint.keep", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, killed_at, saved, back = list[str](), 0.0, 0, False
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if found := re.match(r"checkpoint \S+ \((\w+)\): ([\d,]+) rows", line):
                saved = int(found[2].replace(",", ""))
                children = psutil.Process(process.pid).children(recursive=True)
                max(children, key=lambda child: child.memory_info().rss).kill()  # the shard: it has the rows
                killed_at = time.perf_counter()
            back = back or "all roles go back to step" in line
            if back and re.match(r"step \d+, auc", line):
                return {"rows": saved, "recovery_s": time.perf_counter() - killed_at}
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()
    raise SystemExit(f"bench.checkpoint: the training has ended: {''.join(said[-5:])}")


def markdown(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    of, train, recovery = result["shard"], result["training"], result["recovery"]
    lines = [
        "| | measured | target |",
        "|---|---|---|",
        f"| {of['rows']:,} rows, {of['bytes'] / 1e9:.2f} GB: training waits | {of['pause_s']:.2f} s | ≤ 1.0 s |",
        f"| – saved, on disk | {of['save_s']:.2f} s, {of['save_bandwidth_share']:.0%} of the bandwidth of a plain write | ≥ 50 % |",
        f"| – restored, checksums compared on the way | {of['restore_s']:.2f} s, {of['restore_bandwidth_share']:.0%} of the "
        f"bandwidth of a plain read into memory ({of['restore_buffer_share']:.0%} of one into a small buffer) | ≥ 50 % |",
        f"| – before that, at `--resume`: all files compared, the shard allocated | {of['prepare_s']:.2f} s | |",
        f"| – 1 % touched: a delta | {of['delta_bytes_share']:.1%} of the bytes, {of['delta_time_share']:.1%} of the time "
        f"(waits {of['delta_pause_s']:.2f} s) | ≤ 5 % |",
    ]
    if train:
        lines.append(
            f"| `criteo` with a checkpoint every {train['every_s']} s | {train['throughput_share']:.1%} of the examples/s without "
            "| ≥ 95 % |"
        )
    if recovery:
        lines.append(
            f"| a shard of {recovery['rows']:,} rows is killed: training again after | {recovery['recovery_s']:.1f} s | ≤ 20 s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5, help="of the shard")
    parser.add_argument("--shard-only", action="store_true", help="no training, no recovery")
    parser.add_argument("--folder", type=Path, help="where to write (default: the folder for temporary files)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result: dict[str, Any] = {
            "shard": of_shard(arguments.rows, arguments.rounds, Path(folder)),
            "training": None,
            "recovery": None,
        }
        if not arguments.shard_only:
            result["recovery"] = of_recovery(arguments.rows, Path(folder))
            result["training"] = of_training(_TRAININGS)
    parts = [of for of in result.values() if of is not None]
    result |= {key: of[key] for key in (*TARGETS, "save_s", "restore_s", "raw_write_s", "raw_read_s") for of in parts if key in of}
    result |= {"targets": TARGETS, "machine": machine.describe()}
    print(markdown(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

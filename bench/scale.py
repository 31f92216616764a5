"""`python -m bench.scale [AXIS ...] [--rows N ...] [--json FILE]`: what a sign costs, and a batch takes, as things get larger.

    uniform  10^5 … 10^8 resident rows, signs drawn uniformly, so that nearly every one is a cache miss once the table is larger
             than the caches: `python -m bench.shard uniform` in a process of its own for each, with floors; as far as memory goes
    rows, slots, signs (per sample and slot), dim, batch, shards
             each alone varied from a common middle (`MIDDLE`), signs drawn zipf (1.05), one thread and one caller; shards all in
             this process and asked at once, by as many threads

Medians and 99th percentiles of single lookups and pushes. Machines are shared, so compare within a run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from bench import machine, workload
from flowps.batch import Batch
from flowps.config import Slot
from flowps.ps.client import PsClient
from flowps.ps.placement import place
from flowps.ps.shard import Shard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (100_000, 1_000_000, 10_000_000, 50_000_000, 100_000_000)
_BYTES_PER_ROW = 200  # with an index that is just being copied into a larger one
_WARM_UP, _TURNS, _MOST_SIGNS = 6, 60, 20_000_000


@dataclass(frozen=True)
class Point:
    """One case of what varies."""

    rows: int = 2_000_000
    slots: int = 32
    signs: int = 4
    dim: int = 16
    batch: int = 1024
    shards: int = 1


MIDDLE = Point()
AXES: dict[str, tuple[int, ...]] = {
    "rows": (100_000, 1_000_000, 10_000_000, 50_000_000),
    "slots": (4, 8, 16, 32, 64, 128, 256),
    "signs": (1, 2, 4, 8, 16, 32, 64),
    "dim": (4, 8, 16, 32, 64, 128),
    "batch": (128, 512, 1024, 4096, 16_384),
    "shards": (1, 2, 4, 8, 16),
}


_TITLES = {
    "uniform": "rows, drawn uniformly",
    "rows": "rows, drawn zipf",
    "signs": "signs per sample and slot",
    "batch": "samples per batch",
}


def of_rows(rows: int) -> dict[str, Any]:
    """One size of the table."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "result.json"
        command = [sys.executable, "-m", "bench.shard", "uniform", "--rows", str(rows), "--turns", "100", "--json", str(to)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(to.read_text())
    signs = found["signs_per_batch"]
    return {
        "rows": found["rows"],
        **{f"{name}_ns_per_sign": found[f"{name}_ms_p50"] * 1e6 / signs for name in ("lookup", "push")},
        **{f"floor_{name}_ns_per_sign": found[f"floor_{name}_ms"] * 1e6 / signs for name in ("lookup", "push")},
        **{key: found[key] for key in ("lookup_ms_p50", "lookup_ms_p99", "push_ms_p50", "push_ms_p99")},
        "inserts_per_s": found["inserts_per_s"],
        "bytes_per_row": found["bytes_per_row"],
    }


def of_point(point: Point) -> dict[str, Any]:
    """One case; all rows are there."""
    slots = [Slot(name=f"s{k}", dim=point.dim) for k in range(point.slots)]
    shape = workload.Shape(point.batch, (point.rows // point.slots,) * point.slots, (float(point.signs),) * point.slots, 1.05)
    placement = place(slots, point.shards)
    shards = [
        Shard([slots[piece.slot] for piece in pieces], [point.rows * 3 // 2 // point.slots] * len(pieces), 7, 2)
        for pieces in placement.shards
    ]
    client = PsClient(shards, placement, slots)
    empty = np.zeros((0, 0), np.float32)
    for number, known in enumerate(workload.every_sign(shape)):
        client.lookup(number, Batch(np.zeros(1, np.float32), empty, known.signs, known.offsets), training=True)
        client.forget(number)
    source, lookups, pushes, signs, distinct = workload.draw(shape), list[float](), list[float](), 0, 0
    grads = np.full((point.batch, placement.width), 1e-3, np.float32)
    turns = max(12, min(_TURNS, _MOST_SIGNS // (point.batch * point.slots * point.signs)))
    for turn in range(-_WARM_UP, turns):
        drawn, number = next(source), (1 << 20) + turn
        batch = Batch(np.zeros(point.batch, np.float32), empty, drawn.signs, drawn.offsets)
        begin = time.perf_counter()
        client.lookup(number, batch, training=True)
        middle = time.perf_counter()
        client.push(number, grads)
        if turn >= 0:
            lookups.append(middle - begin)
            pushes.append(time.perf_counter() - middle)
            signs += len(drawn.signs)
            distinct += len(np.unique(drawn.signs))
    client.close()
    for shard in shards:
        shard.close()
    each = signs / turns
    return {
        **asdict(point),
        "signs_per_batch": each,
        "distinct_share": distinct / signs,
        **{f"{name}_ns_per_sign": float(np.median(of)) * 1e9 / each for name, of in (("lookup", lookups), ("push", pushes))},
        **{
            f"{name}_ms_p{share}": float(np.percentile(of, share)) * 1e3
            for name, of in (("lookup", lookups), ("push", pushes))
            for share in (50, 99)
        },
    }


def left_out(rows: int) -> str:
    """Why so many rows are not measured here; "" if they are."""
    available = psutil.virtual_memory().available
    if rows * _BYTES_PER_ROW <= available:
        return ""
    return f"{rows:,} rows need {rows * _BYTES_PER_ROW / 2**30:.0f} GiB, {available / 2**30:.0f} GiB were available"


def picture(result: dict[str, Any]) -> Figure:
    """Throughput above, latency below, against each axis."""
    from matplotlib.figure import Figure  # only who draws needs it

    axes = {"uniform": result["sizes"], **result["axes"]}
    figure = Figure(figsize=(3 * len(axes), 5.2), layout="constrained")
    for column, (axis, points) in enumerate(axes.items()):
        name_of = "rows" if axis == "uniform" else axis
        x = [of[name_of] for of in points]
        for row in range(2):
            plot = figure.add_subplot(2, len(axes), row * len(axes) + column + 1)
            for name, colour in (("lookup", "C0"), ("push", "C1")):
                if row == 0:
                    plot.plot(x, [1e3 / of[f"{name}_ns_per_sign"] for of in points], "o-", color=colour, ms=3, label=name)
                    if axis == "uniform":
                        floor = [1e3 / of[f"floor_{name}_ns_per_sign"] for of in points]
                        plot.plot(x, floor, ":", color=colour, label=f"{name}, floor")
                else:
                    plot.plot(x, [of[f"{name}_ms_p50"] for of in points], "o-", color=colour, ms=3, label=f"{name}, P50")
                    plot.plot(x, [of[f"{name}_ms_p99"] for of in points], "--", color=colour, label=f"{name}, P99")
            plot.set_xscale("log", base=10 if name_of == "rows" else 2)
            plot.set_ylim(bottom=0)
            plot.grid(alpha=0.3)
            if name_of != "rows":
                plot.set_xticks(x, [f"{n:,}" for n in x], rotation=45 if max(x) > 999 else 0)
                plot.minorticks_off()
            if row == 0:
                plot.set_title(_TITLES.get(axis, axis), fontsize=10)
            if column == 0:
                plot.set_ylabel("million signs/s" if row == 0 else "ms per batch")
            if column < 2 - row:
                plot.legend(fontsize=7)
    return figure


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"uniform, {', '.join(AXES)}; default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=list(SIZES), help="sizes of the uniform table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args()
    unknown = [axis for axis in options.axes if axis not in ("uniform", *AXES)]
    if unknown:
        parser.error(f"unknown axis {unknown[0]!r}; there are uniform, {', '.join(AXES)}")
    result: dict[str, Any] = {"machine": machine.describe(), "sizes": [], "left_out": {}, "axes": {}}
    for rows in options.rows if not options.axes or "uniform" in options.axes else []:
        if why := left_out(rows):
            result["left_out"][str(rows)] = why
            print(why, file=sys.stderr)
            continue
        result["sizes"].append(of_rows(rows))
        print(json.dumps(result["sizes"][-1]), flush=True)
    for axis, values in AXES.items():
        if not options.axes or axis in options.axes:
            result["axes"][axis] = []
            for value in values:
                result["axes"][axis].append(of_point(replace(MIDDLE, **{axis: value})))
                print(json.dumps(result["axes"][axis][-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

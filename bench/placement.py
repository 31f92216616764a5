"""`python -m bench.placement [--json FILE]`: how evenly slots are placed on shards, and the costs that they are placed by.

The costs: CPU time of lookups and pushes of shards with one slot, over signs per bag, distinct values and batch sizes, fitted as so
many ns per sign, distinct row, bag and call; and what a remote shard adds, CPU of both processes (`bench.rpc`), per sign, byte of
embeddings and call. Least squares of the relative error. Beside the constants of `flowps.ps.load`; a byte's cost there is that on
the wire and that of pooling, of a bag over its bytes.

The placement: `dsp_ctr`, one training file, on 4 and 8 shards, in one process and in several. The busiest shard over the mean: as
predicted by those constants, and as measured by the run. What a run measures is the wall clock of lookups and pushes in the shards,
without the wire; "fitted" is what it should be after the costs in the shard alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench import end_to_end, machine, rpc, workload
from flowps.cluster.run_dir import read_placement
from flowps.cluster.shard_report import PlacementReport, busiest
from flowps.config import Slot
from flowps.ps import load
from flowps.ps.memory import aligned_empty
from flowps.ps.placement import ShardLoad
from flowps.ps.shard import Shard

TARGET = 1.15  # the busiest shard's time over the mean
SHARDS, MODES = (4, 8), ("embedded", "processes")
SIZES, SIGNS, VALUES = (1024, 4096), (1, 4, 20, 80), (100, 10_000, 100_000, 1_000_000)
_MOST_SIGNS = 330_000  # of a batch
_DIM, _ZIPF, _WARM_UP = 16, 1.05, 4
_WIRE = ((26, 1, 16), (76, 1, 16), (26, 8, 16), (8, 30, 16), (38, 5, 16), (8, 1, 64), (26, 2, 64))  # slots, signs of a bag, dim


def shard_costs(sizes: Sequence[int], signs: Sequence[int], values: Sequence[int], turns: int) -> list[dict[str, float]]:
    """CPU seconds of a lookup and a push, for each point of the grid."""
    found = []
    for size, mean, count in itertools.product(sizes, signs, values):
        if size * mean <= _MOST_SIGNS:
            found.append(_shard_cost(workload.Shape(size, (count,), (float(mean),), _ZIPF), turns))
    return found


def _shard_cost(shape: workload.Shape, turns: int) -> dict[str, float]:
    """Medians of `turns` batches."""
    taken, at = np.empty((turns + _WARM_UP, 3)), np.zeros(1, np.int64)
    out = aligned_empty((shape.size, _DIM))
    grads = np.full_like(out, 1e-4)
    with closing(Shard([Slot(name="s", dim=_DIM)], [2 * shape.cardinalities[0]], 7, 1)) as shard:
        for n, batch in enumerate(itertools.islice(workload.draw(shape), turns + _WARM_UP)):
            distinct = len(np.unique(batch.signs))
            begin = time.thread_time()  # the shard has no other thread
            shard.lookup(n, batch.signs, batch.offsets, shape.size, at, at, out, training=True)
            shard.push(n, grads)
            taken[n] = time.thread_time() - begin, len(batch.signs), distinct
    seconds, signs, distinct = np.median(taken[_WARM_UP:], axis=0)
    return {
        "size": shape.size, "values": shape.cardinalities[0], "signs": float(signs), "distinct": float(distinct),
        "seconds": float(seconds),
    }  # fmt: skip


def wire_costs(of: Sequence[tuple[int, int, int]], size: int, rounds: int, calls: int) -> list[dict[str, float]]:
    """CPU seconds of both processes that a lookup and a push take more from a remote shard than in its own process."""
    shapes = {
        f"{slots} slots, {mean} signs, dim {dim}": (dim, workload.Shape(size, (100_001,) * slots, (float(mean),) * slots, _ZIPF))
        for slots, mean, dim in of
    }
    cases = [rpc.Case(name, shape, dim=dim) for name, (dim, shape) in shapes.items()]
    keys = [rpc.Key(True, case, False, contender) for case in cases for contender in ("flowps", "local")]
    with closing(rpc.Pair(cases, keep=True)) as pair:
        blocks = rpc.collect(keys, {True: pair}, rounds, calls)
        sizes = [pair.sizes(case, False) for case in cases]

    def cpu_s(case: rpc.Case, contender: str) -> float:
        found = blocks[rpc.Key(True, case, False, contender)]
        each = [np.concatenate([block[operation] for block in found])[:, 1:3].sum(axis=1) for operation in rpc.OPERATIONS]
        return sum(float(np.median(of_operation)) for of_operation in each)

    return [
        {
            "signs": size_of["signs"], "bytes": float(case.shape.size * case.width * 4),
            "seconds": cpu_s(case, "flowps") - cpu_s(case, "local"),
        }
        for case, size_of in zip(cases, sizes, strict=True)
    ]  # fmt: skip


def fit(points: Sequence[Mapping[str, float]], by: Sequence[str]) -> dict[str, Any]:
    """ns per each of `by` ("call": 1 of each point), by least squares of the relative error; and how far off the points are."""
    counts: NDArray[np.float64] = np.array([[1.0 if name == "call" else point[name] for name in by] for point in points])
    taken = np.array([point["seconds"] for point in points]) * 1e9
    found, *_ = np.linalg.lstsq(counts / taken[:, None], np.ones(len(taken)), rcond=None)
    least, p10, median, p90, most = (float(q) for q in np.quantile(counts @ found / taken, (0, 0.1, 0.5, 0.9, 1)))
    return {
        "ns": {name: float(value) for name, value in zip(by, found, strict=True)},
        "fitted_over_measured": {"least": least, "p10": p10, "median": median, "p90": p90, "most": most},
    }


def costs(in_shard: list[dict[str, float]], on_wire: list[dict[str, float]]) -> dict[str, Any]:
    """What was fitted, beside what is used."""
    shard = fit([{**point, "bags": point["size"]} for point in in_shard], ("signs", "distinct", "bags", "call"))
    wire = fit(on_wire, ("signs", "bytes", "call"))
    pooled = shard["ns"]["bags"] / (_DIM * 4)
    return {
        "sign_ns": {"used": load._SIGN_NS, "in_shard": shard["ns"]["signs"], "on_wire": wire["ns"]["signs"]},
        "distinct_ns": {"used": load._DISTINCT_NS, "in_shard": shard["ns"]["distinct"], "on_wire": 0.0},
        "byte_ns": {"used": load._BYTE_NS, "in_shard": pooled, "on_wire": wire["ns"]["bytes"]},
        "call_ns": {"used": 0.0, "in_shard": shard["ns"]["call"], "on_wire": wire["ns"]["call"]},
        "shard": {**shard, "points": in_shard},
        "wire": {**wire, "points": on_wire},
    }


def placed(
    shards: int, mode: str, in_shard_ns: Mapping[str, float], data: Path | None = None, knobs: Sequence[str] = ()
) -> dict[str, Any]:
    """A training of `dsp_ctr` on `shards` shards, one file of it."""
    how = [*end_to_end.roles(mode, shards), *knobs]
    command = end_to_end.first_file(end_to_end.command_of("dsp_ctr", "dnn", data, how), evaluate=False)
    with end_to_end.training(command, {}) as (run_dir, _):
        report = read_placement(run_dir)
        steps = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["finished"]["steps"]
    return {"shards": shards, "mode": mode, "steps": steps, **unevenness(report, in_shard_ns)}


def unevenness(report: PlacementReport, in_shard_ns: Mapping[str, float]) -> dict[str, Any]:
    """The busiest shard over the mean, of a run that has ended; and the shares of all shards. `in_shard_ns`: of `fit`."""
    pieces = [[name.partition(" (")[::2] for name in shard.slots] for shard in report.shards]
    found: dict[str, Any] = {"split": sorted({name for of_shard in pieces for name, part in of_shard if part})}
    for what in ("predicted", "measured"):
        loads: list[ShardLoad] = [share for shard in report.shards if (share := getattr(shard, what)) is not None]
        assert len(loads) == len(report.shards)
        found[what] = {
            "lookups": max(share.lookups for share in loads) * len(loads),
            "rows": max(share.rows for share in loads) * len(loads),
            "time": busiest(loads),
            "shares": [msgspec.to_builtins(share) for share in loads],
        }

    def ns_per_sample(name: str, part: str) -> float:
        share, of = 1 / int(part.rstrip(")").partition("/")[2] or 1), report.loads[name]
        return share * (of.signs * in_shard_ns["signs"] + of.distinct * in_shard_ns["distinct"]) + in_shard_ns["bags"]

    times = np.array([sum(ns_per_sample(name, part) for name, part in of_shard) for of_shard in pieces])
    shares = times / times.sum()
    return {**found, "fitted": {"time": float(shares.max() * len(shares)), "shares": shares.tolist()}}


def markdown(result: Mapping[str, Any]) -> str:
    """What was found, as Markdown tables that can be read as they stand."""
    cost = result["costs"]
    names = {
        "sign_ns": "sign", "distinct_ns": "distinct row of a batch", "byte_ns": "byte of embeddings", "call_ns": "lookup and push",
    }  # fmt: skip
    lines = [["ns per", "in the shard", "on the wire", "both", "used"]]
    for key, name in names.items():
        inside, wire = cost[key]["in_shard"], cost[key]["on_wire"]
        used = "–" if key == "call_ns" else f"{cost[key]['used']:g}"
        digits = 2 if key == "byte_ns" else 0 if key == "call_ns" else 1
        lines.append([name, *(f"{value:,.{digits}f}" for value in (inside, wire, inside + wire)), used])
    spread = {where: cost[where]["fitted_over_measured"] for where in ("shard", "wire")}
    said = "; ".join(f"{where} {s['p10']:.2f}–{s['p90']:.2f} ({s['least']:.2f}–{s['most']:.2f})" for where, s in spread.items())
    head = ["lookups, predicted / measured", "rows, predicted / measured", "time, predicted / fitted / measured"]
    runs = [["shards", "roles", "slots split", *head]]
    for run in result["placements"]:
        both = [f"{run['predicted'][of]:.2f} / {run['measured'][of]:.2f}" for of in ("lookups", "rows")]
        both.append(" / ".join(f"{run[how]['time']:.2f}" for how in ("predicted", "fitted", "measured")))
        runs.append([str(run["shards"]), run["mode"], ", ".join(run["split"]) or "none", *both])
    return "\n".join(
        [
            *rpc.table(lines, 1), "", f"Fitted over measured, 10–90 % of the points (all): {said}.", "", *rpc.table(runs, 3), "",
            f"The busiest shard over the mean; target for the time: at most {result['target']['time_at_most']}.",
        ]
    )  # fmt: skip


def main() -> int:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.placement", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of dsp_ctr's data (default: data/bench/dsp_ctr, generated when missing)")
    parser.add_argument("--turns", type=int, default=16, help="batches of each point of the shard's costs")
    parser.add_argument("--rounds", type=int, default=8, help="of the wire's costs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args()
    found = costs(shard_costs(SIZES, SIGNS, VALUES, options.turns), wire_costs(_WIRE, 1024, options.rounds, 10))
    in_shard_ns = found["shard"]["ns"]
    result = {
        "costs": found,
        "placements": [placed(shards, mode, in_shard_ns, options.data) for shards, mode in itertools.product(SHARDS, MODES)],
        "target": {"time_at_most": TARGET},
        "machine": machine.describe(),
    }
    print(markdown(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

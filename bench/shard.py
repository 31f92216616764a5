"""`python -m bench.shard {dsp_ctr,criteo,uniform}`: lookups and pushes through `Shard`'s interface, beside bare memory traffic.

Every turn looks up and pushes a batch that was not seen before, dim 16, Adagrad, as `WORKLOADS` in `bench.workload` draws them. The
floors run in the same turn on the same arena: rows whose places are known already, summed (`floor_lookup_ms`), and stepped once
per occurrence without being summed (`floor_push_ms`), by a bare loop on one thread, and cut among as many threads as the shard
has. Times are wall clock: median and 99th percentile of single calls; machines are shared, so compare within a run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine, workload
from flowps.config import Slot
from flowps.ps.kernels import kernel
from flowps.ps.kernels.vector import fill, lanes16, load_as, prefetch, root, store_as
from flowps.ps.memory import aligned_empty
from flowps.ps.shard import Shard
from flowps.ps.table import Bags
from flowps.ps.team import Team

DIM, STRIDE = 16, 32
RESIDENT = {"dsp_ctr": 2_600_000, "criteo": 1_500_000, "uniform": 10_000_000}
_WARM_UP = 12


@kernel
def gather(rows, bounds, first, last, arena, out):  # type: ignore[no-untyped-def]
    """The floor of a lookup: rows whose places are known, summed 16 floats at a time, written bag after bag."""
    n = bounds[last]
    for bag in range(first, last):
        summed = lanes16()
        for i in range(bounds[bag], bounds[bag + 1]):
            if i + 32 < n:
                prefetch(arena, np.int64(rows[i + 32]) * STRIDE)
            summed = summed + load_as(lanes16(), arena, np.int64(rows[i]) * STRIDE)
        store_as(out, bag * DIM, summed)


@kernel
def scatter(rows, bounds, first, last, arena, grads, rate):  # type: ignore[no-untyped-def]
    """The floor of a push: an Adagrad step of each occurrence of a row whose place is known."""
    n = bounds[last]
    for bag in range(first, last):
        grad = load_as(lanes16(), grads, bag * DIM)
        for i in range(bounds[bag], bounds[bag + 1]):
            if i + 32 < n:
                prefetch(arena, np.int64(rows[i + 32]) * STRIDE)
                prefetch(arena, np.int64(rows[i + 32]) * STRIDE + DIM)
            at = np.int64(rows[i]) * STRIDE
            squares = load_as(lanes16(), arena, at + DIM) + grad * grad
            store_as(arena, at + DIM, squares)
            step = fill(lanes16(), rate) * grad / root(squares + fill(lanes16(), np.float32(1e-7)))
            store_as(arena, at, load_as(lanes16(), arena, at) - step)


class Bench:
    """A shard with its resident rows, and the floors over its memory."""

    def __init__(self, name: str, threads: int, resident: int, evict: bool, admit_after: int) -> None:
        self.shape = workload.shape_of(name, resident)
        slots = [Slot(name=f"s{k}", dim=DIM, admit_after=admit_after) for k in range(self.shape.num_slots)]
        capacity = resident if evict else resident + resident // 2 + 1_000_000
        each = -(-capacity // len(slots))
        self.shard = Shard(slots, [each] * len(slots), 7, 1, threads, [True] * len(slots))
        self.team = Team(threads, "bench")
        self.positions = np.arange(len(slots))
        self.width = len(slots) * DIM
        self.out = aligned_empty((self.shape.size, self.width))
        self.grads = np.full_like(self.out, 1e-3)
        self.source = workload.draw(self.shape)
        self.inserts: list[float] = []
        """Seconds of a lookup of new signs only, per sign, for each that filled a `uniform` table."""
        self._fill(name, resident)

    def look_up(self, batch: workload.SignBatch, out: np.ndarray) -> None:
        """As batch 0."""
        self.shard.lookup(0, batch.signs, batch.offsets, len(out), self.positions, self.positions * DIM, out, training=True)

    def _fill(self, name: str, resident: int) -> None:
        if name == "uniform":
            for batch in workload.every_sign(self.shape):
                begin = time.perf_counter()
                self.look_up(batch, self.out[:1])
                self.inserts.append((time.perf_counter() - begin) / len(batch.signs))
                self.shard.forget(0)
            return
        for _ in range(3000):
            if self.shard.num_rows >= 0.98 * resident:
                break
            self.look_up(next(self.source), self.out)
            self.shard.forget(0)

    def measure(self, turns: int) -> dict[str, np.ndarray]:
        """Seconds of each operation, per turn, and signs and new rows."""
        found: dict[str, list[float]] = {}
        (_, table), *_ = self.shard._tables
        flat_out, flat_grads = np.zeros(self.width * self.shape.size, np.float32), np.full(self.out.size, 1e-3, np.float32)

        def timed(operation: str, call: Callable[[], object]) -> None:
            begin = time.perf_counter()
            call()
            found.setdefault(operation, []).append(time.perf_counter() - begin)

        for _ in range(turns + _WARM_UP):
            batch, before = next(self.source), table.stats().inserted
            timed("lookup", lambda b=batch: self.look_up(b, self.out))  # type: ignore[misc]
            timed("push", lambda: self.shard.push(0, self.grads))
            found.setdefault("signs", []).append(len(batch.signs))
            found.setdefault("new", []).append(table.stats().inserted - before)
            # The floors get a batch of their own, whose rows have not been read either, found without reading them.
            rows, bounds = self.places(next(self.source))
            cuts = np.searchsorted(bounds, np.linspace(0, bounds[-1], self.team.size + 1))
            cuts[0], cuts[-1] = 0, len(bounds) - 1

            def in_parts(loop: Any, *rest: Any, at: Any = (rows, bounds, cuts)) -> Callable[[], object]:
                rows, bounds, cuts = at
                return lambda: self.team.run(lambda p: loop(rows, bounds, cuts[p], cuts[p + 1], *rest), self.team.size)

            timed("floor_lookup", in_parts(gather, table.memory.arena, flat_out))
            timed("floor_push", in_parts(scatter, table.memory.arena, flat_grads, np.float32(1e-6)))
        return {key: np.array(values[_WARM_UP:]) for key, values in found.items()}

    def places(self, batch: workload.SignBatch) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a batch's signs, created where they are new, and the bounds of its bags."""
        (_, table), *_ = self.shard._tables
        bags = Bags(batch.signs, batch.offsets, self.shape.size, self.positions, self.positions * DIM)
        buffers = table._take_buffers(len(batch.signs))
        with table._index_lock:
            number = table.recency.begin(2 * len(batch.signs), table._lower)
            table._find_or_create(bags, bags.places, buffers, number, 1)
        table.recency.land(number)
        rows = buffers.rows[: len(batch.signs)].copy()
        table._give_back(buffers)
        return rows, batch.offsets.astype(np.int64)


def run(
    name: str, threads: int = 1, resident: int = 0, turns: int = 200, evict: bool = False, admit_after: int = 1
) -> dict[str, Any]:
    """Measure, and say what was found."""
    bench = Bench(name, threads, resident or RESIDENT[name], evict, admit_after)
    found = bench.measure(turns)
    (stats,) = bench.shard.stats()
    bench.shard.close()
    bench.team.close()

    def ms(operation: str, share: float = 0.5) -> float:
        return float(np.quantile(found[operation], share)) * 1e3

    return {
        "workload": name,
        "threads": threads,
        "evict": evict,
        "turns": turns,
        "lookup_ms_p50": ms("lookup"),
        "lookup_ms_p99": ms("lookup", 0.99),
        "push_ms_p50": ms("push"),
        "push_ms_p99": ms("push", 0.99),
        "floor_lookup_ms": ms("floor_lookup"),
        "floor_push_ms": ms("floor_push"),
        "lookup_ratio": float(np.median(found["lookup"] / found["floor_lookup"])),
        "push_ratio": float(np.median(found["push"] / found["floor_push"])),
        "signs_per_batch": float(found["signs"].mean()),
        "new_rows_per_batch": float(found["new"].mean()),
        "rows": stats.rows,
        "bytes_per_row": stats.bytes / stats.capacity_rows,
        "evicted": stats.evicted,
        "inserts_per_s": 1 / float(np.median(bench.inserts[1:])) if len(bench.inserts) > 1 else None,
        "machine": machine.describe(),
    }


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.shard", description=__doc__)
    parser.add_argument("workload", choices=workload.NAMES)
    parser.add_argument("--threads", type=int, default=1, help="threads of one lookup or push (ps.threads)")
    parser.add_argument("--rows", type=int, default=0, help="rows resident before the first turn")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument(
        "--evict", action="store_true", help="capacity_rows is what is resident: every new row takes an old one's place"
    )
    parser.add_argument("--admit-after", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args()
    result = run(options.workload, options.threads, options.rows, options.turns, options.evict, options.admit_after)
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`python -m bench.shard {dsp_ctr,criteo,uniform}`: lookups and pushes through `Shard`'s interface, beside bare memory traffic.

Every turn looks up and pushes a batch that was not seen before, dim 16, Adagrad, as `WORKLOADS` in `bench.workload` draws them. The
floors run in the same turn on the same arena: rows whose places are known already, summed (`floor_lookup_ms`), and stepped once
per occurrence without being summed (`floor_push_ms`), by a bare loop on one thread, and cut among as many threads as the shard
has. Times are wall clock: median and 99th percentile of single calls; machines are shared, so compare within a run.

`--rivals`: before that, the shard and the tables of `bench.shard_contender`, all with the same resident rows and the same number of
threads, look up and push the same batches, in every turn in another order. A turn is two batches of each in a row: the first brings
the caches back from the one before, the second is timed. A ratio is a rival's time over that of the shard in the same turn.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine, shard_contender, workload
from bench.contender import tensorflow
from flowps.config import Slot
from flowps.ps.kernels import kernel
from flowps.ps.kernels.vector import fill, lanes16, load_as, prefetch, root, store_as
from flowps.ps.memory import aligned_empty
from flowps.ps.shard import Shard
from flowps.ps.table import Bags
from flowps.ps.team import Team

DIM, STRIDE = 16, 32
RESIDENT = {"dsp_ctr": 2_600_000, "criteo": 1_500_000, "uniform": 10_000_000}
_ALLOCATED = 60_000_000  # rows; memory for half as many again is taken beforehand up to there
_WARM_UP, _RIVAL_WARM_UP = 12, 2


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


def places(shard: Shard, batch: workload.SignBatch) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a batch's signs in a shard of one table, created where they are new, and the bounds of its bags."""
    (positions, table), *_ = shard._tables
    size = (len(batch.offsets) - 1) // len(positions)
    bags = Bags(batch.signs, batch.offsets, size, positions, positions * DIM)
    buffers = table._take_buffers(len(batch.signs))
    with table._index_lock:
        number = table.recency.begin(2 * len(batch.signs), table._lower)
        table._find_or_create(bags, bags.places, buffers, number, 1)
    table.recency.land(number)
    rows = buffers.rows[: len(batch.signs)].copy()
    table._give_back(buffers)
    return rows, batch.offsets.astype(np.int64)


class Bench:
    """A shard with its resident rows, and the floors over its memory."""

    def __init__(self, name: str, threads: int, resident: int, evict: bool, admit_after: int) -> None:
        self.shape = workload.shape_of(name, resident)
        slots = [Slot(name=f"s{k}", dim=DIM, admit_after=admit_after) for k in range(self.shape.num_slots)]
        capacity = resident if evict else resident + resident // 2 + 1_000_000
        each = -(-capacity // len(slots))
        self.shard = Shard(slots, [each] * len(slots), 7, 1, threads, [resident <= _ALLOCATED] * len(slots))
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
            rows, bounds = places(self.shard, next(self.source))
            cuts = np.searchsorted(bounds, np.linspace(0, bounds[-1], self.team.size + 1))
            cuts[0], cuts[-1] = 0, len(bounds) - 1

            def in_parts(loop: Any, *rest: Any, at: Any = (rows, bounds, cuts)) -> Callable[[], object]:
                rows, bounds, cuts = at
                return lambda: self.team.run(lambda p: loop(rows, bounds, cuts[p], cuts[p + 1], *rest), self.team.size)

            timed("floor_lookup", in_parts(gather, table.memory.arena, flat_out))
            timed("floor_push", in_parts(scatter, table.memory.arena, flat_grads, np.float32(1e-6)))
        return {key: np.array(values[_WARM_UP:]) for key, values in found.items()}

    def resident(self, batches: Iterable[workload.SignBatch]) -> shard_contender.Rows:
        """A copy of the rows, in the order in which they lie in the arena, and which signs of `batches` have none."""
        of_slots = list(self.shard.rows())
        signs, weights, squares = (np.concatenate([getattr(o, of) for o in of_slots]) for of in ("signs", "weights", "state"))
        # Chunks come slot by slot: together they are a batch of one sample.
        counts = {slot.name: 0 for slot in self.shard._slots}
        for of in of_slots:
            counts[of.slot.name] += len(of.signs)
        rows, _ = places(self.shard, workload.SignBatch(signs, np.cumsum([0, *counts.values()]).astype(np.int32)))
        order = np.argsort(rows)
        drawn, first = np.unique(np.concatenate([batch.signs for batch in batches]), return_index=True)
        missing = ~np.isin(drawn, signs)
        new = drawn[missing][np.argsort(first[missing])]
        return shard_contender.Rows(signs[order], weights[order], squares[order], new)

    def beside_rivals(self, turns: int) -> dict[str, Any]:
        """Times of the shard and of its rivals, who is left out and why, and the versions of their packages."""
        pairs = [(next(self.source), next(self.source)) for _ in range(turns + _RIVAL_WARM_UP)]
        found_in = {kind: importlib.util.find_spec(kind.package) is not None for kind in shard_contender.RIVALS}
        rows = self.resident(batch for pair in pairs for batch in pair)
        contenders = [
            shard_contender.Flowps(self.shard, len(self.positions)),
            *(kind(rows, self.team.size) for kind, found in found_in.items() if found),
        ]
        grads, random = np.full((self.out.size // DIM, DIM), 1e-3, np.float32), np.random.default_rng(1)
        seconds = np.zeros((len(pairs), len(contenders), 2))
        for of_turn, pair in zip(seconds, pairs, strict=True):
            for k, batch in itertools.product(random.permutation(len(contenders)), pair):
                contenders[k].prepare(batch, grads)
                begin = time.perf_counter()
                contenders[k].look_up()
                middle = time.perf_counter()
                contenders[k].push()
                of_turn[k] = middle - begin, time.perf_counter() - middle
        seconds = seconds[_RIVAL_WARM_UP:]
        names = ("lookup_ms_p50", "push_ms_p50", "lookup_ratio", "push_ratio")
        figures = np.hstack([np.median(seconds * 1e3, axis=0), np.median(seconds / seconds[:, :1], axis=0)]).tolist()
        return {
            "rival_turns": turns,
            "rival_new_rows_per_batch": len(rows.new) / (2 * len(pairs)),
            "rivals": {c.name: dict(zip(names, of, strict=True)) for c, of in zip(contenders, figures, strict=True)},
            "left_out": {kind.name: f"{kind.package} is not installed" for kind, found in found_in.items() if not found},
            "versions": {kind.package: version(kind.package) for kind, found in found_in.items() if found},
        }


def run(
    name: str, threads: int = 1, resident: int = 0, turns: int = 200, evict: bool = False, admit_after: int = 1,
    rival_turns: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Measure, and say what was found; rivals only if they have turns."""
    bench = Bench(name, threads, resident or RESIDENT[name], evict, admit_after)
    beside = bench.beside_rivals(rival_turns) if rival_turns else {}
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
        **beside,
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
    parser.add_argument("--rivals", action="store_true", help="measure other tables too, as far as they are installed")
    parser.add_argument("--rival-turns", type=int, default=15, metavar="N", help="turns of a run with --rivals that they have")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args()
    if options.rivals and (options.evict or options.admit_after > 1):
        parser.error("rivals give every sign a row and keep it: --rivals cannot be measured with --evict or --admit-after")
    if options.rivals and options.rival_turns < 1:
        parser.error(f"--rival-turns is {options.rival_turns}, expected at least 1; leave out --rivals to measure the shard alone")
    if options.rivals and importlib.util.find_spec("tensorflow") is not None:
        # It can be told so only before its first operation.
        tensorflow().config.threading.set_intra_op_parallelism_threads(options.threads)
        tensorflow().config.threading.set_inter_op_parallelism_threads(options.threads)
        tensorflow().config.set_visible_devices([], "GPU")
    rival_turns = options.rival_turns if options.rivals else 0
    result = run(
        options.workload, options.threads, options.rows, options.turns, options.evict, options.admit_after, rival_turns
    )  # fmt: skip
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

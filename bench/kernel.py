"""`python -m bench.kernel [--json FILE]`: the kernels of a table, one thread, beside what they would be without their tricks.

Batches of `dsp_ctr`'s shape against 2.6 million resident rows of 16 floats and their Adagrad state; all signs of the batches are
known. All variants run in one process, in turns, each time in another order and on another batch than the variant before, so that
none finds its lines warm. Times are CPU time, because machines are shared: median, 10th and 90th percentile of single calls.
Variants are the kernels' own code with one name replaced. Comments in `flowps/ps/kernels` cite this table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from bench import machine
from bench.shard import RESIDENT, Bench, gather, places, scatter
from flowps.ps.kernels import index, pool, update
from flowps.ps.table import Bags

NUM_BATCHES, ROUNDS = 8, 6


def like(kernel: Any, *, nrt: bool = False, **names: Any) -> Any:
    """`kernel` compiled once more, with some of its module's names meaning something else, or with references counted."""
    function = FunctionType(kernel.py_func.__code__, {**kernel.py_func.__globals__, **names})
    return type(kernel)(function, targetoptions=kernel.targetoptions | {"_nrt": nrt})


@type(pool.pool)
def _nothing(array, at):  # type: ignore[no-untyped-def]
    """In place of a prefetch."""


@contextmanager
def instead(module: Any, name: str, kernel: Any) -> Iterator[None]:
    """A kernel in the place of another."""
    before = getattr(module, name)
    setattr(module, name, kernel)
    try:
        yield
    finally:
        setattr(module, name, before)


def searching(**names: Any) -> Any:
    """`find_or_create` with names of its search replaced."""
    ahead = like(index._look_ahead, **names)
    return like(index.find_or_create, _search=like(index._search, _look_ahead=ahead, **names))


class Workload:
    """A table, batches whose signs it has, and the rows of each."""

    def __init__(self) -> None:
        self.bench = Bench("dsp_ctr", 1, RESIDENT["dsp_ctr"], evict=False, admit_after=1)
        (_, self.table), *_ = self.bench.shard._tables
        drawn = [next(self.bench.source) for _ in range(NUM_BATCHES)]
        columns = self.bench.positions * 16
        self.bags = [Bags(batch.signs, batch.offsets, self.bench.shape.size, self.bench.positions, columns) for batch in drawn]
        self.places = [bags.places for bags in self.bags]
        self.rows = [places(self.bench.shard, batch)[0] for batch in drawn]

    def find(self, b: int) -> None:
        """As an evaluation does."""
        bags = self.bags[b]
        self.table._find(bags.signs, bags.starts, bags.stops, self.places[b], np.empty(len(bags.signs), np.int32))

    def find_or_create(self, b: int) -> float:
        """As a training lookup does. Returns seconds, without what must be done around it."""
        bags, table = self.bags[b], self.table
        buffers, number = table._take_buffers(len(bags.signs)), table.recency.begin(2 * len(bags.signs), table._lower)
        begin = time.thread_time()
        table._find_or_create(bags, self.places[b], buffers, number, 1)
        seconds = time.thread_time() - begin
        table.recency.land(number)
        table._give_back(buffers)
        return seconds

    def push(self, b: int) -> float:
        """The push of a lookup that is not timed; its rows have just been pooled, as in training."""
        touched = self.table.find(self.bags[b])
        self.table.pool(touched, self.bench.out)
        begin = time.thread_time()
        self.table.push(touched, self.bench.grads)
        return time.thread_time() - begin


def variants(work: Workload) -> dict[str, Callable[[int], float]]:
    """Name → measure one call on a batch, seconds."""
    table, out = work.table, work.bench.out
    flat, grads = np.zeros(out.size, np.float32), np.full(out.size, 1e-3, np.float32)
    bounds = [bags.offsets.astype(np.int64) for bags in work.bags]

    def timed(call: Callable[[int], object]) -> Callable[[int], float]:
        def measure(b: int) -> float:
            begin = time.thread_time()
            call(b)
            return time.thread_time() - begin

        return measure

    def patched(module: Any, name: str, kernel: Any, measure: Callable[[int], float]) -> Callable[[int], float]:
        def inside(b: int) -> float:
            with instead(module, name, kernel):
                return measure(b)

        return inside

    pooling = timed(lambda b: table._pool(work.bags[b], work.places[b], work.rows[b], out))
    unaligned = np.zeros(out.size + 1, np.float32)[1:].reshape(out.shape)
    found = {
        "gather floor": timed(lambda b: gather(work.rows[b], bounds[b], 0, len(bounds[b]) - 1, table.memory.arena, flat)),
        "find, as in an evaluation": timed(work.find),
        f"find_or_create (AHEAD {index.AHEAD})": work.find_or_create,
        "pool": pooling,
        "pool, through the caches": timed(lambda b: table._pool(work.bags[b], work.places[b], work.rows[b], unaligned)),
        "pool, any dim": patched(pool, "pool", like(pool.pool, FAST_DIM=0), pooling),
        "push (Adagrad)": work.push,
        "push, any dim": patched(update, "push", like(update.push, FAST_DIM=0), work.push),
        "scatter floor": timed(
            lambda b: scatter(work.rows[b], bounds[b], 0, len(bounds[b]) - 1, table.memory.arena, grads, np.float32(1e-6))
        ),
    }
    others = {
        "no prefetch": searching(prefetch=_nothing),
        **{f"prefetch {n} ahead": searching(AHEAD=n) for n in (8, 16, 32)},
        "references counted": like(index.find_or_create, nrt=True),
    }
    return found | {
        f"find_or_create, {name}": patched(index, "find_or_create", kernel, work.find_or_create) for name, kernel in others.items()
    }


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    to = parser.parse_args().json
    work = Workload()
    measured = variants(work)
    seconds = {name: np.empty(NUM_BATCHES * ROUNDS) for name in measured}
    for turn in range(-1, NUM_BATCHES * ROUNDS):  # the first turn compiles; the last one overwrites what it took
        # Each time in another order: a kernel that follows one which writes much pays for its lines.
        for place, name in enumerate(np.random.default_rng(turn + 1).permutation(list(measured))):
            seconds[name][turn] = measured[name]((turn + place) % NUM_BATCHES)
    signs, floor = float(np.mean([len(rows) for rows in work.rows])), float(np.median(seconds["gather floor"]))
    print(f"{signs:,.0f} signs a batch; {work.table.num_rows:,} rows")
    print(f"{'':38}{'ms':>8}{'10–90 %':>16}{'M signs/s':>11}{'× floor':>9}")
    results = {}
    for name, calls in seconds.items():
        low, median, high = (float(q) for q in np.quantile(calls, (0.1, 0.5, 0.9)))
        results[name] = {"median_s": median, "p10_s": low, "p90_s": high, "signs_per_s": signs / median}
        spread = f"{low * 1e3:.2f}–{high * 1e3:.2f}"
        print(f"{name:38}{median * 1e3:8.2f}{spread:>16}{signs / median / 1e6:11.0f}{median / floor:9.2f}")
    if to is not None:
        workload = {"signs_per_batch": signs, "rows": work.table.num_rows, "calls": NUM_BATCHES * ROUNDS}
        to.write_text(json.dumps({"machine": machine.describe(), "workload": workload, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

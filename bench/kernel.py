"""`python -m bench.kernel [--json FILE]`: the kernels of a table, one thread, beside what they would be without their tricks.

One batch of `dsp_ctr`'s shape (1024 samples, 76 slots, about 390 signs each, zipf 1.05) against 2.6 million resident rows of 16
floats and their Adagrad state. All variants run in one process, in turns, each time on another batch than the variant before, so
that none finds its lines warm. Times are CPU time, because machines are shared: median, 10th and 90th percentile of single calls.
Variants are the kernels' own code with one name replaced. Comments in `flowps/ps/kernels` cite this table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import machine
from flowps.ps.kernels import index, pool, update
from flowps.ps.kernels.vector import load16, prefetch, splat16, store16
from flowps.synthetic import dsp_ctr

SIZE, DIM, STRIDE = 1024, 16, 32
RESIDENT_ROWS, INDEX_SIZE = 2_600_000, 1 << 22
NUM_BATCHES, ROUNDS = 8, 6
Batch = tuple[NDArray[np.uint64], NDArray[np.int32]]  # signs, offsets
SHIFT = np.uint64(64 - 22)


def like(kernel: Any, *, nrt: bool = False, **names: Any) -> Any:
    """`kernel` compiled once more, with some of its module's names meaning something else, or with references counted."""
    function = FunctionType(kernel.py_func.__code__, {**kernel.py_func.__globals__, **names})
    return type(kernel)(function, targetoptions=kernel.targetoptions | {"_nrt": nrt})


def compiled(function: Any) -> Any:
    """A function of this module, compiled as the kernels are."""
    return type(pool.pool)(function, targetoptions=pool.pool.targetoptions)


@compiled
def _nothing(array, at):  # type: ignore[no-untyped-def]
    """In place of a prefetch."""


@compiled
def _plain_bag(rows, lo, hi, arena, dim, stride, out, to, scale):  # type: ignore[no-untyped-def]
    """`pool._pool_bag` with loops over arrays."""
    for d in range(dim):
        out[to + d] = np.float32(0)
    for i in range(lo, hi):
        if rows[i] >= 0:
            for d in range(dim):
                out[to + d] += arena[np.int64(rows[i]) * stride + d]
    for d in range(dim):
        out[to + d] *= scale


@compiled
def _gather(rows, bounds, arena, stride, out):  # type: ignore[no-untyped-def]
    """The floor: rows whose places are known, summed 16 floats at a time, written bag after bag."""
    n = len(rows)
    for bag in range(len(bounds) - 1):
        total = splat16(np.float32(0))
        for i in range(bounds[bag], bounds[bag + 1]):
            if i + 32 < n:
                prefetch(arena, np.int64(rows[i + 32]) * stride)
            total = total + load16(arena, np.int64(rows[i]) * stride)
        store16(out, bag * 16, total)


def draw() -> Iterator[Batch]:
    """Batches of the workload, one after the other."""
    description = dsp_ctr()
    share = np.arange(1, description.slots[0].cardinality + 1) ** -description.zipf_exponent
    thresholds = np.cumsum(share / share.sum())[:-1]
    random = np.random.default_rng(0)
    while True:
        lengths = np.array([1 + random.poisson(slot.mean_signs - 1, SIZE) for slot in description.slots])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ranks = np.searchsorted(thresholds, random.random(int(offsets[-1]))).astype(np.uint64)
        slots = np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths.sum(axis=1))
        z = (slots << np.uint64(32) | ranks) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        yield z ^ (z >> np.uint64(31)), offsets


def ranges(offsets: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First sign of each slot, and one past its last."""
    return offsets[:-1:SIZE].astype(np.int64), offsets[SIZE::SIZE].astype(np.int64)


def create(batch: Batch, into: Any, arena: Any, num_rows: int, rows: Any) -> int:
    """`find_or_create` of a whole batch. Returns the rows there are after."""
    starts, stops = ranges(batch[1])
    progress, most = np.array([0, 0, num_rows]), len(arena) // STRIDE
    slots, scale = np.arange(len(starts), dtype=np.uint64), np.full(len(starts), 0.01, np.float32)
    state, seed = np.float32(1e-8), np.uint64(7)
    assert index.find_or_create(
        batch[0], starts, stops, slots, into, SHIFT, rows, progress, most, arena, DIM, STRIDE, state, scale, seed
    )
    return int(progress[index.ROWS])


class Workload:
    """Batches, and a table that holds the rows of many batches before them. `rows`: of each batch, were all its signs known."""

    def __init__(self) -> None:
        source = draw()
        self.resident = np.zeros(2 * INDEX_SIZE, np.uint64)  # the index before the batches
        self.arena = np.zeros((RESIDENT_ROWS + (NUM_BATCHES + 1) * 100_000) * STRIDE, np.float32)
        self.num_rows = 0
        while self.num_rows < RESIDENT_ROWS:
            batch = next(source)
            self.num_rows = create(batch, self.resident, self.arena, self.num_rows, np.empty(len(batch[0]), np.int32))
        self.batches = [next(source) for _ in range(NUM_BATCHES)]
        self.rows = [np.empty(len(signs), np.int32) for signs, _ in self.batches]
        self.index, num_rows = self.resident.copy(), self.num_rows
        for batch, rows in zip(self.batches, self.rows, strict=True):
            num_rows = create(batch, self.index, self.arena, num_rows, rows)


def variants(work: Workload) -> dict[str, Callable[[int], float]]:
    """Name → measure one call on a batch, seconds."""
    num_slots = len(work.batches[0][1]) // SIZE
    positions, pooling = np.arange(num_slots), np.zeros(num_slots, np.int32)
    columns, width = positions * DIM, num_slots * DIM
    out, grads = np.full((2, SIZE * width), 1e-3, np.float32)
    grads.flags.writeable = False
    found = np.empty(max(len(rows) for rows in work.rows), np.int32)
    scratch = np.zeros(len(work.arena) // STRIDE, np.int32), found.copy(), np.empty(len(found) * DIM, np.float32)
    params = np.full((num_slots, 2), (0.05, 1e-7), np.float32)

    def timed(call: Callable[..., object], *args: Any) -> float:
        begin = time.thread_time()
        call(*args)
        return time.thread_time() - begin

    def finding(kernel: Any) -> Callable[[int], float]:
        return lambda b: timed(kernel, work.batches[b][0], *ranges(work.batches[b][1]), work.resident, SHIFT, found)

    def creating(b: int) -> float:
        work.index[:] = work.resident  # forget what the call before has created
        return timed(create, work.batches[b], work.index, work.arena, work.num_rows, found)

    def pooling_by(kernel: Any, known: bool) -> Callable[[int], float]:
        bags = positions, SIZE, pooling
        return lambda b: timed(kernel, work.rows[b], known, work.batches[b][1], *bags, work.arena, DIM, STRIDE, out, width, columns)

    def pushing(b: int, kernel: Any = update.push) -> float:
        bags = work.rows[b], work.batches[b][1], positions, SIZE, pooling
        return timed(kernel, *bags, grads, width, columns, *scratch, work.arena, DIM, STRIDE, update.ADAGRAD, params)

    like_push = like(update.push, _LINE=0)
    return {
        "gather floor": lambda b: timed(_gather, work.rows[b], work.batches[b][1], work.arena, STRIDE, out),
        f"find (AHEAD {index.AHEAD})": finding(index.find),
        "find, no prefetch": finding(like(index.find, prefetch=_nothing)),
        **{f"find, prefetch {n} ahead": finding(like(index.find, AHEAD=n)) for n in (8, 16, 32)},
        "find, references counted": finding(like(index.find, nrt=True)),
        "find_or_create": creating,
        "pool": pooling_by(pool.pool, True),
        "pool, references counted": pooling_by(like(pool.pool, nrt=True), True),
        "pool, any dim, rows unknown": pooling_by(pool.pool, False),
        "pool, the same in array loops": pooling_by(like(pool.pool, _pool_bag=_plain_bag), False),
        "push (Adagrad)": pushing,
        "push, any dim": lambda b: pushing(b, like_push),
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
    new = float(np.mean([(rows >= work.num_rows).mean() for rows in work.rows]))
    print(f"{signs:,.0f} signs a batch, {new:.0%} of them of rows not resident; {work.num_rows:,} rows resident")
    print(f"{'':28}{'ms':>8}{'10–90 %':>16}{'M signs/s':>11}{'× floor':>9}")
    results = {}
    for name, calls in seconds.items():
        low, median, high = (float(q) for q in np.quantile(calls, (0.1, 0.5, 0.9)))
        results[name] = {"median_s": median, "p10_s": low, "p90_s": high, "signs_per_s": signs / median}
        spread = f"{low * 1e3:.2f}–{high * 1e3:.2f}"
        print(f"{name:28}{median * 1e3:8.2f}{spread:>16}{signs / median / 1e6:11.0f}{median / floor:9.2f}")
    if to is not None:
        workload = {"signs_per_batch": signs, "new_share": new, "resident_rows": work.num_rows, "calls": NUM_BATCHES * ROUNDS}
        to.write_text(json.dumps({"machine": machine.describe(), "workload": workload, "results": results}, indent=2))


if __name__ == "__main__":
    main()

"""`python -m bench.map [--rows N] [--threads 1 2 4] [--seconds S] [--json FILE]`: the table as a map, beside other maps.

A map from 64-bit signs to rows of 16 floats; the figures are millions of signs per second:

    read     rows of signs that are there, copied out; flowps: an evaluation's lookup, one sign a bag
    write    rows of signs that are there, minus a rate times a gradient, a sign as often as it comes; flowps: a training lookup,
             which copies the rows out too, and its push: it does more than the others
    mixed    nine reads and a write
    insert   all signs, a million at most, each once, get rows of zeros in an empty map whose memory for rows is there; flowps and
             TensorFlow's tables find out that a sign is new, the others are told

Several threads call at once, with a batch each ("callers"), or share one call where the contender can (flowps: `ps.threads`). No
write may be lost: flowps has its locks, TensorFlow's tables and variable theirs, dict, NumPy and torch get one around their writes.
TensorFlow's own threads would not share the work of its tables: it has one thread inside an operation, and callers. torch has no
map: its ids are row numbers already.

Signs are drawn zipf (1.05) and uniform. All is measured in one process, in turns, each turn in another order. A sample is ten calls
of every caller, each on another batch (insert: one empty map filled); the first of a turn only warms. Medians of samples; machines
are shared, so compare within a run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine, workload
from bench.contender import CONTENDERS, DIM, MOST_SIGNS, OPERATIONS, Batch, Contender, tensorflow
from flowps.batch import Float32
from flowps.ps.memory import aligned_empty
from flowps.ps.team import Team

BATCHES = (4096, 65_536)
DRAWS = {"zipf": 1.05, "uniform": 0.0}
_CALLS, _TURNS = 10, 3
_DRAWN, _FILL = MOST_SIGNS, 1 << 16  # signs until they come again, and most that are inserted; signs filled in at a time


@dataclass
class Case:
    """One figure: an operation on batches of one size and draw, by `callers` at once, or by `threads` that share each call."""

    contender: Contender
    threads: int
    callers: int
    operation: str
    draw: str
    batches: Sequence[Batch]
    seconds: list[float] = field(default_factory=list)  # per sign, of each sample
    done: int = 0  # batches

    def sample(self, team: Team, scratch: Sequence[tuple[Float32, Float32]]) -> float:
        """Returns the seconds that it took. `scratch`: of each caller, an `out` and gradients, of the largest batch."""
        contender, inserting = self.contender, self.operation == "insert"
        count = len(self.batches) if inserting else _CALLS * self.callers
        batches = [self.batches[k % len(self.batches)] for k in range(self.done, self.done + count)]
        self.done += count
        if inserting:
            contender = type(contender)(sum(len(batch.signs) for batch in batches), self.threads)

        def work(caller: int) -> None:
            for call, batch in enumerate(batches[caller :: self.callers]):
                out, grads = (array[: len(batch.signs)] for array in scratch[caller])
                if inserting:
                    contender.insert(batch, out)
                elif self.operation == "write" or (self.operation == "mixed" and call == caller % _CALLS):
                    contender.write(batch, out, grads)
                else:
                    contender.read(batch, out)

        begin = time.perf_counter()
        team.run(work, self.callers)
        took = time.perf_counter() - begin
        if inserting:
            contender.close()
        self.seconds.append(took / sum(len(batch.signs) for batch in batches))
        return took

    def figure(self) -> dict[str, Any]:
        """The median of the samples, their 10th and 90th percentile, and what they are of."""
        slow, median, fast = (1e-6 / float(q) for q in np.quantile(self.seconds, (0.9, 0.5, 0.1)))
        return {
            "contender": self.contender.name,
            "threads": self.threads,
            "callers": self.callers,
            "operation": self.operation,
            "draw": self.draw,
            "batch_signs": len(self.batches[0].signs),
            "million_signs_per_s": median,
            "p10": slow,
            "p90": fast,
            "samples": len(self.seconds),
        }


def every(rows: int) -> Batch:
    """Each sign once."""
    ranks = np.arange(rows)
    return Batch(workload.sign(0, ranks), ranks)


def drawn(rows: int, exponent: float) -> Batch:
    """Signs of `rows` by chance, seeded."""
    signs = next(workload.draw(workload.Shape(_DRAWN, (rows,), (1.0,), exponent))).signs
    known = every(rows).signs
    order = np.argsort(known)
    return Batch(signs, order[np.searchsorted(known[order], signs)])


def cut(batch: Batch, size: int) -> list[Batch]:
    """Batches of `size` signs, the last one of the rest."""
    return [Batch(batch.signs[k : k + size], batch.ranks[k : k + size]) for k in range(0, len(batch.signs), size)]


def fill(contender: Contender, rows: int) -> None:
    """Give each sign its row, the same whatever the contender."""
    random = np.random.default_rng(0)
    for batch in cut(every(rows), _FILL):
        out = aligned_empty((len(batch.signs), DIM))
        contender.insert(batch, out)
        contender.write(batch, out, random.standard_normal(out.shape, np.float32))


def plan(rows: int, threads: Sequence[int], sizes: Sequence[int]) -> tuple[list[Case], dict[str, str]]:
    """All figures, of contenders that are filled; and who is left out, and why."""
    pools = {draw: drawn(rows, exponent) for draw, exponent in DRAWS.items()}
    known = {(draw, size): cut(pool, size) for draw, pool in pools.items() for size in sizes}
    new = {("new", size): cut(every(min(rows, _DRAWN)), size) for size in sizes}
    cases: list[Case] = []
    left_out: dict[str, str] = {}
    for kind in CONTENDERS:
        if importlib.util.find_spec(kind.package) is None:
            left_out[kind.name] = f"{kind.package} is not installed"
            continue
        ways = [(1, n) for n in threads] + [(n, 1) for n in threads if n > 1 and kind.shares_calls]
        maps = {shared: kind(rows, shared) for shared, _ in ways}
        for contender in maps.values():
            fill(contender, rows)
        for (shared, callers), operation in itertools.product(ways, kind.operations):
            for (draw, _), batches in (new if operation == "insert" else known).items():
                cases.append(Case(maps[shared], shared, callers, operation, draw, batches))
    return cases, left_out


def run(rows: int, threads: Sequence[int], seconds: float, sizes: Sequence[int] = BATCHES) -> dict[str, Any]:
    """Measure all, and say what was found."""
    cases, left_out = plan(rows, threads, sizes)
    team, random = Team(max(threads), "bench"), np.random.default_rng(1)
    grads = 1e-3 * random.standard_normal((max(sizes), DIM), np.float32)
    scratch = [(aligned_empty(grads.shape), grads.copy()) for _ in range(team.size)]
    for _ in range(_TURNS):
        for k in random.permutation(len(cases)):
            case, spent = cases[k], 0.0
            case.sample(team, scratch)  # compiles, and fetches the map into the caches
            case.seconds.pop()
            while spent < seconds / _TURNS:
                spent += case.sample(team, scratch)
    for contender in {id(case.contender): case.contender for case in cases}.values():
        contender.close()
    team.close()
    figures = [case.figure() for case in cases]
    return {"rows": rows, "seconds": seconds, "figures": figures, "left_out": left_out, "machine": machine.describe()}


def markdown(result: dict[str, Any]) -> str:
    """The figures as a Markdown table that can be read as it stands; a line for each contender that was left out."""
    figures: list[dict[str, Any]] = result["figures"]
    columns = list(dict.fromkeys((f["draw"], f["batch_signs"]) for f in figures))
    lines: dict[tuple[str, str, str], dict[tuple[str, int], str]] = {}
    for f in sorted(figures, key=lambda f: OPERATIONS.index(f["operation"])):
        way = f"{f['threads']} in one call" if f["threads"] > 1 else f"{f['callers']} callers" if f["callers"] > 1 else "1"
        line = lines.setdefault((f["operation"], f["contender"], way), {})
        line[f["draw"], f["batch_signs"]] = f"{f['million_signs_per_s']:.1f}"
    table = [["million signs/s", "", "threads", *(f"{draw} {size:,}" for draw, size in columns)]]
    table += [[*key, *(line.get(column, "") for column in columns)] for key, line in lines.items()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * w if k < 3 else "-" * (w - 1) + ":" for k, w in enumerate(widths)])
    padded = [[f"{cell:{'<' if k < 3 else '>'}{widths[k]}}" for k, cell in enumerate(line)] for line in table]
    left_out = [f"\n{name} is left out: {why}." for name, why in result["left_out"].items()]
    return "\n".join([f"| {' | '.join(line)} |" for line in padded] + left_out)


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.map", description="The table as a map, beside other maps.")
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="signs that are drawn from, each with its row")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="least time that a figure is measured for")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), metavar="N", help="signs of a batch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args()
    if importlib.util.find_spec("tensorflow") is not None:
        # It can be told so only before its first operation.
        tensorflow().config.threading.set_intra_op_parallelism_threads(1)
        tensorflow().config.set_visible_devices([], "GPU")
    result = run(options.rows, options.threads, options.seconds, options.batches)
    print(markdown(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`python -m bench.feed`: what in flight, feed threads and TensorFlow threads bring; the defaults are chosen from it.

Each setting trains each workload once per round, rounds interleaved so that a noisy minute hits all settings; medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import Any

from bench import machine
from bench.end_to_end import measure_once

_KEYS = ("examples_per_s", "trainer_wait_share", "test_auc")


def main() -> int:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.feed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Staleness first, with one thread; then threads, at the default in flight and above it, where a second one can show.
    settings = [*product((1, 2, 4, 8), (1,), (0,)), (2, 2, 0), (4, 2, 0), (4, 3, 0), (2, 1, 1), (4, 2, 1)]
    found: dict[tuple[str, int, int, int], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for workload, (in_flight, feed_threads, tensorflow_threads) in product(("criteo", "dsp_ctr"), settings):
            knobs = {"in_flight": in_flight, "feed_threads": feed_threads, "tensorflow_threads": tensorflow_threads}
            run = measure_once(workload, [part for k, v in knobs.items() for part in (f"--trainer.{k}", str(v))])
            found.setdefault((workload, in_flight, feed_threads, tensorflow_threads), []).append(run)
            print(workload, knobs, {key: round(run[key], 4) for key in _KEYS}, file=sys.stderr)
    result = {
        "rounds": options.rounds,
        "settings": [
            {
                "workload": workload,
                "in_flight": in_flight,
                "feed_threads": feed_threads,
                "tensorflow_threads": tensorflow_threads,
                **{key: statistics.median(run[key] for run in runs) for key in _KEYS},
            }
            for (workload, in_flight, feed_threads, tensorflow_threads), runs in sorted(found.items())
        ],
        "machine": machine.describe(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.feed`: what in flight, staleness, feed threads and TensorFlow threads bring; the defaults are chosen from it.

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
from flowps.config import Trainer

_NO_BOUND = Trainer().max_staleness
_KNOBS = ("in_flight", "max_staleness", "feed_threads", "tensorflow_threads")
_SETTINGS = [
    *((1, _NO_BOUND, 1, 0), (2, 0, 1, 0), (2, _NO_BOUND, 1, 0), (4, 0, 1, 0), (4, _NO_BOUND, 1, 0)),
    *((2, _NO_BOUND, 2, 0), (2, _NO_BOUND, 1, 1)),
]
_KEYS = ("examples_per_s", "trainer_wait_share", "test_auc")


def main() -> int:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.feed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for workload, setting in product(("criteo", "dsp_ctr"), _SETTINGS):
            knobs = dict(zip(_KNOBS, setting, strict=True))
            run = measure_once(workload, [part for k, v in knobs.items() for part in (f"--trainer.{k}", str(v))])
            found.setdefault((workload, setting), []).append(run)
            print(workload, knobs, {key: round(run[key], 4) for key in _KEYS}, file=sys.stderr)
    result = {
        "rounds": options.rounds,
        "settings": [
            {
                "workload": workload,
                **dict(zip(_KNOBS, setting, strict=True)),
                "max_staleness": min(setting[1], setting[0] - 1),
                **{key: statistics.median(run[key] for run in runs) for key in _KEYS},
            }
            for (workload, setting), runs in sorted(found.items())
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

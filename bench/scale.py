"""`python -m bench.scale [--rows N ...] [--json FILE]`: what a sign costs in tables from 10^5 to 5·10^7 rows.

`python -m bench.shard uniform` for each size, in a process of its own: signs drawn uniformly, so that nearly every one is a cache
miss, once the table is larger than the caches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import machine

SIZES = (100_000, 1_000_000, 10_000_000, 50_000_000)


def measure(rows: int) -> dict[str, Any]:
    """One size."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "result.json"
        command = [sys.executable, "-m", "bench.shard", "uniform", "--rows", str(rows), "--turns", "100", "--json", str(to)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(to.read_text())
    return {
        "rows": found["rows"],
        "lookup_ns_per_sign": found["lookup_ms_p50"] * 1e6 / found["signs_per_batch"],
        "push_ns_per_sign": found["push_ms_p50"] * 1e6 / found["signs_per_batch"],
        "floor_lookup_ns_per_sign": found["floor_lookup_ms"] * 1e6 / found["signs_per_batch"],
        "floor_push_ns_per_sign": found["floor_push_ms"] * 1e6 / found["signs_per_batch"],
        "inserts_per_s": found["inserts_per_s"],
        "bytes_per_row": found["bytes_per_row"],
    }


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args()
    sizes = []
    for rows in options.rows:
        sizes.append(measure(rows))
        print(json.dumps(sizes[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine.describe(), "sizes": sizes}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`python -m bench.all`: every benchmark that the README quotes, then its tables."""

from __future__ import annotations

import subprocess
import sys

from bench.table import RESULTS
from bench.table import main as write_tables

_COMMANDS = (
    ["bench.end_to_end", "criteo", "--net", "small", "--json", "end_to_end-criteo-small.json"],
    ["bench.end_to_end", "criteo", "--net", "deepfm", "--json", "end_to_end-criteo-deepfm.json"],
    ["bench.end_to_end", "dsp_ctr", "--net", "dnn", "--json", "end_to_end-dsp_ctr-dnn.json"],
    ["bench.kernel", "--json", "kernel.json"],
    ["bench.feed", "--json", "feed.json"],
)


def main() -> int:
    """Run all of them."""
    RESULTS.mkdir(exist_ok=True)
    for module, *arguments, result in _COMMANDS:
        subprocess.run([sys.executable, "-m", module, *arguments, str(RESULTS / result)], check=True)
    return write_tables()


if __name__ == "__main__":
    sys.exit(main())

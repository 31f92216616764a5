"""`python -m bench.all [ML1M_FOLDER]`: every benchmark that the README quotes, then its tables."""

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
    ["bench.shard", "dsp_ctr", "--threads", "1", "--json", "shard-1-dsp_ctr-1.json"],
    ["bench.shard", "dsp_ctr", "--threads", "2", "--json", "shard-1-dsp_ctr-2.json"],
    ["bench.shard", "criteo", "--threads", "1", "--json", "shard-2-criteo-1.json"],
    ["bench.shard", "criteo", "--threads", "2", "--json", "shard-2-criteo-2.json"],
    ["bench.shard", "uniform", "--threads", "1", "--json", "shard-3-uniform-1.json"],
    ["bench.shard", "uniform", "--threads", "2", "--json", "shard-3-uniform-2.json"],
    ["bench.shard", "dsp_ctr", "--evict", "--json", "shard-4-dsp_ctr-evict.json"],
    ["bench.shard", "dsp_ctr", "--rivals", "--turns", "30", "--json", "shard-rivals-1-dsp_ctr.json"],
    ["bench.shard", "criteo", "--rivals", "--turns", "30", "--json", "shard-rivals-2-criteo.json"],
    ["bench.scale", "--json", "scale.json"],
    ["bench.map", "--json", "map.json"],
    ["bench.feed", "--json", "feed.json"],
    ["bench.rpc", "--json", "rpc.json"],
    ["bench.placement", "--json", "placement.json"],
    ["bench.end_to_end", "--compare", "--json", "roles.json"],
    ["bench.checkpoint", "--json", "checkpoint.json"],
    ["bench.status", "--json", "status.json"],
    ["bench.serving", "--json", "serving.json"],
)
_STORAGE = "storage.json"  # needs a data set that is not generated here


def main() -> int:
    """Run all of them; with the folder of MovieLens-style data as argument, that of storages too."""
    RESULTS.mkdir(exist_ok=True)
    for module, *arguments, result in _COMMANDS:
        subprocess.run([sys.executable, "-m", module, *arguments, str(RESULTS / result)], check=True)
    if len(sys.argv) > 1:
        subprocess.run([sys.executable, "-m", "bench.storage", sys.argv[1], "--json", str(RESULTS / _STORAGE)], check=True)
    return write_tables()


if __name__ == "__main__":
    sys.exit(main())

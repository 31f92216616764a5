"""`python -m bench.all [--only NAME ...] [ML1M_FOLDER]`: every benchmark that README and docs quote, then their tables.

Each writes a file of `bench/results`, with the machine and the versions it was made on; `python -m bench.compare OLD NEW` compares
two such folders. They take some three hours; the machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

from bench.table import RESULTS
from bench.table import main as write_tables

_BFLOAT16 = "-- --trainer.precision mixed_bfloat16"
_COMMANDS = {
    "end_to_end-criteo-small": "end_to_end criteo --net small",
    "end_to_end-criteo-small-bfloat16": f"end_to_end criteo --net small {_BFLOAT16}",
    "end_to_end-criteo-deepfm": "end_to_end criteo --net deepfm --runs 2",
    "end_to_end-criteo-deepfm-bfloat16": f"end_to_end criteo --net deepfm --runs 2 {_BFLOAT16}",
    "end_to_end-dsp_ctr-dnn": "end_to_end dsp_ctr",
    "end_to_end-dsp_ctr-dnn-bfloat16": f"end_to_end dsp_ctr {_BFLOAT16}",
    "rival-1-criteo-small-keras": "end_to_end criteo --rival keras",
    "rival-1-criteo-small-torch": "end_to_end criteo --rival torch",
    "rival-2-dsp_ctr-dnn-keras": "end_to_end dsp_ctr --rival keras --runs 2",
    "rival-2-dsp_ctr-dnn-torch": "end_to_end dsp_ctr --rival torch --runs 2",
    "stages": "stages --turns 8",
    "kernel": "kernel",
    "shard-1-dsp_ctr-1": "shard dsp_ctr --threads 1",
    "shard-1-dsp_ctr-2": "shard dsp_ctr --threads 2",
    "shard-2-criteo-1": "shard criteo --threads 1",
    "shard-2-criteo-2": "shard criteo --threads 2",
    "shard-3-uniform-1": "shard uniform --threads 1",
    "shard-3-uniform-2": "shard uniform --threads 2",
    "shard-4-dsp_ctr-evict": "shard dsp_ctr --evict",
    "shard-rivals-1-dsp_ctr": "shard dsp_ctr --rivals --turns 30",
    "shard-rivals-2-criteo": "shard criteo --rivals --turns 30",
    "scale": "scale",
    "map": "map",
    "feed": "feed",
    "rpc": "rpc",
    "placement": "placement",
    "roles": "end_to_end --compare",
    "hundred": "hundred",  # from stages, rpc and roles
    "checkpoint": "checkpoint",
    "status": "status",
    "serving": "serving",
}
_OF_ML1M = {  # which is not generated here; {}: its folder
    "end_to_end-ml1m-small": "end_to_end ml1m --data {}",
    "storage": "storage {}",
}


def command_of(command: str, to: Path, folder: str = "") -> list[str]:
    """A benchmark that writes its result there; what stands after -- stays last."""
    words = [folder if word == "{}" else word for word in command.split()]
    at = words.index("--") if "--" in words else len(words)
    return [sys.executable, "-m", f"bench.{words[0]}", *words[1:at], "--json", str(to), *words[at:]]


def main() -> int:
    """Run all of them; with the folder of MovieLens-style data as argument, those that need it too."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ml1m", nargs="?", metavar="ML1M_FOLDER")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="results to make anew, by the names of their files")
    options = parser.parse_args()
    commands = _COMMANDS | (_OF_ML1M if options.ml1m else {})
    unknown = [name for name in options.only or () if name not in commands]
    if unknown:
        parser.error(f"unknown result {unknown[0]!r}; there are {', '.join(commands)}")
    RESULTS.mkdir(exist_ok=True)
    for name, command in commands.items():
        if options.only and name not in options.only:
            continue
        if "--rival torch" in command and importlib.util.find_spec("torch") is None:
            print(f"{name} is left out and stays as it is: torch is not installed (pip install torch)", file=sys.stderr)
            continue
        subprocess.run(command_of(command, RESULTS / f"{name}.json", options.ml1m or ""), check=True)
    return write_tables()


if __name__ == "__main__":
    sys.exit(main())

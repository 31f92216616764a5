"""`python -m bench.storage DATA [--json FILE]`: what narrower weights cost in quality, on MovieLens-style data.

DATA is a folder with `train.parquet` and `test.parquet`. Trains examples/ml1m.toml once for each storage and seed, as a user would,
with one batch in flight, so that runs with one seed differ in the storage alone, and reports the test AUC.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import machine

ROOT = Path(__file__).resolve().parents[1]
STORAGES, SEEDS = ("float32", "bfloat16", "float16"), (1, 2, 3)


def auc(data: Path, storage: str, seed: int) -> float:
    """The test AUC of one run."""
    with tempfile.TemporaryDirectory() as folder:
        knobs = {
            "--data.train": data / "train.parquet", "--data.test": data / "test.parquet", "--slot_default.storage": storage,
            "--seed": seed, "--run_dir": Path(folder) / "run", "--trainer.in_flight": 1, "--cluster.dashboard": "",
        }  # fmt: skip
        command = [sys.executable, "-m", "flowps.train", str(ROOT / "examples" / "ml1m.toml")]
        command += [str(word) for knob in knobs.items() for word in knob]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return float(json.loads((Path(folder) / "run" / "summary.json").read_text())["test"]["auc"])


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.storage", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args()
    found: dict[str, list[float]] = {storage: [] for storage in STORAGES}
    for seed in SEEDS:
        for storage in STORAGES:
            found[storage].append(auc(options.data, storage, seed))
            print(f"seed {seed}, {storage}: test auc = {found[storage][-1]:.4f}", flush=True)
    results = {
        storage: {
            "test_auc": values,
            "mean": statistics.mean(values),
            "difference": statistics.mean(ours - plain for ours, plain in zip(values, found["float32"], strict=True)),
        }
        for storage, values in found.items()
    }
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine.describe(), "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The command `python -m flowps.synthetic OUT_DIR`: generates a data set, or finds it there, and prints one summary.

Covers: arguments, messages and exit codes (0 done, 2 refused, 130 interrupted). Called by people and by the quickstart.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from flowps.errors import FlowpsError
from flowps.synthetic.dataset import Dataset, generate
from flowps.synthetic.description import WORKLOADS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments`, by default those of the process; returns the exit code."""
    options = _parser().parse_args(arguments)
    start_s = time.perf_counter()
    try:
        description = WORKLOADS[options.workload]()
        dataset = generate(description, options.out_dir, options.rows, options.test_rows, options.seed, threads=options.threads)
    except FlowpsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the data set is incomplete; run the same command again", file=sys.stderr)
        return 130
    print(_summary(dataset, time.perf_counter() - start_s))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flowps.synthetic",
        description="Generate a CTR data set with a known ground truth, so that the best reachable AUC is known.",
    )
    sizes = {name: describe() for name, describe in WORKLOADS.items()}
    rows = ", ".join(f"{name} {size.train_rows:,}" for name, size in sizes.items())
    test_rows = ", ".join(f"{name} {size.test_rows:,}" for name, size in sizes.items())
    parser.add_argument("out_dir", metavar="OUT_DIR", help="directory to write; an equal data set there is reused")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="quickstart", help="shape of the data; default %(default)s")
    parser.add_argument("--rows", type=int, help=f"training rows ({rows})")
    parser.add_argument("--test-rows", type=int, help=f"test rows ({test_rows})")
    parser.add_argument("--seed", type=int, default=7, help="seed of all draws; default %(default)s")
    parser.add_argument("--threads", type=int, help="files written at once; default one per CPU, up to 4")
    return parser


def _summary(dataset: Dataset, seconds: float) -> str:
    sizes = dataset.description
    verb = "found in" if dataset.reused else "written to"
    return "\n".join(
        (
            f"{sizes.name}, seed {sizes.seed}, {verb} {dataset.directory}",
            f"  rows          {sizes.train_rows:,} train, {sizes.test_rows:,} test",
            f"  label rate    {dataset.train_label_rate:.4f} train, {dataset.test_label_rate:.4f} test",
            f"  files         {len(dataset.train_files):,} train, {len(dataset.test_files):,} test",
            f"  size          {dataset.size_bytes / 1e6:,.1f} MB",
            f"  best AUC      {dataset.best_auc:.4f} on the test rows",
            f"  best logloss  {dataset.best_logloss:.4f} on the test rows",
            f"  time          {seconds:.1f} s",
        )
    )


if __name__ == "__main__":
    sys.exit(main())

"""Say what a run has left: `python -m flowps.report RUN_DIR`.

Prints how the run ended, its test quality, and the shards: their slots, and the share of lookups, rows, bytes and time that was
predicted of each and the share there was. Exit status: 0, or 1 for a directory that is no run's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from flowps.cluster.announce import announce_shards
from flowps.cluster.run_dir import read_placement, read_summary
from flowps.errors import FlowpsError
from flowps.status.lines import lines, quality
from flowps.status.progress import PlainConsole


def report(folder: Path, console: Console) -> None:
    """Print the report of the run in `folder`. Raises RunDirError where there is none."""
    placement, summary = read_placement(folder), read_summary(folder)
    if summary is None:
        console.print(f"{folder}: the run has not finished, or failed", soft_wrap=True)
    else:
        for line in lines(summary.finished):
            console.print(line, soft_wrap=True)
        if summary.test is not None:
            console.print(f"test: {quality(summary.test)}", soft_wrap=True)
    announce_shards(console, placement)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m flowps.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the directory that a run has left")
    try:
        report(parser.parse_args(argv).run_dir, PlainConsole())
    except FlowpsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

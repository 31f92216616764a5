"""Score files with a trained run: `python -m flowps.predict RUN DATA [DATA ...] OUT [--columns COLUMN ...]`.

RUN is the directory of a run; its rows and dense weights are read from the checkpoint that it ended with. DATA are Parquet files,
with or without labels: paths, globs, directories or fsspec URLs. OUT gets a Parquet file for each of them, in the same folders and
with its samples in the same order: the columns asked for, and `prediction`, the probability (of several labels `prediction_LABEL`).
A file appears when it is whole; begun again, the command goes on with those that are missing. `_SUCCESS` comes last.

Exit status: 0 predicted, 2 bad arguments, 1 bad data, no such run, or a failure, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from flowps.arguments import CommandParser, run_command
from flowps.cluster.interrupt import interruptible
from flowps.cluster.launch import gather_workers, launch
from flowps.cluster.prediction_folder import PredictionFolder
from flowps.cluster.scoring import Scoring, run_scoring
from flowps.cluster.trained_run import TrainedRun, is_free, open_run
from flowps.status.progress import PlainConsole


def predict(
    run: TrainedRun, data: Sequence[str], out: str, *, columns: Sequence[str] = (), overwrite: bool = False,
    console: Console | None = None,
) -> int:  # fmt: skip
    """Write the run's predictions for `data` to the folder `out`, a path or an fsspec URL. Returns how many samples were scored.

    columns    of the data that are copied beside the predictions
    overwrite  whether files of another model, or with other columns, are replaced; otherwise they are refused
    console    told what happens (stdout by default)

    Files that are there already, of the same checkpoint and of the same data, are left as they are. Raises FlowpsError for
    everything that a user can mend.
    """
    console = console or PlainConsole()
    say = partial(console.print, soft_wrap=True)
    columns = tuple(dict.fromkeys([columns] if isinstance(columns, str) else columns))
    files = run.files(data, columns, labelled=False)
    schema = run.schema_for(files, labelled=False)
    url = out if "://" in out else os.path.abspath(out)  # workers have working directories of their own
    folder = PredictionFolder(url, run.resume.last.name, schema.labels, columns, run.config.data.partition_rows)
    left = folder.prepare(files, overwrite)
    samples = sum(file.num_rows for file in left)
    there = f"; {len(files) - len(left)} file(s) are there already" if len(left) < len(files) else ""
    say(f"{run.path}: {run.resume.last.name}; {samples:,} samples in {len(left)} file(s){there}")
    if left:
        with interruptible(saves="stopping; whole files stay") as interrupts, launch(run.config) as (client, _):
            scoring = Scoring(
                run.resume, str((run.path / "model.keras").absolute()), run.read_spec(schema, False, columns),
                lambda: run.plan(schema, gather_workers(client, run.config, say, lambda: bool(interrupts))),
                lambda count: folder.shares(count, folder.missing(files)),
            )  # fmt: skip
            run_scoring(client, scoring, say, lambda: bool(interrupts))
    folder.finish()
    if others := folder.others(files):
        say(f"{out} has {len(others)} Parquet file(s) more, which are no predictions of DATA: {', '.join(others[:3])}"
            f"{', …' if len(others) > 3 else ''}")  # fmt: skip
    say(f"predictions of {sum(file.num_rows for file in files):,} samples are in {out}")
    return samples


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    parser = CommandParser("python -m flowps.predict", __doc__ or "", is_free)
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    parser.add_argument("data", nargs="+", metavar="DATA", help="files to score")
    parser.add_argument("out", metavar="OUT", help="folder for the predictions, a path or an fsspec URL")
    parser.add_argument("--columns", nargs="+", default=[], metavar="COLUMN", help="columns to copy beside the predictions")
    parser.add_argument("--overwrite", action="store_true", help="replace predictions of another model")
    parser.add_argument("--checkpoint", default="", metavar="NAME", help="another checkpoint of the run than it ended with")
    found, overrides = parser.parse(argv)
    console = PlainConsole()
    run = open_run(found.run, overrides, found.checkpoint, partial(console.print, soft_wrap=True))
    predict(run, found.data, found.out, columns=found.columns, overwrite=found.overwrite, console=console)


if __name__ == "__main__":
    sys.exit(main())

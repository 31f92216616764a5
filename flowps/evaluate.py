"""Evaluate a trained run on other data: `python -m flowps.evaluate RUN DATA [DATA ...] [--group COLUMN] [--slice COLUMN ...]`.

RUN is the directory of a run; its rows and dense weights are read from the checkpoint that it ended with. DATA are Parquet files
with labels: paths, globs, directories or fsspec URLs. Prints AUC, PR-AUC, logloss, normalised entropy and calibration, with --group
the AUC within the groups of a column (GAUC), and with --slice the same figures for every value of a column. Creates no rows and
changes nothing. The figures do not depend on how many processes score.

Exit status: 0 evaluated, 2 bad arguments, 1 bad data, no such run, or a failure, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial, reduce
from pathlib import Path

import msgspec
from rich.console import Console

from flowps.arguments import CommandParser, run_command
from flowps.cluster.interrupt import interruptible
from flowps.cluster.launch import gather_workers, launch
from flowps.cluster.scoring import Scoring, Share, run_scoring
from flowps.cluster.tally_sink import Wanted
from flowps.cluster.trained_run import TrainedRun, is_free, open_run
from flowps.errors import OutputError
from flowps.hub.partition import partitions
from flowps.quality import Quality, Tally, show
from flowps.status.progress import PlainConsole


def evaluate(
    run: TrainedRun, data: Sequence[str], *, group: str = "", slices: Sequence[str] = (), buckets: int = 10,
    console: Console | None = None,
) -> dict[str, Quality]:  # fmt: skip
    """The quality of the run's predictions on `data`, by label.

    group     the column within whose groups samples are ranked for GAUC; "": none
    slices    columns for each value of which there are figures
    buckets   of equally many samples, by prediction, for the calibration
    console   told what happens (stdout by default)

    Raises FlowpsError for everything that a user can mend.
    """
    console = console or PlainConsole()
    say = partial(console.print, soft_wrap=True)
    labels = tuple(run.schema.get("labels", [run.schema["label"]]))
    wanted = Wanted(labels, tuple(dict.fromkeys([slices] if isinstance(slices, str) else slices)), group)
    files = run.files(data, wanted.columns)
    schema = run.schema_for(files, labelled=True)
    parts = partitions(files, run.config.data.partition_rows)
    say(f"{run.path}: {run.resume.last.name}; {sum(part.num_rows for part in parts):,} samples in {len(files)} file(s)")
    with interruptible(saves="stopping; nothing is evaluated") as interrupts, launch(run.config) as (client, _):
        scoring = Scoring(
            run.resume, str((run.path / "model.keras").absolute()), run.read_spec(schema, True, wanted.columns),
            lambda: run.plan(schema, gather_workers(client, run.config, say, lambda: bool(interrupts))),
            lambda count: [Share(tuple(parts[k::count]), wanted.sink) for k in range(count)],
        )  # fmt: skip
        found: list[dict[str, Tally]] = run_scoring(client, scoring, say, lambda: bool(interrupts))
    return {label: reduce(_merged, [of[label] for of in found]).result(buckets) for label in labels}


def _merged(tally: Tally, other: Tally) -> Tally:
    tally.merge(other)
    return tally


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    parser = CommandParser("python -m flowps.evaluate", __doc__ or "", is_free)
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    parser.add_argument("data", nargs="+", metavar="DATA", help="files to evaluate on")
    parser.add_argument("--group", default="", metavar="COLUMN", help="rank within the groups of this column (GAUC)")
    parser.add_argument("--slice", nargs="+", default=[], metavar="COLUMN", help="figures for every value of these columns")
    parser.add_argument("--buckets", type=int, default=10, metavar="N", help="buckets of the calibration (default: 10)")
    parser.add_argument("--checkpoint", default="", metavar="NAME", help="another checkpoint of the run than it ended with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    found, overrides = parser.parse(argv)
    if found.buckets < 1:
        parser.error(f"--buckets: expected 1 or more, found {found.buckets}")
    console = PlainConsole()
    run = open_run(found.run, overrides, found.checkpoint, partial(console.print, soft_wrap=True))
    quality = evaluate(run, found.data, group=found.group, slices=found.slice, buckets=found.buckets, console=console)
    for label, of_label in quality.items():
        if len(quality) > 1:
            console.print(f"\nlabel {label}")
        show(of_label, console)
    if found.json is not None:
        _write(found.json, quality)


def _write(path: Path, quality: dict[str, Quality]) -> None:
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(quality)) + b"\n")
    except OSError as error:
        raise OutputError(f"--json {path}: cannot be written: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main())

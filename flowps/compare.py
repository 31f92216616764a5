"""Set runs side by side: `python -m flowps.compare RUN_A RUN_B [RUN_C ...]`.

Prints, for every stage of the trainer, P50, P95 and P99 of every run and how much faster or slower its P50 is than that of the
first run; then rates, CPU, quality and rows, what bounded each run, and the knobs in which the runs differ. A run that has not
finished is compared as far as it went, and that is said. Exit status: 0, 1 for a directory that is no run's or a file that cannot
be written, 2 for options that make no sense.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Column, Table

from flowps.arguments import run_command
from flowps.errors import ConfigError, OutputError, RunDirError
from flowps.run_record import RunRecord, names_of, read_run, stages_of
from flowps.status.progress import PlainConsole
from flowps.status.stage import RELATIVE_ERROR
from flowps.status.verdict import Verdict

MISSING = "–"
_SAME = 2 * RELATIVE_ERROR  # two quantiles may differ by so much and be equal
_NOTHING_US = 0.1  # shorter times are no times: nothing was waited for
_MOST_CHARACTERS = 60  # of a knob's value
_NO_DIFFERENCE = frozenset({"run_dir"})
_WIDE = 400  # columns where nobody's terminal wraps


class StageFigures(msgspec.Struct, frozen=True):
    """A stage of one run; `speed_up`: the first run's P50 over this one's, None where one of them is missing or nothing."""

    count: int
    p50_us: float
    p95_us: float
    p99_us: float
    speed_up: float | None


class RunFigures(msgspec.Struct, frozen=True):
    """One run. None: not known. `speed_up`: its examples/s over the first run's.

    trainer_cpu_s_per_million   of the first trainer's process, in steady state
    cpu_s_per_million           of all processes, after the first steps
    """

    name: str
    path: str
    finished: bool
    steps: int
    examples_per_s: float | None
    speed_up: float | None
    cpu_s_per_million: float | None
    trainer_cpu_s_per_million: float | None
    trainer_wait_share: float | None
    test_auc: float | None
    test_logloss: float | None
    rows: int
    verdict: Verdict | None


class Comparison(msgspec.Struct, frozen=True):
    """Some runs. `stages` and `knobs` have an entry for each run, in order: None where the run has no such stage or knob."""

    runs: list[RunFigures]
    stages: dict[str, list[StageFigures | None]]
    knobs: dict[str, list[Any]]


def compare(records: Sequence[RunRecord]) -> Comparison:
    """What differs between runs, against the first. Raises RunDirError for one that has measured nothing."""
    for record in records:
        if record.last is None:
            raise RunDirError(
                f"{record.path}: has not finished, and has no status report yet (status.jsonl is empty); wait until it has trained "
                "for status.interval_s seconds"
            )
    rates = [record.examples_per_s for record in records]
    return Comparison(
        [
            _figures(record, name, rate, _over(rate, rates[0]))
            for record, name, rate in zip(records, names_of(records), rates, strict=True)
        ],
        {stage: _stage(records, stage) for stage in stages_of(records)},
        _differences(records),
    )


def _figures(record: RunRecord, name: str, rate: float | None, speed_up: float | None) -> RunFigures:
    end = record.ending.finished if record.ending is not None else None
    test = record.ending.test if record.ending is not None else None
    return RunFigures(
        name=name,
        path=str(record.path),
        finished=end is not None,
        steps=record.steps,
        examples_per_s=rate,
        speed_up=speed_up,
        cpu_s_per_million=record.cpu_s_per_million,
        trainer_cpu_s_per_million=(end.steady_cpu_s_per_million or None) if end is not None else None,
        trainer_wait_share=end.steady_trainer_wait_share if end is not None and end.steady_examples_per_s else None,
        test_auc=test.auc if test is not None else None,
        test_logloss=test.logloss if test is not None else None,
        rows=record.rows,
        verdict=record.last.verdict if record.last is not None else None,
    )


def _stage(records: Sequence[RunRecord], name: str) -> list[StageFigures | None]:
    found = [record.last.stages.get(name) if record.last is not None else None for record in records]
    first = found[0].p50_us if found[0] is not None else None
    return [
        None if of is None else StageFigures(of.count, of.p50_us, of.p95_us, of.p99_us, _over(first, of.p50_us, _NOTHING_US))
        for of in found
    ]


def _differences(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    paths = dict.fromkeys(path for record in records for path in record.knobs if path not in _NO_DIFFERENCE)
    found = {path: [record.knobs.get(path) for record in records] for path in paths}
    return {path: values for path, values in found.items() if any(value != values[0] for value in values)}


def _over(numerator: float | None, denominator: float | None, least: float = 0.0) -> float | None:
    if numerator is None or denominator is None or min(numerator, denominator) <= least:
        return None
    return numerator / denominator


def against(speed_up: float | None) -> str:
    """A ratio to the first run in words; ratios within the error of two quantiles are the same."""
    if speed_up is None:
        return MISSING
    times, word = (speed_up, "faster") if speed_up >= 1 else (1 / speed_up, "slower")
    if times <= 1 + _SAME:
        return "same"
    digits = 2 if times < 1.95 else 1 if times < 9.95 else 0
    return f"{times:,.{digits}f}× {word}"


class _Sheet(msgspec.Struct, frozen=True):
    """A table before it is text: the first `names` columns hold words, the others numbers. `groups`: rows that stand together."""

    head: list[str]
    groups: list[list[list[str]]]
    names: int


def _stages(found: Comparison) -> _Sheet:
    first = found.runs[0].name
    groups = []
    for stage, of_runs in found.stages.items():
        rows = []
        for k, (run, of) in enumerate(zip(found.runs, of_runs, strict=True)):
            times = [MISSING] * 3 if of is None else [_ms(us) for us in (of.p50_us, of.p95_us, of.p99_us)]
            rows.append([stage if not k else "", run.name, *times, "" if not k else against(of.speed_up if of else None)])
        groups.append(rows)
    return _Sheet(["stage (ms)", "run", "P50", "P95", "P99", f"P50 against {first}"], groups, 2)


def _rates(found: Comparison) -> _Sheet:
    runs = found.runs

    def row(name: str, figures: Sequence[float | None], form: str) -> list[str]:
        return [name, *(MISSING if figure is None else format(figure, form) for figure in figures)]

    return _Sheet(
        ["", *(run.name for run in runs)],
        [
            [
                row("steady examples/s", [run.examples_per_s for run in runs], ",.0f"),
                [f"  against {runs[0].name}", "", *(against(run.speed_up) for run in runs[1:])],
                row("CPU s per million examples, all processes", [run.cpu_s_per_million for run in runs], ".2f"),
                row("  of which the trainer's process", [run.trainer_cpu_s_per_million for run in runs], ".2f"),
                row("trainer waited", [run.trainer_wait_share for run in runs], ".1%"),
                row("test AUC", [run.test_auc for run in runs], ".5f"),
                row("test logloss", [run.test_logloss for run in runs], ".5f"),
                row("embedding rows", [run.rows for run in runs], ",d"),
                row("steps", [run.steps for run in runs], ",d"),
            ]
        ],
        1,
    )


def _knobs(found: Comparison) -> _Sheet:
    rows = [[path, *(_shown(value) for value in values)] for path, values in found.knobs.items()]
    return _Sheet(["knob", *(run.name for run in found.runs)], [rows], len(found.runs) + 1)


def _remarks(found: Comparison) -> Iterator[str]:
    """What bounded each run; a run that has not finished says so."""
    for run in found.runs:
        if not run.finished:
            yield (
                f"{run.name}: has not finished, or failed; compared as far as it went, step {run.steps:,}, with the rate of its "
                "metric lines"
            )
    for run in found.runs:
        yield f"{run.name}: {run.verdict or 'no verdict: too little was trained'}"


def print_text(found: Comparison, console: Console) -> None:
    """For a terminal or a file."""
    _print(_stages(found), console)
    _print(_rates(found), console)
    for remark in _remarks(found):
        console.print(remark, soft_wrap=True)
    console.print()
    if found.knobs:
        _print(_knobs(found), console)
    else:
        console.print("no knob differs")


def _print(sheet: _Sheet, console: Console) -> None:
    columns = [Column(head, justify="left" if k < sheet.names else "right") for k, head in enumerate(sheet.head)]
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for group in sheet.groups:
        for row in group:
            table.add_row(*row)
    console.print(table)
    console.print()


def markdown(found: Comparison) -> str:
    """For an issue or a page: the same as GitHub-flavoured Markdown."""
    parts = [_table(_stages(found)), _table(_rates(found)), "\n".join(f"- {_escaped(remark)}" for remark in _remarks(found))]
    parts.append(_table(_knobs(found)) if found.knobs else "No knob differs.")
    return "\n\n".join(parts) + "\n"


def _table(sheet: _Sheet) -> str:
    rows = [sheet.head, *(row for group in sheet.groups for row in group)]
    lines = ["| " + " | ".join(_escaped(cell.strip()) for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("---" if k < sheet.names else "---:" for k in range(len(sheet.head))) + "|")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    for character in "\\`*_[]|<>":
        text = text.replace(character, {"<": "&lt;", ">": "&gt;"}.get(character, f"\\{character}"))
    return text


def _ms(us: float) -> str:
    return f"{us / 1000:,.3f}"


def _shown(value: Any) -> str:
    if value is None:
        return MISSING
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def _rendered(found: Comparison, form: str) -> str:
    if form == "json":
        return msgspec.json.format(msgspec.json.encode(found)).decode() + "\n"
    if form == "markdown":
        return markdown(found)
    file = io.StringIO()
    print_text(found, PlainConsole(file=file, width=_WIDE))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n") + "\n"


def _check_picture(path: Path, num_runs: int) -> None:
    from flowps.picture import MOST_RUNS

    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--picture {path}: a picture is a .png or .svg file; give its name such an end")
    if num_runs > MOST_RUNS:
        raise ConfigError(f"--picture: {num_runs} runs, and a picture shows {MOST_RUNS} at most; leave some out")


def _run(options: argparse.Namespace) -> None:
    """Read, compare, write. Raises FlowpsError."""
    if len(options.runs) < 2:
        raise ConfigError("one run directory was given, and it takes two to compare; --help explains")
    if options.picture is not None:
        _check_picture(options.picture, len(options.runs))
    records = [read_run(folder) for folder in options.runs]
    found = compare(records)
    if options.picture is not None:
        from flowps.picture import draw_comparison  # here: matplotlib takes a second to import

        draw_comparison(records, options.picture)
    if options.out is not None:
        try:
            options.out.write_text(_rendered(found, options.format), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{options.out}: cannot be written: {error.strerror or error}") from None
    else:
        console = PlainConsole()
        console.print(_rendered(found, options.format), soft_wrap=True, end="")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m flowps.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="directories of runs; the first is the yardstick")
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of to standard output")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the stages and rates: a .png or .svg file")
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())

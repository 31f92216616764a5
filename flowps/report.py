"""Say what a run has left: `python -m flowps.report RUN_DIR [--html report.html]`.

Prints how the run ended, its test quality, what bounded it, and the shards: their slots, the share of lookups, rows, bytes and time
that was predicted of each and the share there was, how full and how busy each is; then the ledger. With --html it writes one page
besides, with pictures of all of that: it needs no other file and no network. A run that has not finished is reported as far as it
went. Exit status: 0, or 1 for a directory that is no run's or a file that cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Console

from flowps.arguments import run_command
from flowps.checkpoint.ledger import Ledger
from flowps.cluster.announce import announce_shards
from flowps.cluster.shard_report import PlacementReport, balance
from flowps.errors import OutputError
from flowps.knob import knobs
from flowps.run_record import RunRecord, read_run, stages_of
from flowps.status.event import Interval, Metrics, Started
from flowps.status.figures import ShardFigures
from flowps.status.lines import auc, lines, quality
from flowps.status.progress import PlainConsole
from flowps.status.verdict import worst_slots
from flowps.version import __version__

_SHOWN_SHARDS, _SHOWN_SLOTS, _SHOWN_SIGNS = 8, 5, 3  # in the text
_PAGE_SLOTS, _PAGE_SIGNS, _PAGE_LINES = 15, 5, 200
_MOST_SEGMENTS = 400  # of the strip that shows the verdicts: narrower ones nobody sees
_COLORS = 8  # that the page has
_NOTHING = "–"


def report(record: RunRecord, console: Console) -> None:
    """Print the report of a run. Raises RunDirError for files of another version."""
    if record.ending is None:
        console.print(f"{record.path}: the run has not finished, or failed", soft_wrap=True)
    else:
        for line in lines(record.ending.finished):
            console.print(line, soft_wrap=True)
        if record.ending.test is not None:
            console.print(f"test: {quality(record.ending.test)}", soft_wrap=True)
        for label, metrics in record.ending.more.items():
            console.print(f"test of label {label}: {quality(metrics)}", soft_wrap=True)
    if record.last is not None and record.last.verdict is not None:
        console.print(str(record.last.verdict), soft_wrap=True)
    placement = record.placement()
    if placement is not None:
        announce_shards(console, placement)
    for line in _shard_lines(record.last.shards if record.last is not None else [], placement):
        console.print(line, soft_wrap=True)
    if record.ending is not None and record.ending.ledger is not None:
        console.print(record.ending.ledger.explain(), soft_wrap=True)


def _shard_lines(shards: Sequence[ShardFigures], placement: PlacementReport | None) -> Iterator[str]:
    """Four lines for each shard; of many shards the busiest."""
    shown = _busiest(shards)
    for of in shown:
        hits = "" if of.hit_rate is None else f", {of.hit_rate:.2%} of the signs had a row"
        load = _measured(placement, of.shard)
        load = f", {load} of the load" if load else ""
        yield (
            f"shard {of.shard} (worker {of.worker}): {of.rows:,} of at most {of.capacity_rows:,} rows ({of.bytes / 1e6:,.1f} MB, "
            f"index load {of.index_load:.2f}){load}{hits}; {of.evicted:,} evicted, {of.expired:,} expired, {of.refused:,} refused"
        )
        slots = worst_slots([of], _SHOWN_SLOTS)
        if slots:
            yield f"  heaviest slots: {', '.join(f'{slot} {share:.1%}' for slot, share in slots)}"
        if of.hot:
            yield f"  hottest signs: {', '.join(f'{slot} {sign} {share:.1%}' for slot, sign, share in of.hot[:_SHOWN_SIGNS])}"
        if of.staleness:
            yield f"  staleness: {_stale(of.staleness)}"
    if len(shards) > len(shown):
        yield f"… and {len(shards) - len(shown)} shards less busy, all in the page of --html"


def page(record: RunRecord) -> str:
    """The report as one HTML page. Raises RunDirError for files of another version."""
    from flowps import picture  # here: matplotlib takes a second to import

    placement, last, ending = record.placement(), record.last, record.ending
    shards = last.shards if last is not None else []
    happened = [line for event in record.events() if not isinstance(event, Interval) for line in lines(event)]
    started = [event for event in record.events() if isinstance(event, Started)]
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        files("flowps").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        name=record.name, path=record.path.resolve(), began=_began(record), version=record.version, made_by=__version__,
        devices=", ".join(started[-1].devices) if started else "",
        contents=[("training", "Training"), ("speed", "Examples per second"), ("latency", "Latency"), ("shards", "Shards"),
                  ("ledger", "Ledger"), ("events", "What happened"), ("config", "Config")],
        finished=ending is not None, verdict=last.verdict if last is not None else None, cards=list(_cards(record)),
        training=Markup(picture.training_svg(record)), rate=Markup(picture.rate_svg(record)),
        stages=Markup(picture.stages_svg(record)), times=Markup(picture.times_svg(record)),
        shard_stages=Markup(picture.shard_stages_svg(record)),
        shard_loads=Markup(picture.shards_svg(placement.shards if placement is not None else [])),
        interval_steps=record.knobs.get("status.print_interval", ""),
        test=_test_table(ending.test, ending.best_auc) if ending is not None and ending.test is not None else None,
        bounds=_bounds(record), stage_table=_stage_table(record),
        placement_said=balance(placement) if placement is not None else "", shard_table=_shard_table(shards, placement),
        slots=list(_slots(shards, placement)), num_slots=len({slot for of in shards for slot in of.signs}), hot=_hot_table(shards),
        staleness=_staleness_table(shards),
        ledger=_ledger(ending.ledger) if ending is not None and ending.ledger is not None else None,
        happened=happened[-_PAGE_LINES:], left_out=max(0, len(happened) - _PAGE_LINES), processes=_process_table(record),
        trainers=_trainer_table(record), changed=_changed_table(record), toml=record.toml,
    )  # fmt: skip


class _Table(NamedTuple):
    """For the page: the first `words` columns hold words, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int


def _began(record: RunRecord) -> str:
    """When the first step was done, or else the config written."""
    began = record.ending.finished.first_step_at if record.ending is not None else 0.0
    began = began or (record.path / "config.toml").stat().st_mtime
    return f"{datetime.fromtimestamp(began).astimezone():%Y-%m-%d %H:%M %Z}"


def _cards(record: RunRecord) -> Iterator[tuple[str, str]]:
    """The figures that people look for first, and their names."""
    ending = record.ending
    if ending is not None and ending.test is not None:
        best = f" of {ending.best_auc:.4f} reachable" if ending.best_auc is not None else ""
        yield auc(ending.test.auc), f"test AUC{best}"
        yield f"{ending.test.logloss:.4f}", "test logloss"
    if record.examples_per_s is not None:
        yield f"{record.examples_per_s:,.0f}", "examples/s in steady state" if ending is not None else "examples/s so far"
    if ending is not None:
        if ending.finished.steady_examples_per_s:
            yield f"{ending.finished.steady_trainer_wait_share:.1%}", "of the time the trainer waited"
        yield f"{ending.finished.examples:,}", f"examples in {ending.finished.epochs} epoch(s), {ending.finished.steps:,} steps"
        yield f"{ending.finished.seconds:,.1f} s", "training and evaluation"
    else:
        yield f"{record.steps:,}", "steps so far"
    if record.cpu_s_per_million is not None:
        yield f"{record.cpu_s_per_million:.1f} s", "CPU per million examples, all processes"
    yield f"{record.rows:,}", "embedding rows"


def _test_table(test: Metrics, best_auc: float | None) -> _Table:
    calibration = f"{test.prob_mean / test.real_mean:.3f}" if test.real_mean else _NOTHING
    return _Table(
        ("examples", "AUC", "best reachable", "logloss", "mean prediction", "mean label", "calibration"),
        [
            (
                f"{test.examples:,}", auc(test.auc), _NOTHING if best_auc is None else f"{best_auc:.4f}", f"{test.logloss:.5f}",
                f"{test.prob_mean:.5f}", f"{test.real_mean:.5f}", calibration,
            )
        ],
        0,
    )  # fmt: skip


def _bounds(record: RunRecord) -> dict[str, Any] | None:
    """What bounded the run in each window between two reports: segments in order, and the share of each in the time judged."""
    segments: list[tuple[str, float]] = []
    before = 0.0
    for seconds, found in record.reports():
        whole = record.ending is not None and found == record.last  # its verdict is of the whole run
        if found.verdict is not None and not whole:
            of = "" if found.verdict.shard is None else f" on shard {found.verdict.shard}"
            name = f"{found.verdict.bound_by}{of}"
            if segments and segments[-1][0] == name:
                segments[-1] = (name, segments[-1][1] + seconds - before)
            else:
                segments.append((name, seconds - before))
        before = seconds
    if not segments:
        return None
    spent: Counter[str] = Counter()
    for name, seconds in segments:
        spent[name] += seconds  # type: ignore[assignment]
    colors = {name: min(k, _COLORS - 1) + 1 for k, name in enumerate(name for name, _ in spent.most_common())}
    total = sum(spent.values()) or 1
    strip = [(round(seconds, 3), name, colors[name]) for name, seconds in segments] if len(segments) <= _MOST_SEGMENTS else []
    return {"strip": strip, "shares": [(name, f"{of / total:.0%}", colors[name]) for name, of in spent.most_common()]}


def _stage_table(record: RunRecord) -> _Table:
    found = record.last.stages if record.last is not None else {}
    return _Table(
        ("stage", "count", "P50 ms", "P95 ms", "P99 ms", "longest ms", "total s"),
        [
            (name, f"{of.count:,}", *(f"{us / 1000:,.3f}" for us in (of.p50_us, of.p95_us, of.p99_us, of.max_us)),
             f"{of.total_us / 1e6:,.1f}")
            for name in stages_of([record]) for of in [found[name]]
        ],
        1,
    )  # fmt: skip


def _shard_table(shards: Sequence[ShardFigures], placement: PlacementReport | None) -> _Table:
    return _Table(
        ("shard", "worker", "load predicted", "measured", "rows", "at most", "MB", "index load", "hit rate", "evicted", "expired",
         "refused"),
        [
            (
                str(of.shard), of.worker, _predicted(placement, of.shard) or _NOTHING, _measured(placement, of.shard) or _NOTHING,
                f"{of.rows:,}", f"{of.capacity_rows:,}", f"{of.bytes / 1e6:,.1f}", f"{of.index_load:.2f}",
                _NOTHING if of.hit_rate is None else f"{of.hit_rate:.2%}", f"{of.evicted:,}", f"{of.expired:,}", f"{of.refused:,}",
            )
            for of in shards
        ],
        2,
    )  # fmt: skip


def _slots(shards: Sequence[ShardFigures], placement: PlacementReport | None) -> Iterator[dict[str, object]]:
    worst = worst_slots(shards, _PAGE_SLOTS)
    for name, share in worst:
        load = placement.loads.get(name) if placement is not None else None
        yield {
            "name": name,
            "shards": ", ".join(str(of.shard) for of in shards if of.signs.get(name)),
            "share": f"{share:.1%}",
            "width": round(100 * share / (worst[0][1] or 1), 2),
            "signs": _NOTHING if load is None else f"{load.signs:,.2f}",
            "distinct": _NOTHING if load is None else f"{load.distinct:,.3f}",
            "rows": _NOTHING if load is None else f"{load.rows:,}",
        }


def _hot_table(shards: Sequence[ShardFigures]) -> _Table:
    return _Table(
        ("shard", "slot", "sign", "of the shard's signs"),
        [
            (str(of.shard) if not k else "", slot, str(sign), f"{share:.2%}")
            for of in _busiest(shards)
            for k, (slot, sign, share) in enumerate(of.hot[:_PAGE_SIGNS])
        ],
        2,
    )


def _staleness_table(shards: Sequence[ShardFigures]) -> _Table:
    found = [of for of in _busiest(shards) if of.staleness]
    return _Table(
        ("shard", "mean", "at most", "batches by pushes between"),
        [(str(of.shard), f"{_mean(of.staleness):.2f}", str(max(of.staleness)), _stale(of.staleness)) for of in found],
        1,
    )


def _ledger(of: Ledger) -> dict[str, object]:
    counts = [("read", of.read), ("trained", of.trained), ("dropped", sum(of.dropped.values()))]
    counts += [(f"of these, {reason}", count) for reason, count in sorted(of.dropped.items())]
    counts += [("replayed", of.replayed), *((f"not learned by rows of {shard}", count) for shard, count in of.unlearned.items())]
    rows = [(what, f"{count:,}") for what, count in counts]
    return {"says": of.explain(), "adds_up": of.adds_up, "table": _Table(("samples", "count"), rows, 1)}


def _process_table(record: RunRecord) -> _Table:
    return _Table(
        ("process", "CPU s", "memory MB", "cores"),
        [
            (of.process, f"{of.cpu_s:,.1f}", f"{of.rss_bytes / 1e6:,.0f}", str(of.cores))
            for of in (record.last.usage if record.last is not None else [])
        ],
        1,
    )


def _trainer_table(record: RunRecord) -> _Table:
    def p50(stages: dict[str, Any], name: str) -> str:
        return f"{stages[name].p50_us / 1000:,.3f}" if name in stages else _NOTHING

    others = record.last.others if record.last is not None else []
    shown = ("EmbeddingLookup", "PushGrad", "TrainStep", "TrainerWait")
    return _Table(
        ("trainer", "steps", *(f"{name} P50 ms" for name in shown)),
        [(str(of.trainer), f"{of.step:,}", *(p50(of.stages, name) for name in shown)) for of in others],
        1,
    )


def _changed_table(record: RunRecord) -> _Table:
    defaults = {knob.path: list(knob.default) if knob.is_list else knob.default for knob in knobs()}
    rows = []
    for path, value in record.knobs.items():
        default = defaults.get(path)
        if path.startswith("slot."):
            default = record.knobs.get(f"slot_default.{path.rpartition('.')[2]}")
        if path != "slot" and value != default:
            rows.append((path, _value(value), _value(default)))
    return _Table(("knob", "in this run", "by default"), rows, 3)


def _value(of: Any) -> str:
    if isinstance(of, bool):
        return str(of).lower()
    return _NOTHING if of is None or of in ("", []) else ", ".join(map(str, of)) if isinstance(of, list) else str(of)


def _measured(placement: PlacementReport | None, shard: int) -> str:
    """The share of all the time that a shard spent; empty where it is not known."""
    load = placement.shards[shard].measured if placement is not None and shard < len(placement.shards) else None
    return "" if load is None else f"{load.time:.1%}"


def _predicted(placement: PlacementReport | None, shard: int) -> str:
    load = placement.shards[shard].predicted if placement is not None and shard < len(placement.shards) else None
    return "" if load is None else f"{load.time:.1%}"


def _busiest(shards: Sequence[ShardFigures]) -> list[ShardFigures]:
    """Those that worked longest, in order."""

    def busy_us(of: ShardFigures) -> float:
        return sum(of.stages[name].total_us for name in ("Lookup", "Push") if name in of.stages)

    return sorted(sorted(shards, key=busy_us)[-_SHOWN_SHARDS:], key=lambda of: of.shard)


def _mean(staleness: dict[int, int]) -> float:
    return sum(pushes * batches for pushes, batches in staleness.items()) / (sum(staleness.values()) or 1)


def _stale(staleness: dict[int, int]) -> str:
    """Pushes between a lookup and its own push, and the share of the batches with so many; the commonest."""
    total = sum(staleness.values()) or 1
    shown = sorted(sorted(staleness, key=lambda pushes: -staleness[pushes])[:6])
    rest = len(staleness) - len(shown)
    return ", ".join(f"{pushes}: {staleness[pushes] / total:.1%}" for pushes in shown) + (f" and {rest} more" if rest else "")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m flowps.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the directory that a run has left")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with pictures, in one file")
    options = parser.parse_args(argv)

    def work() -> None:
        record = read_run(options.run_dir)
        report(record, PlainConsole())
        if options.html is not None:
            _write(options.html, page(record))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())

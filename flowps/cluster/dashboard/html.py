"""The words and figures of the page, as HTML: each function writes one piece of it of a glance. Pure.

Whatever comes of names, paths or messages is escaped. Programs that read the page find its pieces by class: run, phase, step, rate,
loss, auc, bound, stages, shards, ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape

from flowps.cluster.dashboard.glance import Glance, ShardLine, StageLine
from flowps.status.verdict import Verdict

STALLED_S = 5.0  # since a step, while training
_HOT = 0.9  # of the time of a shard

_GROUPS = {
    "hub": ("DecodePartition", "HubTransfer", "HubWait"),
    "feed": (
        *("PermitWait", "ReadSample", "CheckBatch", "EmbeddingLookup", "EmbeddingFind", "PushWait", "EmbeddingRead", "CheckFeed"),
        *("StageFeed", "FeedQueueWait"),
    ),
    "trainer": ("TrainerWait", "TrainStep", "CheckpointPause", "PredictStep"),
    "push": ("PushGrad",),
}
"""Stages in the order in which a sample passes them, by who does so; any other comes last."""
_WAITS = ("HubWait", "PermitWait", "PushWait", "FeedQueueWait", "TrainerWait", "CheckpointPause")
"""Those in which nothing is done."""
_PARTS = {"EmbeddingLookup": "LookupShard", "PushGrad": "PushShard"}
"""Stages that are calls of each shard."""
_SHOWN_PARTS = 4
_HIDDEN = ("FirstFeedWait", "TrainerWaitFor", *_PARTS.values())  # once only; in the budget; beside their whole
_COLORS = {
    "steps": "#2f7d4f", "waits for a permit": "#e0a030", "waits for data": "#d9534f", "waits for lookups": "#b5548c",
    "waits for pushes": "#4aa3a3", "waits for staging": "#7b6bb5", "checkpoints": "#5b8fc7",
}  # fmt: skip
_PHASES = {"starting": "amber", "warming up": "amber", "training": "green", "evaluating": "blue", "saving": "blue", "failed": "red"}
_NOTES = 12

CSS = """
:host { font-family: Helvetica, Arial, sans-serif; color: #222; font-size: 14px; line-height: 1.35; }
.bk-clearfix { display: block !important; width: 100%; }
.muted { color: #777; }
.card { background: #fff; border: 1px solid #e4e4e4; border-radius: 6px; padding: 10px 14px; box-sizing: border-box; height: 100%; }
.card h2 { margin: 0 0 6px; font-size: 13px; font-weight: 600; color: #555; }
.card h2 span { font-weight: 400; color: #888; }
.top { display: flex; align-items: baseline; gap: 12px; flex-wrap: wrap; }
.top .run { font-size: 24px; font-weight: 600; }
.pill { border-radius: 11px; padding: 2px 11px; font-size: 13px; font-weight: 600; background: #e6e6e6; color: #444; }
.green { background: #dcf1e3; color: #1d6b3b; } .amber { background: #fdeccb; color: #8a5a00; }
.blue { background: #dcebf8; color: #1c5a94; } .red { background: #f9dcdb; color: #a42522; }
.path { font-size: 12px; color: #888; overflow-wrap: anywhere; }
.track { height: 4px; background: #e6e6e6; border-radius: 2px; margin-top: 6px; overflow: hidden; }
.track div { height: 100%; background: #eaaa6d; }
.error { color: #a42522; margin-top: 4px; overflow-wrap: anywhere; }
.verdict { margin: 10px 0; height: auto; border-left: 5px solid #eaaa6d; }
.verdict .bound { font-size: 22px; font-weight: 600; }
.verdict .advice { margin-top: 3px; }
.verdict .advice b { font-weight: 600; color: #8a5a00; }
.split { display: flex; gap: 28px; } .split > div { flex: 3; } .split > div + div { flex: 2; }
.budget { display: flex; height: 16px; border-radius: 3px; overflow: hidden; background: #eee; margin: 4px 0 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: #555; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 5px; }
.tiles { display: grid; grid-template-columns: repeat(8, 1fr); gap: 8px; }
@media (max-width: 900px) { .tiles { grid-template-columns: repeat(4, 1fr); } .split { display: block; } }
.tile { background: #fff; border: 1px solid #e4e4e4; border-radius: 6px; padding: 7px 12px; white-space: nowrap; overflow: hidden; }
.tile .what { font-size: 12px; color: #777; }
.tile .value { font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile .more { font-size: 12px; color: #888; text-overflow: ellipsis; overflow: hidden; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px; }
th { text-align: left; font-weight: 400; color: #888; font-size: 12px; padding: 1px 8px 2px 0; border-bottom: 1px solid #eee; }
td { padding: 1px 8px 1px 0; white-space: nowrap; } tr.first td { padding-top: 5px; }
.n { text-align: right; } td.group { color: #999; font-size: 12px; width: 56px; } td.part { padding-left: 14px; color: #777; }
td.bar { width: 30%; } td.wide { width: 22%; }
.bar > div { display: flex; align-items: center; gap: 6px; }
.bar .rail { flex: 1; height: 8px; background: #f0f0f0; border-radius: 2px; overflow: hidden; }
.bar .rail div { height: 100%; background: #7fabd3; }
.bar .rail .wait { background: #cfcfcf; } .bar .rail .hot { background: #e0863a; }
.bar span { width: 42px; text-align: right; }
.notes td + td { width: 100%; white-space: normal; overflow-wrap: anywhere; }
.notes td { vertical-align: top; }
"""


def header(glance: Glance, silent_s: float) -> str:
    """Whose page it is, and where the run is."""
    phase, color = _phase(glance, silent_s)
    share = min(1.0, glance.examples / glance.examples_all) if glance.examples_all else 0.0
    said = [f"<span>{duration(glance.seconds)}</span>"]
    if glance.step:
        said = [
            f"<span>epoch {glance.epoch or glance.epochs}/{glance.epochs}</span>",
            f'<span>step <b class="step">{glance.step:,}</b></span>',
            f"<span>{count(glance.examples)} of {count(glance.examples_all)} examples</span>",
            f"<span>{_percent(share)} in {duration(glance.seconds)}{'' if silent_s else _left(glance)}</span>",
        ]
    error = f'<div class="error">{escape(glance.error)}</div>' if glance.error else ""
    setup = f" · {escape(glance.setup)}" if glance.setup else ""
    return (
        f'<div class="top"><span class="run">{escape(glance.name)}</span><span class="pill phase {color}">{escape(phase)}</span>'
        f'{"".join(said)}</div><div class="path">{escape(glance.path)}{setup}</div>{error}'
        f'<div class="track"><div style="width:{share:.1%}"></div></div>'
    )


def nothing() -> str:
    """Before the first run."""
    return '<div class="top"><span class="run">flowps</span><span class="pill phase">no run yet</span></div>'


def verdict(glance: Glance) -> str:
    """What bounds the run, and where the trainer's time went."""
    found = glance.verdict
    if found is None:
        when = (
            f"each status report says so, every {glance.report_every_s:g} s"
            if glance.reported_s is None
            else "nothing was trained since the last report"
        )
        words = f'<div class="bound muted">not known yet</div><div class="muted">{when} (status.interval_s)</div>'
    else:
        words = (
            f'<div class="bound">{escape(_bound(found))}</div><div>{escape(found.evidence)}</div>'
            f'<div class="advice"><b>→</b> {escape(found.advice)}</div>'
        )
    left = f"<div><h2>bound by <span>{_span(glance)}</span></h2>{words}</div>"
    return f'<div class="card verdict"><div class="split">{left}{_budget(glance)}</div></div>'


def tiles(glance: Glance) -> str:
    """The figures that people look for first."""
    has_steps, reported = glance.step > 0, glance.reported_s is not None
    cores = "–" if glance.cores_busy is None else f"{glance.cores_busy:.1f}"
    return '<div class="tiles">' + "".join(
        (
            _tile("examples/s", f"{glance.examples_per_s:,.0f}" if has_steps else "–", glance.rate_of, "rate"),
            _tile("loss", _number(glance.loss), glance.loss_of, "loss"),
            _tile("AUC", _number(glance.auc), glance.auc_of, "auc"),
            _tile("feed queue", str(glance.queue_depth) if has_steps else "–", "feeds ready", "queue"),
            _tile("in flight", str(glance.in_flight) if reported else "–", f"of {glance.permits} batches", "in-flight"),
            _tile("rows", count(glance.rows) if reported else "–", size(glance.rows_bytes) if reported else "", "rows"),
            _tile("memory", size(glance.rss_bytes) if reported else "–", _processes(glance) if reported else "", "memory"),
            _tile("CPU", cores, f"of {glance.cores} cores" if reported else "", "cores"),
        )
    ) + "</div>"  # fmt: skip


def stages(glance: Glance) -> str:
    """Latencies of the first trainer."""
    there = {line.name: line for line in glance.stages}
    rows: list[str] = []
    for group, lines in _grouped(there):
        for k, (line, is_part) in enumerate(lines):
            kind = "wait" if line.name in _WAITS else "work"
            name = f'<td class="part">{escape(line.name)}</td>' if is_part else f"<td>{escape(line.name)}</td>"
            rows.append(
                f'<tr{" class=first" if not k and rows else ""}><td class="group">{group if not k else ""}</td>{name}'
                f'<td class="n">{count(line.count)}</td><td class="n">{time(line.p50_us)}</td>'
                f'<td class="n">{time(line.p95_us)}</td><td class="bar">{_bar(line.share, kind)}</td></tr>'
            )
    head = (
        '<tr><th></th><th>stage</th><th class="n">count</th><th class="n">P50</th><th class="n">P95</th>'
        '<th class="n">share of time</th></tr>'
    )
    body = f"<table>{head}{''.join(rows)}</table>" if rows else _waiting(glance)
    span = f"<span>P50 and P95 since the start, share of {_span(glance)}</span>" if rows else ""
    return f'<div class="card stages"><h2>stages of the trainer {span}</h2>{body}</div>'


def shards(glance: Glance) -> str:
    """Load and size of each shard."""
    rows = "".join(_shard(line) for line in glance.shards)
    head = (
        '<tr><th>shard</th><th>worker</th><th class="n">busy</th><th class="n">rows</th><th class="n">of at most</th>'
        '<th class="n">memory</th><th class="n">hits</th><th class="n">in flight</th></tr>'
    )
    more = glance.num_shards - len(glance.shards)
    others = f'<div class="muted">and {more} that are less busy</div>' if more > 0 else ""
    body = f"<table>{head}{rows}</table>{others}" if rows else _waiting(glance)
    span = f"<span>busy in {_span(glance)}</span>" if rows else ""
    return f'<div class="card shards"><h2>shards {span}</h2>{body}</div>'


def notes(glance: Glance) -> str:
    """The ledger, and what has happened, the newest first."""
    account = escape(glance.account or "made up at each checkpoint and at the end")
    lines = "".join(
        f'<tr><td class="muted n">{duration(seconds)}</td><td>{escape(text)}</td></tr>'
        for seconds, text in reversed(glance.notes[-_NOTES:])
    )
    happened = f'<h2 style="margin-top:8px">what happened</h2><table class="notes">{lines}</table>' if lines else ""
    return f'<div class="card"><h2>ledger</h2><div class="ledger">{account}</div>{happened}</div>'


# --- units ------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """As on a clock: 1:05, 2:00:00."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def clock(at: float) -> str:
    """A Unix time, as a clock on the wall of the scheduler's machine shows it."""
    return f"{datetime.fromtimestamp(at):%H:%M}"


def time(us: float) -> str:
    """Three digits and a unit."""
    if us < 0.95e3:
        return f"{us:.0f} µs" if us >= 9.5 else f"{us:.1f} µs"
    return _digits(us / 1e3, "ms") if us < 0.9995e6 else _digits(us / 1e6, "s")


def size(size_bytes: float) -> str:
    """Three digits and a unit, of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.5:
            return _digits(size_bytes, unit) if unit != "B" else f"{size_bytes:.0f} B"
        size_bytes /= 1000
    return _digits(size_bytes, "TB")


def count(number: float) -> str:
    """Whole up to 99,999, then three digits and k, M or G."""
    if number < 99_999.5:
        return f"{number:,.0f}"
    for unit in ("k", "M"):
        number /= 1000
        if number < 999.5:
            return _digits(number, unit)
    return _digits(number / 1000, "G")


def _digits(value: float, unit: str) -> str:
    places = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{places}f} {unit}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 or not share else f"{share:.1%}"


# --- pieces -----------------------------------------------------------------------------------------------------------


def _phase(glance: Glance, silent_s: float) -> tuple[str, str]:
    """In words, and the color for it."""
    if silent_s:
        return f"no word of the run for {duration(silent_s)}", "red"
    since = glance.seconds - glance.progress_s
    if glance.phase == "training" and since > STALLED_S:
        return f"no step for {duration(since)}", "amber"
    ended = "" if glance.phase == "failed" or not glance.is_ended else "ended: "
    return f"{ended}{glance.phase}", _PHASES.get(glance.phase, "")


def _left(glance: Glance) -> str:
    """How long it may take."""
    if glance.phase != "training" or not glance.usual_per_s:
        return ""
    return f", about {duration(max(0, glance.examples_all - glance.examples) / glance.usual_per_s)} left"


def _bound(found: Verdict) -> str:
    return found.bound_by if found.shard is None else f"{found.bound_by} on shard {found.shard}"


def _span(glance: Glance) -> str:
    """Of what time the shares are."""
    if glance.reported_s is None:
        return ""
    if glance.is_whole:
        return "the whole run"
    return f"the last {glance.window_s:.0f} s, until {duration(glance.reported_s)}"


def _waiting(glance: Glance) -> str:
    return f'<div class="muted">with the first status report, after {glance.report_every_s:g} s</div>'


def _budget(glance: Glance) -> str:
    """A bar of all the time of the trainer's own thread."""
    if not glance.budget:
        return ""
    rest = max(0.0, 1.0 - sum(share for _, share in glance.budget))
    parts = [(what, share, _COLORS.get(what, "#999")) for what, share in glance.budget] + [("other", rest, "#ccc")]
    bar = "".join(f'<div style="width:{share:.1%};background:{color}"></div>' for _, share, color in parts)
    legend = "".join(
        f'<span><i style="background:{color}"></i>{what} {_percent(share)}</span>' for what, share, color in parts if share >= 0.005
    )
    return f'<div><h2>time of the trainer</h2><div class="budget">{bar}</div><div class="legend">{legend}</div></div>'


def _tile(what: str, value: str, more: str, name: str) -> str:
    value = f'<div class="value {name}">{value}</div>'
    return f'<div class="tile"><div class="what">{what}</div>{value}<div class="more">{more}&nbsp;</div></div>'


def _processes(glance: Glance) -> str:
    return f"in {glance.processes} process" + ("" if glance.processes == 1 else "es")


def _bar(share: float, kind: str) -> str:
    """`kind`: work, wait or hot."""
    rail = f'<div class="rail"><div class="{kind}" style="width:{min(1.0, share):.1%}"></div></div>'
    return f"<div>{rail}<span>{_percent(share)}</span></div>"


def _shard(line: ShardLine) -> str:
    busy = _bar(line.busy, "hot" if line.busy >= _HOT else "work")
    hits = "–" if line.hit_rate is None else f"{line.hit_rate:.1%}"
    return (
        f"<tr><td>{line.shard}</td><td>{escape(line.worker)}</td><td class='bar wide'>{busy}</td>"
        f"<td class='n'>{count(line.rows)}</td><td class='n'>{count(line.capacity_rows)}</td><td class='n'>{size(line.bytes)}</td>"
        f"<td class='n'>{hits}</td><td class='n'>{line.in_flight}</td></tr>"
    )


def _grouped(there: dict[str, StageLine]) -> Iterable[tuple[str, Sequence[tuple[StageLine, bool]]]]:
    """The stages by who passes them; of each whether it is a part of the one before."""
    named = {name for names in _GROUPS.values() for name in names}
    for group, names in _GROUPS.items():
        lines: list[tuple[StageLine, bool]] = []
        for name in names:
            if name in there:
                lines += [(there[name], False), *((part, True) for part in _parts(there, name))]
        if lines:
            yield group, lines
    others = [(line, False) for name, line in sorted(there.items()) if name not in named and not name.startswith(_HIDDEN)]
    if others:
        yield "other", others


def _parts(there: dict[str, StageLine], name: str) -> list[StageLine]:
    """The calls of a stage to each shard, of the slowest where they are many."""
    if name not in _PARTS:
        return []
    found = [line for part, line in there.items() if part.startswith(_PARTS[name])]
    slowest = sorted(found, key=lambda line: -line.share)[:_SHOWN_PARTS]
    return sorted(slowest, key=lambda line: line.name)

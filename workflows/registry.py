"""What was published: `python -m workflows.registry list|show|diff|promote|rollback FOLDER …`.

    python -m workflows.registry list models           every model, the live one marked
    python -m workflows.registry show models 7         how model 7 was judged, and what it was trained on
    python -m workflows.registry diff models 6 7       what is other in model 7
    python -m workflows.registry promote models 6      make model 6 live
    python -m workflows.registry rollback models       make the model live that was live before

FOLDER is a pipeline's publish.registry: a path or an fsspec URL. The live model changes at once, and servers that watch it follow.
A retraining that is going on is not published over a change made here: its slot begins anew, from the model that is live then.

Exit status: 0, 1 where there is no such model, 2 for a command line that makes no sense.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flowps.arguments import run_command
from flowps.errors import BundleError, FlowpsError
from flowps.status.progress import PlainConsole
from workflows.notify import tell
from workflows.pipeline import read_pipeline
from workflows.report import FIGURES, cell, figures
from workflows.store import Promotion, Reason, Registry


def show_list(registry: Registry, console: Console) -> None:
    """Every model."""
    live, before, kept = registry.live(), registry.before_live(), set(registry.kept())
    table = Table("model", "slot", "published", "from", "AUC", "live's", "calibration", "")
    table.columns[1].no_wrap = True
    for version in registry.versions():
        record = registry.record(version)
        marks = [
            word
            for word, holds in (("live", version == live), ("before", version == before), ("deleted", version not in kept))
            if holds
        ]
        table.add_row(
            str(version), record.slot, _when(record.created), str(record.parent or "–"), cell(record.quality, "auc", ".4f"),
            cell(record.live, "auc", ".4f"), cell(record.quality, "calibration", ".3f"), ", ".join(marks),
        )  # fmt: skip
    console.print(table)


def show_one(registry: Registry, version: int, console: Console) -> None:
    """One model."""
    record = registry.record(version)
    say = partial(console.print, soft_wrap=True)
    live = ", live" if registry.live() == version else ""
    say(f"model {version}{live}: slot {record.slot} ({record.kind}), {_when(record.created)}")
    say(f"from model {record.parent or 'none'}, {record.examples:,} examples; run {record.run}, checkpoint {record.checkpoint}")
    table = Table("", "this model", "live model", "live model on the slot, before", title="quality", title_justify="left")
    for row in figures(record)[:-1]:
        table.add_row(*row)
    console.print(table)
    for reason in record.reasons:
        say(reason)
    for promotion in registry.promotions():
        if version in (promotion.version, promotion.before):
            say(_told(promotion))
    say(f"page: {registry.report_place(version)}")


def show_diff(registry: Registry, one: int, other: int, console: Console) -> None:
    """What is other in the second model."""
    first, second = registry.record(one), registry.record(other)
    table = Table("", f"model {one}", f"model {other}", "difference", title_justify="left")
    table.add_row("slot", first.slot, second.slot, "")
    table.add_row("from", str(first.parent or "–"), str(second.parent or "–"), "")
    table.add_row("examples", f"{first.examples:,}", f"{second.examples:,}", f"{second.examples - first.examples:+,}")
    for name, key, form in FIGURES:
        a, b = getattr(first.quality, key), getattr(second.quality, key)
        difference = "" if a is None or b is None else format(b - a, "+" + form)
        table.add_row(name, cell(first.quality, key, form), cell(second.quality, key, form), difference)
    with suppress(BundleError):  # one of them is deleted: its rows are not known any more
        slots = {slot.name: slot.rows for slot in registry.manifest(one).slots}
        now = {slot.name: slot.rows for slot in registry.manifest(other).slots}
        for name in {**slots, **now}:
            a, b = slots.get(name, 0), now.get(name, 0)
            table.add_row(f"rows of {name}", f"{a:,}", f"{b:,}", f"{b - a:+,}" if a != b else "")
    console.print(table)


def make_live(registry: Registry, version: int, why: Reason, console: Console) -> None:
    """Promote, or roll back to, a model; and tell those whom its pipeline tells."""
    promotion = registry.promote(version, why)
    console.print(_told(promotion), soft_wrap=True)
    with suppress(FlowpsError):  # a registry may be elsewhere than its pipeline
        pipeline = read_pipeline(Path(registry.record(version).pipeline)).pipeline
        event = "rolled_back" if why == "rolled back" else "published"
        tell(pipeline.notify, partial(console.print, soft_wrap=True), event, {"version": version, "before": promotion.before})


def _told(promotion: Promotion) -> str:
    before = f" in place of model {promotion.before}" if promotion.before else ""
    return f"model {promotion.version} became live{before}: {promotion.why} by {promotion.by}, {_when(promotion.at)}"


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m workflows.registry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, models in (
        ("list", ()),
        ("show", ("MODEL",)),
        ("diff", ("MODEL", "OTHER")),
        ("promote", ("MODEL",)),
        ("rollback", ()),
    ):
        command = commands.add_parser(name)
        command.add_argument("folder", metavar="FOLDER")
        for model in models:
            command.add_argument(model.lower(), type=int, metavar=model)
    options = parser.parse_args(argv)
    console, registry = PlainConsole(), Registry(options.folder)
    if not registry.versions():
        raise BundleError(f"{options.folder}: no model was published there; is this a pipeline's publish.registry?")
    match options.command:
        case "list":
            show_list(registry, console)
        case "show":
            show_one(registry, options.model, console)
        case "diff":
            show_diff(registry, options.model, options.other, console)
        case "promote":
            make_live(registry, options.model, "promoted", console)
        case _:
            before = registry.before_live()
            if not before:
                raise BundleError(f"{options.folder}: there is no model before model {registry.live()}, the live one")
            make_live(registry, before, "rolled back", console)


if __name__ == "__main__":
    sys.exit(main())

"""What people read of the shards, and what is kept of them."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from flowps.cluster.run_dir import read_placement
from flowps.cluster.shard_report import PlacementReport, ShardReport, balance, busiest, shard_table
from flowps.ps.load import SlotLoad
from flowps.ps.placement import ShardLoad

HALF, THIRD, REST = ShardLoad(0.5, 0.5, 0.5, 0.5), ShardLoad(0.3, 0.31, 0.32, 0.33), ShardLoad(0.7, 0.69, 0.68, 0.67)
PLANNED = PlacementReport(
    "measured on the first 100 examples",
    [ShardReport("ps-0", ["user", "item (1/2)"], HALF), ShardReport("ps-1", ["item (2/2)"], HALF)],
)
MEASURED = PlacementReport(
    "measured by the run in runs/a",
    [ShardReport("ps-0", ["user", "item (1/2)"], HALF, REST), ShardReport("ps-1", ["item (2/2)"], HALF, THIRD)],
    {"user": SlotLoad(1.0, 0.5, 10), "item": SlotLoad(2.0, 1.0, 20)},
)


def shown(report: PlacementReport, width: int = 100) -> list[str]:
    """The table's lines as a terminal of that width shows them."""
    console = Console(file=io.StringIO(), width=width)
    console.print(shard_table(report, width))
    assert isinstance(console.file, io.StringIO)
    return [" ".join(line.strip("│┃ ").replace("│", "|").split()) for line in console.file.getvalue().splitlines()]


def test_before_the_run_it_says_what_is_expected() -> None:
    lines = shown(PLANNED)
    assert lines[0] == "shards: predicted share in %"
    assert lines[4] == "0 | ps-0 | 2: user, item (1/2) | 50.0 | 50.0 | 50.0 | 50.0"
    assert lines[5] == "1 | ps-1 | 1: item (2/2) | 50.0 | 50.0 | 50.0 | 50.0"
    assert balance(PLANNED) == "busiest shard: 1.00× the mean predicted (load measured on the first 100 examples)"


def test_after_the_run_also_what_there_was() -> None:
    lines = shown(MEASURED)
    assert lines[0] == "shards: predicted → measured share in %"
    assert lines[4] == "0 | ps-0 | 2: user, item (1/2) | 50.0→70.0 | 50.0→69.0 | 50.0→68.0 | 50.0→67.0"
    assert lines[5] == "1 | ps-1 | 1: item (2/2) | 50.0→30.0 | 50.0→31.0 | 50.0→32.0 | 50.0→33.0"
    assert balance(MEASURED) == (
        "busiest shard: 1.00× the mean predicted, 1.34× the mean measured (load measured by the run in runs/a)"
    )


@pytest.mark.parametrize(
    ("width", "room"),
    [
        (80, 1),
        (90, 12),
        (200, 100),
    ],
)
def test_every_shard_has_one_line_whatever_it_holds(width: int, room: int) -> None:
    many = [f"slot_{k}" for k in range(76)]
    report = PlacementReport("x", [ShardReport("ps-0", many, HALF, REST), ShardReport("ps-1", [], HALF, THIRD)])
    lines = shown(report, width)
    assert len(lines) == 7, lines
    assert lines[4].startswith("0 | ps-0 | 76: slot_0")
    slots = lines[4].split(" | ")[2]
    assert slots.endswith("…")
    assert len(slots) >= room
    assert lines[5].startswith("1 | ps-1 | none | ")


def test_the_busiest_shard_is_one_that_has_more_time_than_the_mean() -> None:
    assert busiest([HALF, HALF]) == 1.0
    assert busiest([ShardLoad(0, 0, 0, 0.1)] * 3 + [ShardLoad(0, 0, 0, 0.7)]) == 2.8


def test_without_any_load_it_says_by_what_the_slots_were_placed() -> None:
    nothing = PlacementReport("their width", [ShardReport("ps-0", ["user"])])
    assert balance(nothing) == "slots placed by their width"
    assert shown(nothing)[4].startswith("0 | ps-0 | 1: user")


def test_the_next_run_reads_what_this_one_has_kept(tmp_path: Path) -> None:
    (tmp_path / "placement.json").write_bytes(msgspec.json.encode(MEASURED))
    assert read_placement(tmp_path) == MEASURED

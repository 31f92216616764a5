"""What a person is told of a plan before the run and of its result after."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from flowps.cluster.plan import Plan
from flowps.cluster.run import Result, expected
from flowps.cluster.run_dir import RunDir
from flowps.cluster.shard_report import PlacementReport, balance, shard_table
from flowps.hub.partition import Partition
from flowps.ps.table import TableStats
from flowps.status.lines import quality

_GIB = 2.0**30
_SHOWN_COLUMNS = 60


def announce_plan(console: Console, plan: Plan) -> None:
    """The schema as a table, the data, and the projected memory."""
    schema = plan.schema
    console.print(
        f"train: {plan.train_rows:,} examples in {len(plan.train)} partitions ({_files(plan.train)} files)", soft_wrap=True
    )
    for name, parts in (("valid", plan.valid), ("test", plan.test)):
        if parts:
            rows = sum(part.num_rows for part in parts)
            console.print(f"{name}: {rows:,} examples in {len(parts)} partitions ({_files(parts)} files)", soft_wrap=True)
    table = Table("column", "type", "role", "dim", "pooling", "optimizer", "rows at most", title="schema", title_justify="left")
    lines: list[tuple[str, ...]] = [(name, str(schema.types[name]), "label", "", "", "", "") for name in schema.labels]
    if schema.sample_weight:
        lines.append((schema.sample_weight, str(schema.types[schema.sample_weight]), "weight of the sample", "", "", "", ""))
    lines += [(name, str(schema.types[name]), "dense", "", "", "", "") for name in schema.dense]
    for slot, rows in zip(schema.slots, plan.capacity_rows, strict=True):
        hashed = f" (folded into {slot.hash_size:,})" if slot.hash_size else ""
        lines.append(
            (slot.name, str(schema.types[slot.name]), "slot" + hashed, str(slot.dim), slot.pooling, slot.optimizer, f"{rows:,}")
        )
    for name, slots in schema.weights.items():
        lines.append((name, str(schema.types[name]), f"weights of {', '.join(slots)}", "", "", "", ""))
    lines += [(name, str(schema.types[name]), f"left out ({why})", "", "", "", "") for name, why in schema.left_out.items()]
    for line in lines[:_SHOWN_COLUMNS]:
        table.add_row(*line)
    console.print(table)
    if len(lines) > _SHOWN_COLUMNS:
        console.print(f"… and {len(lines) - _SHOWN_COLUMNS} more columns, all in schema.json")
    for remark in plan.assignment.remarks:
        console.print(remark, soft_wrap=True)
    if plan.forecast:
        announce_shards(console, expected(plan))
    memory = plan.memory
    console.print(
        f"memory: tables up to {memory.tables / _GIB:.1f} GiB{_when(plan)}, "
        f"batches in flight {memory.feeds / _GIB:.2f} GiB, partitions being decoded {memory.partitions / _GIB:.2f} GiB, "
        f"{memory.available / _GIB:.1f} GiB available",
        soft_wrap=True,
    )


def announce_shards(console: Console, report: PlacementReport) -> None:
    """Who has which slots, and how evenly the load is spread."""
    console.print(shard_table(report, console.width))
    console.print(balance(report), soft_wrap=True)


def announce_result(console: Console, plan: Plan, result: Result, run_dir: RunDir) -> None:
    """Test quality, next to the best reachable where it is known, and what was left where."""
    if result.test is not None:
        best = "" if plan.best_auc is None or math.isnan(plan.best_auc) else f" (best reachable auc = {plan.best_auc:.4f})"
        console.print(f"test: {quality(result.test)}{best}", soft_wrap=True, highlight=False)
        for label, metrics in result.more.items():
            console.print(f"test of label {label}: {quality(metrics)}", soft_wrap=True, highlight=False)
    elif not plan.test:
        console.print("test: not evaluated; give --data.test to measure quality on data that was not trained on")
    if len(result.placement.shards) > 1:
        announce_shards(console, result.placement)
    for table in result.tables:
        _announce_losses(console, table)
    console.print(result.ledger.explain(), soft_wrap=True)
    console.print(
        f"left in {run_dir.path}: {result.rows:,} embedding rows, the dense model, config, schema, metrics, status", soft_wrap=True
    )


def _announce_losses(console: Console, table: TableStats) -> None:
    """What a table gave up or did not take, if anything."""
    losses = {
        "rows evicted for room": table.evicted,
        "rows begun anew, unused for longer than ttl_steps": table.expired,
        "sights of signs not admitted": table.refused,
        "rows' gradients refused, NaN, infinite or beyond 3.4e15": table.unsound,
    }
    found = ", ".join(f"{count:,} {what}" for what, count in losses.items() if count)
    if found:
        names = ", ".join(table.slots[:3]) + (f" and {len(table.slots) - 3} more" if len(table.slots) > 3 else "")
        last = f" (the last one slot {table.last_unsound[0]!r}, sign {table.last_unsound[1]})" if table.last_unsound else ""
        console.print(f"table of {names}: {table.rows:,} of {table.capacity_rows:,} rows; {found}{last}", soft_wrap=True)


def _when(plan: Plan) -> str:
    """When the tables' memory is taken."""
    if all(plan.allocate):
        return " from the start"
    return (
        " as rows are created"
        if not any(plan.allocate)
        else " from the start where all slots of a table give capacity_rows, else as rows are created"
    )


def _files(partitions: tuple[Partition, ...]) -> int:
    return len({p.url for p in partitions})

"""The run directory: what is taken for the same model, and what happens where nothing can be written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest

from flowps.cluster.run_dir import RunDir
from flowps.config import Config, Data, Slot
from flowps.errors import RunDirError
from flowps.hub.schema import Schema, infer
from tests.status.samples import FINISHED, INTERVAL, PROGRESS, REPORT, STARTED

COLUMNS = {"label": pa.int8(), "x": pa.float32(), "y": pa.float32(), "a": pa.int64(), "b": pa.string()}


def schema(columns: dict[str, pa.DataType] = COLUMNS, label: str = "label", **slot: object) -> Schema:
    """Of the columns; `slot`: settings of column a."""
    return infer(columns, Config(data=Data(label=label), slot=(Slot(name="a", **slot),) if slot else ()))


def without(*names: str) -> dict[str, pa.DataType]:
    return {name: found for name, found in COLUMNS.items() if name not in names}


OTHERS: dict[str, tuple[Callable[[], Schema], str]] = {
    "label": (lambda: schema({**without("x"), "x": pa.int8()}, label="x"), "label: 'label' there, 'x' now"),
    "dense": (lambda: schema(without("y")), "dense: ['x', 'y'] there, ['x'] now"),
    "one slot less": (lambda: schema(without("b")), "slots only there: ['b'], only now: []"),
    "another slot": (lambda: schema({**without("b"), "c": pa.string()}), "slots only there: ['b'], only now: ['c']"),
    "order": (lambda: schema({**without("a"), "a": pa.int64()}), "slots in another order"),
    "type": (lambda: schema({**COLUMNS, "a": pa.int32()}), "slot 'a': type 'int64' there, 'int32' now"),
    "dim": (lambda: schema(dim=4), "slot 'a': dim 16 there, 4 now"),
    "pooling": (lambda: schema(pooling="mean"), "slot 'a': pooling 'sum' there, 'mean' now"),
    "hash_size": (lambda: schema(hash_size=9), "slot 'a': hash_size 0 there, 9 now"),
    "optimizer": (lambda: schema(optimizer="sgd"), "slot 'a': optimizer 'adagrad' there, 'sgd' now"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_run_with_another_schema_is_refused_and_left_as_it_is(tmp_path: Path, other: str) -> None:
    make, found = OTHERS[other]
    RunDir(tmp_path / "run").prepare(Config(), schema())
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RunDirError) as refusal:
        RunDir(tmp_path / "run").prepare(Config(), make())
    assert f"holds a run with another schema ({found}); choose another with --run_dir" in str(refusal.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_learning_rates_and_bounds_may_differ(tmp_path: Path) -> None:
    RunDir(tmp_path / "run").prepare(Config(), schema())
    assert RunDir(tmp_path / "run").prepare(Config(), schema(learning_rate=0.5, capacity_rows=10))


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_schema_that_cannot_be_read_is_no_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "schema.json").write_text(content)
    with pytest.raises(RunDirError, match=r"no readable schema\.json, so it is no run of flowps"):
        RunDir(tmp_path).prepare(Config(), schema())


def test_each_event_goes_to_its_file(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare(Config(), schema())
    for event in (STARTED, PROGRESS, INTERVAL, REPORT, FINISHED):
        run_dir.record(event)
    kinds = {
        name: [json.loads(line)["type"] for line in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "status.jsonl")
    }
    assert kinds == {"metrics.jsonl": ["Started", "Interval", "Finished"], "status.jsonl": ["StatusReport"]}


@pytest.mark.parametrize("event", [INTERVAL, REPORT], ids=["metrics", "status"])
def test_an_event_that_cannot_be_written_is_an_error_that_names_the_file(tmp_path: Path, event: msgspec.Struct) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare(Config(), schema())
    for name in ("metrics.jsonl", "status.jsonl"):
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).mkdir()
    with pytest.raises(RunDirError, match=r"(metrics|status)\.jsonl: cannot be written: Is a directory"):
        run_dir.record(event)


def test_a_summary_that_cannot_be_written_keeps_the_earlier_run(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare(Config(), schema())
    run_dir.finish({"rows": 1})
    run_dir.prepare(Config(), schema())
    (tmp_path / "run" / "summary.unfinished").mkdir()
    with pytest.raises(RunDirError, match=r"summary\.json: cannot be written"):
        run_dir.finish({"rows": 2})
    assert json.loads((run_dir.previous / "summary.json").read_text()) == {"rows": 1}

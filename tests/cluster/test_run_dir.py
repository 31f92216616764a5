"""The run directory: what is taken for the same model, and what happens where nothing can be written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
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


def take(path: Path, found: Schema | None = None) -> bool:
    """Prepare the directory as a run does, and let it go again; whether an earlier run's results are kept."""
    with closing(RunDir(path)) as run_dir:
        return run_dir.prepare(Config(), found or schema())


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    """A directory that is prepared."""
    with closing(RunDir(tmp_path / "run")) as run_dir:
        run_dir.prepare(Config(), schema())
        yield run_dir


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
    "weights": (lambda: schema({**COLUMNS, "w": pa.float32()}, weights="w"), "slot 'a': weights '' there, 'w' now"),
}


@pytest.mark.parametrize(("pooling", "is_refused"), [("none", True), ("sum", False)])
def test_the_length_of_a_sequence_is_part_of_the_model(tmp_path: Path, pooling: str, is_refused: bool) -> None:
    take(tmp_path / "run", schema(pooling=pooling, max_len=5))
    (tmp_path / "run" / "model.keras").touch()
    if not is_refused:
        take(tmp_path / "run", schema(pooling=pooling, max_len=6))
        return
    with pytest.raises(RunDirError, match="slot 'a': max_len 5 there, 6 now"):
        take(tmp_path / "run", schema(pooling=pooling, max_len=6))


def test_a_run_with_another_schema_that_has_not_trained_anything_gives_way(tmp_path: Path) -> None:
    """As one that was refused for its model leaves it."""
    take(tmp_path / "run")
    take(tmp_path / "run", schema(dim=3))
    assert json.loads((tmp_path / "run" / "schema.json").read_text())["slots"][0]["dim"] == 3
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    with pytest.raises(RunDirError, match="holds a run with another schema"):
        take(tmp_path / "run")


@pytest.mark.parametrize("other", OTHERS)
def test_a_run_with_another_schema_is_refused_and_left_as_it_is(tmp_path: Path, other: str) -> None:
    make, found = OTHERS[other]
    take(tmp_path / "run")
    (tmp_path / "run" / "model.keras").touch()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RunDirError) as refusal:
        take(tmp_path / "run", make())
    assert f"holds a run with another schema ({found}); choose another with --run_dir" in str(refusal.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_learning_rates_and_bounds_may_differ(tmp_path: Path) -> None:
    take(tmp_path / "run")
    take(tmp_path / "run", schema(learning_rate=0.5, capacity_rows=10))


def test_a_schema_from_before_there_were_weights_is_one_without(tmp_path: Path) -> None:
    take(tmp_path)
    written = json.loads((tmp_path / "schema.json").read_text())
    for slot in written["slots"]:
        del slot["weights"]
    (tmp_path / "schema.json").write_text(json.dumps(written))
    take(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_schema_that_cannot_be_read_is_no_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "schema.json").write_text(content)
    with pytest.raises(RunDirError, match=r"no readable schema\.json, so it is no run of flowps"):
        take(tmp_path)


def test_a_directory_in_use_is_refused_until_it_is_let_go(tmp_path: Path, run_dir: RunDir) -> None:
    with pytest.raises(RunDirError, match="another run is using it; wait until that has ended, or choose another with --run_dir"):
        take(tmp_path / "run")
    run_dir.close()
    run_dir.close()
    take(tmp_path / "run")


def test_each_event_goes_to_its_file(tmp_path: Path, run_dir: RunDir) -> None:
    for event in (STARTED, PROGRESS, INTERVAL, REPORT, FINISHED):
        run_dir.record(event)
    kinds = {
        name: [json.loads(line)["type"] for line in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "status.jsonl")
    }
    assert kinds == {"metrics.jsonl": ["Started", "Interval", "Finished"], "status.jsonl": ["StatusReport"]}


@pytest.mark.parametrize("event", [INTERVAL, REPORT], ids=["metrics", "status"])
def test_an_event_that_cannot_be_written_is_an_error_that_names_the_file(
    tmp_path: Path, run_dir: RunDir, event: msgspec.Struct
) -> None:
    for name in ("metrics.jsonl", "status.jsonl"):
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).mkdir()
    with pytest.raises(RunDirError, match=r"(metrics|status)\.jsonl: cannot be written: Is a directory"):
        run_dir.record(event)


# --- what earlier runs left -------------------------------------------------------------------------------------------


def leave(path: Path, rows: int, finish: bool) -> None:
    """A run that trained, and finished or not."""
    with closing(RunDir(path)) as run_dir:
        run_dir.prepare(Config(), schema())
        run_dir.model.write_text(f"model of {rows}")
        if finish:
            run_dir.finish({"rows": rows})


def test_a_run_that_trained_nothing_leaves_what_was_there(tmp_path: Path) -> None:
    leave(tmp_path, 1, finish=True)
    for _ in range(2):
        assert take(tmp_path)
        assert (tmp_path / "previous" / "model.keras").read_text() == "model of 1"
        assert json.loads((tmp_path / "previous" / "summary.json").read_text()) == {"rows": 1}


def test_what_a_run_saved_before_it_failed_is_kept_with_what_it_had_kept(tmp_path: Path) -> None:
    leave(tmp_path, 1, finish=True)
    leave(tmp_path, 2, finish=False)
    assert take(tmp_path)
    assert (tmp_path / "previous" / "model.keras").read_text() == "model of 2"
    assert (tmp_path / "previous" / "previous" / "model.keras").read_text() == "model of 1"
    leave(tmp_path, 3, finish=True)
    assert (tmp_path / "model.keras").read_text() == "model of 3"
    assert not (tmp_path / "previous").exists()


@pytest.mark.parametrize("moved", range(8))
def test_a_move_that_was_interrupted_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int) -> None:
    """The run is killed after so many of the files were put aside."""
    leave(tmp_path, 1, finish=True)
    leave(tmp_path, 2, finish=False)
    rename, renamed = Path.rename, []

    def killed(path: Path, target: Path) -> Path:
        if len(renamed) == moved:
            raise KeyboardInterrupt
        renamed.append(path)
        return rename(path, target)

    with monkeypatch.context() as killing:
        killing.setattr(Path, "rename", killed)
        with suppress(KeyboardInterrupt):
            take(tmp_path)
    assert take(tmp_path)
    assert (tmp_path / "previous" / "model.keras").read_text() == "model of 2"
    assert (tmp_path / "previous" / "previous" / "model.keras").read_text() == "model of 1"
    assert not (tmp_path / "previous.unfinished").exists()


def test_a_run_killed_between_the_move_and_its_own_schema_is_no_foreign_directory(tmp_path: Path) -> None:
    leave(tmp_path, 1, finish=True)
    assert take(tmp_path)
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()
    assert take(tmp_path)
    assert (tmp_path / "previous" / "model.keras").read_text() == "model of 1"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    take(tmp_path / "run")
    assert (tmp_path / "run" / "schema.json").exists()


def test_where_nothing_was_trained_nothing_is_said_to_be_kept(tmp_path: Path) -> None:
    assert not take(tmp_path)
    assert not take(tmp_path)


def test_a_summary_that_cannot_be_written_keeps_the_earlier_run(tmp_path: Path) -> None:
    leave(tmp_path, 1, finish=True)
    with closing(RunDir(tmp_path)) as run_dir:
        run_dir.prepare(Config(), schema())
        (tmp_path / "summary.unfinished").mkdir()
        with pytest.raises(RunDirError, match=r"summary\.json: cannot be written"):
            run_dir.finish({"rows": 2})
        assert json.loads((run_dir.previous / "summary.json").read_text()) == {"rows": 1}

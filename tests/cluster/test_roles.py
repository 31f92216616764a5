"""The roles on workers: what each refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flowps.cluster.long_task import request_stop
from flowps.cluster.plan import Plan
from flowps.cluster.shard_role import ShardActor
from flowps.cluster.trainer_role import Trained, TrainerTask, train
from flowps.errors import DataError, FlowpsError, RunDirError
from tests.cluster.conftest import Started


def test_a_closed_shard_says_so(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    actor = ShardActor("run-closed", make_plan(), 0)
    assert actor.export(str(tmp_path / "rows")) == {"user": 0}
    actor.close()
    actor.close()
    for call in (lambda: actor.export(str(tmp_path / "rows")), actor.figures):
        with pytest.raises(FlowpsError, match="the shard was closed: its rows are gone"):
            call()
    with pytest.raises(FlowpsError, match="the shard was closed: it cannot be served"):
        actor.serve("token")


def test_rows_that_cannot_be_written_are_an_error_of_the_run_directory(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("a file where a folder must go")
    actor = ShardActor("run-unwritable", make_plan(), 0)
    try:
        with pytest.raises(RunDirError, match=r"rows: the rows cannot be written: "):
            actor.export(str(tmp_path / "rows"))
    finally:
        actor.close()


def test_a_trainer_without_its_shards_says_which_is_missing(started: Started) -> None:
    client, made = started(("ps.num_shards", 2))
    trainer = client.submit(train, TrainerTask("run-without-shards", 0, ["", ""], "token", "model.keras"), made, pure=False)
    with pytest.raises(FlowpsError, match="shard 0 is not in the trainer's process, and is not served to others"):
        trainer.result()


@pytest.mark.parametrize("bad_row", [0, 599])
def test_bad_data_leaves_a_model_only_if_one_was_trained(started: Started, data: Path, tmp_path: Path, bad_row: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(data)
    labels = table["label"].to_numpy().copy()
    labels[bad_row] = 7
    pq.write_table(table.set_column(0, "label", pa.array(labels)), data, row_group_size=100)
    client, made = started(("data.shuffle", "false"))
    shard = client.submit(ShardActor, "run-bad", made, 0, actor=True).result()
    try:
        trainer = client.submit(train, TrainerTask("run-bad", 0, [""], "token", str(tmp_path / "model.keras")), made, pure=False)
        with pytest.raises(DataError, match=f"row {bad_row}: found 7"):
            trainer.result()
    finally:
        shard.close().result()
    assert (tmp_path / "model.keras").exists() == (bad_row > 0)


def test_a_model_that_cannot_be_written_is_an_error_of_the_run_directory(started: Started, tmp_path: Path) -> None:
    client, made = started()
    path = tmp_path / "missing" / "model.keras"
    shard = client.submit(ShardActor, "run-model", made, 0, actor=True).result()
    try:
        trainer = client.submit(train, TrainerTask("run-model", 0, [""], "token", str(path)), made, pure=False)
        with pytest.raises(RunDirError, match=r"model\.keras: the dense model cannot be written"):
            trainer.result()
    finally:
        shard.close().result()


def test_a_stop_that_comes_before_the_trainer_is_not_lost(started: Started, tmp_path: Path) -> None:
    client, made = started()
    shard = client.submit(ShardActor, "run-stopped", made, 0, actor=True).result()
    try:
        client.run(request_stop, "run-stopped")
        trained = client.submit(
            train, TrainerTask("run-stopped", 0, [""], "token", str(tmp_path / "model.keras")), made, pure=False
        ).result()
    finally:
        shard.close().result()
    assert isinstance(trained, Trained)
    assert (trained.finished.steps, trained.finished.stopped, trained.test) == (0, True, None)

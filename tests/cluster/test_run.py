"""A run whose subscribers fail: it ends with their error, nothing hangs, and what was trained is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import distributed
import pyarrow.parquet as pq
import pytest

from flowps.cluster import run as run_module
from flowps.cluster.launch import gather_workers
from flowps.cluster.plan import Plan, plan
from flowps.cluster.run import run
from flowps.cluster.run_dir import RunDir
from flowps.config import Config
from flowps.errors import ClusterError, FlowpsError, RunDirError
from flowps.status.event import Event, Finished, Interval, Remark
from tests.cluster.conftest import ROWS, USERS, Started


@pytest.fixture
def prepared() -> Iterator[Callable[[Plan, Path], RunDir]]:
    with ExitStack() as opened:

        def prepare(plan: Plan, path: Path) -> RunDir:
            run_dir = opened.enter_context(closing(RunDir(path)))
            run_dir.prepare(plan.config, plan.schema)
            return run_dir

        yield prepare


def test_a_disk_that_is_full_ends_the_run_and_keeps_what_was_trained(
    started: Started, prepared: Callable[[Plan, Path], RunDir], tmp_path: Path
) -> None:
    client, made = started(("epochs", 1_000_000), ("status.print_interval", 1))
    run_dir, intervals = prepared(made, tmp_path / "run"), []

    def full(event: Event) -> None:
        if isinstance(event, Interval):
            intervals.append(event)
        if len(intervals) == 30:
            raise RunDirError("metrics.jsonl: cannot be written: No space left on device")

    with pytest.raises(RunDirError) as refusal:
        run(client, made, run_dir, [full], lambda: False)
    assert str(refusal.value).startswith(
        "metrics.jsonl: cannot be written: No space left on device; what was trained before, 20 rows"
    )
    assert pq.read_metadata(tmp_path / "run" / "embeddings" / "user.parquet").num_rows == USERS
    assert run_dir.model.exists()


def test_when_saving_fails_too_the_first_error_is_still_said(
    started: Started, prepared: Callable[[Plan, Path], RunDir], tmp_path: Path
) -> None:
    client, made = started(("status.print_interval", 1))
    run_dir = prepared(made, tmp_path / "run")
    run_dir.embeddings.write_text("in the way")

    def full(event: Event) -> None:
        if isinstance(event, Interval):
            raise RunDirError("status.jsonl: cannot be written: No space left on device")

    with pytest.raises(
        RunDirError, match=r"No space left on device; of what was trained before only the dense model is in .*cannot be written"
    ):
        run(client, made, run_dir, [full], lambda: False)


def test_a_model_that_cannot_be_written_does_not_take_the_rows_with_it(
    started: Started, prepared: Callable[[Plan, Path], RunDir], tmp_path: Path
) -> None:
    client, made = started()
    run_dir = prepared(made, tmp_path / "run")
    run_dir.model.with_suffix(".unfinished.keras").mkdir()
    with pytest.raises(
        RunDirError, match=r"dense model cannot be written: .*; what was trained before, 20 rows without the dense model"
    ):
        run(client, made, run_dir, [lambda event: None], lambda: False)
    assert pq.read_metadata(tmp_path / "run" / "embeddings" / "user.parquet").num_rows == USERS


def test_a_bug_in_a_subscriber_stops_the_trainer(
    started: Started, prepared: Callable[[Plan, Path], RunDir], tmp_path: Path
) -> None:
    client, made = started(("epochs", 1_000_000))

    def broken(event: Event) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(client, made, prepared(made, tmp_path / "run"), [broken], lambda: False)
    assert not [key for keys in client.processing().values() for key in keys if "train" in str(key)]


def test_a_last_event_that_never_comes_is_an_error_not_a_wait_for_ever(
    started: Started,
    prepared: Callable[[Plan, Path], RunDir],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, made = started()
    monkeypatch.setattr(run_module, "_LAST_EVENT_S", 0.5)
    monkeypatch.setattr(run_module, "Finished", type("NeverSent", (), {}))
    with pytest.raises(FlowpsError, match="the trainer ended, but its last event did not arrive within"):
        run(client, made, prepared(made, tmp_path / "run"), [lambda event: None], lambda: False)


class TestNobodyReads:
    """The only hub is lost while partitions wait for it."""

    @pytest.fixture
    def split(self, make_config: Callable[..., Config]) -> Iterator[tuple[distributed.SpecCluster, distributed.Client, Plan]]:
        """Two workers in this process, `hub` and one for the rest."""
        dash, where = {"dashboard_address": "127.0.0.1:0"}, {"protocol": "inproc://"}
        workers = {
            name: {"cls": distributed.Worker, "options": {**where, **dash, "name": name, "nthreads": 2, "resources": resources}}
            for name, resources in (("hub", {"HUB": 1}), ("rest", {"PS": 1, "TRAINER": 1}))
        }
        scheduler = {"cls": distributed.Scheduler, "options": {**where, **dash, "dashboard": False}}
        config = make_config(("cluster.wait_s", 3), ("status.print_interval", 1), ("epochs", 3))
        with (
            distributed.SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield cluster, client, plan(config, gather_workers(client, config, print, lambda: False))

    @pytest.mark.parametrize("another_comes", [True, False])
    def test_it_is_said_once_and_waited_for(
        self,
        split: tuple[distributed.SpecCluster, distributed.Client, Plan],
        prepared: Callable[[Plan, Path], RunDir],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        another_comes: bool,
    ) -> None:
        monkeypatch.setattr(run_module, "WATCH_S", 0.2)
        cluster, client, made = split
        remarks, intervals = [], 0

        def watch(event: Event) -> None:
            nonlocal intervals
            if isinstance(event, Interval):
                intervals += 1
                if intervals == 2:
                    cluster.sync(cluster.workers["hub"].close)
            if isinstance(event, Remark):
                remarks.append(event.text)
                if another_comes:
                    options = {**cluster.worker_spec["hub"]["options"], "name": "another"}
                    cluster.worker_spec["another"] = {"cls": distributed.Worker, "options": options}
                    cluster.sync(cluster._correct_state)

        run_dir = prepared(made, tmp_path / "run")
        if another_comes:
            assert run(client, made, run_dir, [watch], lambda: False).finished.examples == 3 * ROWS
        else:
            with pytest.raises(ClusterError, match=r"all workers that offer HUB are gone, and none has come within 3 s: "):
                run(client, made, run_dir, [watch], lambda: False)
        assert len(remarks) == 1
        assert "waiting up to 3 s for one to read on; start a worker with --resources HUB=2" in remarks[0]


def test_every_subscriber_gets_every_event_up_to_the_last(
    started: Started, prepared: Callable[[Plan, Path], RunDir], tmp_path: Path
) -> None:
    client, made = started(("status.print_interval", 5))
    seen: tuple[list[Event], list[Event]] = ([], [])
    result = run(client, made, prepared(made, tmp_path / "run"), [seen[0].append, seen[1].append], lambda: False)
    assert seen[0] == seen[1]
    assert isinstance(seen[0][-1], Finished)
    assert seen[0][-1] == result.finished
    assert result.rows == USERS

"""A cluster that is there already, and loses parts in the middle of a run. Part of `make test-long`; `make faults` kills more."""

from __future__ import annotations

import json
import re
import signal
from contextlib import closing

from tests.cluster.conftest import ROWS, assert_same
from tests.cluster.test_scheduler import add, cluster, started

__all__ = ["add", "cluster", "started"]  # fixtures


LONG = ("--epochs", 1_000_000)
FATAL = (*LONG, "--checkpoint.recovery", "none")
LOST_S = 20.0  # within which a run ends that has lost what it cannot do without


class TestLosses:
    """A worker is killed while the run uses it."""

    def test_of_a_hub_the_run_goes_on_and_counts_every_sample_once(self, cluster, add, tmp_path):
        epochs = 12
        hub = add("hub", "HUB=2")
        with closing(cluster.train(tmp_path / "run", "--epochs", epochs)) as command:
            command.wait_for("^step 25, real_mean")
            hub.signal(signal.SIGKILL)
            command.succeed()
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        finished = lines[-1]
        assert finished["type"] == "Finished"
        assert finished["examples"] == ROWS * epochs
        # The labels of each epoch add up too: no sample stands for another.
        whole = [line["epoch_metrics"] for line in lines if line["type"] == "Interval" and line["step"] % 19 == 0]
        assert [epoch["examples"] for epoch in whole[:epochs]] == [ROWS] * epochs
        assert len({epoch["real_mean"] for epoch in whole}) == 1
        status = [json.loads(line) for line in (tmp_path / "run" / "status.jsonl").read_text().splitlines()]
        assert status[-1]["stages"]["PushGrad"]["count"] == finished["steps"]

    def test_of_a_shard_it_ends_and_says_which(self, cluster, add, tmp_path):
        shard = add("roomy", "PS=9")  # a shard goes where most room is left
        with closing(cluster.train(tmp_path / "run", *FATAL)) as command:
            command.wait_for("^step 25, real_mean")
            shard.signal(signal.SIGKILL)
            said = command.refuse(timeout_s=LOST_S)
        assert re.search(r"worker roomy at tcp://127\.0\.0\.1:\d+ was lost, and shard 0 with it: look into its log", said)
        assert said.count("was lost") == 1

    def test_of_a_trainer_it_ends_and_says_which(self, cluster, add, tmp_path):
        trainer = add("fast", "TRAINER=1 GPU=1")  # trainers go where a GPU is
        with closing(cluster.train(tmp_path / "run", *FATAL)) as command:
            command.wait_for("^step 25, real_mean")
            trainer.signal(signal.SIGKILL)
            said = command.refuse(timeout_s=LOST_S)
        assert re.search(r"worker fast at tcp://127\.0\.0\.1:\d+ was lost, and trainer 0 with it: look into its log", said)

    def test_of_a_shard_that_hangs_another_worker_takes_over(self, cluster, add, tmp_path):
        """Its worker has no nanny that would start it anew: it is taken from the cluster."""
        shard = add("roomy", "PS=9")
        knobs = ("--epochs", 30, "--checkpoint.every_steps", 20, "--cluster.lost_after_s", 3)
        with closing(cluster.train(tmp_path / "run", *knobs)) as command:
            command.wait_for("^checkpoint step-")
            shard.signal(signal.SIGSTOP)
            command.wait_for(r"worker roomy at \S+ has given no sign of life for \d+ s, .*; all roles go back to step \d+")
            shard.signal(signal.SIGCONT)
            command.succeed()
        ledger = json.loads((tmp_path / "run" / "summary.json").read_text())["ledger"]
        assert ledger["trained"] == 30 * ROWS
        assert ledger["read"] == ledger["trained"] + ledger["replayed"]

    def test_of_a_shard_alone_training_waits_for_a_worker_and_goes_on(self, cluster, add, tmp_path):
        """Declared workers have no room for it; one that comes has. The others' rows and weights stay as they are."""
        shard = add("roomy", "PS=9")
        recovers = ("--checkpoint.every_steps", 20, "--checkpoint.recovery", "partial")
        found_ahead = ("--trainer.in_flight", 2, "--trainer.max_staleness", 0)
        knobs = ("--epochs", 30, "--ps.num_shards", 3, *recovers, *found_ahead)
        with closing(cluster.train(tmp_path / "run", *knobs)) as command:
            command.wait_for("^checkpoint step-")
            command.wait_for(r"^step \d+5, ")  # of the next epoch, so that there is something to lose
            shard.signal(signal.SIGKILL)
            command.wait_for(r"worker roomy at \S+ was lost, .*; shard 0 and shard 1 and shard 2 go back to step \d+ alone$")
            command.wait_for(r"waiting up to \d+ s for workers: \d PS shards? to be started anew, and no worker has room for")
            add("late", "PS=3")
            command.wait_for(r"^shard 2 is back; its rows have not learned [\d,]+ of")
            command.succeed()
        ledger = json.loads((tmp_path / "run" / "summary.json").read_text())["ledger"]
        assert (ledger["trained"], ledger["replayed"]) == (30 * ROWS, 0)
        assert ledger["read"] == ledger["trained"]
        lost = set(ledger["unlearned"].values()) - {0}  # one of the three has no rows
        batch = 32  # a push that was under way may have come back from one of them, and a lookup from another
        assert max(lost) - min(lost) <= 2 * batch, "all that have rows have lost the same steps"

    def test_of_the_command_its_roles_end_and_leave_their_workers_to_others(self, cluster, embedded, tmp_path):
        with closing(cluster.train(tmp_path / "orphan", *LONG)) as command:
            command.wait_for("^step 25, real_mean")
            command.signal(signal.SIGKILL)
            command.end()
        with closing(cluster.train(tmp_path / "run")) as command:
            command.succeed()
        assert_same(tmp_path / "run", embedded)

    def test_of_the_scheduler_it_ends_and_says_so(self, cluster, tmp_path):
        """The last test that uses it."""
        with closing(cluster.train(tmp_path / "run", *LONG)) as command:
            command.wait_for("^step 25, real_mean")
            cluster.dask.scheduler.signal(signal.SIGKILL)
            said = command.refuse(timeout_s=LOST_S)
        assert "scheduler" in said
        assert cluster.dask.address in said

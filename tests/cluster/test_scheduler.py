"""A cluster that is there already: found by address or file, waited for, refused where it does not fit, and lost in the middle.

Scheduler and workers run as commands. The workers that a test adds are gone at its end, killed or not.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

import psutil
import pytest
import yaml

from flowps.arguments import parse
from flowps.knob import knobs
from flowps.train import main
from flowps.version import __version__
from tests.cluster.conftest import ROWS, Command, DaskCluster, assert_same, joined, train_command


class Cluster:
    """Two workers: `all` reads and trains, and beside it `ps` has room for two shards."""

    def __init__(self, dask: DaskCluster, samples: Path) -> None:
        self.dask, self._samples = dask, samples

    def train(self, run_dir: Path, *knobs: object, scheduler: object = "") -> Command:
        """Start a run on it."""
        return train_command(self._samples, run_dir, "--cluster.scheduler", scheduler or self.dask.address, *knobs)


class Add(Protocol):
    def __call__(self, name: str, resources: str, *options: object) -> Command: ...


@pytest.fixture(scope="module")
def started(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Path]]:
    """The cluster, and the run directory of a run that was started before `ps` had joined."""
    folder = tmp_path_factory.mktemp("cluster")
    with closing(DaskCluster(folder)) as dask:
        cluster = Cluster(dask, samples)
        joined(dask.add("all", "HUB=2 TRAINER=1"))
        with closing(cluster.train(folder / "run", "--ps.num_shards", 2)) as command:
            waits = command.wait_for("waiting up to 60 s for workers: ")
            assert "2 PS shards requested (ps.num_shards), workers offer 0: start a worker with --resources PS=1" in waits.string
            joined(dask.add("ps", "PS=2"))
            command.succeed()
        yield cluster, folder / "run"


@pytest.fixture
def cluster(started: tuple[Cluster, Path]) -> Cluster:
    return started[0]


@pytest.fixture
def add(cluster: Cluster) -> Iterator[Add]:
    """Add a worker for the time of a test."""
    with ExitStack() as opened:

        def add(name: str, resources: str, *options: object) -> Command:
            worker = cluster.dask.add(name, resources, *options)
            opened.callback(worker.close)
            joined(worker)
            return worker

        yield add


def refuse(capsys: pytest.CaptureFixture[str], scheduler: object, *knobs: object) -> str:
    """The one line with which a run on that scheduler is refused."""
    assert main(["--cluster.scheduler", str(scheduler), *map(str, knobs)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


class TestRuns:
    def test_one_that_waits_for_a_worker_trains_what_one_process_trains(self, started, embedded):
        assert_same(started[1], embedded)

    def test_a_scheduler_file_leads_to_the_same(self, cluster, embedded, tmp_path):
        command = cluster.train(tmp_path / "run", scheduler=cluster.dask.file)
        with closing(command):
            command.succeed()
        assert_same(tmp_path / "run", embedded)


class TestRefusals:
    def test_too_few_workers(self, cluster, tmp_path):
        with closing(cluster.train(tmp_path / "run", "--ps.num_shards", 3, "--cluster.wait_s", 0)) as command:
            said = command.refuse()
        assert said == (
            "error: 3 PS shards requested (ps.num_shards), workers offer 2: start a worker with --resources PS=1"
        )  # fmt: skip
        assert "waiting" not in command.said
        assert not (tmp_path / "run").exists()

    def test_nobody_there(self, capsys):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        said = refuse(capsys, address, "--cluster.connect_timeout_s", 1)
        assert f"no Dask scheduler answers at {address} within 1 s; is it running, and can this machine reach it?" in said
        assert "--cluster.connect_timeout_s waits longer" in said

    def test_somebody_there_who_never_answers(self, samples, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as mute:
            knobs = ("--cluster.scheduler", f"tcp://127.0.0.1:{mute.getsockname()[1]}", "--cluster.connect_timeout_s", 1)
            with closing(train_command(samples, tmp_path / "run", *knobs)) as command:
                said = command.refuse(timeout_s=5)
        assert "no Dask scheduler answers" in said

    def test_the_dashboard_instead_of_the_scheduler(self, cluster, tmp_path):
        """Its address is printed beside the scheduler's."""
        knobs = ("--cluster.connect_timeout_s", 1)
        with closing(cluster.train(tmp_path / "run", *knobs, scheduler=cluster.dask.dashboard)) as command:
            said = command.refuse(timeout_s=5)
        assert "no Dask scheduler answers" in said

    def test_a_scheduler_with_tls_and_none_here(self, capsys):
        assert "TLS expects a `ssl_context`" in refuse(capsys, "tls://127.0.0.1:1", "--cluster.connect_timeout_s", 1)

    def test_what_is_no_address(self, capsys):
        said = refuse(capsys, "http://127.0.0.1:8787/status", "--cluster.connect_timeout_s", 1)
        assert "no Dask scheduler answers at http://127.0.0.1:8787/status" in said
        assert "unknown address scheme 'http'" in said

    def test_a_file_that_is_missing(self, capsys, tmp_path):
        said = refuse(capsys, tmp_path / "none.json")
        assert said == f"error: cluster.scheduler: scheduler file {tmp_path}/none.json: No such file or directory"

    @pytest.mark.parametrize("content", ["", "no JSON", "[]", '"tcp://127.0.0.1:8786"', '{"id": "Scheduler"}', "\xff"])
    def test_a_file_that_is_none_of_a_scheduler(self, capsys, tmp_path, content):
        (tmp_path / "file.json").write_bytes(content.encode("latin-1"))
        said = refuse(capsys, tmp_path / "file.json")
        assert said == f"error: cluster.scheduler: {tmp_path}/file.json is no scheduler file: it has no address"

    @pytest.mark.parametrize(
        ("preload", "found"),
        [
            ("import flowps.version\nflowps.version.__version__ = '9.9.9'", r"flowps 9\.9\.9"),
            ("import sys\nsys.modules['flowps'] = None", r"no flowps \(No module named .flowps.*\)"),
        ],
        ids=["another", "none"],
    )
    def test_a_worker_with_another_flowps(self, cluster, add, tmp_path, capsys, preload, found):
        (tmp_path / "preload.py").write_text(preload)
        worker = add("other", "", "--preload", tmp_path / "preload.py")
        said = refuse(capsys, cluster.dask.address)
        assert re.search(rf"worker other at tcp://127\.0\.0\.1:\d+ has {found}, this command has flowps {__version__}: ", said)
        assert said.endswith("install the same version on all machines")
        worker.signal(signal.SIGTERM)
        assert worker.end() == 0  # and has taken its leave of the scheduler

    def test_a_shard_whose_port_is_taken(self, cluster, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with closing(cluster.train(tmp_path / "run", "--ps.port", port)) as command:
                said = command.refuse()
        assert f"shard 0 cannot listen on 127.0.0.1:{port}: the port is taken" in said
        assert "choose another ps.port (0: any free one)" in said

    def test_processes_and_a_scheduler(self, samples, tmp_path):
        knobs = ("--cluster.scheduler", "tcp://127.0.0.1:1", "--cluster.mode", "processes")
        with closing(train_command(samples, tmp_path / "run", *knobs)) as command:
            said = command.refuse(status=2)
        assert said == "error: cluster.mode = processes and cluster.scheduler are both set: give one"


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
        knobs = ("--epochs", 30, "--checkpoint.every_steps", 20, "--checkpoint.recovery", "partial", "--ps.num_shards", 3)
        with closing(cluster.train(tmp_path / "run", *knobs)) as command:
            command.wait_for("^checkpoint step-")
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
        batch = 32  # a push that was under way may have come back from one of them
        assert max(lost) - min(lost) <= batch, "all that have rows have lost the same steps"

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


EXAMPLES, DOCS = (Path(__file__).resolve().parents[2] / name for name in ("examples/cluster", "docs/cluster.md"))


class TestExamples:
    def test_the_script_trains_on_what_it_has_started_and_leaves_nothing_of_it(self, tmp_path):
        settings = {
            "PYTHON": sys.executable, "DATA": tmp_path / "data", "ROWS": 1000,
            "RUN_DIR": tmp_path / "run", "TMPDIR": tmp_path / "tmp",
        }  # fmt: skip
        (tmp_path / "tmp").mkdir()
        knobs = ("--data.batch_size", 128, "--model", "lr")
        with closing(Command(EXAMPLES / "local.sh", *knobs, cwd=tmp_path, environment=settings)) as command:
            said = command.succeed()
        assert re.search(r"^test: auc = 0\.\d+, .* \(best reachable auc = 0\.\d+\)$", said, re.M)
        for name in ("ps-0", "ps-1"):
            assert re.search(rf"^│ \d +│ {name} ", said, re.M)
        running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        assert [words for words in running if str(tmp_path) in " ".join(words)] == []
        assert list((tmp_path / "tmp").glob("tmp.*")) == []

    @pytest.mark.parametrize("script", ["local.sh", "slurm.sh"])
    def test_a_script_can_be_parsed(self, script):
        subprocess.run(["bash", "-n", EXAMPLES / script], check=True)

    def test_the_manifest_has_the_roles_and_each_its_worker(self):
        objects = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
        by_name = {(found["kind"], found["metadata"]["name"]): found for found in objects}
        commands = {
            name: found["spec"]["template"]["spec"]["containers"][0]["command"]
            for (kind, name), found in by_name.items()
            if kind in ("Deployment", "Job")
        }
        assert {words[words.index("--resources") + 1] for words in commands.values() if "--resources" in words} == {
            "HUB=4", "PS=1", "TRAINER=1",
        }  # fmt: skip
        port = by_name["Service", "flowps-scheduler"]["spec"]["ports"][0]["port"]
        address = f"tcp://flowps-scheduler:{port}"
        assert all(address in words for name, words in commands.items() if name != "flowps-scheduler")
        _, *arguments = commands["flowps-train"][2:]
        config = parse("flowps.train", "", [arg for arg in arguments if arg != "/shared/run.toml"])
        assert config.ps.num_shards == by_name["Deployment", "flowps-ps"]["spec"]["replicas"]
        assert (config.cluster.scheduler, config.cluster.tls_name) == (address, "flowps")

    @pytest.mark.parametrize("path", [*sorted(EXAMPLES.iterdir()), DOCS], ids=lambda path: path.name)
    def test_every_knob_that_is_named_is_one(self, path):
        known = {knob.path for knob in knobs()}
        sections = "|".join(sorted({name.partition(".")[0] for name in known if "." in name}))
        named = set(re.findall(rf"\b((?:{sections})\.[a-z_0-9]+)\b", path.read_text()))
        assert named
        assert named - known - {"cluster.md"} == set()

"""A cluster that is there already: found by address or file, waited for, refused where it does not fit.

`long_losses.py` loses parts of it in the middle.

Scheduler and workers run as commands. The workers that a test adds are gone at its end, killed or not.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

import pytest
import yaml

from flowps.arguments import parse
from flowps.knob import knobs
from flowps.train import main
from flowps.version import __version__
from tests.cluster.conftest import Command, DaskCluster, assert_same, joined, train_command


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
                said = command.refuse(timeout_s=20)  # the second that it is given, and far from the 30 that Dask takes by itself
        assert "no Dask scheduler answers" in said

    def test_the_dashboard_instead_of_the_scheduler(self, cluster, tmp_path):
        """Its address is printed beside the scheduler's."""
        knobs = ("--cluster.connect_timeout_s", 1)
        with closing(cluster.train(tmp_path / "run", *knobs, scheduler=cluster.dask.dashboard)) as command:
            said = command.refuse(timeout_s=20)
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


EXAMPLES, DOCS = (Path(__file__).resolve().parents[2] / name for name in ("examples/cluster", "docs/cluster.md"))


class TestExamples:
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

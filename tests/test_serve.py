"""The server of a bundle, as a person runs it: it says where, answers, follows newer versions, and ends when it is told to."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flowps.serve import main
from flowps.serving.client import EmbeddingClient
from tests.serving.samples import make_bundle, make_live, spoil
from tests.serving.test_live import USER, WEIGHTS

LONG_S = 60.0


@pytest.fixture
def out(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "out")
    return tmp_path / "out"


class Served:
    """A server in a process of its own; `lines` are those that it has said until it served."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        while not self.find(r"^serving on (\S+?)(,|$)"):
            self.lines.append(self.line())
        self.address = self.find(r"^serving on (\S+?)(,|$)")

    def line(self) -> str:
        """The next line that it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it has ended: {self.lines}"
        return line.rstrip("\n")

    def find(self, pattern: str) -> str:
        """What a line has said."""
        return next((found[1] for line in self.lines if (found := re.search(pattern, line))), "")

    def metrics(self) -> dict[str, float]:
        """Name and labels of each figure → its value."""
        with urllib.request.urlopen(self.find(r"^metrics: (http\S+)$"), timeout=LONG_S) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        return {" ".join([s.name, *s.labels.values()]): s.value for family in families for s in family.samples}

    def end(self, number: int) -> tuple[int, str]:
        """Signal it; its exit status, and what it said in the end."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=LONG_S)
        return self.process.returncode, rest


@contextmanager
def serving(*arguments: object) -> Iterator[Served]:
    command = [sys.executable, "-m", "flowps.serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield Served(process)
        finally:
            process.kill()


def test_it_serves_follows_and_ends(out):
    with (
        serving(out, "--metrics_port", "0", "--poll_s", "0.01") as served,
        EmbeddingClient(served.address, timeout_s=LONG_S) as client,
    ):
        assert re.search(r"^flowps \S+: version 1 of \S+: 5 rows of 3 slots, 0.0 MB$", "\n".join(served.lines), re.M)
        assert served.lines[-1].endswith(", without TLS")
        np.testing.assert_array_equal(client.lookup({"user": USER})["user"], WEIGHTS)
        client.lookup({"user": [1, 2, 7]})
        found = served.metrics()
        assert found["flowps_serve_requests_total Lookup OK"] == 2
        assert found["flowps_serve_signs_total user"] == 7
        assert found["flowps_serve_unknown_signs_total user"] == 2
        assert found["flowps_serve_rows user"] == 4
        assert found["flowps_serve_rows empty"] == 0
        assert found["flowps_serve_bundle_version"] == 1
        assert found["flowps_serve_seconds_count Lookup"] == 2
        assert found["flowps_serve_table_bytes"] == 84
        assert found["process_resident_memory_bytes"] > 0

        make_bundle(out, factor=2)
        deadline = time.monotonic() + LONG_S
        while (answer := client.ask({"user": USER})).version == 1:
            np.testing.assert_array_equal(answer.rows["user"], WEIGHTS)
            assert time.monotonic() < deadline
        np.testing.assert_array_equal(answer.rows["user"], 2 * WEIGHTS)
        assert served.line() == "version 2 is served in place of 1: 5 rows"

        spoil(out / "1" / "hash.json")
        make_live(out, 1)
        assert "another version cannot be served: " in served.line()
        assert client.ask({"user": USER}).version == 2
        found = served.metrics()
        assert (found["flowps_serve_loads_total"], found["flowps_serve_load_failures_total"]) == (2, 1)
        assert found["flowps_serve_bundle_version"] == 2
        assert served.end(signal.SIGTERM) == (0, "ending: calls that run are answered first\n")


def test_ctrl_c_ends_it_too(out):
    with serving(out) as served:
        assert served.find("^metrics") == ""
        assert served.end(signal.SIGINT) == (0, "ending: calls that run are answered first\n")


def test_it_needs_neither_tensorflow_nor_dask():
    code = 'import sys, flowps.serve; assert not {"tensorflow", "keras", "dask", "distributed"} & set(sys.modules)'
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LONG_S)


class TestRefusals:
    def refusal(self, capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
        assert main(list(map(str, arguments))) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    def test_of_what_is_no_bundle(self, tmp_path, capsys):
        assert "no such folder; make a bundle with python -m flowps.export" in self.refusal(
            capsys, 1, tmp_path / "none", "--port", 0
        )
        assert "is no bundle: it has no file current" in self.refusal(capsys, 1, tmp_path, "--port", 0)

    def test_of_a_damaged_bundle(self, out, capsys):
        spoil(out / "1" / "embeddings" / "city.parquet")
        assert "city.parquet: is damaged: its SHA-256 is not that in the manifest" in self.refusal(capsys, 1, out, "--port", 0)

    def test_of_a_network_without_tls(self, out, capsys):
        found = self.refusal(capsys, 2, out, "--port", 0, "--host", "0.0.0.0")
        assert (
            "--host 0.0.0.0: other machines reach it, and lookups would travel without TLS: give --tls_cert and --tls_key" in found
        )
        assert "--tls_cert and --tls_key belong together" in self.refusal(capsys, 2, out, "--port", 0, "--tls_cert", "x")
        assert "cannot be read: No such file" in self.refusal(capsys, 2, out, "--tls_cert", "x", "--tls_key", "y", "--port", 0)

    @pytest.mark.parametrize("option", ["--port", "--metrics_port"])
    def test_of_a_port_that_is_taken(self, out, capsys, option):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            found = self.refusal(capsys, 1, out, "--port", 0, option, port)
        assert "cannot listen" in found
        assert str(port) in found

    @pytest.mark.parametrize("wrong", [["--port", "70000"], ["--poll_s", "0"], ["--threads", "x"], ["--max_message_mib", "4096"]])
    def test_of_options_out_of_range(self, out, capsys, wrong):
        with pytest.raises(SystemExit) as ended:
            main([str(out), *wrong])
        assert ended.value.code == 2
        assert wrong[0] in capsys.readouterr().err

    def test_help_explains(self, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        assert ended.value.code == 0
        out = capsys.readouterr().out
        for said in ("OUT", "--host", "--metrics_port N", "--poll_s X", "--tls_ca FILE", "--insecure", "Exit status"):
            assert said in out

"""Notifications: a command and a webhook get the same JSON; one that fails changes nothing."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from workflows.notify import tell
from workflows.pipeline import Notify


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A webhook: its URL, and what it was sent."""
    got: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.headers["Content-Type"], self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path == "/broken" else 204)
            self.end_headers()

        def log_message(self, *of: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", got
        found.shutdown()
        thread.join()


def test_both_get_the_same(tmp_path: Path, server: tuple[str, list[tuple[str, bytes]]]) -> None:
    url, got = server
    command = (sys.executable, "-c", f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(sys.stdin.read())")
    said: list[str] = []
    tell(Notify(command=command, webhook=url), said.append, "published", {"version": 3})
    assert json.loads((tmp_path / "told").read_text()) == {"event": "published", "version": 3}
    assert [(kind, json.loads(body)) for kind, body in got] == [("application/json", {"event": "published", "version": 3})]
    tell(Notify(webhook=url, on=("failed",)), said.append, "published", {})
    assert (len(got), said) == (1, [])


def test_what_fails_is_said(server: tuple[str, list[tuple[str, bytes]]]) -> None:
    url, _ = server
    said: list[str] = []
    for knobs in (
        Notify(command=("/no/such/program",)),
        Notify(command=(sys.executable, "-c", "import sys; sys.exit('no route to the pager')")),
        Notify(command=(sys.executable, "-c", "import time; time.sleep(30)"), timeout_s=0.5),
        Notify(webhook=f"{url}/broken"),
        Notify(webhook="http://127.0.0.1:9"),
    ):
        tell(knobs, said.append, "failed", {"why": "x"})
    assert "No such file" in said[0]
    assert said[1] == "notify.command: ended with status 1: no route to the pager"
    assert "timed out" in said[2]
    assert "500" in said[3]
    assert said[4].startswith("notify.webhook: http://127.0.0.1:9: ")

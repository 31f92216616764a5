"""Telling others what happened: a command that gets JSON on standard input, a webhook that gets it as a POST.

A notification that fails is said, and changes nothing: the ledger is what happened.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import urllib.request
from collections.abc import Callable
from typing import Any

from workflows.pipeline import Notify


def tell(knobs: Notify, say: Callable[[str], None], event: str, fields: dict[str, Any]) -> None:
    """Tell of `event`, if it is one that is told."""
    if event not in knobs.on:
        return
    body = json.dumps({"event": event, **fields}).encode()
    if knobs.command:
        try:
            subprocess.run(knobs.command, input=body, timeout=knobs.timeout_s, check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip().splitlines()
            say(f"notify.command: ended with status {error.returncode}{': ' + said[-1] if said else ''}")
        except (OSError, subprocess.TimeoutExpired) as error:
            say(f"notify.command: {error}")
    if knobs.webhook:
        request = urllib.request.Request(knobs.webhook, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=knobs.timeout_s):
                pass
        except (OSError, ValueError, http.client.HTTPException) as error:
            say(f"notify.webhook: {knobs.webhook}: {error}")

"""Ctrl-C and SIGTERM for a command that ends in good order: the first asks it to stop, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flowps.errors import StoppedError
from flowps.status.json_lines import json_line

_TWIN_S = 0.1  # who signals a process and its group sends two signals that mean one
_SHOW_CURSOR = b"\x1b[?25h"  # the live line hides it


@contextmanager
def interruptible(as_json: bool = False, saves: str = "stopping and saving what was trained") -> Iterator[list[int]]:
    """A list that the first Ctrl-C or SIGTERM fills; the second ends the process at once. Off the main thread, none arrive.

    saves   what is said to happen after the first
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    came_at: list[float] = []
    terminal = os.dup(2)  # importing TensorFlow sends 2 elsewhere for a while

    # Nothing here goes through the console: its lock may be held by the code that the signal interrupts.
    def on_signal(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if received and now - came_at[0] < _TWIN_S:
            return
        came_at.append(now)
        if received:
            if os.isatty(terminal):
                os.write(terminal, _SHOW_CURSOR)
            os._exit(StoppedError.exit_code)
        received.append(number)
        said = f"{saves}; Ctrl-C again stops at once"
        line = json_line("warning", "Interrupted", said) if as_json else f"\n{said}"
        os.write(terminal, f"{line}\n".encode())

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(terminal)

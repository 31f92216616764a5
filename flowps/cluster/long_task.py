"""A task that runs where it was put until its run is over, a trainer or a scorer: how it is asked to stop, and how it finds out
that nobody wants it any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import distributed

from flowps.cluster.role_status import forget

_WANTED_S = 2.0  # between two looks at whether the run is still wanted

# The runs with such a task in this process: whether they are to stop, and what frees them from waiting for a role that has failed.
_stops: dict[str, threading.Event] = {}
_ways_out: dict[str, list[Callable[[], None]]] = {}


def way_out(run_id: str, leave: Callable[[], None]) -> None:
    """Note what frees the run's task in this process from waiting for a role."""
    _ways_out.setdefault(run_id, []).append(leave)


def request_stop(run_id: str, failed: bool = False) -> None:
    """Ask the task of a run in this process to stop after its current step. Run on its worker.

    failed   whether another role has failed: the task must not wait for it, be it a shard or another trainer
    """
    _stops.setdefault(run_id, threading.Event()).set()
    for leave in _ways_out.get(run_id, []) if failed else []:
        leave()


@contextmanager
def watched(worker: distributed.Worker, run_id: str) -> Iterator[None]:
    """End the task's waiting when nobody wants its result any more: the command that has started it is gone."""
    ended = threading.Event()
    key = worker.get_current_task()

    def watch() -> None:
        while not ended.wait(_WANTED_S):
            task = worker.state.tasks.get(key)
            if task is None or task.state in ("cancelled", "released"):
                request_stop(run_id, failed=True)
                forget(run_id)
                return

    thread = threading.Thread(target=watch, name="flowps-wanted", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def stop_flag(run_id: str) -> Iterator[threading.Event]:
    """What `request_stop` sets, as long as the task of this run is here."""
    flag = _stops.setdefault(run_id, threading.Event())
    try:
        yield flag
    finally:
        _stops.pop(run_id, None)
        _ways_out.pop(run_id, None)

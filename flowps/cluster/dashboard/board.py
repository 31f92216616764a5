"""`Board`: what the scheduler knows of runs, for the page to show; and how the page comes to a scheduler.

All of it is called on the scheduler's event loop, and so by one thread. What it keeps is bounded: of each run one glance and some
thousand points, which stand for more time each as the run gets longer, of a few runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from flowps.cluster.dashboard.courier import OPERATION
from flowps.cluster.dashboard.glance import Glance, Point

PAGE = "flowps"  # its name in Dask's menu and address
_EXTENSION = "flowps"
_SIBLING = "/status"  # which Dask's own application serves, where it serves any page
_POINTS = 2048  # of one series of a run
_RUNS = 8
SILENT_S = 10.0  # a command says something every two seconds


class Series:
    """Numbers over time: the first is the time. When there are too many, two neighbours become one, their mean."""

    def __init__(self, limit: int = _POINTS) -> None:
        self._limit, self._stride = limit, 1
        self._pending: list[tuple[float | None, ...]] = []
        self.rows: list[tuple[float | None, ...]] = []
        self.generation = 0
        """Rows are only ever added, but when this grows."""

    def append(self, row: tuple[float | None, ...]) -> None:
        """Add a moment."""
        self._pending.append(row)
        if len(self._pending) < self._stride:
            return
        self.rows.append(_mean(self._pending))
        self._pending = []
        if len(self.rows) > self._limit:
            self.rows = [_mean(self.rows[k : k + 2]) for k in range(0, len(self.rows), 2)]
            self._stride *= 2
            self.generation += 1


class Run:
    """One run, as the scheduler has heard of it. `version` grows with whatever is heard."""

    def __init__(self, name: str, glance: Glance) -> None:
        self.name, self.glance = name, glance
        self.steps, self.intervals = Series(), Series()
        self.version = 0
        self._heard_at = time.monotonic()

    def hear(self, glance: Glance, points: Sequence[Point]) -> None:
        """The newest glance, and the points since the one before."""
        self.glance = glance
        for point in points:
            if point.examples_per_s is not None:
                self.steps.append((point.seconds, point.examples_per_s, point.loss))
            else:
                self.intervals.append((point.seconds, point.logloss, point.auc))
        self.version += 1
        self._heard_at = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since something was heard of it, while more should come."""
        return 0.0 if self.glance.is_ended else time.monotonic() - self._heard_at

    @property
    def state(self) -> str:
        """The phase it is in, as far as that is known."""
        return self.glance.phase if self.is_live or self.glance.is_ended else "silent"

    @property
    def is_live(self) -> bool:
        """Whether something may come of it yet."""
        return not self.glance.is_ended and self.silent_s < SILENT_S


class Board:
    """All runs that show themselves on this scheduler: those that live, and the last ones that have ended."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}  # the newest last
        self.watchers: list[Callable[[], None]] = []
        """Called when a run has ended: its scheduler may end with it, before anyone looks again."""

    def receive(self, run: str, glance: dict[str, Any], points: list[Any]) -> None:
        """The handler of what couriers bring."""
        found = msgspec.convert(glance, Glance)
        if run not in self._runs:
            self._runs[run] = Run(run, found)
            self._forget()
        self._runs[run].hear(found, msgspec.convert(points, list[Point]))
        if found.is_ended:
            for tell in list(self.watchers):
                tell()

    def newest(self) -> Run | None:
        """The run that began last; None before the first."""
        return next(reversed(self._runs.values()), None)

    def find(self, name: str) -> Run | None:
        """A run, if it is still there."""
        return self._runs.get(name)

    def choices(self) -> Iterator[Run]:
        """Those to choose from, the newest first: it, and all that live."""
        newest = self.newest()
        return (run for run in reversed(self._runs.values()) if run is newest or run.is_live)

    def _forget(self) -> None:
        """Forget the oldest run, one that has ended if there is one, when there are too many."""
        if len(self._runs) > _RUNS:
            oldest = next((name for name, run in self._runs.items() if not run.is_live), next(iter(self._runs)))
            del self._runs[oldest]


def register(dask_scheduler: Any) -> str:
    """Add the page to a scheduler's dashboard, unless it is there. Sent by the command; runs on the scheduler.

    Returns why it cannot be, or else "".
    """
    applications = dask_scheduler.http_application.applications
    served = next((of for of in applications if _SIBLING in getattr(of, "app_paths", ())), None)
    if served is None:
        return "it serves no dashboard"
    if _EXTENSION not in dask_scheduler.extensions:
        from flowps.cluster.dashboard.page import serve

        board = Board()
        serve(dask_scheduler, board, served.prefix)
        dask_scheduler.handlers[OPERATION] = board.receive
        dask_scheduler.extensions[_EXTENSION] = board
    return ""


def _mean(rows: Sequence[tuple[float | None, ...]]) -> tuple[float | None, ...]:
    """Of each column, of what is known of it."""
    if len(rows) == 1:
        return rows[0]
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    return tuple(sum(known) / len(known) if known else None for known in columns)

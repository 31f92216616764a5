"""`Courier`: takes glances of a run to the scheduler, twice a second at most, on a thread of its own.

Whoever has news leaves them and goes on: the newest glance replaces the one before, of points a bounded number waits, of which the
oldest give way. A scheduler that is slow or gone is tried less and less often, and costs the run nothing but this thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from flowps.cluster.dashboard.glance import Glance, Point

OPERATION = "flowps_show"  # the scheduler's handler of that name is `Board.receive`
_PAUSE_S = 0.5  # between two deliveries
_HEARTBEAT_S = 2.0  # without news, so that the page can tell a run that waits from one that is gone
_TIMEOUT_S = 5.0
_LAST_S = 3.0  # for the last one: the run's end waits for it
_MOST_PAUSE_S = 30.0  # after several that failed
_POINTS = 240  # two minutes


class Courier:
    """Of one run, whose clock is `seconds`. Any thread may `put`; whoever made it closes it.

    Its own thread is the only one that talks to the scheduler.
    """

    def __init__(self, client: Any, run: str, glance: Glance, seconds: Callable[[], float]) -> None:
        self._client, self._run, self._seconds = client, run, seconds
        self._changed = threading.Condition()  # guards what follows
        self._glance = glance
        self._points: deque[Point] = deque(maxlen=_POINTS)
        self._is_new = True
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._deliver_all, name="flowps-dashboard", daemon=True)
        self._thread.start()

    def put(self, glance: Glance, point: Point | None = None) -> None:
        """Leave what is new; returns at once."""
        with self._changed:
            self._glance, self._is_new = glance, True
            if point is not None:
                self._points.append(point)
            self._changed.notify()

    def close(self) -> None:
        """Deliver what is left, if the scheduler takes it soon, and end. Idempotent."""
        with self._changed:
            self._closing.set()
            self._changed.notify()
        self._thread.join(_LAST_S)  # one that is stuck ends by itself, and with the process

    def _deliver_all(self) -> None:
        pause_s, last = _PAUSE_S, False
        while not last:
            with self._changed:
                self._changed.wait_for(lambda: self._is_new or self._closing.is_set(), _HEARTBEAT_S)
                last = self._closing.is_set()
                glance, points = self._glance, list(self._points)
                self._points.clear()
                if not self._is_new:
                    glance = msgspec.structs.replace(glance, seconds=self._seconds())
                self._is_new = False
            delivered = self._deliver(glance, points, _LAST_S if last else _TIMEOUT_S)
            pause_s = _PAUSE_S if delivered else min(_MOST_PAUSE_S, 2 * pause_s)
            self._closing.wait(0 if last else pause_s)

    def _deliver(self, glance: Glance, points: list[Point], timeout_s: float) -> bool:
        """Whether the scheduler has answered in time."""
        message = {"run": self._run, "glance": msgspec.to_builtins(glance), "points": msgspec.to_builtins(points)}
        try:
            self._client.sync(getattr(self._client.scheduler, OPERATION), **message, callback_timeout=timeout_s)
        except Exception:  # Dask has errors of many kinds for a scheduler that is gone; the run notices by itself, and says so
            return False
        return True

"""`CutClock`: when the next cut is. Pure but for the time of day; called by the trainer's thread."""

from __future__ import annotations

import time


class CutClock:
    """A cut is decided on after a step, while more is in flight; it comes when that is trained, before ticket `at`.

    every_steps   steps between two cuts; 0: never by steps
    every_s       seconds between two; 0: never by time
    in_flight     batches that may be in flight, the one just stepped among them
    """

    def __init__(self, every_steps: int, every_s: float, in_flight: int) -> None:
        self._every_steps, self._every_s, self._in_flight = every_steps, every_s, in_flight
        self._last_s = time.monotonic()
        self.at: int | None = None

    @property
    def is_time(self) -> bool:
        """Whether a cut is due by time. Of several trainers one asks all others."""
        return self._every_s > 0 and time.monotonic() - self._last_s >= self._every_s

    def decide(self, steps: int, ticket: int, asked: bool) -> int | None:
        """The ticket before which a cut comes, if it is decided on just now, after so many steps and before `ticket`.

        asked   by time, by any trainer

        Must come before the push of the last step gives its permit back: until then every trainer has begun `in_flight` batches at
        most, the last step's among them, so none has begun `at`.
        """
        ahead = self._in_flight - 1
        if self.at is not None or not (asked or (self._every_steps and (steps + ahead) % self._every_steps == 0)):
            return None
        self.at = ticket + ahead
        return self.at

    def recall(self, steps: int, ticket: int, last: int) -> None:
        """Decide on what was decided on before a run was resumed after `steps`, before `ticket`.

        last   the step of the last cut: it may have been in place of the one that was decided on, at the end of an epoch
        """
        if self._every_steps:
            due = (steps // self._every_steps + 1) * self._every_steps
            if last < due - (self._in_flight - 1) <= steps:
                self.at = ticket + due - steps

    def done(self) -> None:
        """There was a cut."""
        self.at, self._last_s = None, time.monotonic()

"""`Recency`: the numbers of lookups and the stamps they give, which batches are in flight, and what has outlived its time.

Threads: `begin` and `valid` are called under the table's index lock, `cut` and `resume` while nothing is in flight; the others by
any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flowps.batch import Uint64
from flowps.config import Slot
from flowps.errors import CapacityError
from flowps.ps.memory import names

_MAX_STAMP = (1 << 33) - 1
_TTL_MARKS = 1024  # moments of the past that a time-to-live is measured with
_MAX_CUTS = 64  # that are remembered

Moments = Sequence[tuple[int, int]]  # number and first stamp of lookups in the past, ascending


class Recency:
    """Of the table of `slots`.

    lookups      training lookups so far: the number of the last one
    next_stamp   the first that no lookup has given
    in_flight    number of a lookup that has not landed → its first stamp
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._who = names(slots)
        self._lives = np.array([slot.ttl_steps for slot in slots], np.int64)
        # Number and first stamp of lookups in the past, for each time to live.
        self._marks: dict[int, deque[tuple[int, int]]] = {life: deque() for life in set(self._lives.tolist()) if life}
        self._cuts: dict[int, int] = {}  # the first stamp given after each
        self._lock = threading.Lock()  # guards in_flight
        self.in_flight: dict[int, int] = {}
        self.next_stamp = 1
        self.lookups = 0

    def begin(self, stamps: int, lower: Callable[[int], None]) -> int:
        """The number of a lookup that needs at most so many stamps; it is in flight from now on.

        `lower` takes a number from all stamps in the index. Raises CapacityError when a batch has been in flight for so long that
        there are no stamps left.
        """
        if self.next_stamp + stamps > _MAX_STAMP:
            # Once in some ten thousand lookups: what is older than all in flight becomes equally old.
            with self._lock:
                by = min(self.in_flight.values(), default=self.next_stamp) - 1
                self.in_flight = {number: first - by for number, first in self.in_flight.items()}
            lower(by)
            self.next_stamp -= by
            for life, begun in self._marks.items():
                self._marks[life] = deque((number, max(0, first - by)) for number, first in begun)
            # Rows that were touched since a cut may have become as old as all others: all count as touched.
            self._cuts = dict.fromkeys(self._cuts, 0)
            if self.next_stamp + stamps > _MAX_STAMP:
                raise CapacityError(
                    f"a batch of the table of slots {self._who} has been in flight for so long that lookups cannot be numbered "
                    "any more; push it or give it up"
                )
        self.lookups += 1
        with self._lock:
            self.in_flight[self.lookups] = self.next_stamp
        return self.lookups

    def land(self, number: int) -> None:
        """The lookup is not in flight any more: pushed, or given up."""
        with self._lock:
            self.in_flight.pop(number, None)

    def pass_on(self, following: int) -> None:
        """Stamps before `following` have been given."""
        self.next_stamp = max(self.next_stamp, following)

    def oldest(self) -> np.uint64:
        """The stamp from which on rows are in flight."""
        with self._lock:
            return np.uint64(min(self.in_flight.values(), default=self.next_stamp))

    def valid(self, number: int, oldest: np.uint64) -> Uint64:
        """For each slot, the stamp below which a row has outlived its time in lookup `number`, uint64 [slots]; 0: never."""
        valid = np.zeros(len(self._lives), np.uint64)
        for life, begun in self._marks.items():
            # First stamps of lookups in the past, so many that the time is exact to a thousandth.
            if not begun or number - begun[-1][0] >= life / _TTL_MARKS:
                begun.append((number, self.in_flight[number]))
            while len(begun) > 1 and begun[1][0] <= number - life:
                begun.popleft()
            if begun[0][0] <= number - life:
                valid[self._lives == life] = min(begun[0][1], int(oldest))
        return valid

    # --- cuts ---------------------------------------------------------------------------------------------------------

    def cut(self, name: int) -> None:
        """Remember this moment under a name. Of more than 64 the first is forgotten."""
        self._cuts.pop(name, None)
        self._cuts[name] = self.next_stamp
        if len(self._cuts) > _MAX_CUTS:
            del self._cuts[next(iter(self._cuts))]

    def since(self, name: int) -> int:
        """The stamp from which on rows were touched after a cut; rows touched before may have one too, never the other way round.

        Raises KeyError for a cut that is not remembered.
        """
        return self._cuts[name]

    def forget_cut(self, name: int) -> None:
        """The cut will not be asked for any more. Idempotent."""
        self._cuts.pop(name, None)

    def moments(self) -> dict[int, list[tuple[int, int]]]:
        """For each time to live, the moments it is measured with."""
        return {life: list(begun) for life, begun in self._marks.items()}

    def resume(self, lookups: int, next_stamp: int, moments: Mapping[int, Moments]) -> None:
        """Go on as another `Recency` did; a time to live that it did not measure begins now."""
        self.lookups, self.next_stamp = lookups, next_stamp
        self._marks = {life: deque(moments.get(life, ())) for life in self._marks}

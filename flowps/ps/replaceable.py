"""`Replaceable`: a shard that may be lost, and come back elsewhere with the rows of an earlier checkpoint.

Lookups wait for it, and are made anew there, as those are of which only the rows were found. A batch that was looked up before is
not known there: its push is left out. Covers the waiting and the count of what the rows have not learned; who notices a loss, and
who starts the shard anew, is the cluster's business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from flowps.batch import Float32
from flowps.errors import StoppedError, UnreachableError
from flowps.ps.endpoint import Endpoint
from flowps.ps.parcel import Lines, Parcel


class Closable(Endpoint, Protocol):
    """An endpoint whose calls can be ended."""

    def close(self) -> None:
        """End the connection; calls that wait raise StoppedError. Idempotent."""


class Replaceable(Endpoint):
    """`endpoint`, until it is replaced.

    notice_s   seconds within which `lose` follows on a call that was not answered; without it, the call's error is raised

    Any thread may call any method.
    """

    def __init__(self, endpoint: Closable, notice_s: float) -> None:
        self._changed = threading.Condition()  # guards all that follows
        self._endpoint, self._notice_s = endpoint, notice_s
        self._generation = 0  # how often it was replaced
        self._is_lost = self._is_closed = False
        self._found: dict[int, tuple[int, Parcel]] = {}  # batches found and not pooled: generation, and what was asked
        self._in_flight: dict[int, tuple[int, int]] = {}  # batches looked up and not pushed: generation and samples
        self._learned = 0  # samples whose push has come back, of those that the rows have learned
        self._learned_at: dict[int, int] = {}  # by the step of a cut

    def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Float32 | None = None) -> Float32:
        """See Endpoint. Waits for a shard that is lost."""
        return self._looked_up(
            batch_id, parcel.size, training, lambda endpoint, _: endpoint.lookup(batch_id, parcel, training, out)
        )

    def find(self, batch_id: int, parcel: Parcel) -> None:
        """See Endpoint. Of a shard that is lost nothing is found: `pool` then looks up."""
        with self._changed:
            generation, endpoint = self._generation, self._endpoint
        try:
            endpoint.find(batch_id, parcel)
        except (UnreachableError, StoppedError) as error:
            self._wait_for_another(generation, error)
        with self._changed:
            self._found[batch_id] = generation, parcel

    def pool(self, batch_id: int, size: int, out: Float32 | None = None) -> Float32:
        """See Endpoint. Looks up whole what was found before the shard was lost."""
        with self._changed:
            found_in, parcel = self._found.get(batch_id, (self._generation, None))

        def pool(endpoint: Endpoint, generation: int) -> Float32:
            if generation == found_in or parcel is None:  # of what was never found, the shard says so
                return endpoint.pool(batch_id, size, out)
            return endpoint.lookup(batch_id, parcel, True, out)

        answer = self._looked_up(batch_id, size, True, pool)
        with self._changed:
            self._found.pop(batch_id, None)
        return answer

    def _looked_up(self, batch_id: int, samples: int, training: bool, ask: Callable[[Endpoint, int], Float32]) -> Float32:
        """What `ask` gives of a shard and its generation, which is asked again where the shard is replaced meanwhile."""
        while True:
            with self._changed:
                generation, endpoint = self._generation, self._endpoint
            try:
                answer = ask(endpoint, generation)
            except (UnreachableError, StoppedError) as error:
                self._wait_for_another(generation, error)
                continue
            with self._changed:
                if generation != self._generation:
                    continue  # replaced since: what is asked next does not know of it
                if training:
                    self._in_flight[batch_id] = generation, samples
            return answer

    def push(self, batch_id: int, gradient: Lines, rate_scale: float) -> int:
        """See Endpoint. 0 for a batch that was looked up before the shard was lost."""
        with self._changed:
            endpoint = self._endpoint
            generation, samples = self._in_flight.get(batch_id, (self._generation, 0))
            if generation != self._generation:
                del self._in_flight[batch_id]
                return 0
        try:
            rows = endpoint.push(batch_id, gradient, rate_scale)
        except (UnreachableError, StoppedError) as error:
            self._wait_for_another(generation, error)
            rows = 0
        with self._changed:
            self._in_flight.pop(batch_id, None)
            if generation == self._generation:
                self._learned += samples
        return rows

    def forget(self, batch_id: int) -> None:
        """See Endpoint."""
        with self._changed:
            endpoint = self._endpoint
            found_in, _ = self._found.pop(batch_id, (self._generation, None))
            generation, _ = self._in_flight.pop(batch_id, (found_in, 0))
            if generation != self._generation:
                return
        try:
            endpoint.forget(batch_id)
        except (UnreachableError, StoppedError) as error:
            self._wait_for_another(generation, error)

    def cut(self, step: int) -> None:
        """Nothing is in flight, and a checkpoint may be made of the rows as they are."""
        with self._changed:
            self._learned_at[step] = self._learned

    def lose(self) -> None:
        """The shard has gone: whoever calls it waits for `replace` or `close`."""
        with self._changed:
            self._is_lost, endpoint = True, self._endpoint
            self._changed.notify_all()
        endpoint.close()  # nobody waits for its answers

    def replace(self, endpoint: Closable, step: int) -> int:
        """The shard is `endpoint` now, with its rows of the cut after `step`. Returns of how many samples they have not learned.

        Those are the samples that were pushed since that cut, and those that are looked up and will not be pushed.
        """
        with self._changed:
            if self._is_closed:
                endpoint.close()
                raise StoppedError("a shard came back when nobody waited for it any more")
            self._generation += 1
            self._endpoint, self._is_lost = endpoint, False
            learned = self._learned_at.get(step, 0)
            left_out = [
                samples for generation, samples in self._in_flight.values() if generation == self._generation - 1
            ]  # those of earlier ones are counted
            lost = self._learned - learned + sum(left_out)
            self._learned = learned
            self._learned_at = {at: count for at, count in self._learned_at.items() if at <= step}
            self._changed.notify_all()
        return lost

    def close(self) -> None:
        """End the connection; calls that wait raise StoppedError. Idempotent."""
        with self._changed:
            self._is_closed, endpoint = True, self._endpoint
            self._changed.notify_all()
        with suppress(Exception):  # it is not needed any more, whatever is wrong with it
            endpoint.close()

    def _wait_for_another(self, generation: int, error: Exception) -> None:
        """Until the shard of `generation`, whose call has ended with `error`, is replaced. Raises `error` when it will not be."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._is_lost or self._generation != generation, self._notice_s)
            if self._is_lost:
                self._changed.wait_for(lambda: self._is_closed or self._generation != generation)
            if self._generation == generation:
                raise error

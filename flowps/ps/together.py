"""`Together`: trainers that step together, in the synchronous mode: the shard sees one batch and one gradient of them all.

Covers who waits for whom. Called by every trainer of a run, through the service or in its own process.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from flowps.batch import Batch, Float32
from flowps.errors import DataError, StoppedError, UnknownBatchError
from flowps.ps.endpoint import Endpoint
from flowps.ps.numbering import step_of, trainer_of
from flowps.ps.parcel import Lines, Parcel

T = TypeVar("T")
_OVER = "trainers that step together: the run ends"


@dataclass
class _Round:
    """One step of all trainers: what each has brought, and what becomes of it."""

    parcels: dict[int, Parcel] = field(default_factory=dict)
    gradients: dict[int, tuple[Lines, float]] = field(default_factory=dict)
    looked_up: Future[dict[int, Float32]] = field(default_factory=Future)
    pushed: Future[int] = field(default_factory=Future)


class Together(Endpoint):
    """`shard` for `trainers` that step together: their batches are looked up as one batch, and their gradients pushed as one.

    So N trainers do with a row what one trainer with N times the batch does. Every trainer looks a batch up in every step, an empty
    one when it has no more, and pushes unless it was empty; with one batch in flight. A call returns when all trainers have made
    it, and raises StoppedError once the end was declared by `forget` or `close`. An error of a lookup or push is everyone's, and
    final: there is no other try.
    """

    def __init__(self, endpoint: Endpoint, width: int, trainers: int) -> None:
        self._endpoint, self._width, self._trainers = endpoint, width, trainers
        self._lock = threading.Lock()  # guards the rounds
        self._rounds: dict[int, _Round] = {}
        self._over_from = sys.maxsize  # no step from this one on

    def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Float32 | None = None) -> Float32:
        """See Endpoint. An evaluation's lookup waits for nobody."""
        if not training:
            return self._endpoint.lookup(batch_id, parcel, training, out)
        number, trainer = step_of(batch_id), trainer_of(batch_id)
        with self._lock:
            found = self._round(number)
            if trainer in found.parcels and (parcel.size or found.parcels[trainer].size):
                raise DataError(f"batch {batch_id}: trainer {trainer} has looked up its batch of step {number} before")
            new = trainer not in found.parcels
            found.parcels[trainer] = parcel
            complete = new and len(found.parcels) == self._trainers
        if complete:
            _settle(found.looked_up, lambda: self._look_up(number, found))
            if not any(of.size for of in found.parcels.values()):  # all have come to their end: there is nothing to push
                self._end(number)
        answer = found.looked_up.result()[trainer]
        if out is None:
            return answer
        np.copyto(out, answer)
        return out

    def find(self, batch_id: int, parcel: Parcel) -> None:
        """Refused with a DataError: with one batch in flight there is no push to be ahead of."""
        raise _no_halves(batch_id)

    def pool(self, batch_id: int, size: int, out: Float32 | None = None) -> Float32:
        """Refused, as `find`."""
        raise _no_halves(batch_id)

    def push(self, batch_id: int, gradient: Lines, rate_scale: float) -> int:
        """See Endpoint."""
        number, trainer = step_of(batch_id), trainer_of(batch_id)
        with self._lock:
            if number >= self._over_from:
                raise StoppedError(_OVER)
            found = self._rounds.get(number)
            parcel = found.parcels.get(trainer) if found is not None else None
            if found is None or parcel is None or not parcel.size:
                raise UnknownBatchError(
                    f"batch {batch_id}: a push came, but trainer {trainer} has looked up nothing in step {number}"
                )
            if (gradient.size, gradient.width) != (parcel.size, self._width):
                wrong = DataError(
                    f"batch {batch_id}: a push has a gradient of {[gradient.size, gradient.width]}, expected "
                    f"{[parcel.size, self._width]}"
                )
                _refuse(found, wrong)
                raise wrong
            found.gradients[trainer] = gradient, rate_scale
            complete = len(found.gradients) == sum(1 for of in found.parcels.values() if of.size)
        if complete:
            _settle(found.pushed, lambda: self._push(number, found))
            self._end(number)
        return found.pushed.result()

    def forget(self, batch_id: int) -> None:
        """There will be no step of all trainers any more, from that of the batch on: whoever waits for one gets a StoppedError."""
        number = step_of(batch_id)
        with self._lock:
            self._over_from = min(self._over_from, number)
            over = {n: found for n, found in self._rounds.items() if n >= self._over_from}
            for n in over:
                del self._rounds[n]
        for n, found in over.items():
            self._endpoint.forget(n)
            _refuse(found, StoppedError(_OVER))

    def close(self) -> None:
        """Nobody waits any longer. Idempotent."""
        self.forget(0)

    def _round(self, number: int) -> _Round:
        if number >= self._over_from:
            raise StoppedError(_OVER)
        return self._rounds.setdefault(number, _Round())

    def _end(self, number: int) -> None:
        with self._lock:
            self._rounds.pop(number, None)

    def _look_up(self, number: int, found: _Round) -> dict[int, Float32]:
        members = sorted(found.parcels)
        sizes = [found.parcels[m].size for m in members]
        joined = _join([found.parcels[m] for m in members])
        if joined is None:
            return {m: np.empty((0, self._width), np.float32) for m in members}
        answer = self._endpoint.lookup(number, joined, training=True)
        ends = np.cumsum(sizes)
        return {m: answer[end - size : end] for m, size, end in zip(members, sizes, ends, strict=True)}

    def _push(self, number: int, found: _Round) -> int:
        members = sorted(found.gradients)
        scales = {found.gradients[m][1] for m in members}
        if len(scales) > 1:
            raise DataError(f"step {number}: the trainers scale the learning rates by {sorted(scales)}, not by one factor")
        parts = [found.gradients[m][0].array() for m in members if found.gradients[m][0].size]
        return self._endpoint.push(number, Lines(np.concatenate(parts)), scales.pop())


def _no_halves(batch_id: int) -> DataError:
    return DataError(f"batch {batch_id}: trainers that step together look a batch up at once, not in two halves")


def _join(parcels: Sequence[Parcel]) -> Parcel | None:
    """The samples of all parcels, one parcel's after the other's."""
    pieces = []
    for parcel in parcels:
        if parcel.size:
            signs, offsets, shares = parcel.joined()
            pieces.append(Batch(np.empty(parcel.size, np.float32), np.empty((parcel.size, 0), np.float32), signs, offsets, shares))
    if not pieces:
        return None
    whole = Batch.concat(pieces)
    return Parcel(whole.size, [whole.signs], [np.diff(whole.offsets)], None if whole.shares is None else [whole.shares])


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    """Give `future` what `work` returns or raises, unless `close` or `forget` came first."""
    try:
        result = work()
    except BaseException as error:  # handed over whole to everyone who waits
        with suppress(InvalidStateError):
            future.set_exception(error)
    else:
        with suppress(InvalidStateError):
            future.set_result(result)


def _refuse(found: _Round, error: Exception) -> None:
    for future in (found.looked_up, found.pushed):
        with suppress(InvalidStateError):
            future.set_exception(error)

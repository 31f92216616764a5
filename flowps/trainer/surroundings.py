"""`Surroundings`: all that a trainer is given of the world: batches, lookups and pushes, and who is told what.

Streams and callables: `loop` knows nothing of hubs and shards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from flowps.batch import Batch, Float32
from flowps.errors import StoppedError
from flowps.status.event import Emit
from flowps.status.run_status import RunStatus
from flowps.trainer.feed import Find
from flowps.trainer.group import Group
from flowps.trainer.state import Arrays, Cut, State

if TYPE_CHECKING:
    from flowps.trainer.models import ModelSpec


class BatchStream(Iterator[Batch], Protocol):
    """Batches in order."""

    def close(self) -> None:
        """May come from any thread; ends a `next` that waits."""


@dataclass(frozen=True)
class Surroundings:
    """What a trainer is given.

    train    epoch (from 0) → its batches
    test     the batches to evaluate on, or None
    valid    those to evaluate on at the end of every epoch, and between, or None
    build    makes the model from a spec; None: the one that config.model names
    trains   whether there is anything to train: otherwise only the test is left
    lookup   (batch id, batch, training) → embeddings float32 [size, width]; thread-safe
    find     (batch id, batch) → what gives the embeddings of a training lookup, whose rows are found already; thread-safe; None:
             a lookup has no halves
    push     (batch id, gradient float32 [size, width], what learning rates are multiplied by); thread-safe
    stop     set by anyone to end the run after the current step
    group    the trainers that share one dense update; None: this one is alone
    attend   told the batch id of a step for which this trainer has no batch any more, while others may
    give_up  told the batch id from which on there will be no more steps, while lookups may wait for those of other trainers
    forget   told the batch id of a lookup that will have no push, at a stop of several trainers
    cut      told where the trainer is, with nothing in flight, at the end and, with checkpoints, between; training goes on when it
             returns
    resume   the state of a cut: where this run begins
    warm_start  arrays of the state of another run, whose dense weights are taken as far as they fit
    """

    train: Callable[[int], BatchStream]
    test: Callable[[], BatchStream] | None
    lookup: Callable[[int, Batch, bool], Float32]
    push: Callable[[int, Float32, float], None]
    emit: Emit
    status: RunStatus
    stop: threading.Event
    group: Group | None = None
    attend: Callable[[int], None] = lambda ticket: None
    give_up: Callable[[int], None] = lambda ticket: None
    forget: Callable[[int], None] = lambda ticket: None
    cut: Callable[[Cut], None] = lambda cut: None
    resume: State | None = None
    warm_start: Arrays | None = None
    valid: Callable[[], BatchStream] | None = None
    trains: bool = True
    build: Callable[[ModelSpec], Any] | None = None
    find: Find | None = None


class Ending(BatchStream):
    """`inner`, which ends where it is closed because of a stop."""

    def __init__(self, inner: BatchStream, stop: threading.Event) -> None:
        self._inner, self._stop = inner, stop

    def __next__(self) -> Batch:
        try:
            return next(self._inner)
        except StoppedError:
            if self._stop.is_set():
                raise StopIteration from None
            raise

    def close(self) -> None:
        """See BatchStream."""
        self._inner.close()

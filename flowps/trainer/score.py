"""Feeds → logits, without a step: what an evaluation and a prediction do with every batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Protocol

from flowps.batch import Batch, Float32
from flowps.errors import StoppedError
from flowps.status.run_status import RunStatus
from flowps.trainer.feed import Feed, FeedQueue
from flowps.trainer.surroundings import BatchStream


class Predicts(Protocol):
    """`Forward`, and the `Step` that has one."""

    def predict(self, batch: Batch, embeddings: Float32, inputs: tuple[object, ...] | None = None) -> Float32:
        """See Forward."""


def scored(feeds: FeedQueue, stream: BatchStream, model: Predicts, status: RunStatus) -> Iterator[tuple[Batch, Float32]]:
    """Each batch of `stream` with its logits, in order, until the last one or a stop; closes both then.

    Gets PredictStep times into `status`. Raises what a feed thread raised.
    """
    with closing(feeds), closing(stream):
        while (feed := _next(feeds)) is not None:
            with status.timed("PredictStep"):
                logits = model.predict(feed.batch, feed.embeddings, feed.inputs)
            yield feed.batch, logits
            feeds.release()
        feeds.check()


def _next(feeds: FeedQueue) -> Feed | None:
    try:
        return feeds.get()
    except StoppedError:
        return None

"""`TallySink`: predictions → what they add up to, label by label."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from flowps.batch import Float32
from flowps.errors import DataError
from flowps.hub.partition import Partition
from flowps.quality import Tally


@dataclass(frozen=True)
class Wanted:
    """What is to be told apart: the label columns, the columns of slices, and the column of groups ("": none)."""

    labels: tuple[str, ...]
    slices: tuple[str, ...] = ()
    group: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """That are needed beside the samples."""
        return tuple(dict.fromkeys([*self.slices, *([self.group] if self.group else [])]))

    def sink(self) -> TallySink:
        """An empty sink."""
        return TallySink(self)


class TallySink(AbstractContextManager["TallySink"]):
    """A Tally of each label."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._tallies = {label: Tally(wanted.slices, wanted.group) for label in wanted.labels}

    def __exit__(self, *error: object) -> None:
        pass

    def take(self, partition: Partition, columns: pa.Table | None, labels: Float32, logits: Float32) -> None:
        """See Sink. Raises DataError that names the file."""
        slices = {name: columns.column(name) for name in self._wanted.slices} if columns is not None else {}
        group = columns.column(self._wanted.group) if columns is not None and self._wanted.group else None
        for k, tally in enumerate(self._tallies.values()):
            of = (labels, logits) if len(self._tallies) == 1 else (labels[:, k].copy(), logits[:, k].copy())
            try:
                tally.update(*of, slices, group)
            except DataError as error:
                raise DataError(f"{partition.url}: {error}") from None

    def result(self) -> dict[str, Any]:
        """The tallies by label."""
        return self._tallies

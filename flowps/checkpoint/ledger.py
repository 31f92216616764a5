"""`Ledger`: what a run has read, trained, dropped and replayed, and which samples of the epoch are trained.

Pure: nothing is read or written here. Whoever keeps it counts `read` where batches come in, `trained` where steps are done, and
the partitions' rows where batches are made, so that the sums say something.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from types import MappingProxyType

import msgspec

from flowps.errors import CheckpointError

_NONE: Mapping[str, int] = MappingProxyType({})


class Taken(msgspec.Struct, frozen=True):
    """How far a partition is in this epoch.

    url, first_row, num_rows  the partition, as the hub knows it
    rows                      how many of its samples are trained or dropped, from the beginning of the order in which this epoch
                              goes through them
    """

    url: str
    first_row: int
    num_rows: int
    rows: int


class Ledger(msgspec.Struct, frozen=True, dict=True):
    """The state at a cut. Counts are of samples, since the start of the first run that this one goes on from.

    epoch     that is under way, from 0
    read      that have come from the hub, each time one came
    trained   whose step counts in the model as it is now
    dropped   reason → that were left out on purpose, and will not come again in their epoch
    replayed  that had been read, trained or not, when the run went back to an earlier cut; they come again
    unlearned shard → trained samples that its rows have not learned: it was lost, and came back as it was at an earlier cut
    ended     trained or dropped in the epochs before this one
    done      the partitions of this epoch of which samples are trained or dropped
    """

    epoch: int = 0
    read: int = 0
    trained: int = 0
    dropped: dict[str, int] = msgspec.field(default_factory=dict)
    replayed: int = 0
    unlearned: dict[str, int] = msgspec.field(default_factory=dict)
    ended: int = 0
    done: list[Taken] = msgspec.field(default_factory=list)

    def advance(self, read: int, trained: int, taken: Iterable[Taken], dropped: Mapping[str, int] = _NONE) -> Ledger:
        """The ledger at the next cut of the same epoch.

        read, trained, dropped  since this one
        taken                   partitions that are further now than at this one, each with all its rows so far in the epoch
        """
        done = {(part.url, part.first_row): part for part in self.done}
        for part in taken:
            before = self.rows_trained(part.url, part.first_row, part.num_rows)
            assert before <= part.rows <= part.num_rows, "a partition goes forward"
            done[part.url, part.first_row] = part
        reasons = {reason: self.dropped.get(reason, 0) + dropped.get(reason, 0) for reason in {**self.dropped, **dropped}}
        return msgspec.structs.replace(
            self, read=self.read + read, trained=self.trained + trained, dropped=reasons, done=list(done.values())
        )

    def next_epoch(self) -> Ledger:
        """The ledger at the beginning of the next epoch."""
        return msgspec.structs.replace(self, epoch=self.epoch + 1, ended=self.trained + sum(self.dropped.values()), done=[])

    def go_back(self, read: int) -> Ledger:
        """The ledger when the run has come back to this cut and had read so many samples since; they are read again."""
        return msgspec.structs.replace(self, read=self.read + read, replayed=self.replayed + read)

    def come_back(self, shard: str, samples: int) -> Ledger:
        """The ledger when a shard has come back without what it has learned of so many samples; they do not come again."""
        return msgspec.structs.replace(self, unlearned={**self.unlearned, shard: self.unlearned.get(shard, 0) + samples})

    def rows_trained(self, url: str, first_row: int, num_rows: int) -> int:
        """How many samples of a partition are not to be trained again in this epoch: 0 if it is new, `num_rows` if it is done.

        Raises CheckpointError if the samples that are trained cannot be told: the partition is partly trained and has another
        number of rows now, or it overlaps others of its file.
        """
        for part in self._by_url.get(url, ()):
            if part.first_row == first_row and (part.num_rows == num_rows or part.rows == part.num_rows):
                return part.rows if part.num_rows == num_rows else num_rows
            if part.first_row < first_row + num_rows and first_row < part.first_row + part.num_rows:
                raise CheckpointError(
                    f"{url}: of rows {part.first_row:,} to {part.first_row + part.num_rows:,}, {part.rows:,} are trained in epoch "
                    f"{self.epoch}, but now the partition has rows {first_row:,} to {first_row + num_rows:,}: the file or "
                    "the size of partitions has changed; bring back what it was, or go on from the end of an epoch"
                )
        return 0

    @property
    def adds_up(self) -> bool:
        """Whether every sample read is accounted for, and what is trained or dropped is what the partitions say."""
        placed = self.ended + sum(part.rows for part in self.done)
        return self.read == self._accounted() and placed == self.trained + sum(self.dropped.values())

    def explain(self) -> str:
        """One line for people."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.dropped.items()) if count)
        sums = (
            f"{self.trained:,} trained + {sum(self.dropped.values()):,} dropped{f' ({reasons})' if reasons else ''} + "
            f"{self.replayed:,} replayed"
        )
        difference = self.read - self._accounted()
        if difference:
            what = "are unaccounted for" if difference > 0 else "are counted twice"
            return f"ledger: does not add up: {self.read:,} read, but {sums}: {abs(difference):,} {what}"
        if not self.adds_up:
            placed = self.ended + sum(part.rows for part in self.done)
            return f"ledger: does not add up: {self.read:,} read = {sums}, but partitions say {placed:,} trained or dropped"
        lost = "".join(
            f"; rows of {shard} have not learned {samples:,} of those trained" for shard, samples in self.unlearned.items()
        )
        return f"ledger: {self.read:,} read = {sums}{lost}"

    def _accounted(self) -> int:
        return self.trained + sum(self.dropped.values()) + self.replayed

    @cached_property
    def _by_url(self) -> dict[str, list[Taken]]:
        found: dict[str, list[Taken]] = {}
        for part in self.done:
            found.setdefault(part.url, []).append(part)
        return found

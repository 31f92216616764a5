"""`Source`: an earlier table, read from the snapshots that its shard has left. Nothing of it is trusted.

Covers the checks of a state, of the types and shapes of sections, and of entries; `restore` makes the others, where rows are put.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Int32, Uint64
from flowps.errors import CheckpointError
from flowps.ps.kernels import carry
from flowps.ps.memory import MAX_ROWS, names
from flowps.ps.snapshot import Part, shared
from flowps.ps.table import Table
from flowps.ps.team import Team

_MAX_STAMP = 1 << 33
SECTIONS: dict[str, dict[str, tuple[type[np.generic], int]]] = {
    "entries": {"sign": (np.uint64, 1), "word": (np.uint64, 1)},
    "rows": {"number": (np.int32, 1), "slot": (np.int32, 1), "row": (np.float32, 2)},
    "order": {"number": (np.int32, 1)},
    "free": {"row": (np.int32, 1)},
    "sketch": {"sight": (np.uint8, 1)},
}
WRONG = {
    carry.RANGE: "the number of a row, its slot or its stamp, is out of range",
    carry.MISSING: "a row is missing, or is there twice",
    carry.STRIPE: "the entries of a stripe are not as many as its count says",
    carry.TWICE: "a sign is there twice",
    carry.CROWDED: "more signs want the same place than can have",
}


class Source:
    """An earlier table: its state, checked, and its sections, checked for their types and shapes as they are read."""

    def __init__(self, part: Part, number: int, table: Table) -> None:
        self.state, self.length = part.states[number], len(part.chain)
        self._part, self._number, self._who = part, number, names(table.slots)
        self._check(table)
        self.stamps = np.uint64(self.state.next_stamp)

    def damaged(self, what: str) -> CheckpointError:
        """The error to raise."""
        return CheckpointError(f"the checkpoint of the rows of slots {self._who} is damaged: {what}; restore another one")

    def read(self, snapshot: int, section: str) -> Iterator[list[NDArray[Any]]]:
        """The columns of the chunks of a section of a snapshot of the chain: C-contiguous, read-only."""
        for columns in self._part.chain[snapshot](self._number, section):
            arrays: list[NDArray[Any]] = []
            for name, (kind, ndim) in SECTIONS[section].items():
                array = np.asarray(columns[name]) if name in columns else None
                if array is None or array.dtype != kind or array.ndim != ndim or (arrays and len(array) != len(arrays[0])):
                    raise self.damaged(f"its section {section!r} has no column {name!r} of the type and length that it should have")
                if ndim == 2 and array.shape[1] != self.state.stride:
                    raise self.damaged(f"its rows have {array.shape[1]} floats, not {self.state.stride}")
                # Kernels are compiled for one kind of array, and files may be mapped read-only.
                array = np.require(array, requirements=["C", "A"]).view()
                array.flags.writeable = False
                arrays.append(array)
            yield arrays

    def _check(self, table: Table) -> None:
        state = self.state
        for slot in table.slots:
            if slot.name not in state.slots:
                continue
            for name, found, expected in (
                ("dim", state.dim, table.dim),
                ("optimizer", state.optimizer, type(table.optimizer.tag).__name__),
                ("storage", state.storage, slot.storage),
                ("floats of a row", state.stride, table.memory.stride),
            ):
                if found != expected:
                    raise CheckpointError(
                        f"slot {slot.name!r}: {name} {expected} in the config, {found} in the checkpoint; start a new run "
                        f"directory or set back the slot's {name}"
                    )
        fits = {
            "slots": 0 < len(state.slots) == len(set(state.slots)),
            "chain": 0 < self.length <= carry.MAX_CHAIN,
            "capacity_rows": 0 <= state.next_row <= state.capacity_rows <= MAX_ROWS,
            "rows": 0 <= state.rows <= state.next_row,
            "next_stamp": 1 <= state.next_stamp <= _MAX_STAMP,
            "lookups": min(state.lookups, state.pushes, state.dropped, state.unsound) >= 0,
            "ttl": all(
                0 <= first <= state.next_stamp and 0 <= number <= state.lookups and number - before > 0 and first - earlier >= 0
                for moments in state.ttl.values()
                for (before, earlier), (number, first) in zip([(-1, 0), *moments], moments, strict=False)
            ),
        }
        for name, fit in fits.items():
            if not fit:
                raise self.damaged(f"its state does not fit together ({name})")

    def entries(self, team: Team) -> tuple[Uint64, Int32]:
        """The chain's last word on the entry of each row (`found` of `kernels.carry`), and the rows in the order of the index."""
        found, order = np.zeros(2 * self.state.next_row, np.uint64), np.empty(self.state.rows, np.int32)
        at = 0

        def add(numbers: Int32) -> None:
            nonlocal at
            if len(numbers) > len(order) - at:
                raise self.damaged(f"it has more rows than the {len(order):,} that its state says")
            order[at : at + len(numbers)] = numbers
            at += len(numbers)

        for snapshot in range(self.length):
            for signs, words in self.read(snapshot, "entries"):
                numbers = self._note(signs, words, snapshot + 1, found, team)
                if self.length == 1:
                    add(numbers)
        if self.length > 1:
            for (numbers,) in self.read(self.length - 1, "order"):
                add(numbers)
        if at < len(order):
            raise self.damaged(f"it has {at:,} rows, not the {len(order):,} that its state says")
        return found, order

    def _note(self, signs: Uint64, words: Uint64, snapshot: int, found: Uint64, team: Team) -> Int32:
        """Write entries to `found`; returns their rows."""
        numbers, bad = np.empty(len(signs), np.int32), [-1]

        def work(first: int, last: int, _: int) -> None:
            bad.append(carry.note(signs, words, first, last, snapshot, found, numbers))

        shared(team, len(signs), work)
        if max(bad) >= 0:
            raise self.damaged(WRONG[carry.RANGE])
        return numbers

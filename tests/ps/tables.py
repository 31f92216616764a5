"""Tables small enough that growth, eviction, erasing and reuse happen all the time; what is in them, and whether they are sound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from flowps.batch import Float32
from flowps.config import Slot
from flowps.ps import memory as memory_module
from flowps.ps import table as table_module
from flowps.ps.kernels import layout
from flowps.ps.table import Bags, Table, Touched
from flowps.ps.team import Team
from tests.ps import drawn


@contextmanager
def small_stripes(rows: int = 8, first_size: int = 2) -> Iterator[None]:
    """Stripes of a few rows, an index that begins with a few entries, and threads that share any number of signs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_module, "_STRIPE_ROWS", rows)
        patch.setattr(memory_module, "_FIRST_SIZE", first_size)
        patch.setattr(memory_module, "_MIN_GRANT", 1)
        patch.setattr(table_module, "MIN_PART", 1)
        yield


@contextmanager
def table_of(slots: Sequence[Slot], capacity_rows: int, seed: int = 0, threads: int = 1, **rest: Any) -> Iterator[Table]:
    """A table with a team of its own."""
    team = Team(threads, "test")
    try:
        yield Table(slots, range(len(slots)), capacity_rows, seed, team, **rest)
    finally:
        team.close()


def bags_at(of: drawn.Bags, slots: Sequence[Slot], positions: Sequence[int] | None = None) -> Bags:
    """The bags of a table whose slots stand at `positions` of a batch, with slots of other tables between; columns in order."""
    positions = list(range(len(of))) if positions is None else list(positions)
    size = len(of[0])
    batch = [[[1234567 + position] * (b % 3) for b in range(size)] for position in range(max(positions) + 2)]
    for position, samples in zip(positions, of, strict=True):
        batch[position] = samples
    columns = np.cumsum([0] + [slot.width for slot in slots])[:-1].astype(np.int64)
    return Bags(*drawn.arrays(batch), size, np.array(positions, np.int64), columns)


def one_bag(signs: Any) -> drawn.Bags:
    """One slot, one sample."""
    return [[[int(sign) for sign in signs]]]


def look_up(table: Table, of: drawn.Bags) -> tuple[Touched, Float32]:
    """A training lookup: what its push needs, and the pooled buffer, float32 [size, width]."""
    out = np.full((len(of[0]), sum(slot.width for slot in table.slots)), np.nan, np.float32)
    touched = table.find(bags_at(of, table.slots))
    table.pool(touched, out)
    return touched, out


def see(table: Table, of: drawn.Bags) -> Float32:
    """A training lookup without a push."""
    touched, out = look_up(table, of)
    table.forget(touched)
    return out


def read(table: Table, of: drawn.Bags) -> Float32:
    """A lookup of an evaluation."""
    out = np.full((len(of[0]), sum(slot.width for slot in table.slots)), np.nan, np.float32)
    table.read(bags_at(of, table.slots), out)
    return out


def rows_of(table: Table) -> dict[int, Float32]:
    """{sign: weights and state} of all rows."""
    signs, _, _ = table.entries()
    known, weights, state = table.values(signs)
    assert known.all()
    return dict(zip(signs.tolist(), np.concatenate([weights, state], axis=1), strict=True))


def check(table: Table) -> None:
    """Every invariant of a table at rest."""
    meta, none = table.memory.meta, int(table.memory.none)
    index = table.memory.index.reshape(table.memory.num_stripes, -1, 2)
    rows: list[int] = []
    for stripe in range(table.memory.num_stripes):
        line = meta[stripe]
        held = index[stripe][index[stripe, :, 1] != 0]
        of_stripe = (held[:, 1] & layout.ROW).astype(np.int64) - 1
        free = table.memory.free[line[layout.FREE_AT] :][: line[layout.FREE]].tolist()
        fresh = list(range(line[layout.FRESH], line[layout.FRESH_END]))
        assert len(held) == line[layout.LIVE] <= line[layout.ROOM]
        assert index[stripe, -1, 1] == 0  # probing ends
        assert ((held[:, 1] >> layout.STAMP) < table.recency.next_stamp).all()
        numbers = table.memory.row_slots[of_stripe]
        assert ((numbers >= 0) & (numbers < len(table.slots))).all()
        rows += [*of_stripe.tolist(), *free, *fresh]
    # Every row that was granted is in one place, and none is the row that stands for no row.
    assert sorted(rows) == list(range(table.memory.next_row))
    assert table.memory.next_row <= table.memory.capacity_rows == none
    assert not table.memory.arena[none * table.memory.stride :].any()
    signs, _, _ = table.entries()
    assert len(set(signs.tolist())) == len(signs) == table.num_rows == meta[:, layout.LIVE].sum()
    assert table.values(signs)[0].all()  # each is found
    stats = table.stats()
    assert stats.inserted - stats.evicted - stats.erased == stats.rows <= stats.capacity_rows

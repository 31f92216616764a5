"""The kernels that take rows out and put them back: as their twins, nothing outside their outputs, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.ps.kernels import carry, layout
from tests.ps import drawn, naive
from tests.ps.tables import check, table_of
from tests.ps.test_kernels import assert_guards, guarded

signs_of_an_index = st.lists(drawn.signs, max_size=40, unique=True)


def word(row: int, stamp: int) -> int:
    """The second word of an entry."""
    return row + 1 | stamp << 31


def drawn_index(random: np.random.Generator, count: int) -> naive.Entries:
    """Entries, about half of them empty; those have signs too, of what stood there."""
    return [
        (int(random.integers(2**64, dtype=np.uint64)), word(int(random.integers(2**31 - 1)), int(random.integers(2**33))) * full)
        for full in random.integers(0, 2, count).tolist()
    ]


def as_array(index: naive.Entries) -> np.ndarray:
    return np.array(index, np.uint64).reshape(-1)


@drawn.bounded(max_examples=100)
@given(random=drawn.generators, size=st.integers(0, 60), since=st.sampled_from((0, 1, 2**32, 2**33 - 1)))
def test_entries_are_listed(random: np.random.Generator, size: int, since: int) -> None:
    """All, and those touched since a stamp, of any range of the index; a count that is too large ends with the range."""
    index = drawn_index(random, size)
    first, last = sorted(random.integers(0, size + 1, 2).tolist())
    expected = naive.listed(index[first:last])
    for more in (0, 3):
        count = len(expected) + more
        signs, whole_signs = guarded(count, 7, np.uint64)
        words, whole_words = guarded(count, 7, np.uint64)
        numbers, whole_numbers = guarded(count, 7, np.int32)
        assert carry.list_entries(as_array(index), first, last, count, signs, words) == len(expected)
        assert list(zip(signs.tolist(), words.tolist(), strict=True))[: len(expected)] == expected
        there, touched = carry.list_touched(as_array(index), first, last, count, np.uint64(since), numbers, signs, words)
        late = [entry for entry in expected if entry[1] >> 31 >= since]
        assert (there, touched) == (len(expected), len(late))
        assert list(zip(signs.tolist(), words.tolist(), strict=True))[:touched] == late
        assert numbers[:there].tolist() == [(found & 2**31 - 1) - 1 for _, found in expected]
        for array, whole in ((signs, whole_signs), (words, whole_words), (numbers, whole_numbers)):
            assert_guards(array, whole, 7)


@drawn.bounded(max_examples=100)
@given(random=drawn.generators, stride=st.integers(1, 40), num_rows=st.integers(1, 60), count=st.integers(0, 80))
def test_rows_are_taken_and_put(random: np.random.Generator, stride: int, num_rows: int, count: int) -> None:
    """Any rows, any floats bit by bit, NaN too, of any range of lines; nothing else is written."""
    arena, whole_arena = guarded(num_rows * stride, 7)
    arena[:] = random.integers(0, 2**32, len(arena), np.uint32).view(np.float32)
    slots_of_rows = random.integers(0, 3, num_rows).astype(np.int32)
    numbers = random.integers(0, num_rows, count).astype(np.int32)
    first, last = sorted(random.integers(0, count + 1, 2).tolist())
    rows, whole_rows = guarded(count * stride, 7)
    slots, whole_slots = guarded(count, 7, np.int32)
    carry.take_rows(numbers, first, last, arena, slots_of_rows, stride, rows, slots)
    bits = arena.view(np.uint32).reshape(-1, stride)
    expected, mine = rows.view(np.uint32).reshape(-1, stride), slice(first, last)
    np.testing.assert_array_equal(expected[mine], bits[numbers[mine]])
    np.testing.assert_array_equal(slots[mine], slots_of_rows[numbers[mine]])
    assert (np.delete(rows.reshape(-1, stride), np.arange(first, last), axis=0) == 7).all()
    assert_guards(rows, whole_rows, 7)
    assert_guards(slots, whole_slots, 7)
    # Back, into an arena that has other floats.
    back, whole_back = guarded(num_rows * stride, 7)
    back_slots, held = np.full(num_rows, -1, np.int32), np.zeros(num_rows, np.uint16)
    assert carry.put_rows(numbers, slots, rows, first, last, 9, 3, back, back_slots, stride, held) == -1
    for row in range(num_rows):
        there = row in numbers[mine]
        assert held[row] == 9 * there
        assert back_slots[row] == (slots_of_rows[row] if there else -1)
        line = back.view(np.uint32).reshape(-1, stride)[row]
        np.testing.assert_array_equal(line, bits[row] if there else np.full(stride, 7, np.float32).view(np.uint32))
    assert_guards(back, whole_back, 7)
    assert_guards(arena, whole_arena, 7)


@pytest.mark.parametrize(("number", "slot"), [(-1, 0), (5, 0), (2**31 - 1, 0), (-(2**31), 0), (0, -1), (0, 3), (0, 2**31 - 1)])
def test_rows_out_of_range_are_not_put(number: int, slot: int) -> None:
    """Nor what comes after them; their place is told."""
    arena, whole = guarded(5 * 2, 7)
    numbers, slots, held = np.array([1, number, 2], np.int32), np.array([2, slot, 2], np.int32), np.zeros(5, np.uint16)
    assert carry.put_rows(numbers, slots, np.ones(6, np.float32), 0, 3, 1, 3, arena, np.zeros(5, np.int32), 2, held) == 1
    assert held.tolist() == [0, 1, 0, 0, 0]
    assert_guards(arena, whole, 7)


@drawn.bounded(max_examples=200)
@given(signs=signs_of_an_index, random=drawn.generators, bits=st.integers(0, 2), extra=st.integers(1, 20))
def test_entries_come_to_stand_where_they_stood(signs: list[int], random: np.random.Generator, bits: int, extra: int) -> None:
    """Listed and entered in the order of the index, they fill it as they had, whatever the order in which they first came."""
    size = len(signs) + extra
    rows = random.permutation(len(signs) + 3).tolist()
    index = naive.entered([(sign, word(rows[i], i)) for i, sign in enumerate(signs)], bits, size)
    entries = naive.listed(index)
    assert naive.entered(entries, bits, size) == index
    found, held = np.zeros(2 * len(rows), np.uint64), np.zeros(len(rows), np.uint16)
    order, flat = np.empty(len(entries), np.int32), np.array(entries, np.uint64).reshape(-1, 2)
    columns = np.ascontiguousarray(flat[:, 0]), np.ascontiguousarray(flat[:, 1])
    assert carry.note(*columns, 0, len(entries), 4, found, order) == -1
    assert order.tolist() == [rows[signs.index(sign)] for sign, _ in entries]
    for i, sign in enumerate(signs):
        assert found[2 * rows[i] : 2 * rows[i] + 2].tolist() == [sign, i << 31 | 4]
    held[order] = 4
    ends = np.cumsum([sum(naive.stripe_in(sign, bits) == stripe for sign in signs) for stripe in range(1 << bits)])
    ours, whole = guarded(2 * len(index), 0, np.uint64)
    cut = int(random.integers(0, (1 << bits) + 1))
    for first, last in ((0, cut), (cut, 1 << bits)):
        until = ends[last - 1] if last else 0
        assert carry.enter(
            order, ends, first, last, np.uint64(2**33), found, held, ours, np.uint64(size << bits), np.uint64(bits)
        ) == (carry.SOUND, until)  # fmt: skip
    assert ours.tolist() == as_array(index).tolist()
    assert (held == carry.USED).sum() == len(signs)
    assert_guards(ours, whole, 0)


def test_entries_that_cannot_be_are_not_entered() -> None:
    """One reason after the other; the place in the order is told, and nothing outside the index is written."""
    bits, size = np.uint64(1), 4
    index, whole = guarded(2 * (size + layout.PAD) * 2, 0, np.uint64)

    def enter(order: list[int], signs: list[int], held: list[int], ends: tuple[int, int], stamp: int = 5) -> tuple[int, int]:
        index[:] = 0
        found = np.array([(sign, stamp << 31 | 1) for sign in signs], np.uint64).reshape(-1)
        return carry.enter(
            np.array(order, np.int32), np.array(ends), 0, 2, np.uint64(6), found, np.array(held, np.uint16), index,
            np.uint64(2 * size), bits,
        )  # fmt: skip

    low, high = (naive.sign_at_home(position, 8, 3) for position in (0, 7))
    assert enter([0, 1], [low, high], [1, 1], (1, 2)) == (carry.SOUND, 2)
    assert enter([0, 1], [low, high], [1, 1], (1, 2), stamp=6) == (carry.RANGE, 0)
    assert enter([0, 2], [low, high], [1, 1], (1, 2)) == (carry.RANGE, 1)
    assert enter([-1, 1], [low, high], [1, 1], (1, 2)) == (carry.RANGE, 0)
    assert enter([0, 1], [low, high], [1, 0], (1, 2)) == (carry.MISSING, 1)
    assert enter([0, 1], [low, high], [2, 1], (1, 2)) == (carry.MISSING, 0)
    assert enter([0, 0], [low, low], [1, 1], (2, 2)) == (carry.MISSING, 1)
    assert enter([0, 1], [low, high], [1, 1], (2, 2)) == (carry.STRIPE, 1)
    assert enter([0, 1], [low, low], [1, 1], (2, 2)) == (carry.TWICE, 1)
    many = [naive.sign_at_home(7, 8, low) for low in range(layout.PAD + 1)]
    assert enter(list(range(len(many))), many, [1] * len(many), (0, len(many))) == (carry.CROWDED, layout.PAD)
    assert_guards(index, whole, 0)


@pytest.mark.parametrize("number", [0, 4, 2**31 - 1])
def test_entries_of_rows_out_of_range_are_not_noted(number: int) -> None:
    """A row's number plus one of 0, or beyond the rows."""
    found, whole = guarded(2 * 3, 0, np.uint64)
    words, signs = np.array([1, number | 5 << 31, 2], np.uint64), np.arange(3, dtype=np.uint64)
    assert carry.note(signs, words, 0, 3, 1, found, np.zeros(3, np.int32)) == 1
    assert not found[2:].any()
    assert_guards(found, whole, 0)


@drawn.bounded(max_examples=100)
@given(data=st.data(), num_slots=st.integers(1, 5))
def test_rows_are_grouped_by_slot(data: st.DataObject, num_slots: int) -> None:
    """In order within a slot, the chosen ones only."""
    slots = data.draw(st.lists(st.integers(0, num_slots - 1), max_size=50))
    chosen = data.draw(st.lists(st.booleans(), min_size=len(slots), max_size=len(slots)))
    expected = naive.grouped(slots, chosen, num_slots)
    ends, whole_ends = guarded(num_slots, -7, np.int64)
    lines, whole_lines = guarded(sum(chosen), -7, np.int64)
    carry.group(np.array(slots, np.int32), np.array(chosen, bool), ends, lines)
    assert lines.tolist() == [place for of_slot in expected for place in of_slot]
    assert ends.tolist() == np.cumsum([len(of_slot) for of_slot in expected]).tolist()
    assert_guards(ends, whole_ends, -7)
    assert_guards(lines, whole_lines, -7)


@drawn.bounded(max_examples=50)
@given(signs=signs_of_an_index, random=drawn.generators, dim=drawn.dims)
def test_rows_are_adopted(signs: list[int], random: np.random.Generator, dim: int) -> None:
    """Each under its sign with its slot, stamp and floats, in a table that gives room when asked; as a dict."""
    with table_of([drawn.slot("s", dim=dim), drawn.slot("t", dim=dim)], 100) as table:
        m = table.memory
        rows = random.uniform(-1, 1, (len(signs) + 5, 2 * dim)).astype(np.float32)
        lines = random.permutation(len(rows))[: len(signs)].astype(np.int64)
        slots, stamps = random.integers(0, 2, len(signs)).astype(np.int32), np.arange(len(signs)).astype(np.uint64)
        array, at, reasons = np.array(signs, np.uint64), 0, []
        while carry.DONE not in reasons:
            reason, at = carry.adopt(
                array, stamps, slots, lines, rows.reshape(-1), at, m.index, m.entries, m.bits, m.meta, m.free, m.row_slots,
                m.arena, m.stride,
            )  # fmt: skip
            reasons.append(reason)
            if reason == carry.GRANT:
                m.grant(0)
            assert len(reasons) < 5, (reasons, m.bits, m.meta.tolist())
        assert reasons == [carry.GRANT] * bool(signs) + [carry.DONE]
        table.recency.pass_on(len(signs) + 1)
        check(table)
        found, found_slots, found_stamps = table.entries()
        assert dict(zip(found.tolist(), zip(found_slots.tolist(), found_stamps.tolist(), strict=True), strict=True)) == dict(
            zip(signs, zip(slots.tolist(), stamps.tolist(), strict=True), strict=True)
        )
        for sign, line in zip(signs, lines, strict=True):
            _, weights, state = table.values(np.array([sign], np.uint64))
            np.testing.assert_array_equal(np.concatenate([weights[0], state[0]]), rows[line])
        if signs:
            again = np.array(signs[:1], np.uint64), stamps[:1], slots[:1], lines[:1], rows.reshape(-1), 0
            rest = m.index, m.entries, m.bits, m.meta, m.free, m.row_slots, m.arena, m.stride
            assert carry.adopt(*again, *rest) == (carry.KNOWN, 0)
            assert carry.adopt(*again[:2], 1 - slots[:1], *again[3:], *rest) == (carry.DONE, 1)  # another slot's
            assert table.num_rows == len(signs)

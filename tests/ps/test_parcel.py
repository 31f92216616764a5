"""How a batch becomes parcels and the answers one buffer, for any placement: as a twin that looks at every sign."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.batch import Batch, Float32
from flowps.config import Slot
from flowps.errors import DataError
from flowps.ps.parcel import Columns, Lines, Parcel, Route
from flowps.ps.placement import Piece, Placement, place
from tests.ps import drawn, naive

SLOTS = [
    drawn.slot("a", dim=16),
    drawn.slot("b", dim=3, pooling="mean"),
    drawn.slot("c", dim=2, pooling="none", max_len=3),
    drawn.slot("d", dim=16),
    drawn.slot("e", dim=8, pooling="sqrtn"),
    drawn.slot("f", dim=1),
]
WIDTH = sum(slot.width for slot in SLOTS)
Weighted = list[list[list[tuple[int, float]]]]
"""[slot][sample] → (sign, share)."""


def bags_of(batch: Batch) -> Weighted:
    """A batch as lists."""
    shares = np.ones(len(batch.signs), np.float32) if batch.shares is None else batch.shares
    pairs = list(zip(batch.signs.tolist(), shares.tolist(), strict=True))
    bags = [pairs[start:stop] for start, stop in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]
    return [bags[s * batch.size : (s + 1) * batch.size] for s in range(batch.num_slots)]


def opened(parcel: Parcel, num_slots: int) -> Weighted:
    """A parcel as lists."""
    signs, offsets, shares = parcel.joined()
    assert (signs.dtype, offsets.dtype) == (np.uint64, np.int32)
    assert len(offsets) == num_slots * parcel.size + 1
    assert offsets[-1] == len(signs)
    assert shares is None or (shares.dtype == np.float32 and len(shares) == len(signs))
    none = np.empty(parcel.size, np.float32)
    return bags_of(Batch(none, none.reshape(-1, 1), signs, offsets, shares)) if num_slots else []


def expected_bags(batch: Batch, pieces: Sequence[Piece]) -> Weighted:
    """What a shard with these pieces gets of a batch: of a slot in parts each sign with its weight in the sum of all parts."""
    found: Weighted = []
    for piece in pieces:
        bags = bags_of(batch)[piece.slot]
        if piece.parts > 1:
            shares = None if batch.shares is None else [[np.float32(share) for _, share in bag] for bag in bags]
            signs = [[sign for sign, _ in bag] for bag in bags]
            parts = naive.split(signs, piece.parts, SLOTS[piece.slot].pooling, shares)
            bags = [[(sign, float(weight)) for sign, weight in bag] for bag in parts[piece.part]]
        found.append(bags)
    return found


def pooled(bags: Weighted, slots: Sequence[Slot]) -> Float32:
    """What a shard that knows all signs answers: float32 [size, width]."""
    columns = [
        [naive.pool_bag([naive.draw(sign, s, slot.dim, 1) for sign, _ in bag], slot, [share for _, share in bag]) for bag in of]
        for (s, slot), of in zip(numbered(slots), bags, strict=True)
    ]
    return np.concatenate([np.array(column, np.float32).reshape(len(column), -1) for column in columns], axis=1)


def numbered(slots: Sequence[Slot]) -> list[tuple[int, Slot]]:
    """Slots with their seeds: their places among all slots, whichever shard they are on."""
    names = [slot.name for slot in SLOTS]
    return [(names.index(slot.name), slot) for slot in slots]


def a_batch(random: np.random.Generator, size: int, weighted: bool) -> Batch:
    """Of few signs, at the ends and in the middle of the range among them."""
    bags = drawn.random_bags(random, len(SLOTS), size, values=6)
    bags[0] = [[int(sign) for sign in random.choice(np.array(drawn.EDGES, np.uint64), len(bag))] for bag in bags[0]]
    return drawn.weighted(bags, random) if weighted else drawn.batch(bags)


@drawn.bounded(max_examples=120)
@given(random=drawn.generators, num_shards=st.integers(1, 5), size=st.integers(1, 6), weighted=st.booleans())
def test_there_and_back(random: np.random.Generator, num_shards: int, size: int, weighted: bool) -> None:
    """Any placement: every shard gets its signs with their weights, and the answers make the buffer that one shard would."""
    placement = drawn.any_placement(random, SLOTS, num_shards)
    route = Route(placement, SLOTS)
    assert (route.num_shards, route.width) == (num_shards, WIDTH)
    batch = a_batch(random, size, weighted)
    split = route.split(batch)
    out = np.full((size, WIDTH), np.nan, np.float32)
    answers: list[Float32 | None] = []
    for k, pieces in enumerate(placement.shards):
        parcel = route.parcel(k, batch, split)
        bags = opened(parcel, len(pieces))
        assert bags == expected_bags(batch, pieces)
        answer = pooled(bags, drawn.piece_slots(pieces, SLOTS)) if pieces else np.empty((size, 0), np.float32)
        route.scatter(k, answer, out)
        answers.append(answer if pieces else None)
    route.add_up(answers, out)
    np.testing.assert_allclose(out, pooled(bags_of(batch), SLOTS), rtol=1e-4, atol=1e-5)


@drawn.bounded(max_examples=60)
@given(random=drawn.generators, num_shards=st.integers(1, 5), size=st.integers(0, 6))
def test_every_shard_gets_its_columns_of_a_gradient(random: np.random.Generator, num_shards: int, size: int) -> None:
    """Side by side in the order of its pieces, bit by bit; all parts of a slot get the same. TensorFlow's arrays are read-only."""
    placement = drawn.any_placement(random, SLOTS, num_shards)
    route = Route(placement, SLOTS)
    grads = random.uniform(-1, 1, (size, WIDTH)).astype(np.float32)
    grads.flags.writeable = bool(random.integers(2))
    for k, pieces in enumerate(placement.shards):
        runs = [grads[:, placement.columns[p.slot] :][:, : SLOTS[p.slot].width] for p in pieces]
        expected = np.concatenate(runs, axis=1) if runs else np.empty((size, 0), np.float32)
        lines = route.gather(k, grads)
        assert (lines.size, lines.width) == expected.shape
        found = lines.array()
        assert (found.dtype, found.flags.c_contiguous) == (np.float32, True)
        np.testing.assert_array_equal(found, expected)
        written = np.full(expected.shape, np.nan, np.float32)
        lines.write_to(written)
        np.testing.assert_array_equal(written, expected)


def test_parts_are_added_up_in_the_order_of_their_signs() -> None:
    """Wherever they live: float sums depend on the order, and a run can be repeated on other machines."""
    slots = [drawn.slot("a", dim=1)]
    for order in permutations(range(3)):
        shards: list[tuple[Piece, ...]] = [()] * 3
        answers: list[Float32 | None] = [None] * 3
        for part, k in enumerate(order):
            shards[k] = (Piece(0, part, 3),)
            answers[k] = np.array([[(1e8, -1e8, 1.0)[part]]], np.float32)
        out = np.full((1, 1), np.nan, np.float32)
        Route(Placement(tuple(shards), (0,), 1), slots).add_up(answers, out)
        assert out.tolist() == [[1.0]]


def test_positions_and_columns_of_whole_slots() -> None:
    """What a shard in the same process needs, which works in the batch's own arrays; one with parts cannot."""
    shards = ((Piece(0), Piece(3), Piece(4)), (Piece(1, 1, 2), Piece(5)), (Piece(1, 0, 2), Piece(2)), ())
    columns = (0, 16, 19, 25, 41, 49)
    route = Route(Placement(shards, columns, WIDTH), SLOTS)
    positions = [route.positions(k) for k in range(4)]
    assert positions[0] is not None
    assert positions[3] is not None
    assert positions[0].tolist() == [0, 3, 4]
    assert positions[3].tolist() == []
    assert positions[1] is positions[2] is None
    assert [route.columns(k).tolist() for k in range(4)] == [[0, 25, 41], [16, 49], [16, 19], []]


def test_neighbours_travel_in_one_piece_without_a_copy() -> None:
    """Whole slots that stand side by side are one view of the batch; a shard with all of them sends the batch as it is."""
    random = np.random.default_rng(0)
    batch = a_batch(random, 4, weighted=True)
    route = Route(place(SLOTS, 1), SLOTS)
    parcel = route.parcel(0, batch, route.split(batch))
    assert parcel.shares is not None
    assert [len(pieces) for pieces in (parcel.signs, parcel.lengths, parcel.shares)] == [1, 1, 1]
    assert batch.shares is not None
    for ours, theirs in zip(parcel.joined(), (batch.signs, batch.offsets, batch.shares), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.shares_memory(parcel.joined()[0], batch.signs)
    apart = Placement(((Piece(0), Piece(1), Piece(4)), (Piece(2), Piece(3), Piece(5))), (0, 16, 19, 25, 41, 49), WIDTH)
    for k in (0, 1):
        pieces = Route(apart, SLOTS).parcel(k, batch, {}).signs
        assert len(pieces) == 2
        assert all(np.shares_memory(piece, batch.signs) or not len(piece) for piece in pieces)


def test_shares_are_sent_where_a_sign_has_one() -> None:
    """A sum without weights needs none; the part of a mean does, and then all of the shard's signs get one."""
    slots = [drawn.slot("sum"), drawn.slot("mean", pooling="mean"), drawn.slot("other")]
    placement = Placement(
        ((Piece(0, 0, 2), Piece(2)), (Piece(0, 1, 2), Piece(1, 0, 2)), (Piece(1, 1, 2),)), (0, 8, 16), 24
    )  # fmt: skip
    route = Route(placement, slots)
    batch = drawn.batch([[[1, 2**64 - 1]], [[1, 2, 2**63, 2**63 + 1]], [[3]]])
    parcels = [route.parcel(k, batch, route.split(batch)) for k in range(3)]
    assert parcels[0].shares is None
    assert [None if shares is None else shares.tolist() for _, _, shares in (parcel.joined() for parcel in parcels)] == [
        None,
        [1, 0.25, 0.25],
        [0.25, 0.25],
    ]


def test_no_signs_at_all() -> None:
    """Samples with empty bags only, weighted or not: parcels of lengths 0."""
    random = np.random.default_rng(0)
    for batch in (drawn.batch([[[], []]] * len(SLOTS)), drawn.weighted([[[], []]] * len(SLOTS), random)):
        for num_shards in (1, 3):
            placement = drawn.any_placement(random, SLOTS, num_shards)
            route = Route(placement, SLOTS)
            for k, pieces in enumerate(placement.shards):
                assert opened(route.parcel(k, batch, route.split(batch)), len(pieces)) == [[[], []]] * len(pieces)


def test_no_slots() -> None:
    """A run with dense columns only: parcels of samples and nothing else."""
    route = Route(place([], 2), [])
    batch = Batch(np.zeros(3, np.float32), np.empty((3, 0), np.float32), np.empty(0, np.uint64), np.zeros(1, np.int32))
    parcel = route.parcel(0, batch, route.split(batch))
    signs, offsets, shares = parcel.joined()
    assert (parcel.size, len(signs), offsets.tolist(), shares) == (3, 0, [0], None)
    assert route.gather(1, np.empty((3, 0), np.float32)).array().shape == (3, 0)


def test_pieces_are_joined_in_their_order() -> None:
    """Pieces that need not lie side by side; a single one is not copied; none is nothing."""
    parcel = Parcel(
        2, [np.array([5], np.uint64), np.array([6, 7], np.uint64)], [np.array([0, 1], np.int32), np.array([2, 0], np.int32)],
        [np.array([0.5], np.float32), np.array([1, 2], np.float32)],
    )  # fmt: skip
    signs, offsets, shares = parcel.joined()
    assert shares is not None
    assert (signs.tolist(), offsets.tolist(), shares.tolist()) == ([5, 6, 7], [0, 0, 1, 3, 3], [0.5, 1, 2])
    one = Parcel(1, [signs], [np.array([3], np.int32)])
    assert one.joined()[0] is signs
    assert one.joined()[2] is None
    signs, offsets, shares = Parcel(4, [], []).joined()
    assert (signs.dtype, len(signs), offsets.tolist(), shares) == (np.uint64, 0, [0], None)


def test_more_signs_than_offsets_can_count() -> None:
    """Refused with what to do about it, not counted wrong."""
    parcel = Parcel(2, [np.empty(0, np.uint64)], [np.array([2**31 - 1, 1], np.int32)])
    with pytest.raises(DataError, match=r"2147483648 signs, more than 2\^31; lower data\.batch_size"):
        parcel.joined()


def test_lines_that_are_the_source() -> None:
    """All columns, in their order: nothing is copied."""
    source = np.arange(12, dtype=np.float32).reshape(3, 4)
    for lines in (Lines(source), Lines(source, Columns([(0, 0, 3), (3, 3, 1)]), 4)):
        assert lines.array() is source
        assert (lines.size, lines.width) == (3, 4)
        out = np.empty((3, 4), np.float32)
        lines.write_to(out)
        np.testing.assert_array_equal(out, source)


def test_lines_of_some_columns() -> None:
    """In another order, and with one run that is not all of the source."""
    source = np.arange(12, dtype=np.float32).reshape(3, 4)
    swapped = Lines(source, Columns([(0, 2, 2), (2, 0, 2)]), 4)
    assert swapped.array().tolist() == [[2, 3, 0, 1], [6, 7, 4, 5], [10, 11, 8, 9]]
    one = Lines(source, Columns([(0, 1, 2)]), 2)
    assert one.array().tolist() == [[1, 2], [5, 6], [9, 10]]
    assert (one.size, one.width) == (3, 2)
    out = np.zeros((3, 2), np.float32)
    one.write_to(out)
    np.testing.assert_array_equal(out, one.array())


def test_runs_that_touch_are_one() -> None:
    """In both lines: what is side by side in one only is not."""
    columns = Columns([(0, 8, 2), (2, 10, 3), (5, 14, 1), (6, 4, 4)])
    assert (columns.packed.tolist(), columns.whole.tolist(), columns.widths.tolist()) == ([0, 5, 6], [8, 14, 4], [5, 1, 4])

"""`Batch`: its layout, and joining pieces at partition borders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.batch import Batch
from tests.hub import naive

UINT64 = st.integers(0, 2**64 - 1)


@st.composite
def pieces(draw: st.DrawFn) -> list[Batch]:
    """1 … 4 batches of the same width, of one row or more; bags, slots, dense columns and shares may be missing altogether."""
    num_slots, dense_width = draw(st.integers(0, 3)), draw(st.integers(0, 2))

    def row(weighted: bool) -> st.SearchStrategy[naive.Sample]:
        number = st.floats(-1e6, 1e6, width=32)
        bags = st.tuples(*[st.lists(st.tuples(UINT64, number), max_size=3)] * num_slots)
        return st.builds(
            lambda label, dense, bags: naive.Sample(
                label, dense,
                tuple(tuple(sign for sign, _ in bag) for bag in bags),
                tuple(tuple(share for _, share in bag) for bag in bags) if weighted else None,
            ),
            st.sampled_from([0.0, 1.0]), st.tuples(*[number] * dense_width), bags,
        )  # fmt: skip

    rows = st.one_of(
        st.lists(row(weighted), min_size=1, max_size=4) for weighted in draw(st.sampled_from([[False], [True], [False, True]]))
    )
    return [naive.batch(of_piece) for of_piece in draw(st.lists(rows, min_size=1, max_size=4))]


@settings(max_examples=100, deadline=None)
@given(pieces())
def test_concat_is_the_rows_one_after_the_other(parts: list[Batch]) -> None:
    naive.assert_same(Batch.concat(parts), naive.concat(parts))


def test_one_piece_is_returned_as_is() -> None:
    piece = naive.batch([naive.Sample(1.0, (0.5,), ((7,),))])
    assert Batch.concat([piece]) is piece


def test_concat_copies_two_pieces() -> None:
    parts = [naive.batch([naive.Sample(1.0, (0.5,), ((7, 8), (9,)), ((1.0, 2.0), (3.0,)))]) for _ in range(2)]
    whole = Batch.concat(parts)
    for name in ("labels", "dense", "signs", "offsets", "shares"):
        assert not any(np.shares_memory(getattr(whole, name), getattr(part, name)) for part in parts), name


def test_shares_are_joined_slot_by_slot_and_are_1_where_a_piece_has_none() -> None:
    weighted = naive.batch([naive.Sample(0.0, (), ((1, 2), (3,)), ((0.5, 2.0), (4.0,)))])
    plain = naive.batch([naive.Sample(0.0, (), ((5,), (6, 7)))])
    shares = Batch.concat([weighted, plain, weighted]).shares
    assert shares is not None
    assert shares.tolist() == [0.5, 2.0, 1.0, 0.5, 2.0, 4.0, 1.0, 1.0, 4.0]
    assert Batch.concat([plain, plain]).shares is None


@pytest.mark.parametrize("num_slots", [0, 1, 3])
def test_num_slots_and_size(num_slots: int) -> None:
    found = naive.batch([naive.Sample(0.0, (), ((1,),) * num_slots)] * 5)
    assert (found.size, found.num_slots) == (5, num_slots)


def test_zero_slots_join_to_zero_slots() -> None:
    parts = [naive.batch([naive.Sample(0.0, (1.0, 2.0), ())] * n) for n in (2, 1)]
    whole = Batch.concat(parts)
    assert (whole.size, whole.num_slots, len(whole.signs)) == (3, 0, 0)
    naive.assert_same(whole, naive.concat(parts))


def test_the_bag_of_a_slot_and_sample_is_where_the_layout_says() -> None:
    whole = Batch.concat(
        [
            naive.batch([naive.Sample(0.0, (), ((1, 2), ()))]),
            naive.batch([naive.Sample(1.0, (), ((), (5,))), naive.Sample(0.0, (), ((3,), (6, 7)))]),
        ]
    )
    bags = [whole.signs[whole.offsets[k] : whole.offsets[k + 1]].tolist() for k in range(2 * 3)]
    assert bags == [[1, 2], [], [3], [], [5], [6, 7]]


def test_a_batch_cannot_be_given_other_arrays() -> None:
    found = naive.batch([naive.Sample(0.0, (), ())])
    with pytest.raises(AttributeError):
        found.labels = np.zeros(1, np.float32)  # type: ignore[misc]

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


# --- several labels, weights of samples, samples left out -------------------------------------------------------------


def labelled(size: int, first: float, labels: int = 2, weights: bool = False, left_out: int = 0) -> Batch:
    """One slot with one sign a sample; all numbers count up from `first`."""
    numbers = np.arange(size, dtype=np.float32) + np.float32(first)
    return Batch(
        np.stack([numbers] * labels, 1) if labels > 1 else numbers, numbers[:, None], numbers.astype(np.uint64),
        np.arange(size + 1, dtype=np.int32), weights=numbers / 2 if weights else None, left_out=left_out,
    )  # fmt: skip


def test_labels_of_several_columns_and_weights_are_joined_sample_by_sample() -> None:
    whole = Batch.concat([labelled(2, 1, weights=True), labelled(3, 10, weights=True)])
    assert whole.labels.tolist() == [[n, n] for n in (1, 2, 10, 11, 12)]
    assert whole.weights is not None
    assert whole.weights.tolist() == [0.5, 1, 5, 5.5, 6]
    assert (whole.labels.dtype, whole.weights.dtype) == (np.float32, np.float32)
    assert (whole.size, whole.num_slots) == (5, 1)
    assert Batch.concat([labelled(2, 1), labelled(3, 10)]).weights is None


def test_read_counts_what_was_left_out() -> None:
    assert (labelled(3, 0).read, labelled(3, 0, left_out=4).read, labelled(0, 0, left_out=4).read) == (3, 7, 4)


@pytest.mark.parametrize("sizes", [[0], [0, 0], [0, 2], [2, 0], [0, 2, 0, 3, 0], [0, 0, 4]])
@pytest.mark.parametrize("weights", [False, True])
def test_pieces_without_samples_only_add_to_what_was_left_out(sizes: list[int], weights: bool) -> None:
    """Wherever they are: at the beginning, at the end, or everywhere."""
    parts = [labelled(size, 10 * k, weights=weights, left_out=k + 1) for k, size in enumerate(sizes)]
    whole = Batch.concat(parts)
    assert whole.left_out == sum(range(1, len(sizes) + 1))
    assert whole.read == sum(part.read for part in parts)
    wanted = [10.0 * k + n for k, size in enumerate(sizes) for n in range(size)]
    assert whole.dense[:, 0].tolist() == whole.signs.tolist() == wanted
    assert whole.labels.tolist() == [[n, n] for n in wanted]
    assert whole.offsets.tolist() == [*range(len(wanted) + 1)]
    assert (None if whole.weights is None else whole.weights.tolist()) == ([n / 2 for n in wanted] if weights else None)


def test_one_piece_with_samples_keeps_its_arrays_and_takes_the_others_count() -> None:
    piece = labelled(2, 1, left_out=1)
    found = Batch.concat([labelled(0, 0, left_out=5), piece])
    assert found.left_out == 6
    assert found.labels is piece.labels
    assert piece.left_out == 1
    assert Batch.concat([labelled(0, 0), piece]) is piece


def test_nbytes_are_those_of_all_arrays() -> None:
    whole = labelled(4, 0, weights=True)
    assert whole.nbytes == 4 * 2 * 4 + 4 * 4 + 4 * 8 + 5 * 4 + 4 * 4
    assert labelled(4, 0).nbytes == whole.nbytes - 4 * 4

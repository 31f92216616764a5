"""The ledger: sums that add up, or say what is wrong; partitions that are known again."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.checkpoint.ledger import Ledger, Taken
from flowps.errors import CheckpointError


def after(*taken: Taken) -> Ledger:
    rows = sum(part.rows for part in taken)
    return Ledger().advance(read=rows, trained=rows, taken=taken)


def test_nothing_adds_up() -> None:
    assert Ledger().adds_up
    assert Ledger().explain() == "ledger: 0 read = 0 trained + 0 dropped + 0 replayed"


def test_what_is_read_is_trained_dropped_or_replayed() -> None:
    start = Ledger()
    cut = start.advance(12_000, 11_990, [Taken("a", 0, 20_000, 12_000)], {"not finite": 3, "no label": 7})
    assert cut.explain() == "ledger: 12,000 read = 11,990 trained + 10 dropped (7 no label, 3 not finite) + 0 replayed"
    back = cut.go_back(read=400)
    assert back.explain() == "ledger: 12,400 read = 11,990 trained + 10 dropped (7 no label, 3 not finite) + 400 replayed"
    again = back.advance(400, 400, [Taken("a", 0, 20_000, 12_400)])
    assert again.explain() == "ledger: 12,800 read = 12,390 trained + 10 dropped (7 no label, 3 not finite) + 400 replayed"
    assert cut.adds_up
    assert back.adds_up
    assert again.adds_up
    assert start == Ledger()


@pytest.mark.parametrize(
    ("read", "complaint"), [(101, "101 read, but {sums}: 1 are unaccounted for"), (99, "99 read, but {sums}: 1 are counted twice")]
)
def test_what_does_not_add_up_is_said(read: int, complaint: str) -> None:
    ledger = Ledger().advance(read, 90, [Taken("a", 0, 100, 100)], {"not finite": 10})
    assert not ledger.adds_up
    sums = "90 trained + 10 dropped (10 not finite) + 0 replayed"
    assert ledger.explain() == f"ledger: does not add up: {complaint.format(sums=sums)}"


def test_partitions_that_say_something_else_are_said() -> None:
    ledger = Ledger().advance(100, 100, [Taken("a", 0, 100, 60)])
    assert not ledger.adds_up
    assert ledger.explain() == (
        "ledger: does not add up: 100 read = 100 trained + 0 dropped + 0 replayed, but partitions say 60 trained or dropped"
    )


def test_an_epoch_begins_with_no_partition_done() -> None:
    first = Ledger().advance(10, 9, [Taken("a", 0, 10, 10)], {"no label": 1})
    second = first.next_epoch()
    assert (second.epoch, second.ended, second.done) == (1, 10, [])
    assert second.rows_trained("a", 0, 10) == 0
    assert second.advance(4, 4, [Taken("a", 0, 10, 4)]).adds_up


def test_rows_of_partitions_are_those_of_the_last_cut() -> None:
    ledger = after(Taken("a", 0, 10, 10), Taken("a", 10, 10, 4), Taken("b", 0, 10, 1))
    assert [ledger.rows_trained("a", 0, 10), ledger.rows_trained("a", 10, 10), ledger.rows_trained("a", 20, 10)] == [10, 4, 0]
    assert ledger.rows_trained("c", 0, 10) == 0
    later = ledger.advance(5, 5, [Taken("a", 10, 10, 9)])
    assert later.rows_trained("a", 10, 10) == 9
    assert ledger.rows_trained("a", 10, 10) == 4
    assert len(later.done) == 3


def test_partitions_go_forward() -> None:
    with pytest.raises(AssertionError, match="a partition goes forward"):
        after(Taken("a", 0, 10, 5)).advance(0, 0, [Taken("a", 0, 10, 4)])
    with pytest.raises(AssertionError, match="a partition goes forward"):
        after(Taken("a", 0, 10, 11))


@pytest.mark.parametrize("now", [(10, 9), (10, 11), (5, 10), (15, 10), (0, 100), (12, 2)])
def test_a_partition_that_changed_while_it_was_open_is_refused(now: tuple[int, int]) -> None:
    ledger = after(Taken("data/a.parquet", 10, 10, 4))
    first, rows = now
    complaint = (
        f"data/a.parquet: of rows 10 to 20, 4 are trained in epoch 0, but now the partition has rows {first} to {first + rows}: "
        "the file or the size of partitions has changed; bring back what it was, or go on from the end of an epoch"
    )
    with pytest.raises(CheckpointError, match=complaint):
        ledger.rows_trained("data/a.parquet", first, rows)


@pytest.mark.parametrize("rows", [9, 10, 11])
def test_a_partition_that_is_done_is_done_even_if_it_changes(rows: int) -> None:
    assert after(Taken("a", 10, 10, 10)).rows_trained("a", 10, rows) == rows


def test_what_a_shard_has_not_learned_is_kept_and_said_and_changes_no_sum() -> None:
    ledger = (
        Ledger().advance(64, 64, [Taken("a", 0, 100, 64)]).come_back("shard 1", 32).come_back("shard 0", 0).come_back("shard 1", 8)
    )
    assert ledger.adds_up
    assert ledger.unlearned == {"shard 1": 40, "shard 0": 0}
    assert "; rows of shard 1 have not learned 40 of those trained" in ledger.explain()
    assert ledger.advance(36, 36, [Taken("a", 0, 100, 100)]).next_epoch().go_back(5).unlearned == ledger.unlearned


def test_a_ledger_is_plain_json() -> None:
    ledger = after(Taken("a", 0, 10, 10)).next_epoch().advance(3, 2, [Taken("b", 5, 7, 3)], {"no label": 1}).go_back(2)
    assert ledger.rows_trained("b", 5, 7) == 3  # looking something up changes nothing of it
    there = msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(ledger)))
    assert msgspec.convert(there, Ledger) == ledger
    assert there["done"] == [{"url": "b", "first_row": 5, "num_rows": 7, "rows": 3}]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50)), max_size=20))
def test_whatever_happens_sums_add_up(events: list[tuple[int, int, int]]) -> None:
    ledger = Ledger()
    for i, (trained, dropped, lost) in enumerate(events):
        rows = trained + dropped
        ledger = ledger.advance(rows, trained, [Taken("a", 1000 * i, 1000, rows)], {"why": dropped}).go_back(lost)
        if lost % 3 == 0:
            ledger = ledger.next_epoch()
        assert ledger.adds_up
    assert ledger.replayed == sum(lost for _, _, lost in events)
    assert ledger.trained == sum(trained for trained, _, _ in events)

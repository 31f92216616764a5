"""`LocalEndpoint` keeps the contract of endpoints; the numbers of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.config import Slot
from flowps.errors import UnknownBatchError
from flowps.ps.endpoint import Endpoint, LocalEndpoint
from flowps.ps.numbering import batch_id, step_of, trainer_of
from flowps.ps.shard import Shard
from tests.ps import drawn
from tests.ps.contract import SLOTS, WIDTH, EndpointContract, ones, parcel_of

trainers, tickets = st.integers(0, 1023), st.integers(0, 2**40 - 1)


class TestLocalEndpoint(EndpointContract):
    """A shard in the same process."""

    @contextmanager
    def reach(self, shard: Shard, slots: Sequence[Slot]) -> Iterator[Endpoint]:
        """See EndpointContract."""
        yield LocalEndpoint(shard, [slot.width for slot in slots])

    def test_answers_start_on_a_cache_line(self) -> None:
        """So that they can be written past the caches."""
        with self.reached() as (endpoint, _):
            batch = drawn.batch([[[1]] * 3] * len(SLOTS))
            assert endpoint.lookup(0, parcel_of(batch), True).ctypes.data % 64 == 0

    def test_calls_that_come_twice_are_refused(self) -> None:
        """As the shard does: a second lookup of a batch in flight, and a second push."""
        with self.reached() as (endpoint, _):
            parcel = parcel_of(drawn.batch([[[1]]] * len(SLOTS)))
            endpoint.lookup(0, parcel, True)
            with pytest.raises(UnknownBatchError, match="batch 0: looked up again before its push"):
                endpoint.lookup(0, parcel, True)
            endpoint.push(0, ones(1), 1.0)
            with pytest.raises(UnknownBatchError, match=r"batch 0: .*was it pushed before"):
                endpoint.push(0, ones(1), 1.0)

    def test_a_shard_without_slots(self) -> None:
        """Lines of width 0."""
        shard = Shard([], [], 0, 1)
        with self.reach(shard, []) as endpoint:
            batch = drawn.batch([[[1], []]])
            none = parcel_of(batch)
            assert endpoint.lookup(0, type(none)(2, [], []), True).shape == (2, 0)
            shard.close()


def test_the_contract_is_of_the_slots_it_says() -> None:
    """Its shard has whole vectors, rows one after the other, and three tables."""
    assert sum(slot.width for slot in SLOTS) == WIDTH
    assert {slot.pooling for slot in SLOTS} == {"sum", "mean", "sqrtn", "none"}


@drawn.bounded(max_examples=200)
@given(trainer=trainers, ticket=tickets)
def test_a_batch_knows_its_trainer_and_step(trainer: int, ticket: int) -> None:
    """There and back; it fits into the wire's uint64, and into numpy's."""
    number = batch_id(trainer, ticket)
    assert (trainer_of(number), step_of(number)) == (trainer, ticket)
    assert int(np.uint64(number)) == number


@drawn.bounded(max_examples=200)
@given(one=st.tuples(trainers, tickets), other=st.tuples(trainers, tickets))
def test_no_two_batches_share_a_number(one: tuple[int, int], other: tuple[int, int]) -> None:
    """Among all trainers of a run."""
    assert (batch_id(*one) == batch_id(*other)) == (one == other)


def test_the_first_trainer_numbers_its_batches_by_ticket() -> None:
    """So the numbers of a run with one trainer are those that its messages have always had."""
    assert [batch_id(0, ticket) for ticket in (0, 1, 2**40 - 1)] == [0, 1, 2**40 - 1]
    assert [batch_id(1, 0), batch_id(2, 5)] == [2**40, 2 * 2**40 + 5]

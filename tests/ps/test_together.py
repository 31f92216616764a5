"""`Together`: trainers that step together do with the rows what one trainer with all their samples does; nobody waits in vain.

Trainers are threads here. That one of them waits is known by `Watched`, not by time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from flowps.batch import Batch, Float32
from flowps.config import Slot
from flowps.errors import CapacityError, DataError, StoppedError, UnknownBatchError
from flowps.ps import together as together_module
from flowps.ps.client import PsClient
from flowps.ps.endpoint import Endpoint, LocalEndpoint
from flowps.ps.numbering import batch_id
from flowps.ps.parcel import Columns, Lines, Parcel
from flowps.ps.shard import Shard
from flowps.ps.together import Together
from tests.ps import drawn
from tests.ps.contract import SLOTS, WIDTH, StepContract, ask, empty_parcel, parcel_of, rows_of

PATIENCE_S = 60  # for threads that should never take long
WIDTHS = [slot.width for slot in SLOTS]


class TestTogetherOfOne(StepContract):
    """A trainer that steps together with nobody has a shard like any other."""

    @contextmanager
    def reach(self, shard: Shard, slots: Sequence[Slot]) -> Iterator[Endpoint]:
        """See StepContract."""
        widths = [slot.width for slot in slots]
        with closing(Together(LocalEndpoint(shard, widths), sum(widths), 1)) as together:
            yield together


class Watched(Future[Any]):
    """Says when somebody begins to wait for it, and lets nobody wait for ever."""

    begun: threading.Semaphore  # of the test that runs

    def result(self, timeout: float | None = None) -> Any:
        """As Future.result."""
        if not self.done():
            self.begun.release()
        return super().result(timeout or PATIENCE_S)


class Passed(Endpoint):
    """An endpoint that keeps the sizes of what is looked up, and whose pushes raise `error`, if there is one."""

    def __init__(self, endpoint: Endpoint, error: BaseException | None = None) -> None:
        self._endpoint, self._error = endpoint, error
        self.sizes: list[int] = []

    def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Float32 | None = None) -> Float32:
        """As the endpoint."""
        self.sizes.append(parcel.size)
        return self._endpoint.lookup(batch_id, parcel, training, out)

    def push(self, batch_id: int, gradient: Lines, rate_scale: float) -> int:
        """As the endpoint, or fail."""
        if self._error is not None:
            raise self._error
        return self._endpoint.push(batch_id, gradient, rate_scale)

    def forget(self, batch_id: int) -> None:
        """As the endpoint."""
        self._endpoint.forget(batch_id)


class World:
    """A shard, `trainers` threads that step together, and who waits."""

    def __init__(self, trainers: int, capacity_rows: int = 2000, error: BaseException | None = None) -> None:
        self.shard = Shard(SLOTS, [capacity_rows] * len(SLOTS), 7, max_in_flight=1)
        self.endpoint = Passed(LocalEndpoint(self.shard, WIDTHS), error)
        self.together = Together(self.endpoint, WIDTH, trainers)
        self.threads = ThreadPoolExecutor(trainers + 2)

    def lookup(self, trainer: int, step: int, batch: Batch | None) -> Future[Float32]:
        """Of a batch, or of no samples."""
        parcel = empty_parcel() if batch is None else parcel_of(batch, in_pieces=trainer % 2 == 1)
        return self.threads.submit(self.together.lookup, batch_id(trainer, step), parcel, True)

    def lookups(self, step: int, batches: Sequence[Batch | None]) -> list[Float32]:
        """Of all trainers; the answers."""
        answers = found([self.lookup(t, step, batch) for t, batch in enumerate(batches)])
        nobody_waits()
        return answers

    def push(self, trainer: int, step: int, grads: Float32, rate_scale: float = 1.0) -> Future[int]:
        """Of a gradient."""
        return self.threads.submit(self.together.push, batch_id(trainer, step), Lines(grads), rate_scale)

    def step(
        self, number: int, batches: Sequence[Batch | None], grads: Sequence[Float32], rate_scale: float = 1.0
    ) -> list[Float32]:  # fmt: skip
        """A step of all: lookups, and pushes of those with samples; the answers."""
        answers = self.lookups(number, batches)
        pushing = [t for t, batch in enumerate(batches) if batch is not None]
        assert len(set(found([self.push(t, number, grads[t], rate_scale) for t in pushing]))) == 1  # all are told the same
        nobody_waits()
        return answers

    def check_idle(self) -> None:
        """Nothing is left of any step: the shard, which takes one batch at a time, takes another."""
        assert self.together._rounds == {}
        ask(self.shard, SLOTS, 999_999, one_sign(1))
        self.shard.forget(999_999)


@contextmanager
def stepping(trainers: int, **rest: Any) -> Iterator[World]:
    """A world; whatever happens, nobody waits after it."""
    new_round = together_module._Round
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watched, "begun", threading.Semaphore(0), raising=False)
        patch.setattr(together_module, "_Round", lambda: new_round(looked_up=Watched(), pushed=Watched()))
        world = World(trainers, **rest)
        try:
            yield world
        finally:
            world.together.close()
            world.threads.shutdown()
            world.shard.close()


def found(called: Sequence[Future[Any]]) -> list[Any]:
    """What calls gave; raises what the first of them has raised."""
    return [done.result(PATIENCE_S) for done in called]


def refused(called: Sequence[Future[Any]], kind: type[Exception], match: str) -> None:
    """Assert that each of the calls was refused so."""
    for done in called:
        with pytest.raises(kind, match=match):
            done.result(PATIENCE_S)


def wait_for(number: int) -> None:
    """Until so many more trainers wait."""
    for _ in range(number):
        assert Watched.begun.acquire(timeout=PATIENCE_S)


def nobody_waits() -> None:
    """All calls so far have ended: those that waited are not waited for again."""
    while Watched.begun.acquire(blocking=False):
        pass


def one_sign(sign: int) -> Batch:
    """One sample with one sign in every slot."""
    return drawn.batch([[[sign + 1000 * s]] for s in range(len(SLOTS))])


def lines(size: int, value: float = 1.0) -> Float32:
    """A gradient."""
    return np.full((size, WIDTH), value, np.float32)


def draw_batch(random: np.random.Generator, size: int, values: int = 15) -> Batch | None:
    """Weighted or not; None for no samples."""
    if not size:
        return None
    bags = drawn.random_bags(random, len(SLOTS), size, values)
    return drawn.weighted(bags, random) if random.integers(2) else drawn.batch(bags)


class Alone:
    """One trainer with all samples, and a shard of its own: the twin."""

    def __init__(self) -> None:
        self.shard = Shard(SLOTS, [2000] * len(SLOTS), 7, max_in_flight=1)

    def step(self, number: int, batches: Sequence[Batch | None], grads: Sequence[Float32], rate_scale: float = 1.0) -> Float32:
        """The answer of all samples, trainer after trainer."""
        out = ask(self.shard, SLOTS, number, Batch.concat([batch for batch in batches if batch is not None]))
        self.shard.push(number, np.concatenate(grads), rate_scale)
        return out

    def close(self) -> None:
        """End the shard's threads."""
        self.shard.close()


def same_bits(ours: Shard, theirs: Shard) -> None:
    """Assert that two shards hold the same rows, bit by bit."""
    first, second = (
        [(name, sign, row.tobytes()) for name, rows in rows_of(shard).items() for sign, row in sorted(rows.items())]
        for shard in (ours, theirs)
    )
    assert first == second


# --- the same as one trainer with all samples -------------------------------------------------------------------------


@drawn.bounded(max_examples=25)
@given(random=drawn.generators)
def test_as_one_trainer_with_all_samples(random: np.random.Generator) -> None:
    """Bit by bit, answers and rows, over some steps with batches of any size, none among them, and a schedule of rates."""
    trainers = int(random.integers(1, 6))
    with closing(Alone()) as alone, stepping(trainers) as world:
        for number in range(4):
            sizes = random.integers(0, 5, trainers)
            sizes[0] += not sizes.any()  # the end of all: of which below
            batches = [draw_batch(random, int(size)) for size in sizes]
            grads = [random.uniform(-1, 1, (size, WIDTH)).astype(np.float32) for size in sizes]
            scale = float(random.uniform(0, 1))
            answers = world.step(number, batches, grads, scale)
            assert [answer.shape for answer in answers] == [(size, WIDTH) for size in sizes]
            assert np.concatenate(answers).tobytes() == alone.step(number, batches, grads, scale).tobytes()
        same_bits(world.shard, alone.shard)
        world.check_idle()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_whoever_comes_first(order: tuple[int, ...]) -> None:
    """The batch is put together by the trainers' numbers, not by their arrival, so that a run can be repeated."""
    random = np.random.default_rng(0)
    batches = [draw_batch(random, size) for size in (3, 1, 2)]
    grads = [random.uniform(-1, 1, (size, WIDTH)).astype(np.float32) for size in (3, 1, 2)]
    with closing(Alone()) as alone, stepping(3) as world:
        for call in ("lookup", "push"):
            called: dict[int, Future[Any]] = {}
            for t in order:
                called[t] = world.lookup(t, 0, batches[t]) if call == "lookup" else world.push(t, 0, grads[t])
                wait_for(t != order[-1])
            answers = found([called[t] for t in range(3)])
            if call == "lookup":
                assert np.concatenate(answers).tobytes() == alone.step(0, batches, grads).tobytes()
        same_bits(world.shard, alone.shard)


def test_nobody_leaves_before_all_have_come() -> None:
    """Neither a lookup nor a push: no row is created or stepped before."""
    with stepping(2) as world:
        early = world.lookup(1, 0, one_sign(1))
        wait_for(1)
        assert not early.done()
        assert world.shard.num_rows == 0
        found([world.lookup(0, 0, one_sign(2)), early])
        before = rows_of(world.shard)
        early_push = world.push(0, 0, lines(1))
        wait_for(1)
        assert not early_push.done()
        np.testing.assert_equal(rows_of(world.shard), before)
        assert found([world.push(1, 0, lines(1)), early_push]) == [2 * len(SLOTS)] * 2


def test_trainers_that_ran_out() -> None:
    """They bring no samples and push nothing; the others' rows are as without them, to the last step."""
    random = np.random.default_rng(1)
    with closing(Alone()) as alone, stepping(3) as world:
        for number, sizes in enumerate([(2, 3, 1), (2, 0, 1), (2, 0, 0), (1, 0, 0)]):
            batches = [draw_batch(random, size) for size in sizes]
            grads = [random.uniform(-1, 1, (size, WIDTH)).astype(np.float32) for size in sizes]
            answers = world.step(number, batches, grads)
            assert [answer.shape for answer in answers] == [(size, WIDTH) for size in sizes]
            assert np.concatenate(answers).tobytes() == alone.step(number, batches, grads).tobytes()
        same_bits(world.shard, alone.shard)
        world.check_idle()


def test_when_all_have_run_out() -> None:
    """The shard hears nothing of it, and nothing waits for a push; a later epoch may go on."""
    with stepping(3) as world:
        assert [answer.shape for answer in world.lookups(0, [None] * 3)] == [(0, WIDTH)] * 3
        assert world.endpoint.sizes == []
        world.check_idle()
        world.step(1, [one_sign(1), None, one_sign(1)], [lines(1), lines(0), lines(1)])
        world.check_idle()


def test_no_samples_twice_in_a_step() -> None:
    """All calls are answered once all others have come; the trainer still counts once, and the shard is asked once."""
    with stepping(3) as world:
        twice = [world.lookup(2, 0, None) for _ in range(2)]
        wait_for(2)
        assert not any(done.done() for done in twice)
        other = world.lookup(1, 0, one_sign(1))
        wait_for(1)
        found([world.lookup(0, 0, one_sign(2)), other])
        once_more = world.lookup(2, 0, None)
        assert [answer.shape for answer in found([*twice, once_more])] == [(0, WIDTH)] * 3
        assert world.endpoint.sizes == [2]
        found([world.push(t, 0, lines(1)) for t in (0, 1)])
        world.check_idle()


def test_where_the_answer_goes() -> None:
    """Into each trainer's own array, if it gives one."""
    with stepping(2) as world:
        outs = [np.full((1, WIDTH), np.nan, np.float32) for _ in range(2)]
        lookup = world.together.lookup
        called = [world.threads.submit(lookup, batch_id(t, 0), parcel_of(one_sign(t)), True, outs[t]) for t in range(2)]
        for t, answer in enumerate(found(called)):
            assert answer is outs[t]
            np.testing.assert_array_equal(answer, ask(world.shard, SLOTS, 5, one_sign(t), training=False))


def test_gradients_whose_columns_lie_apart() -> None:
    """As clients of several shards give them."""
    random = np.random.default_rng(0)
    wide = [random.uniform(-1, 1, (2, WIDTH + 4)).astype(np.float32) for _ in range(2)]
    apart = [Lines(of, Columns([(0, 0, 2), (2, 6, WIDTH - 2)]), WIDTH) for of in wide]
    batches = [draw_batch(random, 2) for _ in range(2)]
    with closing(Alone()) as alone, stepping(2) as world:
        world.lookups(0, batches)
        found([world.threads.submit(world.together.push, batch_id(t, 0), apart[t], 1.0) for t in range(2)])
        alone.step(0, batches, [np.delete(of, np.s_[2:6], axis=1) for of in wide])
        same_bits(world.shard, alone.shard)


def test_halves_of_a_lookup_are_refused() -> None:
    """With one batch in flight there is nothing to be ahead of."""
    with closing(Together(LocalEndpoint(Shard(SLOTS, [10] * len(SLOTS), 7, 1), WIDTHS), WIDTH, 2)) as together:
        for half in (lambda: together.find(0, Parcel(0, [], [])), lambda: together.pool(0, 0)):
            with pytest.raises(DataError, match="batch 0: trainers that step together look a batch up at once"):
                half()


def test_an_evaluation_waits_for_nobody() -> None:
    """Even while others wait, and whatever its number is."""
    with stepping(2) as world:
        world.step(0, [one_sign(1), one_sign(1)], [lines(1, 0), lines(1, 0)])
        waiting = world.lookup(0, 1, one_sign(1))
        wait_for(1)
        expected = ask(world.shard, SLOTS, 5, one_sign(1), training=False)
        for number in (1, 7, batch_id(1, 1)):
            np.testing.assert_array_equal(world.together.lookup(number, parcel_of(one_sign(1)), False), expected)
            out = np.full((1, WIDTH), np.nan, np.float32)
            world.together.lookup(number, parcel_of(one_sign(1)), False, out)
            np.testing.assert_array_equal(out, expected)
        assert not waiting.done()
        found([world.lookup(1, 1, one_sign(1)), waiting])


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_failed_lookup_reaches_everyone() -> None:
    """With what the shard says; nothing of it is in flight there, and the next step may come."""
    with stepping(3, capacity_rows=2) as world:
        called = [world.lookup(t, 0, drawn.batch([[[t, t + 10, t + 20]]] * len(SLOTS))) for t in range(3)]
        refused(called, CapacityError, "need more rows than the table")
        world.step(1, [one_sign(1), None, None], [lines(1), lines(0), lines(0)])


@pytest.mark.parametrize("error", [CapacityError("full"), ZeroDivisionError("a bug"), SystemExit(3)], ids=repr)
def test_a_failed_push_reaches_everyone(error: BaseException) -> None:
    """Whole, also what is no FlowpsError; nobody is left waiting."""
    with stepping(3, error=error) as world:
        world.lookups(0, [one_sign(t) for t in range(3)])
        assert [done.exception(PATIENCE_S) for done in [world.push(t, 0, lines(1)) for t in range(3)]] == [error] * 3


def test_different_rate_scales_are_refused() -> None:
    """With the step and the scales; no row has changed."""
    with stepping(3) as world:
        world.lookups(4, [one_sign(t) for t in range(3)])
        before = rows_of(world.shard)
        called = [world.push(t, 4, lines(1), scale) for t, scale in enumerate((0.5, 0.25, 0.5))]
        refused(called, DataError, r"step 4: the trainers scale the learning rates by \[0\.25, 0\.5\], not by one factor")
        np.testing.assert_equal(rows_of(world.shard), before)


def test_a_trainer_that_looks_up_twice() -> None:
    """Is told so; the other trainers and its own first lookup are not disturbed."""
    with stepping(2) as world:
        first = world.lookup(1, 3, one_sign(1))
        wait_for(1)
        for again in (one_sign(2), None):
            said = rf"batch {batch_id(1, 3)}: trainer 1 has looked up its batch of step 3 before"
            refused([world.lookup(1, 3, again)], DataError, said)
        found([world.lookup(0, 3, one_sign(3))])
        np.testing.assert_array_equal(*found([first]), ask(world.shard, SLOTS, 9, one_sign(1), training=False))


def test_a_push_without_a_lookup() -> None:
    """Is refused at once, with the trainer and the step: before anyone's lookup, before its own, and after the step."""
    with stepping(2) as world:
        said = "batch {}: a push came, but trainer {} has looked up nothing in step {}"
        refused([world.push(1, 0, lines(1))], UnknownBatchError, said.format(batch_id(1, 0), 1, 0))
        waiting = world.lookup(0, 0, one_sign(1))
        wait_for(1)
        refused([world.push(1, 0, lines(1))], UnknownBatchError, said.format(batch_id(1, 0), 1, 0))
        found([world.lookup(1, 0, one_sign(1)), waiting])
        found([world.push(t, 0, lines(1)) for t in range(2)])
        refused([world.push(0, 0, lines(1))], UnknownBatchError, said.format(0, 0, 0))


def test_a_push_of_a_trainer_without_samples() -> None:
    """Is refused; the push of the one that has some is not disturbed."""
    with stepping(2) as world:
        world.lookups(0, [one_sign(1), None])
        refused([world.push(1, 0, lines(0))], UnknownBatchError, "trainer 1 has looked up nothing")
        assert found([world.push(0, 0, lines(1))]) == [len(SLOTS)]


def test_gradients_that_are_too_long_together() -> None:
    """Are refused as the shard refuses them; no row has changed."""
    with stepping(2) as world:
        world.lookups(0, [one_sign(t) for t in range(2)])
        before = rows_of(world.shard)
        called = [world.push(t, 0, lines(2)) for t in range(2)]
        refused(called, DataError, rf"a push has a gradient of \[2, {WIDTH}\], expected \[1, {WIDTH}\]")
        np.testing.assert_equal(rows_of(world.shard), before)


@pytest.mark.parametrize("shapes", [[(2, WIDTH), (2, WIDTH + 1)], [(1, WIDTH), (3, WIDTH)]], ids=["wider", "another's lines"])
def test_a_gradient_that_is_not_of_its_own_batch(shapes: list[tuple[int, int]]) -> None:
    """Is refused, also where all together have as many lines as the step: a line would go to another trainer's sample."""
    with stepping(2) as world:
        world.lookups(0, [drawn.batch([[[1], [2]]] * len(SLOTS))] * 2)
        called = [world.push(t, 0, np.ones(shape, np.float32)) for t, shape in enumerate(shapes)]
        assert any(isinstance(done.exception(PATIENCE_S), DataError) for done in called)


# --- the end ----------------------------------------------------------------------------------------------------------


def test_close_frees_those_who_wait_for_a_lookup() -> None:
    """And nobody waits after it. Idempotent."""
    with stepping(3) as world:
        waiting = [world.lookup(t, 0, one_sign(t)) for t in range(2)]
        wait_for(2)
        world.together.close()
        world.together.close()
        refused([*waiting, world.lookup(2, 0, one_sign(2)), world.lookup(0, 1, None)], StoppedError, "the run ends")
        assert world.shard.num_rows == 0
        world.check_idle()


def test_close_frees_those_who_wait_for_a_push() -> None:
    """No row is stepped by half of the trainers, and the shard gives the batch up."""
    with stepping(2) as world:
        world.lookups(0, [one_sign(t) for t in range(2)])
        before = rows_of(world.shard)
        waiting = world.push(0, 0, lines(1))
        wait_for(1)
        world.together.close()
        refused([waiting], StoppedError, "the run ends")
        np.testing.assert_equal(rows_of(world.shard), before)
        world.check_idle()


def test_evaluations_go_on_after_the_end() -> None:
    """What was learned can be looked at."""
    with stepping(2) as world:
        world.step(0, [one_sign(1), one_sign(2)], [lines(1), lines(1)])
        world.together.close()
        assert world.together.lookup(0, parcel_of(one_sign(1)), False).any()


@pytest.mark.parametrize("by", [0, 1])
def test_forget_ends_the_steps_from_one_on(by: int) -> None:
    """Whoever declares it: a step before it is done by all of its trainers, those who wait for a later one are freed."""
    with stepping(2) as world:
        world.lookups(0, [one_sign(t) for t in range(2)])
        waiting_push = world.push(0, 0, lines(1))
        waiting_lookup = world.lookup(0, 1, one_sign(1))
        wait_for(2)
        world.together.forget(batch_id(by, 1))
        refused([waiting_lookup, *(world.lookup(1, number, one_sign(1)) for number in (1, 2))], StoppedError, "the run ends")
        assert not waiting_push.done()
        assert found([world.push(1, 0, lines(1)), waiting_push]) == [2 * len(SLOTS)] * 2
        world.check_idle()


def test_forget_frees_those_who_wait_for_a_push() -> None:
    """Of the step itself: the shard gives the batch up too, and no row is stepped."""
    with stepping(3) as world:
        world.lookups(0, [one_sign(t) for t in range(3)])
        before = rows_of(world.shard)
        waiting = [world.push(t, 0, lines(1)) for t in range(2)]
        wait_for(2)
        world.together.forget(batch_id(2, 0))
        refused(waiting, StoppedError, "the run ends")
        np.testing.assert_equal(rows_of(world.shard), before)
        world.check_idle()


def test_an_earlier_end_holds() -> None:
    """The end comes with the earliest step that anyone has given up."""
    with stepping(2) as world:
        for number in (5, 3, 3, 4):
            world.together.forget(batch_id(0, number))
        world.step(2, [one_sign(1)] * 2, [lines(1)] * 2)
        refused([world.lookup(0, 3, one_sign(1)), world.lookup(0, 4, None)], StoppedError, "the run ends")


@pytest.mark.parametrize("end", ["close", "forget"])
def test_a_push_after_the_end(end: str) -> None:
    """The trainer is told of the end, not of a batch that it knows it has looked up: that would look like what ended the run."""
    with stepping(2) as world:
        world.lookups(0, [one_sign(t) for t in range(2)])
        world.together.close() if end == "close" else world.together.forget(batch_id(1, 0))
        refused([world.push(0, 0, lines(1))], StoppedError, "the run ends")


# --- many threads -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hurried_switching")
@pytest.mark.parametrize("trainers", [2, 4])
def test_many_steps_of_threads_that_wait_for_each_other_only(trainers: int) -> None:
    """Each trainer steps on by itself, with batches of its own and some of no samples, while others evaluate: bit by bit as one."""
    random, steps = np.random.default_rng(trainers), 30
    sizes = random.integers(0, 4, (steps, trainers))
    sizes[:, 0] += sizes.sum(axis=1) == 0
    batches = [[draw_batch(random, int(size)) for size in of] for of in sizes]
    grads = [[random.uniform(-1, 1, (size, WIDTH)).astype(np.float32) for size in of] for of in sizes]
    with closing(Alone()) as alone, stepping(trainers) as world:

        def train(t: int) -> list[Float32]:
            answers = []
            for number in range(steps):
                batch = batches[number][t]
                parcel = empty_parcel() if batch is None else parcel_of(batch)
                answers.append(world.together.lookup(batch_id(t, number), parcel, True))
                if batch is not None:
                    world.together.push(batch_id(t, number), Lines(grads[number][t]), 1.0)
            return answers

        def evaluate() -> None:
            for number in range(steps):
                for batch in batches[number]:
                    if batch is not None:
                        assert np.isfinite(world.together.lookup(number, parcel_of(batch), False)).all()

        called = [world.threads.submit(train, t) for t in range(trainers)]
        *answers, _ = found([*called, world.threads.submit(evaluate)])
        for number in range(steps):
            expected = alone.step(number, batches[number], grads[number])
            assert np.concatenate([answers[t][number] for t in range(trainers)]).tobytes() == expected.tobytes()
        same_bits(world.shard, alone.shard)
        world.check_idle()


@pytest.mark.usefixtures("hurried_switching")
@pytest.mark.parametrize("seed", range(12))
def test_an_end_in_the_middle_of_everything(seed: int) -> None:
    """A trainer gives up a step that others may have begun: all do every step before it, and none waits for one after it."""
    last = 3 + seed % 4
    with stepping(3) as world:

        def train(t: int) -> int:
            for number in range(100):
                if (t, number) == (seed % 3, last):
                    world.together.forget(batch_id(t, number))
                try:
                    world.together.lookup(batch_id(t, number), parcel_of(one_sign(number)), True)
                except StoppedError:
                    return number
                world.together.push(batch_id(t, number), Lines(lines(1)), 1.0)
            return 100

        assert found([world.threads.submit(train, t) for t in range(3)]) == [last] * 3
        assert {of.pushes for of in world.shard.stats()} == {last}
        world.check_idle()


@pytest.mark.usefixtures("hurried_switching")
@pytest.mark.parametrize("seed", range(12))
def test_closed_in_the_middle_of_everything(seed: int) -> None:
    """From outside, at any moment: every trainer's call returns or is refused, none waits, and all agree on the last step."""
    with stepping(3) as world:
        begun = threading.Semaphore(0)

        def train(t: int) -> int:
            for number in range(1000):
                try:
                    world.together.lookup(batch_id(t, number), parcel_of(one_sign(1)), True)
                    world.together.push(batch_id(t, number), Lines(lines(1)), 1.0)
                except (StoppedError, UnknownBatchError):  # the latter: see test_a_push_after_the_end
                    return number
                begun.release()
            return 1000

        called = [world.threads.submit(train, t) for t in range(3)]
        for _ in range(seed):
            assert begun.acquire(timeout=PATIENCE_S)
        world.together.close()
        (done,) = set(found(called))
        assert done < 1000
        # The shard may have been on the last step, which the trainers then do not hear of.
        assert {of.pushes for of in world.shard.stats()} in ({done}, {done + 1})


# --- trainers with a client each --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 3])
def test_clients_of_several_shards(num_shards: int) -> None:
    """Trainers with a client each, slots in parts, one that runs out: bit by bit the rows of one client with all samples."""
    random, trainers, steps = np.random.default_rng(num_shards), 3, 5
    placement = drawn.any_placement(random, SLOTS, num_shards)
    own = [drawn.piece_slots(pieces, SLOTS) for pieces in placement.shards]
    ours, theirs = ([Shard(slots, [2000] * len(slots), 7, 1) for slots in own] for _ in range(2))
    shared = []
    for shard, slots in zip(ours, own, strict=True):
        widths = [slot.width for slot in slots]
        shared.append(Together(LocalEndpoint(shard, widths), sum(widths), trainers))
    sizes = [[t + 1 if t < 2 or number < 3 else 0 for t in range(trainers)] for number in range(steps)]
    batches = [[draw_batch(random, size) for size in of] for of in sizes]
    grads = [[random.uniform(-1, 1, (size, WIDTH)).astype(np.float32) for size in of] for of in sizes]
    clients = [PsClient(shared, placement, SLOTS) for _ in range(trainers)]

    def train(t: int) -> list[Float32]:
        answers = []
        for number in range(steps):
            batch = batches[number][t]
            if batch is None:
                clients[t].attend(batch_id(t, number))
                answers.append(lines(0))
            else:
                answers.append(clients[t].lookup(batch_id(t, number), batch, training=True))
                clients[t].push(batch_id(t, number), grads[number][t])
        return answers

    with ThreadPoolExecutor(trainers) as threads, closing(PsClient(theirs, placement, SLOTS)) as alone:
        answers = found([threads.submit(train, t) for t in range(trainers)])
        for number in range(steps):
            expected = alone.lookup(number, Batch.concat([of for of in batches[number] if of is not None]), training=True)
            alone.push(number, np.concatenate(grads[number]))
            assert np.concatenate([of[number] for of in answers]).tobytes() == expected.tobytes()
    for shard, twin in zip(ours, theirs, strict=True):
        same_bits(shard, twin)
    for opened in (*clients, *ours, *theirs):
        opened.close()

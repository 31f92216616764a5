"""`Together`: trainers that step together do with the rows what one trainer with all their samples does; nobody waits in vain.

Trainers are threads here. That one of them waits is known by `Watched`, not by time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.batch import Batch, Float32
from flowps.config import Slot
from flowps.errors import CapacityError, DataError, FlowpsError, StoppedError
from flowps.ps import together as together_module
from flowps.ps.client import PsClient
from flowps.ps.endpoint import Endpoint, LocalEndpoint, batch_id
from flowps.ps.parcel import Columns, Lines, Parcel
from flowps.ps.placement import Placement
from flowps.ps.shard import Shard
from flowps.ps.together import Together
from tests.ps import drawn
from tests.ps.contract import SLOTS, WIDTH, EndpointContract, ask, empty_parcel, ones, parcel_of, rows_of

PATIENCE_S = 60  # for threads that should never take long
WIDTHS = [slot.width for slot in SLOTS]


class TestTogetherOfOne(EndpointContract):
    """A trainer that steps together with nobody has a shard like any other."""

    @contextmanager
    def reach(self, shard: Shard, slots: Sequence[Slot]) -> Iterator[Endpoint]:
        """See EndpointContract."""
        widths = [slot.width for slot in slots]
        together = Together(LocalEndpoint(shard, widths), sum(widths), 1)
        yield together
        together.close()


class Watched(Future[Any]):
    """Says when somebody begins to wait for it, and lets nobody wait for ever."""

    begun: threading.Semaphore  # of the test that runs

    def result(self, timeout: float | None = None) -> Any:
        """As Future.result."""
        if not self.done():
            self.begun.release()
        return super().result(timeout or PATIENCE_S)


class World:
    """A shard, `trainers` threads that step together, and who waits."""

    def __init__(self, trainers: int, capacity_rows: int = 2000, wrap: Callable[[Endpoint], Endpoint] = lambda of: of) -> None:
        self.trainers = trainers
        self.shard = Shard(SLOTS, [capacity_rows] * len(SLOTS), 7, max_in_flight=1)
        self.together = Together(wrap(LocalEndpoint(self.shard, WIDTHS)), WIDTH, trainers)
        self.threads = ThreadPoolExecutor(trainers + 2)

    def lookup(self, trainer: int, step: int, batch: Batch | None) -> Future[Float32]:
        """Of a batch, or of no samples."""
        parcel = empty_parcel() if batch is None else parcel_of(batch, in_pieces=trainer % 2 == 1)
        return self.threads.submit(self.together.lookup, batch_id(trainer, step), parcel, True)

    def push(self, trainer: int, step: int, grads: Float32, rate_scale: float = 1.0) -> Future[int]:
        """Of a gradient."""
        return self.threads.submit(self.together.push, batch_id(trainer, step), Lines(grads), rate_scale)

    def step(self, number: int, batches: Sequence[Batch | None], grads: Sequence[Float32], rate_scale: float = 1.0) -> list[Float32]:
        """A step of all: lookups and pushes; the answers."""
        answers = [found(done) for done in [self.lookup(t, number, batch) for t, batch in enumerate(batches)]]
        stepped = {found(done) for done in [self.push(t, number, of, rate_scale) for t, of in enumerate(grads)]}
        assert len(stepped) == 1  # all are told the same
        return answers

    def check_idle(self) -> None:
        """Nothing is left of any step: the shard, which takes one batch at a time, takes another."""
        assert self.together._rounds == {}
        ask(self.shard, SLOTS, 999_999, one_sign(1))
        self.shard.forget(999_999)


@contextmanager
def stepping(trainers: int, **rest: Any) -> Iterator[World]:
    """A world; whatever happens, nobody waits after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watched, "begun", threading.Semaphore(0), raising=False)
        new_round = together_module._Round
        patch.setattr(together_module, "_Round", lambda: new_round(looked_up=Watched(), pushed=Watched()))
        world = World(trainers, **rest)
        try:
            yield world
        finally:
            world.together.close()
            world.threads.shutdown()
            world.shard.close()


def found(done: Future[Any]) -> Any:
    """What a trainer's call gave or raised."""
    return done.result(PATIENCE_S)


def wait_for(number: int) -> None:
    """Until so many more trainers wait."""
    for _ in range(number):
        assert Watched.begun.acquire(timeout=PATIENCE_S)


def one_sign(sign: int) -> Batch:
    """One sample with one sign in every slot."""
    return drawn.batch([[[sign + 1000 * s]] for s in range(len(SLOTS))])


def lines(size: int, value: float = 1.0) -> Float32:
    """A gradient."""
    return np.full((size, WIDTH), value, np.float32)


def no_lines() -> Float32:
    """Of no samples."""
    return np.empty((0, WIDTH), np.float32)


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
        pieces = [batch for batch in batches if batch is not None]
        if not pieces:
            return no_lines()
        out = ask(self.shard, SLOTS, number, Batch.concat(pieces))
        self.shard.push(number, np.concatenate(grads), rate_scale)
        return out


def same_bits(ours: Shard, theirs: Shard) -> None:
    """Assert that two shards hold the same rows, bit by bit."""
    first, second = (
        {name: {sign: row.tobytes() for sign, row in rows.items()} for name, rows in rows_of(shard).items()} for shard in (ours, theirs)
    )
    assert first == second


# --- the same as one trainer with all samples -------------------------------------------------------------------------


@drawn.bounded(max_examples=25)
@given(random=drawn.generators, trainers=st.integers(1, 5))
def test_as_one_trainer_with_all_samples(random: np.random.Generator, trainers: int) -> None:
    """Bit by bit, answers and rows, over some steps with batches of any size, none among them, and a schedule of rates."""
    alone = Alone()
    with stepping(trainers) as world:
        for number in range(4):
            sizes = random.integers(0, 5, trainers)
            if not sizes.any():  # the end of all: of which below
                sizes[0] = 1
            batches = [draw_batch(random, int(size)) for size in sizes]
            grads = [random.uniform(-1, 1, (size, WIDTH)).astype(np.float32) for size in sizes]
            scale = float(random.uniform(0, 1))
            answers = world.step(number, batches, grads, scale)
            assert [answer.shape for answer in answers] == [(size, WIDTH) for size in sizes]
            expected = alone.step(number, batches, grads, scale)
            assert np.concatenate(answers).tobytes() == expected.tobytes()
        same_bits(world.shard, alone.shard)
        world.check_idle()
    alone.shard.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_whoever_comes_first(order: tuple[int, ...]) -> None:
    """The batch is put together by the trainers' numbers, not by their arrival, so that a run can be repeated."""
    random, alone = np.random.default_rng(0), Alone()
    batches = [draw_batch(random, size) for size in (3, 1, 2)]
    grads = [random.uniform(-1, 1, (size, WIDTH)).astype(np.float32) for size in (3, 1, 2)]
    expected = alone.step(0, batches, grads)
    with stepping(3) as world:
        called: list[Future[Any]] = []
        for trainer in order:
            called.append(world.lookup(trainer, 0, batches[trainer]))
            wait_for(trainer != order[-1])
        answers = dict(zip(order, [found(done) for done in called], strict=True))
        assert np.concatenate([answers[t] for t in range(3)]).tobytes() == expected.tobytes()
        called = []
        for trainer in order:
            called.append(world.push(trainer, 0, grads[trainer]))
            wait_for(trainer != order[-1])
        assert len({found(done) for done in called}) == 1
        same_bits(world.shard, alone.shard)
    alone.shard.close()


def test_nobody_leaves_before_all_have_come() -> None:
    """Neither a lookup nor a push: no row is created or stepped before."""
    with stepping(2) as world:
        early = world.lookup(1, 0, one_sign(1))
        wait_for(1)
        assert not early.done()
        assert world.shard.num_rows == 0
        found(world.lookup(0, 0, one_sign(2)))
        found(early)
        before = rows_of(world.shard)
        early_push = world.push(0, 0, lines(1))
        wait_for(1)
        assert not early_push.done()
        np.testing.assert_equal(rows_of(world.shard), before)
        assert found(world.push(1, 0, lines(1))) == found(early_push) == 2 * len(SLOTS)


def test_trainers_that_ran_out() -> None:
    """They bring no samples and a gradient of no lines; the others' rows are as without them, to the last step."""
    random, alone = np.random.default_rng(1), Alone()
    with stepping(3) as world:
        for number, sizes in enumerate([(2, 3, 1), (2, 0, 1), (2, 0, 0), (1, 0, 0)]):
            batches = [draw_batch(random, size) for size in sizes]
            grads = [random.uniform(-1, 1, (size, WIDTH)).astype(np.float32) for size in sizes]
            answers = world.step(number, batches, grads)
            assert [answer.shape for answer in answers] == [(size, WIDTH) for size in sizes]
            assert np.concatenate(answers).tobytes() == alone.step(number, batches, grads).tobytes()
        same_bits(world.shard, alone.shard)
        world.check_idle()
    alone.shard.close()


def test_when_all_have_run_out() -> None:
    """The shard hears nothing of it, and nothing waits for a push; a later epoch may go on."""
    with stepping(3) as world:
        assert all(of.lookups == 0 for of in world.shard.stats())
        answers = [found(done) for done in [world.lookup(t, 0, None) for t in range(3)]]
        assert [answer.shape for answer in answers] == [(0, WIDTH)] * 3
        assert all(of.lookups == 0 for of in world.shard.stats())
        world.check_idle()
        world.step(1, [one_sign(1), None, one_sign(1)], [lines(1), no_lines(), lines(1)])
        world.check_idle()


@pytest.mark.xfail(raises=ValueError, strict=True, reason="Together._push concatenates no gradients at all")
def test_pushes_of_nothing_at_all() -> None:
    """A trainer cannot know that the others have run out too: their pushes of no lines step no rows."""
    with stepping(2) as world:
        for done in [world.lookup(t, 0, None) for t in range(2)]:
            found(done)
        assert [found(done) for done in [world.push(t, 0, no_lines()) for t in range(2)]] == [0, 0]


def test_where_the_answer_goes() -> None:
    """Into each trainer's own array, if it gives one."""
    with stepping(2) as world:
        outs = [np.full((1, WIDTH), np.nan, np.float32) for _ in range(2)]
        called = [
            world.threads.submit(world.together.lookup, batch_id(t, 0), parcel_of(one_sign(t)), True, outs[t]) for t in range(2)
        ]  # fmt: skip
        for t, done in enumerate(called):
            assert found(done) is outs[t]
            np.testing.assert_array_equal(outs[t], ask(world.shard, SLOTS, 5, one_sign(t), training=False))


def test_gradients_whose_columns_lie_apart() -> None:
    """As a client with several shards gives them."""
    with stepping(2) as world:
        world.step(0, [one_sign(1), one_sign(2)], [lines(1, 0), lines(1, 0)])
        expected = rows_of(world.shard)["b"]
        for done in [world.lookup(t, 1, one_sign(t + 1)) for t in range(2)]:
            found(done)
        start = WIDTHS[0]  # of slot b
        wide = np.zeros((1, WIDTH + 4), np.float32)
        wide[0, start + 4 : start + 4 + 16] = 1
        apart = Lines(wide, Columns([(0, 0, 2), (2, 6, WIDTH - 2)]), WIDTH)
        for done in [world.threads.submit(world.together.push, batch_id(t, 1), apart, 1.0) for t in range(2)]:
            found(done)
        for sign, row in rows_of(world.shard)["b"].items():
            assert (row[:16] < expected[sign][:16]).all()


def test_an_evaluation_waits_for_nobody() -> None:
    """Even while others wait, and whatever its number is."""
    with stepping(2) as world:
        world.step(0, [one_sign(1), one_sign(1)], [lines(1, 0), lines(1, 0)])
        waiting = world.lookup(0, 1, one_sign(1))
        wait_for(1)
        for number in (1, 7, batch_id(1, 1)):
            answer = world.together.lookup(number, parcel_of(one_sign(1)), False)
            np.testing.assert_array_equal(answer, ask(world.shard, SLOTS, 5, one_sign(1), training=False))
        assert not waiting.done()
        found(world.lookup(1, 1, one_sign(1)))
        found(waiting)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_failed_lookup_reaches_everyone() -> None:
    """With what the shard says; the next step goes on."""
    with stepping(3, capacity_rows=2) as world:
        called = [world.lookup(t, 0, drawn.batch([[[t, t + 10, t + 20]]] * len(SLOTS))) for t in range(3)]
        for done in called:
            with pytest.raises(CapacityError, match="need more rows than the table"):
                found(done)
        world.step(1, [one_sign(1), None, None], [lines(1), no_lines(), no_lines()])


@pytest.mark.xfail(raises=DataError, strict=True, reason="Together.lookup keeps the round of a lookup that failed")
def test_a_failed_lookup_may_be_made_again() -> None:
    """As at the shard: a lookup that raises has not been. Nor is anything kept of it."""
    with stepping(2, capacity_rows=2) as world:
        for done in [world.lookup(t, 0, drawn.batch([[[t, t + 10, t + 20]]] * len(SLOTS))) for t in range(2)]:
            with pytest.raises(CapacityError):
                found(done)
        world.step(0, [one_sign(1), one_sign(1)], [lines(1), lines(1)])
        world.check_idle()


class Failing(Endpoint):
    """An endpoint whose pushes raise `error`."""

    def __init__(self, endpoint: Endpoint, error: BaseException) -> None:
        self._endpoint, self._error = endpoint, error

    def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Float32 | None = None) -> Float32:
        """As the endpoint."""
        return self._endpoint.lookup(batch_id, parcel, training, out)

    def push(self, batch_id: int, gradient: Lines, rate_scale: float) -> int:
        """Fail."""
        raise self._error

    def forget(self, batch_id: int) -> None:
        """As the endpoint."""
        self._endpoint.forget(batch_id)


@pytest.mark.parametrize("error", [CapacityError("full"), ZeroDivisionError("a bug"), SystemExit(3)])
def test_a_failed_push_reaches_everyone(error: BaseException) -> None:
    """Whole, also what is no FlowpsError; nobody is left waiting."""
    with stepping(3, wrap=lambda endpoint: Failing(endpoint, error)) as world:
        for done in [world.lookup(t, 0, one_sign(t)) for t in range(3)]:
            found(done)
        for done in [world.push(t, 0, lines(1)) for t in range(3)]:
            assert done.exception(PATIENCE_S) is error


def test_different_rate_scales_are_refused() -> None:
    """With the step and the scales; no row has changed, and the step is still in flight."""
    with stepping(3) as world:
        for done in [world.lookup(t, 4, one_sign(t)) for t in range(3)]:
            found(done)
        before = rows_of(world.shard)
        for done in [world.push(t, 4, lines(1), scale) for t, scale in enumerate((0.5, 0.25, 0.5))]:
            with pytest.raises(DataError, match=r"step 4: the trainers scale the learning rates by \[0\.25, 0\.5\], not by one"):
                found(done)
        np.testing.assert_equal(rows_of(world.shard), before)
        assert {found(done) for done in [world.push(t, 4, lines(1), 0.5) for t in range(3)]} == {3 * len(SLOTS)}
        world.check_idle()


def test_a_trainer_that_looks_up_twice() -> None:
    """Is told so; the other trainers and its own first lookup are not disturbed."""
    with stepping(2) as world:
        first = world.lookup(1, 3, one_sign(1))
        wait_for(1)
        with pytest.raises(DataError, match=rf"batch {batch_id(1, 3)}: trainer 1 has looked up its batch of step 3 before"):
            found(world.lookup(1, 3, one_sign(2)))
        found(world.lookup(0, 3, one_sign(3)))
        np.testing.assert_array_equal(found(first), ask(world.shard, SLOTS, 9, one_sign(1), training=False))


def test_gradients_that_are_too_long_together() -> None:
    """Are refused as the shard refuses them; no row has changed, and the right ones may still come."""
    with stepping(2) as world:
        for done in [world.lookup(t, 0, one_sign(t)) for t in range(2)]:
            found(done)
        before = rows_of(world.shard)
        for done in [world.push(t, 0, lines(2)) for t in range(2)]:
            with pytest.raises(DataError, match=rf"batch 0: .*\(4, {WIDTH}\), expected float32 \(2, {WIDTH}\)"):
                found(done)
        np.testing.assert_equal(rows_of(world.shard), before)
        assert {found(done) for done in [world.push(t, 0, lines(1)) for t in range(2)]} == {2 * len(SLOTS)}


@pytest.mark.parametrize(
    "shapes", [pytest.param([(1, WIDTH), (1, WIDTH + 1)], id="wider"), pytest.param([(0, WIDTH), (2, WIDTH)], id="another's line")]
)
@pytest.mark.xfail(strict=True, reason="Together does not compare a gradient with its own trainer's parcel")
def test_a_gradient_that_is_not_of_its_own_batch(shapes: list[tuple[int, int]]) -> None:
    """Is refused, also where all together have as many lines as the step: a line would go to another trainer's sample."""
    with stepping(2) as world:
        for done in [world.lookup(t, 0, one_sign(t)) for t in range(2)]:
            found(done)
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
        for done in waiting:
            with pytest.raises(StoppedError, match="the run ends"):
                found(done)
        for late in (world.lookup(2, 0, one_sign(2)), world.lookup(0, 1, one_sign(2)), world.push(1, 7, lines(1))):
            with pytest.raises(StoppedError, match="the run ends"):
                found(late)
        assert world.shard.num_rows == 0


def test_close_frees_those_who_wait_for_a_push() -> None:
    """No row is stepped by half of the trainers."""
    with stepping(2) as world:
        for done in [world.lookup(t, 0, one_sign(t)) for t in range(2)]:
            found(done)
        before = rows_of(world.shard)
        waiting = world.push(0, 0, lines(1))
        wait_for(1)
        world.together.close()
        for done in (waiting, world.push(1, 0, lines(1))):
            with pytest.raises(StoppedError, match="the run ends"):
                found(done)
        np.testing.assert_equal(rows_of(world.shard), before)


@pytest.mark.parametrize("by", [0, 1])
def test_forget_frees_those_who_wait_for_a_lookup(by: int) -> None:
    """Whoever gives the step up; the next one goes on."""
    with stepping(3) as world:
        waiting = [world.lookup(t, 0, one_sign(t)) for t in range(2)]
        wait_for(2)
        world.together.forget(batch_id(by, 0))
        for done in waiting:
            with pytest.raises(StoppedError, match=f"batch {batch_id(by, 0)} was given up"):
                found(done)
        world.check_idle()
        world.step(1, [one_sign(1)] * 3, [lines(1)] * 3)
        world.check_idle()


@pytest.mark.parametrize("by", [0, 1])
def test_forget_frees_those_who_wait_for_a_push(by: int) -> None:
    """The shard gives the batch up too; no row is stepped, and the next step goes on."""
    with stepping(2) as world:
        for done in [world.lookup(t, 0, one_sign(t)) for t in range(2)]:
            found(done)
        before = rows_of(world.shard)
        waiting = world.push(0, 0, lines(1))
        wait_for(1)
        world.together.forget(batch_id(by, 0))
        with pytest.raises(StoppedError, match=f"batch {batch_id(by, 0)} was given up"):
            found(waiting)
        np.testing.assert_equal(rows_of(world.shard), before)
        world.check_idle()
        world.step(1, [one_sign(1)] * 2, [lines(1)] * 2)
        world.check_idle()


def test_forget_of_what_nobody_looked_up() -> None:
    """Nothing happens; and twice is as once."""
    with stepping(2) as world:
        for _ in range(2):
            world.together.forget(batch_id(1, 3))
        world.step(3, [one_sign(1)] * 2, [lines(1)] * 2)
        world.check_idle()


@pytest.mark.parametrize("call", ["lookup", "push"])
@pytest.mark.xfail(strict=True, reason="a call of a step that was given up begins the step anew and waits for ever")
def test_who_comes_to_a_step_that_was_given_up(call: str) -> None:
    """Is told so: it must not wait for those who will not come."""
    with stepping(2) as world:
        if call == "push":
            for done in [world.lookup(t, 0, one_sign(t)) for t in range(2)]:
                found(done)
        else:
            first = world.lookup(0, 0, one_sign(0))
            wait_for(1)
        world.together.forget(batch_id(0, 0))
        if call == "lookup":
            assert isinstance(first.exception(PATIENCE_S), StoppedError)
        late = world.push(1, 0, lines(1)) if call == "push" else world.lookup(1, 0, one_sign(1))
        late.add_done_callback(lambda _: Watched.begun.release())
        wait_for(1)  # until it waits, or has ended
        world.together.close()  # which frees it
        error = late.exception(PATIENCE_S)
        assert isinstance(error, FlowpsError)
        assert "the run ends" not in str(error)


class Slow(Endpoint):
    """An endpoint whose lookups wait for `go` before they reach the shard."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self.come, self.go = endpoint, threading.Event(), threading.Event()

    def lookup(self, batch_id: int, parcel: Parcel, training: bool, out: Float32 | None = None) -> Float32:
        """Late."""
        self.come.set()
        assert self.go.wait(PATIENCE_S)
        return self._endpoint.lookup(batch_id, parcel, training, out)

    def push(self, batch_id: int, gradient: Lines, rate_scale: float) -> int:
        """As the endpoint."""
        return self._endpoint.push(batch_id, gradient, rate_scale)

    def forget(self, batch_id: int) -> None:
        """As the endpoint."""
        self._endpoint.forget(batch_id)


@pytest.mark.xfail(raises=CapacityError, strict=True, reason="a lookup that ends after forget leaves its batch in flight at the shard")
def test_forget_before_the_shard_has_heard_of_the_step() -> None:
    """All have come, the lookup is on its way, and the step is given up: the shard must not keep a batch that nobody pushes."""
    made: list[Slow] = []

    def slow(endpoint: Endpoint) -> Endpoint:
        made.append(Slow(endpoint))
        return made[0]

    with stepping(2, wrap=slow) as world:
        called = [world.lookup(t, 0, one_sign(t)) for t in range(2)]
        assert made[0].come.wait(PATIENCE_S)
        world.together.forget(batch_id(0, 0))
        made[0].go.set()
        for done in called:
            with pytest.raises(StoppedError, match="given up"):
                found(done)
        world.check_idle()


# --- many threads -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hurried_switching")
@pytest.mark.parametrize("trainers", [2, 4])
def test_many_steps_of_threads_that_do_not_wait_for_the_test(trainers: int) -> None:
    """Each trainer steps on by itself, with batches of its own and some of no samples, while others evaluate: bit by bit as one."""
    random, alone, steps = np.random.default_rng(trainers), Alone(), 30
    sizes = random.integers(0, 4, (steps, trainers))
    sizes[:, 0] += sizes.sum(axis=1) == 0
    batches = [[draw_batch(random, int(size)) for size in of] for of in sizes]
    grads = [[random.uniform(-1, 1, (size, WIDTH)).astype(np.float32) for size in of] for of in sizes]
    expected = [alone.step(number, batches[number], grads[number]) for number in range(steps)]
    with stepping(trainers) as world:

        def train(t: int) -> list[Float32]:
            answers = []
            for number in range(steps):
                batch = batches[number][t]
                parcel = empty_parcel() if batch is None else parcel_of(batch)
                answers.append(world.together.lookup(batch_id(t, number), parcel, True).copy())
                world.together.push(batch_id(t, number), Lines(grads[number][t]), 1.0)
            return answers

        def evaluate() -> None:
            for number in range(steps):
                for batch in batches[number]:
                    if batch is not None:
                        assert np.isfinite(world.together.lookup(number, parcel_of(batch), False)).all()

        evaluating = world.threads.submit(evaluate)
        answers = [found(done) for done in [world.threads.submit(train, t) for t in range(trainers)]]
        found(evaluating)
        for number in range(steps):
            assert np.concatenate([answers[t][number] for t in range(trainers)]).tobytes() == expected[number].tobytes()
        same_bits(world.shard, alone.shard)
        world.check_idle()
    alone.shard.close()


@pytest.mark.usefixtures("hurried_switching")
@pytest.mark.parametrize("end", ["close", "forget"])
def test_an_end_in_the_middle_of_everything(end: str) -> None:
    """Some step is cut short while all trainers run: each stops with StoppedError, none waits, none is told anything else.

    Once a trainer is told that its step was given up, it ends the run, as a trainer does that fails.
    """
    for seed in range(10):
        with stepping(3) as world:
            cut = 3 + seed

            def train(t: int, world: World = world, cut: int = cut) -> int:
                for number in range(100):
                    try:
                        world.together.lookup(batch_id(t, number), parcel_of(one_sign(number)), True)
                        if (t, number) == (seed % 3, cut):
                            world.together.close() if end == "close" else world.together.forget(batch_id(t, number))
                        world.together.push(batch_id(t, number), Lines(lines(1)), 1.0)
                    except StoppedError:
                        world.together.close()
                        return number
                return 100

            # The one that gives the step up finds it begun anew by its push, and waits for the others: until one of them closes.
            stopped = [found(done) for done in [world.threads.submit(train, t) for t in range(3)]]
            assert set(stopped) == {cut}
            counts = [of.pushes for of in world.shard.stats()]
            assert counts == [cut] * len(counts)


# --- trainers with a client each --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 3])
def test_clients_of_several_shards(num_shards: int) -> None:
    """Trainers with a client each, slots in parts: bit by bit the rows of one client with all samples on the same placement."""
    random, trainers, steps = np.random.default_rng(num_shards), 3, 5
    placement: Placement = drawn.any_placement(random, SLOTS, num_shards)
    own = [drawn.piece_slots(pieces, SLOTS) for pieces in placement.shards]
    ours, theirs = ([Shard(slots, [2000] * len(slots), 7, 1) for slots in own] for _ in range(2))
    widths = [[slot.width for slot in slots] for slots in own]
    shared = [Together(LocalEndpoint(shard, of), sum(of), trainers) for shard, of in zip(ours, widths, strict=True)]
    clients = [PsClient(shared, placement, SLOTS) for _ in range(trainers)]
    alone = PsClient(theirs, placement, SLOTS)
    batches = [[draw_batch(random, t + 1) for t in range(trainers)] for _ in range(steps)]
    grads = [[random.uniform(-1, 1, (t + 1, WIDTH)).astype(np.float32) for t in range(trainers)] for _ in range(steps)]

    def train(t: int) -> list[Float32]:
        answers = []
        for number in range(steps):
            batch = batches[number][t]
            assert batch is not None
            answers.append(clients[t].lookup(batch_id(t, number), batch, training=True))
            clients[t].push(batch_id(t, number), grads[number][t])
        return answers

    with ThreadPoolExecutor(trainers) as threads:
        answers = [found(done) for done in [threads.submit(train, t) for t in range(trainers)]]
    for number in range(steps):
        whole = Batch.concat([batch for batch in batches[number] if batch is not None])
        expected = alone.lookup(number, whole, training=True)
        alone.push(number, np.concatenate(grads[number]))
        np.testing.assert_allclose(np.concatenate([of[number] for of in answers]), expected, rtol=1e-6, atol=1e-6)
    for shard, twin in zip(ours, theirs, strict=True):
        found_rows, expected_rows = rows_of(shard), rows_of(twin)
        assert found_rows.keys() == expected_rows.keys()
        for name, rows in found_rows.items():
            assert rows.keys() == expected_rows[name].keys()
            for sign, row in rows.items():
                np.testing.assert_array_equal(row, expected_rows[name][sign])
    for client in (*clients, alone):
        client.close()
    for shard in (*ours, *theirs):
        shard.close()

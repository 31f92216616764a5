"""`Schedule`: the factor of all learning rates, from the first step to long after the last that it describes."""

from __future__ import annotations

import itertools
import json
import math

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.config import Trainer
from flowps.errors import ConfigError
from flowps.trainer.schedule import Schedule

DECAYS = ("none", "linear", "cosine")
FAR = 10**12

schedules = st.builds(
    Schedule,
    warmup_steps=st.integers(0, 50),
    decay=st.sampled_from(DECAYS),
    decay_steps=st.integers(1, 100),
    decay_to=st.floats(0, 1),
)


def test_by_default_nothing_is_scaled() -> None:
    """No warm-up and no decay: 1 at every step."""
    schedule = Schedule.of(Trainer())
    assert [schedule.at(step) for step in (0, 1, 9_999, 10_000, FAR)] == [1.0] * 5


def test_the_knobs_are_the_schedules() -> None:
    """Each under its name."""
    knobs = Trainer(warmup_steps=3, decay="cosine", decay_steps=7, decay_to=0.25)
    assert Schedule.of(knobs) == Schedule(warmup_steps=3, decay="cosine", decay_steps=7, decay_to=0.25)


@pytest.mark.parametrize("decay", DECAYS)
def test_warm_up_rises_in_equal_parts_to_one(decay: str) -> None:
    """The first step already moves something, the last of the warm-up is the first with the whole rate."""
    schedule = Schedule(4, decay, 10, 0.5)
    assert [schedule.at(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_warm_up_of_one_step_is_none() -> None:
    """It would begin with its end."""
    assert [Schedule(1, "none", 10, 0.0).at(step) for step in range(3)] == [1.0, 1.0, 1.0]


def test_linear_falls_in_equal_parts() -> None:
    """From 1 to decay_to in decay_steps steps, and stays."""
    schedule = Schedule(0, "linear", 4, 0.0)
    assert [schedule.at(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    kept = Schedule(0, "linear", 4, 0.5)
    assert [kept.at(step) for step in range(6)] == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]


def test_cosine_falls_slowly_at_both_ends() -> None:
    """Half a period: 1, (1 + √½) / 2, ½, (1 - √½) / 2, 0."""
    schedule = Schedule(0, "cosine", 4, 0.0)
    root = math.sqrt(0.5)
    assert [schedule.at(step) for step in range(5)] == pytest.approx([1.0, (1 + root) / 2, 0.5, (1 - root) / 2, 0.0], abs=1e-15)
    kept = Schedule(0, "cosine", 4, 0.2)
    assert [kept.at(step) for step in range(5)] == pytest.approx([0.2 + 0.8 * schedule.at(step) for step in range(5)])


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_begins_after_the_warm_up(decay: str) -> None:
    """The steps of both are counted one after the other: decay of a warmed-up schedule is that of one without, later."""
    warmed, plain = Schedule(7, decay, 20, 0.1), Schedule(0, decay, 20, 0.1)
    assert [warmed.at(7 + step) for step in range(30)] == [plain.at(step) for step in range(30)]


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_after_the_end_decay_to_is_left(decay: str) -> None:
    """To the bit, at the step after the last and a trillion later; 0 is 0, not a rounding error that steps rows for ever."""
    for decay_to in (0.0, 0.1, 0.3, 1.0):
        schedule = Schedule(5, decay, 10, decay_to)
        assert [schedule.at(step) for step in (15, 16, 1000, FAR)] == [decay_to] * 4


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_to_one_does_not_fall(decay: str) -> None:
    """All of the rates is left."""
    assert {Schedule(0, decay, 10, 1.0).at(step) for step in range(20)} == {1.0}


def test_decay_of_one_step() -> None:
    """The whole rate once, then what is left."""
    assert [Schedule(2, "linear", 1, 0.25).at(step) for step in range(4)] == [0.5, 1.0, 1.0, 0.25]


def test_without_decay_its_knobs_mean_nothing() -> None:
    """decay_steps and decay_to have values even then."""
    assert Schedule(0, "none", 1, 0.0).at(FAR) == 1.0


@settings(deadline=None, database=None)
@given(schedule=schedules)
def test_it_rises_then_falls_and_stays_in_its_bounds(schedule: Schedule) -> None:
    """Never 0 in the warm-up, never above 1, never below decay_to after it."""
    steps = range(schedule.warmup_steps + schedule.decay_steps + 5)
    factors = [schedule.at(step) for step in steps]
    rising, falling = factors[: schedule.warmup_steps + 1], factors[schedule.warmup_steps :]
    assert rising == sorted(rising)
    assert all(one >= other - 1e-15 for one, other in itertools.pairwise(falling))
    assert falling[0] == 1.0
    assert min(rising) > 0
    assert max(factors) <= 1.0
    least = 1.0 if schedule.decay == "none" else schedule.decay_to
    assert min(falling) == factors[-1] == least


# --- Keras's schedules ------------------------------------------------------------------------------------------------

SCHEDULES = keras.optimizers.schedules
KERAS = [
    SCHEDULES.ExponentialDecay(1.0, 10, 0.5, staircase=True),
    SCHEDULES.PiecewiseConstantDecay([5, 20], [1.0, 0.5, 0.1]),
    SCHEDULES.PolynomialDecay(1.0, 30, 0.01, power=2.0),
    SCHEDULES.InverseTimeDecay(1.0, 10, 0.5),
    SCHEDULES.CosineDecay(0.0, 30, alpha=0.1, warmup_target=1.0, warmup_steps=7),
    SCHEDULES.CosineDecayRestarts(1.0, 10),
]


def as_json(schedule: SCHEDULES.LearningRateSchedule) -> str:
    """As the knob takes it: what Keras gives."""
    return json.dumps(SCHEDULES.serialize(schedule))


@pytest.mark.parametrize("schedule", KERAS, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_a_keras_schedule_begins_after_the_warm_up(schedule: SCHEDULES.LearningRateSchedule, warmup_steps: int) -> None:
    """Its step 0 is the first step with the whole rate."""
    found = Schedule.of(Trainer(schedule=as_json(schedule), warmup_steps=warmup_steps))
    assert [found.at(step) for step in range(warmup_steps)] == [(step + 1) / warmup_steps for step in range(warmup_steps)]
    for step in (0, 1, 5, 6, 29, 30, 1000):
        assert found.at(warmup_steps + step) == float(schedule(step))
    assert type(found.at(warmup_steps)) is float


def test_a_schedule_written_by_hand() -> None:
    """Without what serialize adds."""
    text = '{"class_name": "ExponentialDecay", "config": {"initial_learning_rate": 1.0, "decay_steps": 10, "decay_rate": 0.5}}'
    found = Schedule.of(Trainer(schedule=text))
    assert [found.at(step) for step in (0, 10, 20)] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    "text",
    [
        "ExponentialDecay", "{", "null", "1.0", "[]", '"ExponentialDecay"', "{}", '{"class_name": "NoSuchDecay", "config": {}}',
        '{"class_name": "ExponentialDecay", "config": {"initial_learning_rate": 1.0}}',
        '{"class_name": "ExponentialDecay", "config": {"initial_rate": 1.0, "decay_steps": 10, "decay_rate": 0.5}}',
        '{"class_name": "Adam", "config": {}}',
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Schedule.of(Trainer(schedule=text))
    message = str(refusal.value)
    assert message.startswith("trainer.schedule: ")
    assert message.endswith(
        'expected JSON such as {"class_name": "ExponentialDecay", "config": {"initial_learning_rate": 1.0, ...}}'
    )
    assert "\n" not in message
    assert len(message) < 350


@pytest.mark.parametrize("first", [-0.5, math.inf, math.nan])
def test_a_schedule_that_begins_with_no_factor_is_refused(first: float) -> None:
    with pytest.raises(
        ConfigError, match=rf"^trainer\.schedule: begins at {first}, expected a factor of the learning rates, at least 0"
    ):
        Schedule.of(Trainer(schedule=as_json(SCHEDULES.PiecewiseConstantDecay([5], [first, 1.0]))))


def test_a_schedule_that_has_no_factor_later_is_refused_there() -> None:
    found = Schedule.of(Trainer(schedule=as_json(SCHEDULES.PiecewiseConstantDecay([5], [1.0, -0.5])), warmup_steps=1000))
    assert found.at(1005) == 1.0
    with pytest.raises(ConfigError, match=r"^trainer\.schedule: is -0\.5 at step 1,006, expected a factor of the learning rates"):
        found.at(1006)


def test_an_optimizer_that_divides_by_the_rate_is_not_scheduled_to_zero() -> None:
    for knobs in ({"decay": "cosine"}, {"schedule": as_json(SCHEDULES.PolynomialDecay(1.0, 10, 0.0))}):
        trainer = Trainer(optimizer="Ftrl", **knobs)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="ftrl divides by the learning rate"):
            Schedule.of(trainer).at(10)
    assert Schedule.of(Trainer(schedule=as_json(SCHEDULES.PolynomialDecay(1.0, 10, 0.0)))).at(10) == 0
    assert Schedule.of(Trainer(optimizer="ftrl", schedule=as_json(SCHEDULES.PolynomialDecay(1.0, 10, 0.1)))).at(10) > 0


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_schedule_beside_a_decay_is_refused(decay: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.schedule takes the place of trainer\.decay: leave one of them out"):
        Schedule.of(Trainer(schedule=as_json(KERAS[0]), decay=decay))

"""What a step of a row means: beside Keras, beside the twins, and what no step may do."""

from __future__ import annotations

import importlib
import itertools
import math
import warnings
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.config import RowOptimizer
from flowps.ps import optimizer
from flowps.ps.table import Bags
from tests.ps import drawn, naive, twins

NAMES = get_args(RowOptimizer)
LINEAR = ("sgd", "momentum")  # without squares: a huge gradient is a huge step
DIMS = (1, 3, 8, 16, 19, 32)
SIGNS = [0, 2**64 - 1, 2**63, *(naive.mix(k) for k in range(1, 5))]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [1, 16, 19])
def test_a_new_row_carries_the_first_state(name: str, dim: int) -> None:
    """As many floats as the twin's, zeros but for the sums of squares, and no weight is disturbed by them."""
    slot = drawn.slot("s", optimizer=name, dim=dim, initial_accumulator=0.25)
    found = optimizer.of_slot(slot)
    expected = twins.first_state(slot)
    assert found.state_width(dim) == len(expected)
    assert found.first_state(dim).dtype == np.float32
    np.testing.assert_array_equal(found.first_state(dim), expected)
    table = twins.table_of(slot)
    twins.begin(table, SIGNS)
    weights, state = twins.rows_of(table, SIGNS)
    np.testing.assert_array_equal(state, np.tile(expected, (len(SIGNS), 1)))
    np.testing.assert_array_equal(weights, [twins.first_weights(slot, sign, 0) for sign in SIGNS])


def test_state_widths() -> None:
    """Floats beside 16 weights, written out."""
    widths = {name: optimizer.of_slot(drawn.slot("s", optimizer=name)).state_width(16) for name in NAMES}
    assert widths == {
        "sgd": 0, "momentum": 16, "adagrad": 16, "rowwise_adagrad": 1, "adam": 32, "adamw": 32, "amsgrad": 48, "rmsprop": 16,
        "ftrl": 32, "group_ftrl": 32, "group_adagrad": 32, "lamb": 32,
    }  # fmt: skip


@pytest.mark.parametrize("first", [0.0, 0.1])
def test_only_optimizers_that_run_the_same_code_are_equal(first: float) -> None:
    """Equal ones share a table, which steps all its rows alike: adamw is adam with decay, group_adagrad group_ftrl without beta."""
    of = {name: optimizer.of_slot(drawn.slot("s", optimizer=name, initial_accumulator=first)) for name in NAMES}
    equal = {(one, other) for one, other in itertools.combinations(NAMES, 2) if of[one] == of[other]}
    assert equal == {("adam", "adamw"), ("group_ftrl", "group_adagrad")}


def test_rates_are_a_slots_own_and_first_states_a_tables() -> None:
    """Slots that differ in what a step is told share a table; those that differ in how a row begins do not."""
    one, same = drawn.slot("a", learning_rate=0.1, epsilon=1e-3, l2=0.1), drawn.slot("b", learning_rate=0.2, clip_norm=1.0)
    assert len({optimizer.of_slot(one), optimizer.of_slot(same)}) == 1
    assert optimizer.of_slot(drawn.slot("c", initial_accumulator=0.5)) != optimizer.of_slot(one)


# --- Keras ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keras() -> Any:
    """Keras on TensorFlow, whose own import warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("flowps.trainer")  # chooses the backend and keeps TensorFlow's greeting off the terminal
        import keras

        assert keras.backend.backend() == "tensorflow"
    return keras


KERAS = [
    ("sgd", {}, "SGD", {}),
    ("sgd", {"weight_decay": 0.1}, "SGD", {"weight_decay": 0.1}),
    ("momentum", {"momentum": 0.8}, "SGD", {"momentum": 0.8}),
    ("adagrad", {}, "Adagrad", {"initial_accumulator_value": 1e-8, "epsilon": 1e-7}),
    ("adagrad", {"initial_accumulator": 0.1, "epsilon": 1e-2}, "Adagrad", {"initial_accumulator_value": 0.1, "epsilon": 1e-2}),
    ("adam", {}, "Adam", {}),
    ("adam", {"beta1": 0.7, "beta2": 0.9, "epsilon": 1e-3}, "Adam", {"beta_1": 0.7, "beta_2": 0.9, "epsilon": 1e-3}),
    ("adamw", {}, "AdamW", {}),
    ("adamw", {"weight_decay": 0.1}, "AdamW", {"weight_decay": 0.1}),
    ("amsgrad", {}, "Adam", {"amsgrad": True}),
    ("amsgrad", {"beta2": 0.5}, "Adam", {"amsgrad": True, "beta_2": 0.5}),
    ("rmsprop", {}, "RMSprop", {}),
    ("rmsprop", {"rho": 0.7, "epsilon": 1e-3}, "RMSprop", {"rho": 0.7, "epsilon": 1e-3}),
    ("ftrl", {"initial_accumulator": 0.1, "ftrl_beta": 0.0}, "Ftrl", {}),
    (
        "ftrl",
        {"l1": 0.3, "l2": 0.2, "ftrl_beta": 1.5, "initial_accumulator": 0.2},
        "Ftrl",
        {
            "l1_regularization_strength": 0.3,
            "l2_regularization_strength": 0.2,
            "beta": 1.5,
            "initial_accumulator_value": 0.2,
        },
    ),
]


def gradients(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Large and small ones, some rows and some numbers zero."""
    size = random.choice([0.01, 1.0, 10.0], (shape[0], 1)) * (random.random(shape) < 0.9)
    return (random.normal(size=shape) * size).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "settings", "twin", "twin_settings"), KERAS, ids=[f"{k}-{case[0]}" for k, case in enumerate(KERAS)]
)
def test_fifty_steps_as_keras_takes_them(
    keras: Any, name: str, settings: dict[str, float], twin: str, twin_settings: dict[str, float]
) -> None:
    """Every row touched at every step: weights and state of tables of six dims are the columns of one Keras variable."""
    random = np.random.default_rng(0)
    slots = [drawn.slot("s", optimizer=name, learning_rate=0.02, dim=dim, **settings) for dim in DIMS]
    tables = [twins.table_of(slot) for slot in slots]
    first = np.concatenate([twins.begin(table, SIGNS) for table in tables], axis=1)
    variable = keras.Variable(first)
    theirs = getattr(keras.optimizers, twin)(0.02, **twin_settings)
    cuts = np.cumsum(DIMS)[:-1]
    for _ in range(50):
        grads = gradients(random, (len(SIGNS), sum(DIMS)))
        theirs.apply([keras.ops.convert_to_tensor(grads)], [variable])
        for table, mine in zip(tables, np.split(grads, cuts, axis=1), strict=True):
            assert twins.push(table, SIGNS, mine) == len(SIGNS)
    ours = [twins.rows_of(table, SIGNS) for table in tables]
    np.testing.assert_allclose(np.concatenate([w for w, _ in ours], axis=1), variable.numpy(), rtol=1e-5, atol=1e-5)
    assert np.abs(variable.numpy() - first).max() > 0.01  # it was a walk, not a standstill
    parts = [variable.numpy() for variable in theirs.variables[2:]]  # after the count of steps and the rate
    for dim, stop, (_, state) in zip(DIMS, np.cumsum(DIMS), ours, strict=True):
        assert state.shape == (len(SIGNS), dim * len(parts))
        for mine, part in zip(np.split(state, len(parts), axis=1) if parts else [], parts, strict=True):
            # What is left of sums of large numbers is as exact as these.
            np.testing.assert_allclose(mine, part[:, stop - dim : stop], rtol=3e-5, atol=1e-5 * max(1, np.abs(part).max()))


@pytest.mark.parametrize(
    ("name", "settings", "twin", "twin_settings"),
    [
        ("lamb", {}, "Lamb", {}),
        ("lamb", {"beta1": 0.5, "beta2": 0.9, "epsilon": 1e-3}, "Lamb", {"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-3}),
        ("lamb", {"weight_decay": 0.1}, "Lamb", {"weight_decay": 0.1}),
        ("sgd", {"clip_norm": 1.0}, "SGD", {"clipnorm": 1.0}),
        ("adagrad", {"clip_value": 0.5, "initial_accumulator": 0.1}, "Adagrad", {"clipvalue": 0.5}),
    ],
)
def test_fifty_steps_as_keras_takes_them_with_a_variable_for_each_row(
    keras: Any, name: str, settings: dict[str, float], twin: str, twin_settings: dict[str, float]
) -> None:
    """What looks at a tensor as a whole, looks at a row: LAMB's trust ratio, the norm that is clipped."""
    random = np.random.default_rng(1)
    signs, dims = SIGNS[:2], (1, 3, 16, 27)
    tables = [twins.table_of(drawn.slot("s", optimizer=name, learning_rate=0.02, dim=dim, **settings)) for dim in dims]
    variables = [keras.Variable(row) for table in tables for row in twins.begin(table, signs)]
    first = [variable.numpy() for variable in variables]
    theirs = getattr(keras.optimizers, twin)(0.02, **twin_settings)
    for _ in range(50):
        grads = [gradients(random, (len(signs), dim)) for dim in dims]
        theirs.apply([keras.ops.convert_to_tensor(row) for rows in grads for row in rows], variables)
        for table, mine in zip(tables, grads, strict=True):
            twins.push(table, signs, mine)
    ours = [row for table in tables for row in twins.rows_of(table, signs)[0]]
    for row, variable in zip(ours, variables, strict=True):
        np.testing.assert_allclose(row, variable.numpy(), rtol=1e-5, atol=1e-5)
    assert all((row != before).all() for row, before in zip(ours, first, strict=True))
    assert max(np.abs(row - before).max() for row, before in zip(ours, first, strict=True)) > 0.01


# --- the twins --------------------------------------------------------------------------------------------------------


def or_zero(low: float, high: float) -> st.SearchStrategy[float]:
    """What is off at 0."""
    return st.one_of(st.just(0.0), st.floats(low, high))


settings_of = st.fixed_dictionaries(
    {
        "learning_rate": st.floats(1e-3, 0.5),
        "initial_accumulator": st.one_of(st.just(1e-8), st.floats(1e-3, 1)),
        "epsilon": st.floats(1e-7, 1e-2),
        "momentum": st.floats(0, 0.99),
        "beta1": st.floats(0, 0.99),
        "beta2": st.floats(0.5, 0.999),
        "rho": st.floats(0.5, 0.99),
        "ftrl_beta": st.floats(0, 2),
        "l1": or_zero(1e-3, 1),
        "l21": or_zero(1e-3, 0.5),
        "l2": or_zero(1e-3, 1),
        "weight_decay": or_zero(1e-3, 1),
        "clip_value": or_zero(0.05, 2),
        "clip_norm": or_zero(0.05, 2),
        "weight_bound": or_zero(0.05, 2),
        "initializer": st.sampled_from(("zeros", "constant", "uniform")),
    }
)


@pytest.mark.parametrize("name", NAMES)
@drawn.bounded(max_examples=40)
@given(data=st.data(), dim=drawn.dims, settings=settings_of, random=drawn.generators)
def test_steps_as_the_twin_takes_them(
    name: str, data: st.DataObject, dim: int, settings: dict[str, Any], random: np.random.Generator
) -> None:
    """Any settings at once; some signs at each push, rows created late; the others stay bit for bit."""
    slot = drawn.slot("s", optimizer=name, dim=dim, **settings)
    scale = 1.0 if name in twins.FTRLS else data.draw(st.sampled_from((1.0, 0.25)), label="rate_scale")
    table = twins.table_of(slot, seed=3)
    rows = {sign: (twins.first_weights(slot, sign, 3), twins.first_state(slot)) for sign in SIGNS}
    met: set[int] = set()
    for push in range(1, data.draw(st.integers(1, 6), label="pushes") + 1):
        touched = data.draw(st.lists(st.sampled_from(SIGNS), unique=True, min_size=1), label="touched")
        grads = gradients(random, (len(touched), dim))
        before = table.values(np.array(SIGNS, np.uint64))
        assert twins.push(table, touched, grads, scale) == len(touched)
        met |= set(touched)
        for sign, grad in zip(touched, grads, strict=True):
            # From our own row: what is compared is one step, and rounding does not add up.
            rows[sign] = twins.step_row(slot, *rows[sign], grad, push, scale)
        known = [sign for sign, is_known in zip(SIGNS, before[0], strict=True) if is_known]
        for sign, weights, state in zip(known, *before[1:], strict=True):
            if sign not in touched:
                ours = twins.rows_of(table, [sign])
                assert (ours[0].tobytes(), ours[1].tobytes()) == (weights.tobytes(), state.tobytes())
        for sign in touched:
            (weights,), (state,) = twins.rows_of(table, [sign])
            np.testing.assert_allclose(weights, rows[sign][0], rtol=2e-4, atol=2e-5)
            # FTRL's z is what is left of sums of weight times √n / rate.
            size = np.sqrt(rows[sign][1][:dim].max()) / (slot.learning_rate * scale) if name in twins.FTRLS else 1.0
            np.testing.assert_allclose(state, rows[sign][1], rtol=2e-4, atol=2e-5 + 1e-6 * size)
            rows[sign] = weights, state
    assert table.num_rows == len(met)


@pytest.mark.parametrize("name", ["rowwise_adagrad", "group_ftrl", "group_adagrad"])
def test_fifty_steps_as_the_twin_takes_them(name: str) -> None:
    """The optimizers that Keras has not, as long and as close as the others beside Keras."""
    for dim in DIMS:
        random = np.random.default_rng(dim)
        slot = drawn.slot("s", optimizer=name, dim=dim, learning_rate=0.02, initial_accumulator=0.1, l1=0.01, l21=0.02)
        table = twins.table_of(slot)
        rows = [(twins.first_weights(slot, sign, 0), twins.first_state(slot)) for sign in SIGNS]
        for push in range(1, 51):
            grads = gradients(random, (len(SIGNS), dim))
            twins.push(table, SIGNS, grads)
            rows = [twins.step_row(slot, *row, grad, push) for row, grad in zip(rows, grads, strict=True)]
        weights, state = twins.rows_of(table, SIGNS)
        np.testing.assert_allclose(weights, [row[0] for row in rows], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state, [row[1] for row in rows], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("name", "beta"), [("adam", 0.9999), ("amsgrad", 0.9999), ("lamb", 0.9999), ("rmsprop", 0.9999)])
def test_a_decay_close_to_one_keeps_its_distance_from_one(name: str, beta: float) -> None:
    """The first mean square is (1 - beta2) g² to float32's precision, not to that of 1 - float32(beta2)."""
    table = twins.table_of(drawn.slot("s", optimizer=name, dim=1, beta2=beta, rho=beta))
    twins.push(table, [7], [[1.0]])
    _, ((*_, square),) = twins.rows_of(table, [7])
    np.testing.assert_allclose(square, 1 - beta, rtol=1e-6)


# --- one slot's knobs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_multiplies_the_rate(name: str) -> None:
    """A factor of a half all along is half the rate, to the bit; decoupled decay is times the same rate."""
    knobs = {"optimizer": name, "weight_decay": 0.5, "dim": 19}
    halved = twins.table_of(drawn.slot("s", learning_rate=0.25, **knobs))
    plain = twins.table_of(drawn.slot("s", learning_rate=0.125, **knobs))
    for k in range(4):
        grads = np.random.default_rng(k).normal(size=(len(SIGNS), 19))
        twins.push(halved, SIGNS, grads, rate_scale=0.5)
        twins.push(plain, SIGNS, grads)
    np.testing.assert_array_equal(twins.rows_of(halved, SIGNS)[0], twins.rows_of(plain, SIGNS)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_that_has_fallen_moves_a_learnt_row_little(name: str) -> None:
    """At the end of a decaying schedule, down to its very 0, rows stay about where they were."""
    slot = drawn.slot("s", optimizer=name, dim=3, learning_rate=0.2, initializer="constant", init_scale=0.1, momentum=0.1)
    table = twins.table_of(slot)
    twins.begin(table, [7])
    for _ in range(300):
        twins.push(table, [7], twins.rows_of(table, [7])[0] - 1)
    before, _ = twins.rows_of(table, [7])
    np.testing.assert_allclose(before, np.ones((1, 3)), atol=0.3)
    for factor in (0.1, 0.01, 0.0):
        twins.push(table, [7], before - 1, rate_scale=factor)
        weights, state = twins.rows_of(table, [7])
        assert np.isfinite(weights).all(), factor
        assert np.isfinite(state).all(), factor
        np.testing.assert_allclose(weights, before, atol=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_of_zero_moves_nothing(name: str) -> None:
    """A schedule ends at 0 unless it is told otherwise; only momentum goes on for a while."""
    table = twins.table_of(drawn.slot("s", optimizer=name, dim=19, momentum=0.0, weight_decay=0.5, initial_accumulator=0.1))
    twins.push(table, SIGNS, np.ones((len(SIGNS), 19)))
    before, _ = twins.rows_of(table, SIGNS)
    twins.push(table, SIGNS, np.ones((len(SIGNS), 19)), rate_scale=0.0)
    np.testing.assert_allclose(twins.rows_of(table, SIGNS)[0], before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [3, 16, 19])
def test_clip_value_bounds_each_number_of_a_rows_gradient(dim: int) -> None:
    """Of the sum over the batch, not of each sample's gradient."""
    table = twins.table_of(drawn.slot("s", optimizer="sgd", learning_rate=1.0, dim=dim, initializer="zeros", clip_value=0.5))
    grads = np.linspace(-1, 1, dim)
    twins.push(table, [7, 7], [grads, grads])
    np.testing.assert_array_equal(twins.rows_of(table, [7])[0][0], -np.clip(2 * grads.astype(np.float32), -0.5, 0.5))


@pytest.mark.parametrize("dim", [1, 3, 16, 19])
def test_clip_norm_shortens_a_rows_gradient_and_keeps_its_direction(dim: int) -> None:
    """Long ones get the length, short ones stay bit for bit."""
    table = twins.table_of(drawn.slot("s", optimizer="sgd", learning_rate=1.0, dim=dim, initializer="zeros", clip_norm=0.5))
    grads = np.random.default_rng(0).normal(size=(2, dim)).astype(np.float32)
    grads *= np.array([[3.0], [0.25]], np.float32) / np.linalg.norm(grads, axis=1, keepdims=True)
    twins.push(table, [7, 8], grads)
    long, short = -twins.rows_of(table, [7, 8])[0]
    np.testing.assert_allclose(long, grads[0] / 6, rtol=1e-5)
    np.testing.assert_array_equal(short, grads[1])


def test_values_are_clipped_before_the_norm() -> None:
    """(3, 4) becomes (1, 1), whose norm is then brought to 1."""
    slot = drawn.slot("s", optimizer="sgd", learning_rate=1.0, dim=2, initializer="zeros", clip_value=1.0, clip_norm=1.0)
    table = twins.table_of(slot)
    twins.push(table, [7], [[3.0, 4.0]])
    np.testing.assert_allclose(twins.rows_of(table, [7])[0], [[-math.sqrt(0.5)] * 2], rtol=1e-6)


def test_the_l2_penalty_is_part_of_the_gradient_of_touched_rows() -> None:
    """Half a weight in the gradient, clipped with it; rows that are not in the batch pay nothing."""
    knobs = {"optimizer": "sgd", "learning_rate": 0.5, "initializer": "constant", "init_scale": 2.0, "dim": 19, "l2": 0.5}
    table = twins.table_of(drawn.slot("s", **knobs))
    twins.begin(table, [7, 8])
    twins.push(table, [7], np.zeros((1, 19)))
    np.testing.assert_array_equal(twins.rows_of(table, [7, 8])[0], [[2.0 - 0.5 * 0.5 * 2.0] * 19, [2.0] * 19])
    clipped = twins.table_of(drawn.slot("s", **knobs, clip_value=0.25))
    twins.push(clipped, [7], np.zeros((1, 19)))
    np.testing.assert_array_equal(twins.rows_of(clipped, [7])[0], [[2.0 - 0.5 * 0.25] * 19])


def test_the_l2_of_an_ftrl_is_its_own() -> None:
    """Not in the gradient, whose squares it sums."""
    table = twins.table_of(drawn.slot("s", optimizer="ftrl", dim=1, l2=0.5, initializer="constant", init_scale=2.0))
    twins.push(table, [7], [[0.0]])
    np.testing.assert_array_equal(twins.rows_of(table, [7])[1], np.array([[1e-8, 0.0]], np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_leaves_its_bound(name: str) -> None:
    """Neither way, in any lane, and the optimizer's state is not bounded."""
    table = twins.table_of(drawn.slot("s", optimizer=name, dim=27, learning_rate=2.0, weight_bound=0.125, init_scale=0.1))
    grads = np.where(np.arange(27) % 2, 50.0, -50.0)[None]
    for _ in range(20):
        twins.push(table, [7], grads)
    weights, _ = twins.rows_of(table, [7])
    np.testing.assert_array_equal(weights, -np.sign(grads) * 0.125)


@pytest.mark.parametrize("dim", [3, 16, 19])
def test_l21_makes_rows_zero_and_l1_weights(dim: int) -> None:
    """A row whose gradients are small together is zero as a whole; with L1 each weight is on its own."""
    small, large = np.full(dim, 0.1), np.full(dim, 1.0)
    group = twins.table_of(drawn.slot("s", optimizer="group_ftrl", dim=dim, l21=0.5, initializer="zeros"))
    twins.push(group, [7, 8], [small, large])
    weights, _ = twins.rows_of(group, [7, 8])
    assert (weights[0] == 0).all()
    assert (weights[1] < 0).all()
    single = twins.table_of(drawn.slot("s", optimizer="ftrl", dim=dim, l1=0.5, initializer="zeros"))
    grads = np.where(np.arange(dim) % 2, 1.0, 0.1)
    twins.push(single, [7], [grads])
    np.testing.assert_array_equal(twins.rows_of(single, [7])[0][0] == 0, grads < 0.5)


@pytest.mark.parametrize("name", ["ftrl", "group_ftrl", "group_adagrad"])
def test_nothing_learnt_is_nothing_to_divide_by(name: str) -> None:
    """With no first sum of squares and no beta, a number whose gradient was always 0 has a divisor of 0: it is 0, not NaN."""
    table = twins.table_of(drawn.slot("s", optimizer=name, dim=3, initial_accumulator=0.0, ftrl_beta=0.0))
    twins.push(table, [7], [[1.0, 0.0, -1.0]])
    weights, state = twins.rows_of(table, [7])
    assert np.isfinite(weights).all()
    assert np.isfinite(state).all()


# --- which rows step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [3, 16])
def test_rows_that_are_not_touched_stay_bit_for_bit(name: str, dim: int) -> None:
    """Lazily: no decay, no momentum, no bias correction reaches a row that is not in the batch, however many pushes pass."""
    table = twins.table_of(drawn.slot("s", optimizer=name, dim=dim, weight_decay=0.5, l2=0.1, weight_bound=0.1))
    random = np.random.default_rng(0)
    twins.push(table, SIGNS, random.normal(size=(len(SIGNS), dim)))
    before = twins.rows_of(table, SIGNS[3:])
    first, _ = twins.rows_of(table, SIGNS[:3])
    for _ in range(5):
        twins.push(table, SIGNS[:3], random.normal(size=(3, dim)))
        twins.begin(table, SIGNS)  # a lookup alone steps nothing
    for ours, then in zip(twins.rows_of(table, SIGNS[3:]), before, strict=True):
        assert ours.tobytes() == then.tobytes()
    assert (twins.rows_of(table, SIGNS[:3])[0] != first).any(axis=1).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [16, 19])
def test_gradients_of_a_sign_are_summed_before_one_step(name: str, dim: int) -> None:
    """A sign in several samples and twice in one bag: one step with the sum, in the order of the batch, to the bit."""
    slot = drawn.slot("s", optimizer=name, dim=dim, clip_norm=1.0)
    grads = np.random.default_rng(0).normal(size=(4, dim)).astype(np.float32)
    column = np.zeros(1, np.int64)
    bags = Bags(np.array([7, 8, 7, 7, 7], np.uint64), np.array([0, 1, 2, 4, 5], np.int32), 4, column, column)
    scattered, summed = twins.table_of(slot), twins.table_of(slot)
    for _ in range(3):
        touched = scattered.find(bags)
        assert scattered.push(touched, grads) == 2
        seven = np.zeros(dim, np.float32)
        for b in (0, 2, 2, 3):
            seven += grads[b]
        assert twins.push(summed, [7, 8], [seven, grads[1]]) == 2
    for ours, expected in zip(twins.rows_of(scattered, [7, 8]), twins.rows_of(summed, [7, 8]), strict=True):
        np.testing.assert_array_equal(ours, expected)


# --- gradients that are not numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [1, 8, 16, 19, 27])
def test_a_row_whose_gradient_is_not_finite_stays_and_is_counted(name: str, dim: int) -> None:
    """Wherever in the row it is, the row is as it was, bit for bit, the others step, and the table says whose it was."""
    slot = drawn.slot("user", optimizer=name, dim=dim, l2=0.1, clip_value=1.0, clip_norm=1.0, weight_decay=0.1, weight_bound=9.0)
    table, sound = twins.table_of(slot), twins.table_of(slot)
    random = np.random.default_rng(0)
    for each in (table, sound):
        twins.push(each, SIGNS, np.ones((len(SIGNS), dim)))
    refused = 0
    for bad in (math.nan, math.inf, -math.inf):
        for place in {0, dim // 2, dim - 1}:
            victim = SIGNS[refused % len(SIGNS)]
            others = [sign for sign in SIGNS if sign != victim]
            grads = random.normal(size=(len(SIGNS), dim)).astype(np.float32)
            before = twins.rows_of(table, [victim])
            twins.push(sound, others, grads[[SIGNS.index(sign) for sign in others]])
            grads[SIGNS.index(victim), place] = bad
            assert twins.push(table, SIGNS, grads) == len(others)
            refused += 1
            assert table.stats().unsound == refused
            assert table.stats().last_unsound == ("user", victim)
            for ours, then in zip(twins.rows_of(table, [victim]), before, strict=True):
                assert ours.tobytes() == then.tobytes()
            for ours, expected in zip(twins.rows_of(table, others), twins.rows_of(sound, others), strict=True):
                np.testing.assert_array_equal(ours, expected)
            for each in (table, sound):
                twins.push(each, [victim], np.zeros((1, dim)))
    assert sound.stats().unsound == 0
    assert sound.stats().last_unsound is None


@pytest.mark.parametrize("dim", [16, 19])
def test_what_counts_is_the_sum_of_a_rows_gradients(dim: int) -> None:
    """One bad sample spoils the rows it touches and no others; finite ones may be infinite together."""
    table = twins.table_of(drawn.slot("s", dim=dim))
    largest = np.finfo(np.float32).max
    grads = np.ones((5, dim))
    grads[0], grads[2] = largest, largest
    grads[4, 1] = math.nan
    assert twins.push(table, [7, 8, 7, 9, 10], grads) == 2
    assert table.stats().unsound == 2
    assert table.stats().last_unsound in (("s", 7), ("s", 10))
    assert table.stats().pushes == 1


def test_the_slot_of_an_unsound_gradient_is_named() -> None:
    """Of two slots in a table, the one whose sign it was."""
    table = twins.table_of(drawn.slot("user", dim=3), drawn.slot("item", dim=3))
    bags = Bags(np.array([7, 8], np.uint64), np.array([0, 1, 2], np.int32), 1, np.array([0, 1]), np.array([0, 3]))
    for bad, expected in ((4, ("item", 8)), (1, ("user", 7))):
        touched = table.find(bags)
        grads = np.ones((1, 6), np.float32)
        grads[0, bad] = math.nan
        assert table.push(touched, grads) == 1
        assert table.stats().last_unsound == expected
    assert table.stats().unsound == 2


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LINEAR])
@pytest.mark.parametrize("size", [1e20, 1e38])
def test_a_gradient_whose_square_is_infinite_spoils_no_row(name: str, size: float) -> None:
    """It is refused, or the row and its state stay finite after it and after the next one."""
    table = twins.table_of(drawn.slot("s", optimizer=name, dim=19, initializer="zeros"))
    for value in (1.0, size, size, 1.0):
        twins.push(table, [7], np.full((1, 19), value))
    weights, state = twins.rows_of(table, [7])
    assert np.isfinite(weights).all()
    assert np.isfinite(state).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_gradient_spoils_no_row(name: str) -> None:
    """Down to the smallest numbers, where squares and ratios of norms underflow: no weight moves by more than a few rates."""
    slot = drawn.slot("s", optimizer=name, dim=19, learning_rate=0.05, initial_accumulator=0.1, ftrl_beta=0.0)
    for power in range(-45, -15):
        table = twins.table_of(slot)
        first = twins.begin(table, [7])
        twins.push(table, [7], np.full((1, 19), 10.0**power))
        weights, state = twins.rows_of(table, [7])
        assert np.isfinite(state).all(), power
        if name in twins.FTRLS:
            assert np.isfinite(weights).all(), power  # without a sum of gradients they are zero
        else:
            np.testing.assert_allclose(weights, first, atol=0.2, err_msg=f"10^{power}")

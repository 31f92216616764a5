"""What a step of a row means: what a slot's settings become, and the rows of a table beside a Keras variable."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import pytest

from flowps.ps import optimizer
from flowps.ps.kernels import update
from flowps.ps.optimizer import Adagrad, Sgd
from flowps.ps.table import Bags, Table
from tests.ps import drawn

DIM = 20  # 16 at once and a scalar tail


def test_settings_become_an_optimizer() -> None:
    """Kind, state and parameters."""
    sgd, adagrad = drawn.slot("a", optimizer="sgd"), drawn.slot("b", initial_accumulator=0.25, epsilon=1e-3)
    assert optimizer.of_slot(sgd) == Sgd()
    assert (Sgd().kind, Sgd().state_width(16)) == (update.SGD, 0)
    assert optimizer.of_slot(adagrad) == Adagrad(initial_state=0.25)
    assert (Adagrad(0.25).kind, Adagrad(0.25).initial_state, Adagrad(0.25).state_width(16)) == (
        update.ADAGRAD,
        0.25,
        16,
    )
    assert optimizer.params_of_slot(adagrad) == (0.05, 1e-3)


def test_equal_optimizers_share_a_table() -> None:
    """Rates and epsilons are a slot's own; the first value of the state is the table's."""
    one, same = drawn.slot("a", learning_rate=0.1, epsilon=1e-3), drawn.slot("b", learning_rate=0.2)
    assert len({optimizer.of_slot(one), optimizer.of_slot(same)}) == 1
    other = drawn.slot("c", initial_accumulator=0.5)
    assert len({optimizer.of_slot(one), optimizer.of_slot(other), optimizer.of_slot(drawn.slot("d", optimizer="sgd"))}) == 3


@pytest.fixture(scope="module")
def tensorflow() -> Any:
    """TensorFlow, whose own import warns."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras
        import tensorflow as tf

        assert keras.backend.backend() == "tensorflow"
    return tf


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sgd", {"learning_rate": 0.1}),
        ("adagrad", {"learning_rate": 0.05}),  # the default of a slot: an accumulator of 1e-8
        ("adagrad", {"learning_rate": 0.5, "initial_accumulator": 0.1, "epsilon": 1e-2}),
    ],
    ids=["sgd", "adagrad", "adagrad-keras"],
)
def test_fifty_steps_as_keras_takes_them(tensorflow: Any, name: str, settings: dict[str, float], pooling: str) -> None:
    """A Keras embedding, pooled by TensorFlow and trained by the Keras optimizer, has the weights of our rows."""
    tf = tensorflow
    vocabulary, size = 30, 16
    random = np.random.default_rng(0)
    slot = drawn.slot("s", dim=DIM, optimizer=name, pooling=pooling, **settings)
    table = Table([slot], [0], vocabulary, seed=0)
    signs = random.integers(0, 2**64, vocabulary, np.uint64)
    columns = np.array([0])

    everything = Bags(signs, np.array([0, vocabulary], np.int32), 1, columns, columns)
    table.lookup(everything, np.empty((1, DIM), np.float32), create=True)
    weights = tf.Variable(table.rows()[2][:, :DIM])
    keras_optimizer = {
        "sgd": lambda: tf.keras.optimizers.SGD(slot.learning_rate),
        "adagrad": lambda: tf.keras.optimizers.Adagrad(
            slot.learning_rate, initial_accumulator_value=slot.initial_accumulator, epsilon=slot.epsilon
        ),
    }[name]()

    moved = 0.0
    for _ in range(50):
        # Bags of one to six signs; a few values come again and again, within a bag too.
        lengths = random.integers(1, 7, size)
        ids = np.minimum(random.zipf(1.3, lengths.sum()) - 1, vocabulary - 1)
        direction = random.normal(size=(size, DIM)).astype(np.float32)

        bags = Bags(signs[ids], np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), size, columns, columns)
        pooled = np.empty((size, DIM), np.float32)
        rows = table.lookup(bags, pooled, create=True)
        before = table.rows()[2][:, :DIM]
        table.push(bags, rows, direction)
        moved = max(moved, float(np.abs(table.rows()[2][:, :DIM] - before).max()))

        with tf.GradientTape() as tape:
            segment = tf.math.segment_sum if pooling == "sum" else tf.math.segment_mean
            keras_pooled = segment(tf.gather(weights, ids), np.repeat(np.arange(size), lengths))
            loss = tf.reduce_sum(keras_pooled * direction)
        sparse = tape.gradient(loss, weights)
        dense = tf.math.unsorted_segment_sum(sparse.values, sparse.indices, vocabulary)
        np.testing.assert_allclose(pooled, keras_pooled.numpy(), rtol=1e-5, atol=1e-5)
        keras_optimizer.apply([dense], [weights])

    np.testing.assert_allclose(table.rows()[2][:, :DIM], weights.numpy(), rtol=1e-5, atol=1e-5)
    assert moved > 0.01  # it was a walk, not a standstill
    if name == "adagrad":
        squares = keras_optimizer.variables[-1].numpy()
        np.testing.assert_allclose(table.rows()[2][:, DIM:], squares, rtol=1e-5)

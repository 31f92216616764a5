"""flowps against the same model written in plain TensorFlow: dense embedding tables, Keras optimizers, no parameter server.

Lookup, pooling, loss, push and the rows' optimizer must come to the same losses and the same rows, for 50 steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from flowps.batch import Batch, Float32, Uint64
from flowps.config import Slot
from flowps.ps.client import PsClient
from flowps.ps.placement import place
from flowps.ps.shard import Shard
from flowps.trainer.models import ModelSpec, build
from flowps.trainer.step import Step
from tests.trainer.samples import make_bags

STEPS, SIZE, VOCABULARY, DENSE_WIDTH, HIDDEN = 50, 16, 12, 3, (8, 6)
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Column:
    """How a slot looks, and how its bags are drawn: at most `most` signs, now and then none if `empty`."""

    dim: int
    pooling: str
    most: int
    empty: bool = False


# Dims with whole vectors of 16 and 8 floats, with single floats, and with all of them (see ps/kernels/pool).
COLUMNS = (
    Column(4, "sum", 1),
    Column(16, "mean", 1),
    Column(8, "sum", 5),
    Column(27, "mean", 5),
    Column(4, "sum", 4, empty=True),
    Column(8, "mean", 4, empty=True),
)

OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.3},
    "adagrad": {"optimizer": "adagrad", "learning_rate": 0.05, "initial_accumulator": 0.1},
    "adagrad as by default": {"optimizer": "adagrad"},
}


def make_slots(optimizer: dict[str, Any]) -> list[Slot]:
    """One slot a column; every second one learns at half the rate, so that slots of one table differ."""
    rate = optimizer.get("learning_rate", Slot(name="any").learning_rate)
    return [
        Slot(
            name=f"s{k}",
            dim=column.dim,
            pooling=column.pooling,
            init_scale=0.3,
            **{**optimizer, "learning_rate": rate / (1 + k % 2)},
        )
        for k, column in enumerate(COLUMNS)
    ]


def make_signs() -> Uint64:
    """[slot, vocabulary], all different, the extremes among them."""
    signs = np.random.default_rng(11).integers(0, 1 << 64, (len(COLUMNS), VOCABULARY), np.uint64, endpoint=False)
    signs[0, :4] = (0, 1, 1 << 63, (1 << 64) - 1)
    assert len(np.unique(signs)) == signs.size
    return signs


Bags = list[list[list[int]]]
"""[slot][sample] → numbers of the signs in the slot's vocabulary."""


def draw(rng: np.random.Generator, size: int) -> tuple[Bags, Float32, Float32]:
    """Bags, labels and dense columns of a batch. Few signs: they repeat across samples, and within bags."""
    bags: Bags = []
    for column in COLUMNS:
        lengths = rng.integers(0 if column.empty else 1, column.most + 1, size)
        bags.append([rng.integers(0, VOCABULARY, n).tolist() for n in lengths])
        if column.most > 1:
            bags[-1][0] = [3, 3, 7]
    return bags, rng.integers(0, 2, size).astype(np.float32), rng.normal(size=(size, DENSE_WIDTH)).astype(np.float32)


class Flowps:
    """The model as flowps trains it."""

    def __init__(self, slots: list[Slot], signs: Uint64, num_shards: int) -> None:
        placement = place(slots, num_shards)
        self.shards = [
            Shard([slots[p.slot] for p in of], [VOCABULARY + 1] * len(of), seed=5, max_in_flight=1) for of in placement.shards if of
        ]
        assert len(self.shards) == num_shards
        self.client, self.signs, self.placement = PsClient(self.shards, placement, slots), signs, placement
        spec = ModelSpec.of([slot.name for slot in slots], [slot.dim for slot in slots], DENSE_WIDTH, HIDDEN)
        self.step = Step(build("dnn", spec), spec, "adam", 0.01, jit_compile=False)

    def batch(self, bags: Bags, labels: Float32, dense: Float32) -> Batch:
        signs = [[[int(of_slot[i]) for i in bag] for bag in slot] for of_slot, slot in zip(self.signs, bags, strict=True)]
        return make_bags(signs, labels.tolist(), dense)

    def train(self, number: int, bags: Bags, labels: Float32, dense: Float32) -> float:
        batch = self.batch(bags, labels, dense)
        embeddings = self.client.lookup(number, batch, True)
        loss, _, gradient = self.step.train(batch, embeddings)
        self.client.push(number, gradient.numpy())
        return loss

    def rows(self, training: bool = False) -> list[Float32]:
        """[vocabulary, dim] of each slot, by a lookup of every sign alone; unknown ones are zeros unless created by `training`."""
        alone: Bags = [[[i] for i in range(VOCABULARY)] for _ in COLUMNS]
        batch = self.batch(alone, np.zeros(VOCABULARY, np.float32), np.zeros((VOCABULARY, DENSE_WIDTH), np.float32))
        pooled = self.client.lookup(-1, batch, training)
        return np.split(pooled, self.placement.columns[1:], axis=1)

    def accumulators(self) -> list[Float32]:
        """Adagrad's sums of squares, [vocabulary, dim] of each slot."""
        found = {}
        for shard in self.shards:
            for rows in shard.rows():
                at = {int(sign): row for sign, row in zip(rows.signs, rows.state, strict=True)}
                found[rows.slot.name] = np.stack([at[int(sign)] for sign in self.signs[int(rows.slot.name[1:])]])
        return [found[f"s{k}"] for k in range(len(COLUMNS))]


@contextmanager
def trained_by_flowps(slots: list[Slot], signs: Uint64, num_shards: int) -> Iterator[Flowps]:
    flowps = Flowps(slots, signs, num_shards)
    try:
        yield flowps
    finally:
        flowps.client.close()


class Plain:
    """The model as anybody would write it in TensorFlow."""

    def __init__(self, slots: list[Slot], rows: list[Float32], dense_weights: list[Float32]) -> None:
        self.slots = slots
        self.tables = [keras.Variable(initial) for initial in rows]
        self.dense = [keras.Variable(weight) for weight in dense_weights]
        self.row_optimizers = [
            keras.optimizers.SGD(slot.learning_rate)
            if slot.optimizer == "sgd"
            else keras.optimizers.Adagrad(slot.learning_rate, slot.initial_accumulator, epsilon=1e-7)
            for slot in slots
        ]
        self.optimizer = keras.optimizers.Adam(0.01)
        for optimizer, table in zip(self.row_optimizers, self.tables, strict=True):
            optimizer.build([table])
        self.optimizer.build(self.dense)
        bags = tf.RaggedTensorSpec([None, None], tf.int32)
        signature = [[bags] * len(slots), tf.TensorSpec([None], tf.float32), tf.TensorSpec([None, DENSE_WIDTH], tf.float32)]
        self.compiled = tf.function(self.step, input_signature=signature)

    def train(self, bags: Bags, labels: Float32, dense: Float32) -> float:
        ragged = [tf.ragged.constant(of_slot, tf.int32, ragged_rank=1) for of_slot in bags]
        return float(self.compiled(ragged, tf.constant(labels), tf.constant(dense)))

    def pooled(self, table: Any, pooling: str, bags: Any) -> Any:
        rows = tf.gather(table, bags.values)
        total = tf.math.unsorted_segment_sum(rows, bags.value_rowids(), bags.nrows())
        if pooling == "sum":
            return total
        return total / tf.cast(tf.maximum(bags.row_lengths(), 1), tf.float32)[:, None]

    def step(self, bags: list[Any], labels: Any, dense: Any) -> Any:
        with tf.GradientTape() as tape:
            vectors = [
                self.pooled(table.value, slot.pooling, of_slot)
                for table, slot, of_slot in zip(self.tables, self.slots, bags, strict=True)
            ]
            x = tf.concat([*vectors, dense], axis=1)
            for kernel, bias in zip(self.dense[:-2:2], self.dense[1:-2:2], strict=True):
                x = tf.nn.relu(x @ kernel.value + bias.value)
            logits = (x @ self.dense[-2].value + self.dense[-1].value)[:, 0]
            loss = keras.losses.BinaryCrossentropy(from_logits=True)(labels, logits)
        gradients = tape.gradient(loss, [*(v.value for v in self.tables), *(v.value for v in self.dense)])
        for optimizer, gradient, table in zip(self.row_optimizers, gradients, self.tables, strict=False):
            # Dense, so that the slices of a repeated sign are summed: Keras 3 squares each slice on its own.
            optimizer.apply([tf.convert_to_tensor(gradient)], [table])
        self.optimizer.apply(gradients[len(self.tables) :], self.dense)
        return loss

    def accumulators(self) -> list[Float32]:
        return [np.array(optimizer.variables[-1]) for optimizer in self.row_optimizers]


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_fifty_steps_equal_plain_tensorflow(optimizer: dict[str, Any], num_shards: int):
    keras.utils.set_random_seed(2)
    rng = np.random.default_rng(2)
    slots, signs = make_slots(optimizer), make_signs()
    with trained_by_flowps(slots, signs, num_shards) as only_read:
        initial = only_read.rows(training=True)
    assert all(0.1 < np.abs(rows).max() < 0.3 for rows in initial)
    with trained_by_flowps(slots, signs, num_shards) as flowps:
        plain = Plain(slots, initial, flowps.step.model.get_weights())
        seen = np.zeros((len(COLUMNS), VOCABULARY), bool)
        for number in range(STEPS):
            # The last batch of an epoch is smaller.
            bags, labels, dense = draw(rng, SIZE if number % 5 < 4 else 3)
            for of_slot, slot in zip(seen, bags, strict=True):
                of_slot[[i for bag in slot for i in bag]] = True
            assert flowps.train(number, bags, labels, dense) == pytest.approx(plain.train(bags, labels, dense), abs=TOLERANCE)
            for k, (found, table) in enumerate(zip(flowps.rows(), plain.tables, strict=True)):
                expected = np.where(seen[k][:, None], table.numpy(), 0)
                np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE, err_msg=f"step {number}, slot {k}")
        assert seen.all()
        for found, table, then in zip(flowps.rows(), plain.tables, initial, strict=True):
            assert np.abs(found - then).max() > 100 * TOLERANCE, "or this test would show nothing"
            np.testing.assert_allclose(found, table.numpy(), rtol=0, atol=TOLERANCE)
        for found, variable in zip(flowps.step.model.get_weights(), plain.dense, strict=True):
            np.testing.assert_allclose(found, variable.numpy(), rtol=0, atol=TOLERANCE)
        if slots[0].optimizer == "adagrad":
            for found, expected in zip(flowps.accumulators(), plain.accumulators(), strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=TOLERANCE)


def test_a_batch_of_empty_bags_trains_the_dense_part_and_no_row():
    keras.utils.set_random_seed(2)
    slots, signs = make_slots(OPTIMIZERS["adagrad"]), make_signs()
    empty: Bags = [[[] for _ in range(SIZE)] for _ in COLUMNS]
    _, labels, dense = draw(np.random.default_rng(3), SIZE)
    with trained_by_flowps(slots, signs, 3) as flowps:
        initial = flowps.rows(training=True)
        flowps.client.push(-1, np.zeros((VOCABULARY, flowps.placement.width), np.float32))
        plain = Plain(slots, initial, flowps.step.model.get_weights())
        for number in range(5):
            assert flowps.train(number, empty, labels, dense) == pytest.approx(plain.train(empty, labels, dense), abs=TOLERANCE)
        for found, then in zip(flowps.rows(), initial, strict=True):
            np.testing.assert_array_equal(found, then)
        for found, variable in zip(flowps.step.model.get_weights(), plain.dense, strict=True):
            np.testing.assert_allclose(found, variable.numpy(), rtol=0, atol=TOLERANCE)


def test_one_shard_and_three_give_the_same_run():
    losses, rows = [], []
    for num_shards in (1, 3):
        keras.utils.set_random_seed(2)
        rng = np.random.default_rng(4)
        with trained_by_flowps(make_slots(OPTIMIZERS["adagrad"]), make_signs(), num_shards) as flowps:
            losses.append([flowps.train(number, *draw(rng, SIZE)) for number in range(10)])
            rows.append(flowps.rows())
    assert losses[0] == losses[1]
    for one, three in zip(*rows, strict=True):
        np.testing.assert_array_equal(one, three)

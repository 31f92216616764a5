"""The rival of `bench.rival` in Keras and TensorFlow: one `tf.function` is a step, which touches only the rows of its batch."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bench.rival_reader import Samples, Shape
from flowps.batch import Float32
from flowps.config import SlotDefault

_ROWS_AT_ONCE = 1 << 20


class Rival:
    """See `bench.rival`. The first weights are drawn as flowps draws them, from another generator."""

    def __init__(self, shape: Shape, model: str, hidden: tuple[int, ...], knobs: SlotDefault, precision: str, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        self._slots, self._dim, self._knobs = len(shape.slots), knobs.dim, knobs
        self.table = self._drawn(shape.num_rows)
        # Epsilon is under the root, as in Keras, and so is part of the first sum of squares.
        self.squares = tf.Variable(tf.fill(self.table.shape, knobs.initial_accumulator + knobs.epsilon), trainable=False)
        self.net = _net(self._slots, knobs.dim, len(shape.dense), model, hidden, precision)
        self._adam = keras.optimizers.Adam(1e-3)
        self._adam.build(self.net.trainable_variables)
        whole, dense = tf.TensorSpec((None,), tf.int32), tf.TensorSpec((None, len(shape.dense)), tf.float32)
        labels = tf.TensorSpec((None,), tf.float32)
        self._train = tf.function(self._step, input_signature=[whole, whole, dense, labels])
        self._predict = tf.function(self._logits, input_signature=[whole, whole, dense])

    def prepare(self, samples: Samples) -> tuple[Any, ...]:
        """A batch as tensors: rows, the vector to which each is added, dense columns, labels."""
        segments = np.repeat(np.arange(len(samples.offsets) - 1, dtype=np.int32), np.diff(samples.offsets))
        return tuple(tf.constant(array) for array in (samples.rows, segments, samples.dense, samples.labels))

    def train(self, batch: tuple[Any, ...]) -> float:
        """Take one step; its loss."""
        return float(self._train(*batch))

    def predict(self, batch: tuple[Any, ...]) -> Float32:
        """The logits."""
        logits: Float32 = self._predict(*batch[:3]).numpy()
        return logits

    def _drawn(self, num_rows: int) -> tf.Variable:
        """The table, without a second one beside it while it is drawn."""
        table = tf.Variable(tf.zeros((num_rows, self._dim)), trainable=False)
        scale = self._knobs.init_scale
        for first in range(0, num_rows, _ROWS_AT_ONCE):
            last = min(first + _ROWS_AT_ONCE, num_rows)
            table[first:last].assign(tf.random.uniform((last - first, self._dim), -scale, scale))
        return table

    def _logits(self, rows: Any, segments: Any, dense: Any) -> Any:
        vectors = tf.gather(self.table, rows)  # what takes no variable would copy all of it
        return self.net([self._pooled(vectors, tf.range(tf.size(rows)), segments, tf.shape(dense)[0]), dense], training=False)

    def _pooled(self, vectors: Any, at: Any, segments: Any, size: Any) -> Any:
        """The sums [size, slots, dim] of `vectors[at]`, in order of `segments`."""
        pooled = tf.sparse.segment_sum(vectors, at, segments, num_segments=size * self._slots)
        return tf.reshape(pooled, (size, self._slots, self._dim))

    def _step(self, rows: Any, segments: Any, dense: Any, labels: Any) -> Any:
        distinct, at = tf.unique(rows)
        vectors = tf.gather(self.table, distinct)
        with tf.GradientTape() as tape:
            tape.watch(vectors)
            logits = self.net([self._pooled(vectors, at, segments, tf.size(labels)), dense], training=True)
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))
        of_vectors, *of_net = tape.gradient(loss, [vectors, *self.net.trainable_variables])
        # Gathered, computed and put back: a fifth of the time of ResourceSparseApplyAdagradV2, which goes row by row.
        squares = tf.gather(self.squares, distinct) + tf.square(of_vectors)
        vectors -= self._knobs.learning_rate * of_vectors * tf.math.rsqrt(squares)
        for variable, updates in ((self.squares, squares), (self.table, vectors)):
            tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=distinct, updates=updates)
        self._adam.apply(of_net, self.net.trainable_variables)
        return loss


def _net(slots: int, dim: int, dense_width: int, model: str, hidden: tuple[int, ...], precision: str) -> keras.Model:
    """Pooled vectors and dense columns → logits [n]."""
    layers = keras.layers
    pooled, dense = keras.Input((slots, dim)), keras.Input((dense_width,))
    x = layers.Concatenate(dtype=precision)([layers.Flatten(dtype=precision)(pooled), dense])
    deep = x
    for units in hidden:
        deep = layers.Dense(units, activation="relu", dtype=precision)(deep)
    logits = layers.Dense(1, use_bias=model == "dnn")(deep)
    if model == "deepfm":
        of_sums = keras.ops.square(keras.ops.sum(pooled, axis=1))
        products = 0.5 * keras.ops.sum(of_sums - keras.ops.sum(keras.ops.square(pooled), axis=1), axis=1, keepdims=True)
        logits = logits + layers.Dense(1)(x) + products
    return keras.Model([pooled, dense], keras.ops.reshape(logits, (-1,)))

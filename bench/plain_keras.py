"""The built-in models in plain Keras, with all embedding rows in one variable: what `bench.quality` compares flowps with.

Written from the papers; shares no code with flowps. Takes the knobs of a run: files, label and batches, model and net, dim and
pooling, rates and warm-up; rows are drawn uniformly and learn by Adagrad, dense weights by Adam.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow as tf
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from flowps.config import Config, Net

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


# --- samples in memory ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Samples as row numbers; row 0 is no value's, and stays zero.

    names      of the pooled slots
    labels     float32 [n]
    rows       int32: of sample after sample, and in a sample of pooled slot after pooled slot
    lengths    int32 [n, pooled slots]: how many of them there are
    sequences  int32 [n, max_len] of each slot with pooling none: its first rows, 0 after the last
    """

    names: tuple[str, ...]
    labels: Float32
    rows: Int32
    lengths: Int32
    sequences: dict[str, Int32]

    def batches(self, size: int, order: NDArray[np.int64]) -> Iterator[tuple[Any, ...]]:
        """Rows, the segment (sample and slot) of each, sequences and labels, of `size` samples after `size`; the last has fewer."""
        counts = self.lengths.sum(axis=1, dtype=np.int64)
        starts, slots = np.cumsum(counts) - counts, self.lengths.shape[1]
        for first in range(0, len(order), size):
            at = order[first : first + size]
            ends = np.cumsum(counts[at])
            places = np.arange(ends[-1]) + np.repeat(starts[at] - (ends - counts[at]), counts[at])
            segments = np.repeat(np.arange(len(at) * slots, dtype=np.int32), self.lengths[at].reshape(-1))
            yield self.rows[places], segments, {name: rows[at] for name, rows in self.sequences.items()}, self.labels[at]


@functools.lru_cache(1)  # for the next seed
def read(train: str, test: str, label: str, max_lens: tuple[tuple[str, int], ...]) -> tuple[Samples, Samples, int]:
    """The samples of two files, and the number of rows: one for each value of each column of the first, and row 0 for others.

    max_lens   the slots with pooling none, and how many values they keep of a sample
    """
    tables, keep, num_rows = [pq.read_table(path) for path in (train, test)], dict(max_lens), 1
    names = [name for name in tables[0].column_names if name != label]
    rows: dict[str, list[Int32]] = {}
    counts: dict[str, list[Int32]] = {}
    for name in names:
        columns = [table[name].combine_chunks() for table in tables]
        is_list = pa.types.is_list(columns[0].type)
        values = [pc.list_flatten(column) if is_list else column for column in columns]
        vocabulary = pc.unique(values[0])
        numbers = [pc.fill_null(pc.index_in(of, vocabulary), -num_rows).to_numpy() for of in values]
        rows[name] = [of + np.int32(num_rows) for of in numbers]
        counts[name] = [pc.list_value_length(of).to_numpy() if is_list else np.ones(len(of), np.int32) for of in columns]
        num_rows += len(vocabulary)
    pooled = tuple(name for name in names if name not in keep)
    samples = [
        Samples(
            pooled,
            table[label].to_numpy().astype(np.float32),
            *_joined([rows[name][at] for name in pooled], [counts[name][at] for name in pooled]),
            {name: _padded(rows[name][at], counts[name][at], max_len) for name, max_len in max_lens},
        )
        for at, table in enumerate(tables)
    ]
    return samples[0], samples[1], num_rows


def _padded(rows: Int32, counts: Int32, width: int) -> Int32:
    """The first `width` rows of each sample, zeros after the last."""
    at = np.arange(width)
    places = (np.cumsum(counts) - counts)[:, None] + at
    return np.where(at < counts[:, None], rows[np.minimum(places, len(rows) - 1)], 0).astype(np.int32)


def _joined(rows: list[Int32], counts: list[Int32]) -> tuple[Int32, Int32]:
    """Slot after slot → sample after sample."""
    lengths = np.stack(counts, axis=1)
    ends = np.cumsum(lengths.reshape(-1)).reshape(lengths.shape)
    joined = np.empty(ends[-1, -1], np.int32)
    for slot, (of_slot, count) in enumerate(zip(rows, counts, strict=True)):
        first = np.cumsum(count) - count
        joined[np.arange(len(of_slot)) + np.repeat(ends[:, slot] - count - first, count)] = of_slot
    return joined, lengths


POOLS = {"sum": tf.sparse.segment_sum, "mean": tf.sparse.segment_mean, "sqrtn": tf.sparse.segment_sqrt_n}


# --- training -------------------------------------------------------------------------------------------------------------


class Trainer:
    """A model, and the rows of all slots in one variable: [num_rows, dim], drawn uniformly from ±init_scale, but for row 0.

    A row that a batch does not have gets a gradient of zero, which leaves it and its sum of squares as they are: Keras's Adagrad of
    the whole variable is that of the rows that were touched.
    """

    def __init__(self, config: Config, samples: Samples, num_rows: int) -> None:
        keras.utils.set_random_seed(config.seed)
        knobs = config.slot_default
        drawn = np.random.default_rng(config.seed).uniform(-knobs.init_scale, knobs.init_scale, (num_rows, knobs.dim))
        drawn[0] = 0
        self.rows = keras.Variable(drawn, dtype="float32", name="rows")
        slots, max_lens = len(samples.names), {name: rows.shape[1] for name, rows in samples.sequences.items()}
        self.model = keras_model(config.model, config.net, knobs.dim, samples.names, max_lens)
        warmup_steps = config.trainer.warmup_steps
        self._adam = keras.optimizers.Adam(_rising(config.trainer.learning_rate, warmup_steps))
        rate = _rising(knobs.learning_rate, warmup_steps)
        self._adagrad = keras.optimizers.Adagrad(rate, knobs.initial_accumulator, knobs.epsilon)
        self._adam.build(self.model.trainable_variables)
        self._adagrad.build([self.rows])
        index = tf.TensorSpec((None,), tf.int32)
        signature = [index, index, {name: tf.TensorSpec((None, None), tf.int32) for name in max_lens}]
        self._slots, self._pool = slots, POOLS[knobs.pooling]
        self._step = tf.function(self._train, input_signature=[*signature, tf.TensorSpec((None,), tf.float32)])
        self._predict = tf.function(self._forward, input_signature=[*signature, tf.TensorSpec((), tf.int32)])

    def train(self, batch: tuple[Any, ...]) -> None:
        """Take one step, with a batch of `Samples.batches`."""
        self._step(*batch)

    def predict(self, batch: tuple[Any, ...]) -> Float32:
        """The logits of a batch."""
        logits: Float32 = self._predict(*batch[:3], len(batch[3])).numpy()
        return logits

    def _forward(self, rows: Any, segments: Any, sequences: dict[str, Any], size: Any) -> Any:
        table = self.rows.value
        pooled = self._pool(table, rows, segments, num_segments=size * self._slots)
        masks = {name: of > 0 for name, of in sequences.items()}
        # Zeros come of row 0, whose gradient the mask takes away.
        vectors = {name: tf.where(masks[name][:, :, None], tf.gather(table, of), 0.0) for name, of in sequences.items()}
        return self.model([tf.reshape(pooled, (size, self._slots, table.shape[1])), vectors, masks])

    def _train(self, rows: Any, segments: Any, sequences: dict[str, Any], labels: Any) -> None:
        with tf.GradientTape() as tape:
            logits = self._forward(rows, segments, sequences, tf.size(labels))
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))
        of_rows, *dense = tape.gradient(loss, [self.rows.value, *self.model.trainable_variables])
        self._adagrad.apply([tf.convert_to_tensor(of_rows)], [self.rows])
        self._adam.apply(dense, self.model.trainable_variables)


def _rising(rate: float, steps: int) -> Any:
    """From rate / steps at the first step to `rate` after so many steps, and that from there on."""
    return keras.optimizers.schedules.PolynomialDecay(rate / steps, steps - 1, rate) if steps > 1 else rate


def test_auc(config: Config) -> float:
    """What `config.epochs` of shuffled samples come to; the files are the first of `data.train` and of `data.test`."""
    max_lens = tuple((slot.name, slot.max_len) for slot in config.slot if slot.pooling == "none")
    train, test, num_rows = read(config.data.train[0], config.data.test[0], config.data.label, max_lens)
    trainer = Trainer(config, train, num_rows)
    for epoch in range(config.epochs):
        order = np.arange(len(train.labels))
        if config.data.shuffle:
            order = np.random.default_rng([config.seed, epoch]).permutation(order)
        for batch in train.batches(config.data.batch_size, order):
            trainer.train(batch)
    logits = [trainer.predict(batch) for batch in test.batches(config.data.batch_size, np.arange(len(test.labels)))]
    return float(roc_auc_score(test.labels, np.concatenate(logits)))


# --- models ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vectors:
    """What a model is made of, as Keras tensors.

    pooled     [batch, slot, dim] of the slots `names`
    sequences  [batch, max_len, dim] of each slot with pooling none, zeros where a sample has no more values
    masks      [batch, max_len]: where it has
    """

    names: tuple[str, ...]
    pooled: Any
    sequences: dict[str, Any]
    masks: dict[str, Any]

    @property
    def flat(self) -> Any:
        """The pooled ones side by side."""
        return keras.layers.Flatten()(self.pooled)


def lr(v: Vectors, net: Net) -> Any:
    """A weight for each value (dim 1), and a bias (McMahan et al. 2013)."""
    return Bias()(keras.ops.sum(v.pooled, axis=(1, 2))[:, None])


def dnn(v: Vectors, net: Net) -> Any:
    """The deep part of the next one."""
    return keras.layers.Dense(1)(_mlp(v.flat, net))


def wide_deep(v: Vectors, net: Net) -> Any:
    """Cheng et al. 2016, eq. 3; the wide weights are a projection of the vectors, here and in what follows."""
    return keras.layers.Dense(1)(v.flat) + _weighed(_mlp(v.flat, net))


def fm(v: Vectors, net: Net) -> Any:
    """Rendle 2010, eq. 1, with the sum over pairs as it stands there."""
    return keras.layers.Dense(1)(v.flat) + keras.ops.sum(_products(v.pooled), axis=1, keepdims=True)


def deepfm(v: Vectors, net: Net) -> Any:
    """Guo et al. 2017, eq. 1-4."""
    return fm(v, net) + _weighed(_mlp(v.flat, net))


def dcn(v: Vectors, net: Net) -> Any:
    """Wang et al. 2021 (DCN V2), eq. 1 with full matrices, beside the deep network."""
    x = x0 = v.flat
    for _ in range(net.cross_layers):
        x = x0 * keras.layers.Dense(x0.shape[1])(x) + x
    return keras.layers.Dense(1)(keras.ops.concatenate([x, _mlp(x0, net)], axis=1))


def xdeepfm(v: Vectors, net: Net) -> Any:
    """Lian et al. 2018, eq. 6, 8 and 9, without an activation."""
    x, sums = v.pooled, []
    for maps in net.cin:
        products = keras.ops.einsum("bid,bjd->bdij", x, v.pooled)
        products = keras.layers.Reshape((x.shape[2], -1))(products)
        x = keras.ops.transpose(keras.layers.Dense(maps, use_bias=False)(products), (0, 2, 1))
        sums.append(keras.ops.sum(x, axis=2))
    return keras.layers.Dense(1)(v.flat) + _weighed(keras.ops.concatenate(sums, axis=1)) + _weighed(_mlp(v.flat, net))


def autoint(v: Vectors, net: Net) -> Any:
    """Song et al. 2019, eq. 5-8, with a deep network (AutoInt+)."""
    x = v.pooled
    for _ in range(net.attention_layers):
        heads = []
        for _ in range(net.attention_heads):
            query, key, value = (keras.layers.Dense(net.attention_dim, use_bias=False)(x) for _ in range(3))
            shares = keras.ops.softmax(keras.ops.einsum("bsd,btd->bst", query, key))
            heads.append(keras.ops.einsum("bst,btd->bsd", shares, value))
        joined = keras.ops.concatenate(heads, axis=2)
        x = keras.ops.relu(joined + keras.layers.Dense(joined.shape[2], use_bias=False)(x))
    return keras.layers.Dense(1)(keras.layers.Flatten()(x)) + _weighed(_mlp(v.flat, net))


def dlrm(v: Vectors, net: Net) -> Any:
    """Naumov et al. 2019, without dense columns."""
    return keras.layers.Dense(1)(_mlp(_products(v.pooled), net))


def din(v: Vectors, net: Net) -> Any:
    """Zhou et al. 2018, eq. 3, with ReLU; the activation unit sees h, t, h - t and h * t."""
    target, interests = v.pooled[:, v.names.index(net.target)], []
    for name, history in v.sequences.items():
        t = target[:, None] + keras.ops.zeros_like(history)
        x = keras.ops.concatenate([history, t, history - t, history * t], axis=2)
        for units in net.activation_unit:
            x = keras.layers.Dense(units, activation="relu")(x)
        weights = keras.layers.Dense(1)(x)[:, :, 0] * keras.ops.cast(v.masks[name], "float32")
        interests.append(keras.ops.einsum("bl,bld->bd", weights, history))
    return keras.layers.Dense(1)(_mlp(keras.ops.concatenate([v.flat, *interests], axis=1), net))


def keras_model(model: str, net: Net, dim: int, names: tuple[str, ...], max_lens: Mapping[str, int]) -> keras.Model:
    """A model that takes what `Vectors` has, as three arguments, and gives logits [batch]."""
    pooled = keras.Input((len(names), dim))
    sequences = {name: keras.Input((max_len, dim)) for name, max_len in max_lens.items()}
    masks = {name: keras.Input((max_len,), dtype="bool") for name, max_len in max_lens.items()}
    logits = MODELS[model](Vectors(names, pooled, sequences, masks), net)
    return keras.Model([pooled, sequences, masks], keras.ops.reshape(logits, (-1,)))


class Bias(keras.layers.Layer):
    """x + b."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """See Keras."""
        self.bias = self.add_weight(shape=(1,), initializer="zeros")

    def call(self, inputs: Any) -> Any:
        """See Keras."""
        return inputs + self.bias


def _mlp(x: Any, net: Net) -> Any:
    for units in net.hidden:
        x = keras.layers.Dense(units, activation="relu")(x)
    return x


def _weighed(x: Any) -> Any:
    """One more term of a logit that has its bias elsewhere."""
    return keras.layers.Dense(1, use_bias=False)(x)


def _products(vectors: Any) -> Any:
    """The dot product of every pair of slots, [batch, pairs]."""
    first, second = np.triu_indices(vectors.shape[1], k=1)
    return keras.ops.sum(keras.ops.take(vectors, first, axis=1) * keras.ops.take(vectors, second, axis=1), axis=2)


MODELS: dict[str, Callable[[Vectors, Net], Any]] = {
    model.__name__: model for model in (lr, dnn, wide_deep, fm, deepfm, dcn, xdeepfm, autoint, dlrm, din)
}

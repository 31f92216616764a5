"""`Forward`: a model's predictions: a batch and its embeddings as tensors where the model runs, and the logits of them.

Changes nothing. Runs where TensorFlow puts it: on a GPU when it sees one. `stage` may be called by any thread, `predict` by one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from flowps.batch import Batch, Float32, Int32
from flowps.errors import CheckpointError, ModelError
from flowps.trainer.models import ModelSpec

_ALIGNMENT = 64  # bytes; Eigen's on machines with AVX-512, and enough on all others
_ALIKE = np.ones(1, np.float32)  # the weights of samples that all weigh the same


class Forward:
    """Of `model`, as `models.build` returns it.

    jit_compile     compile with XLA; a batch of another size compiles again
    negative_rate   share of the negative samples that the model was trained on: its odds are 1 / negative_rate too high, which
                    `predict` takes back (He et al., "Practical lessons from predicting clicks on ads at Facebook", ADKDD 2014,
                    section 6.3)
    """

    def __init__(self, model: keras.Model, spec: ModelSpec, jit_compile: bool = False, negative_rate: float = 1.0) -> None:
        self.model = model
        self.tasks = len(spec.labels)
        self._keys = list(spec.widths())
        self._sequences = [(at, slot.max_len) for at, slot in enumerate(spec.slots) if slot.max_len]
        self._shift = np.float32(math.log(negative_rate))
        self._gpu = next((device.name for device in tf.config.list_logical_devices("GPU")), None)
        self.signature = [
            tf.TensorSpec((None, spec.width), tf.float32),
            tf.TensorSpec((None, spec.dense_width), tf.float32),
            tf.TensorSpec((None, len(spec.sequences)), tf.int32),
            tf.TensorSpec((None,) if self.tasks == 1 else (None, self.tasks), tf.float32),
            tf.TensorSpec((None,), tf.float32),
        ]
        """Of what `stage` gives: embeddings, dense columns, lengths, labels, and weights, one of them where all are 1."""
        # A partial: TensorFlow counts traces by code, and warns of a process that makes one of these after the other.
        self._predict = tf.function(partial(self.logits), input_signature=self.signature[:3], jit_compile=jit_compile)

    def stage(self, batch: Batch, embeddings: Float32) -> tuple[Any, ...]:
        """What a step or prediction of this batch takes, as tensors where it runs; any thread may call it, ahead of the step."""
        weights = _ALIKE if batch.weights is None else batch.weights
        tensors = tuple(_tensor(x) for x in (embeddings, batch.dense, self._lengths(batch), batch.labels, weights))
        if self._gpu is None:
            return tensors
        with tf.device(self._gpu):
            return tuple(tf.identity(x) for x in tensors)

    def predict(self, batch: Batch, embeddings: Float32, inputs: tuple[Any, ...] | None = None) -> Float32:
        """Logits, float32 [size] or, with several labels, [size, labels]; changes nothing. `inputs`: what `stage` gave, if called.

        Raises ModelError when TensorFlow fails, or a logit is NaN or infinite.
        """
        found: Float32 = called(self._predict, batch, *(inputs or self.stage(batch, embeddings))[:3]).numpy()
        if not np.isfinite(found).all():
            raise ModelError("a prediction is NaN or infinite: look for what only the test data hold, and check your model")
        return found + self._shift if self._shift else found

    def logits(self, embeddings: Any, dense: Any, lengths: Any, training: bool = False) -> Any:
        """In a graph: what the model gives, without the correction; float32, shaped as `predict`'s."""
        values = {"embeddings": embeddings, "dense_columns": dense, "lengths": lengths}
        found = tf.cast(self.model({key: values[key] for key in self._keys}, training=training), tf.float32)
        return tf.reshape(found, [-1] if self.tasks == 1 else [-1, self.tasks])

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take the model's variables of a `Step.state`. Raises CheckpointError where they are those of another model."""
        own = {f"model/{place}": variable for place, variable in enumerate(self.model.variables)}
        found = {name: array for name, array in arrays.items() if name.startswith("model/")}
        if {name: array.shape for name, array in found.items()} != {name: tuple(v.shape) for name, v in own.items()}:
            raise CheckpointError(
                f"the dense model of the checkpoint has {len(found)} variables, that of the run's config {len(own)}, or others: "
                "use the checkpoint's model and net settings, and the same version of your own model"
            )
        for name, variable in own.items():
            variable.assign(found[name])

    def _lengths(self, batch: Batch) -> Int32:
        """How many vectors each sequence of each sample has, int32 [size, sequences]."""
        found = np.empty((batch.size, len(self._sequences)), np.int32)
        for k, (slot, max_len) in enumerate(self._sequences):
            found[:, k] = np.minimum(np.diff(batch.offsets[slot * batch.size : (slot + 1) * batch.size + 1]), max_len)
        return found


def called(function: Any, batch: Batch, *inputs: Any) -> Any:
    """What a TensorFlow function gives for a batch. Raises ModelError where it fails."""
    try:
        return function(*inputs)
    except tf.errors.OpError as error:
        raise _failed(error, batch) from error


def _tensor(array: NDArray[Any]) -> Any:
    """A tensor of the array's values; of its memory where TensorFlow can use that: nobody may write to it while the tensor lives.

    `convert_to_tensor` always copies, and holds the GIL meanwhile: 1.2 ms for the embeddings of a `criteo` batch.
    """
    # Memory that does not start on a cache line aborts the process: TensorFlow does not look.
    if array.size and array.ctypes.data % _ALIGNMENT == 0 and array.flags.c_contiguous and array.flags.writeable:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.convert_to_tensor(array)


def _failed(error: Exception, batch: Batch) -> ModelError:
    """What TensorFlow says, without the graph and the stack it says it with."""
    lines = str(getattr(error, "message", error)).splitlines()
    start = max((i + 1 for i, line in enumerate(lines) if line.startswith(("  File ", "Graph execution error"))), default=0)
    said = " ".join(" ".join(lines[start:]).split())[:400]
    return ModelError(
        f"the model failed in TensorFlow on a batch of {batch.size} samples: {type(error).__name__}: {said}; "
        "check your model, or lower data.batch_size if memory ran out"
    )

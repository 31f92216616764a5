"""`Step`: one TensorFlow step, compiled once: forward, loss, backward, dense weights updated, the embeddings' gradient out.

Runs where TensorFlow puts it: on a GPU when it sees one. Called by the trainer's thread only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from flowps.batch import Batch, Float32, Int32
from flowps.errors import CheckpointError, ConfigError, ModelError
from flowps.trainer.models import ModelSpec

_LEAST_SCALE = 2.0**-10  # of losses, as float16 needs it to be large
_ALIGNMENT = 64  # bytes; Eigen's on machines with AVX-512, and enough on all others


class Step:
    """Steps of `model` with the binary cross-entropy of its logits, averaged over the batch.

    Parameters
    ----------
    model : as `models.build` returns it.
    optimizer : any Keras optimizer by name, for the dense weights.
    jit_compile : compile with XLA; a batch of another size compiles again.
    loss_scaling : keep float16 gradients from becoming 0 (Micikevicius et al., "Mixed Precision Training", 2018): a step whose
        scaled gradients overflow is left out, counted in `left_out`, and its embeddings' gradient is 0.

    Raises ConfigError for an unknown optimizer and ModelError for a model that TensorFlow cannot trace.
    """

    def __init__(
        self, model: keras.Model, spec: ModelSpec, optimizer: str, learning_rate: float, jit_compile: bool,
        loss_scaling: bool = False,
    ) -> None:  # fmt: skip
        self.model = model
        self.left_out = 0
        self.spoiled = False
        """Whether a step gave NaN or infinity, so that the dense weights are of no use."""
        self._keys = list(spec.widths())
        self._sequences = [(at, slot.max_len) for at, slot in enumerate(spec.slots) if slot.max_len]
        self._variables = model.trainable_variables
        try:
            self._optimizer = keras.optimizers.get({"class_name": optimizer, "config": {"learning_rate": learning_rate}})
        except Exception as error:
            raise ConfigError(
                f"trainer.optimizer: Keras has no optimizer {optimizer!r} that takes a learning rate: {error}"
            ) from None
        loss_scaling = loss_scaling and bool(self._variables)  # it is the optimizer that finds the scale
        if loss_scaling:
            self._optimizer = keras.optimizers.LossScaleOptimizer(self._optimizer)
        self._optimizer.build(self._variables)
        self._learning_rate, self._rate_scale = learning_rate, 1.0
        self._jit_compile, self._loss_scaling = jit_compile, loss_scaling
        self._gpu = next((device.name for device in tf.config.list_logical_devices("GPU")), None)
        self._signature = signature = [
            tf.TensorSpec((None, spec.width), tf.float32),
            tf.TensorSpec((None, spec.dense_width), tf.float32),
            tf.TensorSpec((None, len(spec.sequences)), tf.int32),
            tf.TensorSpec((None,), tf.float32),
        ]
        self._train = tf.function(self._train_step, input_signature=signature, jit_compile=jit_compile)
        self._predict = tf.function(self._forward, input_signature=signature[:3], jit_compile=jit_compile)
        try:
            self._train.get_concrete_function()
        except Exception as error:  # it is the user's model that is traced here
            raise ModelError(f"the model cannot be trained by TensorFlow: {type(error).__name__}: {error}") from error

    def stage(self, batch: Batch, embeddings: Float32) -> tuple[Any, ...]:
        """What a step of this batch takes, as tensors where the step runs; any thread may call it, ahead of the step."""
        tensors = tuple(_tensor(x) for x in (embeddings, batch.dense, self._lengths(batch), batch.labels))
        if self._gpu is None:
            return tensors
        with tf.device(self._gpu):
            return tuple(tf.identity(x) for x in tensors)

    def train(
        self, batch: Batch, embeddings: Float32, rate_scale: float = 1.0, inputs: tuple[Any, ...] | None = None
    ) -> tuple[float, Float32, Any]:  # fmt: skip
        """Take one step, with `rate_scale` times the learning rate. `inputs`: what `stage` gave for the batch, if it was called.

        Returns the loss, the logits before it (float32 [size]), and the embeddings' gradient as a tensor [size, width].

        Raises ModelError when TensorFlow fails in the model, and when the loss or any gradient is NaN or infinite: the dense
        weights are then `spoiled` and the gradient must not be pushed.
        """
        self._set_rate(rate_scale)
        loss, finite, logits, gradient = self._called(self._train, batch, *(inputs or self.stage(batch, embeddings)))
        found = self._judge(float(loss), bool(finite))
        return found, logits.numpy(), gradient if finite else tf.zeros_like(gradient)

    def predict(self, batch: Batch, embeddings: Float32, inputs: tuple[Any, ...] | None = None) -> Float32:
        """Logits, float32 [size]; changes nothing. Raises ModelError when TensorFlow fails, or one is NaN or infinite."""
        found: Float32 = self._called(self._predict, batch, *(inputs or self.stage(batch, embeddings))[:3]).numpy()
        if not np.isfinite(found).all():
            raise ModelError("a prediction is NaN or infinite: look for what only the test data hold, and check your model")
        return found

    def state(self) -> dict[str, NDArray[Any]]:
        """A copy of all variables, of the model and of its optimizer, by name."""
        return {name: np.array(variable) for name, variable in self._state_variables()}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take the variables that `state` gave. Raises CheckpointError where they are those of another model or optimizer."""
        own = dict(self._state_variables())
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        wanted = {name: tuple(variable.shape) for name, variable in own.items()}
        differ = [name for name in {**wanted, **shapes} if shapes.get(name) != wanted.get(name)]
        if differ:
            first = differ[0]
            raise CheckpointError(
                f"the dense model or its optimizer is another one: variable {first}"
                f"{f' ({own[first].path})' if first in own else ''} has shape {shapes.get(first, 'none')} in the checkpoint, "
                f"{wanted.get(first, 'none')} in this run ({len(differ)} differ); use the checkpoint's model, net.hidden and "
                "trainer.optimizer, or start a new run"
            )
        for name, variable in own.items():
            variable.assign(arrays[name])

    def adopt(self, arrays: Mapping[str, NDArray[Any]]) -> str:
        """Take those variables of another model that have the same place and shape here; in words, which. Optimizers begin anew."""
        own = {name: variable for name, variable in self._state_variables() if name.startswith("model/")}
        fit = [name for name, variable in own.items() if name in arrays and arrays[name].shape == tuple(variable.shape)]
        for name in fit:
            own[name].assign(arrays[name])
        others = [variable.path for name, variable in own.items() if name not in fit]
        rest = f"; these begin anew: {', '.join(others[:5])}{' …' * (len(others) > 5)}" if others else ""
        return f"{len(fit)} of {len(own)} dense variables are taken over{rest}"

    def _state_variables(self) -> Iterator[tuple[str, Any]]:
        """By their places in the lists of the model and its optimizer: Keras numbers the names of layers through the process."""
        for kind, variables in (("model", self.model.variables), ("optimizer", self._optimizer.variables)):
            for place, variable in enumerate(variables):
                yield f"{kind}/{place}", variable

    def _set_rate(self, rate_scale: float) -> None:
        if rate_scale != self._rate_scale:
            self._optimizer.learning_rate = self._learning_rate * rate_scale
            self._rate_scale = rate_scale

    def _called(self, function: Any, batch: Batch, *inputs: Any) -> Any:
        try:
            return function(*inputs)
        except tf.errors.OpError as error:
            raise _failed(error, batch) from error

    def _judge(self, loss: float, finite: bool) -> float:
        """The loss, unless the step has spoiled the model."""
        if finite:
            return loss
        # The optimizer has left the step out and halves the scale: until gradients of this model could not be told from 0.
        if self._loss_scaling and np.isfinite(loss) and float(self._optimizer.dynamic_scale) > _LEAST_SCALE:
            self.left_out += 1
            return loss
        self.spoiled = True
        what = "the gradients became NaN or infinite" if np.isfinite(loss) else f"the loss became {loss}"
        raise ModelError(
            f"{what}: the model or its weights gave NaN or infinity; lower trainer.learning_rate "
            "or the slots' learning_rate, scale large dense columns (data.log1p), or check your model"
        )

    def _lengths(self, batch: Batch) -> Int32:
        """How many vectors each sequence of each sample has, int32 [size, sequences]."""
        found = np.empty((batch.size, len(self._sequences)), np.int32)
        for k, (slot, max_len) in enumerate(self._sequences):
            found[:, k] = np.minimum(np.diff(batch.offsets[slot * batch.size : (slot + 1) * batch.size + 1]), max_len)
        return found

    def _inputs(self, embeddings: Any, dense: Any, lengths: Any) -> dict[str, Any]:
        values = {"embeddings": embeddings, "dense_columns": dense, "lengths": lengths}
        return {key: values[key] for key in self._keys}

    def _forward(self, embeddings: Any, dense: Any, lengths: Any, training: bool = False) -> Any:
        return tf.cast(tf.reshape(self.model(self._inputs(embeddings, dense, lengths), training=training), [-1]), tf.float32)

    def _gradients(self, embeddings: Any, dense: Any, lengths: Any, labels: Any, weight: Any) -> tuple[Any, Any, Any, list[Any]]:
        """Objective times `weight`, logits, and the gradients of embeddings and variables, times the loss scale if there is one."""
        with tf.GradientTape() as tape:
            tape.watch(embeddings)
            logits = self._forward(embeddings, dense, lengths, training=True)
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits))
            # Regularisers that a custom model's layers ask for.
            objective = (loss + tf.add_n(self.model.losses) if self.model.losses else loss) * weight
            scaled = self._optimizer.scale_loss(objective) if self._loss_scaling else objective
        gradient, *gradients = tape.gradient(
            scaled, [embeddings, *self._variables], unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return objective, logits, gradient, gradients

    def _train_step(self, embeddings: Any, dense: Any, lengths: Any, labels: Any) -> tuple[Any, Any, Any, Any]:
        objective, logits, gradient, gradients = self._gradients(embeddings, dense, lengths, labels, 1.0)
        if self._loss_scaling:  # before the optimizer changes the scale
            gradient = gradient / self._loss_scale()
        # Not the loss alone: a ReLU turns NaN into 0 on a CPU, so that NaN shows in the gradients only.
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(x)) for x in (objective, gradient, *gradients)])
        if self._variables:
            self._optimizer.apply(self._left_out_unless(finite, gradients), self._variables)
        return objective, finite, logits, gradient

    def _left_out_unless(self, finite: Any, gradients: list[Any]) -> list[Any]:
        """With loss scaling the optimizer looks at its gradients, and must leave out what is not finite elsewhere in the step."""
        if not self._loss_scaling:
            return gradients
        return [tf.where(finite, of, np.nan) for of in gradients]

    def _loss_scale(self) -> Any:
        return tf.cast(self._optimizer.dynamic_scale, tf.float32) if self._loss_scaling else 1.0


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

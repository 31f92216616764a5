"""`Step`: one TensorFlow step, compiled once: forward, loss, backward, dense weights updated, the embeddings' gradient out.

Runs where TensorFlow puts it: on a GPU when it sees one. Called by the trainer's thread only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from flowps.batch import Batch, Float32
from flowps.errors import CheckpointError, ConfigError, ModelError
from flowps.trainer.adam import FusedAdam
from flowps.trainer.forward import Forward, called
from flowps.trainer.models import ModelSpec

_LEAST_SCALE = 2.0**-10  # of losses, as float16 needs it to be large


class Step:
    """Steps of `model` with the binary cross-entropy of its logits times the sample's weight, averaged over the batch.

    With several labels it is the sum of theirs.

    Parameters
    ----------
    model : as `models.build` returns it.
    optimizer : any Keras optimizer by name, for the dense weights.
    jit_compile : compile with XLA; a batch of another size compiles again.
    loss_scaling : keep float16 gradients from becoming 0 (Micikevicius et al., "Mixed Precision Training", 2018): a step whose
        scaled gradients overflow is left out, counted in `left_out`, and its embeddings' gradient is 0.
    clips : of the dense gradients, as Keras's optimizers name them: clipnorm, global_clipnorm or clipvalue.
    negative_rate : see Forward.

    Raises ConfigError for an unknown optimizer and for several clips, and ModelError for a model that TensorFlow cannot trace.
    """

    def __init__(
        self, model: keras.Model, spec: ModelSpec, optimizer: str, learning_rate: float, jit_compile: bool,
        loss_scaling: bool = False, clips: Mapping[str, float] = MappingProxyType({}), negative_rate: float = 1.0,
    ) -> None:  # fmt: skip
        self.model = model
        self.left_out = 0
        self.spoiled = False
        """Whether a step gave NaN or infinity, so that the dense weights are of no use."""
        self._forward = Forward(model, spec, jit_compile, negative_rate)
        self._variables = model.trainable_variables
        if len(clips) > 1:
            raise ConfigError(
                f"trainer.clip_norm, trainer.clip_global_norm and trainer.clip_value: found {len(clips)} of them, expected at most "
                "one: that is what Keras's optimizers take; keep one"
            )
        try:
            config = {"learning_rate": learning_rate, **clips}
            self._optimizer = FusedAdam.instead_of(keras.optimizers.get({"class_name": optimizer, "config": config}))
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
        self._signature = self._forward.signature
        self._train = tf.function(partial(self._train_step), input_signature=self._signature, jit_compile=jit_compile)
        try:
            self._train.get_concrete_function()
        except Exception as error:  # it is the user's model that is traced here
            raise ModelError(f"the model cannot be trained by TensorFlow: {type(error).__name__}: {error}") from error

    def stage(self, batch: Batch, embeddings: Float32) -> tuple[Any, ...]:
        """See Forward."""
        return self._forward.stage(batch, embeddings)

    def train(
        self, batch: Batch, embeddings: Float32, rate_scale: float = 1.0, inputs: tuple[Any, ...] | None = None
    ) -> tuple[float, Float32, Any]:  # fmt: skip
        """Take one step, with `rate_scale` times the learning rate. `inputs`: what `stage` gave for the batch, if it was called.

        Returns the loss, the logits before it (float32 [size], with several labels [size, labels]), and the embeddings' gradient as
        a tensor [size, width].

        Raises ModelError when TensorFlow fails in the model, and when the loss or any gradient is NaN or infinite: the dense
        weights are then `spoiled` and the gradient must not be pushed.
        """
        self._set_rate(rate_scale)
        loss, finite, logits, gradient = called(self._train, batch, *(inputs or self.stage(batch, embeddings)))
        found = self._judge(float(loss), bool(finite))
        return found, logits.numpy(), gradient if finite else tf.zeros_like(gradient)

    def predict(self, batch: Batch, embeddings: Float32, inputs: tuple[Any, ...] | None = None) -> Float32:
        """See Forward."""
        return self._forward.predict(batch, embeddings, inputs)

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

    def _gradients(
        self, embeddings: Any, dense: Any, lengths: Any, labels: Any, weights: Any, weight: Any
    ) -> tuple[Any, Any, Any, list[Any]]:
        """Objective times `weight`, logits, and the gradients of embeddings and variables, times the loss scale if there is one."""
        with tf.GradientTape() as tape:
            tape.watch(embeddings)
            logits = self._forward.logits(embeddings, dense, lengths, training=True)
            losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)
            if self._forward.tasks > 1:
                losses = tf.reduce_sum(losses, axis=1)
            loss = tf.reduce_mean(losses * weights)
            # Regularisers that a custom model's layers ask for.
            objective = (loss + tf.add_n(self.model.losses) if self.model.losses else loss) * weight
            scaled = self._optimizer.scale_loss(objective) if self._loss_scaling else objective
        gradient, *gradients = tape.gradient(
            scaled, [embeddings, *self._variables], unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return objective, logits, gradient, gradients

    def _train_step(self, embeddings: Any, dense: Any, lengths: Any, labels: Any, weights: Any) -> tuple[Any, Any, Any, Any]:
        objective, logits, gradient, gradients = self._gradients(embeddings, dense, lengths, labels, weights, 1.0)
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

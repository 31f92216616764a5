"""`GroupStep`: one TensorFlow step of several trainers: each has a batch, or none any more, and all take the same dense update.

The loss is the mean over the samples of all trainers, so N trainers with batches of B step like one with a batch of N·B. What is
added up, in one collective per step: the gradients, the loss, how many samples each trainer brought, who wants to stop, and all
labels and logits, so that every trainer knows the quality of the whole step. Called by the trainer's thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from flowps.batch import Batch, Float32
from flowps.trainer.forward import called
from flowps.trainer.group import Group
from flowps.trainer.step import Step

_STEP_KEY, _WEIGHTS_KEY, _STATE_KEY, METRICS_KEY = 1, 2, 3, 4  # of collectives, each of one shape
_NONE = np.empty(0, np.float32)
_VOTES = 2  # for a stop, for a cut


@dataclass(frozen=True)
class Joint:
    """What came of a step of all trainers.

    labels, logits   of all samples of the step; none: no trainer had a batch any more, and no step was taken
    gradient         of this trainer's embeddings, a tensor; None if it had no batch
    stop, cut        whether any trainer asks to stop, or for a cut
    """

    loss: float
    labels: Float32
    logits: Float32
    gradient: Any
    stop: bool
    cut: bool


class GroupStep(Step):
    """Steps of `group`. Batches have at most `batch_size` samples. The other parameters are Step's."""

    def __init__(self, *of_step: Any, group: Group, batch_size: int, **more: Any) -> None:
        self._group, self._batch_size = group, batch_size
        super().__init__(*of_step, **more)
        self._sizes = [int(np.prod(variable.shape)) for variable in self._variables]
        self._tasks = self._forward.tasks
        self._length = sum(self._sizes) + 2 + _VOTES + group.size * (1 + 2 * batch_size * self._tasks)
        self._local = tf.function(partial(self._local_step), input_signature=self._signature, jit_compile=self._jit_compile)
        self._sum = tf.function(
            lambda flat: group.sum(flat, _STEP_KEY), input_signature=[tf.TensorSpec((self._length,), tf.float32)]
        )
        self._apply = tf.function(partial(self._apply_step), input_signature=[tf.TensorSpec((self._length,), tf.float32)])
        self._scaled = tf.function(
            lambda gradient, weight: gradient / weight / self._loss_scale(),
            input_signature=[self._signature[0], tf.TensorSpec((), tf.float32)],
        )

    def train_together(self, batch: Batch | None, inputs: Any, rate_scale: float, stop: bool, cut: bool = False) -> Joint:
        """Take a step with everyone, with a batch or without one; none is taken when no trainer has one.

        inputs   of `batch`, as `stage` gives them
        stop     ask all to stop after it
        cut      ask all for a cut, once nothing is in flight

        Raises what Step.train raises, and what Group.guarded raises.
        """
        self._set_rate(rate_scale)
        group, most = self._group, self._batch_size
        head = np.zeros(_VOTES + group.size, np.float32)
        head[:_VOTES] = stop, cut
        of_samples = (2, group.size, most) if self._tasks == 1 else (2, group.size, most, self._tasks)
        rest = np.zeros(of_samples, np.float32)
        if batch is None:
            gradient, flat = None, tf.zeros(sum(self._sizes) + 2)
        else:
            head[_VOTES + group.number] = batch.size
            flat, gradient, logits = called(self._local, batch, *inputs)
            rest[0, group.number, : batch.size] = batch.labels
            rest[1, group.number, : batch.size] = logits.numpy()
        summed = group.guarded(self._sum, tf.concat([flat, head, rest.reshape(-1)], 0))
        tail = summed.numpy()[sum(self._sizes) :]
        stop, cut = (bool(votes > 0) for votes in tail[2 : 2 + _VOTES])
        tail_of_samples = tail[2 + _VOTES :]
        sizes = np.rint(tail_of_samples[: group.size]).astype(np.int64)
        samples = int(sizes.sum())
        if not samples:
            return Joint(0.0, _NONE, _NONE, None, stop, cut)
        labels, logits = tail_of_samples[group.size :].reshape(of_samples)
        took = [np.concatenate([of[k, :n] for k, n in enumerate(sizes)]) for of in (labels, logits)]
        if gradient is not None:
            gradient = self._scaled(gradient, samples / most)
        finite = bool(self._apply(summed)) and not tail[1]
        loss = self._judge(float(tail[0]) * most / samples, finite)
        if gradient is not None and not finite:
            gradient = tf.zeros_like(gradient)
        return Joint(loss, took[0], took[1], gradient, stop, cut)

    def share_weights(self) -> None:
        """Begin with trainer 0's weights everywhere, whatever a model has drawn for itself."""
        first = self._group.number == 0
        self._share(self.model.variables, lambda flat: self._group.add(flat if first else np.zeros_like(flat), _WEIGHTS_KEY))

    def share_state(self) -> None:
        """Give every trainer the mean of what layers have learned beside weights, as batch normalisation does."""
        self._share(self.model.non_trainable_variables, lambda flat: self._group.add(flat, _STATE_KEY) / self._group.size)

    @staticmethod
    def _share(variables: Sequence[Any], agreed: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> None:
        floats = [v for v in variables if v.dtype.startswith("float")]
        if not floats:
            return
        flat = np.concatenate([np.asarray(v).reshape(-1) for v in floats]).astype(np.float64)
        ends = np.cumsum([int(np.prod(v.shape)) for v in floats])
        for variable, part in zip(floats, np.split(agreed(flat), ends[:-1]), strict=True):
            variable.assign(part.reshape(variable.shape))

    def _local_step(self, embeddings: Any, dense: Any, lengths: Any, labels: Any, weights: Any) -> tuple[Any, Any, Any]:
        """This trainer's part: means over its samples, weighed by how many of `batch_size` there are."""
        weight = tf.cast(tf.shape(labels)[0], tf.float32) / self._batch_size
        objective, logits, gradient, gradients = self._gradients(embeddings, dense, lengths, labels, weights, weight)
        flat = [tf.reshape(tf.cast(of, tf.float32), [-1]) for of in gradients]
        # The others do not see the embeddings' gradient, and must know of NaN and infinity in it.
        unsound = 1.0 - tf.cast(tf.reduce_all(tf.math.is_finite(gradient)), tf.float32)
        return tf.concat([*flat, [objective, unsound]], 0), gradient, logits

    def _apply_step(self, summed: Any) -> Any:
        first = sum(self._sizes) + 2 + _VOTES
        weight = tf.reduce_sum(summed[first : first + self._group.size]) / self._batch_size
        parts = tf.split(summed[: sum(self._sizes)] / weight, self._sizes) if self._sizes else []
        gradients = [tf.reshape(part, v.shape) for part, v in zip(parts, self._variables, strict=True)]
        if gradients:
            sound = summed[sum(self._sizes) + 1] == 0
            self._optimizer.apply(self._left_out_unless(sound, gradients), self._variables)
        return tf.reduce_all(tf.math.is_finite(summed))

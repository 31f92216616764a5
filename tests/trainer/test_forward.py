"""Predictions: the model's logits, with what training on fewer negatives did to them taken back; and whose variables they are."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import expit

from flowps.batch import Batch, Float32
from flowps.errors import CheckpointError, ModelError
from flowps.trainer.forward import Forward
from flowps.trainer.models import ModelSpec, build
from flowps.trainer.step import Step
from tests.trainer.test_step import SPEC, make

LABELS = ("click", "buy", "call")
SEVERAL = ModelSpec.of(["a", "b"], [2, 2], 3, (5,), labels=LABELS)
SEQUENCE = ModelSpec.of(["item", "seen"], [2, 2], 1, (5,), [0, 3])


def make_model(name: str = "dnn", spec: ModelSpec = SPEC) -> keras.Model:
    return build(name, spec, seed=4)


def by_hand(model: keras.Model, batch: Batch, embeddings: Float32) -> Float32:
    """The model's own answer, [size, labels]."""
    return np.asarray(model({"embeddings": embeddings, "dense_columns": batch.dense}, training=False))


def test_logits_are_those_of_the_model():
    model, (batch, embeddings) = make_model(), make()
    found = Forward(model, SPEC).predict(batch, embeddings)
    assert (found.dtype, found.shape) == (np.float32, (8,))
    np.testing.assert_allclose(found, by_hand(model, batch, embeddings)[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["shared_bottom", "mmoe"])
def test_with_several_labels_there_is_a_column_for_each(name: str):
    model, (batch, embeddings) = make_model(name, SEVERAL), make(spec=SEVERAL)
    forward = Forward(model, SEVERAL)
    found = forward.predict(batch, embeddings)
    assert (forward.tasks, found.dtype, found.shape) == (3, np.float32, (8, 3))
    np.testing.assert_allclose(found, by_hand(model, batch, embeddings), rtol=1e-5, atol=1e-6)
    assert len({tuple(column) for column in found.T}) == 3


@pytest.mark.parametrize("rate", [0.5, 0.1, 1e-4])
def test_the_odds_are_multiplied_by_the_share_of_negatives_that_was_trained(rate: float):
    """Section 6.3 of the paper: q = p / (p + (1 - p) / w)."""
    model, (batch, embeddings) = make_model(), make()
    plain = expit(by_hand(model, batch, embeddings)[:, 0].astype(np.float64))
    found = expit(Forward(model, SPEC, negative_rate=rate).predict(batch, embeddings).astype(np.float64))
    np.testing.assert_allclose(found, plain / (plain + (1 - plain) / rate), rtol=1e-4)
    assert (found < plain).all()


def test_the_correction_is_of_predictions_alone():
    """Training goes on with what the model gives, and `logits` is what a serving model or a step has of it."""
    batch, embeddings = make()
    steps = [Step(make_model(), SPEC, "sgd", 0.1, False, negative_rate=rate) for rate in (1.0, 0.1)]
    np.testing.assert_allclose(
        steps[1].predict(batch, embeddings), steps[0].predict(batch, embeddings) + math.log(0.1), rtol=1e-5, atol=1e-5
    )
    (loss, logits, gradient), (other_loss, other_logits, other_gradient) = (step.train(batch, embeddings) for step in steps)
    assert loss == other_loss
    np.testing.assert_array_equal(logits, other_logits)
    np.testing.assert_array_equal(gradient, other_gradient)
    forward = Forward(make_model(), SPEC, negative_rate=0.1)
    inputs = forward.stage(batch, embeddings)
    np.testing.assert_allclose(
        forward.logits(*inputs[:3]), by_hand(forward.model, batch, embeddings)[:, 0], rtol=1e-5, atol=1e-6
    )  # fmt: skip


def test_what_was_staged_is_what_is_predicted_from():
    forward, (batch, embeddings) = Forward(make_model(), SPEC), make()
    inputs = forward.stage(batch, embeddings)
    np.testing.assert_array_equal(
        forward.predict(batch, np.full_like(embeddings, np.nan), inputs), forward.predict(batch, embeddings)
    )


def test_staged_are_labels_and_weights_too():
    batch, embeddings = make(spec=SEVERAL)
    forward = Forward(make_model("mmoe", SEVERAL), SEVERAL)
    labels = np.random.default_rng(0).integers(0, 2, (8, 3)).astype(np.float32)
    weights = np.arange(8, dtype=np.float32)
    many = Batch(labels, batch.dense, batch.signs, batch.offsets, weights=weights)
    staged = forward.stage(many, embeddings)
    assert [tuple(x.shape) for x in staged] == [(8, 4), (8, 3), (8, 0), (8, 3), (8,)]
    np.testing.assert_array_equal(staged[3], labels)
    np.testing.assert_array_equal(staged[4], weights)
    assert np.asarray(forward.stage(batch, embeddings)[4]).tolist() == [1.0], "where all are 1 there is one for all"
    for tensor, wanted in zip(staged, forward.signature, strict=True):
        assert wanted.is_compatible_with(tensor)


def test_lengths_of_sequences_are_at_most_their_max_len():
    lengths = [[1, 1, 1, 1], [0, 2, 3, 5]]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int32)
    batch = Batch(np.zeros(4, np.float32), np.zeros((4, 1), np.float32), np.zeros(offsets[-1], np.uint64), offsets)
    forward = Forward(make_model(spec=SEQUENCE), SEQUENCE)
    assert np.asarray(forward.stage(batch, np.zeros((4, SEQUENCE.width), np.float32))[2]).tolist() == [[0], [2], [3], [3]]


def test_a_batch_of_another_size_is_predicted_without_tracing_again():
    model = make_model()
    forward = Forward(model, SPEC)
    for size in (8, 1, 13):
        batch, embeddings = make(size=size)
        assert forward.predict(batch, embeddings).shape == (size,)
    assert forward._predict.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_prediction_that_is_not_finite_is_refused(value: float):
    batch, embeddings = make()
    embeddings[3, 1] = value
    with pytest.raises(ModelError, match=r"a prediction is NaN or infinite: look for what only the test data hold, and check"):
        Forward(make_model("lr"), SPEC).predict(batch, embeddings)


def test_nothing_changes():
    model, (batch, embeddings) = make_model(), make()
    before = [weight.copy() for weight in model.get_weights()], embeddings.copy()
    Forward(model, SPEC, negative_rate=0.5).predict(batch, embeddings)
    for now, then in zip(model.get_weights(), before[0], strict=True):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_array_equal(embeddings, before[1])


# --- restoring --------------------------------------------------------------------------------------------------------


def test_the_variables_of_a_step_are_restored_and_its_optimizers_are_left_alone():
    step, (batch, embeddings) = Step(make_model(), SPEC, "adam", 0.1, False), make()
    for _ in range(3):
        step.train(batch, embeddings)
    forward = Forward(build("dnn", SPEC, seed=9), SPEC)
    wanted = step.predict(batch, embeddings)
    assert not np.allclose(forward.predict(batch, embeddings), wanted)
    state = step.state()
    assert any(name.startswith("optimizer/") for name in state)
    forward.restore(state)
    np.testing.assert_array_equal(forward.predict(batch, embeddings), wanted)
    for name, array in step.state().items():
        np.testing.assert_array_equal(array, state[name])


def test_variables_that_are_not_trained_are_restored_too():
    def normal() -> keras.Model:
        inputs = SPEC.inputs()
        return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.BatchNormalization()(SPEC.concatenated(inputs))))

    step, (batch, embeddings) = Step(normal(), SPEC, "sgd", 0.1, False), make()
    step.train(batch, embeddings)
    forward = Forward(normal(), SPEC)
    forward.restore(step.state())
    np.testing.assert_array_equal(forward.predict(batch, embeddings), step.predict(batch, embeddings))


@pytest.mark.parametrize(
    "other",
    [ModelSpec.of(["a", "b"], [2, 2], 3, hidden) for hidden in ((6,), (5, 5), ())],
    ids=["wider", "deeper", "shallower"],
)
def test_variables_of_another_model_are_refused_and_none_is_taken(other: ModelSpec):
    forward = Forward(make_model(), SPEC)
    before: list[Any] = [weight.copy() for weight in forward.model.get_weights()]
    with pytest.raises(CheckpointError) as refusal:
        forward.restore(Step(make_model(spec=other), other, "sgd", 0.1, False).state())
    assert f"that of the run's config {len(before)}, or others" in str(refusal.value)
    assert "use the checkpoint's model and net settings, and the same version of your own model" in str(refusal.value)
    for now, then in zip(forward.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_model_that_tensorflow_cannot_run_is_said_in_a_line():
    class Few(keras.layers.Layer):
        def call(self, x):
            with tf.control_dependencies([tf.debugging.assert_less(tf.shape(x)[0], 5, message="too many")]):
                return tf.identity(x)

    inputs = SPEC.inputs()
    forward = Forward(keras.Model(inputs, keras.layers.Dense(1)(Few()(inputs["embeddings"]))), SPEC)
    with pytest.raises(ModelError, match=r"^the model failed in TensorFlow on a batch of 7 samples: .*too many.* check your model"):
        forward.predict(*make(size=7))

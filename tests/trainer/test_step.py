"""One step: loss, gradient and dense update against TensorFlow written out, and what it refuses."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from flowps.batch import Batch, Float32
from flowps.errors import ConfigError, ModelError
from flowps.trainer.models import ModelSpec, build
from flowps.trainer.step import Step

SPEC = ModelSpec.of(["a", "b"], [2, 2], 3, (5,))


def make(size: int = 8, spec: ModelSpec = SPEC, seed: int = 0) -> tuple[Batch, Float32]:
    """A batch (its signs do not matter here) and its embeddings."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, size).astype(np.float32)
    dense = rng.normal(size=(size, spec.dense_width)).astype(np.float32)
    offsets = np.zeros(len(spec.slots) * size + 1, np.int32)
    return Batch(labels, dense, np.empty(0, np.uint64), offsets), rng.normal(size=(size, spec.width)).astype(np.float32)


def make_step(name: str = "dnn", optimizer: str = "sgd", rate: float = 0.1, spec: ModelSpec = SPEC, jit: bool = False) -> Step:
    keras.utils.set_random_seed(1)
    return Step(build(name, spec), spec, optimizer, rate, jit)


def weights_of(step: Step) -> list[Float32]:
    """Copies: what Keras returns may be the variables' own memory."""
    return [weight.copy() for weight in step.model.get_weights()]


def called(model: keras.Model) -> keras.Model:
    """As `build` leaves a subclass: called once, so that it has its weights."""
    model({"embeddings": tf.zeros((3, SPEC.width)), "dense_columns": tf.zeros((3, SPEC.dense_width))})
    return model


class Counted(keras.Model):
    """A linear model that counts its Python calls: once for each trace."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = keras.layers.Dense(1)
        self.calls: list[bool] = []

    def call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        self.calls.append(training)
        return self.linear(inputs["embeddings"])


def test_the_learning_rate_is_scaled_for_a_step():
    """Half the rate moves the dense weights half as far; the next step without a scale goes the whole way again."""
    moved = []
    for scales in ((1.0,), (0.5,), (0.0, 1.0)):
        step = make_step()
        before = weights_of(step)
        for scale in scales:
            step.train(*make(), scale)
        moved.append(np.concatenate([(after - b).ravel() for after, b in zip(weights_of(step), before, strict=True)]))
    np.testing.assert_allclose(moved[1], moved[0] / 2, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(moved[2], moved[0], rtol=1e-4, atol=1e-7)


# --- what a step does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True], ids=["plain", "XLA"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_loss_logits_gradient_and_weights_are_tensorflows(optimizer: str, jit: bool):
    step = make_step(optimizer=optimizer, jit=jit)
    twin = build("dnn", SPEC)
    twin.set_weights(step.model.get_weights())
    twin_optimizer = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}[optimizer](0.1)
    for seed in range(3):
        batch, embeddings = make(seed=seed)
        found, found_logits, found_gradient = step.train(batch, embeddings)
        pooled = tf.Variable(embeddings)
        with tf.GradientTape() as tape:
            logits = twin({"embeddings": pooled, "dense_columns": tf.constant(batch.dense)})[:, 0]
            p = tf.sigmoid(logits)
            loss = -tf.reduce_mean(batch.labels * tf.math.log(p) + (1 - batch.labels) * tf.math.log(1 - p))
        gradient, *gradients = tape.gradient(loss, [pooled, *twin.trainable_variables])
        twin_optimizer.apply(gradients, twin.trainable_variables)
        assert found == pytest.approx(float(loss), rel=1e-5)
        # Steps of 0.1 from moments that are rounded otherwise.
        np.testing.assert_allclose(found_logits, logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found_gradient, gradient, rtol=1e-4, atol=1e-6)
        for weight, expected in zip(step.model.get_weights(), twin.get_weights(), strict=True):
            np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-5)


def test_what_tensorflow_refuses_is_said_in_a_line():
    class Few(keras.layers.Layer):
        def call(self, x):
            with tf.control_dependencies([tf.debugging.assert_less(tf.shape(x)[0], 5, message="too many")]):
                return tf.identity(x)

    inputs = SPEC.inputs()
    step = Step(keras.Model(inputs, keras.layers.Dense(1)(Few()(inputs["embeddings"]))), SPEC, "sgd", 0.1, False)
    step.train(*make(size=4))
    for call in (step.train, step.predict):
        with pytest.raises(ModelError, match=r"^the model failed in TensorFlow on a batch of 7 samples: ") as caught:
            call(*make(size=7))
        assert "InvalidArgumentError: " in str(caught.value)
        assert "too many" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700
    assert not step.spoiled


def test_types_and_shapes_of_what_comes_out():
    batch, embeddings = make(size=7)
    loss, logits, gradient = make_step().train(batch, embeddings)
    assert type(loss) is float
    assert (logits.dtype, logits.shape) == (np.float32, (7,))
    assert (gradient.numpy().dtype, gradient.numpy().shape) == (np.float32, (7, SPEC.width))


def test_the_inputs_are_not_changed():
    batch, embeddings = make()
    before = embeddings.copy(), batch.dense.copy(), batch.labels.copy()
    make_step().train(batch, embeddings)
    for now, then in zip((embeddings, batch.dense, batch.labels), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_predict_gives_the_logits_and_changes_nothing():
    step = make_step()
    batch, embeddings = make(size=7)
    before = weights_of(step)
    logits = step.predict(batch, embeddings)
    assert (logits.dtype, logits.shape) == (np.float32, (7,))
    np.testing.assert_array_equal(logits, step.predict(batch, embeddings))
    for now, then in zip(weights_of(step), before, strict=True):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_allclose(logits, step.train(batch, embeddings)[1], rtol=1e-5, atol=1e-6)


def test_training_and_predicting_tell_the_model_which():
    model = called(Counted())
    model.calls.clear()
    step = Step(model, SPEC, "sgd", 0.1, False)
    step.train(*make())
    step.predict(*make())
    assert model.calls == [True, False]


@pytest.mark.parametrize("spec", [ModelSpec.of(["a"], [3], 0, (4,)), ModelSpec.of([], [], 3, (4,))], ids=["no dense", "no slots"])
@pytest.mark.parametrize("name", ["dnn", "deepfm", "lr"])
def test_without_dense_columns_or_slots(name: str, spec: ModelSpec):
    step = make_step(name, spec=spec)
    batch, embeddings = make(spec=spec)
    found = [step.train(batch, embeddings) for _ in range(30)]
    assert found[-1][0] < found[0][0]
    assert found[0][2].shape == (8, spec.width)


def test_a_regulariser_of_the_model_enters_loss_and_weights():
    def linear(regularizer: keras.Regularizer | None) -> keras.Model:
        inputs = SPEC.inputs()
        x = keras.layers.concatenate(list(inputs.values()))
        return keras.Model(inputs, keras.layers.Dense(1, kernel_regularizer=regularizer)(x))

    batch, embeddings = make()
    plain, regular = (Step(linear(kind), SPEC, "sgd", 0.1, False) for kind in (None, keras.regularizers.L2(0.5)))
    kernel, bias = weights_of(plain)
    regular.model.set_weights([kernel, bias])
    plain_loss, plain_logits, plain_gradient = plain.train(batch, embeddings)
    loss, logits, gradient = regular.train(batch, embeddings)
    assert loss == pytest.approx(plain_loss + 0.5 * (kernel**2).sum(), rel=1e-5)
    np.testing.assert_allclose(logits, plain_logits, rtol=1e-6)
    np.testing.assert_allclose(gradient, plain_gradient, rtol=1e-6)
    np.testing.assert_allclose(weights_of(regular)[0], weights_of(plain)[0] - 0.1 * kernel, rtol=1e-4, atol=1e-6)


def test_a_model_that_ignores_the_embeddings_has_a_gradient_of_zeros():
    class DenseOnly(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.linear = keras.layers.Dense(1)

        def call(self, inputs: dict[str, Any]) -> Any:
            return self.linear(inputs["dense_columns"])

    _, _, gradient = Step(called(DenseOnly()), SPEC, "sgd", 0.1, False).train(*make())
    np.testing.assert_array_equal(gradient, np.zeros((8, SPEC.width)))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_model_without_trainable_weights_still_gives_gradients(optimizer: str):
    class Sum(keras.Model):
        def call(self, inputs: dict[str, Any]) -> Any:
            return keras.ops.sum(inputs["embeddings"], axis=1, keepdims=True)

    batch, embeddings = make()
    step = Step(called(Sum()), SPEC, optimizer, 0.1, False)
    for _ in range(2):
        _, logits, gradient = step.train(batch, embeddings)
    np.testing.assert_allclose(logits, embeddings.sum(axis=1), rtol=1e-5)
    expected = (1 / (1 + np.exp(-logits)) - batch.labels) / batch.size
    np.testing.assert_allclose(gradient, np.repeat(expected[:, None], SPEC.width, axis=1), rtol=1e-5)


def test_frozen_weights_stay():
    model = build("dnn", SPEC)
    model.trainable = False
    step = Step(model, SPEC, "adam", 0.1, False)
    before = weights_of(step)
    _, _, gradient = step.train(*make())
    for now, then in zip(weights_of(step), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert np.abs(gradient).max() > 0


def test_the_batch_size_may_change_without_tracing_again():
    model = called(Counted())
    model.calls.clear()
    step = Step(model, SPEC, "adam", 0.1, False)
    for size in (8, 3, 1, 17, 8):
        batch, embeddings = make(size)
        assert step.train(batch, embeddings)[1].shape == (size,)
        assert step.predict(batch, embeddings).shape == (size,)
    assert len(model.calls) == 2, "traced once for training, once for predicting"


# --- optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "Adam", "sgd", "SGD", "adagrad", "rmsprop", "adamw", "nadam", "ftrl", "lion"])
def test_any_keras_optimizer_by_name_with_the_learning_rate(name: str):
    step = make_step(optimizer=name, rate=0.03)
    assert type(step._optimizer).__name__.lower().removeprefix("fused") == name.lower()
    assert float(step._optimizer.learning_rate) == pytest.approx(0.03)


# The last one exists in Keras, but cannot be made from a learning rate.
@pytest.mark.parametrize("name", ["adamm", "", "keras.optimizers.Adam", "Dense", "lossscaleoptimizer"])
def test_an_unknown_optimizer_is_refused(name: str):
    with pytest.raises(ConfigError, match=r"^trainer\.optimizer: Keras has no optimizer ") as caught:
        make_step(optimizer=name)
    assert repr(name) in str(caught.value)


# --- what is not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["embeddings", "dense"])
@pytest.mark.parametrize("name", ["lr", "dnn", "deepfm"])
def test_what_is_not_finite_is_refused(name: str, where: str, value: float):
    """Also with ReLU, which turns NaN into 0 on a CPU: the loss stays finite, while weights and rows get NaN gradients."""
    batch, embeddings = make()
    (embeddings if where == "embeddings" else batch.dense)[3, 1] = value
    step = make_step(name)
    # The dense weights of logistic regression begin as zeros.
    step.model.set_weights([np.full_like(weight, -1) if name == "lr" else weight for weight in weights_of(step)])
    with pytest.raises(ModelError, match=r"(nan|NaN|inf)") as caught:
        step.train(batch, embeddings)
    assert "learning_rate" in str(caught.value)
    assert "data.log1p" in str(caught.value)


def test_a_nan_label_is_refused():
    batch, embeddings = make()
    with pytest.raises(ModelError, match="the loss became nan"):
        make_step().train(replace(batch, labels=np.full(8, np.nan, np.float32)), embeddings)


def test_a_diverging_run_ends_in_a_model_error():
    step = make_step(optimizer="sgd", rate=100.0)
    batch, embeddings = make()

    def run() -> None:
        for _ in range(2_000):
            step.train(batch, embeddings * 1e9)

    with pytest.raises(ModelError, match="the loss became"):
        run()


@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_logits_are_finite(sign: int):
    batch, embeddings = make()
    embeddings[:] = sign * 1e4
    loss, logits, gradient = make_step("lr").train(batch, embeddings)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert (np.abs(logits) > 9_000).all()


# --- what is done ahead of a step ---------------------------------------------------------------------------------------

CACHE_LINE = 64


def placed(array: np.ndarray, offset: int = 0) -> np.ndarray:
    """A copy that starts so many bytes behind the beginning of a cache line."""
    room = np.empty(array.nbytes + 2 * CACHE_LINE, np.uint8)
    start = -room.ctypes.data % CACHE_LINE + offset
    found = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    found[...] = array
    assert not array.size or found.ctypes.data % CACHE_LINE == offset
    return found


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def sharing(tensors: Sequence[Any], arrays: Sequence[np.ndarray]) -> list[bool]:
    """Which tensors are the arrays' own memory."""
    return [np.shares_memory(np.asarray(tensor), array) for tensor, array in zip(tensors, arrays, strict=True)]


def trained(step: Step, batch: Batch, embeddings: Float32, inputs: Any = None) -> tuple[float, Float32, Float32, list[Float32]]:
    """All that a step gives, from the same first weights every time."""
    loss, logits, gradient = step.train(batch, embeddings, 1.0, inputs)
    return loss, logits, np.array(gradient), weights_of(step)


def assert_equal(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found[1:3] + tuple(found[3]), expected[1:3] + tuple(expected[3]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found[0] == expected[0]


def test_memory_on_a_cache_line_is_used_as_it_is():
    step, (batch, embeddings) = make_step(), make()
    arrays = [placed(array) for array in (embeddings, batch.dense, batch.labels)]
    embeddings, dense, labels = arrays
    staged = step.stage(replace(batch, dense=dense, labels=labels), embeddings)
    staged_embeddings, staged_dense, lengths, staged_labels, weights = staged
    assert weights.numpy().tolist() == [1]
    assert sharing((staged_embeddings, staged_dense, staged_labels), arrays) == [True] * 3
    for tensor, array in zip((staged_embeddings, staged_dense, staged_labels), arrays, strict=True):
        np.testing.assert_array_equal(tensor, array)
    assert (lengths.shape, lengths.dtype) == ((8, 0), tf.int32)


@pytest.mark.parametrize("jit", [False, True], ids=["plain", "XLA"])
def test_memory_anywhere_else_is_copied(jit: bool):
    """TensorFlow aborts the process for memory that is not where it wants it."""
    size = 64
    batch, embeddings = make(size)
    step = make_step(jit=jit)
    first = weights_of(step)
    expected = trained(step, batch, embeddings)
    for offset in range(4, CACHE_LINE, 4):
        step.model.set_weights(first)
        arrays = [placed(array, offset) for array in (embeddings, batch.dense, batch.labels)]
        there = replace(batch, dense=arrays[1], labels=arrays[2])
        inputs = step.stage(there, arrays[0])
        assert sharing([inputs[k] for k in (0, 1, 3)], arrays) == [False] * 3, offset
        assert_equal(trained(step, there, arrays[0], inputs), expected)


@pytest.mark.parametrize(
    "changed",
    [
        placed,
        lambda array: read_only(placed(array)),
        lambda array: np.repeat(array, 2, axis=0)[::2],
        lambda array: array[::-1].copy()[::-1],
        np.asfortranarray,
    ],
    ids=["on a cache line", "read-only", "every second line", "backwards", "column by column"],
)
def test_arrays_of_any_kind_give_the_same_step(changed: Any):
    step, (batch, embeddings) = make_step(), make()
    first = weights_of(step)
    expected = trained(step, batch, embeddings)
    step.model.set_weights(first)
    there = replace(batch, dense=changed(batch.dense), labels=changed(batch.labels))
    assert_equal(trained(step, there, changed(embeddings), step.stage(there, changed(embeddings))), expected)


@pytest.mark.parametrize(
    "spec", [ModelSpec.of(["a"], [3], 0, (4,)), ModelSpec.of([], [], 3, (4,)), ModelSpec.of(["a"], [2], 1, (4,), [2])]
)
def test_empty_arrays_can_be_staged(spec: ModelSpec):
    step, (batch, embeddings) = make_step(spec=spec), make(spec=spec)
    inputs = step.stage(batch, placed(embeddings))
    assert [tuple(x.shape) for x in inputs] == [(8, spec.width), (8, spec.dense_width), (8, len(spec.sequences)), (8,), (1,)]
    assert np.isfinite(step.train(batch, embeddings, 1.0, inputs)[0])


def test_what_was_staged_keeps_the_memory_it_uses():
    step, (batch, embeddings) = make_step(), make(1000)
    first = weights_of(step)
    expected = trained(step, batch, embeddings)
    step.model.set_weights(first)
    inputs = step.stage(replace(batch, dense=placed(batch.dense), labels=placed(batch.labels)), placed(embeddings))
    gc.collect()
    for _ in range(100):  # would take the memory, had it been given back
        np.full_like(embeddings, np.nan)
    assert_equal(trained(step, batch, embeddings, inputs), expected)


def test_many_threads_may_stage_at_once():
    step = make_step()
    batches = [make(size=16, seed=seed) for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        staged = list(pool.map(lambda of: step.stage(*of), batches))
    for (batch, embeddings), inputs in zip(batches, staged, strict=True):
        np.testing.assert_array_equal(step.predict(batch, embeddings, inputs), step.predict(batch, embeddings))


# --- narrow floats ------------------------------------------------------------------------------------------------------

NARROW = ["mixed_bfloat16", "mixed_float16"]


def make_narrow(precision: str, name: str = "dnn", optimizer: str = "adam", rate: float = 0.02, jit: bool = False) -> Step:
    """A step as the trainer makes it."""
    return Step(build(name, SPEC, precision, 1), SPEC, optimizer, rate, jit, loss_scaling=precision == "mixed_float16")


def scale_of(step: Step) -> float:
    return float(step._optimizer.dynamic_scale)


@pytest.mark.parametrize("jit", [False, True], ids=["plain", "XLA"])
@pytest.mark.parametrize("precision", NARROW)
def test_narrow_floats_train_to_about_the_same_loss(precision: str, jit: bool):
    losses = []
    for of in ("float32", precision):
        step = make_narrow(of, jit=jit)
        losses.append([step.train(*make(32))[0] for _ in range(60)])
        assert step.left_out == 0
    assert losses[1][-1] < losses[1][0] - 0.2
    np.testing.assert_allclose(losses[1], losses[0], atol=0.05)
    assert losses[1] != losses[0]


@pytest.mark.parametrize("name", ["dnn", "deepfm", "lr"])
@pytest.mark.parametrize("precision", NARROW)
def test_what_comes_out_of_narrow_floats_is_float32_and_not_scaled(precision: str, name: str):
    batch, embeddings = make(32)
    wide, narrow = make_narrow("float32", name), make_narrow(precision, name)
    narrow.model.set_weights(weights_of(wide))
    found, expected = (trained(step, batch, embeddings) for step in (narrow, wide))
    assert found[0] == pytest.approx(expected[0], abs=0.01)
    assert (found[1].dtype, found[2].dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(found[1], expected[1], atol=0.05)
    np.testing.assert_allclose(found[2], expected[2], atol=0.02 * np.abs(expected[2]).max())
    assert narrow.predict(batch, embeddings).dtype == np.float32
    assert {weight.dtype for weight in found[3]} == {np.dtype(np.float32)}


def test_a_step_that_overflows_is_left_out_and_the_next_ones_are_taken():
    step, (batch, embeddings) = make_narrow("mixed_float16"), make(32)
    scale, before = scale_of(step), weights_of(step)
    huge = replace(batch, dense=batch.dense * np.float32(1e3))
    loss, logits, gradient = step.train(huge, embeddings)
    assert np.isfinite(loss)
    assert np.isfinite(logits).all()
    assert (step.left_out, step.spoiled) == (1, False)
    np.testing.assert_array_equal(gradient, np.zeros((32, SPEC.width)))
    for now, then in zip(weights_of(step), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert scale_of(step) == scale / 2
    losses = [step.train(batch, embeddings)[0] for _ in range(60)]
    assert losses[-1] < losses[0] - 0.2
    assert step.left_out == 1
    assert np.abs(step.train(batch, embeddings)[2]).max() > 0


def scaled_up(spec: ModelSpec) -> keras.Model:
    """Its embeddings' gradient is a thousand times that of its weights."""
    inputs = spec.inputs()
    x = keras.layers.Rescaling(1000.0)(inputs["embeddings"])
    return keras.Model(inputs, keras.layers.Dense(1, kernel_initializer="ones", dtype="float32")(x))


def test_an_overflow_in_the_embeddings_gradient_alone_lowers_the_scale_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flowps_test_scaled_up", SimpleNamespace(build=scaled_up))
    step, (batch, embeddings) = make_narrow("mixed_float16", "flowps_test_scaled_up:build", rate=1e-4), make(32)
    before, scale = weights_of(step), scale_of(step)
    _, _, gradient = step.train(batch, embeddings * np.float32(1e-3))
    np.testing.assert_array_equal(gradient, np.zeros((32, SPEC.width)))
    for now, then in zip(weights_of(step), before, strict=True):
        np.testing.assert_array_equal(now, then, err_msg="a step is left out as a whole")
    assert scale_of(step) == scale / 2
    for _ in range(15):
        _, _, gradient = step.train(batch, embeddings * np.float32(1e-3))
    assert 1 < step.left_out < 15
    assert np.abs(gradient).max() > 0


def rooted(spec: ModelSpec) -> keras.Model:
    """Finite logits whose gradient is NaN: the root of nothing, times nothing."""
    inputs = spec.inputs()
    x = keras.layers.Dense(2, bias_initializer=keras.initializers.Constant(-50.0))(inputs["embeddings"])
    return keras.Model(inputs, keras.layers.Dense(1)(keras.ops.sqrt(keras.ops.relu(x))))


@pytest.mark.parametrize("precision", ["float32", *NARROW])
def test_a_model_that_always_gives_nan_is_refused_in_the_end(precision: str, monkeypatch: pytest.MonkeyPatch):
    """With loss scaling once the scale is so small that gradients would not be told from 0."""
    monkeypatch.setitem(sys.modules, "flowps_test_rooted", SimpleNamespace(build=rooted))
    step = make_narrow(precision, "flowps_test_rooted:build")

    def run() -> None:
        for _ in range(100):
            step.train(*make())

    with pytest.raises(ModelError, match=r"the gradients became NaN or infinite: .*lower trainer\.learning_rate"):
        run()
    assert step.spoiled
    assert (step.left_out > 10) == (precision == "mixed_float16")


@pytest.mark.parametrize("precision", NARROW)
def test_a_loss_that_is_nan_is_refused_at_once(precision: str):
    batch, embeddings = make()
    step = make_narrow(precision)
    with pytest.raises(ModelError, match="the loss became nan"):
        step.train(replace(batch, labels=np.full(8, np.nan, np.float32)), embeddings)
    assert step.spoiled


# --- weights of samples, several labels -------------------------------------------------------------------------------

SEVERAL = ModelSpec.of(["a", "b"], [2, 2], 3, (5,), labels=("click", "buy"))
WEIGHTS = np.array([0, 1, 0.5, 3, 0, 2, 1, 0.25], np.float32)


def weighted(batch: Batch, weights: Float32 = WEIGHTS) -> Batch:
    return replace(batch, weights=weights)


def make_several(size: int = 8, seed: int = 0) -> tuple[Batch, Float32]:
    """With two labels for each sample."""
    batch, embeddings = make(size, SEVERAL, seed)
    return replace(batch, labels=np.random.default_rng(seed + 50).integers(0, 2, (size, 2)).astype(np.float32)), embeddings


@pytest.mark.parametrize("jit", [False, True], ids=["plain", "XLA"])
def test_a_weighted_loss_is_the_one_keras_compiles(jit: bool):
    """The mean of weight times cross-entropy, over all samples: not over the sum of the weights."""
    step = make_step(rate=0.1, jit=jit)
    twin = build("dnn", SPEC)
    twin.set_weights(step.model.get_weights())
    twin.compile(keras.optimizers.SGD(0.1), keras.losses.BinaryCrossentropy(from_logits=True))
    for seed in range(2):
        batch, embeddings = make(seed=seed)
        found, _, _ = step.train(weighted(batch), embeddings)
        inputs = {"embeddings": embeddings, "dense_columns": batch.dense}
        loss = twin.train_on_batch(inputs, batch.labels[:, None], sample_weight=WEIGHTS)
        assert found == pytest.approx(float(np.asarray(loss).reshape(-1)[0]), rel=1e-5)
        for weight, expected in zip(step.model.get_weights(), twin.get_weights(), strict=True):
            np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_an_embedding_is_weighted_with_its_sample():
    batch, embeddings = make()
    plain, found = make_step(), make_step()
    loss, logits, gradient = plain.train(batch, embeddings)
    weighted_loss, same, of_weighted = found.train(weighted(batch), embeddings)
    np.testing.assert_array_equal(logits, same)
    np.testing.assert_allclose(of_weighted, np.asarray(gradient) * WEIGHTS[:, None], rtol=1e-5, atol=1e-8)
    entropy = np.logaddexp(0, logits.astype(np.float64)) - logits * batch.labels
    assert weighted_loss == pytest.approx(float((entropy * WEIGHTS).mean()), rel=1e-5)
    assert loss == pytest.approx(float(entropy.mean()), rel=1e-5)


def test_a_sample_of_weight_0_is_as_if_it_were_not_there_but_for_the_divisor():
    batch, embeddings = make()
    there = WEIGHTS > 0
    few = Batch(
        batch.labels[there], batch.dense[there], batch.signs, np.zeros(2 * there.sum() + 1, np.int32), weights=WEIGHTS[there]
    )
    all_of, some_of = make_step(), make_step()
    share = np.float32(there.mean())
    loss, _, gradient = all_of.train(weighted(batch), embeddings)
    few_loss, _, of_few = some_of.train(few, np.ascontiguousarray(embeddings[there]), float(share))
    assert loss == pytest.approx(few_loss * share, rel=1e-5)
    np.testing.assert_allclose(np.asarray(gradient)[there], np.asarray(of_few) * share, rtol=1e-4, atol=1e-8)
    assert not np.asarray(gradient)[~there].any()
    for weight, expected in zip(all_of.model.get_weights(), some_of.model.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weights", [np.ones(8, np.float32), np.full(8, 2, np.float32)], ids=["1", "2"])
def test_weights_that_are_all_alike_scale_the_loss(weights: Float32):
    batch, embeddings = make()
    (loss, _, gradient), (other, _, of_other) = (
        make_step().train(batch, embeddings),
        make_step().train(weighted(batch, weights), embeddings),
    )
    assert other == pytest.approx(loss * weights[0], rel=1e-6)
    np.testing.assert_allclose(of_other, np.asarray(gradient) * weights[0], rtol=1e-5, atol=1e-9)


def test_batches_with_and_without_weights_share_a_trace():
    step = make_step()
    batch, embeddings = make()
    for given in (batch, weighted(batch), batch):
        step.train(given, embeddings)
    assert step._train.experimental_get_tracing_count() == 1


@pytest.mark.parametrize(
    ("weights", "jit"), [(None, False), (WEIGHTS, False), (WEIGHTS, True)], ids=["all alike", "weighted", "weighted, XLA"]
)
def test_the_loss_of_several_labels_is_the_sum_of_theirs(weights: Float32 | None, jit: bool):
    step = make_step("mmoe", spec=SEVERAL, jit=jit)
    twin = build("mmoe", SEVERAL)
    twin.set_weights(step.model.get_weights())
    optimizer = keras.optimizers.SGD(0.1)
    for seed in range(2):
        batch, embeddings = make_several(seed=seed)
        found, found_logits, found_gradient = step.train(replace(batch, weights=weights), embeddings)
        pooled = tf.Variable(embeddings)
        with tf.GradientTape() as tape:
            logits = twin({"embeddings": pooled, "dense_columns": tf.constant(batch.dense)})
            p = tf.sigmoid(logits)
            each = -(batch.labels * tf.math.log(p) + (1 - batch.labels) * tf.math.log(1 - p))
            of_sample = each[:, 0] + each[:, 1]
            loss = tf.reduce_mean(of_sample if weights is None else of_sample * weights)
        gradient, *gradients = tape.gradient(loss, [pooled, *twin.trainable_variables])
        optimizer.apply(gradients, twin.trainable_variables)
        assert found == pytest.approx(float(loss), rel=1e-5)
        assert (found_logits.dtype, found_logits.shape) == (np.float32, (8, 2))
        np.testing.assert_allclose(found_logits, logits, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found_gradient, gradient, rtol=1e-4, atol=1e-6)
        for weight, expected in zip(step.model.get_weights(), twin.get_weights(), strict=True):
            np.testing.assert_allclose(weight, expected, rtol=1e-3, atol=1e-5)


def test_a_nan_in_one_of_several_labels_is_refused():
    batch, embeddings = make_several()
    batch.labels[3, 1] = np.nan
    step = make_step("shared_bottom", spec=SEVERAL)
    with pytest.raises(ModelError, match="the loss became nan"):
        step.train(batch, embeddings)
    assert step.spoiled


# --- clips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [False, True], ids=["plain", "loss scaling"])
@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_dense_gradients_are_clipped_as_keras_clips_them(name: str, scaling: bool):
    """Not those of the embeddings: rows have clips of their own. With loss scaling, what is clipped is not scaled."""
    bound, (batch, embeddings) = 0.02, make()
    model = build("dnn", SPEC, seed=1)
    before = [np.asarray(v).copy() for v in model.trainable_variables]
    plain = Step(build("dnn", SPEC, seed=1), SPEC, "sgd", 1.0, False)
    _, _, expected_gradient = plain.train(batch, embeddings)
    gradients = [b - np.asarray(v) for b, v in zip(before, plain.model.trainable_variables, strict=True)]
    norms = [np.linalg.norm(g) for g in gradients]
    assert max(norms) > 2 * bound, "there is something to clip"
    match name:
        case "clipnorm":
            clipped = [g * min(1, bound / norm) if norm else g for g, norm in zip(gradients, norms, strict=True)]
        case "global_clipnorm":
            clipped = [g * min(1, bound / np.linalg.norm(norms)) for g in gradients]
        case _:
            clipped = [np.clip(g, -bound, bound) for g in gradients]
    step = Step(model, SPEC, "sgd", 1.0, False, scaling, clips={name: bound})
    _, _, gradient = step.train(batch, embeddings)
    for then, now, wanted in zip(before, model.trainable_variables, clipped, strict=True):
        np.testing.assert_allclose(then - np.asarray(now), wanted, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def test_two_clips_at_once_are_refused():
    with pytest.raises(ConfigError, match=r"^trainer\.clip_norm, trainer\.clip_global_norm and .*: found 2 of them, .*; keep one$"):
        Step(build("dnn", SPEC), SPEC, "sgd", 0.1, False, clips={"clipnorm": 1.0, "clipvalue": 1.0})

"""Keras models whose `Embedding` layers give way to slots: given the same vectors they give the original's predictions, to the bit
but for the sigmoid; and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import flowps
from flowps.errors import ModelError
from flowps.trainer.models import ModelSpec, build, build_or_read
from flowps.trainer.models.from_keras import from_keras

layers = keras.layers
MASKED = "ignore:Layer '(flatten|global_max_pooling1d).* was passed an input with a mask attached:UserWarning"  # the originals too
IDS = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 7], [9, 9, 1, 0]])
SIZE = len(IDS)


def embedding(name: str, dim: int = 3, ids: int = 10, mask_zero: bool = False) -> keras.layers.Embedding:
    """Whose row of the id 0 is zeros where 0 is padding, as a slot's padding is."""
    layer = layers.Embedding(ids, dim, name=name, mask_zero=mask_zero)
    layer.build()
    weights = np.random.default_rng(len(name)).normal(size=(ids, dim)).astype(np.float32)
    if mask_zero:
        weights[0] = 0
    layer.set_weights([weights])
    return layer


def converted(model: keras.Model, spec: ModelSpec) -> keras.Model:
    return build("converted", spec, function=from_keras(model))


def probabilities(model: keras.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    found: np.ndarray = keras.ops.convert_to_numpy(keras.ops.sigmoid(model(inputs))).reshape(-1)
    return found


def original(model: keras.Model, inputs: Any) -> np.ndarray:
    found: np.ndarray = keras.ops.convert_to_numpy(model(inputs)).reshape(-1)
    return found


# --- the same predictions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("as_dict", [False, True], ids=["list", "dict"])
def test_a_model_with_ids_and_dense_inputs(shape: tuple[int, ...], as_dict: bool) -> None:
    """Shapes () and (1,), inputs in a list or a dict, in another order than the slots."""
    user, item = keras.Input(shape, name="user", dtype="int64"), keras.Input(shape, name="item", dtype="int32")
    price, age = keras.Input((1,), name="price"), keras.Input((), name="age")
    of_user, of_item = embedding("of_user", 4), embedding("of_item", 2)
    vectors = [layers.Reshape((dim,))(of(given)) for of, given, dim in ((of_user, user, 4), (of_item, item, 2))]
    x = layers.concatenate([*vectors, price, layers.Reshape((1,))(age)])
    x = layers.BatchNormalization()(layers.Dense(8, "relu")(x))
    tensors = [price, user, age, item]
    model = keras.Model({t.name: t for t in tensors} if as_dict else tensors, layers.Dense(1, "sigmoid")(x))

    rng = np.random.default_rng(0)
    ids, dense = rng.integers(0, 10, (2, SIZE)), rng.normal(size=(2, SIZE)).astype(np.float32)
    shaped = {"user": ids[0].reshape(-1, *shape), "item": ids[1].reshape(-1, *shape), "price": dense[0][:, None], "age": dense[1]}
    spec = ModelSpec.of(["item", "user"], [2, 4], 3, dense_names=["age", "other", "price"])
    found = converted(model, spec)
    given = {
        "embeddings": np.hstack([of_item.get_weights()[0][ids[1]], of_user.get_weights()[0][ids[0]]]),
        "dense_columns": np.stack([dense[1], np.full(SIZE, 9, np.float32), dense[0]], axis=1),
    }
    wanted = original(model, shaped if as_dict else [shaped[t.name] for t in tensors])
    np.testing.assert_array_equal(probabilities(found, given), wanted)
    assert len(set(wanted.tolist())) == SIZE
    assert not [layer for layer in found.layers if isinstance(layer, keras.layers.Embedding)]


def pooled(x: Any) -> Any:
    return layers.GlobalAveragePooling1D()(x)


def attended(x: Any) -> Any:
    """Finds the mask on the tensor, not in the graph."""
    return layers.Flatten()(layers.MultiHeadAttention(2, 3)(x, x))


LISTS: dict[str, Callable[[Any], Any]] = {
    "average": pooled,
    "max": layers.GlobalMaxPooling1D(),
    "flat": layers.Flatten(),
    "lstm": layers.LSTM(5),
    "gru of gru": lambda x: layers.GRU(4)(layers.GRU(3, return_sequences=True)(x)),
    "attention": attended,
    "dense before": lambda x: pooled(layers.Dense(4, "relu")(layers.Dropout(0.5)(x))),
    "sum of two": lambda x: pooled(layers.Add()([x, layers.Dense(3)(x)])),
}


@pytest.mark.filterwarnings(MASKED)
@pytest.mark.parametrize("mask_zero", [False, True], ids=["", "mask_zero"])
@pytest.mark.parametrize("name", LISTS)
def test_lists_of_ids(name: str, mask_zero: bool) -> None:
    """The vectors of a slot with pooling none; with mask_zero what is behind the last does not count, wherever a mask is used."""
    history, of = keras.Input((4,), name="history", dtype="int32"), embedding("of", mask_zero=mask_zero)
    model = keras.Model(history, layers.Dense(1, "sigmoid")(LISTS[name](of(history))))
    found = converted(model, ModelSpec.of(["history"], [3], 0, max_lens=[4]))
    vectors = of.get_weights()[0][IDS]
    given = {"embeddings": vectors.reshape(SIZE, -1), "lengths": np.count_nonzero(IDS, 1).astype(np.int32)[:, None]}
    wanted = original(model, IDS)
    np.testing.assert_allclose(probabilities(found, given), wanted, rtol=1e-6)
    if name == "average" and mask_zero:
        unmasked = keras.Model(history, model.layers[-1](layers.GlobalAveragePooling1D()(vectors_of(of, history))))
        assert np.abs(original(unmasked, IDS) - wanted).max() > 1e-3, "the mask makes a difference"


def vectors_of(layer: keras.layers.Embedding, history: Any) -> Any:
    """Without a mask."""
    plain = layers.Embedding(layer.input_dim, layer.output_dim)
    plain.build()
    plain.set_weights(layer.get_weights())
    return plain(history)


def test_an_empty_list_has_a_prediction() -> None:
    """Where Keras divides by the number of vectors, 0, and gives NaN."""
    history, of = keras.Input((4,), name="history", dtype="int32"), embedding("of", mask_zero=True)
    last = layers.Dense(1, "sigmoid")
    model = keras.Model(history, last(pooled(of(history))))
    found = converted(model, ModelSpec.of(["history"], [3], 0, max_lens=[4]))
    given = {"embeddings": np.zeros((1, 12), np.float32), "lengths": np.zeros((1, 1), np.int32)}
    np.testing.assert_allclose(probabilities(found, given), 1 / (1 + np.exp(-last.get_weights()[1])))


def test_lists_of_any_length() -> None:
    history, of = keras.Input((None,), name="history", dtype="int32"), embedding("of")
    model = keras.Model(history, layers.Dense(1)(layers.GlobalMaxPooling1D()(of(history))))
    found = converted(model, ModelSpec.of(["history"], [3], 0, max_lens=[4]))
    given = {"embeddings": of.get_weights()[0][IDS].reshape(SIZE, -1), "lengths": np.full((SIZE, 1), 4, np.int32)}
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(found(given)), keras.ops.convert_to_numpy(model(IDS)))


def test_a_mask_that_the_model_makes_itself() -> None:
    history, of = keras.Input((4,), name="history", dtype="int32"), embedding("of", mask_zero=True)
    there = keras.ops.cast(keras.ops.not_equal(history, 0), "float32")
    model = keras.Model(history, layers.Dense(1, "sigmoid")(keras.ops.sum(of(history) * there[..., None], axis=1)))
    found = converted(model, ModelSpec.of(["history"], [3], 0, max_lens=[4]))
    given = {
        "embeddings": of.get_weights()[0][IDS].reshape(SIZE, -1),
        "lengths": np.count_nonzero(IDS, 1).astype(np.int32)[:, None],
    }
    np.testing.assert_allclose(probabilities(found, given), original(model, IDS), rtol=1e-6)


def test_a_comparison_elsewhere_is_no_mask() -> None:
    user, of = keras.Input((1,), name="user", dtype="int32"), embedding("of")
    vectors = of(user)
    other = keras.ops.cast(keras.ops.not_equal(layers.Reshape((1, 3))(vectors), 0.0), "float32")
    model = keras.Model(user, layers.Dense(1, "sigmoid")(layers.Flatten()(vectors * other)))
    found = converted(model, ModelSpec.of(["user"], [3], 0))
    assert probabilities(found, {"embeddings": of.get_weights()[0][IDS[:, 0]]}) == pytest.approx(original(model, IDS[:, :1]))


ENDINGS: dict[str, Callable[[Any], Any]] = {
    "layer": lambda x: layers.Dense(1, "sigmoid")(x),
    "activation layer": lambda x: layers.Activation("sigmoid")(layers.Dense(1)(x)),
    "activation": lambda x: keras.activations.sigmoid(layers.Dense(1)(x)),
    "operation": lambda x: keras.ops.sigmoid(layers.Dense(1)(x)),
    "then reshaped": lambda x: layers.Reshape(())(layers.Dense(1, "sigmoid")(x)),
    "then squeezed": lambda x: keras.ops.squeeze(layers.Activation("sigmoid")(layers.Dense(1)(x)), -1),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_sigmoid_at_the_end_is_left_out(name: str) -> None:
    user, of = keras.Input((), name="user", dtype="int32"), embedding("of")
    model = keras.Model(user, ENDINGS[name](layers.Dense(2, "sigmoid")(of(user))))  # another one within stays
    found = converted(model, ModelSpec.of(["user"], [3], 0))
    given = {"embeddings": of.get_weights()[0][IDS[:, 0]] * 5}
    logits = keras.ops.convert_to_numpy(found(given)).reshape(-1)
    last = next(layer for layer in reversed(model.layers) if layer.get_weights())
    hidden = 1 / (1 + np.exp(-(given["embeddings"] @ model.layers[2].get_weights()[0] + model.layers[2].get_weights()[1])))
    np.testing.assert_allclose(logits, (hidden @ last.get_weights()[0] + last.get_weights()[1])[:, 0], rtol=1e-5, atol=1e-6)
    same = {"embeddings": of.get_weights()[0][IDS[:, 0]]}
    np.testing.assert_allclose(probabilities(found, same), original(model, IDS[:, 0]), rtol=1e-6)


def test_logits_stay_as_they_are() -> None:
    user, of = keras.Input((), name="user", dtype="int32"), embedding("of")
    model = keras.Model(user, layers.Dense(1)(of(user)))
    found = converted(model, ModelSpec.of(["user"], [3], 0))
    given = {"embeddings": of.get_weights()[0][IDS[:, 0]]}
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(found(given))[:, 0], original(model, IDS[:, 0]))


@pytest.mark.parametrize(("shape", "name"), [((3,), "features"), ((1,), "anything"), ((), "anything")], ids=str)
def test_a_single_other_input_is_all_dense_columns(shape: tuple[int, ...], name: str) -> None:
    user, features = keras.Input((), name="user", dtype="int32"), keras.Input(shape, name=name)
    of, width = embedding("of"), shape[0] if shape else 1
    model = keras.Model(
        [user, features], layers.Dense(1, "sigmoid")(layers.concatenate([of(user), layers.Reshape((width,))(features)]))
    )
    dense = np.random.default_rng(0).normal(size=(SIZE, width)).astype(np.float32)
    found = converted(model, ModelSpec.of(["user"], [3], width, dense_names=[f"d{k}" for k in range(width)]))
    given = {"embeddings": of.get_weights()[0][IDS[:, 0]], "dense_columns": dense}
    wanted = original(model, [IDS[:, 0], dense.reshape(SIZE, *shape)])
    np.testing.assert_array_equal(probabilities(found, given), wanted)


def test_a_sequential_model() -> None:
    of = embedding("of")
    model = keras.Sequential([keras.Input((1,), name="user", dtype="int32"), of, layers.Flatten(), layers.Dense(1, "sigmoid")])
    found = converted(model, ModelSpec.of(["user"], [3], 0))
    given = {"embeddings": of.get_weights()[0][IDS[:, 0]]}
    np.testing.assert_array_equal(probabilities(found, given), original(model, IDS[:, :1]))


def test_a_layer_that_inputs_share_is_shared_no_more() -> None:
    """Each slot has rows of its own."""
    left, right, of = keras.Input((), name="left", dtype="int32"), keras.Input((), name="right", dtype="int32"), embedding("of")
    model = keras.Model([left, right], layers.Dense(1, "sigmoid")(layers.Dot(1)([of(left), of(right)])))
    found = converted(model, ModelSpec.of(["left", "right"], [3, 3], 0))
    weights = of.get_weights()[0]
    given = {"embeddings": np.hstack([weights[IDS[:, 0]], weights[IDS[:, 1]]])}
    np.testing.assert_array_equal(probabilities(found, given), original(model, [IDS[:, 0], IDS[:, 1]]))


@pytest.mark.filterwarnings(MASKED)
def test_it_is_a_function_that_travels_and_a_model_that_can_be_kept(tmp_path: Path) -> None:
    """To another process, and in model.keras, with the dense weights of the original; that one stays as it was."""
    history, of = keras.Input((4,), name="history", dtype="int32"), embedding("of", mask_zero=True)
    model = keras.Model(history, layers.Dense(1, "sigmoid")(attended(of(history))), name="click:1")
    before = [weights.copy() for weights in model.get_weights()]
    spec = ModelSpec.of(["history"], [3], 0, max_lens=[4])
    function = flowps.from_keras(model)
    assert function.__name__ == "click:1"
    given = {
        "embeddings": of.get_weights()[0][IDS].reshape(SIZE, -1),
        "lengths": np.count_nonzero(IDS, 1).astype(np.int32)[:, None],
    }
    wanted = original(model, IDS)
    first = build("a", spec, function=function)
    again = build("b", spec, function=pickle.loads(pickle.dumps(function)))
    first.save(tmp_path / "model.keras")
    read = build_or_read("click_1 (a function)", tmp_path / "model.keras", spec)
    for found in (first, again, read):
        np.testing.assert_allclose(probabilities(found, given), wanted, rtol=1e-6)
    first.set_weights([weights + 1 for weights in first.get_weights()])
    assert all(np.array_equal(now, then) for now, then in zip(model.get_weights(), before, strict=True))
    np.testing.assert_array_equal(original(model, IDS), wanted)


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(model: Any, spec: ModelSpec | None = None) -> str:
    with pytest.raises(ModelError) as refused:
        converted(model, spec or ModelSpec.of(["user"], [3], 0))
    return str(refused.value)


def on_user(shape: Sequence[int | None] = (), dim: int = 3) -> tuple[Any, Any]:
    user = keras.Input(shape, name="user", dtype="int32")
    return user, layers.Embedding(10, dim, name="of")(user)


class TestRefusals:
    def test_models_without_a_graph_or_without_embeddings(self) -> None:
        class Own(keras.Model):
            def call(self, x: Any) -> Any:
                return x

        assert "has no graph of layers; give a functional or Sequential model that is built" in refusal(Own())
        assert "has no graph of layers" in refusal(keras.Sequential([layers.Dense(1)]))
        x = keras.Input((3,), name="x")
        assert "has no Embedding layer right behind an input" in refusal(keras.Model(x, layers.Dense(1)(x)))

    def test_several_outputs(self) -> None:
        user, vector = on_user()
        model = keras.Model(user, [layers.Dense(1)(vector), layers.Dense(1)(vector)])
        assert "has 2 outputs, expected one, with a logit for each label: concatenate them" in refusal(model)

    def test_ids_that_are_used_twice_or_changed_before(self) -> None:
        user, vector = on_user()
        twice = layers.Dense(1)(layers.concatenate([vector, layers.Embedding(10, 3, name="more")(user)]))
        assert "input 'user' goes into of and into more; a slot has one vector" in refusal(keras.Model(user, twice))
        number = layers.Dense(1)(layers.concatenate([vector, layers.Reshape((1,))(keras.ops.cast(user, "float32"))]))
        assert "input 'user' goes into" in refusal(keras.Model(user, number))
        is_five = keras.ops.cast(keras.ops.not_equal(user, 5), "float32")
        assert "a slot has one vector" in refusal(keras.Model(user, layers.Dense(1)(vector * is_five[:, None])))
        shifted = layers.Embedding(10, 3, name="shifted")(keras.ops.mod(keras.Input((), name="item", dtype="int32"), 7))
        item = shifted._keras_history.operation.input._keras_history.operation.input
        model = keras.Model([user, item], layers.Dense(1)(layers.concatenate([vector, shifted])))
        assert "Embedding 'shifted' is not right behind an input, so no column has its ids" in refusal(model)

    def test_slots_that_do_not_fit(self) -> None:
        user, vector = on_user()
        model = keras.Model(user, layers.Dense(1)(vector))
        assert "there is no slot of that name; slots are usr: rename the input or the column" in refusal(
            model, ModelSpec.of(["usr"], [3], 0)
        )
        assert "slot 'user' has dim 8, Embedding 'of' output_dim 3; set --slot.user.dim 3" in refusal(
            model, ModelSpec.of(["user"], [8], 0)
        )
        assert "has no input for the slots item, tag; its inputs are user: leave the columns out with data.exclude" in refusal(
            model, ModelSpec.of(["item", "user", "tag"], [3, 3, 3], 0)
        )
        assert "has pooling none and max_len 5, the input has shape (): set --slot.user.max_len 1" in refusal(
            model, ModelSpec.of(["user"], [3], 0, max_lens=[5])
        )
        many, vectors = on_user((4,))
        of_many = keras.Model(many, layers.Dense(1)(layers.Flatten()(vectors)))
        assert "set --slot.user.max_len 4, or another pooling" in refusal(of_many, ModelSpec.of(["user"], [3], 0, max_lens=[5]))
        assert "input 'user' has shape (4,), but slot 'user' is pooled to one vector: set --slot.user.pooling none" in refusal(
            of_many
        )
        deep, boxes = on_user((2, 2))
        assert "has shape (2, 2); a slot stands for an input of shape (), (1,) or (n,)" in refusal(
            keras.Model(deep, layers.Dense(1)(layers.Flatten()(boxes)))
        )

    @pytest.mark.parametrize(
        ("shape", "names"), [((1,), ["x", "y"]), ((3,), ["x", "y"]), ((2, 2), ["x", "y"]), ((2,), [])], ids=str
    )  # fmt: skip
    def test_dense_inputs_that_are_no_columns(self, shape: tuple[int, ...], names: list[str]) -> None:
        user, vector = on_user()
        z = keras.Input(shape, name="z")
        model = keras.Model([user, z], layers.Dense(1)(layers.concatenate([vector, layers.Flatten()(z)])))
        said = refusal(model, ModelSpec.of(["user"], [3], len(names), dense_names=names))
        assert f"input 'z' of shape {shape} goes into no Embedding layer, and is no dense column" in said
        assert f"those are {', '.join(names) or 'none'}" in said

    def test_an_output_that_is_no_logit(self) -> None:
        user, vector = on_user()
        assert "gives shape (3, 2) for 3 samples; expected one logit per sample" in refusal(
            keras.Model(user, layers.Dense(2, "softmax")(vector))
        )

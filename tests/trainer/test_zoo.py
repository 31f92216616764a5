"""The models of papers against slow and obvious numpy, with every knob, and every spec they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import msgspec
import numpy as np
import pytest
import tensorflow as tf

from flowps.config import Net
from flowps.errors import ModelError
from flowps.trainer.models import ModelSpec, build
from flowps.trainer.models.build import BUILT_IN

NET = Net(
    hidden=(4, 3), cross_layers=2, cin=(3, 2), attention_layers=2, attention_heads=2, attention_dim=3, bottom=(5,), target="item",
    activation_unit=(3,), tower=(2,), experts=3,
)  # fmt: skip
MULTI = ("shared_bottom", "mmoe")
STACKED = ("fm", "deepfm", "xdeepfm", "autoint", "dlrm")
"""Those that need the vectors of the slots to be of one dim."""
ANY_SLOTS = ("dnn", "lr", "wide_deep", "dcn", *MULTI)

Inputs = dict[str, np.ndarray]
Weights = Iterator[tuple[np.ndarray, np.ndarray | float]]


def spec_of(slots: int = 3, dense: int = 3, labels: int = 1, **knobs: Any) -> ModelSpec:
    names = [f"s{k}" for k in range(slots)]
    net = msgspec.structs.replace(NET, **knobs)
    return ModelSpec.of(names, [2] * slots, dense, net=net, labels=[f"label{k}" for k in range(labels)])


def din_spec(dense: int = 3, **knobs: Any) -> ModelSpec:
    """Two histories of the target's dim, a sequence of another, and a slot of a third."""
    net = msgspec.structs.replace(NET, **knobs)
    return ModelSpec.of(["user", "clicks", "item", "tags", "carts"], [4, 2, 2, 3, 2], dense, None, [0, 3, 0, 2, 4], net=net)


BOTH, NO_DENSE, NO_SLOTS, ONE_SLOT, SHALLOW = spec_of(), spec_of(dense=0), spec_of(slots=0), spec_of(slots=1), spec_of(hidden=())
CASES: dict[str, tuple[str, ModelSpec]] = {
    **{f"{name}, both": (name, BOTH) for name in BUILT_IN if name != "din"},
    **{f"{name}, no dense": (name, NO_DENSE) for name in BUILT_IN if name != "din"},
    **{f"{name}, no slots": (name, NO_SLOTS) for name in (*ANY_SLOTS, "fm", "deepfm", "xdeepfm")},
    **{f"{name}, one slot": (name, ONE_SLOT) for name in BUILT_IN if name != "din"},
    **{f"{name}, no hidden layer": (name, SHALLOW) for name in BUILT_IN if name not in ("din", "mmoe")},
    "dcn, low rank": ("dcn", spec_of(cross_rank=1)),
    "xdeepfm, no cin": ("xdeepfm", spec_of(cin=())),
    "xdeepfm, one cin layer": ("xdeepfm", spec_of(cin=(4,))),
    "autoint, one head": ("autoint", spec_of(attention_heads=1)),
    "dlrm, no bottom": ("dlrm", spec_of(bottom=())),
    "din, both": ("din", din_spec()),
    "din, no dense": ("din", din_spec(dense=0)),
    "din, no activation unit": ("din", din_spec(activation_unit=(), hidden=())),
    "shared_bottom, two labels": ("shared_bottom", spec_of(labels=2)),
    "shared_bottom, no tower": ("shared_bottom", spec_of(labels=2, tower=())),
    "mmoe, two labels": ("mmoe", spec_of(labels=2)),
    "mmoe, one expert": ("mmoe", spec_of(labels=3, experts=1, tower=())),
}
FULL: dict[str, ModelSpec] = dict.fromkeys(BUILT_IN, BOTH) | {"din": din_spec()} | {name: spec_of(labels=2) for name in MULTI}
"""Of each model the spec with most in it."""


def made_inputs(spec: ModelSpec, size: int = 5, seed: int = 3) -> Inputs:
    """Random, with garbage where a sequence has no vector: a model must not look there."""
    rng = np.random.default_rng(seed)
    found = {key: rng.normal(size=(size, width)).astype(np.float32) for key, width in spec.widths().items()}
    if spec.sequences:
        found["lengths"] = np.stack([rng.integers(0, slot.max_len + 1, size) for slot in spec.sequences], 1).astype(np.int32)
        found["lengths"][0] = 0
    return found


def zeros(spec: ModelSpec, size: int = 3) -> Inputs:
    return {key: np.zeros_like(value) for key, value in made_inputs(spec, size).items()}


# --- twins ------------------------------------------------------------------------------------------------------------
# Each takes its weights in the order in which the model has been written: (kernel, bias), the bias 0 where there is none.


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def row(x: Inputs, n: int) -> np.ndarray:
    """All floats of sample n."""
    return np.concatenate([x[key][n] for key in ("embeddings", "dense_columns") if key in x])


def slots(x: Inputs, n: int, spec: ModelSpec) -> list[np.ndarray]:
    """The vectors of sample n."""
    return [x["embeddings"][n, slot.column : slot.column + slot.width] for slot in spec.slots]


def mlp(x: np.ndarray, hidden: tuple[int, ...], weights: Weights) -> np.ndarray:
    for _ in hidden:
        kernel, bias = next(weights)
        x = relu(x @ kernel + bias)
    return x


def affine(x: np.ndarray, weights: Weights) -> np.ndarray:
    kernel, bias = next(weights)
    return x @ kernel + bias


def naive_dnn(x: Inputs, n: int, w: Weights, spec: ModelSpec) -> np.ndarray:
    return affine(mlp(row(x, n), spec.hidden, w), w)


def naive_lr(x: Inputs, n: int, w: Weights, spec: ModelSpec) -> np.ndarray:
    kernel, bias = next(w)
    logit = bias + (x["embeddings"][n].sum() if "embeddings" in x else 0)
    return logit + (x["dense_columns"][n] @ kernel if "dense_columns" in x else 0)


def pairs(vectors: list[np.ndarray]) -> list[float]:
    """The dot products of each with each later one."""
    return [float(a @ b) for i, a in enumerate(vectors) for b in vectors[i + 1 :]]


def naive_fm(x: Inputs, n: int, w: Weights, spec: ModelSpec) -> np.ndarray:
    logit = affine(row(x, n), w)
    return logit + sum(pairs(slots(x, n, spec)))


def naive_wide_deep(x: Inputs, n: int, w: Weights, spec: ModelSpec) -> np.ndarray:
    wide = affine(row(x, n), w)
    return wide + affine(mlp(row(x, n), spec.hidden, w), w)


def naive_deepfm(x: Inputs, n: int, w: Weights, spec: ModelSpec) -> np.ndarray:
    return naive_fm(x, n, w, spec) + affine(mlp(row(x, n), spec.hidden, w), w)


def naive_dcn(x: Inputs, n: int, w: Weights, spec: ModelSpec) -> np.ndarray:
    x0 = crossed = row(x, n)
    for _ in range(spec.net.cross_layers):
        matrix, bias = next(w)
        if spec.net.cross_rank:
            other, bias = next(w)
            assert matrix.shape == other.T.shape == (len(x0), spec.net.cross_rank)
            matrix = matrix @ other
        crossed = np.array([x0[i] * (sum(crossed[j] * matrix[j, i] for j in range(len(x0)))) for i in range(len(x0))]) + (
            x0 * bias + crossed
        )
    return affine(np.concatenate([crossed, mlp(x0, spec.hidden, w)]), w)


def naive_xdeepfm(x: Inputs, n: int, w: Weights, spec: ModelSpec) -> np.ndarray:
    logit = naive_wide_deep(x, n, w, spec)
    if "embeddings" not in x or not spec.net.cin:
        return logit
    first = last = slots(x, n, spec)
    sums = []
    for maps in spec.net.cin:
        kernel, _ = next(w)
        kernel = kernel.reshape(len(last), len(first), maps)
        last = [sum(kernel[i, j, h] * a * b for i, a in enumerate(last) for j, b in enumerate(first)) for h in range(maps)]
        sums += [vector.sum() for vector in last]
    return logit + affine(np.array(sums), w)


def naive_autoint(x: Inputs, n: int, w: Weights, spec: ModelSpec) -> np.ndarray:
    fields = slots(x, n, spec)
    if "dense_columns" in x:
        embedded, bias = next(w)  # listed first, whenever it was made
        assert bias == 0
        fields += [value * vector for value, vector in zip(x["dense_columns"][n], embedded, strict=True)]
    for _ in range(spec.net.attention_layers):
        heads = []
        for _ in range(spec.net.attention_heads):
            (query, _), (value, _), (key, _) = next(w), next(w), next(w)
            shares = [softmax(np.array([(e @ query) @ (other @ key) for other in fields])) for e in fields]
            heads.append([sum(s * (other @ value) for s, other in zip(share, fields, strict=True)) for share in shares])
        residual, _ = next(w)
        fields = [relu(np.concatenate([head[m] for head in heads]) + e @ residual) for m, e in enumerate(fields)]
    logit = affine(np.concatenate(fields), w)
    return logit + affine(mlp(row(x, n), spec.hidden, w), w) if spec.hidden else logit


def naive_dlrm(x: Inputs, n: int, w: Weights, spec: ModelSpec) -> np.ndarray:
    vectors, bottom = slots(x, n, spec), []
    if "dense_columns" in x:
        bottom = [mlp(x["dense_columns"][n], (*spec.net.bottom, 2), w)]
    return affine(mlp(np.concatenate([*bottom, pairs([*bottom, *vectors])]), spec.hidden, w), w)


def naive_din(x: Inputs, n: int, w: Weights, spec: ModelSpec) -> np.ndarray:
    found = dict(zip([slot.name for slot in spec.slots], slots(x, n, spec), strict=True))
    target = found["item"]
    for name, column in (("clicks", 0), ("carts", 2)):
        unit = [next(w) for _ in range(len(spec.net.activation_unit) + 1)]
        total = np.zeros(2)
        for h in found[name].reshape(-1, 2)[: x["lengths"][n, column]]:
            weights = iter(unit)
            inner = mlp(np.concatenate([h, target, h - target, h * target]), spec.net.activation_unit, weights)
            total += affine(inner, weights) * h
        found[name] = total
    dense = [x["dense_columns"][n]] if "dense_columns" in x else []
    return affine(mlp(np.concatenate([*found.values(), *dense]), spec.hidden, w), w)


def naive_shared_bottom(x: Inputs, n: int, w: Weights, spec: ModelSpec) -> np.ndarray:
    bottom = mlp(row(x, n), spec.hidden, w)
    return np.concatenate([affine(mlp(bottom, spec.net.tower, w), w) for _ in spec.labels])


def naive_mmoe(x: Inputs, n: int, w: Weights, spec: ModelSpec) -> np.ndarray:
    experts = [mlp(row(x, n), spec.hidden, w) for _ in range(spec.net.experts)]
    gates = [softmax(affine(row(x, n), w)) if spec.net.experts > 1 else [1] for _ in spec.labels]
    mixed = [sum(share * expert for share, expert in zip(gate, experts, strict=True)) for gate in gates]
    return np.concatenate([affine(mlp(mixture, spec.net.tower, w), w) for mixture in mixed])


NAIVE: dict[str, Callable[[Inputs, int, Weights, ModelSpec], np.ndarray]] = {
    name.removeprefix("naive_"): twin for name, twin in list(globals().items()) if name.startswith("naive_")
}


def kernels(model: keras.Model) -> list[Any]:
    """The layers with a kernel, in the order of their making: Keras counts dense, dense_1, …; the one EinsumDense comes first."""
    einsums = [layer for layer in model.layers if isinstance(layer, keras.layers.EinsumDense)]
    found = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    return einsums + sorted(found, key=lambda layer: int(layer.name.partition("dense_")[2] or 0))


def randomize(model: keras.Model) -> list[tuple[np.ndarray, np.ndarray | float]]:
    """Random weights, biases too, given to `model`, and as the twins take them."""
    rng = np.random.default_rng(5)
    model.set_weights([rng.normal(scale=0.7, size=w.shape).astype(np.float32) for w in model.get_weights()])
    return [(np.asarray(layer.kernel), 0.0 if layer.bias is None else np.asarray(layer.bias)) for layer in kernels(model)]


def naive(name: str, x: Inputs, weights: list[tuple[np.ndarray, np.ndarray | float]], spec: ModelSpec) -> np.ndarray:
    found = []
    for n in range(len(next(iter(x.values())))):
        left = iter(weights)
        found.append(NAIVE[name](x, n, left, spec))
        assert next(left, None) is None, "a layer that the twin does not know"
    return np.array(found)


def test_every_built_in_model_has_a_twin():
    assert set(NAIVE) == set(BUILT_IN) == {name for name, _ in CASES.values()}


@pytest.mark.parametrize(("name", "spec"), CASES.values(), ids=CASES)
def test_a_model_is_its_papers_formula(name: str, spec: ModelSpec):
    model = build(name, spec)
    weights = randomize(model)
    x = made_inputs(spec)
    found = keras.ops.convert_to_numpy(model(x))
    assert (model.name, found.shape, found.dtype) == (name, (5, len(spec.labels)), np.float32)
    assert {tensor.name: tensor.shape[1] for tensor in model.inputs} == spec.widths()
    np.testing.assert_allclose(found, naive(name, x, weights, spec), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("name", ANY_SLOTS)
def test_models_of_floats_take_slots_of_any_dim_and_sequences(name: str):
    spec = ModelSpec.of(["a", "b", "c"], [2, 3, 2], 1, None, [0, 0, 3], net=NET)
    model = build(name, spec)
    weights = randomize(model)
    x = made_inputs(spec)
    np.testing.assert_allclose(model(x), naive(name, x, weights, spec), rtol=5e-5, atol=5e-5)


# --- knobs ------------------------------------------------------------------------------------------------------------

HIDDEN = {"lr": 0, "fm": 0, "dlrm": 1 + 2, "shared_bottom": 2 + 2 * 1, "mmoe": 3 * 2 + 2 * 1}
"""Hidden layers of `FULL`, 2 where nothing is said."""


def with_knobs(name: str, **knobs: Any) -> ModelSpec:
    return replace(FULL[name], net=msgspec.structs.replace(FULL[name].net, **knobs))


def layers(model: keras.Model, kind: type) -> list[Any]:
    return [layer for layer in model.layers if isinstance(layer, kind)]


@pytest.mark.parametrize("name", BUILT_IN)
def test_regularisation_is_there_when_asked_for(name: str):
    spec = with_knobs(name, dropout=0.25, batch_norm=True, l2=0.01)
    model = build(name, spec)
    randomize(model)
    assert len(layers(model, keras.layers.BatchNormalization)) == HIDDEN.get(name, 2)
    assert [layer.rate for layer in layers(model, keras.layers.Dropout)] == [0.25] * HIDDEN.get(name, 2)
    expected = 0.01 * sum(np.square(layer.kernel).sum() for layer in kernels(model))
    assert sum(float(loss) for loss in model.losses) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", BUILT_IN)
def test_regularisation_is_not_there_otherwise(name: str):
    model = build(name, FULL[name])
    assert not model.losses
    assert not layers(model, keras.layers.BatchNormalization)
    assert not layers(model, keras.layers.Dropout)


def test_a_hidden_layer_is_normalised_before_its_relu():
    model = build("dnn", spec_of(hidden=(4,), batch_norm=True, dropout=0.5))
    rng = np.random.default_rng(1)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape).astype(np.float32) for w in model.get_weights()])
    (hidden, end), (norm,) = kernels(model), layers(model, keras.layers.BatchNormalization)
    gamma, beta, mean, variance = norm.get_weights()
    x = made_inputs(BOTH)
    inner = np.concatenate([x["embeddings"], x["dense_columns"]], 1) @ hidden.kernel.numpy() + hidden.bias.numpy()
    inner = relu((inner - mean) / np.sqrt(variance + norm.epsilon) * gamma + beta)
    np.testing.assert_allclose(model(x), inner @ end.kernel.numpy() + end.bias.numpy(), rtol=1e-5)
    assert not np.allclose(model(x), model(x, training=True))


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(name: str, spec: ModelSpec) -> str:
    with pytest.raises(ModelError) as caught:
        build(name, spec)
    return str(caught.value)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in MULTI])
def test_a_model_of_one_label_refuses_several(name: str):
    message = refusal(name, replace(FULL[name], labels=("click", "buy")))
    assert message.startswith(f"model {name!r} predicts one label, but there are 2: click, buy; choose shared_bottom or mmoe")


@pytest.mark.parametrize("name", STACKED)
def test_a_model_of_products_refuses_slots_of_different_dims_and_sequences(name: str):
    different = ModelSpec.of(["a", "b"], [2, 3], 1, net=NET)
    assert "slots of one dim, found a: 2, b: 3; give all slots the same dim" in refusal(name, different)
    sequence = ModelSpec.of(["a", "b"], [2, 2], 1, None, [0, 3], net=NET)
    assert "'b' has pooling none; choose sum or mean" in refusal(name, sequence)


@pytest.mark.parametrize("name", ["autoint", "dlrm"])
def test_a_model_of_products_alone_refuses_no_slots(name: str):
    assert "there are no slots; choose dnn or lr, or add slots" in refusal(name, NO_SLOTS)


def test_dlrm_refuses_a_single_vector():
    assert "there is only that of 's0'; add a slot or dense columns" in refusal("dlrm", spec_of(slots=1, dense=0))


def test_autoint_refuses_a_single_field():
    assert "there is only 's0'; add a slot or dense columns" in refusal("autoint", spec_of(slots=1, dense=0))


def test_mmoe_refuses_experts_without_layers():
    assert "net.hidden is empty, so that all experts would be the same; give it units" in refusal("mmoe", SHALLOW)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (din_spec(target=""), "set net.target to a pooled slot: user, item"),
        (din_spec(target="itme"), "net.target is 'itme', but no slot is called so; choose a pooled slot: user, item"),
        (din_spec(target="clicks"), "target 'clicks' has pooling none and is a history itself; choose a pooled slot: user, item"),
        (din_spec(target="user"), "dim 4, as the target 'user' has; slots with pooling none are clicks: 2, tags: 3, carts: 2; "),
        (spec_of(target="s1"), "with pooling none are none; give the slot of the history pooling = \"none\" and dim = 2"),
        (spec_of(slots=0, target=""), "set net.target to a pooled slot: there are none"),
    ],
    ids=["unset", "unknown", "sequence", "no history of its dim", "no history", "no slots"],
)  # fmt: skip
def test_din_refuses_what_it_cannot_compare(spec: ModelSpec, expected: str):
    assert expected in refusal("din", spec)


# --- din's history ----------------------------------------------------------------------------------------------------


def gradients(model: keras.Model, x: Inputs, training: bool = False) -> tuple[Any, list[Any]]:
    """The logits, and their sum's gradients by the embeddings and all weights."""
    tensors = {key: tf.convert_to_tensor(value) for key, value in x.items()}
    with tf.GradientTape() as tape:
        tape.watch(tensors["embeddings"])
        logits = model(tensors, training=training)
        total = tf.reduce_sum(logits)
    sources = [tensors["embeddings"], *model.trainable_variables]
    return logits, tape.gradient(total, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def test_din_does_not_look_behind_the_end_of_a_history():
    spec = din_spec()
    model = build("din", spec)
    randomize(model)
    x = made_inputs(spec)
    x["lengths"][:] = [[0, 0, 0], [1, 2, 4], [3, 1, 0], [2, 0, 1], [0, 2, 3]]
    padding = np.zeros_like(x["embeddings"], bool)
    for column, (start, max_len) in {0: (4, 3), 2: (18, 4)}.items():
        for n, length in enumerate(x["lengths"][:, column]):
            padding[n, start + 2 * length : start + 2 * max_len] = True
    logits, (gradient, *_) = gradients(model, x)
    assert not np.asarray(gradient)[padding].any()
    assert np.asarray(gradient)[~padding].any()
    other = x | {"embeddings": np.where(padding, np.float32(1e6), x["embeddings"])}
    np.testing.assert_array_equal(model(other), logits)


def test_an_empty_history_is_zeros_to_din():
    spec = din_spec(hidden=())
    model = build("din", spec)
    weights = randomize(model)
    x = made_inputs(spec)
    x["lengths"][:] = 0
    kernel, bias = weights[-1]
    user, item_and_tags, nothing = x["embeddings"][:, :4], x["embeddings"][:, 10:18], np.zeros((5, 2))
    all_else = np.concatenate([user, nothing, item_and_tags, nothing, x["dense_columns"]], 1)
    np.testing.assert_allclose(model(x), all_else @ kernel + bias, rtol=1e-5, atol=1e-5)
    _, found = gradients(model, x)
    assert all(np.isfinite(gradient).all() for gradient in found)


# --- as a step uses them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_gradients_at_zeros_are_finite(name: str):
    for knobs in ({}, {"batch_norm": True, "dropout": 0.5}):
        spec = with_knobs(name, **knobs)
        logits, found = gradients(build(name, spec), zeros(spec), training=True)
        assert all(np.isfinite(value).all() for value in (logits, *found))
        assert found[0].shape == (3, spec.width)


@pytest.mark.parametrize("name", BUILT_IN)
def test_xla_computes_the_same(name: str):
    model = build(name, FULL[name])
    randomize(model)
    x = made_inputs(FULL[name])
    compiled = tf.function(lambda x: gradients(model, x), jit_compile=True)
    logits, found = compiled({key: tf.convert_to_tensor(value) for key, value in x.items()})
    expected, wanted = gradients(model, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


NARROW = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("precision", NARROW)
def test_models_compute_in_narrow_floats_and_answer_in_float32(precision: str, name: str):
    spec = FULL[name]
    model = build(name, spec, precision)
    weights = randomize(model)
    assert {variable.dtype for variable in model.variables} == {"float32"}
    ends = {layer for layer in kernels(model) if layer.kernel.shape[-1] == 1 and layer.compute_dtype == "float32"}
    assert len(ends) >= len(spec.labels)
    assert {layer.compute_dtype for layer in kernels(model) if layer not in ends} <= {NARROW[precision]}
    x = made_inputs(spec)
    logits = model(x)
    assert logits.dtype == "float32"
    expected = naive(name, x, weights, spec)
    np.testing.assert_allclose(logits, expected, atol=0.05 * np.abs(expected).max())
    if name not in ("lr", "fm"):
        assert not np.allclose(logits, expected, rtol=1e-6), "as near as float32 would be"
    assert all(np.isfinite(gradient).all() for gradient in gradients(model, zeros(spec), training=True)[1])


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_model_comes_back_from_its_file(name: str, tmp_path: Path):
    spec = with_knobs(name, dropout=0.25, batch_norm=True, l2=0.01)
    model = build(name, spec, "mixed_bfloat16")
    assert {type(layer).__module__.partition(".")[0] for layer in model.layers} == {"keras"}, "no code of ours is needed"
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = made_inputs(spec)
    np.testing.assert_array_equal(again(x), model(x))
    assert len(again.losses) == len(model.losses)


# --- learning ---------------------------------------------------------------------------------------------------------


def learned(name: str, spec: ModelSpec, signs: np.ndarray, labels: np.ndarray, lengths: np.ndarray | None = None) -> float:
    """The loss after training on `signs` [samples, vectors], with a table of 8 rows for each vector's column."""
    model = build(name, spec)
    rng = np.random.default_rng(0)
    tables = keras.Variable(rng.normal(scale=0.3, size=(signs.shape[1], 8, spec.slots[0].dim)).astype(np.float32))
    optimizer = keras.optimizers.Adam(0.03)
    variables = [tables, *model.trainable_variables]
    places = np.stack([np.broadcast_to(np.arange(signs.shape[1]), signs.shape), signs], 2)

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            x = {"embeddings": tf.reshape(tf.gather_nd(tables.value, places), (len(signs), -1))}
            if lengths is not None:
                x["lengths"] = tf.constant(lengths)
            losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.constant(labels), logits=model(x, training=True))
            loss = tf.reduce_mean(losses)
        gradient = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        optimizer.apply(gradient, variables)
        return loss

    optimizer.build(variables)
    for _ in range(150):
        loss = float(step())
    return loss


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "din"])
def test_a_model_learns_what_only_two_signs_together_tell(name: str):
    """Each sign alone says nothing about any label."""
    a, b = (x.reshape(-1) for x in np.mgrid[:8, :8])
    labels = [(a + b) % 2, (a // 4 + b // 4) % 2][: len(FULL[name].labels)]
    spec = ModelSpec.of(["a", "b"], [4, 4], 0, net=Net(hidden=(16,), tower=(8,)), labels=FULL[name].labels)
    loss = learned(name, spec, np.stack([a, b], 1), np.stack(labels, 1).astype(np.float32))
    if name == "lr":
        assert loss > 0.6
    else:
        assert loss < 0.2


def test_din_learns_whether_the_target_is_in_the_history():
    rng = np.random.default_rng(4)
    signs = rng.integers(0, 8, (256, 4))
    lengths = rng.integers(0, 4, (256, 1)).astype(np.int32)
    there = (signs[:, 1:] == signs[:, :1]) & (np.arange(3) < lengths)
    spec = ModelSpec.of(["item", "clicks"], [4, 4], 0, None, [0, 3], net=Net(hidden=(16,), target="item"))
    assert learned("din", spec, signs, there.any(1, keepdims=True).astype(np.float32), lengths) < 0.1


@pytest.mark.parametrize("name", ["fm", "deepfm"])
def test_products_do_not_cancel_in_16_bits(name: str) -> None:
    """The vectors of a sample that nearly cancel: in bfloat16 the difference of the sums would be off by more than its value."""
    spec = ModelSpec.of([f"s{k}" for k in range(26)], [16] * 26, 0, hidden=(4,))
    embeddings = np.random.default_rng(0).standard_normal((64, spec.width)).astype(np.float32)
    exact, narrow = (build(name, spec, precision) for precision in ("float32", "mixed_bfloat16"))
    for model in (exact, narrow):
        for variable in model.trainable_variables:
            variable.assign(keras.ops.zeros_like(variable))  # so that only the products are left
    expected, found = (np.asarray(model({"embeddings": embeddings})) for model in (exact, narrow))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)

"""The built-in models against plain numpy, and every way in which one's own can be wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import keras
import numpy as np
import pytest

from flowps.batch import Batch
from flowps.errors import ModelError
from flowps.trainer.models import ModelSpec, build
from flowps.trainer.step import Step

BOTH = ModelSpec.of(["a", "b", "c"], [2, 2, 2], 3, (4, 3))
NO_DENSE = ModelSpec.of(["a", "b", "c"], [2, 2, 2], 0, (4, 3))
NO_SLOTS = ModelSpec.of([], [], 3, (4, 3))
NOT_DEEP = ModelSpec.of(["a", "b"], [2, 2], 3, ())
SPECS = {"both": BOTH, "no dense": NO_DENSE, "no slots": NO_SLOTS, "no hidden layer": NOT_DEEP}


@pytest.fixture
def inputs() -> Callable[[ModelSpec], dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)

    def inputs(spec: ModelSpec, size: int = 5) -> dict[str, np.ndarray]:
        widths = {"embeddings": spec.width, "dense_columns": spec.dense_width}
        return {key: rng.normal(size=(size, width)).astype(np.float32) for key, width in widths.items() if width}

    return inputs


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def concatenated(x: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([x[key] for key in ("embeddings", "dense_columns") if key in x], axis=1)


def naive_dnn(x: dict[str, np.ndarray], weights: list[np.ndarray], spec: ModelSpec) -> np.ndarray:
    hidden = concatenated(x)
    *layers, (kernel, bias) = zip(weights[::2], weights[1::2], strict=True)
    for layer_kernel, layer_bias in layers:
        hidden = relu(hidden @ layer_kernel + layer_bias)
    return hidden @ kernel + bias


def naive_lr(x: dict[str, np.ndarray], weights: list[np.ndarray], spec: ModelSpec) -> np.ndarray:
    kernel, bias = weights
    logit = np.full((len(next(iter(x.values()))), 1), bias[0])
    if "embeddings" in x:
        logit = logit + x["embeddings"].sum(axis=1, keepdims=True)
    if "dense_columns" in x:
        logit = logit + x["dense_columns"] @ kernel
    return logit


def naive_deepfm(x: dict[str, np.ndarray], weights: list[np.ndarray], spec: ModelSpec) -> np.ndarray:
    # Keras lists weights layer by layer: first order, hidden layers, the deep part's end.
    linear, linear_bias, *layers, end = weights
    hidden = concatenated(x)
    logit = hidden @ linear + linear_bias
    if "embeddings" in x:
        slots = [x["embeddings"][:, slot.column : slot.column + slot.dim] for slot in spec.slots]
        for i in range(len(slots)):
            for j in range(i + 1, len(slots)):
                logit = logit + (slots[i] * slots[j]).sum(axis=1, keepdims=True)
    for kernel, bias in zip(layers[::2], layers[1::2], strict=True):
        hidden = relu(hidden @ kernel + bias)
    return logit + hidden @ end


NAIVE = {"dnn": naive_dnn, "deepfm": naive_deepfm, "lr": naive_lr}


def randomize(model: keras.Model) -> list[np.ndarray]:
    """Random weights, biases too, given to `model`: layer by layer as the model was written, kernel before bias."""
    rng = np.random.default_rng(5)
    model.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in model.get_weights()])
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    # Keras names layers in the order of their making: dense, dense_1, …
    layers.sort(key=lambda layer: int(layer.name.partition("dense_")[2] or 0))
    return [weight for layer in layers for weight in layer.get_weights()]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", NAIVE)
def test_a_built_in_model_is_its_formula(name: str, spec: ModelSpec, inputs):
    model = build(name, spec)
    weights = randomize(model)
    x = inputs(spec)
    found = keras.ops.convert_to_numpy(model(x))
    assert found.shape == (5, 1)
    np.testing.assert_allclose(found, NAIVE[name](x, weights, spec), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAIVE)
def test_a_built_in_model_takes_exactly_the_inputs_of_the_spec(name: str):
    for spec in SPECS.values():
        model = build(name, spec)
        expected = {key for key, width in (("embeddings", spec.width), ("dense_columns", spec.dense_width)) if width}
        assert {tensor.name for tensor in model.inputs} == expected
        assert model.name == name


def test_hidden_is_the_shape_of_the_dense_part():
    shapes = [w.shape for w in build("dnn", ModelSpec.of(["a"], [6], 2, (7, 5))).get_weights()]
    assert shapes == [(8, 7), (7,), (7, 5), (5,), (5, 1), (1,)]


def test_lr_begins_at_zero_weight_and_sums_its_rows():
    model = build("lr", ModelSpec.of(["a", "b"], [1, 1], 2, ()))
    x = {"embeddings": np.array([[0.25, -1]], np.float32), "dense_columns": np.array([[3, 4]], np.float32)}
    assert keras.ops.convert_to_numpy(model(x)).item() == pytest.approx(-0.75)


def test_deepfm_refuses_slots_of_different_dims():
    with pytest.raises(ModelError, match="slots of one dim, found a: 2, b: 3; give all slots the same dim"):
        build("deepfm", ModelSpec.of(["a", "b"], [2, 3], 1, (4,)))


@pytest.mark.parametrize("name", ["dnn", "lr"])
def test_other_models_take_slots_of_different_dims(name: str, inputs):
    spec = ModelSpec.of(["a", "b"], [2, 3], 1, (4,))
    assert keras.ops.convert_to_numpy(build(name, spec)(inputs(spec))).shape == (5, 1)


def test_the_spec_places_the_slots_one_after_the_other():
    spec = ModelSpec.of(["a", "b", "c"], [2, 1, 3], 0, ())
    embeddings = np.arange(12, dtype=np.float32).reshape(2, 6)
    assert spec.width == 6
    assert [(slot.column, slot.dim) for slot in spec.slots] == [(0, 2), (2, 1), (3, 3)]
    assert {name: v.tolist() for name, v in spec.vectors(embeddings).items()} == {
        "a": [[0, 1], [6, 7]],
        "b": [[2], [8]],
        "c": [[3, 4, 5], [9, 10, 11]],
    }


def test_stacked_vectors_stand_slot_by_slot():
    spec = ModelSpec.of(["a", "b"], [2, 2], 0, ())
    embeddings = np.arange(8, dtype=np.float32).reshape(2, 4)
    found = keras.ops.convert_to_numpy(spec.stacked(keras.ops.convert_to_tensor(embeddings)))
    assert found.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "near"), [("dn", "dnn"), ("deep_fm", "deepfm"), ("DNN", ""), ("transformer", "")])
def test_an_unknown_name_is_refused_with_a_suggestion(name: str, near: str):
    with pytest.raises(ModelError) as caught:
        build(name, BOTH)
    message = str(caught.value)
    assert message.startswith(f"model {name!r} is unknown; ")
    assert (f"did you mean {near}?" in message) == bool(near)
    assert "built in are dnn, lr, fm, wide_deep, deepfm, " in message
    assert "my_module:build" in message


# --- one's own --------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Python text → the name of an importable module of it; gone after the test."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    made: list[str] = []

    def module(text: str) -> str:
        name = f"flowps_test_model_{len(made)}"
        (tmp_path / f"{name}.py").write_text(f"import keras\nfrom keras import layers\n{text}\n", encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        made.append(name)
        return name

    yield module
    for name in made:
        sys.modules.pop(name, None)


GOOD = """
def build(spec):
    inputs = spec.inputs()
    towers = [layers.Dense(4, activation="tanh")(v) for v in spec.vectors(inputs["embeddings"]).values()]
    x = layers.BatchNormalization()(layers.concatenate([*towers, inputs["dense_columns"]]))
    return keras.Model(inputs, layers.Dense(1, kernel_regularizer=keras.regularizers.L2(1e-4))(x))
"""


def losses(model: keras.Model, spec: ModelSpec, steps: int = 60) -> list[float]:
    """Of training on embeddings that tell the label."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 64).astype(np.float32)
    embeddings = rng.normal(size=(64, spec.width)).astype(np.float32) + labels[:, None]
    dense = rng.normal(size=(64, spec.dense_width)).astype(np.float32)
    batch = Batch(labels, dense, np.empty(0, np.uint64), np.zeros(len(spec.slots) * 64 + 1, np.int32))
    step = Step(model, spec, "adam", 0.05, jit_compile=False)
    return [step.train(batch, embeddings)[0] for _ in range(steps)]


def test_a_model_of_ones_own_trains(module):
    found = losses(build(f"{module(GOOD)}:build", BOTH), BOTH)
    assert found[-1] < 0.5 * found[0]


def test_a_subclass_and_a_flat_logit_will_do(module):
    name = module(
        """
class Own(keras.Model):
    def __init__(self, spec):
        super().__init__()
        self.dense = layers.Dense(1)

    def get_config(self):
        return {}

    def call(self, inputs, training=False):
        return keras.ops.reshape(self.dense(inputs["embeddings"]), (-1,))
"""
    )
    found = losses(build(f"{name}:Own", BOTH), BOTH)
    assert found[-1] < 0.7 * found[0]


def test_a_module_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A Dask worker's path does not hold the working directory."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowps_test_model_here.py").write_text(f"import keras\nfrom keras import layers\n{GOOD}", encoding="utf-8")
    try:
        assert isinstance(build("flowps_test_model_here:build", BOTH), keras.Model)
    finally:
        sys.modules.pop("flowps_test_model_here", None)


def refusal(name: str, spec: ModelSpec = BOTH) -> str:
    with pytest.raises(ModelError) as caught:
        build(name, spec)
    assert repr(name) in str(caught.value), "says which model"
    return str(caught.value)


@pytest.mark.parametrize(
    ("ending", "shape"),
    [
        ("layers.Dense(2)(x)", "(3, 2)"),
        ("layers.Reshape((1, 1))(layers.Dense(1)(x))", "(3, 1, 1)"),
        ("keras.ops.mean(layers.Dense(1)(x))", "()"),
        ("keras.ops.mean(layers.Dense(1)(x), axis=0)", "(1,)"),
    ],
)
def test_a_wrong_shape_is_refused(module, ending: str, shape: str):
    name = module(
        f"def build(spec):\n    inputs = spec.inputs()\n    x = layers.concatenate(list(inputs.values()))\n"
        f"    return keras.Model(inputs, {ending})"
    )
    message = refusal(f"{name}:build")
    assert f"gives shape {shape} for 3 samples; expected one logit per sample" in message
    assert "keras.layers.Dense(1)" in message


@pytest.mark.parametrize(("value", "kind"), [("None", "NoneType"), ("layers.Dense(1)", "Dense"), ("keras.Model", "type")])
def test_what_is_no_model_is_refused(module, value: str, kind: str):
    name = module(f"def build(spec):\n    return {value}")
    assert f"expected the function to return a keras.Model, found {kind}" in refusal(f"{name}:build")


def test_a_function_that_raises_is_refused_with_its_error(module):
    name = module("def build(spec):\n    return {}['missing']")
    message = refusal(f"{name}:build")
    assert "build raised KeyError: 'missing'" in message


@pytest.mark.parametrize("raised", ["SystemExit(3)", "KeyboardInterrupt()", "GeneratorExit()"])
@pytest.mark.parametrize("text", ["raise {}", "def build(spec):\n    raise {}"], ids=["module", "function"])
def test_code_that_ends_the_process_is_refused_like_any_that_raises(module, text: str, raised: str):
    """It would end the Dask worker instead, and the run would wait for ever."""
    assert f"raised {raised.partition('(')[0]}" in refusal(f"{module(text.format(raised))}:build")


def test_a_model_that_always_gives_as_many_as_it_is_tried_with_is_refused(module):
    name = module(
        "def build(spec):\n    i = spec.inputs()\n    x = layers.concatenate(list(i.values()))\n"
        "    return keras.Model(i, layers.Dense(1)(keras.ops.tile(keras.ops.mean(x, axis=0, keepdims=True), (3, 1))))"
    )
    assert "gives shape (3, 1) for 5 samples" in refusal(f"{name}:build")


def test_a_model_error_of_the_function_is_passed_on(module):
    name = module("def build(spec):\n    return keras.Model(spec.inputs(), spec.stacked(spec.inputs()['embeddings']))")
    with pytest.raises(ModelError, match=r"^this model needs slots of one dim"):
        build(f"{name}:build", ModelSpec.of(["a", "b"], [1, 2], 1, ()))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_for_zeros_is_refused(module, value: str):
    name = module(
        f"def build(spec):\n    i = spec.inputs()\n"
        f"    return keras.Model(i, layers.Dense(1)(layers.concatenate(list(i.values()))) + float({value!r}))"
    )
    assert f"gives {value} for an input of zeros; expected finite logits" in refusal(f"{name}:build")


@pytest.mark.parametrize(
    "body",
    [
        'a, b = keras.Input((6,), name="x"), keras.Input((3,), name="y")\n'
        '    return keras.Model({"x": a, "y": b}, layers.Dense(1)(layers.concatenate([a, b])))',
        'i = {**spec.inputs(), "more": keras.Input((1,), name="more")}\n'
        "    return keras.Model(i, layers.Dense(1)(layers.concatenate(list(i.values()))))",
        'i = {**spec.inputs(), "embeddings": keras.Input((7,), name="embeddings")}\n'
        "    return keras.Model(i, layers.Dense(1)(layers.concatenate(list(i.values()))))",
        "return keras.Sequential([layers.Dense(1)])",
    ],
    ids=["other names", "one more", "other width", "sequential"],
)
def test_other_inputs_than_the_specs_are_refused(module, body: str):
    name = module(f"def build(spec):\n    {body}")
    message = refusal(f"{name}:build")
    assert "cannot be called with inputs {embeddings: (3, 6), dense_columns: (3, 3)}: " in message
    assert message.endswith("; build it from spec.inputs()")


def test_a_missing_module_is_refused():
    message = refusal("flowps_test_no_such_module:build")
    assert "module 'flowps_test_no_such_module' cannot be imported" in message
    assert "run from its folder or install it" in message


def test_a_module_that_misses_another_is_refused_by_that_ones_name(module):
    name = module("import flowps_test_no_such_dependency")
    assert "No module named 'flowps_test_no_such_dependency'" in refusal(f"{name}:build")


@pytest.mark.parametrize("function", ["biuld", ""])
def test_a_missing_function_is_refused(module, function: str):
    name = module("def build(spec):\n    return None")
    assert f"module {name!r} has no {function!r}" in refusal(f"{name}:{function}")


def test_what_cannot_be_called_is_refused(module):
    name = module("build = 3")
    assert "TypeError: 'int' object is not callable" in refusal(f"{name}:build")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def build(spec:", "SyntaxError"),
        ("raise ValueError('no weights file')", "no weights file"),
        ("keras.layers.NoSuchLayer", "NoSuchLayer"),
    ],
    ids=["syntax error", "raises", "attribute error"],
)
def test_a_module_that_cannot_be_run_is_refused_with_its_error(module, text: str, found: str):
    assert found in refusal(f"{module(text)}:build")


@pytest.mark.parametrize("name", [":build", ".models:build", ":"])
def test_a_name_without_a_module_is_refused(name: str):
    assert "module" in refusal(name)


# --- sequences: slots with pooling none -------------------------------------------------------------------------------

SEQUENCES = ModelSpec.of(["user", "history", "seen"], [2, 2, 3], 1, (4,), [0, 3, 2])


def test_a_sequence_takes_the_width_of_all_its_vectors():
    assert [(slot.column, slot.width) for slot in SEQUENCES.slots] == [(0, 2), (2, 6), (8, 6)]
    assert SEQUENCES.widths() == {"embeddings": 14, "dense_columns": 1, "lengths": 2}
    assert [slot.name for slot in SEQUENCES.sequences] == ["history", "seen"]
    assert BOTH.widths() == {"embeddings": 6, "dense_columns": 3}


def test_vectors_and_masks_of_sequences():
    embeddings = np.arange(28, dtype=np.float32).reshape(2, 14)
    found = SEQUENCES.vectors(keras.ops.convert_to_tensor(embeddings))
    np.testing.assert_array_equal(found["user"], embeddings[:, :2])
    np.testing.assert_array_equal(found["history"], embeddings[:, 2:8].reshape(2, 3, 2))
    np.testing.assert_array_equal(found["seen"], embeddings[:, 8:].reshape(2, 2, 3))
    lengths = keras.ops.convert_to_tensor(np.array([[0, 2], [3, 1]], np.int32))
    np.testing.assert_array_equal(SEQUENCES.mask(lengths, "history"), [[False] * 3, [True] * 3])
    np.testing.assert_array_equal(SEQUENCES.mask(lengths, "seen"), [[True, True], [True, False]])


@pytest.mark.parametrize("name", ["dnn", "lr"])
def test_built_in_models_take_sequences_as_they_stand(name: str):
    model = build(name, SEQUENCES)
    assert {tensor.name: tuple(tensor.shape) for tensor in model.inputs} == {
        "embeddings": (None, 14), "dense_columns": (None, 1), "lengths": (None, 2),
    }  # fmt: skip


def test_a_model_of_pooled_vectors_refuses_sequences():
    with pytest.raises(ModelError, match="'history' has pooling none; choose sum or mean"):
        build("deepfm", SEQUENCES)


def test_a_model_of_ones_own_sees_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The mean over the vectors that are there, by the mask: what the step gives it, and a gradient to those vectors only."""
    (tmp_path / "with_mask.py").write_text(
        "import keras\n"
        "def build(spec):\n"
        "    inputs = spec.inputs()\n"
        "    vectors = spec.vectors(inputs['embeddings'])['history']\n"
        "    mask = keras.ops.cast(spec.mask(inputs['lengths'], 'history'), 'float32')\n"
        "    total = keras.ops.sum(vectors * mask[:, :, None], axis=(1, 2))[:, None]\n"
        "    return keras.Model(inputs, keras.layers.Dense(1, kernel_initializer='ones')(total))\n"
    )
    monkeypatch.chdir(tmp_path)
    step = Step(build("with_mask:build", SEQUENCES), SEQUENCES, "sgd", 0.1, False)
    lengths = np.array([[1, 1], [0, 5], [2, 0]])  # [slot, sample]: of user, history (at most 3) and seen
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    batch = Batch(np.ones(2, np.float32), np.zeros((2, 1), np.float32), np.zeros(offsets[-1], np.uint64), offsets)
    embeddings = np.ones((2, 14), np.float32)
    np.testing.assert_allclose(step.predict(batch, embeddings), [0, 6])
    _, _, gradient = step.train(batch, embeddings)
    gradient = np.asarray(gradient)
    assert not gradient[0].any()
    assert gradient[1, 2:8].all()
    assert not gradient[1, [0, 1, *range(8, 14)]].any()


# --- precision ------------------------------------------------------------------------------------------------------------

NARROW = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize("precision", NARROW)
def test_built_in_models_compute_in_narrow_floats_and_answer_in_float32(precision: str, name: str, spec: ModelSpec, inputs):
    model = build(name, spec, precision)
    weights = randomize(model)
    assert {variable.dtype for variable in model.variables} == {"float32"}
    hidden = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense) and layer.units > 1]
    assert len(hidden) == (0 if name == "lr" else len(spec.hidden))
    assert {layer.compute_dtype for layer in hidden} <= {NARROW[precision]}
    x = inputs(spec)
    logits = model(x)
    assert logits.dtype == "float32"
    expected = NAIVE[name](x, weights, spec)
    np.testing.assert_allclose(logits, expected, atol=0.05 * np.abs(expected).max())
    if hidden:
        assert not np.allclose(logits, expected, rtol=1e-6), "as near as float32 would be"


@pytest.mark.parametrize("precision", ["float32", *NARROW])
def test_a_model_of_ones_own_is_built_in_the_precision_too(module, precision: str, inputs):
    model = build(f"{module(GOOD)}:build", BOTH, precision)
    assert {layer.compute_dtype for layer in model.layers if isinstance(layer, keras.layers.Dense)} == {
        NARROW.get(precision, "float32")
    }
    assert {variable.dtype for variable in model.variables} == {"float32"}
    step = Step(model, BOTH, "sgd", 0.1, jit_compile=False, loss_scaling=precision == "mixed_float16")
    x = inputs(BOTH)
    batch = Batch(np.ones(5, np.float32), x["dense_columns"], np.empty(0, np.uint64), np.zeros(16, np.int32))
    _, logits, gradient = step.train(batch, x["embeddings"])
    assert (logits.dtype, gradient.dtype) == (np.float32, "float32"), "though its logits are narrow"


@pytest.mark.parametrize("precision", NARROW)
def test_a_narrow_model_comes_back_from_its_file(precision: str, inputs, tmp_path: Path):
    model = build("dnn", BOTH, precision)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = inputs(BOTH)
    np.testing.assert_array_equal(again(x), model(x))


@pytest.mark.parametrize("text", [GOOD, "def build(spec):\n    raise ValueError('no')"], ids=["built", "raised"])
def test_the_process_keeps_its_own_precision(module, text: str):
    name = module(text)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        with nullcontext() if text is GOOD else pytest.raises(ModelError, match="raised ValueError"):
            build(f"{name}:build", BOTH, "float32")
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")
    with nullcontext() if text is GOOD else pytest.raises(ModelError, match="raised ValueError"):
        build(f"{name}:build", BOTH, "mixed_float16")
    assert keras.config.dtype_policy().name == "float32"

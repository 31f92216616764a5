"""The dense model of a bundle: written from a run's, as `.keras` and as a TensorFlow SavedModel, and loaded again.

Both take the inputs of `ModelSpec.inputs` and give logits, float32 [batch, labels], with the bundle's shift already in them, so
that whoever serves the model alone is right too. The only module here that imports TensorFlow.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flowps.trainer  # noqa: F401  before Keras: it chooses the backend

import keras  # isort: skip
import numpy as np
import tensorflow as tf

from flowps.batch import Float32
from flowps.errors import BundleError, ModelError, RunDirError
from flowps.serving import manifest as files
from flowps.serving.manifest import Manifest
from flowps.trainer.models import ModelSpec, build

_TOLERANCE, _HALF_TOLERANCE = 1e-5, 0.05  # between the two forms: they add up in other orders
Model = Callable[[dict[str, Any]], Float32]


def read_model(path: Path, name: str, spec: ModelSpec, precision: str) -> keras.Model:
    """The model that a run has left at `path`; `name` and `precision` as in its config, for models with layers of their own.

    Raises RunDirError where it cannot be read, or does not fit `spec`.
    """
    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:  # Keras raises what it likes for layers that it does not know
        model = _rebuilt(path, name, spec, precision, error)
    try:
        shape = model(_zeros(spec, 3), training=False).shape
    except Exception as error:
        raise RunDirError(f"{path}: does not fit schema.json: {_one_line(error)}; are both of the same run?") from None
    if tuple(shape) not in ((3, len(spec.labels)), *([(3,)] if len(spec.labels) == 1 else [])):
        raise RunDirError(
            f"{path}: does not fit schema.json: it gives shape {tuple(shape)} for 3 samples and {len(spec.labels)} label(s); "
            "are both of the same run?"
        )
    return model


def write_model(model: keras.Model, spec: ModelSpec, logit_shift: float, folder: Path) -> None:
    """Write `model`, its logits shifted, to `folder` in both forms, and compare what they give.

    Raises ModelError where TensorFlow cannot export it, or the forms differ.
    """
    inputs = spec.inputs()
    logits = keras.layers.Reshape((len(spec.labels),))(model(inputs))
    logits = keras.layers.Rescaling(1.0, offset=logit_shift, dtype="float32", name="logits")(logits)
    served = keras.Model(inputs, logits, name="served")
    try:
        served.save(folder / files.MODEL)
        served.export(folder / files.SAVED_MODEL, format="tf_saved_model", verbose=False)
    except OSError:
        raise
    except Exception as error:  # it is the user's model that is traced here
        raise ModelError(f"the model cannot be exported as a SavedModel: {_one_line(error)}") from error
    given = _drawn(spec, 5)
    expected = keras.ops.convert_to_numpy(model(given, training=False)).reshape(5, -1).astype(np.float32) + np.float32(logit_shift)
    found = _SavedModel(folder / files.SAVED_MODEL)(given)
    tolerance = _TOLERANCE if all(layer.compute_dtype == "float32" for layer in model.layers) else _HALF_TOLERANCE
    if not np.allclose(found, expected, rtol=tolerance, atol=tolerance):
        raise ModelError(
            f"the exported model gives logits that differ by {np.abs(found - expected).max():.3g} from those of the trained one: "
            "does a layer of yours draw numbers, or behave in another way when it is exported?"
        )


def load_model(folder: Path, manifest: Manifest) -> Model:
    """The SavedModel of the version in `folder`: inputs by name → logits float32 [n, labels]. Raises BundleError."""
    path = folder / files.SAVED_MODEL
    try:
        model = _SavedModel(path)
    except Exception as error:  # TensorFlow's own, of many kinds
        raise BundleError(f"{path}: cannot be loaded: {_one_line(error)}; copy the bundle again, or export again") from None
    wanted = {tensor.name for tensor in manifest.inputs}
    if model.inputs != wanted:
        raise BundleError(f"{path}: takes {sorted(model.inputs)}, the manifest says {sorted(wanted)}; export the run again")
    return model


class _SavedModel:
    """Inputs by name → logits."""

    def __init__(self, path: Path) -> None:
        self._kept = tf.saved_model.load(str(path))  # its variables live as long as this
        self._call = self._kept.signatures[files.SIGNATURE]
        self.inputs = set(self._call.structured_input_signature[1])

    def __call__(self, inputs: dict[str, Any]) -> Float32:
        return self._call(**{name: tf.constant(value) for name, value in inputs.items()})[files.OUTPUT].numpy()


def _rebuilt(path: Path, name: str, spec: ModelSpec, precision: str, error: Exception) -> keras.Model:
    """A model with layers that Keras does not know: built by the run's own function, and given the weights."""
    if not path.exists() or not zipfile.is_zipfile(path):
        raise RunDirError(f"{path}: cannot be read: {_one_line(error)}") from None
    try:
        model = build(name, spec, precision)
        model.load_weights(path)
    except Exception as second:
        raise RunDirError(
            f"{path}: cannot be read: {_one_line(error)}; nor does it fit what model {name!r} builds for schema.json: "
            f"{_one_line(second)}"
        ) from None
    return model


def _zeros(spec: ModelSpec, samples: int) -> dict[str, Any]:
    return {
        key: np.zeros((samples, width), np.int32 if key == "lengths" else np.float32) for key, width in spec.widths().items()
    }  # fmt: skip


def _drawn(spec: ModelSpec, samples: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found = _zeros(spec, samples)
    for key, array in found.items():
        if key != "lengths":
            array[:] = rng.normal(0, 0.1, array.shape)
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

"""Find a model by name, build it from a spec, and check that it is one."""

from __future__ import annotations

import difflib
import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.random import seed_generator

from flowps.config import GIVEN
from flowps.errors import ModelError
from flowps.trainer.models.autoint import autoint
from flowps.trainer.models.dcn import dcn
from flowps.trainer.models.deepfm import deepfm
from flowps.trainer.models.din import din
from flowps.trainer.models.dlrm import dlrm
from flowps.trainer.models.dnn import dnn
from flowps.trainer.models.fm import fm
from flowps.trainer.models.lr import lr
from flowps.trainer.models.mmoe import mmoe
from flowps.trainer.models.shared_bottom import shared_bottom
from flowps.trainer.models.spec import ModelSpec
from flowps.trainer.models.wide_deep import wide_deep
from flowps.trainer.models.xdeepfm import xdeepfm

BUILT_IN: dict[str, Callable[[ModelSpec], keras.Model]] = {
    "dnn": dnn,
    "lr": lr,
    "fm": fm,
    "wide_deep": wide_deep,
    "deepfm": deepfm,
    "dcn": dcn,
    "xdeepfm": xdeepfm,
    "autoint": autoint,
    "dlrm": dlrm,
    "din": din,
    "shared_bottom": shared_bottom,
    "mmoe": mmoe,
}


def build(
    name: str, spec: ModelSpec, precision: str = "float32", seed: int = 0, function: Callable[[ModelSpec], Any] | None = None
) -> keras.Model:  # fmt: skip
    """The model called `name`, built from `spec`: a built-in one, or `"module:function"`; or what `function` builds.

    precision   Keras's dtype policy of layers that do not say another
    seed        of the initializers and layers that have none

    A module is looked for on the path and in the working directory.
    Raises ModelError when it cannot be found, raises, is no keras.Model, does not take the spec's inputs, does not give one logit
    per sample and label ([batch, labels], of one label also [batch]), gives NaN or infinity for an input of zeros, or could not be
    saved.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        with _own_seeds(seed):
            if function is not None:
                model = _guarded(name, function, spec)
            else:
                model = _function(name)(spec) if ":" not in name else _call(name, spec)
    finally:
        keras.config.set_dtype_policy(before)
    if not isinstance(model, keras.Model):
        raise ModelError(f"model {name!r}: expected the function to return a keras.Model, found {type(model).__name__}")
    for samples in (3, 5):  # not 1, and not one size alone: a wrong shape must not fit by chance
        _try(name, model, spec, samples)
    try:
        keras.saving.serialize_keras_object(model)
    except Exception as error:
        raise ModelError(
            f"model {name!r} could not be saved after training: {' '.join(str(error).split())[:200]}; give your layers a get_config"
        ) from error
    return model


def build_or_read(name: str, path: Path, spec: ModelSpec, precision: str = "float32") -> keras.Model:
    """The model `name`, as `build` gives it; one that was given as a function, in Python, is read from the file it was saved to.

    Raises ModelError where neither can be done.
    """
    if name in BUILT_IN or ":" in name:
        return build(name, spec, precision)
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # Keras's are of many kinds
        raise ModelError(
            f"{path}: the model, which was given as a function, cannot be read: {' '.join(str(error).split())[:300]}; a run that "
            "has not ended has none, and layers of your own must be imported and registered "
            "(keras.saving.register_keras_serializable)"
        ) from error


@contextmanager
def _own_seeds(seed: int) -> Iterator[None]:
    """Let Keras draw the seeds of initializers from numbers of its own, not from Python's, which any thread draws from too."""
    before = seed_generator.python_random
    seed_generator.python_random = random.Random(seed)
    try:
        yield
    finally:
        seed_generator.python_random = before


def _try(name: str, model: keras.Model, spec: ModelSpec, samples: int) -> None:
    """Refuse a model that does not give one finite logit for each of `samples` samples of zeros."""
    zeros = {key: np.zeros((samples, width), np.int32 if key == "lengths" else np.float32) for key, width in spec.widths().items()}
    try:
        logits = keras.ops.convert_to_numpy(model(zeros, training=False))
    except BaseException as error:
        raise ModelError(
            f"model {name!r} cannot be called with inputs {{{', '.join(f'{k}: {v.shape}' for k, v in zeros.items())}}}: "
            f"{type(error).__name__}: {error}; build it from spec.inputs()"
        ) from error
    labels = len(spec.labels)
    if logits.shape not in ((samples, labels), *([(samples,)] if labels == 1 else [])):
        per = "one logit per sample, [batch, 1]" if labels == 1 else f"a logit for each label, [batch, {labels}]"
        raise ModelError(
            f"model {name!r} gives shape {logits.shape} for {samples} samples; expected {per}: "
            f"end it with keras.layers.Dense({labels})"
        )
    if not np.isfinite(logits).all():
        raise ModelError(f"model {name!r} gives {logits.reshape(-1)[0]} for an input of zeros; expected finite logits")


def _function(name: str) -> Callable[[ModelSpec], Any]:
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.endswith(GIVEN):
        raise ModelError(
            f"the run's model was given to flowps.train as a Python function, {name.removesuffix(GIVEN)!r}: give it again, or put "
            'it into a module and name it as "my_module:build"'
        )
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ModelError(f'model {name!r} is unknown; {hint}built in are {", ".join(BUILT_IN)}; your own is named as "my_module:build"')


def _call(name: str, spec: ModelSpec) -> Any:
    module_name, _, function_name = name.partition(":")
    # `python -m` puts the working directory on the path; a Dask worker or an installed script does not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(
            f"model {name!r}: module {module_name!r} cannot be imported: {error}; run from its folder or install it"
        ) from error
    except BaseException as error:  # it is the user's code that runs here, and may call sys.exit
        raise ModelError(f"model {name!r}: importing module {module_name!r} raised {type(error).__name__}: {error}") from error
    if not hasattr(module, function_name):
        raise ModelError(f"model {name!r}: module {module_name!r} has no {function_name!r}")
    return _guarded(name, getattr(module, function_name), spec)


def _guarded(name: str, function: Callable[[ModelSpec], Any], spec: ModelSpec) -> Any:
    """What the user's function gives."""
    try:
        return function(spec)
    except ModelError:
        raise
    except BaseException as error:
        called = name.rpartition(":")[2]
        raise ModelError(f"model {name!r}: {called} raised {type(error).__name__}: {error}") from error

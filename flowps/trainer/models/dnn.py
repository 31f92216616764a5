"""Multi-layer perceptron over the concatenated inputs (the "deep" part of Cheng et al., "Wide & deep learning", DLRS 2016)."""

from __future__ import annotations

import keras

from flowps.trainer.models.spec import ModelSpec


def dnn(spec: ModelSpec) -> keras.Model:
    """logit = Dense(1)(ReLU layers of `spec.hidden` over [embeddings, dense])."""
    inputs = spec.inputs()
    x = spec.concatenated(inputs)
    for units in spec.hidden:
        x = keras.layers.Dense(units, activation="relu")(x)
    return keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(x), name="dnn")

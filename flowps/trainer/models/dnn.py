"""Multi-layer perceptron over the concatenated inputs (the "deep" part of Cheng et al., "Wide & deep learning", DLRS 2016)."""

from __future__ import annotations

import keras

from flowps.trainer.models.spec import ModelSpec


def dnn(spec: ModelSpec) -> keras.Model:
    """logit = Dense(1)(ReLU layers of `spec.hidden` over [embeddings, dense])."""
    spec.one_label("dnn")
    inputs = spec.inputs()
    return keras.Model(inputs, spec.logit(spec.mlp(spec.concatenated(inputs))), name="dnn")

"""Logistic regression (McMahan et al., "Ad click prediction: a view from the trenches", KDD 2013)."""

from __future__ import annotations

import keras

from flowps.trainer.models.spec import ModelSpec


def lr(spec: ModelSpec) -> keras.Model:
    """logit = bias + the sum of all slots' floats + a weight per dense column.

    A sign's weight is its row, so `slot_default.dim = 1` is all that is needed; with more, the weight is the row's sum.
    """
    spec.one_label("lr")
    inputs = spec.inputs()
    terms = []
    if "embeddings" in inputs:
        terms.append(keras.ops.sum(inputs["embeddings"], axis=1, keepdims=True))
    # Without dense columns the layer still carries the bias.
    bias_over = inputs["dense_columns"] if "dense_columns" in inputs else keras.ops.zeros_like(terms[0])
    terms.append(keras.layers.Dense(1, kernel_initializer="zeros", kernel_regularizer=spec.l2(), dtype="float32")(bias_over))
    return keras.Model(inputs, keras.layers.add(terms, dtype="float32") if len(terms) > 1 else terms[0], name="lr")

"""Factorization machine (Rendle, "Factorization machines", ICDM 2010).

Deviations: a sign's weight w is a learned projection of its vector, not a number of its own; dense columns have a weight and no
vector, so that they enter no products.
"""

from __future__ import annotations

from typing import Any

import keras

from flowps.trainer.models.spec import ModelSpec


def fm(spec: ModelSpec) -> keras.Model:
    """logit = w0 + Σ_i w_i x_i + Σ_i Σ_j>i <v_i, v_j> (eq. 1 of the paper), over slot vectors v of one dim."""
    spec.one_label("fm")
    inputs = spec.inputs()
    linear = spec.logit(spec.concatenated(inputs))
    if "embeddings" not in inputs:
        return keras.Model(inputs, linear, name="fm")
    products = second_order(spec.stacked(inputs["embeddings"], "float32"))
    return keras.Model(inputs, keras.layers.add([linear, products], dtype="float32"), name="fm")


def second_order(vectors: Any) -> Any:
    """Σ_i Σ_j>i <v_i, v_j> of `vectors` [batch, slot, dim] as ½ Σ_d ((Σ_s v_sd)² - Σ_s v_sd²), lemma 3.1: [batch, 1].

    The difference cancels most of both terms: the vectors must be float32, also where other layers compute in 16 bits.
    """
    square_of_sum = keras.ops.square(keras.ops.sum(vectors, axis=1))
    sum_of_squares = keras.ops.sum(keras.ops.square(vectors), axis=1)
    return 0.5 * keras.ops.sum(square_of_sum - sum_of_squares, axis=1, keepdims=True)

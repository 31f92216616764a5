"""DeepFM (Guo et al., "DeepFM: a factorization-machine based neural network for CTR prediction", IJCAI 2017).

Deviation: the first-order weight of a sign is a learned projection of its vector, not a second table of width 1; dense columns
enter the first-order and the deep part, not the products.
"""

from __future__ import annotations

import keras

from flowps.trainer.models.spec import ModelSpec


def deepfm(spec: ModelSpec) -> keras.Model:
    """logit = linear + ½ Σ_d ((Σ_s v_sd)² - Σ_s v_sd²) + MLP, over slot vectors v of one dim (eq. 1-4 of the paper)."""
    inputs = spec.inputs()
    x = spec.concatenated(inputs)
    terms = [keras.layers.Dense(1, dtype="float32")(x)]
    if "embeddings" in inputs:
        vectors = spec.stacked(inputs["embeddings"])
        square_of_sum = keras.ops.square(keras.ops.sum(vectors, axis=1))
        sum_of_squares = keras.ops.sum(keras.ops.square(vectors), axis=1)
        terms.append(0.5 * keras.ops.sum(square_of_sum - sum_of_squares, axis=1, keepdims=True))
    for units in spec.hidden:
        x = keras.layers.Dense(units, activation="relu")(x)
    terms.append(keras.layers.Dense(1, use_bias=False, dtype="float32")(x))
    return keras.Model(inputs, keras.layers.add(terms, dtype="float32"), name="deepfm")

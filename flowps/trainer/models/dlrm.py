"""DLRM (Naumov et al., "Deep learning recommendation model for personalization and recommendation systems", arXiv:1906.00091)."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from flowps.errors import ModelError
from flowps.trainer.models.spec import ModelSpec


def dlrm(spec: ModelSpec) -> keras.Model:
    """logit = Dense(1)(MLP([z, <v_i, v_j> for i < j])) (section 2.2 of the paper), over slot vectors v of one dim.

    z, the bottom network's vector of the dense columns (`net.bottom`, then the slots' dim, ReLU), is one of the v. Without
    dense columns there is no z.
    """
    spec.one_label("dlrm")
    inputs = spec.inputs()
    vectors = spec.stacked(inputs.get("embeddings"))
    bottom = []
    if "dense_columns" in inputs:
        dim = vectors.shape[2]
        x = spec.mlp(inputs["dense_columns"], spec.net.bottom)
        bottom.append(keras.layers.Dense(dim, activation="relu", kernel_regularizer=spec.l2())(x))
        vectors = keras.layers.concatenate([keras.layers.Reshape((1, dim))(bottom[0]), vectors], axis=1)
    if vectors.shape[1] < 2:
        raise ModelError(
            f"model 'dlrm' multiplies two vectors, but there is only that of {spec.slots[0].name!r}; add a slot or dense columns"
        )
    found = [*bottom, _dots(vectors)]
    x = keras.layers.concatenate(found) if len(found) > 1 else found[0]
    return keras.Model(inputs, spec.logit(spec.mlp(x)), name="dlrm")


def _dots(vectors: Any) -> Any:
    """The dot product of each vector [batch, count, dim] with each later one, [batch, count * (count - 1) / 2]."""
    count = vectors.shape[1]
    every = keras.ops.matmul(vectors, keras.ops.transpose(vectors, (0, 2, 1)))
    first, second = np.triu_indices(count, k=1)
    return keras.ops.take(keras.layers.Reshape((count * count,))(every), first * count + second, axis=1)

"""Wide & deep (Cheng et al., "Wide & deep learning for recommender systems", DLRS 2016).

Deviations: the wide weight of a sign is a learned projection of its vector, not a number of its own; the wide part has no
cross-product transformations of its own (a crossed column in the data is a slot as any other); one optimizer trains both parts.
"""

from __future__ import annotations

import keras

from flowps.trainer.models.spec import ModelSpec


def wide_deep(spec: ModelSpec) -> keras.Model:
    """logit = w_wide·x + w_deep·MLP(x) + b (eq. 3 of the paper), over [embeddings, dense]."""
    spec.one_label("wide_deep")
    inputs = spec.inputs()
    x = spec.concatenated(inputs)
    terms = [spec.logit(x), spec.logit(spec.mlp(x), use_bias=False)]
    return keras.Model(inputs, keras.layers.add(terms, dtype="float32"), name="wide_deep")

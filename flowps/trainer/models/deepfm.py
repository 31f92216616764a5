"""DeepFM (Guo et al., "DeepFM: a factorization-machine based neural network for CTR prediction", IJCAI 2017).

Deviation: the first-order weight of a sign is a learned projection of its vector, not a second table of width 1; dense columns
enter the first-order and the deep part, not the products.
"""

from __future__ import annotations

import keras

from flowps.trainer.models.fm import second_order
from flowps.trainer.models.spec import ModelSpec


def deepfm(spec: ModelSpec) -> keras.Model:
    """logit = linear + ½ Σ_d ((Σ_s v_sd)² - Σ_s v_sd²) + MLP, over slot vectors v of one dim (eq. 1-4 of the paper)."""
    spec.one_label("deepfm")
    inputs = spec.inputs()
    x = spec.concatenated(inputs)
    terms = [spec.logit(x)]
    if "embeddings" in inputs:
        terms.append(second_order(spec.stacked(inputs["embeddings"], "float32")))
    terms.append(spec.logit(spec.mlp(x), use_bias=False))
    return keras.Model(inputs, keras.layers.add(terms, dtype="float32"), name="deepfm")

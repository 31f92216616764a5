"""MMoE (Ma et al., "Modeling task relationships in multi-task learning with multi-gate mixture-of-experts", KDD 2018)."""

from __future__ import annotations

from typing import Any

import keras

from flowps.errors import ModelError
from flowps.trainer.models.shared_bottom import towers
from flowps.trainer.models.spec import ModelSpec


def mmoe(spec: ModelSpec) -> keras.Model:
    """logit_k = Dense_k(tower_k(Σ_i g_k(x)_i f_i(x))) with g_k(x) = softmax(W_k x) (section 4.2 of the paper).

    x = [embeddings, dense]; the experts f, `net.experts` of them, are MLPs of `net.hidden`; each label has a gate g and a tower
    of `net.tower`.
    """
    if not spec.hidden:
        raise ModelError("model 'mmoe': net.hidden is empty, so that all experts would be the same; give it units")
    inputs = spec.inputs()
    x = spec.concatenated(inputs)
    experts = [spec.mlp(x) for _ in range(spec.net.experts)]
    return keras.Model(inputs, towers(spec, [_mixture(spec, x, experts) for _ in spec.labels]), name="mmoe")


def _mixture(spec: ModelSpec, x: Any, experts: list[Any]) -> Any:
    """Σ_i g(x)_i f_i(x) with a gate of its own, [batch, units]."""
    if len(experts) == 1:  # whose gate is 1
        return experts[0]
    gate = keras.layers.Dense(len(experts), "softmax", use_bias=False, kernel_regularizer=spec.l2())(x)
    return keras.ops.einsum("be,beu->bu", gate, keras.ops.stack(experts, axis=1))

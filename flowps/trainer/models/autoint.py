"""AutoInt (Song et al., "AutoInt: automatic feature interaction learning via self-attentive neural networks", CIKM 2019).

With `net.hidden` it is the paper's AutoInt+, whose logit has an MLP's added; with none it is AutoInt. Not
`keras.layers.MultiHeadAttention`, which projects the heads' outputs once more and scales the scores; the paper does neither.
"""

from __future__ import annotations

from typing import Any

import keras

from flowps.errors import ModelError
from flowps.trainer.models.spec import ModelSpec


def autoint(spec: ModelSpec) -> keras.Model:
    """logit = w·[fields after `net.attention_layers`] + b (+ w_dnn·MLP), section 4 of the paper.

    The fields are the slots' vectors, of one dim, and for each dense column its value times a vector of its own.
    """
    spec.one_label("autoint")
    inputs = spec.inputs()
    fields = spec.stacked(inputs.get("embeddings"))
    if "dense_columns" in inputs:
        shape = (spec.dense_width, fields.shape[2])
        embed = keras.layers.EinsumDense("bi,id->bid", shape, kernel_regularizer=spec.l2())
        fields = keras.layers.concatenate([fields, embed(inputs["dense_columns"])], axis=1)
    if fields.shape[1] < 2:
        raise ModelError(
            f"model 'autoint' relates fields to each other, but there is only {spec.slots[0].name!r}; add a slot or dense columns"
        )
    for _ in range(spec.net.attention_layers):
        fields = _attention(spec, fields)
    logit = spec.logit(keras.layers.Flatten()(fields))
    if spec.hidden:
        deep = spec.logit(spec.mlp(spec.concatenated(inputs)), use_bias=False)
        logit = keras.layers.add([logit, deep], dtype="float32")
    return keras.Model(inputs, logit, name="autoint")


def _attention(spec: ModelSpec, fields: Any) -> Any:
    """ReLU([heads] + W_res e) over fields e, [batch, field, heads * dim]; a head of field m, with weights of its own, is

    Σ_k softmax_k(<W_q e_m, W_k e_k>) W_v e_k.
    """
    heads, dim = spec.net.attention_heads, spec.net.attention_dim

    def projected(units: int) -> Any:
        return keras.layers.Dense(units, use_bias=False, kernel_regularizer=spec.l2())(fields)

    # Keras's order is query, value, key. One layer a head: half the time of one for all, with its transpositions.
    found = [keras.layers.Attention()([projected(dim), projected(dim), projected(dim)]) for _ in range(heads)]
    joined = keras.layers.concatenate(found) if heads > 1 else found[0]
    return keras.layers.ReLU()(keras.layers.add([joined, projected(heads * dim)]))

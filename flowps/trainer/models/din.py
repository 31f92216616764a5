"""DIN (Zhou et al., "Deep interest network for click-through rate prediction", KDD 2018).

Deviations: ReLU instead of PReLU and Dice; the activation unit sees [h, t, h - t, h ⊙ t], as in the authors' code, and not
the outer product; it has neither batch normalisation, which would count the padding, nor dropout; no mini-batch aware
regularisation.
"""

from __future__ import annotations

from typing import Any

import keras

from flowps.errors import ModelError
from flowps.trainer.models.spec import ModelSpec, SlotSpec


def din(spec: ModelSpec) -> keras.Model:
    """logit = Dense(1)(MLP([slots, dense])), where a history stands as Σ_j a(h_j, t) h_j (eq. 3 of the paper).

    t is the vector of the slot `net.target`; a history is a slot with pooling none and of t's dim, and has an activation unit a
    (`net.activation_unit`) of its own. The weights a are not normalised. Other slots with pooling none stand as they are.
    """
    spec.one_label("din")
    target, histories = _roles(spec)
    inputs = spec.inputs()
    found = spec.vectors(inputs["embeddings"])
    for slot in spec.sequences:
        if slot in histories:
            mask = spec.mask(inputs["lengths"], slot.name)
            found[slot.name] = _interest(spec, found[slot.name], found[target.name], mask)
        else:
            found[slot.name] = keras.layers.Flatten()(found[slot.name])
    dense = [inputs["dense_columns"]] if "dense_columns" in inputs else []
    x = keras.layers.concatenate([*found.values(), *dense])
    return keras.Model(inputs, spec.logit(spec.mlp(x)), name="din")


def _roles(spec: ModelSpec) -> tuple[SlotSpec, list[SlotSpec]]:
    """The target, and the histories that are compared with it."""
    pooled = ", ".join(slot.name for slot in spec.slots if not slot.max_len) or "there are none"
    if not spec.net.target:
        raise ModelError(f"model 'din' compares a history with a target slot; set net.target to a pooled slot: {pooled}")
    target = next((slot for slot in spec.slots if slot.name == spec.net.target), None)
    if target is None:
        raise ModelError(
            f"model 'din': net.target is {spec.net.target!r}, but no slot is called so; choose a pooled slot: {pooled}"
        )
    if target.max_len:
        raise ModelError(
            f"model 'din': the target {target.name!r} has pooling none and is a history itself; choose a pooled slot: {pooled}"
        )
    histories = [slot for slot in spec.sequences if slot.dim == target.dim]
    if not histories:
        found = ", ".join(f"{slot.name}: {slot.dim}" for slot in spec.sequences) or "none"
        raise ModelError(
            f"model 'din' needs a history: a slot with pooling none and dim {target.dim}, as the target {target.name!r} has; slots "
            f'with pooling none are {found}; give the slot of the history pooling = "none" and dim = {target.dim}'
        )
    return target, histories


def _interest(spec: ModelSpec, history: Any, target: Any, mask: Any) -> Any:
    """Σ_j a(h_j, t) h_j over the vectors of `history` [batch, max_len, dim] that are there: [batch, dim]."""
    beside = keras.layers.RepeatVector(history.shape[1])(target)
    x = keras.layers.concatenate([history, beside, history - beside, history * beside])
    for units in spec.net.activation_unit:
        x = keras.layers.Dense(units, activation="relu", kernel_regularizer=spec.l2())(x)
    weights = keras.layers.Dense(1, kernel_regularizer=spec.l2())(x)
    weights = keras.ops.where(keras.ops.expand_dims(mask, 2), weights, 0.0)
    return keras.ops.sum(weights * history, axis=1)

"""Shared bottom for several labels (Caruana, "Multitask learning", Machine Learning 28, 1997; figure 1a of the MMoE paper)."""

from __future__ import annotations

from typing import Any

import keras

from flowps.trainer.models.spec import ModelSpec


def shared_bottom(spec: ModelSpec) -> keras.Model:
    """logit_k = Dense_k(tower_k(MLP([embeddings, dense]))): the MLP is shared, each label has a tower of `net.tower`."""
    inputs = spec.inputs()
    bottom = spec.mlp(spec.concatenated(inputs))
    return keras.Model(inputs, towers(spec, [bottom] * len(spec.labels)), name="shared_bottom")


def towers(spec: ModelSpec, found: list[Any]) -> Any:
    """The logit of each label over its own one of `found`, [batch, labels]."""
    logits = [spec.logit(spec.mlp(x, spec.net.tower)) for x in found]
    return keras.layers.concatenate(logits, dtype="float32") if len(logits) > 1 else logits[0]

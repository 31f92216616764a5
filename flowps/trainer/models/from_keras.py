"""An existing Keras model as a model of flowps: its `Embedding` layers give way to slots, the rest stays as it is.

A functional model with integer inputs, each into an `Embedding` layer, becomes a function from a spec to a model like any other.
The embedding weights are left behind: rows live in the shards, and begin as the slots say. Dense weights are taken along.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import keras

from flowps.errors import ModelError
from flowps.trainer.models.spec import ModelSpec, SlotSpec


def from_keras(model: keras.Model) -> Callable[[ModelSpec], keras.Model]:
    """What builds `model` from a spec, with the vectors of slots instead of the outputs of its `Embedding` layers.

    An input that goes into an `Embedding` layer is the slot of its name, whose dim must be the layer's output_dim: of shape () or
    (1,) a pooled slot, of shape (n,) one with pooling none and max_len n; with mask_zero, padding is masked. Every other input is
    the dense column of its name, or, if it is the only one, all dense columns. A sigmoid at the end is left out: flowps trains on
    logits. A layer that several inputs share is shared no more: every slot has rows of its own.

    Raises ModelError for a model that is not functional, has several outputs, has no `Embedding` layer or one that is not right
    behind an input, or uses an input in two ways.
    """
    graph = model._functional if isinstance(model, keras.Sequential) else model
    if not hasattr(graph, "operations") or not isinstance(graph.inputs, list):
        raise ModelError(
            f"{type(model).__name__} {model.name!r} has no graph of layers; give a functional or Sequential model that is built, "
            "or a function from a ModelSpec to a keras.Model"
        )
    if len(graph.outputs) != 1:
        raise ModelError(
            f"model {model.name!r} has {len(graph.outputs)} outputs, expected one, with a logit for each label: concatenate them"
        )
    model = keras.Model(graph.inputs, graph.outputs, name=model.name)  # inputs in a list, however they were given
    return _Converted(model, _embeddings(model))


class _Converted:
    """Builds a model like the one it was made from. Can be pickled, as Keras models can."""

    def __init__(self, model: keras.Model, embeddings: dict[str, str]) -> None:
        self._embeddings = embeddings  # input → the Embedding layer that it goes into
        self._input_names = [tensor.name for tensor in model.inputs]
        self._config = keras.saving.serialize_keras_object(model)
        left = {*embeddings.values()}
        self._weights = {layer.name: layer.get_weights() for layer in model.layers if layer.name not in left}

    @property
    def __name__(self) -> str:
        return str(self._config["config"]["name"])

    def __call__(self, spec: ModelSpec) -> keras.Model:
        """The model for `spec`. Raises ModelError where slots and dense columns do not fit its inputs."""
        original = keras.saving.deserialize_keras_object(deepcopy(self._config))  # it is taken apart
        for layer in original.layers:
            if layer.name in self._weights:
                layer.set_weights(self._weights[layer.name])
        inputs = spec.inputs()
        vectors = spec.vectors(inputs["embeddings"]) if "embeddings" in inputs else {}
        dense = [name for name in self._input_names if name not in self._embeddings]
        found: dict[str, Any] = {}
        for tensor in original.inputs:
            if tensor.name in self._embeddings:
                layer = original.get_layer(self._embeddings[tensor.name])
                found[tensor.name] = _vectors_of(tensor, layer, spec, vectors)
            else:
                found[tensor.name] = _dense_of(tensor, spec, inputs, is_only=len(dense) == 1)
        left_out = [slot.name for slot in spec.slots if slot.name not in found]
        if left_out:
            raise ModelError(
                f"model {original.name!r} has no input for the slots {', '.join(left_out[:5])}; its inputs are "
                f"{', '.join(self._input_names)}: leave the columns out with data.exclude"
            )
        given = [found[name] for name in self._input_names]
        masking = {of.name: keras.layers.Masking(name=of.name) for of in original.layers if getattr(of, "mask_zero", False)}
        last = _last(original)

        core = keras.models.clone_model(
            original, input_tensors=given, clone_function=lambda layer: _without_sigmoid(layer, layer is last),
            call_function=partial(self._call, last, masking),
        )  # fmt: skip
        outputs = core(given)
        return keras.Model(inputs, keras.tree.flatten(outputs)[0], name=original.name)

    def _call(
        self, last: keras.Operation, masking: dict[str, keras.Layer], operation: keras.Operation, *arguments: Any, **keywords: Any
    ) -> Any:  # fmt: skip
        """Where ids have become vectors already: what an operation of the original makes of its inputs.

        masking   what stands for Embedding layers with mask_zero. Padding is all zeros, as no row stays that was ever trained
        """
        if operation.name in self._embeddings.values():
            return masking[operation.name](arguments[0]) if operation.name in masking else arguments[0]
        if operation is last and type(operation).__name__ == "Sigmoid":
            return arguments[0]
        source = operation._inbound_nodes[0] if operation._inbound_nodes else None  # of the original: later ones are of this call
        if source is not None and _is_mask(source) and source.input_tensors[0].name in self._embeddings:
            return keras.ops.any(keras.ops.not_equal(arguments[0], 0.0), axis=-1)
        mask = keywords.get("mask")
        if isinstance(operation, keras.layers.GlobalAveragePooling1D) and mask is not None:
            # Keras divides by the number of vectors: those of an empty list, all zeros, are counted instead.
            keywords["mask"] = keras.ops.logical_or(mask, keras.ops.logical_not(keras.ops.any(mask, axis=-1, keepdims=True)))
        return operation(*arguments, **keywords)


def _embeddings(model: keras.Model) -> dict[str, str]:
    """Input → the one Embedding layer that it goes into."""
    found: dict[str, str] = {}
    inputs = {tensor.name for tensor in model.inputs}
    for operation in model.operations:
        for node in operation._inbound_nodes:
            for tensor in node.input_tensors:
                if tensor.name not in inputs or isinstance(operation, keras.layers.InputLayer) or _is_mask(node):
                    continue
                name = operation.name if isinstance(operation, keras.layers.Embedding) else ""
                if found.setdefault(tensor.name, name) != name:
                    raise ModelError(
                        f"model {model.name!r}: input {tensor.name!r} goes into {found[tensor.name] or 'a layer'} and into "
                        f"{name or operation.name}; a slot has one vector: give each an input, and a column, of its own"
                    )
    found = {name: layer for name, layer in found.items() if layer}
    left = [of.name for of in model.operations if isinstance(of, keras.layers.Embedding) and of.name not in found.values()]
    if left:
        raise ModelError(
            f"model {model.name!r}: Embedding {left[0]!r} is not right behind an input, so no column has its ids; let an input of "
            "its own go into it"
        )
    if not found:
        raise ModelError(f"model {model.name!r} has no Embedding layer right behind an input: there is nothing to replace by slots")
    return found


def _vectors_of(tensor: Any, layer: keras.layers.Embedding, spec: ModelSpec, vectors: dict[str, Any]) -> Any:
    """What stands for the output of an Embedding layer."""
    slot = next((slot for slot in spec.slots if slot.name == tensor.name), None)
    if slot is None:
        raise ModelError(
            f"input {tensor.name!r} goes into Embedding {layer.name!r}, but there is no slot of that name; slots are "
            f"{', '.join(slot.name for slot in spec.slots)}: rename the input or the column"
        )
    if slot.dim != layer.output_dim:
        raise ModelError(
            f"slot {slot.name!r} has dim {slot.dim}, Embedding {layer.name!r} output_dim {layer.output_dim}; set "
            f"--slot.{slot.name}.dim {layer.output_dim}"
        )
    return _shaped(tensor, slot, vectors[slot.name])


def _shaped(tensor: Any, slot: SlotSpec, vector: Any) -> Any:
    shape = tuple(tensor.shape[1:])
    if len(shape) > 1:
        raise ModelError(f"input {tensor.name!r} has shape {shape}; a slot stands for an input of shape (), (1,) or (n,)")
    if slot.max_len:
        if shape not in ((slot.max_len,), (None,)):
            raise ModelError(
                f"slot {slot.name!r} has pooling none and max_len {slot.max_len}, the input has shape {shape}: set "
                f"--slot.{slot.name}.max_len {shape[0] if shape else 1}, or another pooling"
            )
        return vector
    if shape not in ((), (1,)):
        raise ModelError(
            f"input {tensor.name!r} has shape {shape}, but slot {slot.name!r} is pooled to one vector: set "
            f"--slot.{slot.name}.pooling none and max_len, or give the input shape ()"
        )
    return keras.layers.Reshape((*shape, slot.dim))(vector)


def _dense_of(tensor: Any, spec: ModelSpec, inputs: dict[str, Any], is_only: bool) -> Any:
    """What stands for an input that is no id."""
    width = tensor.shape[1] if len(tensor.shape) > 1 else 1
    if tensor.name in spec.dense_names and width == 1:
        at = spec.dense_names.index(tensor.name)
        column = inputs["dense_columns"][:, at : at + 1]
        return column if len(tensor.shape) > 1 else keras.layers.Reshape(())(column)
    if is_only and width == spec.dense_width and width and len(tensor.shape) <= 2:
        return inputs["dense_columns"] if len(tensor.shape) > 1 else keras.layers.Reshape(())(inputs["dense_columns"])
    raise ModelError(
        f"input {tensor.name!r} of shape {tuple(tensor.shape[1:])} goes into no Embedding layer, and is no dense column: those are "
        f"{', '.join(spec.dense_names) or 'none'}; name it as one (data.dense), of shape (1,), or let it be the only one, of shape "
        f"({spec.dense_width},)"
    )


def _is_mask(node: Any) -> bool:
    """Whether it is what `mask_zero` adds to the graph beside an Embedding layer: x != 0."""
    given = node.arguments.args
    return type(node.operation).__name__ == "NotEqual" and len(given) == 2 and isinstance(given[1], int) and given[1] == 0


def _last(model: keras.Model) -> keras.Operation:
    """The operation that makes the output, but for its shape."""
    history = model.outputs[0]._keras_history
    while type(history.operation).__name__ in ("Reshape", "Flatten", "Squeeze", "ExpandDims"):
        history = history.operation._inbound_nodes[history.node_index].input_tensors[0]._keras_history
    return history.operation


def _without_sigmoid(layer: keras.Layer, is_last: bool) -> keras.Layer:
    """The layer itself, with its weights; the last one without a sigmoid."""
    if not is_last or getattr(layer, "activation", None) is not keras.activations.sigmoid:
        return layer
    linear = type(layer).from_config({**layer.get_config(), "activation": "linear"})
    if layer.built and layer.get_weights():
        linear.build(layer.input.shape)
        linear.set_weights(layer.get_weights())
    return linear

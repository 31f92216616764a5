"""`ModelSpec`: what a model is built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from flowps.errors import ModelError


@dataclass(frozen=True)
class SlotSpec:
    """One slot: its pooled vector is `embeddings[:, column:column + dim]`."""

    name: str
    dim: int
    column: int


@dataclass(frozen=True)
class ModelSpec:
    """The inputs of a model and the shape asked of the built-in ones.

    slots        in the order of the `embeddings` input
    dense_width  columns of the `dense_columns` input
    hidden       units of hidden layers (`net.hidden`)
    """

    slots: tuple[SlotSpec, ...]
    dense_width: int
    hidden: tuple[int, ...] = (128, 64)

    @staticmethod
    def of(names: Sequence[str], dims: Sequence[int], dense_width: int, hidden: Sequence[int]) -> ModelSpec:
        """A spec of slots that stand one after the other."""
        columns = [sum(dims[:s]) for s in range(len(dims))]
        return ModelSpec(tuple(map(SlotSpec, names, dims, columns)), dense_width, tuple(hidden))

    @property
    def width(self) -> int:
        """Columns of the `embeddings` input."""
        return sum(slot.dim for slot in self.slots)

    def inputs(self) -> dict[str, Any]:
        """Keras inputs by name: `embeddings` [batch, width], `dense_columns` [batch, dense_width]; each only if it has columns."""
        # Not "dense": Keras calls a Dense layer without a name so, and refuses two of one name.
        shapes = {"embeddings": self.width, "dense_columns": self.dense_width}
        return {name: keras.Input((width,), name=name, dtype="float32") for name, width in shapes.items() if width}

    def vectors(self, embeddings: Any) -> dict[str, Any]:
        """The pooled vector of each slot by name, [batch, dim]."""
        return {slot.name: embeddings[:, slot.column : slot.column + slot.dim] for slot in self.slots}

    def stacked(self, embeddings: Any) -> Any:
        """The vectors as [batch, slot, dim]. Raises ModelError unless all slots have one dim."""
        dims = {slot.dim for slot in self.slots}
        if len(dims) != 1:
            found = ", ".join(f"{slot.name}: {slot.dim}" for slot in self.slots[:8])
            raise ModelError(f"this model needs slots of one dim, found {found}; give all slots the same dim")
        return keras.layers.Reshape((len(self.slots), dims.pop()))(embeddings)

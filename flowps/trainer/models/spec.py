"""`ModelSpec`: what a model is built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import msgspec
import numpy as np

from flowps.config import Net
from flowps.errors import ModelError

_DEFAULTS = Net()


@dataclass(frozen=True)
class SlotSpec:
    """One slot: its pooled vector is `embeddings[:, column:column + dim]`.

    With pooling none, `max_len` > 0 vectors stand there, one after the other, zeros after the last.
    """

    name: str
    dim: int
    column: int
    max_len: int = 0

    @property
    def width(self) -> int:
        """Floats of the slot."""
        return self.dim * (self.max_len or 1)


@dataclass(frozen=True)
class ModelSpec:
    """The inputs of a model, what it predicts, and the shape asked of the built-in ones.

    slots        in the order of the `embeddings` input
    dense_width  columns of the `dense_columns` input
    net          the knobs `net.*`
    labels       the label columns, each a task: the model gives one logit for each
    dense_names  of the dense columns; empty where nobody has named them
    """

    slots: tuple[SlotSpec, ...]
    dense_width: int
    net: Net = _DEFAULTS
    labels: tuple[str, ...] = ("label",)
    dense_names: tuple[str, ...] = ()

    @staticmethod
    def of(
        names: Sequence[str], dims: Sequence[int], dense_width: int, hidden: Sequence[int] | None = None,
        max_lens: Sequence[int] = (), *, net: Net = _DEFAULTS, labels: Sequence[str] = ("label",), dense_names: Sequence[str] = (),
    ) -> ModelSpec:  # fmt: skip
        """A spec of slots that stand one after the other.

        hidden    instead of `net.hidden`
        max_lens  of each slot, 0 where it is pooled
        """
        slots, column = [], 0
        for name, dim, max_len in zip(names, dims, max_lens or [0] * len(dims), strict=True):
            slots.append(SlotSpec(name, dim, column, max_len))
            column += slots[-1].width
        if hidden is not None:
            net = msgspec.structs.replace(net, hidden=tuple(hidden))
        return ModelSpec(tuple(slots), dense_width, net, tuple(labels), tuple(dense_names))

    @property
    def hidden(self) -> tuple[int, ...]:
        """Units of hidden layers (`net.hidden`)."""
        return self.net.hidden

    @property
    def width(self) -> int:
        """Columns of the `embeddings` input."""
        return sum(slot.width for slot in self.slots)

    @property
    def sequences(self) -> tuple[SlotSpec, ...]:
        """The slots with pooling none, in the order of the `lengths` input."""
        return tuple(slot for slot in self.slots if slot.max_len)

    def widths(self) -> dict[str, int]:
        """The columns of each input, those without any left out."""
        # Not "dense": Keras calls a Dense layer without a name so, and refuses two of one name.
        found = {"embeddings": self.width, "dense_columns": self.dense_width, "lengths": len(self.sequences)}
        return {name: width for name, width in found.items() if width}

    def inputs(self) -> dict[str, Any]:
        """Keras inputs by name, each only if it has columns.

        `embeddings` float32 [batch, width], `dense_columns` float32 [batch, dense_width], and `lengths` int32 [batch, sequences]:
        how many vectors each slot with pooling none has, at most its max_len.
        """
        return {
            name: keras.Input((width,), name=name, dtype="int32" if name == "lengths" else "float32")
            for name, width in self.widths().items()
        }

    def concatenated(self, inputs: dict[str, Any]) -> Any:
        """The float inputs side by side, [batch, width + dense_width]."""
        found = [value for name, value in inputs.items() if name != "lengths"]
        return keras.layers.concatenate(found) if len(found) > 1 else found[0]

    def vectors(self, embeddings: Any) -> dict[str, Any]:
        """Each slot by name: its pooled vector [batch, dim], or with pooling none its vectors [batch, max_len, dim]."""
        found = {slot.name: embeddings[:, slot.column : slot.column + slot.width] for slot in self.slots}
        for slot in self.sequences:
            found[slot.name] = keras.layers.Reshape((slot.max_len, slot.dim))(found[slot.name])
        return found

    def mask(self, lengths: Any, name: str) -> Any:
        """Which vectors of a slot with pooling none are there, bool [batch, max_len]; `lengths` as in `inputs`."""
        at, slot = next((k, slot) for k, slot in enumerate(self.sequences) if slot.name == name)
        return keras.ops.less(np.arange(slot.max_len, dtype=np.int32), lengths[:, at : at + 1])

    def stacked(self, embeddings: Any, dtype: str | None = None) -> Any:
        """The vectors as [batch, slot, dim]. Raises ModelError unless there are slots, all pooled and of one dim.

        dtype   None: that of the other layers
        """
        if self.sequences:
            raise ModelError(f"this model needs pooled slots, but {self.sequences[0].name!r} has pooling none; choose sum or mean")
        if not self.slots:
            raise ModelError("this model multiplies the vectors of slots, but there are no slots; choose dnn or lr, or add slots")
        dims = {slot.dim for slot in self.slots}
        if len(dims) != 1:
            found = ", ".join(f"{slot.name}: {slot.dim}" for slot in self.slots[:8])
            raise ModelError(f"this model needs slots of one dim, found {found}; give all slots the same dim")
        return keras.layers.Reshape((len(self.slots), dims.pop()), dtype=dtype)(embeddings)

    # --- what the built-in models are made of -----------------------------------------------------------------------------

    def mlp(self, x: Any, hidden: Sequence[int] | None = None) -> Any:
        """Layers of `hidden` units (`net.hidden` by default), each: dense, batch normalisation, ReLU, dropout, as `net` asks."""
        for units in self.hidden if hidden is None else hidden:
            x = keras.layers.Dense(units, kernel_regularizer=self.l2())(x)
            if self.net.batch_norm:
                x = keras.layers.BatchNormalization()(x)
            x = keras.layers.ReLU()(x)
            if self.net.dropout:
                x = keras.layers.Dropout(self.net.dropout)(x)
        return x

    def logit(self, x: Any, use_bias: bool = True) -> Any:
        """w·x + b in float32, [batch, 1], whatever the precision of the other layers."""
        return keras.layers.Dense(1, use_bias=use_bias, kernel_regularizer=self.l2(), dtype="float32")(x)

    def l2(self) -> keras.regularizers.Regularizer | None:
        """What `net.l2` asks of a layer's weights."""
        return keras.regularizers.L2(self.net.l2) if self.net.l2 else None

    def one_label(self, model: str) -> None:
        """Raise ModelError where there are several labels: `model` has one logit."""
        if len(self.labels) > 1:
            raise ModelError(
                f"model {model!r} predicts one label, but there are {len(self.labels)}: {', '.join(self.labels)}; choose "
                "shared_bottom or mmoe, write your own, or leave out data.extra_labels"
            )

"""The rival of `bench.rival` in PyTorch: an EmbeddingBag with sparse gradients, which torch's Adagrad takes."""

from __future__ import annotations

import importlib
from typing import Any

from bench.rival_reader import Samples, Shape
from flowps.batch import Float32
from flowps.config import SlotDefault

torch: Any = importlib.import_module("torch")  # flowps's own checks of types go without it
torch.sparse.check_sparse_tensor_invariants.disable()  # the default, of which it warns unless it is chosen


class Rival:
    """See `bench.rival`. The first weights are drawn as flowps draws them, from another generator."""

    def __init__(self, shape: Shape, model: str, hidden: tuple[int, ...], knobs: SlotDefault, precision: str, seed: int) -> None:
        torch.manual_seed(seed)
        self._slots, self._dim, self._model = len(shape.slots), knobs.dim, model
        weights = torch.empty(shape.num_rows, knobs.dim).uniform_(-knobs.init_scale, knobs.init_scale)
        self.bag = torch.nn.EmbeddingBag(*weights.shape, mode="sum", sparse=True, include_last_offset=True, _weight=weights)
        width, layers = self._slots * self._dim + len(shape.dense), []
        self._linear = torch.nn.Linear(width, 1) if model == "deepfm" else None
        for units in hidden:
            layers += [torch.nn.Linear(width, units), torch.nn.ReLU()]
            width = units
        self._hidden, self._last = torch.nn.Sequential(*layers), torch.nn.Linear(width, 1, bias=model == "dnn")
        self.net = torch.nn.ModuleList([self._hidden, self._last, *filter(None, [self._linear])])
        for layer in self.net.modules():
            if isinstance(layer, torch.nn.Linear):  # as Keras does
                torch.nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    torch.nn.init.zeros_(layer.bias)
        # Epsilon is under flowps's root, and so is part of the first sum of squares.
        first = knobs.initial_accumulator + knobs.epsilon
        self.adagrad = torch.optim.Adagrad(self.bag.parameters(), knobs.learning_rate, initial_accumulator_value=first, eps=0)
        self._adam = torch.optim.Adam(self.net.parameters(), 1e-3, fused=True)
        self._is_mixed = precision == "mixed_bfloat16"

    def prepare(self, samples: Samples) -> tuple[Any, ...]:
        """A batch as tensors: rows, offsets, dense columns, labels."""
        # Its gradient's indices are int64.
        arrays = samples.rows.astype("int64"), samples.offsets, samples.dense, samples.labels
        return tuple(torch.from_numpy(array) for array in arrays)

    def train(self, batch: tuple[Any, ...]) -> float:
        """Take one step; its loss."""
        *inputs, labels = batch
        loss = torch.nn.functional.binary_cross_entropy_with_logits(self._logits(*inputs), labels)
        self.adagrad.zero_grad()
        self._adam.zero_grad()
        loss.backward()
        self.adagrad.step()
        self._adam.step()
        return float(loss.detach())

    def predict(self, batch: tuple[Any, ...]) -> Float32:
        """The logits."""
        with torch.no_grad():
            logits: Float32 = self._logits(*batch[:3]).numpy()
        return logits

    def _logits(self, rows: Any, offsets: Any, dense: Any) -> Any:
        pooled = self.bag(rows, offsets).view(-1, self._slots, self._dim)
        x = torch.cat([pooled.flatten(1), dense], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._is_mixed):
            deep = self._hidden(x)
        logits = self._last(deep.float())[:, 0]
        if self._linear is not None:
            products = pooled.sum(dim=1).square() - pooled.square().sum(dim=1)
            logits = logits + self._linear(x)[:, 0] + 0.5 * products.sum(dim=1)
        return logits

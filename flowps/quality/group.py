"""`GroupedSamples` and GAUC: the AUC within each group, say the samples of one user.

Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017, section 4.1; Zhou et al., "Deep Interest Network
for Click-Through Rate Prediction", KDD 2018, equation 8:

    GAUC = Σ (samples of the group · AUC of the group) / Σ samples of the group

over the groups that have both classes; a group of one class has no AUC and is left out. Exact: ties count half, nothing is
binned. Called by one thread per object.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32, Uint64
from flowps.quality.column import Column, hashes
from flowps.quality.figures import Gauc, areas


class GroupedSamples:
    """Keeps each sample: 13 bytes (the group's 64 bits, its logit, its label); the result takes about 60 more for a while."""

    def __init__(self, name: str) -> None:
        self.column = Column("group", name)
        self._parts: list[tuple[Uint64, Float32, NDArray[np.bool_]]] = []

    def hashed(self, array: Any) -> Uint64:
        """The group of each sample, uint64 [n], of a pyarrow array. Raises DataError for a type that no group has."""
        array, kind = self.column.plain(array)
        found = hashes(array)
        self.column.learn(kind)
        return found

    def add(self, groups: Uint64, logits: Float32, labels: NDArray[np.bool_]) -> None:
        """Keep samples, [n] each; they must not change."""
        self._parts.append((groups, logits, labels))

    def merge(self, other: GroupedSamples) -> None:
        """Keep the samples of `other` too. Leaves it as it is. Raises DataError when its groups are of another type."""
        self.column.learn(other.column.kind)
        self._parts += other._parts

    def result(self) -> Gauc:
        """GAUC, and what it leaves out."""
        groups, logits, labels = self._joined()
        order = np.lexsort((logits, groups))
        groups, logits, labels = groups[order], logits[order], labels[order]
        del order
        same = (groups[1:] == groups[:-1]) & (logits[1:] == logits[:-1])
        ties = np.flatnonzero(np.concatenate([np.ones(min(1, len(groups)), bool), ~same]))
        if len(ties):
            positives = np.add.reduceat(labels, ties, dtype=np.int64)
            negatives = np.diff(ties, append=len(groups)) - positives
        else:
            positives = negatives = ties
        _, positives, negatives, auc = areas(groups[ties], positives, negatives)
        both = (positives > 0) & (negatives > 0)
        samples = positives + negatives
        counted = int(samples[both].sum())
        return Gauc(
            column=self.column.name,
            value=float((samples[both] * auc[both]).sum() / counted) if counted else None,
            groups=int(both.sum()),
            samples=counted,
            one_class_groups=int((~both).sum()),
            one_class_samples=int(samples[~both].sum()),
        )

    def _joined(self) -> tuple[Uint64, Float32, NDArray[np.bool_]]:
        if not self._parts:
            return np.empty(0, np.uint64), np.empty(0, np.float32), np.empty(0, bool)
        groups, logits, labels = (np.concatenate(of) for of in zip(*self._parts, strict=True))
        self._parts = [(groups, logits, labels)]
        return groups, logits, labels

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: arrays in one piece, eight labels a byte."""
        groups, logits, labels = self._joined()
        return {"column": self.column, "groups": groups, "logits": logits, "labels": np.packbits(labels)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.column = state["column"]
        groups, logits = state["groups"], state["logits"]
        self._parts = [(groups, logits, np.unpackbits(state["labels"], count=len(groups)).astype(bool))]

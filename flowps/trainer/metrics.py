"""Streaming quality: AUC, logloss, mean prediction, mean label; exact enough to compare models, mergeable, constant memory.

Called by one thread per object. scikit-learn agrees (tests/trainer/test_metrics.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32
from flowps.status.event import Metrics

# A bin is 6e-5 wide in the logit: predictions closer than that, or beyond ±32, count as ties. That moves the AUC of logits that
# spread by 0.003 or more by less than 1e-5; a model whose logits spread less has learned nothing yet.
BINS = 1 << 20
LOGIT_RANGE = 32.0
_FLUSH_EXAMPLES = 1 << 19


class StreamingMetrics:
    """Adds up over batches of (labels float32 [n], logits float32 [n])."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Float32, Float32]] = []
        self._waiting_examples = 0
        self._positives: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self._negatives: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self._examples = 0
        self._logloss = self._prob = self._real = 0.0

    def update(self, labels: Float32, logits: Float32) -> None:
        """Add a batch. Keeps both arrays for a while: they must not change."""
        self._waiting.append((labels, logits))
        self._waiting_examples += len(labels)
        if self._waiting_examples >= _FLUSH_EXAMPLES:
            self._flush()

    def merge(self, other: StreamingMetrics) -> None:
        """Add everything `other` has seen."""
        other._flush()
        self._positives += other._positives
        self._negatives += other._negatives
        self._examples += other._examples
        self._logloss += other._logloss
        self._prob += other._prob
        self._real += other._real

    def state(self) -> NDArray[np.float64]:
        """All that was seen, float64 [n]; states add up to that of the objects' `merge`, exactly up to 2^53 examples."""
        self._flush()
        rest = [self._examples, self._logloss, self._prob, self._real]
        return np.concatenate([self._positives, self._negatives, rest]).astype(np.float64)

    @staticmethod
    def of_state(state: NDArray[np.float64]) -> StreamingMetrics:
        """The object that has this `state`."""
        found = StreamingMetrics()
        found._positives, found._negatives = (np.rint(part).astype(np.int64) for part in (state[:BINS], state[BINS : 2 * BINS]))
        found._examples = round(state[2 * BINS])
        found._logloss, found._prob, found._real = (float(x) for x in state[2 * BINS + 1 :])
        return found

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that was seen, as arrays for a file; most bins are empty and are left out."""
        self._flush()
        used = np.flatnonzero(self._positives + self._negatives)
        return {
            "bins": used, "positives": self._positives[used], "negatives": self._negatives[used],
            "sums": np.array([self._examples, self._logloss, self._prob, self._real]),
        }  # fmt: skip

    @staticmethod
    def of_arrays(arrays: Mapping[str, NDArray[Any]]) -> StreamingMetrics:
        """The object that gave `arrays`."""
        found = StreamingMetrics()
        found._positives[arrays["bins"]] = arrays["positives"]
        found._negatives[arrays["bins"]] = arrays["negatives"]
        found._examples = round(arrays["sums"][0])
        found._logloss, found._prob, found._real = (float(x) for x in arrays["sums"][1:])
        return found

    def result(self) -> Metrics:
        """The figures so far; NaN means and no AUC before the first example."""
        self._flush()
        n = self._examples or float("nan")
        return Metrics(self._examples, self._auc(), self._logloss / n, self._prob / n, self._real / n)

    def _auc(self) -> float | None:
        """Mann-Whitney: the share of (positive, negative) pairs in the right order, ties counting half."""
        positives, negatives = int(self._positives.sum()), int(self._negatives.sum())
        if not positives or not negatives:
            return None
        below = np.cumsum(self._negatives) - self._negatives
        # In float64: the number of pairs exceeds int64 at 3e9 examples of each class.
        right = np.dot(self._positives.astype(np.float64), below + self._negatives * 0.5)
        return float(right / positives / negatives)

    def _flush(self) -> None:
        if not self._waiting:
            return
        labels = np.concatenate([labels for labels, _ in self._waiting])
        logits = np.concatenate([logits for _, logits in self._waiting])
        self._waiting, self._waiting_examples = [], 0
        bins = ((np.clip(logits, -LOGIT_RANGE, LOGIT_RANGE) + LOGIT_RANGE) * ((BINS - 1) / (2 * LOGIT_RANGE))).astype(np.int32)
        positive = labels > 0.5
        self._positives += np.bincount(bins[positive], minlength=BINS)
        self._negatives += np.bincount(bins[~positive], minlength=BINS)
        self._examples += len(labels)
        # One pass of exp serves both: p = 1 / (1 + e), and -log p = log1p(e) with e = exp(-|logit|) on the right side.
        small = np.exp(-np.abs(logits))
        self._logloss += float(np.sum(np.maximum(logits, 0) - logits * labels + np.log1p(small), dtype=np.float64))
        self._prob += float(np.sum(np.where(logits >= 0, 1, small) / (1 + small), dtype=np.float64))
        self._real += float(np.sum(labels, dtype=np.float64))


class LabelMetrics:
    """StreamingMetrics of each label. Labels and logits are float32 [n] of one label, [n, labels] of several."""

    def __init__(self, labels: Sequence[str], of_each: Sequence[StreamingMetrics] = ()) -> None:
        self._labels = labels
        self.of_each = list(of_each) or [StreamingMetrics() for _ in labels]

    def update(self, labels: Float32, logits: Float32) -> None:
        """See StreamingMetrics."""
        if len(self.of_each) == 1:
            self.of_each[0].update(labels, logits)
            return
        for k, metrics in enumerate(self.of_each):
            metrics.update(labels[:, k], logits[:, k])

    def merge(self, other: LabelMetrics) -> None:
        """Add everything `other`, of the same labels, has seen."""
        for metrics, more in zip(self.of_each, other.of_each, strict=True):
            metrics.merge(more)

    def state(self) -> NDArray[np.float64]:
        """See StreamingMetrics; those of all labels one after the other."""
        return np.concatenate([metrics.state() for metrics in self.of_each])

    @staticmethod
    def of_state(labels: Sequence[str], state: NDArray[np.float64]) -> LabelMetrics:
        """The object that has this `state`."""
        return LabelMetrics(labels, [StreamingMetrics.of_state(part) for part in np.split(state, len(labels))])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """See StreamingMetrics; their names begin with the number of the label."""
        return {f"{k}/{name}": array for k, of in enumerate(self.of_each) for name, array in of.arrays().items()}

    @staticmethod
    def of_arrays(labels: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> LabelMetrics:
        """The object that gave `arrays`."""
        parts: list[dict[str, NDArray[Any]]] = [{} for _ in labels]
        for name, array in arrays.items():
            number, _, key = name.rpartition("/")
            parts[int(number or 0)][key] = array  # those of versions that knew one label have no number
        return LabelMetrics(labels, [StreamingMetrics.of_arrays(part) for part in parts])

    def result(self) -> tuple[Metrics, dict[str, Metrics]]:
        """The figures of the first label, and of the others by name."""
        first, *others = (metrics.result() for metrics in self.of_each)
        return first, dict(zip(self._labels[1:], others, strict=True))

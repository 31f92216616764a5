"""`Tally`: what scored samples add up to. Whoever scores a part of the data makes one; merged, they give the figures of all.

Neither how the samples were cut nor the order of merging leaves a trace in the result, to the last bit: counts are integers
(`cells`), real numbers are added as integers (`exact`), groups are sorted (`group`), and values of slices too (`split`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32
from flowps.errors import DataError, ModelError
from flowps.quality import cells
from flowps.quality.cells import BINS, Int64, bins_of
from flowps.quality.column import Values
from flowps.quality.exact import losses_and_predictions
from flowps.quality.figures import Quality, auc, average_precision, buckets_of, calibration_error, mean, normalised_entropy
from flowps.quality.group import GroupedSamples
from flowps.quality.split import Split

_FLUSH_SAMPLES = 1 << 19
_ALL = np.zeros(1, np.int64)


class Tally:
    """Adds up scored samples. Called by one thread at a time; it can be pickled, small.

    Parameters
    ----------
    slices : names of columns, each gets a table of figures by value
    group : name of the column whose values are the groups of GAUC; "": no GAUC

    Memory: up to 32 MB of counts, up to 100 MB for each slice column (most need far less), and 13 bytes a sample with a group.
    """

    def __init__(self, slices: tuple[str, ...] = (), group: str = "") -> None:
        if len(set(slices)) != len(slices):
            raise ValueError(f"slices: {slices} names a column twice")
        self.slices = tuple(slices)
        self.group = group
        self._all = Split(2 * BINS)
        self._values = {name: Values(name) for name in slices}
        self._splits = {name: Split(cells.MAX_CELLS) for name in slices}
        self._groups = GroupedSamples(group)
        self._waiting: list[tuple[NDArray[np.bool_], Float32, dict[str, Int64]]] = []
        self._num_waiting = 0
        self._samples = 0

    @property
    def samples(self) -> int:
        """How many were added."""
        return self._samples

    def update(self, labels: Float32, logits: Float32, slices: Mapping[str, Any] | None = None, group: Any | None = None) -> None:
        """Add samples.

        Parameters
        ----------
        labels : float32 [n], each 0 or 1; copied
        logits : float32 [n], finite; copied
        slices : column → pyarrow array or chunked array [n], for exactly the columns that the tally was made for: integers,
            strings, booleans or dictionaries of those; null is a value of its own
        group : pyarrow array or chunked array [n] of the same types, if the tally was made for one; null is a group of its own

        Raises DataError for labels other than 0 and 1, a column of another type and one with too many values, ModelError for
        logits that are NaN or infinite; nothing is added then.
        """
        self._check_shapes(labels, logits, slices or {}, group)
        if not np.isfinite(logits).all():
            broken = int((~np.isfinite(logits)).sum())
            raise ModelError(
                f"{broken:,} of {len(logits):,} predictions are NaN or infinite, expected finite logits; "
                "look for NaN in the model's weights and in the dense columns, and evaluate an earlier checkpoint"
            )
        labels = np.asarray(labels)
        positive = labels > 0.5
        if not (wrong := labels == positive).all():
            found = float(labels[~wrong][0])
            raise DataError(f"a label is {found:g}, expected 0 or 1; correct the label column, or name another one")
        hashed = self._groups.hashed(group) if group is not None else None
        values = {name: self._values[name].encode((slices or {})[name]) for name in self.slices}
        logits = np.array(logits, np.float32)
        if hashed is not None:
            self._groups.add(hashed, logits, positive)
        self._samples += len(logits)
        self._waiting.append((positive, logits, values))
        self._num_waiting += len(logits)
        if self._num_waiting >= _FLUSH_SAMPLES:
            self._flush()

    def merge(self, other: Tally) -> None:
        """Add everything that `other` has seen; leaves it as it is.

        Raises DataError when a column is of another type there, or has too many values in all; then this tally is of no more use.
        """
        if (self.slices, self.group) != (other.slices, other.group):
            raise ValueError(f"tallies of {(self.slices, self.group)} and of {(other.slices, other.group)} do not add up")
        self._flush()
        other._flush()
        self._all.merge(other._all, _ALL)
        for name, split in self._splits.items():
            split.merge(other._splits[name], self._values[name].merge(other._values[name]))
        self._groups.merge(other._groups)
        self._samples += other._samples

    def result(self, buckets: int = 10, rows: int = 50) -> Quality:
        """The figures so far: calibration by `buckets`, and slice tables of at most `rows` values, the others added up."""
        if buckets < 1 or rows < 1:
            raise ValueError(f"buckets is {buckets} and rows is {rows}, expected 1 or more")
        self._flush()
        counts = self._all.cells.counts()
        positives = int(counts.positives.sum())
        predicted = self._all.predictions.total(_ALL)
        logloss = mean(self._all.losses.total(_ALL), self._samples)
        found = buckets_of(counts, buckets)
        return Quality(
            samples=self._samples,
            positives=positives,
            auc=auc(counts),
            pr_auc=average_precision(counts),
            logloss=logloss,
            normalised_entropy=normalised_entropy(logloss, self._samples, positives),
            mean_prediction=mean(predicted, self._samples),
            mean_label=positives / self._samples if self._samples else None,
            calibration=mean(predicted, positives),
            ece=calibration_error(found),
            buckets=found,
            gauc=self._groups.result() if self.group else None,
            slices=[self._splits[name].table(self._values[name], rows) for name in self.slices],
        )

    def _check_shapes(self, labels: Float32, logits: Float32, slices: Mapping[str, Any], group: Any | None) -> None:
        if set(slices) != set(self.slices) or (group is not None) != bool(self.group):
            raise ValueError(
                f"columns {sorted(slices)} and {'a' if group is not None else 'no'} group, "
                f"in a tally of {sorted(self.slices)} and {'a' if self.group else 'no'} group"
            )
        shapes = {"labels": np.shape(labels), "logits": np.shape(logits)} | {name: (len(of),) for name, of in slices.items()}
        if group is not None:
            shapes[f"group {self.group}"] = (len(group),)
        if len(set(shapes.values())) > 1 or len(np.shape(logits)) != 1:
            raise ValueError(f"arrays of shapes {shapes}, expected all to be [samples]")

    def _flush(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting, self._num_waiting = self._waiting, [], 0
        positive = np.concatenate([of for of, _, _ in waiting])
        logits = np.concatenate([of for _, of, _ in waiting])
        bins = bins_of(logits)
        losses, predictions = losses_and_predictions(positive.astype(np.float32), logits)
        self._all.add(np.zeros(len(logits), np.int64), bins, positive, losses, predictions)
        for name, split in self._splits.items():
            split.add(np.concatenate([of[name] for _, _, of in waiting]), bins, positive, losses, predictions)

    def __getstate__(self) -> dict[str, Any]:
        self._flush()
        return self.__dict__

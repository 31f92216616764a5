"""`Split`: what samples add up to by the values of a column, or all of them as one value; and the slice table of a column.

Called by one thread per object.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flowps.quality.cells import BIN_BITS, Cells, Counts, Int64, starts_of
from flowps.quality.column import Value, Values
from flowps.quality.exact import Sums
from flowps.quality.figures import SliceRow, SliceTable, areas, mean


class Split:
    """Counts by logit bin, and exact sums of losses and predictions, of each value."""

    def __init__(self, max_cells: int) -> None:
        self.cells = Cells(max_cells)
        self.losses, self.predictions = Sums(), Sums()

    def add(self, values: Int64, bins: Int64, labels: NDArray[np.bool_], losses: Int64, predictions: Int64) -> None:
        """Add samples, all [n]: the value's number, the bin, the label, loss and prediction in units of `exact`."""
        self.cells.add(values, bins, labels)
        self.losses.add(values, losses)
        self.predictions.add(values, predictions)

    def merge(self, other: Split, numbers: Int64) -> None:
        """Add all of `other`, whose value number k is `numbers[k]` here. Leaves it as it is."""
        self.cells.merge(other.cells, numbers)
        self.losses.merge(other.losses, numbers)
        self.predictions.merge(other.predictions, numbers)

    def table(self, values: Values, most: int) -> SliceTable:
        """The `most` values with the most samples, a row each, and the others in one."""
        counts = self.cells.counts()
        listed, ranks = values.listed(), values.ranks()
        samples = np.zeros(len(listed), np.int64)
        np.add.at(samples, counts.values, counts.positives + counts.negatives)
        # Of values with as many samples the smaller goes first: the order in which they came must not show.
        used = sorted(np.flatnonzero(samples).tolist(), key=lambda k: (-samples[k], ranks[k]))
        # A row's place; the others share the place after the last.
        places = np.full(len(listed), most, np.int64)
        places[used[:most]] = np.arange(len(used[:most]))
        moved = _moved(counts, places)
        found, positives, negatives, auc = areas(moved.values, moved.positives, moved.negatives)
        rows = [
            self._row(
                listed[used[place]] if place < most else None,
                np.array(used[place : place + 1] if place < most else used[most:]),
                int(positives[k]), int(positives[k] + negatives[k]), float(auc[k]),
            )
            for k, place in enumerate(found.tolist())
        ]  # fmt: skip
        return SliceTable(
            column=values.column.name,
            values=len(used),
            rows=rows[:most],
            others=rows[most] if len(used) > most else None,
            bin_width=self.cells.bin_width,
        )

    def _row(self, value: Value, numbers: Int64, positives: int, samples: int, auc: float) -> SliceRow:
        predicted = self.predictions.total(numbers)
        return SliceRow(
            value=value,
            samples=samples,
            mean_label=positives / samples,
            mean_prediction=mean(predicted, samples) or 0.0,
            calibration=mean(predicted, positives),
            auc=None if np.isnan(auc) else auc,
            logloss=mean(self.losses.total(numbers), samples) or 0.0,
        )


def _moved(counts: Counts, places: Int64) -> Counts:
    """The same counts with value k called `places[k]`; values with one name are added up."""
    keys = (places[counts.values] << BIN_BITS) | counts.bins
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = starts_of(keys)
    if not len(starts):
        return counts
    sums = [np.add.reduceat(of[order], starts) for of in (counts.positives, counts.negatives)]
    keys = keys[starts]
    return Counts(keys >> BIN_BITS, keys & ((1 << BIN_BITS) - 1), *sums)

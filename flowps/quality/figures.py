"""The figures themselves: what a `Quality` holds, and how each comes from counts.

Whatever does not exist is None: means without samples, AUC and normalised entropy with one class, calibration without a positive.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from flowps.quality.cells import Counts, Float64, Int64, predictions_of, starts_of
from flowps.quality.column import Value
from flowps.quality.exact import FRACTION_BITS


class Bucket(msgspec.Struct, frozen=True):
    """Samples with predictions from `low` to `high`; `calibration` is mean prediction / mean label."""

    samples: int
    low: float
    high: float
    mean_prediction: float
    mean_label: float
    calibration: float | None


class Gauc(msgspec.Struct, frozen=True):
    """GAUC by `column`; None when no group has both classes. The other counts say what it was made of, and what left out."""

    column: str
    value: float | None
    groups: int
    samples: int
    one_class_groups: int
    one_class_samples: int


class SliceRow(msgspec.Struct, frozen=True):
    """The samples with one value of a column; None is null."""

    value: Value
    samples: int
    mean_label: float
    mean_prediction: float
    calibration: float | None
    auc: float | None
    logloss: float


class SliceTable(msgspec.Struct, frozen=True):
    """The values of `column` with the most samples, most first.

    values      how many there are
    others      the samples of all values without a row, added up; its own value is None. None: every value has a row
    bin_width   predictions closer than this, in the logit, may count as ties in the AUC of a row
    """

    column: str
    values: int
    rows: list[SliceRow]
    others: SliceRow | None
    bin_width: float


class Quality(msgspec.Struct, frozen=True):
    """How good predictions are.

    auc                  chance that a positive is above a negative, ties half; by logit bins (`cells`): within 1e-5
    pr_auc               average precision, as sklearn.metrics.average_precision_score; by the same bins
    logloss              mean of -log p(label), nats
    normalised_entropy   logloss / entropy of the mean label: 1 is no better than that constant. He et al., "Practical Lessons from
                         Predicting Clicks on Ads at Facebook", ADKDD 2014, equation 3
    calibration          sum of predictions / sum of labels
    ece                  Σ share of the bucket · |mean prediction - mean label|, over `buckets`: expected calibration error.
                         Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015, with buckets
                         of equal counts in place of equal widths
    buckets              by prediction, low to high, about as many samples each: equal predictions are not parted, so there are
                         fewer when many are equal. Means of predictions are those of bins' middles: off by 3e-5 of themselves
    gauc                 None: no group column
    """

    samples: int
    positives: int
    auc: float | None
    pr_auc: float | None
    logloss: float | None
    normalised_entropy: float | None
    mean_prediction: float | None
    mean_label: float | None
    calibration: float | None
    ece: float | None
    buckets: list[Bucket]
    gauc: Gauc | None
    slices: list[SliceTable]


def mean(units: int, count: int) -> float | None:
    """The mean of `count` numbers whose sum is `units` of 2^-40, rounded once; None without any."""
    return units / (count << FRACTION_BITS) if count else None


def areas(segments: NDArray[Any], positives: Int64, negatives: Int64) -> tuple[NDArray[Any], Int64, Int64, Float64]:
    """Mann-Whitney: the share of (positive, negative) pairs in the right order, ties counting half, within each segment.

    Arrays [cells], sorted by segment and then by prediction; a cell is what has the same prediction. Returns of each segment, [k]:
    its name, positives, negatives and AUC float64, NaN when it has one class only. The order of adding is that of the cells.
    """
    starts = starts_of(segments)
    if not len(starts):
        return segments, positives, negatives, np.empty(0)
    below = np.cumsum(negatives) - negatives
    below -= np.repeat(below[starts], np.diff(starts, append=len(segments)))
    # In float64: the number of pairs exceeds int64 at 3e9 samples of each class. Not np.dot: BLAS adds in an order that depends on
    # its number of threads.
    right = np.add.reduceat(positives * (below + negatives * 0.5), starts)
    positives, negatives = np.add.reduceat(positives, starts), np.add.reduceat(negatives, starts)
    pairs = positives.astype(np.float64) * negatives
    return segments[starts], positives, negatives, np.divide(right, pairs, out=np.full(len(starts), np.nan), where=pairs > 0)


def auc(counts: Counts) -> float | None:
    """The AUC of everything, whatever its value; `counts` of one value."""
    *_, found = areas(counts.values, counts.positives, counts.negatives)
    return float(found[0]) if len(found) and not np.isnan(found[0]) else None


def average_precision(counts: Counts) -> float | None:
    """Σ (recall here - recall before) · precision here, from the highest prediction down; `counts` of one value."""
    positives, negatives = counts.positives[::-1], counts.negatives[::-1]
    if not positives.any() or not negatives.any():
        return None
    taken, right = np.cumsum(positives + negatives), np.cumsum(positives)
    return float(np.sum(positives * (right / taken)) / right[-1])


def normalised_entropy(logloss: float | None, samples: int, positives: int) -> float | None:
    """Logloss / the logloss of always predicting the mean label."""
    if logloss is None or not 0 < positives < samples:
        return None
    share = positives / samples
    return logloss / -(share * math.log(share) + (1 - share) * math.log1p(-share))


def buckets_of(counts: Counts, buckets: int) -> list[Bucket]:
    """At most `buckets` with about as many samples each; `counts` of one value."""
    samples = counts.positives + counts.negatives
    if not len(samples):
        return []
    total = int(samples.sum())
    # A bin belongs where its middle sample does.
    before = np.cumsum(samples) - samples
    places = np.floor((before + samples / 2) * (buckets / total)).astype(np.int64)
    predictions = predictions_of(counts.bins)
    found = []
    for start, stop in zip(starts_of(places), [*starts_of(places)[1:], len(places)], strict=True):
        of = slice(start, stop)
        n, positives, predicted = (
            int(samples[of].sum()),
            int(counts.positives[of].sum()),
            float((samples[of] * predictions[of]).sum()),
        )
        found.append(
            Bucket(
                samples=n,
                low=float(predictions[start]),
                high=float(predictions[stop - 1]),
                mean_prediction=predicted / n,
                mean_label=positives / n,
                calibration=predicted / positives if positives else None,
            )
        )
    return found


def calibration_error(buckets: list[Bucket]) -> float | None:
    """Expected calibration error."""
    total = sum(of.samples for of in buckets)
    return math.fsum(of.samples * abs(of.mean_prediction - of.mean_label) for of in buckets) / total if total else None

"""The hidden model of a synthetic data set: draws examples and knows the true probability of each label.

Covers: the logit, its calibration to a label rate and a best AUC, drawing examples as Arrow tables, and the exact rank
AUC. Does not cover: files (`dataset`) or sizes (`description`). Called by `dataset`, and by whoever wants the true
probabilities (tests, benchmarks).

The logit is a factorisation machine (S. Rendle, "Factorization Machines", ICDM 2010, equation 1) over the slots' values
plus a linear term in log1p of the dense columns. A null counts as 0, so a model that fills nulls with 0 can learn it
exactly. Values of a list slot are summed, scaled so that every slot adds the same variance however long its lists are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flowps.errors import ConfigError
from flowps.synthetic.description import DenseColumn, Description, Slot

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
Split = Literal["train", "test"]

# Every use of randomness has its own stream: none depends on how much another one drew, or on which thread drew first.
_STREAMS = {"slot": 0, "dense": 1, "calibration": 2, "train": 3, "test": 4}
_CALIBRATION_ROWS = 32_768


class Examples(NamedTuple):
    """`table`: label, dense columns, slots. `probability`: float64 [rows], the true P(label = 1)."""

    table: pa.Table
    probability: DoubleArray


def rank_auc(scores: npt.NDArray[np.floating], positive: npt.ArrayLike) -> float:
    """Exact area under the ROC curve of `scores` [rows]; ties count half (the Mann-Whitney statistic).

    `positive` [rows] holds labels 0 or 1, or probabilities: an example is then a positive with weight p and a negative
    with weight 1 - p, which gives the AUC expected over all draws of the labels. NaN when either kind is missing.
    """
    weight = np.asarray(positive, dtype=np.float64)
    tie_group = np.unique(scores, return_inverse=True)[1]
    positives = np.bincount(tie_group, weights=weight)
    negatives = np.bincount(tie_group, weights=1.0 - weight)
    pairs = float(positives.sum() * negatives.sum())
    if pairs == 0:
        return float("nan")
    negatives_below = np.cumsum(negatives) - negatives
    return float(positives @ (negatives_below + negatives / 2) / pairs)


def true_probability(
    description: Description, split: Split = "test", rows: int | None = None, seed: int | None = None
) -> DoubleArray:
    """The true P(label = 1), float64 [rows] in file order, of what `generate` writes for the same arguments."""
    if rows is None:
        rows = description.test_rows if split == "test" else description.train_rows
    description = replace(description, seed=description.seed if seed is None else seed)
    truth = GroundTruth(description)
    sizes = enumerate(chunk_rows(rows, description.row_group_rows))
    return np.concatenate([truth.examples(split, chunk, chunk_size).probability for chunk, chunk_size in sizes])


def chunk_rows(rows: int, row_group_rows: int) -> list[int]:
    """Sizes of the row groups that `rows` are cut into."""
    return [min(row_group_rows, rows - start) for start in range(0, rows, row_group_rows)]


class GroundTruth:
    """The hidden model of one description. Read-only once built: any number of threads may draw from it.

    Holds about 12 + 4 * (1 + interaction_rank) bytes per distinct value. Raises ConfigError if no scale of the logit
    reaches the target AUC.
    """

    def __init__(self, description: Description) -> None:
        self.description = description
        self._slots = [_SlotTruth.draw(slot, description, self._random("slot", i)) for i, slot in enumerate(description.slots)]
        self._dense = [_DenseTruth.draw(column, self._random("dense", i)) for i, column in enumerate(description.dense)]
        self._bias, self._scale = self._calibrate()

    @property
    def schema(self) -> pa.Schema:
        """Schema of every table of :meth:`examples`."""
        kinds = {"string8hex": pa.string(), "uint64_list": pa.list_(pa.uint64())}
        return pa.schema(
            [("label", pa.int8())]
            + [(column.name, pa.float32()) for column in self.description.dense]
            + [(slot.name, kinds[slot.kind]) for slot in self.description.slots]
        )

    def examples(self, split: Split, chunk: int, rows: int) -> Examples:
        """Draw chunk number `chunk` of a split: the same examples for the same arguments, whatever was drawn before."""
        random = self._random(split, chunk)
        columns, raw = self._features(random, rows)
        probability = _sigmoid(self._bias + self._scale * raw)
        label = (random.random(rows) < probability).astype(np.int8)
        return Examples(pa.table([pa.array(label), *columns], schema=self.schema), probability)

    def _random(self, stream: str, index: int) -> np.random.Generator:
        key = np.random.SeedSequence(self.description.seed, spawn_key=(_STREAMS[stream], index))
        return np.random.Generator(np.random.SFC64(key))

    def _features(self, random: np.random.Generator, rows: int) -> tuple[list[pa.Array[Any]], DoubleArray]:
        """Draw the feature columns and their logit before bias and scale, float64 [rows] of about unit variance."""
        description = self.description
        columns: list[pa.Array[Any]] = []
        dense = np.zeros(rows, np.float32)
        for column_truth in self._dense:
            column, term = column_truth.features(random, rows)
            columns.append(column)
            dense += term
        pooled = np.zeros((1 + description.interaction_rank, rows), np.float32)
        squares = np.zeros((description.interaction_rank, rows), np.float32)
        for slot_truth in self._slots:
            column, terms = slot_truth.features(random, rows)
            columns.append(column)
            pooled += terms
            squares += terms[1:] ** 2

        num_slots = len(self._slots)
        linear_share = 1.0 - description.dense_share - description.interaction_share
        raw = pooled[0] * np.sqrt(linear_share / num_slots)
        if self._dense:
            raw = raw + dense * np.sqrt(description.dense_share / len(self._dense))
        if description.interaction_share:
            # Equation 1's double sum over pairs, in the linear time of Rendle's lemma 3.1.
            pair_sum = ((pooled[1:] ** 2 - squares) / 2).sum(axis=0)
            num_terms = description.interaction_rank * num_slots * (num_slots - 1) / 2
            raw = raw + pair_sum * np.sqrt(description.interaction_share / num_terms)
        return columns, raw.astype(np.float64, copy=False)

    def _calibrate(self) -> tuple[float, float]:
        """The bias that gives the label rate, at the scale whose true probabilities have the target AUC."""
        wanted = self.description
        raw = self._features(self._random("calibration", 0), _CALIBRATION_ROWS)[1]

        def bias_for(scale: float) -> float:
            reach = 40.0 + scale * float(np.abs(raw).max())
            return _bisect(lambda bias: float(_sigmoid(bias + scale * raw).mean()), wanted.label_rate, -reach, reach)

        def best_auc(scale: float) -> float:
            return rank_auc(raw, _sigmoid(bias_for(scale) + scale * raw))

        scale = _bisect(best_auc, wanted.target_auc, 0.0, 64.0)
        reached = best_auc(scale)
        if reached < wanted.target_auc - 0.005:
            raise ConfigError(
                f"data set '{wanted.name}': target_auc = {wanted.target_auc}, but no more than {reached:.3f} can be "
                "reached; lower it, or give the slots more distinct values"
            )
        return bias_for(scale), scale


@dataclass(frozen=True, eq=False)
class _DenseTruth:
    """One dense column: floor(exp(location + spread * normal)), and its weight in the logit."""

    null_rate: float
    location: float
    spread: float
    weight: float
    centre: float

    @classmethod
    def draw(cls, column: DenseColumn, random: np.random.Generator) -> _DenseTruth:
        location, spread = random.uniform(0.0, 4.0), random.uniform(0.8, 1.8)
        sign = random.choice((-1.0, 1.0))
        unweighted = cls(column.null_rate, location, spread, 1.0, 0.0)
        term = unweighted.features(random, 65_536)[1].astype(np.float64)
        deviation = float(term.std())  # 0 if every cell is null
        return replace(unweighted, weight=sign / deviation if deviation else 0.0, centre=float(term.mean()))

    def features(self, random: np.random.Generator, rows: int) -> tuple[pa.Array[Any], FloatArray]:
        """The column, and its term of the logit: float32 [rows], mean 0, variance 1."""
        normal = random.standard_normal(rows, np.float32)
        value = np.floor(np.exp(np.float32(self.location) + np.float32(self.spread) * normal))
        is_null = random.random(rows, np.float32) < self.null_rate
        logarithm = np.where(is_null, np.float32(0), np.log1p(value))
        term = np.float32(self.weight) * (logarithm - np.float32(self.centre))
        return pa.array(value, mask=is_null), term


@dataclass(frozen=True, eq=False)
class _SlotTruth:
    """One slot: arrays indexed by popularity rank, 0 the most frequent.

    `thresholds` uint32 [cardinality - 1]: the cumulated zipf distribution in units of 2**-32.
    `values` uint64 [cardinality]: the sign, or the 8 ASCII bytes of the string.
    `weights` float32 [1 + interaction_rank, cardinality]: the linear weight, then the factors; each has mean 0 and
    variance 1 / mean_signs under the zipf distribution.
    """

    slot: Slot
    thresholds: npt.NDArray[np.uint32]
    values: npt.NDArray[np.uint64]
    weights: FloatArray

    @classmethod
    def draw(cls, slot: Slot, description: Description, random: np.random.Generator) -> _SlotTruth:
        share = np.arange(1, slot.cardinality + 1, dtype=np.float64) ** -description.zipf_exponent
        share /= share.sum()
        thresholds = np.minimum(np.cumsum(share)[:-1] * 2.0**32, 2**32 - 1).astype(np.uint32)
        weights = random.standard_normal((1 + description.interaction_rank, slot.cardinality))
        weights *= share**description.rarity_damping
        weights -= (weights @ share)[:, None]
        deviation = np.sqrt(weights**2 @ share)
        weights /= np.where(deviation > 0, deviation, 1.0)[:, None] * np.sqrt(slot.mean_signs)
        return cls(slot, thresholds, _distinct_values(slot, random), weights.astype(np.float32))

    def features(self, random: np.random.Generator, rows: int) -> tuple[pa.Array[Any], FloatArray]:
        """The column, and the sums of its values' weights: float32 [1 + interaction_rank, rows]."""
        if self.slot.kind == "string8hex":
            ranks = self._ranks(random, rows)
            ends = np.arange(0, 8 * rows + 1, 8, dtype=np.int32)
            text = np.take(self.values, ranks)
            strings = pa.StringArray.from_buffers(rows, pa.py_buffer(ends.data), pa.py_buffer(text.data))
            return strings, np.stack([np.take(weight, ranks) for weight in self.weights])

        offsets = np.zeros(rows + 1, np.int32)
        np.cumsum(1 + random.poisson(self.slot.mean_signs - 1, rows), out=offsets[1:])
        ranks = self._ranks(random, int(offsets[-1]))
        signs = pa.array(np.take(self.values, ranks), pa.uint64())
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), signs)
        # reduceat sums from each start to the next one; it is right only because no list is empty.
        sums = [np.add.reduceat(np.take(weight, ranks), offsets[:-1]) for weight in self.weights]
        return lists, np.stack(sums)

    def _ranks(self, random: np.random.Generator, size: int) -> npt.NDArray[np.intp]:
        return np.searchsorted(self.thresholds, random.integers(0, 2**32, size, np.uint32), side="right")


def _distinct_values(slot: Slot, random: np.random.Generator) -> npt.NDArray[np.uint64]:
    """What the data shows for each popularity rank: random, so neither the order nor another slot gives a rank away."""
    if slot.kind == "uint64_list":
        return _distinct(lambda size: random.integers(0, 2**64, size, np.uint64), slot.cardinality)
    identifiers = _distinct(lambda size: random.integers(0, 2**32, size, np.uint64), slot.cardinality)
    hex_pair = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), dtype=np.uint16)
    identifier_bytes = identifiers.astype(">u4").view(np.uint8).reshape(-1, 4)
    return hex_pair[identifier_bytes].view(np.uint64).ravel()


def _distinct(draw: Callable[[int], npt.NDArray[np.uint64]], size: int) -> npt.NDArray[np.uint64]:
    """`size` distinct numbers in random order, from a source that may repeat itself."""
    numbers = draw(size)
    while True:
        is_first = np.zeros(size, np.bool_)
        is_first[np.unique(numbers, return_index=True)[1]] = True
        if is_first.all():
            return numbers
        numbers[~is_first] = draw(int(size - is_first.sum()))


def _sigmoid(logit: DoubleArray) -> DoubleArray:
    # Through tanh, because exp overflows at the steep end of the calibration.
    return 0.5 + 0.5 * np.tanh(0.5 * logit)


def _bisect(function: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where the increasing `function` has the value `wanted`, to 2**-24 of the range; `high` if it stays below."""
    for _ in range(24):
        middle = (low + high) / 2
        if function(middle) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2

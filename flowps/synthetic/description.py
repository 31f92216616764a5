"""What a synthetic data set looks like: its columns, sizes and difficulty, as plain values.

Covers: the declarative `Description`, its checks, and the three standard ones (`quickstart`, `criteo`, `dsp_ctr`).
Does not cover: how examples are drawn (`truth`) or stored (`dataset`). Called by whoever generates a data set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from flowps.errors import ConfigError

SlotKind = Literal["string8hex", "uint64_list"]


@dataclass(frozen=True)
class DenseColumn:
    """A heavy-tailed count stored as float32; a share `null_rate` of its cells, chosen at random, is null."""

    name: str
    null_rate: float = 0.0


@dataclass(frozen=True)
class Slot:
    """A sparse feature with `cardinality` distinct values.

    "string8hex" holds one value per example, a string of 8 hex digits. "uint64_list" holds a list of 64-bit signs with
    `mean_signs` of them on average, at least one: its length is 1 + Poisson(mean_signs - 1).
    """

    name: str
    cardinality: int
    kind: SlotKind = "string8hex"
    mean_signs: float = 1.0


@dataclass(frozen=True)
class Description:
    """Everything that decides the bytes of a data set. Equal descriptions give equal data.

    `zipf_exponent`: the value of popularity rank r (from 1) is drawn with probability proportional to r**-exponent.
    `label_rate`: expected share of positive labels. `target_auc`: AUC that the true probabilities should reach.
    `dense_share`, `interaction_share`: shares of the logit's variance that come from the dense columns and from pairs
    of slot values (a factorisation machine with `interaction_rank` factors); the slots on their own carry the rest,
    equally. `rarity_damping`: a value's hidden weight has a deviation proportional to its share**rarity_damping; the
    more, the less of the signal sits in values too rare to learn, and the closer a trained model gets to the best AUC.
    The hidden model does not depend on `train_rows` and `test_rows`, nor do the row groups that are full.
    """

    name: str
    dense: tuple[DenseColumn, ...]
    slots: tuple[Slot, ...]
    zipf_exponent: float
    label_rate: float
    target_auc: float
    row_group_rows: int
    train_rows: int
    test_rows: int
    dense_share: float = 0.0
    interaction_share: float = 0.0
    interaction_rank: int = 0
    rarity_damping: float = 0.0
    seed: int = 7

    def __post_init__(self) -> None:
        checks = (
            (self.train_rows >= 1, f"rows = {self.train_rows}; expected at least 1"),
            (self.test_rows >= 1, f"test_rows = {self.test_rows}; expected at least 1"),
            (1 <= self.row_group_rows <= 2**20, f"row_group_rows = {self.row_group_rows}; expected 1 to {2**20}"),
            (self.seed >= 0, f"seed = {self.seed}; expected 0 or more"),
            (0 < self.label_rate < 1, f"label_rate = {self.label_rate}; expected between 0 and 1"),
            (0.5 < self.target_auc < 1, f"target_auc = {self.target_auc}; expected between 0.5 and 1"),
            (self.zipf_exponent > 0, f"zipf_exponent = {self.zipf_exponent}; expected more than 0"),
            (self.rarity_damping >= 0, f"rarity_damping = {self.rarity_damping}; expected 0 or more"),
            (len(self.slots) >= 1, "no slots; expected at least one"),
        )
        for holds, found in checks:
            if not holds:
                raise ConfigError(f"data set '{self.name}': {found}")
        self._check_shares()
        self._check_columns()

    def _check_shares(self) -> None:
        if self.dense_share < 0 or self.interaction_share < 0 or self.dense_share + self.interaction_share > 1:
            raise ConfigError(
                f"data set '{self.name}': dense_share = {self.dense_share} and interaction_share = "
                f"{self.interaction_share}; expected shares from 0 that add up to at most 1"
            )
        if self.dense_share and not self.dense:
            raise ConfigError(f"data set '{self.name}': dense_share = {self.dense_share}, but no dense columns")
        if self.interaction_share and (self.interaction_rank < 1 or len(self.slots) < 2):
            raise ConfigError(
                f"data set '{self.name}': interaction_share = {self.interaction_share} needs interaction_rank >= 1 and "
                f"two slots; found interaction_rank = {self.interaction_rank} and {len(self.slots)} slots"
            )

    def _check_columns(self) -> None:
        names = ["label", *(column.name for column in self.dense), *(slot.name for slot in self.slots)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"data set '{self.name}': column names used twice: {', '.join(twice)}")
        for column in self.dense:
            if not 0 <= column.null_rate <= 1:
                raise ConfigError(f"dense column '{column.name}': null_rate = {column.null_rate}; expected 0 to 1")
        for slot in self.slots:
            # Draws are made from 32 random bits, so rarer values than about 2**-32 would never appear.
            if not 1 <= slot.cardinality <= 2**26:
                raise ConfigError(f"slot '{slot.name}': cardinality = {slot.cardinality}; expected 1 to {2**26}")
            if slot.kind == "string8hex" and slot.mean_signs != 1:
                raise ConfigError(f"slot '{slot.name}': mean_signs = {slot.mean_signs}; a string slot has exactly 1")
            if slot.mean_signs < 1:
                raise ConfigError(f"slot '{slot.name}': mean_signs = {slot.mean_signs}; expected at least 1")


def _criteo_shaped(name: str, max_cardinality: int, train_rows: int) -> Description:
    num_dense, num_slots, min_cardinality = 13, 26, 10
    growth = max_cardinality / min_cardinality
    return Description(
        name=name,
        dense=tuple(DenseColumn(f"I{i + 1}", round(0.45 * i / (num_dense - 1), 4)) for i in range(num_dense)),
        slots=tuple(Slot(f"C{i + 1}", round(min_cardinality * growth ** (i / (num_slots - 1)))) for i in range(num_slots)),
        zipf_exponent=1.1,
        label_rate=0.25,
        target_auc=0.795,
        row_group_rows=65_536,
        train_rows=train_rows,
        test_rows=100_000,
        dense_share=0.25,
        interaction_share=0.05,
        interaction_rank=3,
        # So that one epoch of `criteo` takes embeddings of 16 and an MLP 128-64 to a test AUC of about 0.765.
        rarity_damping=0.02,
    )


def criteo() -> Description:
    """The public shape: 13 counts with nulls and 26 string slots of 10 to 1,000,000 values (geometric)."""
    return _criteo_shaped("criteo", max_cardinality=1_000_000, train_rows=1_000_000)


def quickstart() -> Description:
    """`criteo` with 10 to 100,000 values per slot: learnable within a minute of training."""
    return _criteo_shaped("quickstart", max_cardinality=100_000, train_rows=8_000_000)


# Mean signs per example of slots 0 to 37, as measured on a production trainer.
_DSP_MEAN_SIGNS = (
    *(2, 81.1, 42.4, 3, 3, 8.6, 4.4, 2, 1.1, 7.25, 2.7, 11.9, 5, 7.25, 7.25, 2.2, 2, 1, 1),
    *(1, 1, 1, 28.8, 3, 1, 1, 4, 1.4, 4, 2.2, 1, 3, 1, 3.8, 8.6, 1.1, 1.4, 1.1),
)


def dsp_ctr() -> Description:
    """The production shape: 76 list slots of 64-bit signs, about 390 signs per example, 9 % positive labels."""
    # Slots 38 to 75 repeat the measured ones, without their three long histories.
    mean_signs = (*_DSP_MEAN_SIGNS, *(4.0 if mean in (81.1, 42.4, 28.8) else mean for mean in _DSP_MEAN_SIGNS))
    return Description(
        name="dsp_ctr",
        dense=(),
        slots=tuple(Slot(f"slot_{i}", 100_001, "uint64_list", float(mean)) for i, mean in enumerate(mean_signs)),
        zipf_exponent=1.05,
        label_rate=0.09,
        target_auc=0.873,
        row_group_rows=16_384,
        train_rows=200_000,
        test_rows=20_000,
        # So that one epoch takes embeddings of 16 and an MLP 512-256 to a test AUC of about 0.74, synchronously.
        rarity_damping=0.015,
    )


WORKLOADS: MappingProxyType[str, Callable[[], Description]] = MappingProxyType(
    {"quickstart": quickstart, "criteo": criteo, "dsp_ctr": dsp_ctr}
)
"""The standard descriptions by name."""

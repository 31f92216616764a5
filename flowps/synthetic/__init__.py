"""Synthetic CTR data sets whose answer is known: `python -m flowps.synthetic OUT_DIR`.

Covers: describing a data set (`description`), the hidden model that labels it and so the best AUC any model can reach
(`truth`), and writing it as Parquet files (`dataset`). Does not cover: reading them back, training, or real data sets.
Called by the command, by examples, benchmarks and tests; nothing else in flowps depends on it.
"""

from flowps.synthetic.dataset import Dataset, generate
from flowps.synthetic.description import WORKLOADS, DenseColumn, Description, Slot, criteo, dsp_ctr, quickstart
from flowps.synthetic.truth import GroundTruth, rank_auc, true_probability

__all__ = [
    "WORKLOADS",
    "Dataset",
    "DenseColumn",
    "Description",
    "GroundTruth",
    "Slot",
    "criteo",
    "dsp_ctr",
    "generate",
    "quickstart",
    "rank_auc",
    "true_probability",
]

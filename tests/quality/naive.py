"""Slow and obvious twins, and samples to try."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from flowps.batch import Float32
from flowps.quality import Quality, Tally


def sample(n: int, scale: float = 1.0, shift: float = -1.0, seed: int = 0) -> tuple[Float32, Float32]:
    """Labels drawn from the probabilities that the logits mean, logits float32."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(shift, scale, n)
    return (rng.random(n) < expit(logits)).astype(np.float32), logits.astype(np.float32)


def scored(labels: Float32, logits: Float32, slices: dict[str, Any] | None = None, group: Any = None, **how: int) -> Quality:
    tally = Tally(tuple(slices or {}), "user" if group is not None else "")
    tally.update(labels, logits, slices, group)
    return tally.result(**how)


def logloss(labels: Float32, logits: Float32) -> float:
    """In float64, without clipping."""
    x, y = logits.astype(np.float64), labels.astype(np.float64)
    return math.fsum(np.logaddexp(0, x) - x * y) / len(x)


def gauc(labels: Float32, logits: Float32, groups: Sequence[Any]) -> tuple[float | None, int, int, int, int]:
    """GAUC, groups and samples counted, groups and samples left out; a loop over the groups."""
    weighted, counted, left_out = Fraction(0), [0, 0], [0, 0]
    for group in set(groups):
        of = np.array([value == group for value in groups])
        n = int(of.sum())
        if len(set(labels[of])) == 2:
            weighted += n * Fraction(float(roc_auc_score(labels[of], logits[of])))
            counted[0] += 1
            counted[1] += n
        else:
            left_out[0] += 1
            left_out[1] += n
    return (float(weighted / counted[1]) if counted[1] else None), *counted, *left_out


def column(values: Sequence[Any], kind: Any = None) -> Any:
    return pa.array(values, kind)

"""Weights of rows in fewer bits, and what that costs.

float16   IEEE 754 binary16, rounded to nearest
int8      a whole number from -127 to 127 for each weight and a float32 scale for each row: weight = number · scale, with
          scale = the row's largest |weight| / 127 (symmetric, per row)

Covers the arithmetic; `pack` writes and `rows` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32
from flowps.errors import BundleError
from flowps.serving.manifest import Dtype

_MOST = 127
DTYPES: dict[Dtype, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


def quantize(weights: Float32, dtype: Dtype) -> tuple[NDArray[Any], Float32 | None]:
    """Weights [n, dim] as they are stored, and for int8 the scales [n].

    Raises BundleError for weights that are NaN or infinite, or become infinite in float16.
    """
    if not np.isfinite(weights).all():
        raise BundleError("a weight is NaN or infinite: the run was spoiled; export an earlier checkpoint's run")
    if dtype == "float32":
        return weights, None
    if dtype == "float16":
        with np.errstate(over="ignore"):
            found = weights.astype(np.float16)
        if not np.isfinite(found).all():
            raise BundleError(
                f"a weight is {np.abs(weights).max():g}, more than float16 holds (65504); use --dtype int8 or float32"
            )
        return found, None
    scales = np.abs(weights).max(axis=1, initial=0) / np.float32(_MOST)
    by = np.where(scales > 0, scales, np.float32(1))[:, None]  # also of rows so small that their scale is 0
    return np.clip(np.rint(weights / by), -_MOST, _MOST).astype(np.int8), scales


def dequantize(stored: NDArray[Any], scales: Float32 | None) -> Float32:
    """Weights [n, dim] as float32; a copy, or what is float32 already."""
    found = stored.astype(np.float32, copy=False)
    return found if scales is None else found * scales[:, None]


@dataclass
class Error:
    """The differences between trained and stored weights, over all that was added."""

    most: float = 0.0
    squares: float = 0.0
    of_weights: float = 0.0

    def add(self, weights: Float32, stored: NDArray[Any], scales: Float32 | None) -> None:
        """What was stored for these weights."""
        difference = np.abs(dequantize(stored, scales) - weights)
        self.most = max(self.most, float(difference.max(initial=0)))
        self.squares += float(np.square(difference, dtype=np.float64).sum())
        self.of_weights += float(np.square(weights, dtype=np.float64).sum())

    @property
    def relative(self) -> float:
        """Root mean square of the differences, by that of the weights."""
        return float(np.sqrt(self.squares / self.of_weights)) if self.of_weights else 0.0

"""float32 ↔ float16 for the wire: as fast as memory, where numpy's own casts are not (`python -m bench.rpc`)."""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import kernel
from flowps.ps.kernels.vector import fill, lane, lanes16, load_as, store_as

_SIZE = np.int32(0x7FFFFFFF)
INFINITE = 0x7F800000  # bits of float32 infinity; NaN has more


@kernel
def largest(bits):
    """The largest of the numbers' absolute values, as its bits; from INFINITE on there is a NaN or infinity among them.

    bits   int32 [n], those of float32 numbers
    """
    found = np.int32(0)
    for i in range(len(bits)):
        found = max(found, bits[i] & _SIZE)
    return found


@kernel
def narrow(values, scale, out):
    """out = values * scale as float16, rounded to nearest; all finite.

    values   float32 [n]; out   int16 [n], the bits of float16 numbers
    """
    i = 0
    while i + 16 <= len(values):
        store_as(out, i, load_as(lanes16(), values, i) * fill(lanes16(), scale))
        i += 16
    while i < len(values):
        store_as(out, i, load_as(lane(), values, i) * fill(lane(), scale))
        i += 1


@kernel
def widen(values, scale, out):
    """out = values * scale as float32, of int16 [n], the bits of float16 numbers."""
    i = 0
    while i + 16 <= len(values):
        store_as(out, i, load_as(lanes16(), values, i) * fill(lanes16(), scale))
        i += 16
    while i < len(values):
        store_as(out, i, load_as(lane(), values, i) * fill(lane(), scale))
        i += 1

"""Which new signs get a row: those seen often enough, or chosen by chance."""

from __future__ import annotations

import numpy as np

from flowps.ps.kernels import kernel
from flowps.ps.kernels.layout import SIGHTS
from flowps.ps.kernels.vector import random_word

_U0, _U1, _U11, _U32 = (np.uint64(n) for n in (0, 1, 11, 32))
_LOW32 = np.uint64(0xFFFFFFFF)
_UNIT = 2.0**-53
_ADMISSION = np.uint64(0xD1B54A32D192ED03)  # keeps these numbers apart from those of first weights


@kernel
def is_admitted(sign, stripe, sketch, width, meta, seed, now, after, share):
    """Whether a sign without a row gets one, at this sight of it.

    after   sights it takes, this one included; with more than 1 the sight is counted
    share   probability, the same for all sights in lookup `now`
    """
    if after > 1 and _sight(sketch, stripe, width, sign, meta) < after:
        return False
    return share >= 1.0 or np.float64(np.int64(random_word(sign ^ seed ^ _ADMISSION, now) >> _U11)) * _UNIT < share


@kernel
def _sight(sketch, stripe, width, sign, meta):
    """Count one sight of a sign that has no row, and return how often it has been seen, at least.

    A count-min sketch (Cormode, Muthukrishnan, J. Algorithms 55, 2005) of 4 counters with conservative update (Estan, Varghese,
    SIGCOMM 2002), one per stripe. All counters are halved after one sight per two counters of a line, so that old sights fade: a
    sign whose sights lie far apart may never be seen often enough, and about one in twenty is counted once too often.
    """
    at = stripe * 4 * width
    upper, lower = random_word(sign, _U0), random_word(sign, _U1)
    least = np.int64(255)
    for line in range(4):
        least = min(least, np.int64(sketch[at + _place(line, width, upper, lower)]))
    seen = min(least + 1, 255)
    for line in range(4):
        place = at + _place(line, width, upper, lower)
        if np.int64(sketch[place]) < seen:
            sketch[place] = np.uint8(seen)
    meta[stripe, SIGHTS] += 1
    if 2 * meta[stripe, SIGHTS] >= width:
        meta[stripe, SIGHTS] = 0
        for place in range(at, at + 4 * width):
            sketch[place] = sketch[place] >> np.uint8(1)
    return seen


@kernel
def _place(line, width, upper, lower):
    """The counter of a sign in a line, chosen by 32 of its random bits."""
    word = upper if line < 2 else lower
    return line * width + np.int64((((word >> (_U32 if line & 1 else _U0)) & _LOW32) * np.uint64(width)) >> _U32)

"""numba kernels of the embedding table: arrays and scalars in, the caller allocates every output, no GIL, no Python objects.

`vector` has the operations numba lacks; `draw` begins rows; `index` finds, creates and forgets signs; `pool` reads rows; `step` is
one optimizer step of one row and `update` that of a batch; `carry` takes rows out for a checkpoint and puts them back. Each has a
slow numpy twin in `tests/ps/naive.py` or `tests/ps/twins.py`. Imports nothing of flowps.

Layout shared by all of them:

    index    one array of (sign, row + 1 | stamp << 31), in stripes: see `layout`
    arena    float32 [(capacity + 1) * stride]: row r starts at r * stride: `dim` weights, then the optimizer's state
    weights  the arena seen as what weights are stored in: float32, or 16 bits, `widening` = 2 of them to each float of the arena
    rows     int32: the row of each sign of a batch; the last row of the arena, `none`, is zeros and stands for signs without one

The private option `_nrt=False` keeps numba from counting references in the kernels; it forbids allocating, which these never do.
How much that brings depends on numba's version (`python -m bench.kernel` shows it). `tests/ps/test_kernels.py` holds that it still
works; pyproject.toml bounds numba's version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False, "_nrt": False}


def kernel(function: Callable[..., Any]) -> Any:
    """The decorator of every kernel."""
    return _cached(numba.njit(cache=True, **OPTIONS)(function))


def inlined(function: Callable[..., Any]) -> Any:
    """The same for a piece that becomes part of each caller, so that what the caller knows (a dim of 16) is known in it."""
    return _cached(numba.njit(cache=True, forceinline=True, **OPTIONS)(function))


def _cached(dispatcher: Any) -> Any:
    """Let the compiled code on disk be that of all of this folder's sources.

    numba goes by the file that a function is in; but what it calls, in other files, is compiled into it.
    """
    dispatcher._cache._cache_file._source_stamp = _SOURCES
    return dispatcher


_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()

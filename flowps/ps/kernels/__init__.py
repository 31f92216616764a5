"""numba kernels of the embedding table: arrays and scalars in, the caller allocates every output, no GIL, no Python objects.

`vector` has the few operations numba lacks; `index` finds signs, `pool` reads rows, `update` steps them. Each
kernel has a slow numpy twin in `tests/ps/naive.py`. Imports nothing of flowps.

Layout shared by all of them:

    index   uint64 [2 * size], size a power of two: entry p is (sign, row + 1 | slot << 32) at 2p and 2p + 1; second word 0: empty
    arena   float32 [capacity * stride]: row r starts at r * stride: `dim` weights, then the optimizer's state
    rows    int32 [n]: the row of each sign of a batch, -1 where there is none

The private option `_nrt=False` keeps numba from counting references in the kernels; it forbids allocating, which these never do.
How much that brings depends on numba's version (`python -m bench.kernel` shows it). `tests/ps/test_kernels.py` holds that it still
works; pyproject.toml bounds numba's version.
"""

import numba

kernel = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False, _nrt=False)
"""The decorator of every kernel."""

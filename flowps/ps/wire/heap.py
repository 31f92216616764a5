"""Memory of messages is used again, not given back to the operating system and asked for anew with every message.

A lookup's answer is some megabytes; the page faults of fresh memory for it cost more CPU than copying it (`python -m bench.rpc`
compares). Dask's nanny makes its workers give back everything above 64 KiB.
"""

from __future__ import annotations

import ctypes

KEEP_BYTES = 1 << 30
MMAP_BYTES = 32 << 20  # glibc's limit; larger blocks are mapped and unmapped by themselves
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_memory() -> None:
    """Let this process keep up to `KEEP_BYTES` of freed memory in each of its heaps. Does nothing without glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES)
    mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)

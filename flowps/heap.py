"""Memory that is freed is used again, not given back to the operating system and asked for anew with every batch.

Signs, embeddings and messages are some megabytes each: the page faults of fresh memory for them cost more CPU than filling it
(`python -m bench.rpc` compares; a training of `dsp_ctr` takes 5 % less). Dask's nanny makes its workers give back all above 64 KiB.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

KEEP_BYTES = 1 << 30
MMAP_BYTES = 32 << 20  # glibc's limit; larger blocks are mapped and unmapped by themselves
ARROW_POOL = "system"  # its own allocators give pages back after some milliseconds, which is sooner than the next partition
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_memory() -> None:
    """Let this process keep up to `KEEP_BYTES` of freed memory in each of its heaps. Does nothing without glibc."""
    if (mallopt := _glibc("mallopt")) is not None:
        mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES)
        mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)


@contextmanager
def memory_kept() -> Iterator[None]:
    """As `keep_memory`, for Arrow's memory too; what is free at the end is given back. For a process that does all work itself."""
    before = pa.default_memory_pool()
    keep_memory()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)
        if (malloc_trim := _glibc("malloc_trim")) is not None:
            malloc_trim(0)


def _glibc(function: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), function)
    except (OSError, AttributeError):
        return None

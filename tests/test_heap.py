"""`heap`: tells glibc, and does without where there is none; Arrow's memory for a while."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from flowps import heap


def test_both_thresholds_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of malloc.h: M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD -3."""
    told: dict[int, int] = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=told.__setitem__))
    heap.keep_memory()
    assert told == {-1: heap.KEEP_BYTES, -3: heap.MMAP_BYTES}


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such function, or no library to be opened."""

    def none(name: Any) -> Any:
        raise OSError("no library")

    for found in (lambda name: SimpleNamespace(), none):
        monkeypatch.setattr(ctypes, "CDLL", found)
        heap.keep_memory()
        with heap.memory_kept():
            assert pa.default_memory_pool().backend_name == "system"


def test_arrow_takes_part_until_the_end_also_of_a_run_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, Any]] = []
    glibc = SimpleNamespace(mallopt=lambda *of: told.append(("mallopt", of)), malloc_trim=lambda pad: told.append(("trim", pad)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: glibc)
    before = pa.default_memory_pool().backend_name

    def fail() -> None:
        with heap.memory_kept():
            assert pa.default_memory_pool().backend_name == heap.ARROW_POOL
            assert ("trim", 0) not in told
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert pa.default_memory_pool().backend_name == before
    assert told[-1] == ("trim", 0)

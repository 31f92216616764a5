"""`keep_memory`: tells glibc, and does without where there is none."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from flowps.ps.wire import heap


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

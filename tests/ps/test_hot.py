"""Which signs are asked for most, against exact counts."""

from __future__ import annotations

import numpy as np
import pytest

from flowps.ps import hot
from flowps.ps.hot import EVERY, KEPT, HotSigns


@pytest.fixture
def every_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot, "EVERY", 1)


def bounds(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum(lengths, dtype=np.int64)
    return ends - np.array(lengths, np.int64), ends


def test_hot_signs_are_found_with_their_shares_and_slots(every_lookup: None) -> None:
    rng, found = np.random.default_rng(0), HotSigns()
    exact: dict[int, int] = {}
    for _ in range(300):
        first, second = rng.zipf(1.3, 600).astype(np.uint64), rng.zipf(1.3, 400).astype(np.uint64) + np.uint64(1 << 63)
        signs = np.concatenate([first, second])
        found.observe(signs, *bounds(600, 400))
        for sign, count in zip(*np.unique(signs, return_counts=True), strict=True):
            exact[int(sign)] = exact.get(int(sign), 0) + int(count)
    total = sum(exact.values())
    top = found.top(8)
    assert [sign for _, sign, _ in top] == sorted(exact, key=lambda sign: -exact[sign])[:8]
    for slot, sign, share in top:
        assert slot == (sign >= 1 << 63)
        assert share == pytest.approx(exact[sign] / total, rel=0.1)


def test_shares_are_never_too_large(every_lookup: None) -> None:
    """More signs than are kept, all as frequent: nothing is hot."""
    found = HotSigns()
    for turn in range(50):
        found.observe(np.arange(turn * 1000, turn * 1000 + 1000, dtype=np.uint64), *bounds(1000))
    assert len(found._signs) <= KEPT
    assert all(share <= 1 / 50_000 for _, _, share in found.top(5))


def test_a_large_lookup_is_sampled_evenly(every_lookup: None) -> None:
    found = HotSigns()
    signs = np.concatenate([np.full(90_000, 1, np.uint64), np.full(10_000, 2, np.uint64)])
    for _ in range(10):
        found.observe(signs, *bounds(100_000))
    assert [(sign, round(share, 2)) for _, sign, share in found.top(5)] == [(1, 0.9), (2, 0.1)]


def test_most_lookups_are_passed_over() -> None:
    found, asked = HotSigns(), np.array([7], np.uint64)
    for _ in range(EVERY):
        found.observe(asked, *bounds(1))
    assert found._sampled == 1


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_nothing_is_asked_for(every_lookup: None, lengths: tuple[int, ...]) -> None:
    found = HotSigns()
    found.observe(np.empty(0, np.uint64), *bounds(*lengths))
    assert found.top(3) == []

"""The benchmark of the placement: its fit finds what there is, and what it reads from a run is what the run has reported."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import placement
from flowps.cluster.shard_report import PlacementReport, ShardReport
from flowps.ps import load
from flowps.ps.load import SlotLoad
from flowps.ps.placement import ShardLoad


def test_a_fit_finds_the_costs() -> None:
    random = np.random.default_rng(0)
    points = [{"signs": signs, "distinct": distinct} for signs, distinct in random.integers(1, 1000, (20, 2)).astype(float)]
    for point in points:
        point["seconds"] = (3 * point["signs"] + 50 * point["distinct"] + 700) / 1e9
    found = placement.fit(points, ("signs", "distinct", "call"))
    assert found["ns"] == pytest.approx({"signs": 3, "distinct": 50, "call": 700})
    assert list(found["fitted_over_measured"].values()) == pytest.approx([1] * 5)
    points[0]["seconds"] *= 2
    spread = placement.fit(points, ("signs", "distinct", "call"))["fitted_over_measured"]
    assert spread["least"] < 0.7 < spread["p10"] <= spread["median"] <= spread["p90"] <= spread["most"]


def test_the_shards_costs() -> None:
    found = placement.shard_costs([32, 64], [1, 3], [20, 400], turns=3)
    assert [(point["size"], point["values"]) for point in found] == [(n, v) for n in (32, 64) for _ in (1, 3) for v in (20, 400)]
    for point in found:
        assert point["size"] <= point["signs"] <= 4 * point["size"]
        assert 1 <= point["distinct"] <= min(point["signs"], point["values"])
        assert point["seconds"] > 0


IN_SHARD_NS = {"signs": 5.0, "distinct": 80.0, "bags": 40.0, "call": 1e5}


def report() -> PlacementReport:
    shares = [(0.5, 0.3, 0.3, 0.26), (0.3, 0.3, 0.3, 0.24), (0.2, 0.4, 0.4, 0.5)]
    slots = (["a", "b (1/2)"], ["b (2/2)"], ["c"])
    shards = [
        ShardReport(f"ps-{k}", list(of), ShardLoad(1 / 3, 1 / 3, 1 / 3, 1 / 3), ShardLoad(*share))
        for k, (of, share) in enumerate(zip(slots, shares, strict=True))
    ]
    loads = {"a": SlotLoad(2, 1, 9), "b": SlotLoad(30, 10, 99), "c": SlotLoad(1, 1, 9)}
    return PlacementReport("somewhere", shards, loads)


def test_unevenness() -> None:
    found = placement.unevenness(report(), IN_SHARD_NS)
    assert found["split"] == ["b"]
    figures = [found[what][of] for what in ("predicted", "measured") for of in ("lookups", "rows", "time")]
    assert figures == pytest.approx([1, 1, 1, 1.5, 1.2, 1.5])
    assert [share["time"] for share in found["measured"]["shares"]] == [0.26, 0.24, 0.5]
    times = np.array([2 * 5 + 1 * 80 + 40 + (30 * 5 + 10 * 80) / 2 + 40, (30 * 5 + 10 * 80) / 2 + 40, 1 * 5 + 1 * 80 + 40])
    assert found["fitted"]["shares"] == pytest.approx(times / times.sum())
    assert found["fitted"]["time"] == pytest.approx(times.max() / times.mean())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the trainings."""
    to = tmp_path / "placement.json"

    def placed(shards: int, mode: str, in_shard_ns: Mapping[str, float], data: Path | None) -> dict[str, Any]:
        return {"shards": shards, "mode": mode, "steps": 1, **placement.unevenness(report(), in_shard_ns)}

    for name, value in (("placed", placed), ("SIZES", (32,)), ("SIGNS", (1, 3)), ("VALUES", (20, 400))):
        monkeypatch.setattr(placement, name, value)
    monkeypatch.setattr(placement, "_WIRE", ((2, 1, 4), (3, 1, 8), (2, 5, 8)))
    monkeypatch.setattr(sys, "argv", ["bench.placement", "--turns", "2", "--rounds", "1", "--json", str(to)])
    assert placement.main() == 0
    result = json.loads(to.read_text(encoding="utf-8"))
    assert capsys.readouterr().out == placement.markdown(result) + "\n"
    assert [(run["shards"], run["mode"]) for run in result["placements"]] == [
        (4, "embedded"), (4, "processes"), (8, "embedded"), (8, "processes")
    ]  # fmt: skip
    costs = result["costs"]
    assert costs["sign_ns"]["used"] == load._SIGN_NS
    assert costs["sign_ns"]["in_shard"] == costs["shard"]["ns"]["signs"]
    assert costs["byte_ns"]["on_wire"] == costs["wire"]["ns"]["bytes"]
    assert costs["byte_ns"]["in_shard"] == pytest.approx(costs["shard"]["ns"]["bags"] / 64)
    assert [point["bytes"] for point in costs["wire"]["points"]] == [1024 * 4 * floats for floats in (8, 24, 16)]
    assert len(costs["shard"]["points"]) == 4
